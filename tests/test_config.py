"""Every flag and its default, as a literal table; and what the dataclasses refuse."""

import ast
import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from qmica import cli, config, ggml
from qmica.config import (
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

DEFAULTS = {
    ModelConfig: {
        "--model": "smollm2-135m",
        "--revision": None,
        "--bits": 4,
        "--dtype": "auto",
        "--device": "auto",
        "--stream": "none",
        "--threads": None,
    },
    AdapterConfig: {
        "--rank": 16,
        "--alpha": None,
        "--dropout": 0.0,
        "--targets": "all",
        "--method": "mica",
        "--components": "minor",
        "--subspace-from": "quantized",
    },
    DataConfig: {
        "--data": (),
        "--format": "auto",
        "--max-seq-length": 1024,
        "--packing": True,
        "--mask-prompt": True,
        "--val-split": 0.0,
        "--replay": (),
        "--replay-ratio": 0.25,
        "--replay-target": "base",
        "--replay-weight": 1.0,
    },
    TrainingConfig: {
        "--lr": 1e-3,
        "--epochs": 4.0,
        "--steps": None,
        "--batch-size": 1,
        "--grad-accum": 1,
        "--optimizer": "auto",
        "--schedule": "cosine",
        "--warmup": 0.1,
        "--weight-decay": 0.01,
        "--clip": 1.0,
        "--memory": None,
        "--grad-checkpoint": None,
        "--compile": False,
        "--eval-every": 0,
        "--save-every": 100,
        "--out": None,
        "--seed": 0,
        "--report-to": "none",
        "--probe": None,
    },
    ExportConfig: {
        "--out": None,
        "--quant": None,
        "--imatrix": None,
        "--adapter": False,
        "--base": "original",
        "--scale": 1.0,
        "--max-shard-size": None,
        "--ollama": False,
        "--verify": False,
        "--threads": None,
    },
    EvalConfig: {
        "--data": (),
        "--questions": None,
        "--max-seq-length": 512,
        "--free": 0,
        "--limit": None,
        "--scale": 1.0,
        "--gguf": (),
    },
    ChatConfig: {
        "--prompt": None,
        "--raw": False,
        "--system": None,
        "--adapter": None,
        "--scale": 1.0,
        "--temp": 0.0,
        "--ctx": 4096,
        "--max-tokens": 256,
        "--seed": 0,
        "--threads": None,
    },
    InspectConfig: {
        "--revision": None,
        "--rank": 16,
        "--targets": "all",
        "--bits": (4, 8),
        "--plot": None,
        "--device": "auto",
        "--threads": None,
    },
}
ALIASES = {
    "--model": ("-m",),
    "--rank": ("-r", "--lora-r"),
    "--targets": ("--target-modules",),
    "--data": ("-d", "--dataset"),
    "--max-seq-length": ("--cutoff-len",),
    "--lr": ("--learning-rate",),
    "--epochs": ("--num-epochs",),
    "--steps": ("--iters", "--max-steps"),
    "--batch-size": ("--micro-batch-size",),
    "--grad-accum": ("--gradient-accumulation-steps",),
    "--out": ("-o",),
    "--config": ("-c",),
}
VERBS = {
    "train": (ModelConfig, AdapterConfig, DataConfig, TrainingConfig),
    "eval": (EvalConfig, ModelConfig),
    "chat": (ChatConfig,),
    "export": (ExportConfig,),
    "inspect": (InspectConfig,),
}


def help_of(verb: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")  # a line a flag
    assert cli.main([verb, "--help"]) == 0
    return capsys.readouterr().out


def line_of(flag: str, text: str) -> str:
    lines = [line for line in text.splitlines() if re.match(rf"│ {flag}[ ,]", line)]
    assert len(lines) == 1, f"{flag} stands in {len(lines)} lines of --help"
    return lines[0]


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_default(kind):
    found = {f"--{f.name.replace('_', '-')}": f.default for f in dataclasses.fields(kind)}
    print(*(f"{name} {value}" for name, value in found.items()), sep="\n")
    assert found == DEFAULTS[kind]
    assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in DEFAULTS[kind].items()}


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_flag_with_its_default(verb, capsys, monkeypatch):
    text = help_of(verb, capsys, monkeypatch)
    for kind in VERBS[verb]:
        for flag, default in DEFAULTS[kind].items():
            shown = re.findall(r"\[default: (.*?)\]", line_of(flag, text))
            words = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert shown == ([] if default in (None, ()) else [words]), (flag, shown)


@pytest.mark.parametrize("flag", [flag for flag in ALIASES if flag != "--config"])
def test_help_of_train_shows_the_aliases(flag, capsys, monkeypatch):
    line = line_of(flag, help_of("train", capsys, monkeypatch))
    assert set(ALIASES[flag]) <= set(line.split())


def test_help_has_no_flag_that_the_table_lacks(capsys, monkeypatch):
    text = help_of("train", capsys, monkeypatch).split("Examples:")[0]
    known = {flag for kind in VERBS["train"] for flag in DEFAULTS[kind]} | {"--resume", "--config", "--no-packing"}
    known |= {alias for row in ALIASES.values() for alias in row} | {"--no-mask-prompt", "--no-grad-checkpoint"}
    columns = [line.split("  ")[0] for line in text.splitlines() if line.startswith("│ -")]
    assert {word for column in columns for word in column.split() if word.startswith("-")} - known == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_stands_under_the_field(verb, capsys, monkeypatch):
    """The docstrings, read from the source by ast, against the words that --help prints."""
    text = help_of(verb, capsys, monkeypatch)
    classes = {
        node.name: node
        for node in ast.parse(Path(config.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    for kind in VERBS[verb]:
        body = classes[kind.__name__].body
        said = {
            field.target.id: following.value.value
            for field, following in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr)
        }
        assert set(said) == set(kind.__dataclass_fields__), f"a field of {kind.__name__} has no docstring"
        for name, words in said.items():
            assert " ".join(words.split()) in line_of(f"--{name.replace('_', '-')}", text)


REFUSED = [
    (EvalConfig, {"scale": 0.0}, "--scale 0.0: give more than 0"),
    (ExportConfig, {"scale": float("inf")}, "--scale inf: give more than 0"),
    (ChatConfig, {"scale": -1.0}, "--scale -1.0: give more than 0"),
    (ModelConfig, {"threads": 0}, "--threads 0: give 1 or more"),
    (AdapterConfig, {"rank": 0}, "--rank 0: give 1 or more"),
    (AdapterConfig, {"alpha": -1.0}, "--alpha -1.0: give more than 0"),
    (AdapterConfig, {"alpha": float("nan")}, "--alpha nan: give more than 0"),
    (AdapterConfig, {"dropout": 1.0}, "--dropout 1.0: give 0 or more and less than 1"),
    (AdapterConfig, {"method": "lora", "components": "major"}, "--components major: --method lora has no"),
    (AdapterConfig, {"method": "lora", "subspace_from": "original"}, "--subspace-from original: there is no subspace"),
    (
        AdapterConfig,
        {"components": "random", "subspace_from": "original"},
        "--subspace-from original: there is no subspace to compute with --method mica --components random",
    ),
    (DataConfig, {"max_seq_length": 7}, "--max-seq-length 7: give 8 or more"),
    (DataConfig, {"val_split": 1}, "--val-split 1: give 0 or more and less than 1"),
    (DataConfig, {"replay_ratio": 0}, "--replay-ratio 0: give more than 0 and less than 1"),
    (DataConfig, {"replay": "a.txt", "replay_weight": 0}, "--replay-weight 0: give more than 0"),
    (
        DataConfig,
        {"replay_weight": 2.0},
        "--replay-target and --replay-weight are for --replay: name a text, or `--replay sample`",
    ),
    (
        DataConfig,
        {"replay": "a.txt", "replay_target": "text", "replay_weight": 2.0},
        "--replay-weight 2.0: --replay-target text learns it like the data, leave one out",
    ),
    (TrainingConfig, {"lr": 0.0}, "--lr 0.0: give more than 0"),
    (TrainingConfig, {"lr": float("inf")}, "--lr inf: give more than 0"),
    (TrainingConfig, {"epochs": 0}, "--epochs 0: give more than 0"),
    (TrainingConfig, {"steps": 0}, "--steps 0: give 1 or more"),
    (TrainingConfig, {"batch_size": 0}, "--batch-size 0: give 1 or more"),
    (TrainingConfig, {"grad_accum": -1}, "--grad-accum -1: give 1 or more"),
    (TrainingConfig, {"warmup": 1.0}, "--warmup 1.0: give 0 or more and less than 1"),
    (TrainingConfig, {"weight_decay": -0.1}, "--weight-decay -0.1: give 0 or more"),
    (TrainingConfig, {"clip": float("nan")}, "--clip nan: give 0 or more"),
    (TrainingConfig, {"eval_every": -1}, "--eval-every -1: give 0 or more"),
    (TrainingConfig, {"save_every": -1}, "--save-every -1: give 0 or more"),
    (ExportConfig, {"quant": "Q4_K_X"}, "--quant Q4_K_X: choose one of F32, F16"),
    (ExportConfig, {"max_shard_size": "3 apples"}, "--max-shard-size 3 apples: give a size such as 5GB or 900MB"),
    (
        ExportConfig,
        {"max_shard_size": "1GB", "ollama": True},
        "--ollama takes one file, and --max-shard-size makes parts",
    ),
    (ExportConfig, {"quant": "Q8_0,Q4_K_X,"}, "--quant Q4_K_X, '': choose one of F32, F16"),
    (ExportConfig, {"quant": "Q8_0,q8_0"}, "--quant Q8_0,Q8_0: name each type once"),
    (
        ExportConfig,
        {"quant": "Q8_0,F16", "out": Path("a.gguf")},
        "--out a.gguf is one file, and --quant Q8_0,F16 makes 2: name a folder",
    ),
    (
        ExportConfig,
        {"quant": "Q8_0,F16", "imatrix": Path("i.gguf")},
        "--imatrix changes nothing in Q8_0,F16: leave it out",
    ),
    (
        ExportConfig,
        {"adapter": True, "imatrix": Path("i.gguf")},
        "--imatrix changes nothing in an adapter: leave it out",
    ),
    (
        ExportConfig,
        {"adapter": True, "max_shard_size": "1GB"},
        "--max-shard-size is for merged models, and llama.cpp reads an adapter from one file: leave it out",
    ),
    (
        ExportConfig,
        {"quant": "Q8_0,F16", "max_shard_size": "1GB"},
        "--max-shard-size takes one type, and --quant Q8_0,F16 names 2: name one",
    ),
    (ExportConfig, {"threads": -2}, "--threads -2: give 1 or more"),
    (EvalConfig, {"max_seq_length": 2}, "--max-seq-length 2: give 8 or more"),
    (EvalConfig, {"limit": 0}, "--limit 0: give 1 or more"),
    (EvalConfig, {"free": -1}, "--free -1: give 0 or more"),
    (ChatConfig, {"temp": -0.5}, "--temp -0.5: give 0 or more"),
    (ChatConfig, {"ctx": 0}, "--ctx 0: give 1 or more"),
    (ChatConfig, {"max_tokens": 0}, "--max-tokens 0: give 1 or more"),
    (ChatConfig, {"threads": 0}, "--threads 0: give 1 or more"),
    (InspectConfig, {"rank": 0}, "--rank 0: give 1 or more"),
    (InspectConfig, {"bits": (4, 16)}, "--bits 4 16: choose 4, 8 or both"),
    (InspectConfig, {"bits": ()}, "--bits : choose 4, 8 or both"),
    (InspectConfig, {"threads": 0}, "--threads 0: give 1 or more"),
]


@pytest.mark.parametrize("kind, values, text", REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_refused(kind, values, text):
    with pytest.raises(QmicaError, match=f"^{re.escape(text)}"):
        kind(**values)


def test_all_problems_are_named_at_once():
    with pytest.raises(QmicaError, match=r"^--lr -1: .*; --clip -2: .*; --save-every -3: "):
        TrainingConfig(lr=-1, clip=-2, save_every=-3)


def test_one_path_or_several():
    assert DataConfig(data="notes.txt").data == ("notes.txt",)
    assert DataConfig(data=[Path("a"), "b"], replay=Path("c")) == DataConfig(data=("a", "b"), replay=("c",))
    assert EvalConfig(data=Path("a")).data == ("a",)


def test_one_number_of_bits_or_several():
    assert InspectConfig(bits=4).bits == (4,)
    assert InspectConfig(bits=[8, 4, 8]).bits == (8, 4)


def test_alpha_is_twice_the_rank():
    assert (AdapterConfig(rank=7).scaling_alpha, AdapterConfig(rank=7, alpha=3).scaling_alpha) == (14.0, 3)


def test_quants_are_those_that_ggml_has():
    assert set(config.QUANTS) == set(ggml.QUANTS)
    assert ExportConfig(quant="q8_0").quant == "Q8_0" and ExportConfig(quant="q8_0").quants == ("Q8_0",)
    assert ExportConfig(quant="q4_k_m, F16").quants == ("Q4_K_M", "F16")
    assert ExportConfig().quants == ("Q4_K_M",) and ExportConfig(adapter=True).quants == ("F32",)


def test_help_names_every_quant(capsys, monkeypatch):
    said = []
    for word in line_of("--quant", help_of("export", capsys, monkeypatch)).split(";")[0].split():
        first, *ends = word.split("/")  # Q3_K_S/M/L
        said += [first, *(first[: first.rindex("_") + 1] + end for end in ends)]
    assert [word for word in said if word in config.QUANTS] == list(config.QUANTS)


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("8GB", 8_000_000_000),
        ("8gib", 8 * 1024**3),
        ("7.5G", 7_500_000_000),
        ("900MB", 900_000_000),
        ("900 mb", 900_000_000),
        ("8", 8_000_000_000),
        (".5", 500_000_000),
        (12, 12_000_000_000),
        ("1.5TiB", int(1.5 * 1024**4)),
        (None, None),
    ],
)
def test_sizes_as_people_write_them(text, nbytes):
    assert TrainingConfig(memory=text).memory_bytes == nbytes


@pytest.mark.parametrize("text", ["", "0", "much", "-8GB", "8 bananas", "8GBGB", "GB", "1e9", "nan", "8,5GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(
        QmicaError, match=r"^--memory .*: give a size such as 8GB, 7.5G, 8GiB or 900MB, or a number of GB$"
    ):
        TrainingConfig(memory=text)
