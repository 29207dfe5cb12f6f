"""A model on disk as a `Weights`: a read-only mapping from Hugging Face tensor name to a lazy tensor.

How: shapes and dtypes come from the files' headers; data is read when asked for, in blocks of rows, out of a memory
map. A safetensors folder, a hub snapshot and a GGUF (dequantized, its rows in Hugging Face's order) are the same
thing here, and a merge is a `Weights` laid over another (`overlay`), so that no merged copy is ever needed on disk.

What it gives up: rows are always copied out of the map (at most one tensor, by default 256 MB at a time), so that a
caller may change what it gets in place; who only reads takes `frozen`, a view of the map. Weights quantized by
bitsandbytes stay packed: `Weights.packed` says which, and with which companions; unpacking them is `quant`'s.

The format of safetensors (github.com/huggingface/safetensors, README): 8 bytes of little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, the data.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import SafetensorError, safe_open

from qmica import architectures, ggml, store
from qmica.durable import replacing, require_space, write_json
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile, GGUFTensor
from qmica.mapping import Map
from qmica.source import INDEX, SINGLE, Headers, Source
from qmica.unpacking import PLAIN, Blocks, unpack

BLOCK_BYTES = 256_000_000  # of fp32 rows: what a walk holds of one tensor
SAMPLES, SAMPLE_BYTES = 3, 1024  # of each tensor, for the fingerprint: 70B has 723 tensors, so 2.2 MB are read

# safetensors' names of dtypes
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# what bitsandbytes stores beside a packed `weight`, names after the module's path
_NF4_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_NF4_STATE = "weight.quant_state.bitsandbytes__"
_INT8_PARTS = ("weight", "SCB")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what a weight is stored in that is not packed
# what bitsandbytes takes, in each of these: names of dtypes, weights a scale, tensors that carry the codes of 4 bits
_COMPUTE = ("float32", "float16", "bfloat16")
_BLOCKSIZES = tuple(1 << power for power in range(6, 13))
_CARRIERS = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
Layout = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # part: (shape, any of these dtypes)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose data is read when asked for.

    shape: the Hugging Face shape; dtype: of what `rows` returns. `read(start, stop)` gives rows start:stop of the first
    dimension (elements, of a 1-D tensor; the scalar, of a 0-D one), fresh memory each time. quantized: the tensor as
    a GGUF stores it (`.type`, `.raw(start, stop)` uint8 rows in the file's own order), None for other sources; order:
    where the file has each row, None where it has them in order. view: gives the whole tensor as a view of its file's
    map, or None where it cannot be one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]
    quantized: GGUFTensor | None = None
    view: Callable[[], torch.Tensor | None] = lambda: None
    order: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor in `dtype`."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored(self) -> tuple[str, int]:
        """The type and the bytes of the whole tensor in its file."""
        if self.quantized is not None:
            return self.quantized.type.name, self.quantized.nbytes
        return _DTYPE_NAMES[self.dtype], self.nbytes

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows start:stop, (stop - start, *shape[1:]) in `dtype`, the caller's own to change.

        A GGUF's quantized types come as the exact float32 dequantization, F32, F16 and BF16 as they are: casting is the
        caller's business.
        """
        if not self.shape:
            return self.read(0, 1)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        return self.read(start, max(start, stop))

    def load(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor; with `dtype` cast block by block, so that beside the result only one block exists."""
        if dtype in (None, self.dtype) or not self.shape:
            return self.rows().to(dtype or self.dtype)
        out = torch.empty(self.shape, dtype=dtype)
        for start, stop in self.blocks():
            out[start:stop] = self.rows(start, stop)
        return out

    def frozen(self) -> torch.Tensor:
        """The whole tensor for a reader who changes nothing: a view of the file's map, which takes no memory of its
        own, where the file has it in `dtype`; else a copy.
        """
        view = self.view()
        return self.load() if view is None else view

    def blocks(self, nbytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive row blocks, each at most `nbytes` in fp32 (one row, where that is larger)."""
        rows = self.shape[0] if self.shape else 1
        step = max(nbytes // max(4 * math.prod(self.shape[1:]), 1), 1)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def digest(self) -> str:
        """Hex SHA-256 of all that is stored of the tensor: of a GGUF's quantized blocks, and of the first rows that
        they stand for, which tell their type and order.
        """
        if self.quantized is not None:
            return store.digest([torch.from_numpy(np.array(self.quantized.raw())), self.rows(0, 256)])
        return store.digest(self.rows(start, stop) for start, stop in self.blocks())

    def held(self) -> "torch.Tensor | LazyTensor":
        """For several readings in a row: the data, or where it is above a block (256 MB of fp32) the tensor itself."""
        return self.load() if 4 * math.prod(self.shape) <= BLOCK_BYTES else self

    def sample(self) -> bytes:
        """A few KB of the stored bytes: of the first, the middle and the last rows."""
        stored = self.quantized
        rows = stored.rows if stored else (self.shape or (1,))[0]
        row_bytes = stored.row_bytes if stored else self.nbytes // max(rows, 1)
        if rows == 0 or row_bytes == 0:
            return b""
        many = min(-(-SAMPLE_BYTES // row_bytes), rows)
        starts = [at * (rows - many) // (SAMPLES - 1) for at in range(SAMPLES)]
        pieces = [stored.raw(at, at + many) if stored else _bytes(self.rows(at, at + many)) for at in starts]
        return b"".join(piece.reshape(-1)[:SAMPLE_BYTES].tobytes() for piece in pieces)


class Weights(Mapping[str, LazyTensor]):
    """Name -> LazyTensor, read-only.

    config: the content of config.json (a GGUF's is built from its metadata). gguf: the opened file of a GGUF source,
    else None. packed: for each weight quantized by bitsandbytes the names of its parts after the module's path:
    `weight`, the packed bytes, first, then `weight.absmax`, ... and `weight.quant_state.bitsandbytes__nf4`, or `SCB`;
    every part is in the mapping. maps: of the files that `frozen` gives views of.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        config: Mapping | None = None,
        packed: Mapping[str, tuple[str, ...]] | None = None,
        gguf: GGUFFile | None = None,
        maps: Sequence[Map] = (),
    ):
        self._tensors = dict(tensors)
        self.config = dict(config or {})
        self.packed = MappingProxyType(dict(packed or {}))
        self.gguf = gguf
        self.maps = tuple(maps)

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Weights({len(self)} tensors, {self.config.get('model_type', 'no config')})"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor as the model has it: of a packed one before packing, companions left out."""
        companions = _companions(self.packed)
        return {name: self._shape(name) for name in self if name not in companions}

    def _shape(self, name: str) -> tuple[int, ...]:
        stored, parts = self[name].shape, self.packed.get(name, _INT8_PARTS)
        if parts == _INT8_PARTS:
            return stored
        return tuple(_quant_state(self, name, parts)["shape"])


def _beside(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}"


def _companions(packed: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {one for name, parts in packed.items() for one in _together(name, parts) if one != name}


def _together(name: str, parts: tuple[str, ...]) -> list[str]:
    """The tensors that a weight is stored as: itself, if it is not packed; first, if it is."""
    extra = ("weight_format",) if parts == _INT8_PARTS else ()  # always row-major since bitsandbytes 0.44, never read
    return [_beside(name, part) for part in (*parts, *extra)] or [name]


def open_weights(source: Source) -> Weights:
    """The weights of a resolved source; only headers, and the descriptions of packed weights, are read. Raises
    QmicaError naming the file or the tensor that is broken.
    """
    return _open_gguf(source) if source.kind == "gguf" else _open_safetensors(source)


# ---- safetensors


def _open_safetensors(source: Source) -> Weights:
    tensors: dict[str, LazyTensor] = {}
    maps = []
    for file in source.files:
        found, mapped = _read_header(file)
        maps += [mapped] if mapped else []
        if both := tensors.keys() & found.keys():
            raise QmicaError(f"{file} holds {min(both)} again: its folder mixes two models; copy or download it again")
        tensors.update(found)
    packed = find_packed(tensors, source)
    _require_layouts(tensors, packed, source)
    _require_floats(tensors, packed, source)
    return Weights(tensors, source.config, packed, maps=maps)


def _read_header(file: Path) -> tuple[dict[str, LazyTensor], Map | None]:
    """Name -> lazy tensor of one file, and its map; the safetensors library checks the header, its size and the
    offsets.
    """
    try:
        handle = safe_open(file, framework="pt")
        offsets = _offsets(file)
        mapped = _map(file)
        names = {name: stored for stored in offsets if (name := architectures.text_name(stored))}
        return {name: _lazy(file, handle, one, mapped, offsets[one]) for name, one in names.items()}, mapped
    except (SafetensorError, OSError, ValueError) as error:
        said = f"{file} is not a sound safetensors file ({_one_line(error)}): copy or download it again"
        raise QmicaError(said) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _offsets(file: Path) -> dict[str, int]:
    """Where in a file, whose header is sound, the data of each tensor begins."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    return {name: 8 + length + said["data_offsets"][0] for name, said in header.items() if name != "__metadata__"}


def _map(file: Path) -> Map | None:
    """None where there is no address space for it (ulimit -v, strict overcommit): then tensors are copied."""
    try:
        return Map(file)
    except OSError:
        return None


def _lazy(file: Path, handle, name: str, mapped: Map | None, offset: int) -> LazyTensor:
    view = handle.get_slice(name)
    shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype())
    if dtype is None:
        raise QmicaError(f"{file}: {name} has dtype {view.get_dtype()}, readable are {', '.join(DTYPES)}")

    def read(start: int, stop: int) -> torch.Tensor:
        # a slice is a view of the map, and a scalar has none; clone() makes the memory the caller's own
        return (view[start:stop] if shape else handle.get_tensor(name)).clone()

    return LazyTensor(shape, dtype, read, view=lambda: mapped and mapped.tensor(dtype, shape, offset))


def headers(source: Source) -> Headers:
    """The names of the tensors on this disk, their types and their bytes as stored."""
    return headers_of(source, open_weights(source))


def headers_of(source: Source, weights: Weights) -> Headers:
    """The same of a source that is open."""
    return Headers(source, {name: tensor.stored for name, tensor in weights.items()})


def packed_bytes(headers: Headers) -> dict[str, int]:
    """The bytes, with all their parts, of the weights that bitsandbytes packed."""
    packed = find_packed(headers.tensors, headers.source)
    return {name: sum(headers.tensors[_beside(name, part)][1] for part in parts) for name, parts in packed.items()}


def find_packed(tensors: Collection[str], source: Source) -> dict[str, tuple[str, ...]]:
    """The parts of every weight that bitsandbytes packed; QmicaError for one that lacks some."""
    packed = {}
    for name in tensors:
        path, marked, kind = name.partition("." + _NF4_STATE)
        if marked:
            parts = [part for part in _NF4_PARTS if f"{path}.{part}" in tensors or part in _NF4_PARTS[:3]]
            packed[f"{path}.weight"] = (*parts, _NF4_STATE + kind)
        elif name.endswith(".SCB"):
            packed[name.removesuffix("SCB") + "weight"] = _INT8_PARTS
    missing = [_beside(name, part) for name, parts in packed.items() for part in parts]
    missing = [part for part in missing if part not in tensors]
    if missing:
        raise QmicaError(f"{source.folder} is incomplete: {missing[0]} is missing; copy or download it again")
    return packed


def _require_layouts(tensors: Mapping[str, LazyTensor], packed: Mapping[str, tuple[str, ...]], source: Source) -> None:
    """QmicaError for a part of a packed weight that is not what the weight needs. bitsandbytes' kernels take pointers:
    what is too short is not refused by them, they read whatever lies behind it.
    """
    for name, parts in packed.items():
        if name.endswith("embed_tokens.weight"):  # would be looked up as if its codes were numbers
            raise QmicaError(f"{source.folder}: {name} is packed, which linears alone can be: {_ANOTHER}")
        layout = _int8_layout(tensors[name]) if parts == _INT8_PARTS else _4bit_layout(tensors, name, parts)
        for part, (shape, dtypes) in layout.items():
            one = _beside(name, part)
            if one not in tensors:
                raise QmicaError(f"{source.folder} is incomplete: {one} is missing; copy or download it again")
            found = tensors[one]
            if found.shape != shape or found.dtype not in dtypes:
                seen, due = (
                    f"{_DTYPE_NAMES[kind]} {of}" for kind, of in ((found.dtype, found.shape), (dtypes[0], shape))
                )
                raise QmicaError(f"{source.folder}: {one} is {seen}, its weight needs {due}: copy or download it again")


_ANOTHER = "give its 16-bit original, a bitsandbytes checkpoint or a GGUF"


def _int8_layout(weight: LazyTensor) -> Layout:
    shape = weight.shape if len(weight.shape) == 2 else (1, 1)
    return {"weight": (shape, (torch.int8,)), "SCB": (shape[:1], FLOATS[1:])}


def _4bit_layout(tensors: Mapping[str, LazyTensor], name: str, parts: tuple[str, ...]) -> Layout:
    """As functional.py's quantize_4bit makes them, with any size of block; the codes may be carried by wider types."""
    state, weight = _quant_state(tensors, name, parts), tensors[name]
    count = math.prod(state["shape"])
    blocks = -(-count // state["blocksize"])
    carrier = weight.dtype if weight.dtype in _CARRIERS else torch.uint8
    layout: Layout = {
        "weight": ((-(-count // (2 * carrier.itemsize)), 1), (carrier,)),
        "weight.absmax": ((blocks,), (torch.float32,)),
        "weight.quant_map": ((16,), (torch.float32,)),
    }
    if "nested_blocksize" in state:
        layout["weight.absmax"] = ((blocks,), (torch.uint8,))
        layout["weight.nested_absmax"] = ((-(-blocks // state["nested_blocksize"]),), (torch.float32,))
        layout["weight.nested_quant_map"] = ((256,), (torch.float32,))
    return layout


def _quant_state(tensors: Mapping[str, LazyTensor], name: str, parts: tuple[str, ...]) -> dict:
    """bitsandbytes' description of one weight packed in 4 bits: JSON as uint8 (functional.py, QuantState.as_dict)."""
    state = tensors[_beside(name, parts[-1])]
    try:
        if state.dtype != torch.uint8 or len(state.shape) != 1:
            raise ValueError(f"it is {_DTYPE_NAMES[state.dtype]} {state.shape}, not a row of bytes")
        said = json.loads(bytes(state.load().tolist()))
        said = {**said, "shape": [int(side) for side in said["shape"]]}
        _require_state(said, parts)
        return said
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        said = f"the quantization state of {name} is damaged ({_one_line(error)}): copy or download it again"
        raise QmicaError(said) from error


def _require_state(said: Mapping, parts: tuple[str, ...]) -> None:
    """ValueError or KeyError for what bitsandbytes would pass on to its kernels, or look up in torch, unasked."""
    nested = "weight.nested_absmax" in parts or not _NESTED_KEYS.isdisjoint(said)
    allowed: dict[str, tuple] = {"quant_type": (parts[-1].removeprefix(_NF4_STATE),)}
    allowed |= {"blocksize": _BLOCKSIZES, "dtype": _COMPUTE}
    if nested:
        allowed |= {"nested_blocksize": _BLOCKSIZES, "nested_dtype": _COMPUTE}
        if not math.isfinite(float(said["nested_offset"])):
            raise ValueError(f"nested_offset is {said['nested_offset']}")
    for key, values in allowed.items():
        if said[key] not in values or isinstance(said[key], float):
            raise ValueError(f"{key} is {said[key]!r}, not {' or '.join(map(str, values))}")
    if said["quant_type"] not in ("nf4", "fp4"):
        raise ValueError(f"quant_type is {said['quant_type']!r}, not nf4 or fp4")
    if len(said["shape"]) != 2 or min(said["shape"]) < 1:
        raise ValueError(f"shape is {said['shape']}, not that of a matrix")
    if unknown := said.keys() - _STATE_KEYS - _NESTED_KEYS:  # bitsandbytes would take a tensor's name for the tensor
        raise ValueError(f"{min(unknown)} is unknown")


def _require_floats(tensors: Mapping[str, LazyTensor], packed: Mapping[str, tuple[str, ...]], source: Source) -> None:
    """QmicaError for a weight or bias of codes (int8, float8, ...) whose scales, wherever they are, nobody applies."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and name.endswith((".weight", ".bias")) and name not in packed:
            raise QmicaError(
                f"{source.folder}: {name} is {_DTYPE_NAMES[tensor.dtype]}, not numbers of 16 bits or more: {_ANOTHER}"
            )


# ---- GGUF


def _open_gguf(source: Source) -> Weights:
    file = GGUFFile.open(source.files[0])
    family = architectures.for_gguf(file.architecture)
    config = gguf_config(file)
    names = {hf: name for name in file.tensors if (hf := family.hf_name(name))}
    tensors = {
        hf: _dequantized(file.tensors[name], family.row_order(hf, config), family.offset(hf))
        for hf, name in names.items()
    }
    return Weights(tensors, config, gguf=file)


def gguf_config(file: GGUFFile) -> dict:
    """The content of config.json that a GGUF's own metadata and tensors imply. Raises QmicaError for an unsupported
    model.
    """
    family = architectures.for_gguf(file.architecture)
    stored = {name: file.tensors[name] for name in family.factor_tensors if name in file.tensors}
    factors = {name: ggml.dequantize(tensor.raw(), tensor.type)[0] for name, tensor in stored.items()}
    return family.hf_config(file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()}, factors)


def _dequantized(tensor: GGUFTensor, order: np.ndarray | None, offset: float) -> LazyTensor:
    """A GGUF tensor as Hugging Face has it: `order` is the one with gguf_rows = hf_rows[order], and offset what the
    GGUF's values are above.
    """
    back = None if order is None else np.argsort(order)
    dtype = PLAIN.get(tensor.type, torch.float32)

    def read_matrix(start: int, stop: int) -> torch.Tensor:
        # indexing the map copies only the packed rows asked for: a permuted head's lie apart
        raw = tensor.raw(start, stop) if back is None else tensor.raw()[back[start:stop]]
        return _unpacked(raw, tensor.type)

    def read_vector(start: int, stop: int) -> torch.Tensor:
        whole = _unpacked(tensor.raw(), tensor.type)[0]  # GGUF stores it as one row
        whole = whole - offset if offset else whole
        return whole[start:stop] if back is None else whole[torch.from_numpy(back[start:stop])]

    return LazyTensor(tensor.shape, dtype, read_matrix if len(tensor.shape) == 2 else read_vector, tensor, order=back)


def own_blocks(weights: Weights) -> tuple[dict[str, Blocks], tuple[Map, ...]]:
    """The matrices of a GGUF as it stores them, by Hugging Face name, and the maps of its files, whose views they are;
    copies where a file cannot be mapped.
    """
    maps = {part: _map(part) for part in weights.gguf.parts}
    matrices = {name: tensor for name, tensor in weights.items() if len(tensor.shape) == 2}
    blocks = {name: _blocks(tensor, maps[tensor.quantized.path]) for name, tensor in matrices.items()}
    return blocks, tuple(mapped for mapped in maps.values() if mapped)


def _blocks(tensor: LazyTensor, mapped: Map | None) -> Blocks:
    stored = tensor.quantized
    if mapped is None:
        raw = torch.from_numpy(np.array(stored.raw()))
    else:
        raw = mapped.tensor(torch.uint8, (stored.rows, stored.row_bytes), stored.offset)
    return Blocks(raw, stored.type, None if tensor.order is None else torch.from_numpy(tensor.order))


def _unpacked(raw: np.ndarray, type: GGMLQuantizationType) -> torch.Tensor:
    """uint8 rows -> values (n, columns), in memory of their own."""
    return unpack(torch.from_numpy(np.array(raw)), type, PLAIN.get(type, torch.float32))


# ---- laying over, writing


def overlay(base: Weights, changes: Mapping[str, LazyTensor]) -> Weights:
    """`base` with some tensors replaced; nothing is copied. A replaced packed weight loses its companions.

    ValueError for a name that `base` does not have, or another shape.
    """
    shapes = base.shapes
    wrong = [name for name, tensor in changes.items() if shapes.get(name) != tuple(tensor.shape)]
    if wrong:
        raise ValueError(f"{wrong[0]}: shape {tuple(changes[wrong[0]].shape)} over {shapes.get(wrong[0], 'no tensor')}")
    packed = {name: parts for name, parts in base.packed.items() if name not in changes}
    gone = _companions(base.packed) - _companions(packed)
    kept = {name: tensor for name, tensor in base.items() if name not in gone}
    return Weights({**kept, **changes}, base.config, packed, base.gguf, base.maps)


def write_sharded(
    weights: Weights, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5_000_000_000
) -> list[str]:
    """Stream the weights to safetensors in `folder`: model.safetensors, or shards of at most `max_shard_size` bytes
    and an index.

    Floating tensors are cast to `dtype` (None: as they are); parts of packed weights never are. They are read in the
    mapping's order, the parts of a packed weight one after another, and these lie in one file. Holds one row block at a
    time; each file appears whole or not at all, and existing ones of the same name are replaced. Returns the file
    names. Raises QmicaError if there is no space.
    """
    folder, layout = Path(folder), _targets(weights, dtype)
    sizes = {name: math.prod(weights[name].shape) * kind.itemsize for name, kind in layout.items()}
    require_space(folder, sum(sizes.values()), f"writing {len(sizes)} tensors")
    shards = _shards(_groups(weights), sizes, max_shard_size)
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] if count > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        write_file(folder / file, {name: weights[name] for name in shard}, layout)
    if count > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    return names


def _targets(weights: Weights, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype in which each tensor is written."""
    fixed = _companions(weights.packed) | weights.packed.keys()
    castable = {name for name in weights if weights[name].dtype.is_floating_point and name not in fixed}
    return {name: dtype if dtype and name in castable else weights[name].dtype for name in weights}


def _groups(weights: Weights) -> list[list[str]]:
    """Names that belong into one file: a packed weight with its companions, any other tensor alone."""
    companions = _companions(weights.packed)
    return [
        [one for one in _together(name, weights.packed.get(name, ())) if one in weights]
        for name in weights
        if name not in companions
    ]


def _shards(groups: Iterable[list[str]], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in order, cut wherever the next group would make a shard larger than `most`."""
    shards, held = [[]], 0
    for group in groups:
        nbytes = sum(sizes[name] for name in group)
        if shards[-1] and held + nbytes > most:
            shards.append([])
            held = 0
        shards[-1] += group
        held += nbytes
    return shards


def write_file(path: Path, tensors: Mapping[str, LazyTensor], layout: Mapping[str, torch.dtype] | None = None) -> None:
    """Write one safetensors file, the tensors in the order in which they are given, each to its place; cast as
    `layout` says (None: as they are).
    """
    layout = layout or {name: tensor.dtype for name, tensor in tensors.items()}
    header, places = _header(tensors, layout)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            file.seek(places[name])
            for start, stop in tensor.blocks():
                file.write(_bytes(tensor.rows(start, stop).to(layout[name])))


def _header(tensors: Mapping[str, LazyTensor], layout: Mapping[str, torch.dtype]) -> tuple[bytes, dict[str, int]]:
    """A file's header, and where the data of each tensor begins."""
    # widest dtype first, as safetensors' own writer, so that every tensor is aligned
    ordered = sorted(tensors, key=lambda name: (-layout[name].itemsize, name))
    said, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in ordered:
        shape, dtype = tensors[name].shape, layout[name]
        end = offset + math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: data + said[name]["data_offsets"][0] for name in ordered}


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory, uint8 (nbytes,)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


# ---- which model is this


def fingerprint(weights: Weights) -> str:
    """Hex SHA-256 over names, shapes, stored types and sampled bytes of the source: another quantization has another.

    A few KB of each tensor are read, so that 70B takes as long as 0.5B; a change of single rows that are not sampled
    is not seen. How tensors are spread over files does not count, nor do a tied head or buffers that a checkpoint
    stores besides.
    """
    digest = hashlib.sha256()
    for name in _model_names(weights):
        for one in [_beside(name, part) for part in weights.packed.get(name, ())] or [name]:
            tensor = weights[one]
            kind = tensor.quantized.type.name if tensor.quantized is not None else str(tensor.dtype)
            digest.update(f"{one} {tensor.shape} {kind}\n".encode() + tensor.sample())
    return digest.hexdigest()


def shapes_fingerprint(weights: Weights) -> str:
    """Hex SHA-256 over names and shapes alone: equal for a folder, its GGUF, its bitsandbytes checkpoint and siblings.

    The head is left out: a converter may write a tied one, and its shape is the embedding's.
    """
    shapes = weights.shapes
    text = "".join(f"{name} {shapes[name]}\n" for name in _model_names(weights) if name != "lm_head.weight")
    return hashlib.sha256(text.encode()).hexdigest()


def _model_names(weights: Weights) -> list[str]:
    """The tensors that the model is made of, sorted: of a known family those of its table, else all."""
    present = weights.shapes
    try:
        expected = set(architectures.for_config(weights.config).tensor_names(weights.config))
    except QmicaError:
        return sorted(present)
    return sorted(present.keys() & expected)
