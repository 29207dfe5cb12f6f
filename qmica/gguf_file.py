"""A GGUF file opened safely: the header checked and bounded first, then metadata and lazy tensors.

How: the header is parsed with `struct` over a memory map, every count and length compared with the bytes that are left
before anything is allocated; tensors stay on disk and `GGUFTensor.raw` maps the rows that are asked for. Written here
because gguf 0.19's own reader hangs on a 49-byte file (an array of 2^40 elements) and takes 5.3 s for a vocabulary of
49,152 tokens; this one takes 0.1 s. Layout: the GGUF specification, ggml/docs/gguf.md; limits as in ggml/src/gguf.cpp.

What it gives up: GGUF version 1, big-endian files and arrays of arrays (llama.cpp does not read those either) are
refused, and headers beyond LIMITS. Files are opened for reading only; write with gguf.GGUFWriter:
`writer.add_key_value(key, value, *file.kinds[key])` copies one metadata entry byte for byte.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from qmica.errors import QmicaError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Far above any real model (Gemma 3: 1.3 million array elements; Llama-3.1-405B: 1,137 tensors), low enough that a
# hostile header costs seconds and a few hundred MB at most.
LIMITS = {
    "header bytes": 1 << 28,
    "metadata keys": 1 << 16,
    "tensors": 1 << 16,
    "array elements": 1 << 23,
    "bytes in a name": 1 << 10,
}

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_STRING_LENGTH = struct.Struct("<Q")
_ARCHITECTURE = re.compile(r"[\w.-]{1,64}", re.ASCII)
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)

# general.type, or the architecture, of GGUF files that hold something else than a language model
_NOT_A_MODEL = {
    "mmproj": "is a vision projector, not a language model; give the model's own GGUF (no mmproj in its name)",
    "adapter": "is an adapter, not a model; give the GGUF of its base model, and the adapter with --adapter",
    "imatrix": "is an importance matrix, not a model; give the model's own GGUF",
}


class Kind(NamedTuple):
    """The stored type of a metadata value; `element` is the type of an array's elements, else None."""

    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor on disk: `shape` in torch's order (slowest dimension first), `offset` in bytes into the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int
    path: Path = field(repr=False)
    offset: int = field(repr=False)

    @property
    def rows(self) -> int:
        """Rows over all dimensions but the last; a 1-D tensor is one row."""
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows

    def raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop as stored: uint8 (stop - start, row_bytes), a read-only view of a memory map (no copy)."""
        start, stop, _ = slice(start, stop).indices(self.rows)
        shape = (max(stop - start, 0), self.row_bytes)
        if shape[0] == 0:
            return np.empty(shape, np.uint8)
        return np.asarray(
            np.memmap(self.path, np.uint8, mode="r", offset=self.offset + start * self.row_bytes, shape=shape)
        )


@dataclass(frozen=True)
class GGUFFile:
    """A checked GGUF: `metadata` as Python values (arrays as lists; a string that is not UTF-8 stays bytes), the stored
    type of each in `kinds`, and the `tensors` of all `parts` by name, in file order. `path` is the first part."""

    path: Path
    parts: tuple[Path, ...]
    metadata: dict[str, Any]
    kinds: dict[str, Kind]
    tensors: dict[str, GGUFTensor]
    alignment: int = DEFAULT_ALIGNMENT

    @classmethod
    def open(cls, path: str | Path, adapter: bool = False) -> GGUFFile:
        """Parse and check the file, or all shards of it when `path` is any one shard of a split model.

        With `adapter` an adapter GGUF is expected instead of a model. Raises QmicaError for whatever is not a sound,
        complete GGUF of that sort."""
        opened = cls._read(Path(path))
        _check_sort(opened, adapter)
        _check_tensors(opened, adapter)
        return opened

    @classmethod
    def open_imatrix(cls, path: str | Path) -> GGUFFile:
        """The same for an importance matrix, which is no model and has no architecture."""
        opened = cls._read(Path(path))
        if opened.metadata.get("general.type") != "imatrix":
            sort = str(opened.metadata.get("general.type", "model"))[:40]
            raise QmicaError(f"{path} is not an importance matrix (general.type is {sort!r}): llama-imatrix makes one")
        return opened

    @classmethod
    def _read(cls, path: Path) -> GGUFFile:
        header = _parse(path)
        if header.integer("split.count", 1) > 1:
            parts = find_shards(path, header.integer("split.count", 1))
            headers = [header if part == path else _parse(part) for part in parts]
        else:
            parts, headers = (path,), [header]
        tensors = _joined(parts, headers)
        first = headers[0]
        return cls(parts[0], parts, first.metadata, first.kinds, tensors, first.alignment)

    @property
    def architecture(self) -> str:
        """`general.architecture`, for example "llama" or "qwen2"."""
        return self.metadata["general.architecture"]


def is_gguf(path: str | Path) -> bool:
    """Whether the file starts with GGUF's magic; the name does not count (Ollama's blobs have no suffix)."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def find_shards(path: str | Path, count: int | None = None) -> tuple[Path, ...]:
    """All parts of the split model that `path` belongs to, by name (`…-00001-of-00003.gguf`); an unsplit name: itself.

    With `count` (the header's `split.count`) the name must agree. QmicaError names the first missing part."""
    path = Path(path)
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None and count is None:
        return (path,)
    if match is None or (count is not None and int(match["count"]) != count):
        raise QmicaError(
            f"{path} is one of {count} parts of a split GGUF, but is not named so: name the parts "
            f"NAME-00001-of-{count:05d}.gguf and so on, in one folder"
        )
    total = int(match["count"])
    parts = tuple(path.with_name(f"{match['prefix']}-{n:05d}-of-{total:05d}.gguf") for n in range(1, total + 1))
    for part in parts:
        if not part.is_file():
            raise QmicaError(f"{path.name} is one of {total} parts, and {part} is missing: put all parts in one folder")
    return parts


