"""Frozen linears: bytes against transformers + bitsandbytes, arithmetic against plain autograd, and what a graph
keeps of them.
"""

import ctypes
import os
import subprocess
import sys
import weakref

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qmica import quant
from qmica.errors import QmicaError

CPU = torch.device("cpu")
BITS = (4, 8, 16)
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
INT8 = BitsAndBytesConfig(load_in_8bit=True)


def matrix(out=48, columns=80, seed=0, dtype=torch.bfloat16):
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def frozen(bits, bias=True, **shape):
    weight = matrix(**shape)
    return quant.quantize(weight, matrix(1, len(weight), 9)[0] if bias else None, bits, CPU)


def inputs(columns=80, rows=(3, 5), dtype=torch.float32, seed=1):
    x = torch.randn(*rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_()


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (ours.dtype, ours.shape, theirs.shape)
    assert torch.equal(raw(ours), raw(theirs))


# ---- bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "m", "qwen2", dtype=torch.bfloat16)


def theirs_and_ours(folder, config, bits):
    """Each linear of transformers' quantized model beside ours made from the same tensor."""
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield module, quant.quantize(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), bits, CPU)


def test_nf4_is_bit_identical_to_transformers(folder):
    count = 0
    for theirs, ours in theirs_and_ours(folder, NF4, 4):
        same(ours.weight.data, theirs.weight.data)
        a, b = ours.weight.quant_state, theirs.weight.quant_state
        for one, other in ((a, b), (a.state2, b.state2)):
            same(one.absmax, other.absmax)
            same(one.code, other.code)
            assert one.blocksize == other.blocksize
        same(a.offset, b.offset)
        assert (a.quant_type, a.blocksize, a.nested) == (b.quant_type, b.blocksize, True) == ("nf4", 64, True)
        count += 1
    assert count == 14


def test_int8_is_bit_identical_to_transformers(folder):
    count = 0
    for theirs, ours in theirs_and_ours(folder, INT8, 8):
        same(ours.weight.data, theirs.weight.data)
        same(ours.weight.SCB, theirs.weight.SCB)
        count += 1
    assert count == 14


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (3, 64), (1100, 1000), (3, 1 << 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_are_the_whole(shape, dtype):
    """Quantized piece by piece it is what bitsandbytes makes of the whole weight; blocks run on from row to row."""
    weight = matrix(*shape, dtype=dtype)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quant.quantize(weight, None, 4, CPU).weight
    same(ours.data, codes)
    same(ours.quant_state.absmax, state.absmax)
    same(ours.quant_state.state2.absmax, state.state2.absmax)
    assert {k: str(v) for k, v in ours.quant_state.as_dict(True).items()} == {
        k: str(v) for k, v in state.as_dict(True).items()
    }
    theirs = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    ours = quant.quantize(weight, None, 8, CPU).weight
    same(ours.data, theirs.data)
    same(ours.SCB, theirs.SCB)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 80), (64, 64), (1, 64), (1000, 72)])
def test_bytes_are_counted_as_they_are(bits, shape):
    linear = frozen(bits, bias=False, out=shape[0], columns=shape[1])
    held = [linear.weight.data]
    if bits == 4:
        state = linear.weight.quant_state
        held += [state.absmax, state.state2.absmax]
    if bits == 8:
        held += [linear.weight.SCB]
        assert linear.weight.CB is None or linear.weight.CB.data_ptr() == linear.weight.data_ptr(), "held twice"
    assert quant.FORMATS[bits].count_bytes(*shape) == sum(part.nbytes for part in held)


@pytest.mark.parametrize("bits", BITS)
def test_the_16bit_weight_is_let_go(bits):
    weight = matrix(dtype=torch.float32)
    gone = weakref.ref(weight.untyped_storage())
    linear = quant.quantize(weight, None, bits, CPU)
    del weight
    assert gone() is None, f"{linear} keeps the weight it was made from"


