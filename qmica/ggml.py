"""GGUF block formats and type mixes: how one tensor is packed, and which type each tensor of a model gets.

Block formats: the simple ones are packed by gguf's numpy code; Q2_K to Q6_K, IQ4_NL and IQ4_XS by ggml's own C
(`ggml_quantize_chunk`, through llamacpp.library()), threads over row chunks; Q4_0 to Q5_1 too where an importance
matrix weighs the columns, which gguf's functions cannot. Unpacked is everything by ggml's C where there is the library
(`dequantize_row_*`), else by numpy, bit for bit the same: `unpacker`, which `unpacking` shares. Measured on one busy
2.5 GHz core, million weights a second, C and numpy: Q4_K 2200, 104; Q5_K 1400, 79; Q6_K 450, 114; Q8_0 2100, 310; Q4_1
950, 131; Q2_K 1000, 167; IQ4_XS 900, 45; IQ2_XXS 270, 33. ggml's C packs Q4_K at 7, Q6_K at 20, Q3_K at 50. Work goes
in chunks, so that nothing but the result is ever whole: gguf's functions alone hold it twice.

Type mixes: `mix` chooses as llama-quantize does (llama.cpp, src/llama-quant.cpp at 0c1e57098bba,
`llama_tensor_get_type_impl` and `tensor_type_fallback`), for dense models: what the source says of Falcon, experts and
convolutions is left out. tests/mix_types.json is llama-quantize's own answer, the oracle.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants

from qmica import llamacpp
from qmica.errors import QmicaError

T = GGMLQuantizationType

PACKED_BY_NUMPY = frozenset({T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1})
PACKED_BY_GGML = frozenset({T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS})
WEIGHABLE = PACKED_BY_GGML | {T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1}  # ggml's C makes something of an importance matrix

_CHUNK = 1 << 20  # weights a chunk: 4 MB in fp32, large enough that a chunk's overhead (20 µs) is nothing


# ---- block formats


def row_bytes(columns: int, type: GGMLQuantizationType) -> int:
    """Bytes of a row of `columns` weights. QmicaError if that is no whole number of the type's blocks."""
    block, block_bytes = GGML_QUANT_SIZES[type]
    if columns % block:
        raise QmicaError(f"a row of {columns} weights is no multiple of {type.name}'s block of {block}: use F16")
    return columns // block * block_bytes


def require_writable(types: Iterable[GGMLQuantizationType], weighted: bool = False) -> None:
    """QmicaError unless all these types can be packed here, with an importance matrix if `weighted`: ask before the
    work, not in the middle of it."""
    types = set(types)
    other = types - PACKED_BY_NUMPY - PACKED_BY_GGML
    if other:
        known = ", ".join(sorted(t.name for t in PACKED_BY_NUMPY | PACKED_BY_GGML))
        raise QmicaError(f"{min(other).name} cannot be written: choose one of {known}")
    if types & (WEIGHABLE if weighted else PACKED_BY_GGML):
        _quantize_chunk()


def quantize(
    rows: np.ndarray, type: GGMLQuantizationType, threads: int | None = None, importance: np.ndarray | None = None
) -> np.ndarray:
    """Packs float32 (n, columns) into uint8 (n, row_bytes(columns, type)), byte for byte as llama-quantize does.

    importance: float32 (columns,), what an error in each column counts; types that cannot weigh (F32, F16, BF16, Q8_0)
    take no notice, as in llama-quantize. QmicaError for a type that cannot be written, rows that are no whole number of
    blocks, and weights that are not finite or too large for it. ValueError for an importance of another length."""
    rows = np.ascontiguousarray(rows, np.float32)
    weighs = None if importance is None or type not in WEIGHABLE else np.ascontiguousarray(importance, np.float32)
    if weighs is not None and weighs.shape != rows.shape[1:]:  # ggml's C would read beyond it
        raise ValueError(f"an importance of {weighs.shape} for rows of {rows.shape[1]}")
    out = np.empty((rows.shape[0], row_bytes(rows.shape[1], type)), np.uint8)
    require_writable([type], weighs is not None)

    def pack(chunk: slice) -> None:
        _check_finite(rows[chunk], type)
        if type in PACKED_BY_GGML or weighs is not None:
            _pack_with_ggml(rows[chunk], type, out[chunk], weighs)
        else:
            _pack_with_numpy(rows[chunk], type, out[chunk])
        _check_packed(out[chunk], type)

    with ThreadPoolExecutor(threads or llamacpp.cpus()) as pool:
        list(pool.map(pack, chunks(len(rows), _rows_in_a_chunk(rows.shape[1]))))
    return out


