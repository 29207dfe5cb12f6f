"""Frozen linears in 4, 8 and 16 bits or as a GGUF has them, and the optimizers of bitsandbytes. The only importer of
bitsandbytes.

How: a frozen linear is a bitsandbytes (or torch) module whose class is replaced by one of ours. The storage and its
class stay what PEFT and transformers know; the forward and the backward become one thin autograd function,
`FrozenMatmul`, which keeps nothing of the forward but the layer itself. Four defects go with it:

- bitsandbytes' int8 linear keeps its input on `ctx`, outside saved tensors, so that activation checkpointing frees
  nothing (462 MB held at 1 x 1024 tokens where NF4 held none);
- `Linear4bit.forward` in eval mode on an AVX512-BF16 CPU repacks the weight in place, after which gradients are wrong;
- on a CPU with AVX512, NF4 weights whose columns are a multiple of 16 and not of 64 are dequantized with the scales of
  other blocks (0.50.2, csrc/cpu_ops.cpp: the ARM kernel has the guard that is missing there);
- 16-bit weights under fp32 compute would keep an fp32 copy of every weight in the graph.

What it gives up: int8 is weight-only here (dequantize, then multiply), as bitsandbytes itself trains on CPUs: the
activations are not rounded to int8 (LLM.int8()), which is slower on some GPUs and more exact everywhere.

Formats: NF4 is blocks of 64 weights with double-quantized scales (QLoRA, arXiv 2305.14314); int8 is one scale a row
(LLM.int8(), arXiv 2208.07339). A GGUF's own blocks (`--bits gguf`) are `unpacking`'s: nothing is quantized here.
"""

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns about a download that nobody asked for


@contextmanager
def _alone() -> Iterator[None]:
    """Keep two things from bitsandbytes while it is imported. `torch.compile`, which it calls on four functions that
    are for devices without kernels of its own: it imports torch's compiler, 3.7 s and 110 MB for nothing. And the
    package `kernels`, with which, on a CPU with AVX512-BF16, it loads code from the hub (backends/cpu/ops.py).
    """
    compiler, torch.compile = torch.compile, lambda function=None, **_: function or (lambda given: given)
    modules = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "kernels"}
    sys.modules["kernels"] = None  # an import of it fails
    try:
        yield
    finally:
        torch.compile = compiler
        del sys.modules["kernels"]
        sys.modules.update(modules)


with _alone():
    import bitsandbytes as bnb

from qmica import checkpointing, store  # noqa: E402
from qmica.errors import QmicaError  # noqa: E402
from qmica.unpacking import Blocks  # noqa: E402


