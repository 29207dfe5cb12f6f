"""The command line: verbs, flags made from `config`, `-c file`, and what each outcome's exit status is.

    0 done · 1 you can fix it (one line, no traceback) · 2 usage · 70 a bug (traceback) · 130 interrupted

How: cyclopts turns the fields of the dataclasses into flags and their docstrings into --help. A `-c` file gives the
flags that the command line left out: it is read after the command line and before the conversion, so that both go
through the same checks. Each verb imports what it needs inside itself, so that --help takes 0.2 s and no torch.

What it gives up: abbreviated flags, and environment variables as flags.
"""

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter, Token, UnusedCliTokensError

from qmica.config import (
    SHARD,
    AdapterConfig,
    ChatConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    ModelConfig,
    TrainingConfig,
)
from qmica.errors import QmicaError

DONE, FIXABLE, USAGE, BUG, INTERRUPTED = 0, 1, 2, 70, 130

Run = Annotated[str | None, Parameter(name="RUN")]
Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
ConfigFile = Annotated[
    Path | None,
    Parameter(
        name=("--config", "-c"),
        help="Flags from a YAML or JSON file, a run's config.json among them; a flag given here beats the file.",
    ),
]

# frozen, so that one of each can be the default of every call
_MODEL, _ADAPTER, _DATA, _TRAINING = ModelConfig(), AdapterConfig(), DataConfig(), TrainingConfig()
_EVAL, _EXPORT, _CHAT, _INSPECT = EvalConfig(), ExportConfig(), ChatConfig(), InspectConfig()


def _version() -> str:
    from importlib.metadata import version

    return version("qmica")


def _shown(default: object) -> str | None:
    """A default as --help says it; what being left out means is said in words."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or None
    return None if default is None else str(default)


def _examples(*lines: str) -> str:
    return "\n".join(("Examples:", *(f"  {line}" for line in lines)))


app = App(
    name="qmica",
    help="Teach a language model new knowledge on the machine you already own: from a text file to a GGUF.",
    help_epilogue=_examples(
        "qmica train --model 7b --bits 4 --data notes.txt",
        "qmica export --quant Q4_K_M",
        "qmica COMMAND --help",
    ),
    version=_version,
    suppress_keyboard_interrupt=False,  # cyclopts would exit without a word
    help_format="plaintext",  # 60 ms less than Markdown, which would also read runs/<model> as HTML
    default_parameter=Parameter(negative_iterable=(), show_default=_shown),
)


# ---- verbs, in the order of use


@app.command(
    sort_key=1,
    help_epilogue=_examples(
        "qmica train",
        "qmica train --model 7b --bits 4 --data notes.txt",
        "qmica train -m model.Q4_K_M.gguf --bits gguf -d chats.jsonl -r 32",
        "qmica train -c runs/notes/config.json --seed 1 --out runs/notes-seed-1",
        "qmica train --resume runs/notes",
    ),
)
def train(
    *,
    model: ModelConfig = _MODEL,
    adapter: AdapterConfig = _ADAPTER,
    data: DataConfig = _DATA,
    training: TrainingConfig = _TRAINING,
    resume: Path | None = None,
    config_file: ConfigFile = None,
) -> None:
    """Train a model on text or chats: the result is a run folder with an adapter in it.

    Parameters
    ----------
    resume: Path
        A run to continue from its last checkpoint, with the flags it began with; it takes no other flag.
    """
    if resume is not None:
        from qmica import runs

        resume = runs.find(resume).folder
    from qmica import training as job

    job.train(model, adapter, data, training, resume)


@app.command(
    sort_key=2,
    help_epilogue=_examples(
        "qmica plan",
        "qmica plan --model 7b --memory 8GB --max-seq-length 2048",
        "qmica plan -m Qwen/Qwen2.5-7B -d notes.txt --no-grad-checkpoint --json",
        "qmica plan -c runs/notes/config.json --bits 8",
    ),
)
def plan(
    *,
    model: ModelConfig = _MODEL,
    adapter: AdapterConfig = _ADAPTER,
    data: DataConfig = _DATA,
    training: TrainingConfig = _TRAINING,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Say what training with these flags takes: memory, disk and time. Nothing is loaded or downloaded.

    Parameters
    ----------
    as_json: bool
        Print the numbers as JSON.
    """
    from qmica import planning

    planning.plan(model, adapter, data, training, as_json)


