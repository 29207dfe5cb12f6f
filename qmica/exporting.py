"""Write GGUF: the merged model in any type that llama.cpp knows from llama-quantize, or the adapter alone.

How: every tensor of the file to be is planned first (name, shape, type, and a way to produce its bytes block by block),
so that the header and its offsets are known; then the blocks are made, written and forgotten. Several files (one for
each --quant) are written side by side: a block of a tensor is read and merged once, and packed for each. From a GGUF,
tensors that the adapter does not touch and whose type stays are copied byte for byte, its metadata and tokenizer as
they are. A file is written beside its name, its tensors are read back with our own reader and compared with what was
planned, with --verify what it answers too, and then it is renamed.

What it gives up: parts of several types at once (--max-shard-size takes one).

Sources: llama.cpp's conversion/base.py (metadata), convert_lora_to_gguf.py and src/llama-adapter.cpp (adapters).
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qmica import (
    architectures,
    compensation,
    durable,
    ggml,
    imatrix,
    llamacpp,
    merging,
    ollama,
    quant,
    source,
    tokenizer,
    verification,
)
from qmica.adapter import Factors
from qmica.config import UNWEIGHABLE, ExportConfig
from qmica.data import chat_template
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile, GGUFTensor, find_shards
from qmica.merging import Opened
from qmica.survival import Survival
from qmica.tokenizer import Entry
from qmica.weights import LazyTensor, Weights

T = GGMLQuantizationType
BLOCK_BYTES = 64 << 20  # of fp32 rows: 16 chunks of ggml.quantize, one a thread
METADATA_BYTES = 16_000_000  # at most: a vocabulary of 152,000 tokens and its merges take 6 MB
NO_MODELFILE = "  with --ollama it comes with a Modelfile for Ollama: template, stop tokens, parameters"
SAMPLE = 256  # bytes at each end of a tensor, compared when the file is read back

FINE = {T[name] for name in UNWEIGHABLE}  # they hardly change what they are given

STRING, U32, F32 = GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.FLOAT32
U16, I32 = GGUFValueType.UINT16, GGUFValueType.INT32

# A and B of an adapter. F32 loses nothing; an F16 or BF16 matrix makes llama.cpp round what it multiplies as well
ADAPTER_TYPES = {"F32": T.F32, "F16": T.F16, "BF16": T.BF16}

# keys of a GGUF source that say something about the old file only
STALE = re.compile(r"general\.(architecture|alignment|file_type|quantization_version)|(split|quantize\.imatrix)\..*")


RowBlocks = Callable[[], Iterator[np.ndarray]]  # a tensor's rows, block after block, made when they are asked for


def _as_they_are(block: np.ndarray) -> np.ndarray:
    return block


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be: `pack` makes the file's bytes of a block of `blocks`, which files may share."""

    name: str
    shape: tuple[int, ...]
    type: T
    blocks: RowBlocks
    pack: Callable[[np.ndarray], np.ndarray] = _as_they_are
    copied: bool = False  # byte for byte from a GGUF source

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * ggml.row_bytes(self.shape[-1], self.type)


