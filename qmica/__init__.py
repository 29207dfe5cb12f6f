"""qmica from Python: the verbs of the command line, and the pieces that they are made of.

    run = qmica.train(model="7b", data="notes.txt", bits=4, rank=16, epochs=4, out="runs/notes")
    qmica.export(run, "notes.Q4_K_M.gguf", quant="Q4_K_M")

    model, tokenizer = qmica.load("7b", bits=4)
    qmica.attach(model, rank=16, targets="qv")
    qmica.save_adapter(model, "my-adapter")

How: a verb's keyword arguments are the fields of its dataclasses in `config`, whose docstrings (`qmica train --help`)
say what they mean. Importing qmica imports neither torch nor anything that does: each verb imports what it needs when
it is called. An error that the caller can fix is a `QmicaError`; an unknown keyword is a TypeError that names the
nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from qmica.errors import QmicaError

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    from qmica.runs import Run

__all__ = [
    "QmicaError",
    "__version__",
    "attach",
    "chat",
    "eval",
    "export",
    "inspect",
    "load",
    "load_adapter",
    "merge",
    "open_run",
    "plan",
    "save_adapter",
    "train",
]

_FROM_ADAPTER = ("save_adapter", "load_adapter", "open_run")  # the adapter module's own functions, as they are


def __getattr__(name: str) -> Any:
    if name in _FROM_ADAPTER:
        from qmica import adapter

        return getattr(adapter, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("qmica")
    raise AttributeError(f"module 'qmica' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ---- whole jobs


def train(*, resume: str | Path | Run | None = None, **options: Any) -> Run:
    """Train an adapter and return its run.

    options: the fields of ModelConfig, AdapterConfig, DataConfig and TrainingConfig. resume: a run (or its folder, or
    its name under runs/) to continue from its last checkpoint with the options it began with; then no options are
    taken.
    """
    from qmica import config, training

    kinds = (config.ModelConfig, config.AdapterConfig, config.DataConfig, config.TrainingConfig)
    if resume is None:
        return training.train(*_split("train", options, *kinds), None)
    if options:
        raise TypeError(f"train() continues {resume} with the options it began with: leave {', '.join(options)} out")
    from qmica import runs

    folder = resume.folder if isinstance(resume, runs.Run) else runs.find(resume).folder
    return training.train(*(kind() for kind in kinds), folder)


def plan(**options: Any) -> dict:
    """What `train` with the same options will take: memory, disk and time; the numbers of `qmica plan --json`."""
    from qmica import config, planning

    kinds = (config.ModelConfig, config.AdapterConfig, config.DataConfig, config.TrainingConfig)
    return planning.plan(*_split("plan", options, *kinds), False)


def eval(run: str | Path | Run | None = None, **options: Any) -> dict:
    """Perplexity and multiple choice, base against tuned; the numbers of `qmica eval --json`.

    run: None is the newest. options: the fields of EvalConfig; with `model`, and then any field of ModelConfig, that
    model is measured and no run.
    """
    from qmica import config, evaluation

    plan, model = _split("eval", options, config.EvalConfig, config.ModelConfig)
    given = [name for name in options if name in config.ModelConfig.__dataclass_fields__]
    if given and (run is not None or "model" not in given):
        raise TypeError(
            f"eval() measures a run or a model: {', '.join(given)} belongs to model=, and a run brings its own"
        )
    return evaluation.evaluate(_name(run), plan, model if given else None, False)


def export(run: str | Path | Run | None = None, out: str | Path | None = None, **options: Any) -> Path | list[Path]:
    """Write a run as GGUF and return the file, or the files where `quant` names several types ("Q4_K_M,Q8_0") and `out`
    their folder. options: the other fields of ExportConfig (`quant`, `imatrix`, `adapter`, `base`, `scale`).
    """
    from qmica import config, exporting

    (plan,) = _split("export", {**options, "out": out}, config.ExportConfig)
    return exporting.export(_name(run), plan)


def merge(
    run: str | Path | Run | None = None,
    out: str | Path | None = None,
    base: Literal["original", "quantized"] = "original",
    scale: float = 1.0,
    max_shard_size: str | None = None,
    verify: bool = False,
) -> Path:
    """Write the merged model as a safetensors folder and return the folder.

    base: what the adapter is merged into, the 16-bit weights or what training saw of them. scale: how much of it.
    max_shard_size: of a file, None is 5GB. verify: compare what the merged model and the trained one answer.
    """
    from qmica import config, merging

    if base not in ("original", "quantized"):
        raise QmicaError(f"base={base!r}: choose one of 'original', 'quantized'")
    return merging.merge(
        _name(run), None if out is None else Path(out), base, scale, max_shard_size or config.SHARD, verify
    )


def chat(target: str | Path | Run | None = None, **options: Any) -> None:
    """Talk to a run or a GGUF file in the terminal; with `prompt` it answers once. options: those of ChatConfig."""
    from qmica import chatting, config

    (plan,) = _split("chat", options, config.ChatConfig)
    chatting.chat(_name(target), plan)


def inspect(model: str | Path | None = None, **options: Any) -> dict:
    """Singular values, minor subspaces and what quantization does to them; the numbers of `qmica inspect --json`.

    model: as for `qmica inspect`, None is its default. options: the fields of InspectConfig (`rank`, `targets`, `bits`,
    `plot`, ...).
    """
    from qmica import config, spectra

    (plan,) = _split("inspect", options, config.InspectConfig)
    return spectra.inspect(config.ModelConfig().model if model is None else str(model), plan, False)


# ---- pieces


def load(model: str | Path = "smollm2-135m", **options: Any) -> tuple[Module, PreTrainedTokenizerBase]:
    """A transformers model with frozen, quantized linears, and its tokenizer.

    model: as for --model. options: the other fields of ModelConfig (`bits`, `dtype`, `device`, `stream`, `revision`,
    `threads`).
    """
    import torch

    from qmica import config, source, streaming, tokenizer
    from qmica import model as models

    (plan,) = _split("load", {**options, "model": str(model)}, config.ModelConfig)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    found = source.resolve(plan.model, plan.revision)
    loaded = models.load(found, plan.bits, plan.dtype, plan.device, stream=plan.stream)
    return streaming.start(loaded, plan.stream), tokenizer.load(found)


def attach(model: Module, *, seed: int = 0, **options: Any) -> Module:
    """Put an adapter on a transformers model, in place: only the adapter is trained afterwards. Returns the model.

    options: the fields of AdapterConfig (`rank`, `alpha`, `targets`, ...). seed: of random components and LoRA's A.
    """
    from qmica import adapter, config

    (plan,) = _split("attach", options, config.AdapterConfig)
    return adapter.attach(model, plan, seed=seed)


# ---- keyword arguments


def _split(verb: str, options: Mapping[str, Any], *kinds: type) -> list:
    """One dataclass of each kind, its fields taken from `options`. TypeError for a keyword that belongs to none of
    them.
    """
    owner = {name: kind for kind in kinds for name in kind.__dataclass_fields__}
    for name in options:
        if name not in owner:
            from difflib import get_close_matches  # a thirtieth of what --help may take

            near = get_close_matches(name, owner, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else f", which takes {', '.join(owner)}"
            raise TypeError(f"{name} is no argument of qmica.{verb}(){hint}")
    return [kind(**_checked(kind, {k: v for k, v in options.items() if owner[k] is kind})) for kind in kinds]


def _checked(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, a str turned to a Path where the field is one. QmicaError for a value that is not among the field's
    choices.

    The command line has cyclopts for both; a dataclass checks neither.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            raise QmicaError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
    return {k: Path(v) if isinstance(v, str) and Path in get_args(hints[k]) else v for k, v in values.items()}


def _name(run: str | Path | Run | None) -> str | None:
    """What the jobs call a run: its folder, name or file as text, None for the newest."""
    return None if run is None else str(getattr(run, "folder", run))
