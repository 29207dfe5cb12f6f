"""Weights streamed: the decoder layers' frozen weights live on the host, two layers of them are on the device.

How: the tensors of a decoder layer lie side by side in one stretch of pinned host memory, so that a layer is one copy.
The device has two slots of the largest layer's size. A layer about to compute waits for its copy, and its linears are
pointed at the slot; then the other slot, whose layer has computed, gets the layer that comes next, on a stream of its
own while this one computes: the layer after in a forward, the layer before in a backward. Where a forward turns into
the backward nothing moves, as both slots hold what is needed: a step of n layers copies 2 (n - 2) of them. A layer that
is in no slot points at its host tensors, where saving, merging and the subspaces read it.

The forward is met by hooks on the layer, the backward by one on the gradient of the layer's output, which is there
before anything of the layer is differentiated or recomputed. So layers with and without activation checkpointing
stream alike. What a backward needs of a weight it must read from its linear then, as `quant.FrozenMatmul` does: a
tensor kept from the forward would be a slot that holds another layer by now.

The copies and the waiting are a `Mover`'s: `SideStream` and `Staged` for CUDA, `InMemory` without any stream, on which
everything else is the same and is tested.

What it gives up: a copy that takes longer than a layer computes is waited for (few tokens a batch; each token that is
generated). Each process of several has its own copy of the weights.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from qmica import checkpointing, quant, window
from qmica.durable import size_text
from qmica.errors import QmicaError

ALIGNED = 256  # bytes: where a tensor may begin in a slot; as cudaMalloc aligns, more than any kernel asks for


def start(model: nn.Module, stream: str, say: Callable[[str], None] = lambda text: None) -> nn.Module:
    """Stream the decoder layers of a model that `model.load(..., stream=stream)` made, in place; none: nothing is done.
    After an adapter is attached, as the search for subspaces reads all weights. Returns the model.

    Raises QmicaError where the host has not enough memory to pin, or a CPU's weights are not views of a file.
    """
    if stream == "none":
        return model
    layers = checkpointing.decoder_layers(model)
    device = next(linear.device for layer in layers for linear in _linears(layer))
    size = size_text(sum(part.nbytes for layer in layers for part in _weights(layer)))
    if device.type == "cpu":
        window.attach(model)
        say(f"weights: {size} in {len(layers)} decoder layers on the disk, two layers at a time in memory")
        return model
    stream_layers(layers, SideStream(device) if stream == "host" else Staged(device))
    say(f"weights: {size} in {len(layers)} decoder layers on the {stream}, two layers at a time on {device}")
    return model


def stream_layers(layers: Sequence[nn.Module], mover: "Mover") -> "Streamer":
    """Stream these decoder layers, which compute one after another, their linears frozen by `quant`."""
    blocks = [Block(layer) for layer in layers]
    if mover.gathers:
        _gather(blocks, mover)
    return Streamer(layers, blocks, mover)


def _linears(layer: nn.Module) -> list[quant.FrozenLinear]:
    return [module for module in layer.modules() if isinstance(module, quant.FrozenLinear)]


def _weights(layer: nn.Module) -> Iterator[torch.Tensor]:
    return (part for linear in _linears(layer) for part in linear.stored())


# ---- what moves, and where to


class Block:
    """The frozen weights of one decoder layer: its tensors on the host, and how they lie in a flat stretch of `size`
    bytes. flat: the stretch that holds them, once gathered.
    """

    def __init__(self, layer: nn.Module):
        self.linears = _linears(layer)
        self.host = [linear.stored() for linear in self.linears]
        self.flat: torch.Tensor | None = None
        self.size = sum(_room(part) for part in self.tensors)
        self._views: dict[int, list[list[torch.Tensor]]] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [part for parts in self.host for part in parts]

    def views(self, flat: torch.Tensor) -> list[list[torch.Tensor]]:
        """The tensors of each linear, as they lie in a flat stretch of bytes; made once for a slot (42 of them, twice a
        step and layer).
        """
        key = flat.data_ptr()
        if key not in self._views:
            self._views[key] = list(self._cut(flat))
        return self._views[key]

    def _cut(self, flat: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        begin = 0
        for parts in self.host:
            cut = []
            for part in parts:
                cut.append(flat[begin : begin + part.nbytes].view(part.dtype).view(part.shape))
                begin += _room(part)
            yield cut

    def fill(self, flat: torch.Tensor) -> None:
        """Copy the tensors one by one into a flat stretch of memory."""
        for parts, places in zip(self.host, self._cut(flat), strict=True):
            for part, place in zip(parts, places, strict=True):
                place.copy_(part)

    def move_into(self, flat: torch.Tensor) -> None:
        """Have this stretch of host memory for a home; what held the tensors before is let go."""
        self.fill(flat)
        self.host, self.flat = list(self._cut(flat)), flat
        self.point(self.host)

    def point(self, tensors: list[list[torch.Tensor]]) -> None:
        for linear, parts in zip(self.linears, tensors, strict=True):
            linear.point(parts)


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def _gather(blocks: list[Block], mover: "Mover") -> None:
    """Move the weights of all layers into stretches of host memory, a few layers in each."""
    step = _together(max(block.size for block in blocks), len(blocks))
    for start in range(0, len(blocks), step):
        group = blocks[start : start + step]
        stretch = mover.on_host(sum(block.size for block in group))
        for block, flat in zip(group, stretch.split([block.size for block in group]), strict=True):
            block.move_into(flat)


def _together(size: int, count: int) -> int:
    """How many of `count` layers of `size` bytes to pin at once: torch rounds what it pins up to a power of two. A
    layer of Llama-2-13B in NF4 takes 164 MB: alone it would cost 256, three of them cost 512 for 492.
    """

    def waste(layers: int) -> float:
        return (1 << (layers * size - 1).bit_length()) / (layers * size)

    return min(range(1, min(count, 8) + 1), key=waste)


@dataclass(eq=False)
class Slot:
    """Room for one layer on the device. holds: the number of the layer that is, or will be, in it."""

    flat: torch.Tensor
    holds: int | None = None
    ready: "torch.cuda.Event | None" = None  # the copy into it is done
    staging: torch.Tensor | None = None  # pinned, of the same size
    coming: Future | None = None  # sets `ready`


class Mover(Protocol):
    """How bytes come to the device. gathers: whether the layers' tensors are first put into stretches `on_host`."""

    gathers: bool

    def on_host(self, size: int) -> torch.Tensor:
        """A stretch of `size` bytes for several layers."""

    def slot(self, size: int) -> Slot:
        """Room for a layer on the device."""

    def fetch(self, block: Block, slot: Slot) -> None:
        """Begin to copy a layer into a slot, once all that was given to the device before now has been computed."""

    def wait(self, slot: Slot) -> None:
        """What is given to the device from now on is computed after the copy into the slot."""


