"""Streamed layers against the same layers left alone: equal to the last bit, two of them on the device at a time."""

import gc
import json

import pytest
import small_runs
import torch
from adapted import make_run
from tiny import save_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel

from qmica import adapter, cli, memory, model, quant, runs, source, streaming
from qmica.config import AdapterConfig, ModelConfig, TrainingConfig
from qmica.errors import QmicaError

LAYERS = 5
BITS = (4, 8, 16)
PROMPT = torch.arange(3, 12)[None]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Recorded(streaming.InMemory):
    """The slots of a CPU, with a list of what was fetched; what a slot held before is made unusable."""

    def __init__(self):
        self.fetched, self.slots = [], []

    def slot(self, size):
        self.slots.append(super().slot(size))
        return self.slots[-1]

    def fetch(self, block, slot):
        slot.flat.fill_(0xFF)
        super().fetch(block, slot)
        self.fetched.append(block)

    def order(self, streamer) -> list[int]:
        """The layers fetched since the last call."""
        order = [streamer.blocks.index(block) for block in self.fetched]
        self.fetched.clear()
        return order

    def holds(self, tensor) -> bool:
        starts = [slot.flat.data_ptr() for slot in self.slots]
        return any(start <= tensor.data_ptr() < start + len(self.slots[0].flat) for start in starts)


class FromAnywhere(Recorded):
    """Layers that are not gathered: their tensors are where they were."""

    gathers = False

    def fetch(self, block, slot):
        block.fill(slot.flat)
        self.fetched.append(block)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("small"), num_hidden_layers=LAYERS)


def streamed(flags, folder, mover, **changes):
    """A loop whose network streams, and its streamer."""
    loop = small_runs.loop(flags, folder, **changes)
    return loop, streaming.stream_layers(loop.network.base_model.layers, mover)


def used(loop, prompt=PROMPT) -> list:
    """Two steps, each with its gradients, a validation and an answer, and what they gave."""
    found = []
    folder = loop.run_folder.folder
    folder.mkdir(parents=True, exist_ok=True)
    loop.network.train()
    for _ in range(2):
        torch.manual_seed(7)
        loop._backward(*loop._own(loop.step))
        found += [part.grad.clone() for part in loop.trained.values()]
        loop.optimizer.zero_grad(set_to_none=True)
        row = loop.update()
        found += [row["loss"], row["grad_norm"], loop.validation_loss()]
        loop.network.eval()
        found.append(loop.network.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0))
        loop.network.train()
    return found + [part.detach().clone() for part in loop.trained.values()]


def require_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same = torch.equal(one.cpu(), other.cpu()) if isinstance(one, torch.Tensor) else one == other
        assert same, (one, other)


@pytest.mark.parametrize(
    ("bits", "method", "checkpointed", "mover"),
    [
        (4, "mica", True, Recorded),
        (8, "mica", True, Recorded),
        (16, "mica", True, Recorded),
        (4, "lora", True, Recorded),
        (4, "mica", False, Recorded),
        (8, "lora", False, FromAnywhere),
    ],
)
def test_equal_to_the_last_bit(flags, tmp_path, bits, method, checkpointed, mover):
    """Losses, gradients, updated coefficients, validation and answers, with accumulation and dropout."""
    changes = {"bits": bits, "method": method, "grad_checkpoint": checkpointed}
    expected = used(small_runs.loop(flags, tmp_path / "plain", **changes))
    loop, _ = streamed(flags, tmp_path / "streamed", mover(), **changes)
    require_equal(used(loop), expected)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_layer_computes_from_a_slot_and_two_slots_are_all(flags, tmp_path, monkeypatch, bits, checkpointed):
    """Forwards, recomputations and backwards alike, and never more than two layers' bytes."""
    mover, seen = Recorded(), []
    loop, streamer = streamed(flags, tmp_path, mover, bits=bits, grad_checkpoint=checkpointed)
    kind = type(streamer.blocks[0].linears[0])
    dequantize = kind.dequantize

    def watched(linear, dtype=torch.float32):
        inside = any(linear in block.linears for block in streamer.blocks)
        if inside:
            seen.append(all(mover.holds(part) for part in linear.stored()))
            pointing = [block for block in streamer.blocks if mover.holds(block.linears[0].weight.data)]
            assert len(pointing) <= 2
        return dequantize(linear, dtype)

    monkeypatch.setattr(kind, "dequantize", watched)
    used(loop)
    passes = 2 + checkpointed
    assert all(seen) and len(seen) > 2 * 2 * passes * 7 * LAYERS
    assert [len(slot.flat) for slot in mover.slots] == [streamer.blocks[0].size] * 2
    held = sum(part.nbytes for block in streamer.blocks for part in block.tensors)
    assert 2 * streamer.blocks[0].size < held, "tiny layers whose padding outweighs them show nothing"