@dataclass(frozen=True)
class Plan:
    """A GGUF to be written: its architecture, metadata and tensors, in the file's order."""

    architecture: str
    entries: tuple[Entry, ...]
    tensors: tuple[Planned, ...]
    notes: tuple[str, ...] = ()  # one line each, said before writing

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def export(run: str | None = None, config: ExportConfig = ExportConfig()) -> Path | list[Path]:
    """Write a run as GGUF and say how to use it. Returns the file, or the files where several types are asked for.

    run: a run, an adapter folder, or a name under runs/ (None: the newest). Raises QmicaError, before anything is
    written, for an adapter that is not of this base, a family or type that cannot be written here, an importance
    matrix of another model, and a full disk.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    opened = merging.open_run(run, config.scale)
    if config.base == "quantized":
        merging.require_seen(opened)
    targets = _targets(opened, config)
    rounding, survival = merging.Rounding(), Survival()
    plans = [_plan_adapter(opened, config)] if config.adapter else _plan_models(opened, config, rounding, survival)
    packed = {tensor.type for plan in plans for tensor in plan.tensors if not tensor.copied}
    ggml.require_writable(packed, config.imatrix is not None)
    needed = sum(plan.nbytes + (0 if config.adapter else METADATA_BYTES) for plan in plans)
    durable.require_space(targets[0].parent, needed, f"exporting {', '.join(target.name for target in targets)}")
    _show(plans, targets)
    targets = _written(opened, targets, plans, config)
    for line in [*([rounding] if rounding.total else []), *survival.lines()]:
        print(line)
    for target in targets:
        print(f"{target}: {durable.size_text(sum(part.stat().st_size for part in find_shards(target)))}")
    said = _next_steps(opened, targets[0], config.adapter)
    for target, kind in zip(targets, config.quants, strict=True) if config.ollama else ():
        said += _for_ollama(opened, target, config, kind if len(targets) > 1 else None)
    print("\n".join(said if config.ollama or config.shard_bytes else [*said, NO_MODELFILE]))
    return targets[0] if len(targets) == 1 else targets


def _targets(opened: Opened, config: ExportConfig) -> list[Path]:
    """The files to write, one for each type; never the base's own."""
    kinds = ["adapter"] if config.adapter else config.quants
    folder = opened.run.folder if config.out is None else config.out
    targets = [folder / f"{opened.run.name}.{kind}.gguf" for kind in kinds]
    if config.out is not None and len(kinds) == 1:
        targets = [config.out]
    for target in targets:
        if target.exists() and any(target.samefile(file) for file in opened.source.files):
            raise QmicaError(f"--out {target} is the base model itself: choose another name")
    return targets


# ---- the merged model


def _plan_models(opened: Opened, config: ExportConfig, rounding: merging.Rounding, survival: Survival) -> list[Plan]:
    """The merged model in each type: which type each tensor gets, and where its bytes come from."""
    weights = merging.merged(opened.weights, opened.adapter, config.base, opened.bits, rounding, survival)
    family = architectures.for_config(weights.config)
    extra = _extra_tensors(weights, family)
    names = _tensor_names(weights, family)
    shapes = {name: weights[hf].shape for name, hf in names.items()}
    rows = {
        name: _rows(_in_gguf(weights[hf], hf, family), family.row_order(hf, weights.config))
        for name, hf in names.items()
    }
    importance = None if config.imatrix is None else imatrix.read(config.imatrix).fitted(shapes)
    entries = _copied_entries(weights.gguf) if weights.gguf else _folder_entries(opened, family)
    entries += _taught_template(opened, entries)
    print(merging.describe(opened, config.base, config.scale))

    def plan(kind: str) -> Plan:
        types, notes = _types(kind, shapes, family.name, importance is not None)
        for name, hf in names.items():
            survival.types.setdefault(hf, []).append(types[name])
        packs = {name: _packer(name, types[name], importance, config.threads) for name in names}
        planned = [_planned(name, types[name], weights[hf], rows[name], packs[name]) for name, hf in names.items()]
        notes += [*_weighed(importance, planned), *_second_rounding(weights.gguf, planned, kind)]
        said = (*entries, *_quant_entries(kind), *_imatrix_entries(importance, kind))
        return Plan(family.name, said, (*planned, *extra.values()), tuple(notes))

    return [plan(kind) for kind in config.quants]


def _tensor_names(weights: Weights, family: architectures.Architecture) -> dict[str, str]:
    """GGUF name -> Hugging Face name: a GGUF source's in its own order, a folder's by layer."""
    if weights.gguf:
        names = {name: family.hf_name(name) for name in weights.gguf.tensors}
        return {gguf: hf for gguf, hf in names.items() if hf}
    names = {family.gguf_name(name): name for name in family.tensor_names(weights.config)}
    missing = [name for name in names.values() if name not in weights]
    if missing:
        raise QmicaError(f"the base lacks {len(missing)} of its tensors, {missing[0]} first: copy or download it again")
    return {gguf: names[gguf] for gguf in sorted(names, key=_place)}