class Streamer:
    """The two slots and what is in them, moved on by the layers' hooks."""

    def __init__(self, layers: Sequence[nn.Module], blocks: list[Block], mover: Mover):
        self.blocks, self.mover = blocks, mover
        size = max(block.size for block in blocks)
        self.slots = [mover.slot(size), mover.slot(size)]
        self.current = self.slots[1]  # the slot that computes: the other one is free
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, number))
            layer.register_forward_hook(partial(self._after, number))

    def _before(self, number: int, *_) -> None:
        """A layer is called. Inside a backward that is a recomputation, in a forward that records no gradient the first
        layer of the next forward follows on the last, else the backward does."""
        if torch._C._current_graph_task_id() != -1:
            self.enter(number, number - 1)
        elif number + 1 == len(self.blocks):
            self.enter(number, -1 if torch.is_grad_enabled() else 0)
        else:
            self.enter(number, number + 1)

    def _after(self, number: int, module: nn.Module, arguments: tuple, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.enter(number, number - 1))

    def enter(self, number: int, following: int) -> None:
        """Have a layer's weights on the device, and the following one's (-1: none) on their way."""
        slot = self._slot_of(number) or self._fetch(number)
        if slot is not self.current:
            self.mover.wait(slot)
            self.blocks[number].point(self.blocks[number].views(slot.flat))
            self.current = slot
        if following >= 0 and self._slot_of(following) is None:
            self._fetch(following)

    def _slot_of(self, number: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds == number), None)

    def _fetch(self, number: int) -> Slot:
        """Into the slot that does not compute; the layer that was there points at the host again."""
        (slot,) = (slot for slot in self.slots if slot is not self.current)
        if slot.holds is not None:
            left = self.blocks[slot.holds]
            left.point(left.host)
        slot.holds = None  # should the copy fail
        self.mover.fetch(self.blocks[number], slot)
        slot.holds = number
        return slot


# ---- the seam to the device


class InMemory:
    """Slots in ordinary memory, filled at once: what a test can run without a GPU."""

    gathers = True

    def on_host(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def slot(self, size: int) -> Slot:
        return Slot(torch.empty(size, dtype=torch.uint8))

    def fetch(self, block: Block, slot: Slot) -> None:
        slot.flat[: block.size].copy_(block.flat)

    def wait(self, slot: Slot) -> None:
        pass


class SideStream:
    """CUDA, from pinned memory: the copies run on a stream of their own beside the kernels."""

    gathers = True

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)

    def on_host(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise QmicaError(
                f"--stream host: {size_text(size)} of memory cannot be pinned ({reason}): close other programs, or use "
                "--stream disk, fewer --bits or a smaller --model"
            ) from error

    def slot(self, size: int) -> Slot:
        flat = torch.empty(size, dtype=torch.uint8, device=self.device)
        flat.record_stream(self.side)  # freed while a copy into it runs, it is not given away before the copy's end
        return Slot(flat)

    def fetch(self, block: Block, slot: Slot) -> None:
        self._copy(block.flat, slot, torch.cuda.current_stream(self.device).record_event())

    def _copy(self, source: torch.Tensor, slot: Slot, computed: "torch.cuda.Event") -> None:
        """source: pinned, of at most the slot's size. computed: what used the slot before is done."""
        with torch.cuda.stream(self.side):
            self.side.wait_event(computed)
            slot.flat[: len(source)].copy_(source, non_blocking=True)
            slot.ready = self.side.record_event()

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream(self.device).wait_event(slot.ready)


class Staged(SideStream):
    """CUDA, from host memory that is not pinned, such as a mapped file: a thread copies a layer's tensors into a pinned
    stretch while the device computes, and that goes to the slot.
    """

    gathers = False

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.worker = ThreadPoolExecutor(1)

    def slot(self, size: int) -> Slot:
        slot = super().slot(size)
        slot.staging = self.on_host(size)
        return slot

    def fetch(self, block: Block, slot: Slot) -> None:
        computed = torch.cuda.current_stream(self.device).record_event()
        slot.coming = self.worker.submit(self._stage, block, slot, computed)

    def _stage(self, block: Block, slot: Slot, computed: "torch.cuda.Event") -> None:
        if slot.ready is not None:
            slot.ready.synchronize()  # what was staged before has gone to the slot
        block.fill(slot.staging)
        self._copy(slot.staging[: block.size], slot, computed)

    def wait(self, slot: Slot) -> None:
        slot.coming.result()
        super().wait(slot)