@pytest.mark.parametrize("checkpointed", [True, False])
def test_each_layer_is_fetched_once_a_pass_and_none_at_the_turns(flags, tmp_path, checkpointed):
    mover = Recorded()
    loop, streamer = streamed(flags, tmp_path, mover, grad_checkpoint=checkpointed)
    loop.network.train()
    batch = loop._own(0)[0][0]
    step = [2, 3, 4, 2, 1, 0]  # 0 and 1 are there from the backward before, 4 and 3 from the forward
    for expected in ([0, 1, *step], step, step):
        loop._backward([batch], batch.supervised)
        assert mover.order(streamer) == expected
    loop.validation_loss()
    order = mover.order(streamer)
    assert order[:4] == [2, 3, 4, 0], "a forward follows on a forward"
    assert order[4:9] in ([], [1, 2, 3, 4, 0])
    loop._backward([batch], batch.supervised)
    assert mover.order(streamer) == [1, *step]
    with torch.no_grad():
        loop.network(PROMPT, use_cache=False)
        loop.network(PROMPT, use_cache=False)
    assert mover.order(streamer) == [2, 3, 4, 0, 1, 2, 3, 4, 0]


def test_frozen_first_layers_are_not_fetched_in_a_backward(flags, tmp_path):
    """The gradient goes no further down than the first layer that is trained (with checkpointing, transformers has it
    go down to the embeddings)."""
    mover = Recorded()
    loop, streamer = streamed(flags, tmp_path, mover, grad_checkpoint=False)
    for name, layer in adapter.layers(loop.network):
        if ".layers.0." in name or ".layers.1." in name:
            layer.requires_grad_(False)
    loop.network.train()
    batch = loop._own(0)[0][0]
    loop._backward([batch], batch.supervised)
    assert mover.order(streamer) == [0, 1, 2, 3, 4, 2, 1]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_of_one_or_two_layers(tmp_path, layers):
    flags = small_runs.make(tmp_path / "small", num_hidden_layers=layers)
    expected = used(small_runs.loop(flags, tmp_path / "plain"))
    mover = Recorded()
    loop, streamer = streamed(flags, tmp_path / "streamed", mover)
    require_equal(used(loop), expected)
    assert mover.order(streamer) == list(range(layers)), "once here, always here"


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_reached_whether_or_not_they_are_in_a_slot(flags, tmp_path, bits):
    loop, streamer = streamed(flags, tmp_path, Recorded(), bits=bits)
    plain = small_runs.loop(flags, tmp_path, bits=bits).network
    loop.rehearse()
    assert {slot.holds for slot in streamer.slots} == {LAYERS - 1, 0}, "a validation batch was the last"
    for name, layer in adapter.layers(loop.network):
        other = plain.get_submodule(name)
        assert torch.equal(quant.dequantize(layer.base), quant.dequantize(other.base))
        one, another = quant.Stored.of(layer.base), quant.Stored.of(other.base)
        assert one.digest() == another.digest()
        assert torch.equal(one.rows(3, 17), another.rows(3, 17))
        assert torch.equal(layer.delta(), other.delta())
    saved = [adapter.save_adapter(network, tmp_path / name) for network, name in ((loop.network, "a"), (plain, "b"))]
    one, another = ((folder / adapter.TENSORS).read_bytes() for folder in saved)
    assert one == another


def test_an_adapter_can_be_attached_later(flags, tmp_path):
    """The subspaces are read from the host, and the adapter is made where the layer computes."""
    found = source.resolve(flags["model"])
    expected = adapter.attach(model.load(found, 4, "fp32", "cpu"), AdapterConfig(rank=4))
    network = model.load(found, 4, "fp32", "cpu")
    streaming.stream_layers(network.base_model.layers, Recorded())
    adapter.attach(network, AdapterConfig(rank=4))
    with torch.no_grad():
        assert torch.equal(network(PROMPT).logits, expected(PROMPT).logits)
    require_equal(list(adapter.tensors(network).values()), list(adapter.tensors(expected).values()))


