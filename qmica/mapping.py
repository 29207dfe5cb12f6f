"""A file mapped into memory: tensors that are views of it, so that the kernel may drop and read their pages again.

How: the map is private (copy on write), so that whoever changes a tensor in place changes a copy and never the file.
Its untouched pages are the file's (RssFile), not the process's own (RssAnon): under pressure the kernel drops them
without swapping. `will_need` and `drop` tell it what comes next and what is done with (madvise).

What it gives up: a tensor that does not begin at a multiple of its element's size cannot be a view, and there is no
advice on Windows, whose kernel decides alone.
"""

import math
import mmap
from collections.abc import Iterable
from pathlib import Path

import torch

ADVISABLE = hasattr(mmap.mmap, "madvise")


class Map:
    """The bytes of one file, mapped when this is made. Raises OSError where that fails, ValueError for an empty
    file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        whole = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self.address, self.size = whole.data_ptr(), len(whole)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor | None:
        """The tensor whose data begins at byte `offset`, without a copy; None where it is empty or not aligned."""
        count = math.prod(shape)
        if count == 0 or offset % dtype.itemsize:
            return None
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).view(shape)

    def place(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """(start, stop): the bytes of the file that a contiguous tensor is a view of; None for any other tensor."""
        start = tensor.data_ptr() - self.address
        return (start, start + tensor.nbytes) if 0 <= start < self.size and tensor.device.type == "cpu" else None

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read these bytes from the disk; returns at once."""
        self._advise("MADV_WILLNEED", start, stop)

    def drop(self, start: int, stop: int) -> None:
        """Take the pages of these bytes out of this process. They are read again where they are used again; what was
        changed in place is lost.
        """
        self._advise("MADV_DONTNEED", start, stop)

    def _advise(self, name: str, start: int, stop: int) -> None:
        if ADVISABLE:
            start = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(getattr(mmap, name), start, min(stop, self.size) - start)


def merged(places: Iterable[tuple[int, int]], gap: int = mmap.PAGESIZE) -> list[tuple[int, int]]:
    """Ranges in order, those joined that are no more than `gap` apart."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(places):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