# ---- dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantized_values(dtype):
    """NF4: bitsandbytes' own kernel, at each dtype. int8: codes · scale / 127. 16: a cast."""
    weight = matrix(columns=128)
    four = quant.quantize(weight, None, 4, CPU)
    exact = bnb.functional.dequantize_4bit(four.weight.data, four.weight.quant_state).float()
    got = quant.dequantize(four, dtype)
    assert got.dtype == dtype and got.shape == weight.shape
    # the state's dtype is the source's, bf16; one rounding: half a unit in the last place of bf16, 2**-9
    assert ((got.float() - exact).abs() <= exact.abs() * 2**-8).all()
    full = quant.dequantize(four).double()
    step = torch.finfo(dtype).eps / 2
    assert ((quant.dequantize(four, dtype).double() - full).abs() <= full.abs() * step + 1e-30).all()

    eight = quant.quantize(weight, None, 8, CPU)
    exact = eight.weight.data.double() * eight.weight.SCB.double()[:, None] / 127
    error = ((quant.dequantize(eight, dtype).double() - exact).abs() / exact.abs().clamp(min=1e-9)).max().item()
    assert error <= 2 * torch.finfo(dtype).eps, f"{error:.1e}"

    sixteen = quant.quantize(weight, None, 16, CPU)
    assert torch.equal(quant.dequantize(sixteen, dtype), weight.to(dtype))
    assert quant.dequantize(sixteen, dtype).dtype == dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 80), (1000, 72), (3, 7), (5, 1 << 15), (1, 64)])
def test_rows_are_those_of_the_whole(bits, shape):
    """Bit for bit, wherever they begin: in NF4 a row of 72 begins inside a block of 64, and that in one of scales."""
    linear = quant.quantize(matrix(*shape), None, bits, CPU)
    whole, stored = quant.dequantize(linear), quant.Stored.of(linear)
    assert stored.shape == shape
    places = {(0, shape[0]), (0, 1), (shape[0] - 1, shape[0]), (shape[0] // 3, shape[0] // 2 + 1)}
    for start, stop in places:
        same(stored.rows(start, stop), whole[start:stop])


@pytest.mark.parametrize("columns", [16, 64, 80, 96, 112, 128, 72])
def test_blocks_do_not_begin_with_rows(columns, monkeypatch):
    """Against the definition: a code's value times the scale of its 64, counted through the rows. And of what is asked
    of bitsandbytes, whose AVX512 kernel takes each row to begin a block, each row does.
    """
    kernel = bnb.functional.dequantize_4bit

    def asked(codes, state):
        assert len(state.shape) == 1 or state.shape[-1] % state.blocksize == 0
        return kernel(codes, state)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", asked)
    linear = quant.quantize(matrix(48, columns), None, 4, CPU)
    state = linear.weight.quant_state
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = linear.weight.data.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1).long()
    expected = state.code[codes] * scales.repeat_interleave(64)[: len(codes)]
    same(quant.dequantize(linear), expected.view(48, columns))


def test_nothing_is_loaded_from_the_hub_by_an_import(tmp_path):
    """A package `kernels` that is installed stays unused by bitsandbytes, and can be imported afterwards."""
    (tmp_path / "kernels.py").write_text(
        "print('imported')\ndef get_kernel(*names, **options):\n    print('asked for', names)\n    raise OSError\n"
    )
    code = "import qmica.quant; print('between'); import kernels"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (run.stdout, run.stderr) == ("between\nimported\n", "")


def test_bitsandbytes_is_imported_alone(monkeypatch):
    kept = type(sys)("kernels")
    monkeypatch.setitem(sys.modules, "kernels", kept)
    compiler = torch.compile
    with quant._alone():
        with pytest.raises(ImportError):
            import kernels
        assert torch.compile is not compiler and torch.compile(len) is len
    import kernels

    assert kernels is kept and torch.compile is compiler


def test_rows_of_one_level_of_scales():
    """As checkpoints without double quantization have them."""
    weight = matrix(40, 72).float()
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    parts = {"weight": codes, **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()}}
    linear = quant.from_packed((40, 72), parts, None, CPU)
    for start, stop in ((0, 40), (7, 9), (39, 40)):
        same(quant.Stored.of(linear).rows(start, stop), quant.dequantize(linear)[start:stop])