@pytest.mark.parametrize("bits", BITS)
def test_what_is_pointed_elsewhere_is_held_once(bits):
    """After a move nothing holds the bytes that were there before; bitsandbytes keeps several names of them."""
    linear = quant.quantize(torch.randn(64, 96), None, bits, CPU)
    before, expected = [part.untyped_storage()._weak_ref() for part in linear.stored()], quant.dequantize(linear)
    linear.point([part.clone() for part in linear.stored()])
    assert [torch.UntypedStorage._expired(part) for part in before] == [True] * len(before)
    assert torch.equal(quant.dequantize(linear), expected)
    if bits == 4:
        assert linear.quant_state is linear.weight.quant_state
    for part in before:
        torch.UntypedStorage._free_weak_ref(part)


@pytest.mark.parametrize("bits", BITS)
def test_a_copy_reads_the_same_and_leaves_the_weight_alone(bits):
    linear = quant.quantize(torch.randn(64, 96), None, bits, CPU)
    before = [part.data_ptr() for part in linear.stored()]
    copied = quant.Stored(linear).copied(CPU)
    assert torch.equal(copied.rows(3, 17), linear.rows(3, 17))
    for part in copied.linear.stored():
        part.zero_()
    assert [part.data_ptr() for part in linear.stored()] == before
    assert quant.Stored(linear).held().linear is linear


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_on_the_host_is_dequantized_on_its_device(bits):
    linear = quant.quantize(torch.randn(64, 96), None, bits, CPU)
    expected = linear.rows(3, 17).to(CUDA)
    quant.compute_on(linear, CUDA)
    assert not linear.weight.is_cuda and linear.device.type == "cuda"
    assert torch.equal(quant.Stored(linear).held().rows(3, 17), expected)


def test_a_layer_lies_in_one_stretch_and_every_tensor_is_aligned(flags, tmp_path):
    _, streamer = streamed(flags, tmp_path, Recorded())
    flat = torch.empty(streamer.blocks[0].size, dtype=torch.uint8)
    for block in streamer.blocks:
        starts = [part.data_ptr() - block.flat.data_ptr() for part in block.tensors]
        assert all(start % streaming.ALIGNED == 0 for start in starts)
        ends = [start + part.nbytes for start, part in zip(starts, block.tensors, strict=True)]
        assert all(end <= start for end, start in zip(ends, [*starts[1:], block.size], strict=True))
        block.fill(flat)
        assert all(
            torch.equal(one, other)
            for parts, others in zip(block.views(flat), block.host, strict=True)
            for one, other in zip(parts, others, strict=True)
        )


@pytest.mark.parametrize(
    ("megabytes", "count", "together"),
    [
        (164, 40, 3),  # Llama-2-13B in NF4: 492 of 536, alone 164 of 268
        (90, 40, 5),  # 450 of 536, alone 90 of 134
        (90, 4, 1),  # there are not so many
        (113, 32, 1),  # Llama-3.1-8B: 113 of 134
    ],
)
def test_layers_share_what_is_pinned_where_that_wastes_less(megabytes, count, together):
    assert streaming._together(megabytes * 1_000_000, count) == together


# ---- what the user meets


def test_host_memory_is_where_a_cpu_has_its_weights(flags, capsys):
    expected = "--stream host is for a GPU: a CPU's weights are in host memory already, use --stream disk"
    assert cli.main(["train", "-m", flags["model"], "--device", "cpu", "--stream", "host"]) == cli.FIXABLE
    assert capsys.readouterr().err == f"qmica: {expected}\n"
    with pytest.raises(QmicaError, match="--stream host is for a GPU"):
        model.load(source.resolve(flags["model"]), 4, "fp32", "cpu", stream="host")


def test_only_decoder_layers_are_left_on_the_host(flags):
    """The head and the embeddings are used outside the layers, where nothing is fetched."""
    network = model.load(source.resolve(flags["model"]), 4, "fp32", "cpu", stream="disk")
    linears = {name: part for name, part in network.named_modules() if isinstance(part, quant.FrozenLinear)}
    kept = {name for name, part in linears.items() if part.computes_on is not None}
    assert kept == {name for name in linears if ".layers." in name} and len(kept) == 7 * LAYERS
    plain = model.load(source.resolve(flags["model"]), 4, "fp32", "cpu")
    with torch.no_grad():
        assert torch.equal(network(PROMPT).logits, plain(PROMPT).logits)


def test_a_run_that_streamed_on_a_gpu_opens_on_a_cpu(tmp_path):
    folder = make_run(tmp_path / "run" / "adapter", save_tiny(tmp_path / "base"), bits=4).parent
    run = runs.Run(folder)
    run.write_config({"train": {"model": str(tmp_path / "base"), "stream": "host", "device": "cpu", "dtype": "fp32"}})
    network, _ = adapter.open_run(run)
    assert network(PROMPT).logits.isfinite().all()


