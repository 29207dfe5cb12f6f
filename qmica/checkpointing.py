"""What each decoder layer keeps for its backward: all, the products of its linears, or its input alone.

How: torch's checkpointing runs a layer again in the backward, up to the last tensor that the backward needs. In the
mode `products` the outputs of its linears and of attention are kept on a tape in the forward and taken from it in the
second run, so that norms, rotations and activations are computed again, and no weight is multiplied or dequantized.
The tensors are the same ones, so the three modes give the same gradients to the last bit.

    mode        kept of SmolLM2's layer, floats a token   computed twice
    plain       10752                                     nothing
    products     5769                                     element-wise work
    checkpoint    576                                     also attention and all linears but the last

What it gives up: attention that torch has no kernel of its own for (its `math` path) is computed twice in `products`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MODES = PLAIN, PRODUCTS, CHECKPOINT = ("plain", "products", "checkpoint")  # from most kept to least


_Product = torch.Tensor | tuple  # of tensors, and of what else an operator returns


def _versions(value: _Product) -> list[int]:
    """How often each tensor was written to."""
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class _Tape:
    """The products of one run of a layer, in order: a tensor each, or the several outputs of attention."""

    def __init__(self):
        self.kept: list[tuple[_Product, list[int]] | None] = []
        self.at = 0
        self.replaying = False

    def product(self, compute: Callable[[], _Product]) -> _Product:
        if not self.replaying:
            value = compute()
            self.kept.append((tree_map_only(torch.Tensor, torch.Tensor.detach, value), _versions(value)))
            return value
        value = self._take()
        return compute() if value is None else value

    def _take(self) -> _Product | None:
        """The next product, forgotten here; None for the last one, which is not kept, one that was taken before, and
        one that was changed in place since.
        """
        at, self.at = self.at, self.at + 1
        if at >= len(self.kept) or self.kept[at] is None:
            return None
        (value, versions), self.kept[at] = self.kept[at], None
        return value if _versions(value) == versions else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        with _playing(self):
            yield
        del self.kept[-1:]  # a sum with the residual needs no value: mostly nobody asks for the layer's last product

    @contextmanager
    def replayed(self) -> Iterator[None]:
        self.replaying, self.at = True, 0
        with _playing(self):
            yield


_tape: _Tape | None = None


@contextmanager
def _playing(tape: _Tape) -> Iterator[None]:
    global _tape
    before, _tape = _tape, tape
    try:
        with _KeptAttention(tape):
            yield
    finally:
        _tape = before


class _KeptAttention(TorchFunctionMode):
    """Has what attention computes go over a tape. Only inside of attention torch's operators are looked at: looking at
    all of a layer's costs more than is saved where tensors are small.
    """

    def __init__(self, tape: _Tape):
        super().__init__()
        self.tape = tape

    def __torch_function__(self, function, types, args=(), named=None):
        looked = _Operators(self.tape) if function is functional.scaled_dot_product_attention else nullcontext()
        with looked:
            return function(*args, **(named or {}))


class _Operators(TorchDispatchMode):
    """Below autograd, which knows of an operator's outputs only, whether they were computed or taken from the tape."""

    def __init__(self, tape: _Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, operator, types, args=(), named=None):
        compute = functools.partial(operator, *args, **(named or {}))
        return self.tape.product(compute) if operator in _ATTENTION else compute()


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def product(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The output of a frozen linear: computed, or in the second run of a layer what was kept of the first."""
    return compute() if _tape is None else _tape.product(compute)


def _contexts() -> tuple:
    tape = _Tape()
    return tape.recording(), tape.replayed()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, in the order in which they run."""
    return list(model.base_model.layers)


def set_modes(model: nn.Module, modes: Sequence[str]) -> bool:
    """Have each decoder layer keep what its mode says, in training mode. modes: one of MODES a layer. Whether any of
    them had another one before.
    """
    changed = False
    for layer, mode in zip(decoder_layers(model), modes, strict=True):
        changed |= getattr(layer, "qmica_mode", None) != mode
        layer.qmica_mode = mode
        layer.gradient_checkpointing = mode != PLAIN
        more = {"context_fn": _contexts} if mode == PRODUCTS else {}
        layer._gradient_checkpointing_func = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False, **more)
    return changed
