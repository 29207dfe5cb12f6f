"""A GGUF's blocks as weights, for the moment in which they are used: what `--bits gguf` multiplies with.

How: a matrix stays the rows of bytes that the file has, mostly a view of its map; rows that llama.cpp permuted stay
where they are, and are picked when they are asked for. On a CPU ggml's own `dequantize_row_*` unpacks (through
llamacpp.library(), GIL released, large pieces on several threads), without that library gguf's numpy code, bit for bit
the same at a tenth of the speed. On a GPU it is torch code, transformers' where that has it
(transformers/integrations/gguf/dequant.py), in row chunks, as its temporaries are several times what comes out.

Measured on one busy 2.5 GHz core (AVX2), million weights a second, C and numpy: Q4_K 2200, 104; Q5_K 1400, 79; Q6_K
450, 114; Q8_0 2100, 310; Q4_1 950, 131; Q2_K 1000, 167; IQ4_XS 900, 45; IQ2_XXS 270, 33; bitsandbytes' NF4 900. Rows
that are picked cost a copy of their bytes: Q4_K 1600 for 2000.

What it gives up: types that one of the three cannot unpack (TQ, MXFP4, NVFP4).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from qmica import llamacpp
from qmica.errors import QmicaError

T = GGMLQuantizationType

PLAIN = {T.F32: torch.float32, T.F16: torch.float16, T.BF16: torch.bfloat16}
BLOCKS = (
    *(T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL, T.IQ4_XS),
    *(T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S),
)
READABLE = (*PLAIN, *BLOCKS)

SHARED_FROM = 1 << 18  # weights: what several threads are worth waking for
GPU_CHUNK = 1 << 24  # weights that a GPU unpacks at once: 64 MB in fp32, and up to four times that while it does


@dataclass(frozen=True)
class Blocks:
    """A matrix as a GGUF stores it. raw: uint8 (rows, bytes of a row); row i of the weight is `raw[order[i]]` (order:
    int64 (rows,), None: they stand as they are).
    """

    raw: torch.Tensor
    type: GGMLQuantizationType
    order: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight."""
        return len(self.raw), columns(self.raw.shape[1], self.type)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows start:stop of the weight, (stop - start, columns)."""
        if self.order is None:
            return unpack(self.raw[start:stop], self.type, dtype)
        return unpack(self.raw.index_select(0, self.order[start:stop]), self.type, dtype)

    def pick(self, places: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rows of the weight at `places` (...), (..., columns)."""
        flat = places.reshape(-1)
        found = unpack(self.raw.index_select(0, flat if self.order is None else self.order[flat]), self.type, dtype)
        return found.view(*places.shape, -1)


def columns(row_bytes: int, type: GGMLQuantizationType) -> int:
    """Weights in a row of so many bytes."""
    block, block_bytes = GGML_QUANT_SIZES[type]
    return row_bytes // block_bytes * block


def require_readable(types: Iterable[tuple[str, str]]) -> None:
    """QmicaError for the first (tensor, type's name) that cannot be unpacked here."""
    known = [type.name for type in READABLE]
    for name, type in types:
        if type not in known:
            raise QmicaError(
                f"--bits gguf: {name} is {type}, and blocks are unpacked of {', '.join(known)}: use --bits 4, 8 or 16, "
                "or a GGUF in another quantization"
            )


