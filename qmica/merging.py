"""Merge an adapter into its base: `qmica merge`, and the merged `Weights` that `qmica export` walks over.

How: a merge is a `Weights` laid over another. A changed tensor is computed when its rows are asked for, W + scale · B A
in fp32, so that no merged copy is ever whole in memory; `merge` streams it to safetensors in bf16, `exporting` to GGUF.
The base is the source's own values (16 bit; a GGUF's or a bitsandbytes checkpoint's dequantized weights), or what
training saw: each linear of the decoder layers quantized and dequantized again, one at a time.

What it gives up: merging back into 4 bit (the rounding would undo much of a small delta), and quantizing in row blocks
(the scales of NF4 have an offset of the whole tensor, so one tensor is whole in memory for `base="quantized"`).
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from gguf import GGMLQuantizationType
from transformers import GenerationConfig

from qmica import architectures, durable, model, quant, runs, source, targets, tokenizer, verification
from qmica.adapter import Adapter, Factors, check_base, read_adapter
from qmica.config import SHARD, shard_bytes
from qmica.errors import QmicaError
from qmica.survival import Survival
from qmica.weights import LazyTensor, Weights, fingerprint, open_weights, overlay, shapes_fingerprint, write_sharded

BaseKind = Literal["original", "quantized"]
DTYPE = torch.bfloat16
ROWS_COMPARED = 512  # at once, when the rounding of a quantized base is measured


@dataclass(frozen=True)
class Opened:
    """A run with everything a merge needs, headers only: its adapter, its base's source and weights, and the bits it
    was trained at."""

    run: runs.Run
    adapter: Adapter
    source: source.Source
    weights: Weights
    bits: quant.Bits


@dataclass
class Rounding:
    """How far the weights that training saw are from the source's own, summed up as they are made."""

    difference: float = 0.0  # sums of squares
    total: float = 0.0

    def add(self, original: LazyTensor, seen: torch.Tensor) -> None:
        for start in range(0, len(seen), ROWS_COMPARED):
            rows = original.rows(start, start + ROWS_COMPARED).float()
            self.total += rows.square().sum().item()
            self.difference += rows.sub_(seen[start : start + ROWS_COMPARED]).square().sum().item()

    def __str__(self) -> str:
        share = (self.difference / self.total) ** 0.5 if self.total else 0.0
        return f"the quantized weights differ from the original ones by {100 * share:.2g} % (root mean square)"