def _place(gguf_name: str) -> float:
    """Where a tensor stands in the file: embedding, layers, head, so that a reader that maps it walks forward."""
    layer = re.match(r"blk\.(\d+)\.", gguf_name)
    if layer:
        return int(layer[1])
    return -1 if gguf_name == "token_embd.weight" else math.inf


def _extra_tensors(weights: Weights, family: architectures.Architecture) -> dict[str, Planned]:
    """Tensors that Hugging Face keeps in the config (rope_freqs): a GGUF source's own, else computed."""
    if weights.gguf:
        stored = {name: tensor for name, tensor in weights.gguf.tensors.items() if family.hf_name(name) is None}
        return {name: _copy(name, tensor) for name, tensor in stored.items()}
    made = family.extra_tensors(weights.config)
    return {name: Planned(name, data.shape, T.F32, _whole(data)) for name, data in made.items()}


def _whole(data: np.ndarray) -> RowBlocks:
    return lambda: iter([np.ascontiguousarray(data, np.float32).view(np.uint8)])


def _types(
    quant: str, shapes: Mapping[str, tuple], architecture: str, weighted: bool
) -> tuple[dict[str, T], list[str]]:
    """The type of each tensor, and what there is to say about types other than those asked for."""
    types = ggml.mix(quant, shapes, architecture, weighted)
    notes = []
    main = ggml.named(quant).type
    if main not in ggml.PACKED_BY_GGML and not llamacpp.has_library():
        replaced = [name for name, type_ in types.items() if type_ in ggml.PACKED_BY_GGML]
        types |= dict.fromkeys(replaced, T.Q8_0)  # finer: 8.5 bits a weight where Q6_K has 6.6
        if replaced:
            notes.append(f"{', '.join(replaced)}: Q8_0 in place of Q6_K, which needs {llamacpp.INSTALL}")
    block = GGML_QUANT_SIZES[main][0]
    fallen = Counter(t.name for name, t in types.items() if t != T.F32 and shapes[name][-1] % block)
    if fallen:
        kinds = ", ".join(f"{count} as {name}" for name, count in fallen.most_common())
        notes.append(
            f"{fallen.total()} tensors have rows that are no multiple of {main.name}'s block of {block}: {kinds}"
        )
    return types, notes


def _weighed(importance: imatrix.Importance | None, planned: Iterable[Planned]) -> list[str]:
    """What part of the tensors an importance matrix covers."""
    if importance is None:
        return []
    names = [tensor.name for tensor in planned if tensor.type in ggml.WEIGHABLE and not tensor.copied]
    return [importance.describe(names)] if names else []


def _second_rounding(file: GGUFFile | None, planned: Iterable[Planned], quant: str) -> list[str]:
    """What to say where a quantized GGUF is quantized again. On SmolLM2 in Q4_1, KL to the tuned model in fp32: the
    GGUF with the adapter beside it 0.005, Q8_0 0.006, Q4_K_M 0.077 (the tuning itself 0.017)."""
    if file is None or ggml.named(quant).type in FINE:
        return []
    old = {file.tensors[tensor.name].type for tensor in planned if not tensor.copied} - FINE
    if not old:
        return []
    names = "/".join(sorted(type_.name for type_ in old))
    return [
        f"the base is {names} already and is rounded a second time: --adapter beside it is not rounded, "
        "--quant Q8_0 little"
    ]


def _planned(
    name: str, type_: T, tensor: LazyTensor, rows: RowBlocks, pack: Callable[[np.ndarray], np.ndarray]
) -> Planned:
    """A tensor of the model: the source's bytes where nothing changes, else its rows, packed block by block."""
    if tensor.quantized is not None and tensor.quantized.type == type_:
        return _copy(name, tensor.quantized)
    return Planned(name, tensor.shape, type_, rows, pack)


