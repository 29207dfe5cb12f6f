"""The three modes of a decoder layer: the same gradients to the last bit, each with what it says it keeps."""

import gc

import pytest
import torch
from tiny import tiny_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qmica import adapter, checkpointing, loss, quant
from qmica.config import AdapterConfig
from qmica.packing import Batch

KINDS = ("llama", "qwen2")
TOKENS = 40


def adapted(kind="llama", bits=4, method="mica", targets="all", dropout=0.0, layers=2):
    """A tiny model in `bits` with a trained adapter, in training mode."""
    model = tiny_model(kind, num_hidden_layers=layers)
    for name, module in list(model.named_modules()):
        if quant.is_linear(module) and name != "lm_head":
            model.set_submodule(name, quant.quantize(module.weight.data, module.bias, bits, torch.device("cpu")))
    adapter.attach(model, AdapterConfig(rank=4, method=method, targets=targets, dropout=dropout))
    for _, layer in adapter.layers(model):
        layer.A.data = 0.1 * torch.randn(layer.A.shape, generator=torch.Generator().manual_seed(layer.A.numel()))
    return model.train()


def batch_of(rows=1):
    ids = torch.randint(0, 400, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(TOKENS).expand(rows, -1)
    return Batch(
        ids, positions, ids.clone(), torch.zeros_like(ids, dtype=torch.bool), rows * (TOKENS - 1), 0, ids.numel()
    )


def step(model, modes):
    """The loss, its gradients, and how often a frozen weight was multiplied forwards."""
    checkpointing.set_modes(model, modes)
    counts = []
    plain = quant.FrozenLinear.matmul

    def counted(self, x):
        counts.append(self)
        return plain(self, x)

    quant.FrozenLinear.matmul = counted
    try:
        model.zero_grad()
        torch.manual_seed(3)
        value = loss.summed_loss(model, batch_of())
        value.backward()
    finally:
        quant.FrozenLinear.matmul = plain
    gradients = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    return value.detach(), gradients, len(counts)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_all_modes_give_the_same_bits(kind, bits):
    model = adapted(kind, bits)
    value, gradients, _ = step(model, ["plain"] * 2)
    assert len(gradients) == 14 and all(part.abs().max() > 0 for part in gradients.values())
    for modes in (["products"] * 2, ["checkpoint"] * 2, ["products", "plain"], ["checkpoint", "products"]):
        again, others, _ = step(model, modes)
        assert torch.equal(value, again), modes
        different = [name for name, part in gradients.items() if not torch.equal(part, others[name])]
        assert not different, (modes, different)


@pytest.mark.parametrize("options", [{"method": "lora"}, {"targets": "qv"}, {"dropout": 0.3}], ids=str)
def test_so_they_do_for_lora_for_a_few_linears_and_with_dropout(options):
    model = adapted(**options)
    value, gradients, _ = step(model, ["plain"] * 2)
    for mode in ("products", "checkpoint"):
        again, others, _ = step(model, [mode] * 2)
        assert torch.equal(value, again) and gradients.keys() == others.keys()
        assert all(torch.equal(part, others[name]) for name, part in gradients.items()), mode


def test_what_is_multiplied_again():
    """Seven linears a layer: none of them again in `products`, all but the last in `checkpoint`."""
    model = adapted()
    loss.Head.of(model)
    once = 2 * 7
    head = step(model, ["plain"] * 2)[2] - once
    assert [step(model, [mode] * 2)[2] - head - once for mode in checkpointing.MODES] == [0, 0, 2 * 6]


class Attentions(TorchDispatchMode):
    """Counts the runs of attention's kernel, forwards."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), named=None):
        self.count += function == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return function(*args, **(named or {}))


def test_attention_is_computed_again_where_an_input_alone_is_kept():
    model = adapted()
    loss.Head.of(model)
    counts = []
    for mode in checkpointing.MODES:
        with Attentions() as attentions:
            step(model, [mode] * 2)
        counts.append(attentions.count)
    assert counts == [2, 2, 4]


def storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside it and still live."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, function, types, args=(), named=None):
        result = function(*args, **(named or {}))
        given = {storage._cdata for storage in storages((args, named))}
        for storage in storages(result):
            if storage._cdata not in given:  # a view, or what is written in place, is not made here
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    @property
    def nbytes(self):
        gc.collect()
        return sum(nbytes for reference, nbytes in self.made.values() if not reference.expired())


def kept(model, mode):
    """Floats a token and layer that a forward leaves behind for the backward, between 2 and 6 layers."""
    sizes = []
    for layers in (2, 6):
        part = model(layers)
        checkpointing.set_modes(part, [mode] * layers)
        batch = batch_of()
        with Alive() as alive:
            hidden = loss.hidden_states(part, batch.input_ids, batch.position_ids)
            sizes.append(alive.nbytes)
        del hidden
    return (sizes[1] - sizes[0]) / 4 / 4 / TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind):
    """The table at the head of the module: a layer's input; the outputs of attention and of all linears but the last
    besides; all.

    Counted from the tensors that are alive after a forward.
    """
    config = adapted(kind).config
    width, inner, head = (
        config.hidden_size,
        config.intermediate_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    rotated, once = config.num_attention_heads * head, config.num_key_value_heads * head
    found = {mode: kept(lambda layers: adapted(kind, layers=layers), mode) for mode in checkpointing.MODES}
    assert found["checkpoint"] == pytest.approx(width, rel=0.02), found
    outputs = rotated + 2 * once + width + 2 * inner
    attention = rotated + config.num_attention_heads
    assert found["products"] == pytest.approx(width + outputs + attention, rel=0.02), found
    # input and output of both norms, rotated q and k, v, attention's output, gate, silu(gate), up and their product
    assert found["plain"] == pytest.approx(4 * width + 2 * rotated + 2 * once + 4 * inner, rel=0.05), found
