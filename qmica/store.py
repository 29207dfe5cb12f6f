"""The keyed store: what took time to compute, in files that may be deleted at the cost of that time only.

How: an entry is a safetensors file in the cache folder (`QMICA_CACHE`), in a folder named by a hash of all that it was
computed from, so that it is never out of date. It is written beside, synced and renamed, so that two processes may
write the same entry at once; a checksum over its tensors stands in its header, and an entry that does not hold what it
says is said once, removed and computed again.

What it gives up: nothing is ever evicted; entries of models that are gone stay until the folder is deleted.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qmica import durable
from qmica.errors import QmicaError

log = logging.getLogger(__name__)

CHECKSUM = "sha256"
SUFFIX = ".safetensors"


def folder(kind: str, *parts: str) -> Path:
    """Where entries of a kind ("subspaces") live whose content was computed from `parts`; it need not exist."""
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return durable.cache_folder() / kind / key[:2] / key[2:]


def names(place: Path) -> list[str]:
    """The entries in a folder of the store, without their suffix."""
    return [path.stem for path in place.glob(f"*{SUFFIX}")]


def write(place: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep tensors as an entry; where the store cannot be written that is said, and nothing is kept."""
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        with durable.replacing(place / f"{name}{SUFFIX}") as part:
            save_file(kept, part, metadata={CHECKSUM: _checksum(kept)})
    except (QmicaError, SafetensorError, OSError) as error:
        log.warning("not kept for the next time: %s", " ".join(str(error).split()))


def read(place: Path, name: str) -> dict[str, torch.Tensor] | None:
    """An entry's tensors, or None where there is none or it is damaged, which is said."""
    path = place / f"{name}{SUFFIX}"
    try:
        tensors, expected = _of_one_file(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        return _damaged(path, str(error))
    return tensors if _checksum(tensors) == expected else _damaged(path, "its checksum is another")


def _of_one_file(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Tensors and checksum. safe_open opens a file twice, by name: one that got the name in between is read again."""
    while True:
        before = _identity(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                expected = (file.metadata() or {}).get(CHECKSUM)
        except SafetensorError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return tensors, expected


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _damaged(path: Path, reason: str) -> None:
    log.warning("%s is damaged (%s): it is computed again", path, " ".join(reason.split()))
    with contextlib.suppress(OSError):  # of a folder that may only be read
        path.unlink()


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    names = sorted(tensors)
    return hashlib.sha256("\n".join([*names, digest(tensors[name] for name in names)]).encode()).hexdigest()


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Hex SHA-256 over the shapes, dtypes and bytes of tensors, in order; read in pieces of 64 MB."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for piece in flat.split(1 << 26):
            found.update(piece.cpu().numpy())
    return found.hexdigest()