def _packer(
    name: str, type_: T, importance: imatrix.Importance | None, threads: int | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Packs blocks of fp32 rows of one tensor."""
    weighs = None if importance is None else importance.columns.get(name)

    def pack(rows: np.ndarray) -> np.ndarray:
        try:
            return ggml.quantize(rows, type_, threads, weighs)
        except QmicaError as error:
            raise QmicaError(f"{name}: {error}") from error

    return pack


def _in_gguf(tensor: LazyTensor, hf_name: str, family: architectures.Architecture) -> LazyTensor:
    """The tensor with the values that this family's GGUF has (Gemma's norms: one more)."""
    offset = family.offset(hf_name)
    if not offset:
        return tensor
    return replace(tensor, dtype=torch.float32, read=lambda start, stop: tensor.rows(start, stop).float() + offset)


def _copy(name: str, stored: GGUFTensor) -> Planned:
    """A tensor as a GGUF source stores it."""
    step = max(BLOCK_BYTES // stored.row_bytes, 1)
    return Planned(
        name,
        stored.shape,
        stored.type,
        lambda: (stored.raw(start, start + step) for start in range(0, stored.rows, step)),
        copied=True,
    )


def _rows(tensor: LazyTensor, order: np.ndarray | None) -> RowBlocks:
    """The tensor's rows in llama.cpp's order, fp32 (rows, columns), a block at a time; a vector is one row."""

    def vector() -> Iterator[np.ndarray]:
        whole = tensor.load().float().numpy()
        yield (whole if order is None else whole[order])[None]

    def matrix() -> Iterator[np.ndarray]:
        for start, stop in tensor.blocks(BLOCK_BYTES):
            if order is None:
                yield tensor.rows(start, stop).float().numpy()
                continue
            wanted = order[start:stop]  # it stays within heads, so what lies between is little more than the block
            first = int(wanted.min())
            yield tensor.rows(first, int(wanted.max()) + 1).float().numpy()[wanted - first]

    return vector if len(tensor.shape) == 1 else matrix


# ---- metadata


def _copied_entries(file: GGUFFile) -> list[Entry]:
    """A GGUF source's metadata without what says something about that file only; an empty array cannot be written, and
    says nothing."""
    kept = {key: value for key, value in file.metadata.items() if not STALE.fullmatch(key) and value != []}
    return [(key, file.kinds[key].type, value, file.kinds[key].element) for key, value in kept.items()]


def _folder_entries(opened: Opened, family: architectures.Architecture) -> list[Entry]:
    """The metadata of a folder's model: what it is, its hyper-parameters, its tokenizer."""
    config = opened.weights.config
    hyperparameters = [(*entry, None) for entry in family.metadata(config)]
    tokens = tokenizer.load(opened.source)
    words = tokenizer.gguf_metadata(tokens, family.value(config, "vocab_size"))
    return [*_card(opened, "model", tokenizer.name_that_fits(opened.run.name, tokens)), *hyperparameters, *words]


def _taught_template(opened: Opened, entries: Sequence[Entry]) -> list[Entry]:
    """The plain chat template of training, for a base model that has none of its own and was taught chats."""
    if not _taught_chats(opened) or any(key == tokenizer.CHAT_TEMPLATE for key, *_ in entries):
        return []
    return [(tokenizer.CHAT_TEMPLATE, STRING, chat_template(tokenizer.load(opened.source)), None)]


def _taught_chats(opened: Opened) -> bool:
    return bool(set(opened.run.config().get("data", {}).get("formats", [])) - {"text"})


def _card(opened: Opened, kind: str, name: str) -> list[Entry]:
    """general.*: what this file is, and of which base."""
    base, repo = opened.source, opened.source.repo
    texts = {
        "general.type": kind,
        "general.name": name,
        "general.license": _license(base.folder) if base.kind != "gguf" else None,
    }
    base_texts = {
        "general.base_model.0.name": Path(base.id).name,
        "general.base_model.0.repo_url": f"https://huggingface.co/{repo}" if repo else None,
    }
    entries = [(key, STRING, text, None) for key, text in texts.items() if text]
    entries.append(("general.base_model.count", U32, 1, None))
    return entries + [(key, STRING, text, None) for key, text in base_texts.items() if text]


