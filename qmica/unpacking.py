"""A GGUF's blocks as weights, for the moment in which they are used: what `--bits gguf` multiplies with.

How: a matrix stays the rows of bytes that the file has, mostly a view of its map; rows that llama.cpp permuted stay
where they are, and are picked when they are asked for, which costs a copy of their bytes (Q4_K: 1600 million weights a
second for 2000). On a CPU `ggml.unpacker` unpacks, large pieces on several threads. On a GPU it is torch code,
transformers' where that has it (transformers/integrations/gguf/dequant.py), in row chunks, as its temporaries are
several times what comes out.

What it gives up: types that one of the three cannot unpack (TQ, MXFP4, NVFP4).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from qmica import ggml
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
        _shared(ggml.unpacker(type), raw.contiguous(), out)
        return out.to(dtype)
    out = torch.empty(shape, dtype=dtype, device=raw.device)
    for place in ggml.chunks(len(raw), max(GPU_CHUNK // shape[1], 1)):
        out[place] = in_torch(raw[place], type)
    return out


# ---- a CPU


def _shared(fill: ggml.Fill, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Fill `out`, a part of the rows by each of torch's threads; the caller is one of them."""
    threads = min(torch.get_num_threads(), len(raw)) if out.numel() >= SHARED_FROM else 1
    own, *others = ggml.chunks(len(raw), -(-len(raw) // threads)) if len(raw) else [slice(0, 0)]
    packed, weights = raw.numpy(), out.numpy()
    waiting = [_pool(threads - 1).submit(fill, packed[place], weights[place]) for place in others]
    fill(packed[own], weights[own])
    for part in waiting:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="unpacking")


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