def test_the_plan_counts_two_layers(flags):
    empty = model.on_meta(model.read_config(source.resolve(flags["model"])), torch.float32)
    options = (empty, 4, AdapterConfig(rank=4), TrainingConfig(), memory.Rows(1, 64), torch.float32)
    cases = (memory.Case(*options, streamed=streamed) for streamed in (False, True))
    whole, two = (memory.plan(case).parts["weights"] for case in cases)
    inside = {name: part for name, part in empty.named_parameters() if ".layers." in name}
    packed = sum(quant.FORMATS[4].count_bytes(*part.shape) for part in inside.values() if part.dim() == 2)
    norms = sum(4 * part.numel() for part in inside.values() if part.dim() == 1)
    assert whole - two == pytest.approx((packed + norms) * (LAYERS - 2) / LAYERS, rel=0.01)


def test_stream_is_a_field_of_the_model():
    assert ModelConfig().stream == "none"
    assert json.loads(json.dumps(small_runs.job({"stream": "disk"}).flags()))["stream"] == "disk"


# ---- on a GPU


def on_gpu(flags, folder, stream, bits=4, **changes):
    """A loop on CUDA, loaded as `train` loads it."""
    from accelerate import Accelerator

    from qmica import data, tokenizer, training

    job = small_runs.job(flags, device="cuda", bits=bits, optimizer="adamw", **changes)
    found = source.resolve(job.model.model)
    prepared = data.prepare(
        job.data.data, tokenizer.load(found), max_seq_length=64, val_split=0.1, say=lambda text: None
    )
    network = streaming.start(model.load(found, bits, "fp32", "cuda", stream=stream), stream)
    adapter.attach(network, job.adapter, 0)
    if job.training.grad_checkpoint:
        network.activation_checkpointing_enable()
    return training.Loop(job, runs.Run(folder), network, prepared, Accelerator())


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["host", "disk"])
@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_equal_on_a_gpu(flags, tmp_path, bits, checkpointed, stream):
    changes = {"bits": bits, "grad_checkpoint": checkpointed}
    with sdpa_kernel(SDPBackend.MATH):  # the others' backwards may add in any order
        expected = used(on_gpu(flags, tmp_path / "plain", "none", **changes), PROMPT.to(CUDA))
        loop = on_gpu(flags, tmp_path / "streamed", stream, **changes)
        require_equal(used(loop, PROMPT.to(CUDA)), expected)
    for _, layer in adapter.layers(loop.network):
        assert layer.A.is_cuda and layer.B.is_cuda


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """12 layers of 12.6 million weights: a layer's copy and its kernels take long enough to run beside each other."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64}
    folder = tmp_path_factory.mktemp("wide")
    return small_runs.make(folder, num_hidden_layers=12, **shape)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["host", "disk"])
def test_copies_beside_kernels_keep_every_bit(wide, tmp_path, stream):
    """The slots are overwritten while the device is behind: a missing event would show as other losses."""

    def late(loop):
        torch.cuda._sleep(100_000_000)  # the kernels wait, the copies could run ahead
        return used(loop, PROMPT.to(CUDA))

    with sdpa_kernel(SDPBackend.MATH):
        expected = late(on_gpu(wide, tmp_path / "plain", "none"))
        require_equal(late(on_gpu(wide, tmp_path / "streamed", stream)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["host", "disk"])
def test_two_layers_are_all_that_a_gpu_holds(wide, tmp_path, stream):
    def held(stream):
        gc.collect()  # linears and their weights refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loop = on_gpu(wide, tmp_path / stream, stream)
        loaded = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        loop.rehearse()
        layers = loop.network.base_model.layers
        weights = sum(part.nbytes for part in streaming._weights(layers))
        return loaded, torch.cuda.max_memory_allocated() - before, weights

    loaded, peak, weights = held("none")
    streamed_loaded, streamed_peak, _ = held(stream)
    saved = weights * 10 / 12
    print(
        f"loaded {loaded / 1e6:.1f} MB, streamed {streamed_loaded / 1e6:.1f}; peak {peak / 1e6:.1f}, {streamed_peak / 1e6:.1f}"
    )
    assert loaded - streamed_loaded > 0.95 * saved
    assert peak - streamed_peak > 0.95 * saved


@pytest.mark.gpu
def test_the_host_copy_is_pinned(flags, tmp_path):
    network = model.load(source.resolve(flags["model"]), 4, "fp32", "cuda", stream="host")
    assert all(not part.is_cuda for part in streaming._weights(network.base_model.layers))
    streaming.start(network, "host")
    assert all(part.is_pinned() for part in streaming._weights(network.base_model.layers))