def _license(folder: Path) -> str | None:
    """`license` of the model card's front matter, where the folder has one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = front and re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front[1], re.MULTILINE)
    return found[1] if found else None


def _quant_entries(quant: str) -> list[Entry]:
    file_type: LlamaFileType = ggml.named(quant).file_type
    return [
        ("general.file_type", U32, int(file_type), None),
        ("general.quantization_version", U32, GGML_QUANT_VERSION, None),
    ]


def _imatrix_entries(importance: imatrix.Importance | None, quant: str) -> list[Entry]:
    """What llama-quantize says of the importance matrix that a file was made with (tools/quantize/quantize.cpp)."""
    if importance is None or quant in UNWEIGHABLE:
        return []
    entries = [
        ("file", STRING, importance.path.name),
        ("dataset", STRING, importance.datasets[0] if importance.datasets else None),
        ("entries_count", U32, len(importance.columns)),
        ("chunks_count", U32, importance.chunks or None),
    ]
    return [(f"quantize.imatrix.{key}", kind, value, None) for key, kind, value in entries if value is not None]


# ---- the adapter alone


def _plan_adapter(opened: Opened, config: ExportConfig) -> Plan:
    """A and B of each linear, B's rows in llama.cpp's order; llama.cpp scales their product by alpha / rank."""
    if config.quant not in ADAPTER_TYPES:
        raise QmicaError(
            f"--quant {config.quant} is for merged models: an adapter is written in F32 (the default), F16 or BF16"
        )
    type_ = ADAPTER_TYPES[config.quant]
    family = architectures.for_config(opened.weights.config)
    factors, notes = _factors(opened, config.base, config.scale)
    tensors = [tensor for path, part in factors.items() for tensor in _pair(opened, family, path, part, type_)]
    entries = [
        *_card(opened, "adapter", opened.run.name),
        ("adapter.type", STRING, "lora", None),
        ("adapter.lora.alpha", F32, _alpha(factors.values()), None),
    ]
    ranks = sorted({len(part.A) for part in factors.values()})
    pairs = f"{len(factors)} pairs of A and B, rank {', '.join(map(str, ranks))}, for {opened.source.name}"
    pairs += merging.strength(config.scale)
    return Plan(family.name, (*entries, *_quant_entries(type_.name)), tuple(tensors), (pairs, *notes))


def _factors(opened: Opened, base: merging.BaseKind, scale: float) -> tuple[Mapping[str, Factors], list[str]]:
    """A and B of each linear, and what there is to say: as trained, or made for weights that training did not see."""
    trained, bits = opened.adapter.factors, opened.adapter.base.bits
    if base == "quantized" and bits is None:
        raise QmicaError(
            f"--base quantized: the adapter in {opened.adapter.folder} does not say in how many bits its base was "
            "held in training, leave --base out"
        )
    if bits is None or not quant.FORMATS[bits].quantizes:
        return trained, []
    seen = quant.FORMATS[bits].name
    if base == "original":
        return trained, [f"trained beside {seen} weights: --base quantized adds columns for what {seen} changed"]
    print(f"measuring what {seen} changed in the weights", flush=True)
    widened = compensation.compensated(opened.run, trained, opened.weights, scale)
    return widened, [f"up to {compensation.COLUMNS} columns of each stand for what {seen} changed in the weights"]


def _pair(opened: Opened, family: architectures.Architecture, path: str, part: Factors, type_: T) -> list[Planned]:
    """`<tensor>.lora_a` (rank, in) and `<tensor>.lora_b` (out, rank) of one linear."""
    hf_name = f"{path}.weight"
    stem, order = family.gguf_name(hf_name), family.row_order(hf_name, opened.weights.config)
    halves = {"lora_a": (part.A, None), "lora_b": (part.B, order)}
    planned = []
    for half, (data, rows) in halves.items():
        name, tensor = f"{stem}.{half}", LazyTensor(tuple(data.shape), data.dtype, _slices(data))
        pack = _packer(name, type_, None, None)
        planned.append(Planned(name, tensor.shape, type_, _rows(tensor, rows), pack))
    return planned


def _slices(data: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda start, stop: data[start:stop].clone()


def _alpha(factors: Iterable[Factors]) -> float:
    """The one alpha with alpha / rank = scale for every pair, whatever their ranks."""
    (alpha,) = {round(part.scale * len(part.A), 6) for part in factors}
    return alpha


# ---- writing and reading back


class _File:
    """One GGUF being written: its header at once, then its tensors in the plan's order, a block at a time. Keeps both
    ends of what it wrote of each."""

    def __init__(self, path: Path, plan: Plan):
        self.writer = GGUFWriter(path, plan.architecture)
        for key, kind, value, element in plan.entries:
            self.writer.add_key_value(key, value, kind, element)
        for tensor in plan.tensors:
            self.writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        (self.file,) = self.writer.fout
        self.samples: dict[str, tuple[bytes, bytes]] = {}
        self.written = 0

    def begin(self) -> None:
        self.writer.write_padding(self.file, self.file.tell())
        self.head = self.tail = b""
        self.written = 0

    def append(self, block: np.ndarray) -> int:
        """The bytes that were written."""
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        self.file.write(data)
        self.head = self.head or data[:SAMPLE].tobytes()
        self.tail = data[-SAMPLE:].tobytes()
        self.written += data.nbytes
        return data.nbytes

    def end(self, tensor: Planned) -> None:
        if self.written != tensor.nbytes:
            raise RuntimeError(f"{tensor.name}: {self.written} bytes were made, and {tensor.nbytes} planned")
        self.writer.write_padding(self.file, tensor.nbytes)
        self.samples[tensor.name] = self.head, self.tail

    def close(self) -> None:
        self.writer.close()


def write(paths: Sequence[Path], plans: Sequence[Plan]) -> list[dict[str, tuple[bytes, bytes]]]:
    """Write each plan to its path, side by side, two blocks of one tensor in memory at a time. The plans are of the
    same tensors in the same order. Returns the first and last bytes of each tensor of each file, as written."""
    with ExitStack() as open_files, _bar(sum(plan.nbytes for plan in plans)) as progress:
        files = []
        for path, plan in zip(paths, plans, strict=True):
            files.append(_File(path, plan))
            open_files.callback(files[-1].close)
        for tensors in zip(*(plan.tensors for plan in plans), strict=True):
            _write_tensor(list(zip(files, tensors, strict=True)), progress)
        return [file.samples for file in files]


def _write_tensor(pairs: Sequence[tuple[_File, Planned]], progress: Callable[[int], None]) -> None:
    """One tensor into each file: blocks that several files are made of are made once."""
    for file, _ in pairs:
        file.begin()
    for blocks in dict.fromkeys(tensor.blocks for _, tensor in pairs):
        for block in _ahead(blocks()):
            for file, tensor in pairs:
                if tensor.blocks is blocks:
                    progress(file.append(tensor.pack(block)))
    for file, tensor in pairs:
        file.end(tensor)


def _written(opened: Opened, targets: Sequence[Path], plans: Sequence[Plan], config: ExportConfig) -> list[Path]:
    """Write the plans and read them back: a file each, or a folder of parts. Returns the files to be opened."""
    parts = split(plans[0], config.shard_bytes) if config.shard_bytes else plans[:1]
    if len(parts) > 1:
        return [_write_parts(opened, targets[0], plans[0], parts, config)]
    with ExitStack() as renamed_at_its_end:
        beside = [renamed_at_its_end.enter_context(durable.replacing(target)) for target in targets]
        samples = write(beside, plans)
        for part, plan, ends in zip(beside, plans, samples, strict=True):
            check(part, plan, ends, config.adapter)
            durable.sync(part)  # what fails does so before the first is renamed
        if config.verify:
            _verify(opened, beside, targets, config)
    return list(targets)


def _write_parts(opened: Opened, target: Path, plan: Plan, parts: Sequence[Plan], config: ExportConfig) -> Path:
    """A folder of the plan's parts, named after the file it stands for; its first part."""
    stem = target.name.removesuffix(".gguf")
    folder = target.with_name(stem)
    names = [f"{stem}-{number:05d}-of-{len(parts):05d}.gguf" for number in range(1, len(parts) + 1)]
    with durable.replacing_folder(folder) as made:
        samples = {}
        for name, part in zip(names, parts, strict=True):
            (ends,) = write([made / name], [part])
            samples |= ends
        check(made / names[0], plan, samples, config.adapter)
        if config.verify:
            _verify(opened, [made / names[0]], [folder / names[0]], config)
    print(f"{folder}: {len(parts)} parts; what is given the first of them reads them all")
    return folder / names[0]