def merge(
    run: str | None = None,
    out: Path | None = None,
    base: BaseKind = "original",
    scale: float = 1.0,
    max_shard_size: str = SHARD,
    verify: bool = False,
) -> Path:
    """Write the merged model as a folder of safetensors in bf16, ready for transformers, vLLM and others. Returns the
    folder.

    run: a run, an adapter folder, or a name under runs/ (None: the newest). out: must be missing or empty; None:
    RUN/merged. scale: how much of the adapter. max_shard_size: of a file. verify: ask the merged model and the one that
    was trained the same. Raises QmicaError for an adapter that is not of this base, a filled folder, a full disk, or a
    merge that does not answer as it was trained.
    """
    if not 0 < scale < math.inf:
        raise QmicaError(f"--scale {scale}: give more than 0")
    shard = shard_bytes(max_shard_size)
    opened = open_run(run, scale)
    if base == "quantized":
        require_seen(opened)
    target = Path(out) if out is not None else opened.run.folder / "merged"
    durable.require_empty(target)
    rounding = Rounding()
    survival = Survival({name: [GGMLQuantizationType.BF16] for name in opened.weights})
    weights = merged(opened.weights, opened.adapter, base, opened.bits, rounding, survival)
    size = sum(tensor.nbytes // tensor.dtype.itemsize * DTYPE.itemsize for tensor in weights.values())
    durable.require_space(target, size, f"merging into {target}")
    print(describe(opened, base, scale))
    with durable.replacing_folder(target) as part:
        write_sharded(weights, part, DTYPE, shard)
        durable.write_json(part / source.CONFIG, _config(weights))
        _write_companions(opened.source, part)
        if verify:
            _verify(opened, part, target, near(opened, base), scale)
    for line in [*([rounding] if rounding.total else []), *survival.lines()]:
        print(line)
    print(f"{target}: {durable.size_text(size)} of bf16 safetensors; transformers and vLLM load it as any model,")
    part = "" if scale == 1 else f" --scale {scale:g}"
    print(f"  from_pretrained({str(target)!r}); for llama.cpp and Ollama: qmica export {opened.run.folder}{part}")
    return target


def _verify(opened: Opened, folder: Path, target: Path, limit: float, scale: float) -> None:
    """Ask the model as trained and the merged one. Raises QmicaError where they are further than `limit` apart."""
    check = verification.in_training(opened.run, scale)
    log_p = verification.of_source(source.resolve(str(folder)), check.texts)
    check.add(verification.MERGED, log_p, {verification.TRAINED: limit})
    check.report(target)


def near(opened: Opened, base: BaseKind) -> float:
    """How far the merged model may be from the trained one: it is the same but for bf16, or other weights by choice."""
    same = base == "quantized" or opened.bits == 16 or bool(opened.weights.packed)
    return verification.ROUNDED if same else verification.QUANTIZED


def open_run(run: str | None, scale: float = 1.0) -> Opened:
    """A run opened for merging, its adapter (so much of it) checked against its base.

    Raises QmicaError naming both where they do not fit.
    """
    found = runs.find(run)
    adapter = read_adapter(found.adapter, scale)
    config = found.model_config(adapter.base)
    base = source.resolve(config["model"], config["revision"])
    weights = open_weights(base)
    model.require_whole(model.on_meta(model.read_config(base), torch.float32), weights, base)
    check_adapter(adapter, weights, base)
    return Opened(found, adapter, base, weights, config["bits"])


def require_seen(opened: Opened) -> None:
    """Refuse `--base quantized` where the base's weights are not those of training: what that saw is not known."""
    known = opened.adapter.base.fingerprint
    if quant.FORMATS[opened.bits].quantizes and known not in (None, fingerprint(opened.weights)):
        raise QmicaError(
            f"--base quantized: the weights of {opened.source.id} changed since training, and what quantization did to "
            "the old ones is not known: put them back, or leave --base out"
        )


def check_adapter(adapter: Adapter, weights: Weights, base: source.Source) -> None:
    """Refuse an adapter that does not fit these weights; warn once where only their values are others than in training.

    Raises QmicaError with both ids, and for a family that qmica does not support or a head that is tied to the
    embedding.
    """
    check_base(adapter, model.Base(base.id, base.revision, None, fingerprint(weights), shapes_fingerprint(weights)))
    shapes = weights.shapes
    expected = set(architectures.for_config(weights.config).tensor_names(weights.config))
    if "lm_head" in adapter.factors and "lm_head.weight" not in expected:
        raise QmicaError(
            f"the adapter in {adapter.folder} changes lm_head, which {base.id} shares with its embedding: it cannot "
            "be merged; train without lm_head among the targets"
        )
    wrong = [
        path
        for path, part in adapter.factors.items()
        if f"{path}.weight" not in expected or shapes.get(f"{path}.weight") != (len(part.B), part.A.shape[1])
    ]
    if wrong:
        raise QmicaError(
            f"the adapter in {adapter.folder} is for {adapter.base.id}, not for {base.id}: "
            f"{len(wrong)} of {len(adapter.factors)} layers do not fit ({', '.join(wrong[:3])})"
        )


def describe(opened: Opened, base: BaseKind, scale: float = 1.0) -> str:
    """What is merged into what, in words."""
    seen = quant.FORMATS[opened.bits].name
    if opened.weights.packed:
        weights = ", which bitsandbytes stored quantized: its original weights are those that training saw"
    elif opened.bits == quant.GGUF:
        weights = ", the GGUF's weights, dequantized: those that training saw"
    elif base == "quantized":
        weights = f" as training saw it, {seen} dequantized (--base original takes its own weights)"
    else:
        own = "the GGUF's weights, dequantized" if opened.source.kind == "gguf" else "its own weights"
        weights = f", {own} (--base quantized takes the {seen} ones that training saw)"
    return f"merging {len(opened.adapter.factors)} linears{strength(scale)} into {opened.source.name}{weights}"


def strength(scale: float) -> str:
    """What to say of a part of an adapter."""
    return "" if scale == 1 else f" at {scale:g} of the adapter's strength"


# ---- the weights


def merged(
    weights: Weights,
    adapter: Adapter,
    base: BaseKind = "original",
    bits: quant.Bits = 4,
    rounding: Rounding | None = None,
    survival: Survival | None = None,
) -> Weights:
    """The weights with the adapter in them, computed on demand: changed tensors are fp32, (out, in) as before.

    base "quantized": every linear of the decoder layers as `bits` hold it; the GGUF's own blocks are the original.
    Packed weights of a bitsandbytes checkpoint come unpacked. rounding, survival: are added to as tensors are made.
    """
    held, shapes = _Held(), weights.shapes
    changes = {name: held.lazy(name, shapes[name], _unpacker(weights, name, shapes[name])) for name in weights.packed}
    if base == "quantized" and bits != quant.GGUF:
        for name, tensor in weights.items():
            if _is_quantized(name, tensor) and name not in changes:
                changes[name] = held.lazy(name, tensor.shape, _rounder(tensor, bits, rounding))
    for path, part in adapter.factors.items():
        name = f"{path}.weight"
        changes[name] = _sum(name, changes.get(name, weights[name]), part, survival or Survival())
    return overlay(weights, changes)


def _sum(name: str, tensor: LazyTensor, part: Factors, survival: Survival) -> LazyTensor:
    """W + scale · B A, row by row."""

    def read(start: int, stop: int) -> torch.Tensor:
        rows = tensor.rows(start, stop).float()
        before = survival.sample(name, rows)
        # Factors.delta, in place: three blocks less of memory at the peak
        rows.addmm_(part.B[start:stop].float(), part.A.float(), alpha=part.scale)
        survival.add(name, before, rows)
        return rows

    return LazyTensor(tensor.shape, torch.float32, read)


@dataclass
class _Held:
    """The one tensor that is whole in memory: walks read a tensor's blocks one after the other, and making it costs
    seconds."""

    name: str = ""
    tensor: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def lazy(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> LazyTensor:
        def read(start: int, stop: int) -> torch.Tensor:
            if self.name != name:
                self.name, self.tensor = "", torch.empty(0)  # freed before the next one is made
                self.tensor = make()
                self.name = name
            return self.tensor[start:stop].clone()

        return LazyTensor(shape, torch.float32, read)


def _is_quantized(name: str, tensor: LazyTensor) -> bool:
    """Whether training held this tensor as a quantized linear (the rule of model.load)."""
    return name.endswith(".weight") and len(tensor.shape) == 2 and not targets.stays_16bit(name)


def _rounder(tensor: LazyTensor, bits: quant.Bits, rounding: Rounding | None) -> Callable[[], torch.Tensor]:
    """Makes a linear's weight as training saw it, (out, in) fp32, by the path that model.load takes."""

    def make() -> torch.Tensor:
        seen = quant.dequantize(quant.quantize(tensor.load(), None, bits, torch.device("cpu")))
        if rounding is not None:
            rounding.add(tensor, seen)
        return seen

    return make


def _unpacker(weights: Weights, name: str, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """Makes a packed weight's dequantization, (out, in) fp32. shape: before packing."""
    path = name.removesuffix(".weight")

    def make() -> torch.Tensor:
        parts = {part: weights[f"{path}.{part}"].load() for part in weights.packed[name]}
        return quant.dequantize(quant.from_packed(shape, parts, None, torch.device("cpu")))

    return make


# ---- what stands beside the weights


def _config(weights: Weights) -> dict:
    """config.json of the merged folder: the base's, no longer quantized, in bf16."""
    kept = {key: value for key, value in weights.config.items() if key not in ("quantization_config", "torch_dtype")}
    return {**kept, "dtype": str(DTYPE).removeprefix("torch.")}


def _write_companions(base: source.Source, folder: Path) -> None:
    """Tokenizer and generation settings: a folder's own files, untouched; a GGUF's from its metadata."""
    if base.kind == "gguf":
        tokenizer.load(base).save_pretrained(folder)
        GenerationConfig.from_model_config(model.read_config(base)).save_pretrained(folder)
        return
    for name in source.SMALL:
        if name != source.CONFIG and (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