def random_blocks(type: str, rows: int, columns: int) -> Blocks:
    """Blocks of a type whose bytes are noise, to measure with: it may stand for NaN."""
    found = T[type]
    block, block_bytes = GGML_QUANT_SIZES[found]
    return Blocks(torch.randint(256, (rows, columns // block * block_bytes), dtype=torch.uint8), found)


def unpack(raw: torch.Tensor, type: GGMLQuantizationType, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (n, bytes of a row) -> (n, columns): in float32 what ggml computes, bit for bit, in another dtype that
    rounded. Of F32, F16 and BF16 it may be the same memory.
    """
    if type in PLAIN:
        aligned = raw if raw.data_ptr() % PLAIN[type].itemsize == 0 else raw.clone()
        return aligned.view(PLAIN[type]).to(dtype)
    shape = len(raw), columns(raw.shape[1], type)
    if raw.device.type == "cpu":
        out = torch.empty(shape)
        _shared(_by_ggml(type) or _by_numpy(type), raw.contiguous(), out)
        return out.to(dtype)
    out = torch.empty(shape, dtype=dtype, device=raw.device)
    for place in _chunks(len(raw), max(GPU_CHUNK // shape[1], 1)):
        out[place] = in_torch(raw[place], type)
    return out


def _chunks(rows: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


# ---- a CPU: ggml's C, or gguf's numpy code

Fill = Callable[[torch.Tensor, torch.Tensor], None]  # packed rows, and where their weights go (fp32)


def _shared(fill: Fill, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out`, a part of the rows by each of torch's threads; the caller is one of them."""
    threads = min(torch.get_num_threads(), len(raw)) if out.numel() >= SHARED_FROM else 1
    own, *others = _chunks(len(raw), -(-len(raw) // threads)) if len(raw) else [slice(0, 0)]
    waiting = [_pool(threads - 1).submit(fill, raw[place], out[place]) for place in others]
    fill(raw[own], out[own])
    for part in waiting:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unpacking")


@functools.cache
def _by_ggml(type: GGMLQuantizationType) -> Fill | None:
    """ggml's void dequantize_row_q4_K(blocks, weights, count) and its like (ggml/src/ggml-quants.h); None where there
    is no library, or one without it.
    """
    if not (llamacpp.available() or "QMICA_GGML" in os.environ):
        return None
    function = getattr(llamacpp.library(), f"dequantize_row_{type.name.lower().replace('_k', '_K')}", None)
    if function is None:
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return lambda raw, out: function(raw.data_ptr(), out.data_ptr(), out.numel())


def _by_numpy(type: GGMLQuantizationType) -> Fill:
    def fill(raw: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(quants.dequantize(raw.numpy(), type)))

    return fill


# ---- a GPU: torch


def in_torch(raw: torch.Tensor, type: GGMLQuantizationType) -> torch.Tensor:
    """uint8 (n, bytes of a row) -> float32 (n, columns), by torch's operations alone, on any device. QmicaError where
    transformers is too old to have them.
    """
    own = _OWN.get(type)
    if own is not None:
        return own(raw.reshape(-1, GGML_QUANT_SIZES[type][1])).view(len(raw), -1)
    try:
        from transformers.integrations.gguf.dequant import dequantize
    except ImportError as error:
        raise QmicaError(
            f"--bits gguf: this transformers has no code to unpack {type.name} on a GPU: pip install -U transformers, "
            "or use --bits 4"
        ) from error
    return dequantize(raw.reshape(-1), int(type)).view(len(raw), -1)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """(n, 22): a scale in fp16, 32 high bits, 32 low halves of a byte (ggml-common.h, block_q5_0)."""
    scale = blocks[:, :2].view(torch.float16).float()
    return (_five_bits(blocks[:, 2:6], blocks[:, 6:]).to(torch.int8) - 16) * scale


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """(n, 24): a scale and a least weight in fp16, then as in Q5_0 (ggml-common.h, block_q5_1)."""
    scale, least = blocks[:, :2].view(torch.float16).float(), blocks[:, 2:4].view(torch.float16).float()
    return _five_bits(blocks[:, 4:8], blocks[:, 8:]) * scale + least


def _five_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """high: (n, 4) bits in order; low: (n, 16) bytes, first all lower halves, then all upper ones. (n, 32) uint8."""
    bits = (high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=high.device)) & 1
    return torch.cat([low & 15, low >> 4], dim=1) | (bits.view(len(high), 32) << 4)


_OWN = {T.Q5_0: _q5_0, T.Q5_1: _q5_1}