def split(plan: Plan, most: int) -> list[Plan]:
    """The plan in parts of at most `most` bytes of tensors (one tensor, where that is larger), as llama-gguf-split has
    them: all metadata in the first, `split.*` in each."""
    groups, held = [[]], 0
    for tensor in plan.tensors:
        if groups[-1] and held + tensor.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    if len(groups) == 1:
        return [plan]
    common = [("split.count", U16, len(groups), None), ("split.tensors.count", I32, len(plan.tensors), None)]
    return [
        replace(
            plan,
            entries=(*(plan.entries if number == 0 else ()), ("split.no", U16, number, None), *common),
            tensors=tuple(group),
        )
        for number, group in enumerate(groups)
    ]


def _ahead(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The blocks, each read and merged while the one before it is packed and written."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    console = Console()
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)


def check(path: Path, plan: Plan, samples: Mapping[str, tuple[bytes, bytes]], adapter: bool = False) -> None:
    """Read the file back: the tensors planned, in types and shapes, their ends' bytes as written. RuntimeError naming
    the first that is not."""
    found = GGUFFile.open(path, adapter).tensors
    planned = {tensor.name: (tuple(tensor.shape), tensor.type) for tensor in plan.tensors}
    read = {name: (tensor.shape, tensor.type) for name, tensor in found.items()}
    for name in planned.keys() | read.keys():
        if planned.get(name) != read.get(name):
            raise RuntimeError(f"{path}: {name} was planned as {planned.get(name)} and read back as {read.get(name)}")
    for name, ends in samples.items():
        data = found[name].raw().reshape(-1)  # still a map: nothing is read but the ends
        if (data[:SAMPLE].tobytes(), data[-SAMPLE:].tobytes()) != ends:
            raise RuntimeError(f"{path}: the bytes of {name} were not read back as written")