# ---- parsing one file


class _Header(NamedTuple):
    metadata: dict[str, Any]
    kinds: dict[str, Kind]
    tensors: dict[str, GGUFTensor]
    alignment: int

    def integer(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        return value if isinstance(value, int) else default


@dataclass
class _Cursor:
    """A place in the mapped header. Every read checks the bytes left first; `fail` makes the one-line error."""

    data: mmap.mmap
    path: Path
    at: int = 0
    elements: int = 0

    def fail(self, what: str) -> QmicaError:
        return QmicaError(f"{self.path} is not a usable GGUF: {what} (byte {self.at}); download or convert it again")

    def advance(self, nbytes: int) -> int:
        """The current place; the cursor moves on by nbytes."""
        start, end = self.at, self.at + nbytes
        if end > len(self.data):
            raise self.fail(f"the file is truncated inside its header, {end - len(self.data)} bytes are missing")
        if end > LIMITS["header bytes"]:
            raise self.fail(f"its header is larger than {LIMITS['header bytes']} bytes")
        self.at = end
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.advance(struct.calcsize(form)))[0]

    def string(self) -> str | bytes:
        nbytes = self.scalar("<Q")
        start = self.advance(nbytes)
        return _text(self.data[start : self.at])

    def name(self, what: str) -> str:
        nbytes = self.count("bytes in a name", smallest=1)
        start = self.advance(nbytes)
        text = _text(self.data[start : self.at])
        if not isinstance(text, str):
            raise self.fail(f"{what} is not UTF-8 text")
        return text

    def kind(self) -> GGUFValueType:
        number = self.scalar("<I")
        if number not in GGUFValueType._value2member_map_:
            raise self.fail(f"metadata of the unknown type {number}")
        return GGUFValueType(number)

    def count(self, what: str, smallest: int) -> int:
        """A stored count of things of at least `smallest` bytes each: it must fit into the file and the limit."""
        number = self.scalar("<Q")
        return self.bounded(number, what, smallest)

    def bounded(self, number: int, what: str, smallest: int) -> int:
        left = len(self.data) - self.at
        if number * smallest > left:
            raise self.fail(f"it claims {number} {what} and has {left} bytes left")
        if number > LIMITS[what]:
            raise self.fail(f"it claims {number} {what}, more than the limit of {LIMITS[what]}")
        return number


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _parse(path: Path) -> _Header:
    """The checked header of one file. Its tensors' data are known to lie inside the file, apart from each other."""
    _check_magic(path)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path, at=len(MAGIC))
        _check_version(cursor)
        tensor_count = cursor.count("tensors", smallest=24)  # lengths, dimensions, type and offset of an empty name
        key_count = cursor.count("metadata keys", smallest=13)
        metadata, kinds = _read_metadata(cursor, key_count)
        alignment = _alignment(cursor, metadata, kinds)
        infos = [_read_tensor(cursor) for _ in range(tensor_count)]
        tensors = _placed(cursor, infos, alignment)
        _check_extents(cursor, tensors)
        return _Header(metadata, kinds, tensors, alignment)


