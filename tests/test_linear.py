"""MicaLinear against its formula written out, and its gradients against plain autograd and float64 finite
differences.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from qmica import quant, subspace
from qmica.linear import MicaLinear

CPU = torch.device("cpu")
BITS = (4, 8, 16)
RANK, ALPHA = 4, 12.0


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def base(bits=16, out=48, columns=64, bias=True):
    return quant.quantize(random(out, columns).bfloat16(), random(out, seed=9) if bias else None, bits, CPU)


def adapted(bits=16, trained=True, dropout=0.0, **shape):
    """MiCA on a base; trained: with an A that is not zero."""
    frozen = base(bits, **shape)
    layer = MicaLinear.from_base(frozen, subspace.minor_subspace(quant.dequantize(frozen), RANK), ALPHA, dropout)
    if trained:
        layer.A.data = random(*layer.A.shape, seed=5) * 0.3
    return layer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["mica", "lora"])
def test_step_0_is_exactly_the_base(bits, dtype, method):
    layer = adapted(bits, trained=False) if method == "mica" else MicaLinear.lora(base(bits), RANK, ALPHA)
    x = random(2, 7, 64, seed=1, dtype=dtype)
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == dtype
    assert not layer.delta().any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["mica", "lora"])
def test_what_it_trains(bits, method):
    """MiCA: A (rank, in) in fp32, B in bf16 and frozen. LoRA: both, in fp32."""
    layer = adapted(bits, trained=False) if method == "mica" else MicaLinear.lora(base(bits), RANK, ALPHA)
    trained = {name: part for name, part in layer.named_parameters() if part.requires_grad}
    assert sorted(trained) == (["A"] if method == "mica" else ["A", "B"])
    assert all(part.dtype == torch.float32 for part in trained.values())
    assert layer.A.shape == (RANK, 64) and layer.B.shape == (48, RANK) and layer.scale == ALPHA / RANK == 3.0
    assert layer.B.dtype == (torch.bfloat16 if method == "mica" else torch.float32)
    assert (layer.in_features, layer.out_features, layer.rank) == (64, 48, RANK)
    assert layer.weight is layer.base.weight


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["mica", "lora"])
def test_forward_is_the_merged_linear(bits, method):
    """y = (W + delta) x + b, where delta = alpha / rank · B A, computed in float64."""
    layer = adapted(bits)
    if method == "lora":
        layer = MicaLinear.lora(base(bits), RANK, ALPHA)
        layer.B.data = random(48, RANK, seed=6)
    x = random(5, 64, seed=1)
    expected = (ALPHA / RANK) * layer.B.double() @ layer.A.double()
    delta = layer.delta()
    assert delta.dtype == torch.float32 and delta.shape == (48, 64)
    assert (delta - expected).abs().max() < 1e-5 * expected.abs().max()
    y = x.double() @ (quant.dequantize(layer.base).double() + expected).T + layer.base.bias.double()
    error = ((layer(x) - y).abs().max() / y.abs().max()).item()
    assert error < 1e-6, f"{error:.1e}"
    effect = ((layer(x) - layer.base(x)).abs().max() / y.abs().max()).item()
    assert effect > 0.05, f"the adapter moves the output by {effect:.1e} only"


def test_switched_off_it_is_the_base():
    layer, x = adapted(), random(5, 64, seed=1)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_formula(bits, dtype):
    """dA = (s B)ᵀ dYᵀ X and dX = dY W + dY s B A, written out in float64; B and W get none."""
    layer = adapted(bits)
    x = random(3, 5, 64, seed=1, dtype=dtype).requires_grad_()
    dy = random(3, 5, 48, seed=2, dtype=dtype)
    layer(x).backward(dy)
    rows, up = x.detach().double().reshape(-1, 64), dy.double().reshape(-1, 48)
    G = up @ (layer.scale * layer.B.double())
    dA, dX = G.T @ rows, up @ quant.dequantize(layer.base).double() + G @ layer.A.detach().double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]  # measured 2e-7 and 6e-3
    for got, expected in ((layer.A.grad, dA), (x.grad.reshape(-1, 64), dX)):
        error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
        assert error < tolerance, f"{error:.1e}"
    assert layer.A.grad.dtype == torch.float32 and layer.B.grad is None and layer.base.weight.grad is None


def test_gradcheck():
    """float64 finite differences of A and x, and of LoRA's B."""
    layer = MicaLinear.lora(base(out=5, columns=7), 2, 6.0)
    layer.base.bias.data = layer.base.bias.data.double()
    A, B = (random(*shape, seed=3, dtype=torch.float64).requires_grad_() for shape in ((2, 7), (5, 2)))

    def run(x, A, B):
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(run, (random(3, 7, seed=1, dtype=torch.float64).requires_grad_(), A, B))


