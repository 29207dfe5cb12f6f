"""Examples (token ids and which are learnt) -> rows of packed documents -> the batches of an epoch.

Rows: examples are packed into rows of max_seq_length by restarting position_ids, best fit in the seeded order.
Padding stands behind the last document, which therefore never sees it; its labels are masked by its place, never by
its token id. labels[t] is the target *of* token t (as in Hugging Face: the loss shifts); the first token of every
example has none, as nothing of its own document stands before it. Everything is a function of (seed, epoch), so a
resumed run needs no history; no batch exists before its turn.

What it gives up: attention across the windows of one long document. Best fit fills rows to about 99 % on mixed
lengths, but the number of rows differs a little from epoch to epoch: ask each epoch for its length.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from qmica.errors import QmicaError
from qmica.loss import IGNORED, WIDTH

REPLAY_DRAWS = 16  # windows of replay an epoch, at least: fewer would neither meet the ratio nor be spread evenly


@dataclass(frozen=True)
class Examples:
    """Examples (windows of texts, whole chats) end to end in flat arrays: 5 bytes a token."""

    ids: np.ndarray  # (tokens,) int32
    supervised: np.ndarray  # (tokens,) bool: False at the first token of each example
    starts: np.ndarray  # (examples + 1,) int64
    documents: np.ndarray  # (examples,) int32: which document an example is of

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def select(self, wanted: np.ndarray) -> "Examples":
        """The examples where `wanted` (examples,) is True, in order."""
        tokens = np.repeat(wanted, self.lengths)
        starts = np.concatenate([[0], np.cumsum(self.lengths[wanted])]).astype(np.int64)
        return Examples(self.ids[tokens], self.supervised[tokens], starts, self.documents[wanted])

    def fingerprint(self) -> str:
        """32 hex digits over tokens, labels and borders: the same data for the same model gives the same."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.ids, self.supervised, self.starts):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; tensors of (rows, length), int64 and bool. length: the longest row's, padded to a
    multiple of WIDTH within max_seq_length.

    Use it with attention_mask=None and use_cache=False: only then does transformers keep the documents apart.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor  # restarts at 0 with each document; counts on through the padding, which nothing sees
    labels: torch.Tensor  # the target of each token (the loss shifts), or IGNORED
    replayed: torch.Tensor  # bool: which tokens are of replayed text
    supervised: int  # labels that are not IGNORED
    replays: int  # those of them that are of replayed text
    tokens: int  # without padding


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    moved = {name: getattr(batch, name).to(device) for name in ("input_ids", "position_ids", "labels", "replayed")}
    return replace(batch, **moved)


def documents(batch: Batch) -> Iterator[tuple[list[int], list[bool]]]:
    """Each document of a batch: its token ids, and which of them have a loss (the first has none)."""
    for ids, places, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
        starts = (places == 0).nonzero().flatten().tolist()
        for start, stop in pairwise([*starts, len(ids)]):
            learnt = labels[start:stop] != IGNORED
            learnt[0] = False
            if learnt.any():  # behind the last of them there is padding, or nothing that counts
                end = int(learnt.nonzero()[-1]) + 1
                yield ids[start : start + end].tolist(), learnt[:end].tolist()


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch in at most `count` parts of about as many rows; together they have its labels."""
    rows = -(-len(batch.input_ids) // count)
    return [_rows(batch, slice(start, start + rows)) for start in range(0, len(batch.input_ids), rows)]


def _rows(batch: Batch, place: slice) -> Batch:
    """Some of the batch's rows; `tokens` counts their padding."""
    cut = {name: getattr(batch, name)[place] for name in ("input_ids", "position_ids", "labels", "replayed")}
    supervised = cut["labels"] != IGNORED
    counts = int(supervised.sum()), int((supervised & cut["replayed"]).sum()), cut["labels"].numel()
    return Batch(**cut, **dict(zip(("supervised", "replays", "tokens"), counts, strict=True)))