def _check_magic(path: Path) -> None:
    if not path.exists():
        raise QmicaError(f"{path} does not exist: check the path of the GGUF file")
    if not path.is_file():
        raise QmicaError(f"{path} is not a file: give the path of one GGUF file")
    if not is_gguf(path):
        raise QmicaError(f"{path} is not a GGUF file: it does not start with the bytes GGUF")


def _check_version(cursor: _Cursor) -> None:
    version = cursor.scalar("<I")
    if version & 0xFFFF == 0:  # gguf.cpp tells the byte order by the version's empty low half
        raise cursor.fail("it is big-endian, and only little-endian files are read")
    if version not in VERSIONS:
        raise cursor.fail(f"its version is {version}, and versions {VERSIONS[0]} and {VERSIONS[1]} are read")


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, Kind]]:
    metadata: dict[str, Any] = {}
    kinds: dict[str, Kind] = {}
    for _ in range(count):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} is there twice")
        kinds[key], metadata[key] = _read_value(cursor)
    return metadata, kinds


def _read_value(cursor: _Cursor) -> tuple[Kind, Any]:
    kind = cursor.kind()
    if kind == GGUFValueType.ARRAY:
        element = cursor.kind()
        return Kind(kind, element), _read_array(cursor, element)
    if kind == GGUFValueType.STRING:
        return Kind(kind), cursor.string()
    return Kind(kind), cursor.scalar(_SCALARS[kind])


def _read_array(cursor: _Cursor, element: GGUFValueType) -> list:
    if element == GGUFValueType.ARRAY:
        raise cursor.fail("it holds an array of arrays, which llama.cpp does not read either")
    size = 8 if element == GGUFValueType.STRING else struct.calcsize(_SCALARS[element])
    count = cursor.count("array elements", smallest=size)
    cursor.elements = cursor.bounded(cursor.elements + count, "array elements", smallest=0)
    if element == GGUFValueType.STRING:
        return _read_strings(cursor, count)
    start = cursor.advance(count * size)
    dtype = np.dtype(_SCALARS[element][1:]).newbyteorder("<")
    return np.frombuffer(cursor.data[start : cursor.at], dtype).tolist()


def _read_strings(cursor: _Cursor, count: int) -> list:
    """The hot loop (98,000 strings in SmolLM2): local names, and one place where running off the end is noticed."""
    data, at, end, length = cursor.data, cursor.at, len(cursor.data), _STRING_LENGTH.unpack_from
    strings: list[str | bytes] = []
    for _ in range(count):
        if at + 8 > end:
            break
        start = at + 8
        at = start + length(data, at)[0]
        if at > end:
            break
        strings.append(_text(data[start:at]))
    cursor.advance(at - cursor.at)  # the error for a length that points outside, or a header too large
    if len(strings) < count:
        raise cursor.fail(f"an array of {count} strings ends after {len(strings)}")
    return strings


def _alignment(cursor: _Cursor, metadata: dict[str, Any], kinds: dict[str, Kind]) -> int:
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    value, kind = metadata["general.alignment"], kinds["general.alignment"]
    if kind != Kind(GGUFValueType.UINT32) or value == 0 or value & (value - 1):
        raise cursor.fail(f"general.alignment is {value!r}, and must be a power of two")
    return value


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    """(name, shape, type, bytes, offset into the data section); sizes are Python's integers, so nothing overflows."""
    name = cursor.name("a tensor's name")
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= 4:
        raise cursor.fail(f"the tensor {name!r} has {dimensions} dimensions, and 1 to 4 are allowed")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
    if min(shape) == 0 or prod(shape) >= 1 << 63:
        raise cursor.fail(f"the tensor {name!r} has the impossible shape {shape}")
    number, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    if number not in GGMLQuantizationType._value2member_map_:
        raise cursor.fail(f"the tensor {name!r} has the unknown type {number}")
    type_ = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if shape[-1] % block:
        raise cursor.fail(
            f"the tensor {name!r} has rows of {shape[-1]}, no multiple of {type_.name}'s block of {block}"
        )
    return name, shape, type_, prod(shape) // block * block_bytes, offset