@pytest.mark.parametrize("bits", BITS)
def test_a_step_of_training_moves_A_alone(bits):
    layer = adapted(bits)
    before = {
        name: part.detach().clone() for name, part in layer.state_dict().items() if isinstance(part, torch.Tensor)
    }
    optimizer = torch.optim.AdamW([part for part in layer.parameters() if part.requires_grad], lr=1e-2)
    layer(random(5, 64, seed=1)).square().sum().backward()
    optimizer.step()
    moved = [name for name, part in layer.state_dict().items() if not torch.equal(part, before[name])]
    assert moved == ["A"]


def test_lora_trains_B_first():
    """B is zero, so the first gradient is B's; A's is zero."""
    layer = MicaLinear.lora(base(), RANK, ALPHA)
    layer(random(5, 64, seed=1)).square().sum().backward()
    assert layer.B.grad.abs().max() > 0 and not layer.A.grad.any()


def test_lora_starts_as_pefts():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(11)
    theirs = Linear(nn.Linear(64, 48), "default", LoraConfig(r=RANK), r=RANK, lora_alpha=ALPHA)
    torch.manual_seed(11)
    nn.Linear(64, 48)  # PEFT's base, and its own A and B before they are reset, draw first
    nn.Linear(64, RANK), nn.Linear(RANK, 48)
    layer = MicaLinear.lora(base(), RANK, ALPHA)
    bound = 1 / 64**0.5  # Kaiming-uniform with a = sqrt(5)
    for A in (layer.A, theirs.lora_A["default"].weight):
        assert A.abs().max() <= bound and A.abs().max() > 0.95 * bound
    assert not layer.B.any() and not theirs.lora_B["default"].weight.any()


def test_dropout_is_in_training_only():
    """The base sees x whole; the adapter sees dropout(x)."""
    layer, x = adapted(dropout=0.4), torch.ones(4000, 64)
    layer.eval()
    still = layer(x)
    assert torch.equal(still, layer(x))
    layer.train()
    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.4)
    expected = layer.base(x) + dropped @ layer.A.T @ layer.B.float().T * layer.scale
    torch.manual_seed(1)
    got = layer(x)
    assert (got - expected).abs().max() < 1e-5 and not torch.equal(got, still)
    mean = ((got.mean(0) - still.mean(0)).abs().max() / (still - layer.base(x)).abs().max()).item()
    assert mean < 0.05, f"dropout changes the mean by {mean:.3f} of the adapter's effect"


def test_a_is_used_in_the_inputs_dtype_wherever_it_was_cast():
    """TRL casts trained parameters to bf16."""
    layer, x = adapted(), random(5, 64, seed=1)
    whole = layer(x)
    layer.A.data = layer.A.data.bfloat16()
    assert layer(x).dtype == torch.float32 and (layer(x) - whole).abs().max() < 0.02 * whole.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_only_its_input_is_saved(bits):
    """Plain autograd would save A and B besides (FACTS); nothing of the frozen base."""
    layer, x = adapted(bits), random(100, 64, seed=1).requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t) is None or t, lambda t: t
    ):
        layer(x)
    assert [tensor.numel() for tensor in saved.values()] == [x.numel()]


@pytest.mark.parametrize("training", [True, False])
def test_it_takes_the_mode_of_its_base(training):
    """A model in evaluation mode that is given an adapter, or opened with one, does not drop anything."""
    frozen = base().train(training)
    layer = MicaLinear.from_base(frozen, subspace.minor_subspace(quant.dequantize(frozen), RANK), ALPHA, 0.5)
    assert layer.training is training and MicaLinear.lora(base().train(training), RANK, ALPHA).training is training


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", ["mica", "lora"])
def test_under_autocast_it_computes_in_that_dtype(bits, method):
    """As Trainer and TRL have it with bf16=True: an fp32 input, bf16 out, gradients in the parameters' own dtype."""
    layer = adapted(bits) if method == "mica" else MicaLinear.lora(base(bits), RANK, ALPHA)
    x = random(2, 5, 64, seed=1).requires_grad_()
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        off = layer.base(x)
    assert y.dtype == off.dtype == torch.bfloat16
    error = ((y.float() - plain).norm() / plain.norm()).item()
    assert error < 1e-2, f"{error:.1e}"  # measured: 3e-3
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.A.grad.dtype == torch.float32


def test_no_tokens_at_all():
    layer, x = adapted(), torch.zeros(0, 64).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.shape == (0, 64) and not layer.A.grad.any()
