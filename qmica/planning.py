"""What a training run will take, before anything is loaded or downloaded: memory, disk and time.

How: everything follows from shapes. The model is made on the meta device from its config.json; what the files hold
comes from their headers, which for a hub id that is not on this disk are read by range requests and kept nowhere.
Memory is `memory.plan`, the plan that `train` makes too; the longest row that fits is found by halving over that plan.
Time is the work of a batch over rates that two seconds of calibration give.

What it gives up: the header of a GGUF that is on the hub only; and the tokens of data that are not on this disk, or
that a tokenizer which is not on this disk would make: then the time is that of a step.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qmica import (
    adapter,
    allocator,
    architectures,
    budget,
    data,
    durable,
    ggml,
    memory,
    model,
    pace,
    packing,
    progress,
    quant,
    source,
    tokenizer,
)
from qmica import weights as files
from qmica.config import AdapterConfig, DataConfig, Job, ModelConfig, TrainingConfig
from qmica.durable import size_text

EXPORTS = ("Q4_K_M", "Q8_0", "F16")
WORD_BYTES = 40  # of a GGUF's metadata a token: 1.9 MB for SmolLM2's 49,152, 6 MB for Qwen2.5's 151,936


def plan(
    model_config: ModelConfig = ModelConfig(),
    adapter_config: AdapterConfig = AdapterConfig(),
    data_config: DataConfig = DataConfig(),
    training_config: TrainingConfig = TrainingConfig(),
    as_json: bool = False,
) -> dict:
    """What `train` with the same options will take, printed and returned: the numbers of `qmica plan --json`.

    Raises QmicaError as `train` does: for a model, targets or data that it would not take.
    """
    job = Job(model_config, adapter_config, data_config, training_config)
    if job.model.threads:
        torch.set_num_threads(job.model.threads)
    allocator.keep_freed()  # as in training, whose speed is estimated
    device = model.choose_device(job.model.device)
    model.require_stream(job.model.stream, device)
    compute = model.choose_dtype(job.model.dtype, device)
    model.require_dtype(compute, device)
    headers, empty = _opened(job.model, compute)
    model.require_blocks(job.model.bits, headers)
    adapter.choose(empty, job.adapter)
    known = _known_data(job, headers)
    case = memory.Case.of(job, headers, empty, known.rows, compute, device)
    nbytes = budget.allowed(job.training.memory_bytes, device)
    choice = budget.choose(case, nbytes, job.training.grad_checkpoint)
    found = {
        "model": {"id": headers.source.id, "parameters": empty.num_parameters(), "on_disk": not headers.download},
        "memory": _memory(case, choice, nbytes, job.training),
        "disk": _disk(case, headers),
        "time": _time(choice, known, job),
    }
    print(json.dumps(found, indent=2)) if as_json else _show(found, choice, known)
    return found


def _opened(options: ModelConfig, compute: torch.dtype) -> tuple[source.Headers, nn.Module]:
    """What the model's headers say, and the model on the meta device."""
    found = source.look(options.model, options.revision)
    if isinstance(found, source.Source):
        weights, empty = files.open_weights(found), model.on_meta(model.read_config(found), compute)
        model.require_whole(empty, weights, found)
        return files.headers_of(found, weights), empty
    with TemporaryDirectory(prefix="qmica-plan-") as folder:
        headers = found.headers(Path(folder))
        return headers, model.on_meta(model.read_config(headers.source), compute)


# ---- the data, where they can be known


@dataclass(frozen=True)
class Known:
    """The longest batch's rows; where the data were read: tokens (with padding) and labels of a batch on average, and
    how many batches the run has (None: not known).
    """

    rows: memory.Rows
    tokens: float
    supervised: float
    batches: int | None
    why_not: str = ""


def _known_data(job: Job, headers: source.Headers) -> Known:
    """What the run's batches are, from the data if both they and the tokenizer are on this disk."""
    why = _unread(job.data, headers)
    if why:
        rows = memory.Rows(job.training.batch_size, job.data.max_seq_length, job.data.packing)
        return Known(rows, rows.tokens, rows.tokens, _batches(job, None), why)
    prepared = data.prepare_for(job.data, tokenizer.load(headers.source), job.training.seed, lambda text: None)
    epoch = data.epoch(prepared, job.data, job.training)
    rows = memory.Rows.of(packing.longest(epoch))
    share = prepared.summary.supervised / prepared.summary.tokens
    count = len(epoch)
    return Known(rows, epoch.positions() / count, epoch.tokens() / count * share, _batches(job, count))


def _unread(options: DataConfig, headers: source.Headers) -> str:
    """Why the data's tokens cannot be counted, "" where they can."""
    if headers.download:
        return "its tokenizer is not on this disk"
    distant = [name for name in (*options.data, *options.replay) if name != "sample" and not os.path.exists(name)]
    return f"{distant[0]} is not on this disk" if distant else ""


def _batches(job: Job, in_epoch: int | None) -> int | None:
    """How many batches the run computes, as training.Loop counts them for one process."""
    if job.training.steps:
        return job.training.steps * job.training.grad_accum
    return None if in_epoch is None else max(1, round(job.training.epochs * in_epoch))


# ---- memory