def _placed(cursor: _Cursor, infos: list[tuple], alignment: int) -> dict[str, GGUFTensor]:
    """The tensors by name, with offsets from the file's start: their data begin behind the header, aligned."""
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, type_, nbytes, offset in infos:
        if name in tensors:
            raise cursor.fail(f"the tensor {name!r} is there twice")
        if offset % alignment:
            raise cursor.fail(f"the tensor {name!r} starts at {offset}, no multiple of the alignment {alignment}")
        tensors[name] = GGUFTensor(name, shape, type_, nbytes, cursor.path, start + offset)
    return tensors


def _check_extents(cursor: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    """Every tensor's data inside the file, and none over another's (a small file could claim endless tensors)."""
    size, end = len(cursor.data), 0
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise cursor.fail(f"the tensor {tensor.name!r} overlaps another")
        end = tensor.offset + tensor.nbytes
    if end > size:
        raise QmicaError(
            f"{cursor.path} is truncated: {end - size} of its {end} bytes are missing; copy or download it again"
        )


# ---- the parts together, and what sort of file it is


def _joined(parts: tuple[Path, ...], headers: list[_Header]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        said = (header.integer("split.no", 0), header.integer("split.count", 1))
        if len(parts) > 1 and said != (number, len(parts)):
            raise QmicaError(
                f"{part} says it is part {said[0]} of {said[1]}, its name says {number} (from 0) of {len(parts)}"
            )
        both = tensors.keys() & header.tensors.keys()
        if both:
            raise QmicaError(f"{part} holds the tensor {min(both)!r} again: the parts are not of one split")
        tensors.update(header.tensors)
    expected = headers[0].integer("split.tensors.count", len(tensors))
    if len(parts) > 1 and expected != len(tensors):
        raise QmicaError(f"{parts[0]} and its parts hold {len(tensors)} tensors, and {expected} are expected")
    return tensors


def _check_tensors(opened: GGUFFile, adapter: bool) -> None:
    """What llama.cpp believes, and ends the process over (ran): integers for weights, an alpha that is no number."""
    wrong = next((name for name, tensor in opened.tensors.items() if tensor.type in _NO_WEIGHTS), None)
    if wrong is not None:
        kind = opened.tensors[wrong].type.name
        raise QmicaError(f"{opened.path}: {wrong} holds {kind}, which no weight is: it is broken; download it again")
    if not adapter:
        _check_vectors(opened)
        return
    alpha = opened.metadata.get("adapter.lora.alpha", 0.0)  # llama.cpp takes none for 0: the scale alone counts
    if not isinstance(alpha, float) or not isfinite(alpha):
        raise QmicaError(f"{opened.path} has adapter.lora.alpha = {alpha!r:.40}: it is broken; export it again")
    wrong = next((name for name, tensor in opened.tensors.items() if ".lora_" in name and len(tensor.shape) != 2), None)
    if wrong is not None:
        raise QmicaError(f"{opened.path}: {wrong} is no matrix: it is broken; export it again")


def _check_vectors(opened: GGUFFile) -> None:
    """llama.cpp adds and multiplies with norms and biases in F32 alone, as its converter writes them (ran: a norm or
    a bias in F16 ends the process)."""
    for name, tensor in opened.tensors.items():
        if len(tensor.shape) == 1 and tensor.type != GGMLQuantizationType.F32:
            raise QmicaError(
                f"{opened.path}: {name} is stored as {tensor.type.name}, which llama.cpp reads in F32 only: it was "
                "made by a broken converter; use another GGUF of this model"
            )


_NO_WEIGHTS = {kind for kind in GGMLQuantizationType if kind.name in ("I8", "I16", "I32", "I64", "F64")}


def _check_sort(opened: GGUFFile, adapter: bool) -> None:
    """That it is a model (or an adapter, if one was asked for), with an architecture."""
    architecture, sort = opened.metadata.get("general.architecture"), opened.metadata.get("general.type", "model")
    sort = "mmproj" if architecture == "clip" else str(sort)
    if adapter and sort != "adapter":
        raise QmicaError(
            f"{opened.path} is not an adapter GGUF (general.type is {sort[:40]!r}): give an exported adapter"
        )
    if not adapter and sort in _NOT_A_MODEL:
        raise QmicaError(f"{opened.path} {_NOT_A_MODEL[sort]}")
    if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
        raise QmicaError(f"{opened.path} names no architecture (general.architecture): it is no model that can be read")