def window_lengths(tokens: int, size: int) -> list[int]:
    """Cut `tokens` into windows of `size`; a lone last token, which nothing could predict, gets one from before it."""
    lengths = [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)
    if len(lengths) > 1 and lengths[-1] == 1:
        lengths[-2:] = [size - 1, 2]
    return lengths


def split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(training, validation): about `share` of the documents, at least one, drawn by a seeded hash of their tokens.

    So the split does not depend on the order of the files, and equal documents are never on both sides.
    """
    borders = np.flatnonzero(np.diff(examples.documents, prepend=-1, append=-1))
    keys = np.empty(len(borders) - 1, dtype=np.uint64)
    for i, (a, b) in enumerate(pairwise(borders)):
        content = examples.ids[examples.starts[a] : examples.starts[b]].tobytes()
        keys[i] = int.from_bytes(hashlib.blake2b(b"%d:" % seed + content, digest_size=8).digest(), "little")
    different = np.unique(keys)
    if len(different) < 2:
        raise QmicaError(
            f"--val-split {share} keeps whole documents from training, but the data is one document: "
            "give more files or set --val-split 0"
        )
    border = np.sort(keys)[max(1, round(share * len(keys))) - 1]
    held = np.repeat(keys <= min(border, different[-2]), np.diff(borders))
    return examples.select(~held), examples.select(held)


def _order(kind: int, seed: int, number: int, count: int) -> np.ndarray:
    """A permutation of `count` things that depends on nothing but (seed, number); kind: 0 data, 1 replay."""
    return np.random.default_rng([kind, seed, number]).permutation(count)


def replay_tokens(train: Examples, ratio: float) -> float:
    return len(train.ids) * ratio / (1 - ratio)


def draw_replay(replay: Examples, target: float, seed: int, epoch: int) -> np.ndarray:
    """Indices of the replay examples of one epoch: about `target` tokens, right to half an example.

    Permutations of all of replay, end to end, are one endless text; epoch e gets the examples whose middle lies in its
    e-th piece of `target` tokens. So no example comes again before all have come, and no history is needed.
    """
    low, high, total = epoch * target, (epoch + 1) * target, len(replay.ids)
    picks = []
    for lap in range(int(low // total), int(high // total) + 1):
        order = _order(1, seed, lap, len(replay))
        lengths = replay.lengths[order]
        middle = lap * total + np.cumsum(lengths) - lengths / 2
        picks.append(order[(middle >= low) & (middle < high)])
    return np.concatenate(picks)


def _middles(lengths: np.ndarray) -> np.ndarray:
    return (np.cumsum(lengths) - lengths / 2) / max(1, lengths.sum())


def pack(lengths: Sequence[int], capacity: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Rows of indices into `lengths`, each at most `capacity` long: best fit, in the order given.

    Each goes into the open row it leaves the least room in, else into a new one; rows stand in the order of opening.
    kinds: 0 or 1 for each. The first look of a 0 is at the rows that have a 1, that of a 1 at the rows without.
    """
    rows: list[list[int]] = []
    rooms: tuple[list, list] = ([], [])  # (free, row), sorted: rows of kind 0 alone, and rows with kind 1
    smallest = min(lengths, default=0)
    for i, length in enumerate(lengths):
        kind = 0 if kinds is None else kinds[i]
        for has in (1 - kind, kind):
            at = bisect.bisect_left(rooms[has], (length, -1))
            if at < len(rooms[has]):
                free, row = rooms[has].pop(at)
                break
        else:
            free, row, has = capacity, len(rows), kind
            rows.append([])
        rows[row].append(i)
        if free - length >= smallest:
            bisect.insort(rooms[has | kind], (free - length, row))
    return rows