def dequantize(raw: np.ndarray, type: GGMLQuantizationType) -> np.ndarray:
    """Unpacks uint8 (n, row_bytes) into float32 (n, columns). QmicaError for a type that gguf cannot dequantize."""
    block, block_bytes = GGML_QUANT_SIZES[type]
    raw = np.ascontiguousarray(raw)
    out = np.empty((raw.shape[0], raw.shape[1] // block_bytes * block), np.float32)
    fill = unpacker(type)
    for chunk in chunks(len(out), _rows_in_a_chunk(out.shape[1])):
        fill(raw[chunk], out[chunk])
    return out


Fill = Callable[[np.ndarray, np.ndarray], None]  # packed rows, and where their weights go (float32), both contiguous


def unpacker(type: GGMLQuantizationType) -> Fill:
    """What unpacks rows of this type here: ggml's C, or gguf's numpy code. QmicaError for a type that gguf cannot
    dequantize.
    """
    if type != T.F32 and type != T.F16 and type not in quants._type_traits:
        raise QmicaError(f"{type.name} weights cannot be read: gguf has no dequantization for them")
    return unpacked_by_ggml(type) or (lambda raw, out: np.copyto(out, quants.dequantize(raw, type)))


@functools.cache
def unpacked_by_ggml(type: GGMLQuantizationType) -> Fill | None:
    """ggml's void dequantize_row_q4_K(blocks, weights, count) and its like (ggml/src/ggml-quants.h); None where there
    is no library, or one without it. ctypes releases the GIL for the call.
    """
    if not llamacpp.has_library():
        return None
    function = getattr(llamacpp.library(), f"dequantize_row_{type.name.lower().replace('_k', '_K')}", None)
    if function is None:
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return lambda raw, out: function(raw.ctypes.data, out.ctypes.data, out.size)


def _rows_in_a_chunk(columns: int) -> int:
    return max(_CHUNK // max(columns, 1), 1)


def chunks(rows: int, step: int) -> list[slice]:
    """So many rows at a time, of all."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pack_with_numpy(rows: np.ndarray, type: GGMLQuantizationType, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        out[:] = quants.quantize(rows, type).view(np.uint8)


def _pack_with_ggml(
    rows: np.ndarray, type: GGMLQuantizationType, out: np.ndarray, importance: np.ndarray | None
) -> None:
    weights = None if importance is None else importance.ctypes.data
    written = _quantize_chunk()(type, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    if written != out.nbytes:
        raise RuntimeError(f"ggml packed {written} bytes of {type.name}, and {out.nbytes} were expected")


# Where in a block its F16 scales stand (ggml/src/ggml-common.h): a large weight, or importance, makes them infinite
_SCALES = {
    **dict.fromkeys((T.F16, T.Q8_0, T.Q4_0, T.Q5_0, T.IQ4_NL, T.IQ4_XS), slice(0, 2)),
    **dict.fromkeys((T.Q4_1, T.Q5_1, T.Q4_K, T.Q5_K), slice(0, 4)),
    **{T.Q2_K: slice(80, 84), T.Q3_K: slice(108, 110), T.Q6_K: slice(208, 210)},
}


def _check_finite(values: np.ndarray, type: GGMLQuantizationType) -> None:
    if not np.isfinite(values).all():
        raise QmicaError(f"a weight to be written as {type.name} is NaN or infinite: the model is damaged")


def _check_packed(packed: np.ndarray, type: GGMLQuantizationType) -> None:
    """What llama-quantize refuses to write too (ggml_validate_row_data)."""
    if type not in _SCALES:
        return
    scales = packed.reshape(-1, GGML_QUANT_SIZES[type][1])[:, _SCALES[type]]
    if not np.isfinite(np.ascontiguousarray(scales).view(np.float16)).all():
        what = "is above 65504, the largest F16 number" if type == T.F16 else "needs an F16 scale above 65504"
        raise QmicaError(f"a weight to be written as {type.name} {what}: use BF16")


def _quantize_chunk() -> Callable[..., int]:
    """ggml_quantize_chunk(type, source, target, first weight, rows, columns, importance) -> bytes: ggml/include/ggml.h.

    ctypes releases the GIL for the call."""
    function = llamacpp.library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function


# ---- type mixes


class Place(NamedTuple):
    """Where a tensor stands: its layer of `layers`, query heads per key-value head, and whether the model's columns
    are weighed by an importance matrix."""

    layer: int
    layers: int
    queries: int
    weighted: bool


Rule = tuple[Callable[[Place], bool], GGMLQuantizationType]


def _always(place: Place) -> bool:
    return True


def _first(count: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < count


def _first_part(divisor: int) -> Callable[[Place], bool]:
    return lambda place: place.layer < place.layers // divisor


def _more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between (llama.cpp's `use_more_bits`)."""
    layer, layers = place.layer, place.layers
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _few_keys(place: Place) -> bool:
    return place.queries >= 4


def _first_eighth(weighted: bool) -> Callable[[Place], bool]:
    return lambda place: place.weighted == weighted and place.layer < place.layers // 8


@dataclass(frozen=True)
class Quant:
    """One --quant: the type of most tensors, and the exceptions by role (the first rule that holds)."""

    type: GGMLQuantizationType
    file_type: LlamaFileType  # general.file_type
    rules: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


_MORE_Q6 = {"attn_v": ((_more_bits, T.Q6_K),), "ffn_down": ((_more_bits, T.Q6_K),)}
_IQ4 = {"attn_v": ((_few_keys, T.Q5_K),), "ffn_down": ((_first_eighth(weighted=False), T.Q5_K),)}

QUANTS: dict[str, Quant] = {
    "Q2_K": Quant(
        T.Q2_K,
        LlamaFileType.MOSTLY_Q2_K,
        {
            "attn_v": ((_few_keys, T.Q4_K), (_always, T.Q3_K)),
            "ffn_down": ((_always, T.Q3_K),),
            "attn_output": ((_always, T.Q3_K),),
        },
    ),
    "Q3_K_S": Quant(T.Q3_K, LlamaFileType.MOSTLY_Q3_K_S),
    "Q3_K_M": Quant(
        T.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_M,
        {
            "attn_v": ((_first(2), T.Q5_K), (_always, T.Q4_K)),
            "ffn_down": ((_first_part(16), T.Q5_K), (_always, T.Q4_K)),
            "attn_output": ((_always, T.Q4_K),),
        },
    ),
    "Q3_K_L": Quant(
        T.Q3_K,
        LlamaFileType.MOSTLY_Q3_K_L,
        dict.fromkeys(("attn_v", "ffn_down", "attn_output"), ((_always, T.Q5_K),)),
    ),
    "Q4_K_S": Quant(
        T.Q4_K,
        LlamaFileType.MOSTLY_Q4_K_S,
        {"attn_v": ((_first(4), T.Q5_K),), "ffn_down": ((_first_part(8), T.Q5_K),)},
    ),
    "Q4_K_M": Quant(T.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, _MORE_Q6),
    "Q5_K_S": Quant(T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "Q5_K_M": Quant(T.Q5_K, LlamaFileType.MOSTLY_Q5_K_M, _MORE_Q6),
    "Q6_K": Quant(T.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "IQ4_NL": Quant(T.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, _IQ4),
    "IQ4_XS": Quant(T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, _IQ4),
    "Q8_0": Quant(T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q4_0": Quant(T.Q4_0, LlamaFileType.MOSTLY_Q4_0, {"ffn_down": ((_first_eighth(weighted=True), T.Q4_1),)}),
    "Q4_1": Quant(T.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "Q5_0": Quant(T.Q5_0, LlamaFileType.MOSTLY_Q5_0, {"ffn_down": ((_first_eighth(weighted=True), T.Q5_1),)}),
    "Q5_1": Quant(T.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "F16": Quant(T.F16, LlamaFileType.MOSTLY_F16),
    "BF16": Quant(T.BF16, LlamaFileType.MOSTLY_BF16),
    "F32": Quant(T.F32, LlamaFileType.ALL_F32),
}

# What a type with blocks of 256 becomes where rows are no multiple. (Until early 2026 Q2_K and Q3_K became IQ4_NL.)
_FALLBACK = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0, T.Q4_K: T.Q5_0, T.Q5_K: T.Q5_1, T.Q6_K: T.Q8_0, T.IQ4_XS: T.IQ4_NL}
# LLM_TYPE_70B in llama.cpp's load_hparams: architectures whose 80 layers are taken for it, whatever their heads
_LARGE_AT_80_LAYERS = frozenset({"qwen2"})
_UNQUANTIZED = frozenset({T.F32, T.F16, T.BF16})
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def named(quant: str) -> Quant:
    """The row of QUANTS, upper or lower case. QmicaError with the list for any other name."""
    if quant.upper() not in QUANTS:
        raise QmicaError(f"--quant {quant} is not known: choose one of {', '.join(QUANTS)}")
    return QUANTS[quant.upper()]


def mix(
    quant: str, shapes: Mapping[str, tuple[int, ...]], architecture: str = "llama", weighted: bool = False
) -> dict[str, GGMLQuantizationType]:
    """The type of every tensor of a model in this quant, in the order of `shapes`.

    shapes: GGUF tensor name -> shape in torch's order, all tensors of the model (a model without output.weight is one
    with tied embeddings). Layers and heads are counted from them; `architecture` decides what counts as a 70B model.
    weighted: whether an importance matrix is used, which changes some mixes."""
    chosen = named(quant)
    layers = 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, shapes) if m), default=-1)
    queries = _queries_per_key(shapes)
    large = layers == 80 and (architecture in _LARGE_AT_80_LAYERS or (architecture == "llama" and queries > 1))
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"

    def type_of(name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        if not _is_quantized(name, shape):
            return T.F32
        if chosen.type in _UNQUANTIZED:
            return chosen.type
        if name == head:
            return _fitting(_head_type(chosen.type, shape[-1]), shape[-1])
        match = _LAYER.fullmatch(name)
        place = Place(int(match[1]) if match else 0, layers, queries, weighted)
        role = match[2] if match else name
        return _fitting(_layer_type(chosen, role, place, large), shape[-1])

    return {name: type_of(name, tuple(shape)) for name, shape in shapes.items()}


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices called weight; vectors (ggml drops dimensions of 1), norms and biases stay F32."""
    return name.endswith("weight") and not name.endswith("_norm.weight") and prod(shape[:-1]) > 1


def _queries_per_key(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Query heads per key-value head, from the rows of q and k, or of the fused q, k and v (phi3)."""
    rows = {
        role: shapes.get(f"blk.0.{role}.weight", (0, 0)) for role in ("attn_q", "attn_k", "attn_qkv", "attn_output")
    }
    queries, keys = rows["attn_q"][0], rows["attn_k"][0]
    if fused := rows["attn_qkv"][0]:
        queries = rows["attn_output"][1]  # what attention gives to the output projection is as wide as the queries
        keys = (fused - queries) // 2
    return queries // keys if keys else 1


def _head_type(type: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The output projection (or the tied embedding) is kept finer: it decides every token."""
    if columns % GGML_QUANT_SIZES[type][0]:
        return T.Q8_0
    return type if type == T.Q8_0 else T.Q6_K


def _layer_type(chosen: Quant, role: str, place: Place, large: bool) -> GGMLQuantizationType:
    role = "attn_v" if role == "attn_qkv" else role  # as in llama-quantize, which knows v by its part of the name
    found = next((type for holds, type in chosen.rules.get(role, ()) if holds(place)), chosen.type)
    if role == "attn_v" and large and found in (T.Q3_K, T.Q4_K):
        return T.Q5_K  # eight heads share these weights there: finer at next to no cost
    return found


def _fitting(type: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The type itself, else its fallback with blocks of 32, else F16, whichever first divides the row."""
    for candidate in (type, _FALLBACK.get(type, type)):
        if columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return T.F16