class FrozenMatmul(torch.autograd.Function):
    """y = W x + b for a frozen W. The backward needs W alone: dx = dy W, with W dequantized for that moment."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer  # the layer outlives the graph: no tensor is saved
        return checkpointing.product(lambda: layer.matmul(x))

    @staticmethod
    def backward(ctx, dy):
        return ctx.layer.back(dy), None


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that torch.autocast asks for, where it is on: products that write into a given tensor are not cast
    by it.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FrozenLinear:
    """What a frozen linear adds to its storage class. x: (..., in) -> (..., out); x's dtype is the compute dtype.

    A format defines `rows(start, stop, dtype) -> (stop - start, in)`, the weight as it computes, `dequantize(dtype)` of
    all rows, `stored()`, the tensors that hold it, and its inverse `point(tensors)`.
    """

    computes_on: torch.device | None = None  # where its tensors are brought for each use, if they live elsewhere

    @property
    def device(self) -> torch.device:
        """Where it computes, and what belongs to it (bias, adapter) is; between uses its weight may be elsewhere."""
        return self.computes_on or self.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return FrozenMatmul.apply(in_autocast(x), self)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b, (..., out), in memory of its own and without a graph."""
        rows = x.reshape(-1, self.in_features)
        y = rows.new_empty(len(rows), self.out_features)
        for place, weight in self.pieces(x.dtype):
            if self.bias is None:
                torch.mm(rows, weight.T, out=y[:, place])
            else:
                torch.addmm(self.bias[place].to(x.dtype), rows, weight.T, out=y[:, place])
        return y.view(*x.shape[:-1], self.out_features)

    def back(self, dy: torch.Tensor) -> torch.Tensor:
        """dy W, (..., in): what `matmul` gives back to x."""
        rows = dy.reshape(-1, self.out_features)
        dx = rows.new_empty(len(rows), self.in_features)
        for place, weight in self.pieces(dy.dtype):
            torch.addmm(dx, rows[:, place], weight, beta=0 if place.start == 0 else 1, out=dx)
        return dx.view(*dy.shape[:-1], self.in_features)

    def digest(self) -> str:
        """Hex, equal for equal weights in the same format."""
        return store.digest(self.stored())

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Places in the rows of the weight, and the rows there in `dtype`.

        On a CPU at most PIECE weights exist dequantized, in memory that malloc hands out again and again: 17 MB for the
        180 MB of a weight of 11008 x 4096. CUDA's allocator keeps what is freed.
        """
        step = self.out_features
        if self.weight.device.type == "cpu":
            step = piece_rows(self.out_features, self.in_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            yield (
                slice(start, stop),
                self.rows(start, stop, dtype) if step < self.out_features else self.dequantize(dtype),
            )


PIECE = 1 << 22  # weights: 17 MB in fp32, below the 32 MB from which on glibc maps every allocation anew
# rows: a product into more columns than this is slow in MKL. SmolLM2's head, 341 x 576 by 576 x 7281: 69 GFLOP/s, in
# panels of 512 or 768 columns 96 to 102; Qwen2.5-7B's gate, 256 x 3584 by 3584 x 18944: 87 for 127 (2 cores)
PANEL = 768


def piece_rows(out_features: int, in_features: int) -> int:
    """How many rows of a weight a CPU multiplies with at once: all of one that has no more than PIECE weights."""
    if out_features * in_features <= PIECE:
        return out_features
    return max(1, min(PANEL, PIECE // in_features))


class NF4Linear(FrozenLinear, bnb.nn.Linear4bit):
    """A `Linear4bit`: two weights a byte beside double-quantized block scales."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        state = copy.copy(self.weight.quant_state)
        if self.in_features % state.blocksize:  # bitsandbytes' AVX512 kernel would begin a block with each row
            return self.rows(0, self.out_features, dtype)
        state.dtype = dtype  # the kernel writes this dtype; a cast afterwards would round twice
        return bnb.functional.dequantize_4bit(self.weight.data, state)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Whole blocks of scales around the rows are read, as rows need not begin where a block does."""
        state, columns, count = self.weight.quant_state, self.in_features, self.in_features * self.out_features
        unit = state.blocksize * (state.state2.blocksize if state.nested else 1)
        begin, end = start * columns // unit * unit, min(-(-stop * columns // unit) * unit, count)
        blocks, rest = divmod(end - begin, state.blocksize)
        part = bnb.functional.QuantState(
            absmax=_scales(state, begin // state.blocksize, -(-end // state.blocksize)),
            # a row a block: rows are what the kernel's threads share
            shape=torch.Size((end - begin,) if rest else (blocks, state.blocksize)),
            dtype=dtype,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            code=state.code,
        )
        codes = self.weight.data.reshape(-1).view(torch.uint8)[begin // 2 : -(-end // 2)].unsqueeze(1)
        flat = bnb.functional.dequantize_4bit(codes, part).reshape(-1)
        return flat[start * columns - begin : stop * columns - begin].view(stop - start, columns)

    def stored(self) -> list[torch.Tensor]:
        state = self.weight.quant_state
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return [self.weight.data, state.absmax, state.code, *nested]

    def point(self, tensors: Sequence[torch.Tensor]) -> None:
        state = self.weight.quant_state  # the same object as self.quant_state
        self.weight.data, state.absmax, state.code = tensors[:3]
        if state.nested:
            state.state2.absmax, state.state2.code, state.offset = tensors[3:]


def _scales(state, first: int, last: int) -> torch.Tensor:
    """The fp32 scales of blocks first to last; of nested ones, first is where a block of scales begins."""
    if not state.nested:
        return state.absmax[first:last]
    nested = state.state2
    absmax = nested.absmax[first // nested.blocksize : -(-last // nested.blocksize)]
    inner = bnb.functional.QuantState(absmax=absmax, code=nested.code, blocksize=nested.blocksize, dtype=torch.float32)
    return bnb.functional.dequantize_blockwise(state.absmax[first:last], inner) + state.offset


class Int8Linear(FrozenLinear, bnb.nn.Linear8bitLt):
    """A `Linear8bitLt`: int8 rows beside one fp32 absolute maximum a row."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.rows(0, self.out_features, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        place = slice(start, stop)
        scales = (self.weight.SCB[place] * (1.0 / 127.0)).to(dtype)
        return self.weight.data[place].to(dtype).mul_(scales.unsqueeze(1))

    def stored(self) -> list[torch.Tensor]:
        return [self.weight.data, self.weight.SCB]

    def point(self, tensors: Sequence[torch.Tensor]) -> None:
        self.weight.data, self.weight.SCB = tensors
        self.weight.CB = self.weight.data  # a second name of it, which would keep what it pointed at before