@pytest.mark.parametrize("bits", BITS)
def test_a_digest_tells_weights_apart(bits):
    first, again, other = (quant.Stored.of(frozen(bits, bias=False, seed=seed)) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    for part in again.linear.stored():  # every tensor counts: a scale as well as a code
        before = part.clone()
        part.copy_(part.roll(1) if part.numel() > 1 else part + 1)
        assert first.digest() != again.digest()
        part.copy_(before)
    assert first.digest() == again.digest()


@pytest.mark.parametrize(("bits", "most"), [(4, 0.10), (8, 0.008), (16, 1e-9)])
def test_quantization_loses_what_it_should(bits, most):
    """Relative error of Gaussian bf16 weights: NF4 0.095, int8 0.0066 (row maximum 3 sigma / 127 / sqrt(12)), bf16
    none.
    """
    weight = matrix(256, 512)
    lost = float(
        (quant.dequantize(quant.quantize(weight, None, bits, CPU)) - weight.float()).norm() / weight.float().norm()
    )
    assert lost <= most and (bits == 16 or lost > most / 3), f"{lost:.4f}"


def test_dequantize_leaves_the_state_as_it_was():
    four = frozen(4)
    dtype = four.weight.quant_state.dtype
    quant.dequantize(four, torch.float16)
    assert four.weight.quant_state.dtype == dtype


# ---- forward and backward


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradient_are_plain_autograds(bits, bias, dtype):
    linear = frozen(bits, bias)
    weight = quant.dequantize(linear, dtype)
    plain_bias = None if not bias else linear.bias.detach().to(dtype)
    x, twin = inputs(dtype=dtype), inputs(dtype=dtype)
    ours, theirs = linear(x), functional.linear(twin, weight, plain_bias)
    assert torch.equal(ours, theirs) and ours.dtype == dtype
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours.backward(upstream)
    theirs.backward(upstream)
    assert x.grad.dtype == dtype
    error = ((x.grad - twin.grad).abs().max() / twin.grad.abs().max()).item()
    assert error <= torch.finfo(dtype).eps, f"{error:.1e}"  # 0.0 on this CPU
    assert linear.weight.grad is None and (not bias or linear.bias.grad is None)


@pytest.mark.parametrize("bits", [8, 16])  # NF4's kernel writes no float64
def test_gradcheck(bits):
    linear = frozen(bits, out=6, columns=9)
    linear.bias.data = linear.bias.data.double()
    assert torch.autograd.gradcheck(linear, inputs(9, (4,), torch.float64))


def test_gradcheck_nf4_in_fp32():
    """Finite differences of a linear map are exact but for rounding: a large step shows the whole matrix."""
    linear, x = frozen(4, bias=False, out=16, columns=64), inputs(64, (2,))
    dy = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    linear(x).backward(dy)
    with torch.no_grad():
        moved = torch.stack([((linear(x + step) - linear(x)) * dy).sum(-1) for step in torch.eye(64)], -1)
    assert (moved - x.grad).abs().max() < 1e-4, f"{(moved - x.grad).abs().max():.1e}"  # 2e-5 measured


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_saved_on_the_graph(bits, dtype):
    """Neither among autograd's saved tensors nor on the node beside them, which is where bitsandbytes' int8 hides its
    input.
    """
    linear, x = frozen(bits), inputs(dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = linear(x * 1)
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert saved == [] and held == [], [tuple(tensor.shape) for tensor in saved + held]
    inner = linear(x)
    kept = weakref.ref(inner)
    outer = frozen(bits, columns=48)(inner)
    del inner
    assert kept() is None, "the input of a frozen linear outlives its forward"
    outer.sum().backward()
    assert x.grad is not None


class Block(nn.Module):
    def __init__(self, linears):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x):
        for linear in self.linears:
            x = functional.silu(linear(x))
        return x


def anonymous_bytes():
    """RssAnon after handing freed memory back."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    except (OSError, AttributeError):
        pytest.skip("needs /proc and glibc")


def held_by_checkpoints(linears):
    """What exists after a checkpointed forward of three blocks of four linears, in activations of 8 MB; and the
    gradient.
    """
    x = inputs(256, (8192,))
    blocks = [Block(linears[at : at + 4]) for at in (0, 4, 8)]

    def forward():
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        return y

    forward()  # buffers of the first use
    before = anonymous_bytes()
    y = forward()
    held = (anonymous_bytes() - before) / x.nbytes
    y.sum().backward()
    return held, x.grad


@pytest.mark.parametrize("bits", BITS)
def test_checkpointing_frees_as_much_at_every_bits(bits):
    """bitsandbytes' int8 linear keeps its input on ctx, where checkpointing cannot reach: 462 MB at 1 x 1024 tokens."""
    held, grad = held_by_checkpoints([frozen(bits, out=256, columns=256, seed=i) for i in range(12)])
    assert held < 3.5, f"{held:.1f} activations are held, the blocks' inputs and the result are 3"
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_what_bitsandbytes_itself_holds():
    """The measurement above sees what it is for: bitsandbytes' own int8 linears hold all twelve inputs."""
    held, _ = held_by_checkpoints([plain_of(8, matrix(256, 256, i)) for i in range(12)])
    assert held > 9, f"{held:.1f}: bitsandbytes no longer keeps its inputs, so FrozenMatmul has one reason less"


# ---- nothing between two steps changes anything


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("made", ["ours", "frozen"])
def test_an_eval_forward_changes_nothing(bits, forced, made, monkeypatch):
    """On AVX512-BF16 CPUs bitsandbytes repacks the weight in the first eval forward; the flag says that this is one."""
    linear = frozen(bits) if made == "ours" else quant.freeze(plain_of(bits))
    if forced:
        linear.support_avx512bf16_for_cpu = True
    stored = raw(linear.weight.data).clone()

    def step():
        x = inputs()
        y = linear.train()(x).square().sum()
        y.backward()
        return y.detach(), x.grad

    loss, grad = step()
    linear.eval()
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            linear(inputs(dtype=dtype).detach())
    again, regrad = step()
    assert torch.equal(raw(linear.weight.data), stored) and torch.equal(loss, again) and torch.equal(grad, regrad)


# ---- other people's modules


def plain_of(bits, weight=None):
    """A linear as bitsandbytes, or torch, makes it."""
    weight = matrix() if weight is None else weight
    out, columns = weight.shape
    if bits == 4:
        linear = bnb.nn.Linear4bit(columns, out, quant_type="nf4", compress_statistics=True)
        linear.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
        ).to("cpu")
    elif bits == 8:
        linear = bnb.nn.Linear8bitLt(columns, out, has_fp16_weights=False)
        linear.weight = bnb.nn.Int8Params(weight, requires_grad=False).to("cpu")
    else:
        linear = nn.Linear(columns, out, dtype=torch.bfloat16)
        linear.weight.data = weight.clone()
    return linear


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("used", [False, True])
def test_freeze_other_peoples_modules(bits, used):
    """Same storage, same values; also of an int8 linear whose first forward has moved its scales to another place."""
    plain, weight = plain_of(bits), matrix()
    if used:
        with torch.no_grad():
            plain(torch.randn(2, 80).bfloat16())
    place = plain.weight.data_ptr()
    linear = quant.freeze(plain)
    assert linear is plain and isinstance(linear, quant.FrozenLinear) and quant.freeze(linear) is linear
    assert isinstance(linear, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, nn.Linear)) and quant.bits_of(linear) == bits
    assert linear.weight.data_ptr() == place and not any(part.requires_grad for part in linear.parameters())
    assert torch.equal(quant.dequantize(linear), quant.dequantize(quant.quantize(weight, None, bits, CPU)))
    x = inputs()
    expected = functional.linear(x, quant.dequantize(linear), linear.bias.float())
    assert torch.equal(linear(x), expected)