# ---- what is said


def _show(plans: Sequence[Plan], targets: Sequence[Path]) -> None:
    """The notes of each file, and a table: type -> tensors, bytes."""
    for plan, target in zip(plans, targets, strict=True):
        if len(plans) > 1:
            print(f"{target.name}:")
        for note in plan.notes:
            print(note)
        Console().print(_table(plan))


def _table(plan: Plan) -> Table:
    table = Table("type", "tensors", "size", "", box=None, pad_edge=False)
    for type_ in sorted({tensor.type for tensor in plan.tensors}, key=lambda t: t.name):
        these = [tensor for tensor in plan.tensors if tensor.type == type_]
        copied = sum(tensor.copied for tensor in these)
        size = durable.size_text(sum(tensor.nbytes for tensor in these))
        table.add_row(type_.name, str(len(these)), size, f"{copied} copied byte for byte" if copied else "")
    return table


def _next_steps(opened: Opened, target: Path, adapter: bool) -> list[str]:
    """What to type next: qmica, llama.cpp."""
    file = shlex.quote(str(target))
    if not adapter:
        return [
            f'  qmica chat {file} --prompt "..."',
            f"  llama-cli -m {file}",
        ]
    whole = opened.source.kind == "gguf"
    base = shlex.quote(str(opened.source.files[0])) if whole else "BASE.gguf"
    lines = [
        f'  qmica chat {base} --adapter {file} --prompt "..."',
        f"  llama-cli -m {base} --lora {file}",
    ]
    return lines if whole else [f"  BASE.gguf is {opened.source.id} as a GGUF, in any type", *lines]


