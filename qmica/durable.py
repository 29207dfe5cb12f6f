"""Files that exist whole or not at all: write beside, sync, rename; hashes, free space, locks, the cache folder.

A result is written to a sibling of its final name (`model.gguf.3f2a9c01.part`), synced to the disk, renamed over the
old one, and then the folder is synced, so that a reader, a crash or a power cut sees the old content or the new,
never a mixture. A failure in the middle removes the sibling. What it gives up: a process that is killed outright
(SIGKILL, power) leaves its `.part` behind; the name is not hidden, so that whoever misses the disk space finds it.

This module stays light: no torch, and filelock (which comes with huggingface_hub and torch) only inside `locked`.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmica.errors import QmicaError

PART = ".part"
_UNITS = ((1e9, "GB", 1), (1e6, "MB", 1), (1e3, "kB", 0), (1, "bytes", 0))
_USER_CAN_FIX = {
    errno.ENOSPC: "the disk is full: free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
    errno.EACCES: "permission denied: choose a folder that you may write to",
    errno.EPERM: "permission denied: choose a folder that you may write to",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
    errno.ENOTEMPTY: "another process wrote there meanwhile: choose another name",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
}


def size_text(nbytes: float) -> str:
    """Bytes as people read them, in powers of ten as disks are sold: `4.7 GB`, `98.1 MB`, `12 kB`, `17 bytes`."""
    scale, unit, digits = next((row for row in _UNITS if nbytes >= row[0]), _UNITS[-1])
    return f"{nbytes / scale:.{digits}f} {unit}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; on success it replaces `path` durably, on failure it is removed.

    Missing parent folders are made. The content of `path` is untouched until the block has ended without an exception
    and the new file is on the disk. Raises QmicaError for what a user can fix (full disk, no permission, `path` is a
    folder).
    """
    path = Path(path)
    if path.is_dir():
        raise QmicaError(f"cannot write {path}: it is a folder; give a file name, such as {path / 'NAME'}")
    with _sibling(path) as part:
        yield part
        sync(part)
        os.replace(part, path)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling folder to fill; on success it is renamed to `path`, which must be missing or empty
    (`require_empty`).

    Every file and folder inside is synced first. On failure the sibling and all it holds are removed.
    """
    path = Path(path)
    require_empty(path)
    with _sibling(path) as part:
        part.mkdir()
        yield part
        for inside in sorted(part.rglob("*"), reverse=True):
            sync(inside)
        sync(part)
        if path.is_dir():
            path.rmdir()  # Windows renames onto nothing that exists; a folder that was filled meanwhile makes this fail
        os.rename(part, path)


@contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """A fresh name beside `path`: removed if the block fails, and the folder is synced if it succeeds."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(path.parent)
    except BaseException as error:  # Ctrl-C too must leave no litter
        _remove(part)
        _raise_if_user_can_fix(error, path, part)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def _raise_if_user_can_fix(error: BaseException, path: Path, part: Path) -> None:
    """Turn a full disk or a missing permission into a QmicaError, if it is this file's and not that of one being
    read.
    """
    trouble = disk_trouble(error)
    if trouble is None:
        return
    ours = {os.fspath(place) for place in (path, part, *path.parents)}
    if error.filename is None or os.fspath(error.filename) in ours or os.fspath(error.filename).startswith(str(part)):
        raise QmicaError(f"cannot write {path}: {trouble}") from error


def disk_trouble(error: BaseException) -> str | None:
    """What a user can do about an error of the file system ("the disk is full: ..."); None for any other error."""
    return _USER_CAN_FIX.get(error.errno) if isinstance(error, OSError) else None


def sync(path: str | Path) -> None:
    """fsync a file or a folder; Windows cannot sync folders and does without."""
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return
    # Windows flushes only handles that may write
    handle = os.open(path, os.O_RDONLY if folder or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text with `\\n` line ends on every system, durably."""
    with replacing(path) as part:
        part.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, obj) -> None:
    """Write indented UTF-8 JSON, durably. NaN and infinities, which JSON cannot say, raise ValueError."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def free_space(folder: str | Path) -> int:
    """Bytes that this user may still write at `folder`, or at its nearest parent that exists."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(folder: str | Path, nbytes: float, what: str) -> None:
    """Raise QmicaError (`WHAT needs X GB, has Y GB free at PATH`) if fewer than `nbytes` bytes are free at `folder`."""
    free = free_space(folder)
    if free < nbytes:
        raise QmicaError(
            f"{what} needs {size_text(nbytes)}, has {size_text(free)} free at {folder}: "
            "free some space or choose another folder"
        )


def require_empty(folder: str | Path) -> None:
    """Raise QmicaError if `folder` is a file or a folder that holds anything; missing is fine."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise QmicaError(f"output folder {folder} is a file: choose another --out")
    inside = sorted(entry.name for entry in folder.iterdir())
    if inside:
        held = f"{inside[0]} and {len(inside) - 1} more" if len(inside) > 1 else inside[0]
        raise QmicaError(f"output folder {folder} is not empty (it holds {held}): choose another --out, or empty it")


def cache_folder() -> Path:
    """The folder of what may be deleted at the cost of time only: `QMICA_CACHE`, else the system's place for caches."""
    if named := os.environ.get("QMICA_CACHE"):
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("qmica", appauthor=False)


@contextmanager
def locked(path: str | Path, timeout: float = 600.0) -> Iterator[None]:
    """Hold the lock file `path`.lock against other processes; the system frees it when the holder ends, however it
    ends.

    `timeout` is in seconds; waiting longer raises QmicaError.
    """
    from filelock import FileLock, Timeout

    lock = Path(f"{path}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    holder = FileLock(lock)
    try:
        holder.acquire(timeout=timeout)
    except Timeout as error:
        raise QmicaError(
            f"{path} is in use by another qmica process (waited {timeout:g} s for {lock}): "
            "wait until it ends, or stop it"
        ) from error
    try:
        yield
    finally:
        holder.release()
