"""An importance matrix: how much each input of each linear was used on a sample text, as llama-imatrix measured it.

How: for each weight the file has the sums of the squares of its input, column by column, and the count they are of;
their quotient weighs the errors of quantization (ggml_quantize_chunk's last argument). Two formats are read, as
llama-quantize does: the GGUF that llama-imatrix writes now, and the `.dat` it wrote before, both with every count and
length checked before it is believed. Names and columns are those of llama.cpp's tensors, which are Hugging Face's
columns too: the q/k permutation moves rows only.

What it gives up: making one (llama-imatrix does, on any GGUF that `qmica export` wrote), and experts, whose entries
hold a row each.

Source: llama.cpp, common/imatrix-loader.cpp and load_imatrix of tools/quantize/quantize.cpp.
"""

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile, GGUFTensor, is_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
EMBEDDING = "token_embd.weight"
NAMED = 3  # tensors named in a message, of any number


@dataclass(frozen=True)
class Importance:
    """columns: GGUF tensor name -> float32 (columns,), the mean square of each input; datasets: the texts it was
    measured on; chunks: of them."""

    path: Path
    columns: Mapping[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    chunks: int = 0

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> "Importance":
        """What is of use to a model. QmicaError naming the first tensors that have other columns in it, or are none of
        it; an embedding of other columns is left out, as by llama-quantize.

        shapes: GGUF tensor name -> shape in torch's order."""
        columns = {name: found for name, found in self.columns.items() if name != EMBEDDING or _fits(found, shapes)}
        wrong = [
            f"{name} has {len(found)} columns in it and {shapes[name][-1]} in the model"
            if name in shapes
            else f"{name} is no tensor of the model"
            for name, found in columns.items()
            if name not in shapes or len(found) != shapes[name][-1]
        ]
        if wrong:
            more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            raise QmicaError(
                f"--imatrix {self.path} is for another model: {', '.join(wrong[:NAMED])}{more}; "
                "make one of this model with llama-imatrix"
            )
        return replace(self, columns=columns)

    def describe(self, names: Collection[str]) -> str:
        """What it covers of the tensors that could use it."""
        without = [name for name in names if name not in self.columns]
        text = f"--imatrix {self.path.name}: {len(names) - len(without)} of {len(names)} tensors are weighed by it"
        source = f", measured on {', '.join(self.datasets)}" if self.datasets else ""
        source += f" ({self.chunks} chunks)" if self.chunks else ""
        if not without:
            return text + source
        more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
        return f"{text}{source}; {', '.join(without[:NAMED])}{more} without"


def _fits(found: np.ndarray, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return EMBEDDING in shapes and len(found) == shapes[EMBEDDING][-1]


def read(path: str | Path) -> Importance:
    """Read an importance matrix, whole (a few MB for a 7B model).

    Raises QmicaError for a file that is neither format, is damaged, or holds what cannot be a mean of squares (with
    nothing but zeros, ggml would round every weight to zero).
    """
    path = Path(path)
    if not path.is_file():
        raise QmicaError(f"--imatrix {path} is not a file: give the file that llama-imatrix wrote")
    found = _read_gguf(path) if is_gguf(path) else _read_legacy(path)
    if not found.columns:
        raise QmicaError(f"--imatrix {path} holds no entries: make it again with llama-imatrix")
    for name, columns in found.columns.items():
        if not (np.isfinite(columns).all() and columns.min() >= 0 and columns.any()):
            raise QmicaError(
                f"--imatrix {path}: {name} is no mean of squares (a number is negative, NaN or infinite, or all are "
                "zero): make it again with llama-imatrix"
            )
    return found


# ---- GGUF


def _read_gguf(path: Path) -> Importance:
    file = GGUFFile.open_imatrix(path)
    sums = {name.removesuffix(SUMS): tensor for name, tensor in file.tensors.items() if name.endswith(SUMS)}
    counts = {name.removesuffix(COUNTS): tensor for name, tensor in file.tensors.items() if name.endswith(COUNTS)}
    if sums.keys() != counts.keys():
        raise QmicaError(
            f"--imatrix {path}: {min(sums.keys() ^ counts.keys())} has no sums or no counts: make it again"
        )
    columns = {name: _means(path, name, sums[name], counts[name]) for name in sums}
    datasets, chunks = file.metadata.get("imatrix.datasets", []), file.metadata.get("imatrix.chunk_count", 0)
    named = tuple(str(text) for text in datasets) if isinstance(datasets, list) else ()
    return Importance(path, columns, named, _chunks(path, chunks))


def _chunks(path: Path, number: Any) -> int:
    """A number of chunks: an int32 of llama-imatrix, which a GGUF made with it says as a uint32."""
    if type(number) is int and 0 <= number < 1 << 31:
        return number
    raise QmicaError(
        f"--imatrix {path} says it was measured on {repr(number)[:80]} chunks: a number from 0 to {(1 << 31) - 1} has "
        "to stand there; make it again with llama-imatrix"
    )


def _means(path: Path, name: str, sums: GGUFTensor, counts: GGUFTensor) -> np.ndarray:
    """sums / count; ones where nothing was counted, so that all columns count the same."""
    if {sums.type, counts.type} != {GGMLQuantizationType.F32} or counts.nbytes != 4:
        raise QmicaError(
            f"--imatrix {path}: {name} is not one row of F32 numbers with one count, as a dense model's is: "
            "make one of this model with llama-imatrix"
        )
    values, count = (tensor.raw().reshape(-1).view("<f4") for tensor in (sums, counts))
    count = np.rint(count[0])
    if not 0 <= count < np.inf:  # nor NaN
        raise QmicaError(f"--imatrix {path}: {name} was counted {count:g} times: make it again with llama-imatrix")
    return values / count if count > 0 else np.ones(len(values), np.float32)


# ---- the older format: int32 entries, then of each int32 length, name, int32 calls, int32 values, float32 values


def _read_legacy(path: Path) -> Importance:
    data = path.read_bytes() if path.stat().st_size < 1 << 30 else b""  # of a 405B model: 50 MB
    columns, at = {}, 4
    try:
        for _ in range(_integer(data, 0)):
            length = _integer(data, at)
            name = _slice(data, at + 4, length).decode("utf-8")
            calls, count = struct.unpack_from("<ii", data, at + 4 + length)
            if calls < 0:
                raise ValueError(f"{calls} calls at byte {at + 4 + length}")
            at += 12 + length
            values = np.frombuffer(_slice(data, at, 4 * count), "<f4")
            at += 4 * count
            columns[name] = values / np.float32(calls) if calls > 0 else values
        datasets, chunks = _trailer(data, at)
    except (struct.error, ValueError) as error:
        raise QmicaError(
            f"--imatrix {path} is no importance matrix: it is neither the GGUF nor the .dat of llama-imatrix"
        ) from error
    return Importance(path, columns, datasets, _chunks(path, chunks))


def _integer(data: bytes, at: int) -> int:
    """An int32 that is 1 or more. ValueError for any other."""
    (number,) = struct.unpack_from("<i", data, at)
    if number < 1:
        raise ValueError(f"{number} at byte {at}")
    return number


def _slice(data: bytes, at: int, nbytes: int) -> bytes:
    if nbytes < 1 or at + nbytes > len(data):
        raise ValueError(f"{nbytes} bytes at byte {at} of {len(data)}")
    return data[at : at + nbytes]


def _trailer(data: bytes, at: int) -> tuple[tuple[str, ...], int]:
    """The text's name and the number of chunks, where the file has them."""
    if len(data) < at + 8:
        return (), 0
    chunks, length = struct.unpack_from("<ii", data, at)
    text = data[at + 8 : at + 8 + length] if length > 0 else b""
    return ((text.decode("utf-8", "replace"),) if text else ()), chunks