class Epoch(Sequence):
    """The batches of one epoch: `len` is known before any is made, and each is made when asked for.

    A run resumed after batch k goes on with `epoch.since(k)`.
    """

    def __init__(
        self, sources: tuple[Examples, ...], rows: list[list[tuple[int, int]]], batch_size: int, max_seq_length: int
    ):
        self._sources, self._rows = sources, rows
        self._batch_size, self._max_seq_length = batch_size, max_seq_length

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self._batch(self._rows[index * self._batch_size : (index + 1) * self._batch_size])

    def since(self, start: int) -> Iterator[Batch]:
        return (self[i] for i in range(start, len(self)))

    def tokens(self, source: int | None = None) -> int:
        """Tokens of the epoch without padding; source 0: the data's, 1: replay's."""
        return sum(self._size([(s, i) for s, i in row if source is None or s == source]) for row in self._rows)

    def positions(self) -> int:
        """Tokens of the epoch with padding: what is computed."""
        size = self._batch_size
        batches = (self._rows[start : start + size] for start in range(0, len(self._rows), size))
        return sum(len(rows) * self._width(rows) for rows in batches)

    def _size(self, row: list[tuple[int, int]]) -> int:
        return sum(int(self._sources[s].starts[i + 1] - self._sources[s].starts[i]) for s, i in row)

    def _width(self, rows: list[list[tuple[int, int]]]) -> int:
        longest = max(self._size(row) for row in rows)
        return min(-(-longest // WIDTH) * WIDTH, self._max_seq_length)

    def _batch(self, rows: list[list[tuple[int, int]]]) -> Batch:
        pieces = [[self._sources[s].starts[i : i + 2] for s, i in row] for row in rows]
        ids = np.zeros((len(rows), self._width(rows)), dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        positions = np.empty_like(ids)
        replayed = np.zeros(ids.shape, dtype=bool)
        for r, row in enumerate(rows):
            at = 0
            for (s, _), (a, b) in zip(row, pieces[r], strict=True):
                place = slice(at, at + int(b - a))
                ids[r, place] = self._sources[s].ids[a:b]
                labels[r, place] = np.where(self._sources[s].supervised[a:b], ids[r, place], IGNORED)
                positions[r, place] = np.arange(b - a)
                replayed[r, place] = s == 1
                at = place.stop
            # Counting on keeps a row of one document plainly causal, which needs no mask: a third faster at 100 tokens.
            positions[r, at:] = np.arange(ids.shape[1] - at) + positions[r, at - 1] + 1
        supervised = labels != IGNORED
        counts = int(supervised.sum()), int((supervised & replayed).sum()), sum(map(self._size, rows))
        return Batch(*map(torch.from_numpy, (ids, positions, labels, replayed)), *counts)


def batches(
    examples: Examples,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    max_seq_length: int,
    packing: bool = True,
    replay: Examples | None = None,
    replay_ratio: float = 0.0,
) -> Epoch:
    """The batches of one epoch, a function of the arguments alone.

    Without packing every example has its own row. Replay is spread evenly between the examples and packed beside
    them, so that most updates see both where documents are shorter than a row.
    The number of rows differs a little from epoch to epoch with packing: ask each epoch for its length.
    """
    order = _order(0, seed, epoch, len(examples))
    drawn = np.empty(0, dtype=np.int64)
    if replay is not None and replay_ratio:
        drawn = draw_replay(replay, replay_tokens(examples, replay_ratio), seed, epoch)
    lengths = [examples.lengths[order], replay.lengths[drawn] if len(drawn) else np.empty(0, dtype=np.int64)]
    mixed = np.argsort(np.concatenate([_middles(part) for part in lengths]), kind="stable")
    stream = [(0, i) for i in order.tolist()] + [(1, i) for i in drawn.tolist()]
    stream = [stream[i] for i in mixed.tolist()]
    sizes = np.concatenate(lengths)[mixed].tolist()
    rows = pack(sizes, max_seq_length, [s for s, _ in stream]) if packing else [[i] for i in range(len(sizes))]
    sources = (examples,) if replay is None else (examples, replay)
    return Epoch(sources, [[stream[i] for i in row] for row in rows], batch_size, max_seq_length)


def longest(epoch: Epoch) -> Batch:
    """The largest of the first 64 batches; replay is computed twice."""
    some = (epoch[i] for i in range(min(len(epoch), 64)))
    return max(some, key=lambda batch: (batch.input_ids.numel(), batch.replays))