@app.command(
    sort_key=3,
    help_epilogue=_examples(
        "qmica eval",
        "qmica eval runs/notes --data held-out.txt --questions questions.jsonl --json",
        "qmica eval --gguf notes.Q4_K_M.gguf --gguf base.gguf+notes.adapter.gguf",
        "qmica eval --model 7b --data held-out.txt",
    ),
)
def eval(
    run: Run = None,
    /,
    *,
    config: EvalConfig = _EVAL,
    model: ModelConfig | None = None,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure perplexity and multiple choice, the base against what was trained.

    Parameters
    ----------
    run: str
        A run folder, an adapter folder or a name under runs/; left out: the newest run.
    as_json: bool
        Print the numbers as JSON.
    """
    from qmica import evaluation

    evaluation.evaluate(run, config, model, as_json)


@app.command(
    sort_key=4,
    help_epilogue=_examples(
        "qmica chat",
        'qmica chat runs/notes/notes.Q4_K_M.gguf --prompt "Who keeps the lighthouse?"',
        'qmica chat runs/notes --raw --prompt "The lighthouse is kept by"',
        "qmica chat base.gguf --adapter notes.adapter.gguf --temp 0.7",
    ),
)
def chat(
    target: Annotated[str | None, Parameter(name="RUN|FILE.gguf")] = None,
    /,
    *,
    config: ChatConfig = _CHAT,
    config_file: ConfigFile = None,
) -> None:
    """Talk to a run or to a GGUF file. Ctrl-C stops the answer, not the program.

    Parameters
    ----------
    target: str
        A run folder, an adapter folder, a name under runs/, or a GGUF file; left out: the newest run.
    """
    from qmica import chatting

    chatting.chat(target, config)


@app.command(
    sort_key=5,
    help_epilogue=_examples("qmica merge", "qmica merge runs/notes --out notes-merged --base quantized"),
)
def merge(
    run: Run = None,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    base: Literal["original", "quantized"] = "original",
    scale: float = 1.0,
    max_shard_size: str = SHARD,
    verify: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write the merged model as a folder of safetensors.

    Parameters
    ----------
    run: str
        A run folder, an adapter folder or a name under runs/; left out: the newest run.
    out: Path
        The folder; left out: RUN/merged.
    base: str
        What the adapter is merged into: the 16-bit weights, or what training saw of them.
    scale: float
        How much of the adapter is used: below 1 less is forgotten, and less is known.
    max_shard_size: str
        Largest file of the folder: 5GB, 900MB.
    verify: bool
        Compare what the merged model and the one that was trained answer.
    """
    from qmica import merging

    merging.merge(run, out, base, scale, max_shard_size, verify)


@app.command(
    sort_key=6,
    help_epilogue=_examples(
        "qmica export --quant Q4_K_M",
        "qmica export --quant Q4_K_M,Q8_0 --imatrix model.imatrix.gguf",
        "qmica export runs/notes --adapter --out notes.adapter.gguf",
    ),
)
def export(
    run: Run = None,
    /,
    *,
    config: ExportConfig = _EXPORT,
    config_file: ConfigFile = None,
) -> None:
    """Write a GGUF for llama.cpp and Ollama: the merged model, or the adapter alone.

    Parameters
    ----------
    run: str
        A run folder, an adapter folder or a name under runs/; left out: the newest run.
    """
    from qmica import exporting

    exporting.export(run, config)


@app.command(
    sort_key=7,
    help_epilogue=_examples(
        "qmica inspect",
        "qmica inspect 7b --targets attn --bits 4 --rank 32",
        "qmica inspect model.Q8_0.gguf --plot pictures --json",
    ),
)
def inspect(
    model: Annotated[str, Parameter(name="MODEL")] = _MODEL.model,
    /,
    *,
    config: InspectConfig = _INSPECT,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Show how small the minor singular values of a model's weights are, and where quantization moves their subspaces.

    Parameters
    ----------
    model: str
        An alias (see `qmica models`), a hub id, a folder of safetensors, or a GGUF file.
    as_json: bool
        Print the numbers as JSON.
    """
    from qmica import spectra

    spectra.inspect(model, config, as_json)


@app.command(sort_key=8, help_epilogue=_examples("qmica models", "qmica models --json"))
def models(*, as_json: Json = False) -> None:
    """List the models that have a short name, and what is on this disk.

    Parameters
    ----------
    as_json: bool
        Print the list as JSON.
    """
    from qmica import inventory

    found = inventory.models()
    print(json.dumps(found, indent=2)) if as_json else inventory.show(found)


@app.command(sort_key=9, help_epilogue=_examples("qmica doctor", "qmica doctor --json"))
def doctor(*, as_json: Json = False) -> None:
    """Say what this machine can do: versions, devices, memory, and whether each engine really works.

    Parameters
    ----------
    as_json: bool
        Print the findings as JSON.
    """
    from qmica import doctor as job

    found = job.examine()
    print(json.dumps(found, indent=2)) if as_json else job.show(found)
    job.require_working(found)


# ---- -c file


def _complete(_, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """After the command line is read and before it is converted: add the -c file, refuse what clashes."""
    if not commands:
        return
    file = next((argument for argument in arguments if argument.name == "--config" and argument.tokens), None)
    if file is not None:
        _fill(Path(file.tokens[-1].value), commands[-1], arguments)
    if commands[-1] in _RULES:
        _RULES[commands[-1]]([argument.name for argument in arguments if argument.tokens])


def _fill(path: Path, verb: str, arguments: ArgumentCollection) -> None:
    """Give every flag that the command line left out the value that the file has for it."""
    fields = [argument for argument in arguments if argument.keys]  # the fields of dataclasses, and nothing else
    named = {_key(name): argument for argument in fields for name in argument.parameter.name}
    seen: dict[str, str] = {}
    for key, value in read_flags(path, verb).items():
        argument = named.get(_key(key))
        if argument is None:
            raise QmicaError(_unknown(path, key, verb, named))
        if argument.name in seen:
            raise QmicaError(f"-c {path}: {seen[argument.name]} and {key} are the same flag: leave one out")
        seen[argument.name] = key
        tokens = _tokens(path, key, value, argument)
        if not argument.tokens:  # flag > file
            argument.tokens.extend(tokens)


def _resume_alone(given: list[str]) -> None:
    others = ", ".join(name for name in given if name != "--resume")
    if "--resume" in given and others:
        raise CycloptsError(f"--resume continues with the flags the run began with: leave {others} out.")


def _run_or_model(given: list[str]) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in ModelConfig.__dataclass_fields__]
    others = ", ".join(name for name in given if name in flags)
    if others and "RUN" in given:
        raise CycloptsError(f"a run brings its own model: leave {others} out, or RUN.")
    if others and "--model" not in given:
        raise CycloptsError(f"{others} belongs to --model, and a run brings its own: name a --model too.")


_RULES = {"train": _resume_alone, "eval": _run_or_model}


def _key(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def _unknown(path: Path, key: str, verb: str, named: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(_key(key), list(named), n=1, cutoff=0.5)
    hint = f": did you mean {near[0].replace('-', '_')}?" if near else f": see qmica {verb} --help"
    return f"-c {path}: unknown key {key}{hint}"


def _tokens(path: Path, key: str, value: object, argument) -> list[Token]:
    """The value as the command line would spell it: a word each. No words where it is null or empty."""
    many = get_origin(argument.hint) is tuple
    boolean = bool in (argument.hint, *get_args(argument.hint))  # bool, or bool | None
    words = list(value) if isinstance(value, list | tuple) else [value]
    if value is None and argument.field_info.default is not None:
        raise QmicaError(f"-c {path}: {key} has no value: give one or leave the key out")
    if len(words) != 1 and not many:
        raise QmicaError(f"-c {path}: {key} takes one value, not a list of {len(words)}")
    for word in words:
        if isinstance(word, dict | list) or (isinstance(word, bool) and not boolean):
            raise QmicaError(f"-c {path}: {key}: {json.dumps(word, default=str)} is not a value for --{_key(key)}")
    return [
        Token(keyword=key, value=str(word), source=str(path), index=index)
        for index, word in enumerate(words)
        if word is not None
    ]


def read_flags(path: Path, verb: str) -> dict[str, object]:
    """The flags in a YAML or JSON file: the mapping under the verb's name where there is one (a run's config.json),
    else all of it.

    Raises QmicaError for a file that cannot be read, is no mapping, or has mappings for other verbs only.
    """
    values = _parsed(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise QmicaError(f"-c {path} holds a {type(values).__name__}: give lines of `flag: value`")
    named = {str(key): value for key, value in values.items()}
    mine = next((name for name in (verb, _LIKE.get(verb)) if isinstance(named.get(name), dict)), None)
    if mine is not None:
        return {str(key): value for key, value in named[mine].items()}
    others = [key for key, value in named.items() if key in app and isinstance(value, dict)]
    if others:
        raise QmicaError(f"-c {path} has flags for {', '.join(others)} and none for {verb}")
    return named


_LIKE = {"plan": "train"}  # a verb that takes another one's flags from a file


def _parsed(path: Path) -> object:
    import yaml

    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QmicaError(f"-c {path} cannot be read ({error.strerror}): give a YAML or JSON file of flags") from error
    except Exception as error:  # PyYAML raises KeyError, IndexError and AttributeError too, all about the file
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: {error.problem}" if mark else str(error)
        language = "JSON" if read is json.loads else "YAML"
        raise QmicaError(f"-c {path} is not valid {language} ({_one_line(where)}): correct it") from error


app.config = (_complete,)


# ---- outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (None: the process's own) and return its exit status, whatever was raised."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # at 700 new objects a time, looking for cycles in what torch and transformers import is 1 of 6 s of a start
    gc.set_threshold(50_000, 20, 100)
    try:
        app(words, print_error=False, exit_on_error=False, result_action="return_value")
        sys.stdout.flush()  # a closed pipe shows here and not at the interpreter's end
    except CycloptsError as error:
        return _usage(error)
    except QmicaError as error:
        return _say(error, FIXABLE)
    except KeyboardInterrupt as stop:
        kept = str(stop) or "nothing new was kept"  # a job that kept something says so in what it raises
        return _say(f"interrupted: {kept}", INTERRUPTED)
    except BrokenPipeError:  # `qmica models | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at the end
        return FIXABLE
    except Exception:
        traceback.print_exc()
        return _say("this is a bug in qmica: please report it with the lines above and what `qmica doctor` says", BUG)
    return DONE


def _usage(error: CycloptsError) -> int:
    """A wrong command line; a value of the wrong type in a -c file is something to fix in that file."""
    source = getattr(getattr(error, "token", None), "source", "cli")
    if source not in ("", "cli"):
        return _say(f"-c {source}: {str(error).replace(f' from {source}', '')}", FIXABLE)
    text = f"unexpected {' '.join(error.unused_tokens)}." if isinstance(error, UnusedCliTokensError) else error
    return _say(f"{text} See qmica {' '.join((*(error.command_chain or ()), '--help'))}.", USAGE)


def _say(text: object, status: int) -> int:
    print(f"qmica: {_one_line(text)}", file=sys.stderr)
    return status


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
