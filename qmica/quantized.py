"""The quantized model kept on disk, so that it is made once: the next start maps it into memory.

How: an entry is a folder of the cache, named by a hash of what it was made from, in the layout in which bitsandbytes
and transformers save a 4- or 8-bit model (`from_pretrained` loads it). It is a `Weights` of lazy tensors that quantize
when they are read, written like any other, so that no more than one tensor exists unquantized; beside, synced and
renamed, so that two processes may make it at once. What is loaded is the entry, just written or not: one path, whose
pages are the file's and not the process's own.

What it gives up: nothing is ever evicted; the data is not checked again (a checksum would read gigabytes at each
start), only that all files are whole, and hold what they should by name, type and shape. transformers computes in the
type of what is not packed, which must be one: norms and biases are there in bf16, and where the source has them in
another type they are kept a second time as it has them, for the loader here.
"""

import contextlib
import functools
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qmica import allocator, durable, quant, source, store
from qmica.errors import QmicaError
from qmica.source import Source
from qmica.weights import LazyTensor, Weights, open_weights, overlay, write_file, write_sharded

log = logging.getLogger(__name__)

VERSION = "1"  # of the layout: a change of what an entry holds makes another
VECTORS = "vectors.safetensors"  # norms and biases in the source's own type
ABOUT = "qmica.json"  # what an entry was made from, and the digests of its weights

# what transformers writes to config.json for the quantization that `quant.FORMATS` makes
QUANTIZATION = {
    4: {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    },
    8: {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True},
}

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name: (shape, dtype)
Expected = tuple[Layout, Mapping[str, LazyTensor]]  # of the model's file or shards, and what VECTORS holds
Entry = tuple[Weights, Mapping[str, str]]  # the weights, and the digest of each quantized linear by path
Progress = Callable[[int, int], None]


def needed(weights: Weights, held: Mapping[str, int]) -> bool:
    """Whether there is anything to keep: not for a source that bitsandbytes quantized, nor where all is held in 16
    bits.
    """
    return not weights.packed and any(bits in QUANTIZATION for bits in held.values())


def find(
    origin: Source,
    weights: Weights,
    held: Mapping[str, int],
    fingerprint: str,
    generation: Mapping,
    device: torch.device,
    progress: Progress,
) -> Entry | None:
    """The weights of `origin` as `held` says, from the cache, into which they are written first where they are not
    there; and the digest (`quant.Stored.digest`) of each quantized linear, by path.

    held: for every tensor of the model 4, 8 or 16 bits, or 0 for one that is wanted as it is. fingerprint: of the
    weights; generation: the content of generation_config.json; device: where is quantized. progress(done, total) is
    called after each linear that is made. None where the cache cannot be written, which is said in one line.
    """
    place = store.folder("quantized", VERSION, *_origin(origin, weights), fingerprint, json.dumps(held))
    expected = _layout(weights, held), _exact(weights, held)
    found = _sound(place, expected)
    if found is not None:
        return found
    try:
        _write(place, origin, weights, held, generation, device, progress)
    except (QmicaError, OSError) as error:
        with contextlib.suppress(*_UNSOUND):  # another process was faster
            return _opened(place, expected)
        log.warning("the quantized model is held in memory, as it cannot be kept: %s", " ".join(str(error).split()))
        return None
    return _opened(place, expected)


def _origin(origin: Source, weights: Weights) -> list[str]:
    """What tells a source from one that was changed since: the fingerprint alone samples a few KB of each tensor."""
    files = [(file.name, file.stat()) for file in origin.files]
    known = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in files]
    return [json.dumps(weights.config, sort_keys=True, default=str), *known]


def _layout(weights: Weights, held: Mapping[str, int]) -> Layout:
    """Shape and dtype of every tensor of an entry, those of a packed weight one after another."""
    layout = {}
    for name, bits in held.items():
        shape = weights[name].shape
        if bits in QUANTIZATION:
            parts = quant.FORMATS[bits].layout(*shape)
            layout |= {f"{name.removesuffix('weight')}{part}": said for part, said in parts.items()}
        else:
            layout[name] = (shape, torch.bfloat16)
    return layout


def _exact(weights: Weights, held: Mapping[str, int]) -> dict[str, LazyTensor]:
    """The tensors that are wanted as they are, and would not be in bf16."""
    return {name: weights[name] for name, bits in held.items() if not bits and weights[name].dtype != torch.bfloat16}