def _verify(opened: Opened, files: Sequence[Path], targets: Sequence[Path], config: ExportConfig) -> None:
    """Ask the model as trained, the merged one and each file, which is to have its target's name. Raises QmicaError for
    the first that is broken."""
    beside = config.adapter and opened.source.kind != "gguf"
    if beside or not llamacpp.available():
        what = f"the GGUF of {opened.source.id} that it goes beside" if beside else llamacpp.INSTALL
        print(f"not verified in llama.cpp: that needs {what}")
    compensated = config.adapter and config.base == "quantized"  # in part: by some columns a linear
    near = verification.QUANTIZED if compensated else merging.near(opened, config.base)
    common = _asked(opened, config, near)
    for file, target, kind in zip(files, targets, config.quants, strict=True):
        check = common.copy()
        if not config.adapter:
            limits = {verification.MERGED: verification.limit_of(kind)}
            check.add(verification.REREAD, verification.of_source(source.resolve(str(file)), check.texts), limits)
        if llamacpp.available() and not beside:
            whole, adapters = (opened.source.files[0], [(file, 1.0)]) if config.adapter else (file, [])
            log_p = verification.of_gguf(whole, check, tokenizer.load(opened.source), adapters, config.threads)
            reread = verification.REREAD in check.names
            limits = {verification.REREAD: verification.READ} if reread else {verification.TRAINED: near}
            check.add("the file, llama.cpp", log_p, limits)
        check.report(target)


def _asked(opened: Opened, config: ExportConfig, near: float) -> verification.Verification:
    """What all files are compared with: the model as trained, and what they are made of."""
    check = verification.in_training(opened.run, config.scale)
    limits = {verification.TRAINED: near}
    if not config.adapter:
        weights = merging.merged(opened.weights, opened.adapter, config.base, opened.bits)
        changed = {name: tensor for name, tensor in weights.items() if tensor is not opened.weights.get(name)}
        check.add(verification.MERGED, verification.of_weights(opened.source, changed, check.texts), limits)
    elif config.base == "original":  # compensated pairs are in the file alone
        check.add(verification.REREAD, verification.of_run(opened.run, config.scale, check.texts), limits)
    return check


def _for_ollama(opened: Opened, target: Path, config: ExportConfig, tag: str | None = None) -> list[str]:
    """Write the Modelfile beside the file, under its name; what there is to say, and the command that takes it. tag: of
    the model in Ollama, where several files are one model's."""
    base, name = opened.source, opened.run.name
    if not config.adapter:
        model, notes = f"./{target.name}", []
    elif base.kind == "gguf" and len(base.files) == 1:
        model, notes = str(base.files[0].resolve()), []
    elif base.kind == "gguf":  # Ollama reads no split GGUF (ollama #5245)
        model, notes = "./BASE.gguf", [f"BASE.gguf: of llama-gguf-split --merge {base.files[0]} BASE.gguf"]
    else:
        model, notes = "./BASE.gguf", [f"BASE.gguf: {base.id} as a GGUF, in any type"]
    family = architectures.for_config(opened.weights.config)
    text, said = ollama.modelfile(
        model,
        tokenizer.load(base),
        family.value(opened.weights.config, "max_position_embeddings"),
        ollama.generation_settings(base),
        adapter=f"./{target.name}" if config.adapter else None,
        chats=_taught_chats(opened),
        notes=notes,
    )
    file = target.with_suffix(".Modelfile")
    durable.write_text(file, text)
    return [*(f"  {line}" for line in said), f"  {ollama.create_line(name, file, tag)}"]
