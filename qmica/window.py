"""Two decoder layers of a mapped model resident at a time: `--stream disk` on a CPU.

How: the frozen weights are views of files (`mapping`), so that they take no memory of the process's own; what is left
to bound are the files' pages that it has touched. A hook before each decoder layer, and one on the gradient of its
output, tells the kernel to begin reading the layer that comes next (forwards the one above, backwards the one below)
and to take the pages of all others out of the process. Nothing is computed otherwise than without: results are equal
bit by bit.

What it gives up: pages taken out stay in the kernel's cache until other memory is wanted, so that a file that fits
costs page faults only; embeddings and head, which lie outside the layers, are resident while they are used.
"""

from collections.abc import Iterable

import torch
from torch import nn

from qmica import checkpointing, quant
from qmica.errors import QmicaError
from qmica.mapping import Map, merged

Piece = tuple[Map, int, int]  # bytes start to stop of a mapped file


class Window:
    """The hooks on a model. at: the layers whose pages may be resident; `remove` takes the hooks off."""

    def __init__(self, layers: list[nn.Module], pieces: list[list[Piece]], others: list[Piece]):
        self.pieces, self.others = pieces, others
        self.at: tuple[int, ...] = ()
        for piece in (*others, *(piece for layer in pieces for piece in layer)):
            _drop(piece)  # what loading and the search for subspaces read
        self._hooks = []
        for number, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(self._before(number)))
            self._hooks.append(layer.register_forward_hook(self._after(number)))

    def move(self, number: int, step: int) -> None:
        """Be ready for a layer and the next one in a direction (1 forwards, -1 backwards)."""
        wanted = tuple(one for one in (number, number + step) if 0 <= one < len(self.pieces))
        if wanted == self.at:
            return
        for one in set(wanted) - set(self.at):
            for mapped, start, stop in self.pieces[one]:
                mapped.will_need(start, stop)
        gone = [piece for one in set(self.at) - set(wanted) for piece in self.pieces[one]]
        if len(wanted) == 2 and number in (0, len(self.pieces) - 1):  # embedding or head were just used
            gone += self.others
        for piece in gone:
            _drop(piece)
        self.at = wanted

    def _before(self, number: int):
        def hook(layer: nn.Module, given: tuple) -> None:
            # a checkpointed layer is computed again inside the backward pass
            self.move(number, -1 if torch._C._current_graph_task_id() != -1 else 1)

        return hook

    def _after(self, number: int):
        def hook(layer: nn.Module, given: tuple, out) -> None:
            states = out[0] if isinstance(out, tuple) else out
            if states.requires_grad and torch._C._current_graph_task_id() == -1:
                states.register_hook(lambda gradient: self.move(number, -1))

        return hook

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def attach(model: nn.Module) -> Window:
    """Keep the resident pages of a loaded model's files at about two decoder layers, from now on.

    Raises QmicaError where the decoder layers are not views of files, so that there is nothing to take out.
    """
    layers = checkpointing.decoder_layers(model)
    pieces = [_pieces(model, _tensors(layer)) for layer in layers]
    if not all(pieces):
        raise QmicaError(
            f"--stream disk: the weights of {model.name_or_path} are held in memory, not mapped: use --bits 4 or 8 "
            "with a cache that can be written (QMICA_CACHE names it), --bits gguf, or a folder of bf16 safetensors"
        )
    inside = {tensor.data_ptr() for layer in layers for tensor in _tensors(layer)}
    others = [tensor for tensor in _tensors(model) if tensor.data_ptr() not in inside]
    return Window(layers, pieces, _pieces(model, others))


def _drop(piece: Piece) -> None:
    mapped, start, stop = piece
    mapped.drop(start, stop)


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    """All that a module's frozen weights are stored in."""
    for part in module.modules():
        if isinstance(part, quant.FrozenLinear):
            yield from part.stored()
        else:
            yield from part.parameters(recurse=False)


def _pieces(model: nn.Module, tensors: Iterable[torch.Tensor]) -> list[Piece]:
    """Where these tensors lie in the model's files; those that do not are left out."""
    found, tensors = [], list(tensors)
    for mapped in model.qmica_maps:
        places = [place for tensor in tensors if (place := mapped.place(tensor))]
        found += [(mapped, start, stop) for start, stop in merged(places)]
    return found