def _memory(case: memory.Case, choice: budget.Choice, nbytes: int, options: TrainingConfig) -> dict:
    """Bytes by part, the budget, what it was met with, and the longest row that could be."""
    limit = getattr(case.config, "max_position_embeddings", None) or case.rows.length

    def fits(length: int) -> bool:
        least = budget.least(case.over(length), options.grad_checkpoint)
        return memory.plan(least).total <= nbytes

    return {
        "parts": {name: round(size) for name, size in choice.plan.parts.items()},
        "total": round(choice.plan.total),
        "mapped": round(memory.mapped_bytes(case)),
        "budget": nbytes,
        "budget_is": "--memory" if options.memory else f"most of what is free on {case.device}",
        "fits": choice.fits,
        "met_by": str(choice),
        "rows": case.rows.count,
        "length": case.rows.length,
        "longest": memory.longest(fits, limit),
        "context": limit,
    }


# ---- disk


def _disk(case: memory.Case, headers: source.Headers) -> dict[str, int]:
    """Bytes on the disk: what is fetched, and what each verb may write."""
    shapes = {name: tuple(parameter.shape) for name, parameter in case.model.named_parameters()}
    exports = {f"export {quant}": _export_bytes(quant, shapes, case.config) for quant in EXPORTS}
    return {
        "download": headers.download,
        "quantized cache": round(memory.weights_bytes(case)) if memory.cached(case.bits, case.packed) else 0,
        "adapter": round(memory.PARTS["A"](case) + memory.PARTS["B"](case)),
        "merged": 2 * sum(math.prod(shape) for shape in shapes.values()),
        **exports,
    }


def _export_bytes(quant: str, shapes: dict[str, tuple[int, ...]], config) -> int:
    """Bytes of the merged model as a GGUF: each tensor in the type that `export` gives it, and the vocabulary."""
    family = architectures.for_config(config)
    named = {family.gguf_name(name): shape for name, shape in shapes.items()}
    types = ggml.mix(quant, named, family.name)
    tensors = (math.prod(shape[:-1]) * ggml.row_bytes(shape[-1], types[name]) for name, shape in named.items())
    return sum(tensors) + WORD_BYTES * config.vocab_size


# ---- time


def _time(choice: budget.Choice, known: Known, job: Job) -> dict:
    """Seconds by kind of work, a step and the run; and the rates they follow from."""
    case, parts = choice.case, choice.parts
    rates = pace.calibrate(case)
    share = known.tokens / known.rows.tokens  # the average batch against the longest
    part = pace.seconds(pace.Step(case, round(known.supervised / share / parts)), rates)
    batch = {kind: parts * taken for kind, taken in part.items()}
    total = share * sum(batch.values())
    window = min(job.training.grad_accum, known.batches or job.training.grad_accum)
    return {
        "rates": rates,
        "work": {kind: share * taken for kind, taken in batch.items()},
        "batch": total,
        "step": total * window,
        "batches": known.batches,
        "run": None if known.batches is None else total * known.batches,
    }


# ---- what is printed


def _show(found: dict, choice: budget.Choice, known: Known) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    tell: Callable[[str], None] = lambda text: console.print(text, soft_wrap=True, highlight=False)  # noqa: E731
    held, disk, times = found["memory"], found["disk"], found["time"]
    tell(f"{found['model']['id']}: {found['model']['parameters']:,} weights, {_how(choice.case)}")
    tell(f"rows: {held['rows']} x {held['length']} tokens{f' ({known.why_not})' if known.why_not else ''}")
    rows = [(name, size) for name, size in held["parts"].items() if size]
    console.print(_table("memory", [*rows, ("total", held["total"])]))
    tell(_verdict(held))
    console.print(_table("disk", [(name, size) for name, size in disk.items() if size]))
    place = Path.cwd()
    tell(f"{size_text(durable.free_space(place))} are free at {place}")
    tell(_pace_text(times, known))
    tell("Next: the same flags after `qmica train`.")


def _how(case: memory.Case) -> str:
    dtype = str(case.compute).removeprefix("torch.")
    return f"held {quant.FORMATS[case.bits].held}, computing in {dtype} on {case.device}"


def _verdict(held: dict) -> str:
    """Whether it fits, and how long rows may be."""
    said = f"{'fits' if held['fits'] else 'does not fit'} into {size_text(held['budget'])} ({held['budget_is']})"
    said = f"{held['met_by']}: {said}"
    if held["mapped"]:
        said = f"{size_text(held['mapped'])} of weights are mapped from the disk and not counted; {said}"
    if not held["longest"]:
        return (
            f"{said}: not even with the shortest rows; a smaller --model, fewer --bits or a smaller --rank takes less"
        )
    whole = ", all that the model was made for" if held["longest"] == held["context"] else ""
    return f"{said}; --max-seq-length up to {held['longest']:,} does{whole}"


def _table(title: str, rows: list[tuple[str, float]]) -> Table:
    table = Table(title, "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in rows:
        table.add_row(name, size_text(size))
    return table


def _pace_text(times: dict, known: Known) -> str:
    kinds = ", ".join(f"{kind} {taken / times['batch']:.0%}" for kind, taken in times["work"].items())
    step = f"{times['step']:.2g} s" if times["step"] < 10 else progress.duration(times["step"])
    said = f"time: about {step} a step ({kinds})"
    if times["run"] is None:
        return f"{said}; for the whole run give --steps, as {known.why_not}"
    return f"{said}, {progress.duration(times['run'])} in all"
