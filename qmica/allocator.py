"""glibc's malloc, told what to keep and what to give back. Elsewhere than on glibc nothing is done."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MAPPED_FROM = 2**25  # bytes: the most that glibc allows for M_MMAP_THRESHOLD; larger tensors are mapped one by one
_NOT_GLIBC = (AttributeError, OSError, TypeError)


def keep_freed() -> None:
    """Keep what is freed instead of giving it back to the kernel, which then has to clear it again.

    A forward frees and takes the same buffers of a few MB in every layer; measured on SmolLM2 on a CPU, a third of the
    time of an evaluation was the kernel clearing 260 GB of pages.
    """
    with contextlib.suppress(*_NOT_GLIBC):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)


def give_back() -> None:
    """Return to the kernel what is kept of freed tensors: up to 32 MB each they come from the heap, where small packed
    weights between them keep it from shrinking. Without this, loading a 1.0 GB model in NF4 held 0.58 GB, with it 0.28.
    """
    with contextlib.suppress(*_NOT_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


def gives_back() -> bool:
    """Whether `give_back` does anything here."""
    with contextlib.suppress(*_NOT_GLIBC):
        return ctypes.CDLL(None).malloc_trim is not None
    return False