class HalfLinear(FrozenLinear, nn.Linear):
    """An `nn.Linear` in 16 bits (or fp32, where a caller brings such a model), cast to the compute dtype for each
    use.
    """

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.weight.data.to(dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.weight.data[start:stop].to(dtype)

    def stored(self) -> list[torch.Tensor]:
        return [self.weight.data]

    def point(self, tensors: Sequence[torch.Tensor]) -> None:
        (self.weight.data,) = tensors


class GGUFLinear(FrozenLinear, nn.Linear):
    """A linear as a GGUF has it: `weight` is the packed rows, uint8 (out, bytes of a row), mostly a view of the file.
    type: of its blocks; order: where the file has each row, None where it has them in order.
    """

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.weight.data, self.type, self.order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.rows(0, self.out_features, dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.blocks.rows(start, stop, dtype)

    def stored(self) -> list[torch.Tensor]:
        return [self.weight.data] if self.order is None else [self.weight.data, self.order]

    def point(self, tensors: Sequence[torch.Tensor]) -> None:
        self.weight.data, *order = tensors
        self.order = order[0] if order else None

    def digest(self) -> str:
        """As `weights.LazyTensor.digest` has it: the first rows tell type and order."""
        return store.digest([self.weight.data, self.rows(0, min(256, self.out_features))])


class HalfEmbedding(nn.Embedding):
    """An embedding stored in 16 bits whose rows come out in the compute dtype."""

    compute_dtype = torch.float32

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids).to(self.compute_dtype)


class HalfScaledEmbedding(HalfEmbedding):
    """Gemma's, which multiplies the rows: in the compute dtype, as a model held in that dtype would."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale.to(self.compute_dtype)


class GGUFEmbedding(nn.Embedding):
    """An embedding as a GGUF has it, its rows unpacked when a token asks for them. embed_scale: Gemma's factor, which
    its own class multiplies with in the weight's dtype.
    """

    compute_dtype = torch.float32

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = Blocks(self.weight.data, self.type, self.order).pick(ids, self.compute_dtype)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(self.compute_dtype)


FROZEN = {bnb.nn.Linear4bit: NF4Linear, bnb.nn.Linear8bitLt: Int8Linear, nn.Linear: HalfLinear}
_LINEARS = tuple(FROZEN)
_FORWARDS = {kind.forward for kind in (*FROZEN, FrozenLinear)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be frozen and adapted; one with a forward of its own, which it would lose,
    is not."""
    return isinstance(module, _LINEARS) and type(module).forward in _FORWARDS


def freeze(module: nn.Module) -> nn.Module:
    """The same module, its weights frozen, computing through `FrozenMatmul`. Raises QmicaError for an unquantized bnb
    module."""
    if not isinstance(module, FrozenLinear):
        storage = next(kind for kind in FROZEN if isinstance(module, kind))
        _READY.get(storage, lambda module: None)(module)
        module.__class__ = FROZEN[storage]
    module.requires_grad_(False)
    return module


def _ready_4bit(module: nn.Module) -> None:
    if getattr(module.weight, "quant_state", None) is None:
        raise QmicaError("a 4-bit linear has no quantized weight yet: move the model to its device first")


def _ready_8bit(module: nn.Module) -> None:
    """Have the scales beside the weight, from where bitsandbytes' first forward moves them."""
    weight, state = module.weight, module.state
    if weight.data.dtype != torch.int8:
        raise QmicaError("an 8-bit linear has no quantized weight yet: move the model to its device first")
    if weight.SCB is None:
        weight.CB, weight.SCB = weight.data, state.SCB
        state.CB = state.SCB = None


_READY = {bnb.nn.Linear4bit: _ready_4bit, bnb.nn.Linear8bitLt: _ready_8bit}


def compute_on(linear: FrozenLinear, device: torch.device) -> None:
    """A linear on the host computes on a device: its bias goes there, its weight is brought there for each use."""
    linear.computes_on = device
    _with_bias(linear, linear.bias, device)


def dequantize(module: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight of a linear as it computes, (out, in)."""
    return freeze(module).dequantize(dtype)


@dataclass(frozen=True)
class Stored:
    """The weight of a frozen linear as it computes, read by rows in fp32, and told from others by its bytes."""

    linear: FrozenLinear

    @classmethod
    def of(cls, module: nn.Module) -> "Stored":
        """Of any linear, which is frozen by that."""
        return cls(freeze(module))

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.linear.rows(start, stop)

    def digest(self) -> str:
        """Where the loader knows it from the cache, nothing is read: of 7B that is 4 GB."""
        return getattr(self.linear, "known_digest", None) or self.linear.digest()

    def held(self) -> "Stored":
        """Itself: dequantizing rows is a tenth of what is done with them. Of a weight that lives on the host, a copy on
        its device, where it is dequantized by the same kernels as a weight that stays there: to the same bits.
        """
        return self if self.linear.weight.device == self.linear.device else self.copied(self.linear.device)

    def copied(self, device: torch.device) -> "Stored":
        twin = copy.deepcopy(self.linear)
        twin.point([part.to(device) for part in self.linear.stored()])
        return Stored(twin)


def _empty(kind: type, weight: torch.Tensor, **options) -> nn.Module:
    """A linear of this kind with the weight's shape and no storage of its own."""
    return kind(weight.shape[1], weight.shape[0], bias=False, device="meta", **options)


def _pieces(weight: torch.Tensor, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
    """Places in the first dimension of a tensor, and what stands there, on the device.

    bitsandbytes quantizes with some five fp32 copies of what it is given: whole, that would be ten times a 16-bit
    tensor. In pieces that fit the cache it is also faster on a CPU (NF4: 25 million weights a second and core for 19).
    """
    step = max(_PIECES.get(device.type, 1 << 24) // weight[0].numel(), 1)
    for start in range(0, len(weight), step):
        place = slice(start, min(start + step, len(weight)))
        yield place, weight[place].to(device)


_PIECES = {"cpu": 1 << 20}  # weights a piece: a number of whole NF4 blocks


def _make_nf4(weight: torch.Tensor, device: torch.device) -> nn.Module:
    """Bit for bit `bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")`."""
    count = weight.numel()
    codes = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-count // 64), dtype=torch.float32, device=device)
    for place, part in _pieces(weight.reshape(-1), device):
        packed, state = bnb.functional.quantize_4bit(part, blocksize=64, quant_type="nf4")
        codes[place.start // 2 : place.start // 2 + len(packed)] = packed
        scales[place.start // 64 : place.start // 64 + len(state.absmax)] = state.absmax
    state.offset = scales.mean()
    state.absmax, state.state2 = bnb.functional.quantize_blockwise(scales - state.offset, blocksize=256)
    state.nested, state.shape = True, weight.shape
    linear = _empty(NF4Linear, weight, compress_statistics=True, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        codes, False, state, 64, compress_statistics=True, quant_type="nf4", module=linear, bnb_quantized=True
    )
    linear.quant_state = state
    return linear


def _make_int8(weight: torch.Tensor, device: torch.device) -> nn.Module:
    """Bit for bit `bnb.nn.Int8Params(weight).to(device)`."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=device)
    for place, part in _pieces(weight, device):
        codes[place], scales[place], _ = bnb.functional.int8_vectorwise_quant(part.to(torch.float16))
    linear = _empty(Int8Linear, weight, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)
    return linear


def _make_half(weight: torch.Tensor, device: torch.device) -> nn.Module:
    linear = _empty(HalfLinear, weight)
    linear.weight = nn.Parameter(weight.to(device=device, dtype=torch.bfloat16), requires_grad=False)
    return linear


def _nf4_parts(linear: nn.Module) -> dict[str, torch.Tensor]:
    stats = linear.weight.quant_state.as_dict(packed=True)
    state = stats[_NF4_STATE]
    # what JSON does not mind: the scales' mean, whose digits differ, would make the length another for each weight
    stats[_NF4_STATE] = functional.pad(state, (0, _STATE_BYTES - len(state)), value=ord(" "))
    return {"weight": linear.weight.data, **{f"weight.{name}": part for name, part in stats.items()}}


def _nf4_layout(out: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    blocks = -(-out * columns // 64)
    return {
        "weight": ((-(-out * columns // 2), 1), torch.uint8),
        "weight.absmax": ((blocks,), torch.uint8),
        "weight.quant_map": ((16,), torch.float32),
        "weight.nested_absmax": ((-(-blocks // 256),), torch.float32),
        "weight.nested_quant_map": ((256,), torch.float32),
        f"weight.{_NF4_STATE}": ((_STATE_BYTES,), torch.uint8),
    }


_NF4_STATE, _STATE_BYTES = "quant_state.bitsandbytes__nf4", 256  # JSON of 170 bytes and the digits of the shape


def _int8_parts(linear: nn.Module) -> dict[str, torch.Tensor]:
    return {"weight": linear.weight.data, "SCB": linear.weight.SCB}


def _int8_layout(out: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"weight": ((out, columns), torch.int8), "SCB": ((out,), torch.float32)}


def _half_parts(linear: nn.Module) -> dict[str, torch.Tensor]:
    return {"weight": linear.weight.data}


def _half_layout(out: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {"weight": ((out, columns), torch.bfloat16)}


def _nf4_bytes(count: int) -> int:
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256)  # codes, 8-bit scales, and their fp32 scales


@dataclass(frozen=True)
class Format:
    """A way to store a frozen linear. held: how a model is held in it, in words; quantizes: whether what it holds is
    no longer what the source has. What is made here of a weight (of the GGUF's own blocks nothing is): parts: the
    tensors of a linear as bitsandbytes saves it, by their names after the module's path, `weight` first; layout: their
    shapes and dtypes, known before anything is quantized.
    """

    name: str
    held: str
    quantizes: bool
    make: Callable[[torch.Tensor, torch.device], nn.Module] | None = None
    count_bytes: Callable[[int, int], int] | None = None  # (out, in) -> bytes
    parts: Callable[[nn.Module], dict[str, torch.Tensor]] | None = None
    # (out, in) -> name: (shape, dtype)
    layout: Callable[[int, int], dict[str, tuple[tuple[int, ...], torch.dtype]]] | None = None


Bits = int | str
GGUF = "gguf"
FORMATS: Mapping[Bits, Format] = {
    4: Format(
        "NF4", "in 4 bits", True, _make_nf4, lambda out, columns: _nf4_bytes(out * columns), _nf4_parts, _nf4_layout
    ),
    8: Format(
        "int8", "in 8 bits", True, _make_int8, lambda out, columns: out * columns + 4 * out, _int8_parts, _int8_layout
    ),
    16: Format(
        "bf16", "in 16 bits", False, _make_half, lambda out, columns: 2 * out * columns, _half_parts, _half_layout
    ),
    GGUF: Format("GGUF", "as the GGUF has it", False),
}


def quantize(weight: torch.Tensor, bias: torch.Tensor | None, bits: Bits, device: torch.device) -> nn.Module:
    """A frozen linear of `bits` (4, 8 or 16) holding weight (out, in), and bias (out,) as it is. The weight's own
    storage is not kept.
    """
    linear = FORMATS[bits].make(weight, device)
    return _with_bias(linear, bias, device)


def _with_bias(linear: nn.Module, bias: torch.Tensor | None, device: torch.device) -> nn.Module:
    linear.bias = None if bias is None else nn.Parameter(bias.to(device), requires_grad=False)
    return linear.requires_grad_(False)


def from_packed(
    shape: tuple[int, int], parts: Mapping[str, torch.Tensor], bias: torch.Tensor | None, device: torch.device
) -> nn.Module:
    """A frozen linear from a checkpoint that bitsandbytes quantized: its packed `weight` and companions, names as
    stored.

    4 bits: `weight`, `weight.absmax`, … and `weight.quant_state.bitsandbytes__nf4`; 8 bits: `weight` and `SCB`.
    shape: (out, in).
    """
    if "SCB" in parts:
        linear = _empty(Int8Linear, torch.empty(shape, device="meta"), has_fp16_weights=False)
        codes = parts["weight"].to(device)
        linear.weight = bnb.nn.Int8Params(codes, requires_grad=False, CB=codes, SCB=parts["SCB"].to(device).float())
    else:
        linear = _empty(NF4Linear, torch.empty(shape, device="meta"))
        stats = {name: part for name, part in parts.items() if name != "weight"}
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            parts["weight"], stats, requires_grad=False, device=device, module=linear
        )
    return _with_bias(linear, bias, device)


def from_blocks(blocks: Blocks, bias: torch.Tensor | None, device: torch.device) -> nn.Module:
    """A frozen linear of a GGUF's own blocks; on a CPU they stay where they are."""
    linear = GGUFLinear(*reversed(blocks.shape), bias=False, device="meta")
    _hold(linear, blocks, device)
    return _with_bias(linear, bias, device)


def embed_blocks(module: nn.Embedding, blocks: Blocks, compute: torch.dtype, device: torch.device) -> None:
    """Make an embedding one of a GGUF's own blocks, whose rows come out in the compute dtype."""
    module.__class__, module.compute_dtype = GGUFEmbedding, compute
    _hold(module, blocks, device)


def tie_blocks(head: nn.Module, embedding: GGUFEmbedding) -> None:
    """Make a linear that was given the embedding's weight multiply with its blocks."""
    head.__class__, head.type, head.order = GGUFLinear, embedding.type, embedding.order


def _hold(module: nn.Module, blocks: Blocks, device: torch.device) -> None:
    module.type = blocks.type
    module.order = None if blocks.order is None else blocks.order.to(device)
    module.weight = nn.Parameter(blocks.raw.to(device), requires_grad=False)


def bits_of(module: nn.Module) -> Bits:
    """4, 8, 16 or "gguf": how a linear is stored."""
    return next((bits for kind, bits in _BITS.items() if isinstance(module, kind)), 16)


_BITS = {bnb.nn.Linear4bit: 4, bnb.nn.Linear8bitLt: 8, GGUFLinear: GGUF}


def stored_bits(model: nn.Module) -> Bits:
    """4, 8, 16 or "gguf": the first of these that a linear of the model is stored in."""
    found = {bits_of(module) for module in model.modules() if is_linear(module)}
    return next((bits for bits in FORMATS if bits in found), 16)


def _paged(parameters, lr: float, betas: tuple[float, float], weight_decay: float, device: torch.device):
    """AdamW with 8-bit states (arXiv 2110.02861) in managed memory, which the driver moves to the host under
    pressure.
    """
    if device.type != "cuda":
        raise RuntimeError("managed memory needs CUDA")
    return bnb.optim.PagedAdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def _eight_bit(parameters, lr: float, betas: tuple[float, float], weight_decay: float, device: torch.device):
    if device.type != "cuda":
        raise RuntimeError("bitsandbytes' 8-bit optimizers need CUDA")
    return bnb.optim.AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def _torch(parameters, lr: float, betas: tuple[float, float], weight_decay: float, device: torch.device):
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, foreach=True)


# In the order of falling back. Each raises RuntimeError or ValueError where the machine lacks it.
OPTIMIZERS = {"paged_adamw_8bit": _paged, "adamw_8bit": _eight_bit, "adamw": _torch}