def test_freeze_keeps_what_an_fp32_linear_is():
    plain = nn.Linear(8, 4)
    weight = plain.weight.detach().clone()
    assert torch.equal(quant.dequantize(quant.freeze(plain)), weight) and plain.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("plain", "name"),
    [
        (bnb.nn.Linear4bit(8, 4, quant_type="nf4"), "a 4-bit linear"),
        (bnb.nn.Linear8bitLt(8, 4, has_fp16_weights=False), "an 8-bit linear"),
    ],
)
def test_freeze_an_unquantized_module(plain, name):
    with pytest.raises(QmicaError) as error:
        quant.freeze(plain)
    assert str(error.value) == f"{name} has no quantized weight yet: move the model to its device first"


def test_a_linear_with_a_forward_of_its_own_is_none_of_ours():
    """Replacing its class would silently drop what it does."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Made(nn.Linear):
        """Only made in another way."""

    assert not quant.is_linear(Scaled(4, 4)) and quant.is_linear(Made(4, 4)) and quant.is_linear(nn.Linear(4, 4))
    assert (
        quant.is_linear(bnb.nn.LinearNF4(4, 4))
        and quant.is_linear(frozen(4))
        and not quant.is_linear(nn.Embedding(4, 4))
    )


# ---- checkpoints that bitsandbytes quantized


CHECKPOINTS = {
    "nf4": NF4,
    "nf4-single": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "nf4-stored-as-bf16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "int8": INT8,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_from_packed(folder, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=CHECKPOINTS[kind], device_map={"": "cpu"})
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    count = 0
    for name, theirs in model.named_modules():
        if not isinstance(theirs, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        parts = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
        parts.pop("weight_format", None)
        bias = parts.pop("bias", None)
        ours = quant.from_packed((theirs.out_features, theirs.in_features), parts, bias, CPU)
        same(ours.weight.data, theirs.weight.data)
        assert (ours.out_features, ours.in_features) == (theirs.out_features, theirs.in_features)
        assert quant.bits_of(ours) == (8 if kind == "int8" else 4) and not ours.weight.requires_grad
        quant.freeze(theirs)
        assert torch.equal(quant.dequantize(ours), quant.dequantize(theirs))
        x = inputs(theirs.in_features)
        assert torch.equal(ours(x), theirs(x))
        count += 1
    assert count == 14


# ---- optimizers


def test_optimizers_fall_back_where_cuda_is_missing():
    parameter = nn.Parameter(torch.ones(4))
    assert list(quant.OPTIMIZERS) == ["paged_adamw_8bit", "adamw_8bit", "adamw"]
    for name in ("paged_adamw_8bit", "adamw_8bit"):
        with pytest.raises(RuntimeError, match="CUDA"):
            quant.OPTIMIZERS[name]([parameter], 1e-3, (0.9, 0.999), 0.01, CPU)


def test_adamw_is_torchs():
    ours, theirs = (nn.Parameter(matrix(4, 4, dtype=torch.float32)) for _ in range(2))
    one = quant.OPTIMIZERS["adamw"]([ours], 1e-2, (0.9, 0.999), 0.1, CPU)
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, foreach=False)
    for _ in range(5):
        for parameter, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()
    assert (ours - theirs).abs().max() < 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_on_a_gpu(bits):
    """The same bytes but for NF4's last bits of scale, the same arithmetic, from a weight on the CPU."""
    weight, cuda = matrix(256, 512), torch.device("cuda")
    here, there = quant.quantize(weight, None, bits, CPU), quant.quantize(weight, None, bits, cuda)
    apart = (quant.dequantize(here) - quant.dequantize(there).cpu()).abs().max().item()
    assert apart <= 2e-2, f"{apart:.1e}"
    x = inputs(512, (7,)).detach().cuda().requires_grad_()
    there(x).backward(torch.ones(7, 256, device=cuda))
    expected = quant.dequantize(there).double().sum(0).expand(7, -1)
    assert (x.grad.double() - expected).abs().max() < 1e-3
    moved = here.to("cuda")
    assert torch.equal(quant.dequantize(moved).cpu(), quant.dequantize(quant.quantize(weight, None, bits, CPU)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit"])
def test_8bit_optimizers_step_on_a_gpu(name):
    parameter = nn.Parameter(torch.ones(64, 128, device="cuda"))
    optimizer = quant.OPTIMIZERS[name]([parameter], 1e-2, (0.9, 0.999), 0.0, torch.device("cuda"))
    parameter.square().sum().backward()
    optimizer.step()
    assert (parameter - 0.99).abs().max() < 1e-3, parameter.detach().mean().item()
