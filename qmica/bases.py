"""The B of every linear that is to be adapted: from the store, or computed and kept there.

How: each linear is looked up by the content of its weight, whatever model, file or targets it came with. A larger rank
in the store serves a smaller one: its columns are single singular vectors in order. Small weights are computed side by
side, a thread each; on several processes the linears that are missing are shared out, and every process gets all.

What it gives up: several processes that start with an empty store and the same linear both compute it.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import distributed

from qmica import store, subspace
from qmica.errors import QmicaError
from qmica.gram import RowBlocks

log = logging.getLogger(__name__)

VERSION = "1"  # of what is in the store: a change of the definition or of B's layout makes another
ENTRY = re.compile(r"r(\d+)")


class Weight(RowBlocks, Protocol):
    """A weight that can be read by rows, and told from others by its content."""

    def digest(self) -> str:
        """Hex, equal for equal content."""

    def held(self) -> torch.Tensor | RowBlocks:
        """The same for a dozen readings in a row."""


@dataclass(frozen=True)
class Tally:
    """How many subspaces there are, how many of them were in the store, and how many took a float64 SVD for want of a
    proof.
    """

    total: int
    stored: int
    fallbacks: int


def find(
    weights: Mapping[str, Weight],
    rank: int,
    components: str,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, torch.Tensor], Tally]:
    """The minor or major (`components`) subspaces B (out, rank), fp32, of weights by module path. Raises QmicaError
    naming the linear whose weight holds NaN or whose side is below the rank.
    """
    places, found = {}, {}
    with _failing_together(device):
        for name, weight in weights.items():
            shape = " x ".join(str(side) for side in weight.shape)
            places[name] = store.folder("subspaces", VERSION, components, shape, weight.digest())
            B = _stored(places[name], weight.shape[0], rank, components)
            if B is not None:
                found[name] = B.to(device)
                progress(len(found), len(weights))
    missing = _missing_anywhere([name for name in weights if name not in found], list(weights), device)
    stored, fallbacks = len(weights) - len(missing), 0
    with _failing_together(device):
        own = {name: weights[name] for name in missing[_process() :: _processes()]}
        for name, B, fell_back in _computed(own, rank, components, device):
            store.write(places[name], f"r{rank}", {"B": B})
            found[name] = B
            fallbacks += fell_back
            progress(len(found), len(weights))
    _share(missing, weights, found, rank, device)
    return {name: found[name] for name in weights}, Tally(len(weights), stored, _summed(fallbacks, device))


@contextmanager
def named(name: str) -> Iterator[None]:
    """A QmicaError inside says which layer it is about."""
    try:
        yield
    except QmicaError as error:
        raise QmicaError(f"{name}: {error}") from error


def _stored(place: Path, out: int, rank: int, components: str) -> torch.Tensor | None:
    """From the smallest rank in the store that is large enough."""
    ranks = sorted(int(match[1]) for name in store.names(place) if (match := ENTRY.fullmatch(name)))
    for enough in (known for known in ranks if known >= rank):
        entry = store.read(place, f"r{enough}")
        if entry is not None and entry["B"].shape == (out, enough):
            return _columns(entry["B"], rank, components)
    return None


def _columns(B: torch.Tensor, rank: int, components: str) -> torch.Tensor:
    """σ falls along the columns: the minor ones are the last, the major ones the first."""
    return (B[:, -rank:] if components == "minor" else B[:, :rank]).contiguous()


def _computed(
    weights: Mapping[str, Weight], rank: int, components: str, device: torch.device
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name, B, and whether it took a fallback. On a CPU the small weights come first, a thread each: their products
    are too small to be shared out (70 linears of SmolLM2 on 2 cores: 3.2 s for 4.5), and B does not depend on the
    number of threads.
    """

    def compute(name: str) -> tuple[str, torch.Tensor, bool]:
        with named(name):
            held = weights[name].held()
            held = held.to(device) if isinstance(held, torch.Tensor) else held
            if components == "major":
                return name, subspace.major_subspace(held, rank, device), False
            found = subspace.find_minor(held, rank, device)
        if found.path == "fallback":
            log.warning("%s: its subspace was proved in no precision, so a float64 SVD was taken", name)
        return name, found.B, found.path == "fallback"

    small = [name for name, weight in weights.items() if device.type == "cpu" and min(weight.shape) < subspace.SINGLE]
    with _one_thread_each() as pool:
        yield from pool.map(compute, small)
    yield from map(compute, [name for name in weights if name not in small])


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many workers as torch has threads, each with one of its own; afterwards torch has its threads again."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C and a damaged weight wait for what has begun, not for all
        torch.set_num_threads(threads)


# ---- several processes


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _process() -> int:
    return distributed.get_rank() if _processes() > 1 else 0


@contextmanager
def _failing_together(device: torch.device) -> Iterator[None]:
    """Where one process fails all do: the others would wait for its share for ever."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if _summed(failure is not None, device) and failure is None:
        failure = QmicaError("another process could not compute its share of the subspaces; its message says why")
    if failure is not None:
        raise failure


def _summed(value: int, device: torch.device) -> int:
    """Over all processes."""
    if _processes() == 1:
        return int(value)
    total = torch.tensor(int(value), device=device)
    distributed.all_reduce(total)
    return int(total)


def _missing_anywhere(missing: list[str], names: list[str], device: torch.device) -> list[str]:
    """The names that any process lacks, in order and equal on all of them: one that looked later may have found what
    another had just written.
    """
    if _processes() == 1:
        return missing
    lacking = torch.tensor([name in missing for name in names], dtype=torch.int32, device=device)
    distributed.all_reduce(lacking, distributed.ReduceOp.MAX)
    return [name for name, lacks in zip(names, lacking.tolist(), strict=True) if lacks]


def _share(missing: list[str], weights: Mapping[str, Weight], found: dict, rank: int, device: torch.device) -> None:
    """Give every process what the others computed."""
    if _processes() == 1:
        return
    for place, name in enumerate(missing):
        if place % _processes() != _process():
            found[name] = torch.empty(weights[name].shape[0], rank, device=device)
        distributed.broadcast(found[name], place % _processes())
