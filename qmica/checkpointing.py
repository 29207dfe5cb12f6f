"""What each decoder layer keeps for its backward: all, the products of its linears, or its input alone.

How: torch's checkpointing runs a layer again in the backward, up to the last tensor that the backward needs. In the
mode `products` the outputs of its linears are kept on a tape in the forward and taken from it in the second run, so
that norms, rotations, activations and attention are computed again and no weight is multiplied or dequantized again.
The tensors are the same ones, so the three modes give the same gradients to the last bit.

    mode        kept of SmolLM2's layer, floats a token   computed twice
    plain       10752                                     nothing
    products     5184                                     element-wise work and attention
    checkpoint    576                                     also all linears but the last

What it gives up: attention is computed twice in `products`; keeping its output too would take a hook into transformers.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

MODES = PLAIN, PRODUCTS, CHECKPOINT = ("plain", "products", "checkpoint")  # from most kept to least


class _Tape:
    """The products of one run of a layer, in order."""

    def __init__(self):
        self.kept: list[tuple[torch.Tensor, int] | None] = []
        self.at = 0
        self.replaying = False

    def product(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if not self.replaying:
            value = compute()
            self.kept.append((value.detach(), value._version))
            return value
        value = self._take()
        return compute() if value is None else value

    def _take(self) -> torch.Tensor | None:
        """The next product, forgotten here; None for the last one, which is not kept, one that was taken before, and
        one that was changed in place since.
        """
        at, self.at = self.at, self.at + 1
        if at >= len(self.kept) or self.kept[at] is None:
            return None
        (value, version), self.kept[at] = self.kept[at], None
        return value if value._version == version else None

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
        yield
    finally:
        _tape = before


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