# ---- making


def _write(
    place: Path,
    origin: Source,
    weights: Weights,
    held: Mapping[str, int],
    generation: Mapping,
    device: torch.device,
    progress: Progress,
) -> None:
    """Raises QmicaError or OSError where the cache cannot be written or has no space."""
    bits = min(bits for bits in held.values() if bits)
    digests: dict[str, str] = {}
    with durable.replacing_folder(place) as part:
        write_sharded(_lazy(weights, held, device, digests, progress), part)
        if exact := _exact(weights, held):
            write_file(part / VECTORS, exact)
        known = {key: value for key, value in weights.config.items() if key != "torch_dtype"}
        config = {**known, "dtype": "bfloat16", "quantization_config": QUANTIZATION[bits]}
        durable.write_json(part / source.CONFIG, config)
        durable.write_json(part / "generation_config.json", dict(generation))
        about = {"source": origin.id, "revision": origin.revision, "bits": bits, "digests": digests}
        durable.write_json(part / ABOUT, about)


def _lazy(
    weights: Weights, held: Mapping[str, int], device: torch.device, digests: dict[str, str], progress: Progress
) -> Weights:
    """The weights as an entry holds them, each made when it is read."""

    @functools.lru_cache(maxsize=1)  # the parts of a weight are read one after another
    def made(name: str) -> dict[str, torch.Tensor]:
        linear = quant.quantize(weights[name].frozen(), None, held[name], device)
        digests[name.removesuffix(".weight")] = quant.Stored(linear).digest()
        allocator.give_back()
        progress(len(digests), total)
        return {part: tensor.cpu() for part, tensor in quant.FORMATS[held[name]].parts(linear).items()}

    def part_of(name: str, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
        return LazyTensor(shape, dtype, lambda start, stop: made(name)[part][start:stop].clone())

    def half(tensor: LazyTensor) -> LazyTensor:
        return LazyTensor(tensor.shape, torch.bfloat16, lambda start, stop: tensor.rows(start, stop).to(torch.bfloat16))

    total = sum(bits in QUANTIZATION for bits in held.values())
    tensors, packed = {}, {}
    for name, bits in held.items():
        if bits in QUANTIZATION:
            layout = quant.FORMATS[bits].layout(*weights[name].shape)
            packed[name] = tuple(layout)
            path = name.removesuffix("weight")
            tensors |= {f"{path}{part}": part_of(name, part, *said) for part, said in layout.items()}
        else:
            tensors[name] = half(weights[name])
    return Weights(tensors, weights.config, packed)


# ---- reading


def _sound(place: Path, expected: Expected) -> Entry | None:
    """An entry, or None where there is none or it is damaged, which is said; it is removed then."""
    if not place.exists():
        return None
    try:
        return _opened(place, expected)
    except _UNSOUND as error:
        log.warning("%s is damaged (%s): the model is quantized again", place, " ".join(str(error).split()))
        shutil.rmtree(place, ignore_errors=True)  # of a folder that may only be read, nothing
        return None


_UNSOUND = (QmicaError, OSError, ValueError, KeyError, TypeError)  # what files raise that are not what they should be


def _opened(place: Path, expected: Expected) -> Entry:
    """Raises one of `_UNSOUND` where the entry is not what it should be, as far as headers tell."""
    layout, exact = expected
    origin = source.resolve(place)
    found = open_weights(origin)
    _require(found, layout)
    if exact:
        vectors = open_weights(replace(origin, files=(place / VECTORS,)))
        _require(vectors, {name: (tensor.shape, tensor.dtype) for name, tensor in exact.items()})
        found = overlay(found, {name: vectors[name] for name in exact})
    digests = json.loads((place / ABOUT).read_bytes())["digests"]
    return found, {path: digests[path] for path in (name.removesuffix(".weight") for name in found.packed)}


def _require(found: Weights, layout: Layout) -> None:
    """QmicaError where a tensor is missing, or has another shape or type."""
    wrong = [
        name for name, said in layout.items() if name not in found or (found[name].shape, found[name].dtype) != said
    ]
    if wrong:
        raise QmicaError(f"{len(wrong)} of its tensors are missing or have another shape, {wrong[0]} among them")
    _ = found.shapes  # reads the description of every packed weight
