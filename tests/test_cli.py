"""The command line: verbs, exit statuses, -c files, --help and its speed.

The jobs themselves have their own tests; here a recorder stands in a job's place and shows what the verb hands to it.
"""

import ast
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qmica
from qmica import cli
from qmica.config import (
    AdapterConfig,
    ChatConfig,
    DataConfig,
    EvalConfig,
    ExportConfig,
    InspectConfig,
    Job,
    ModelConfig,
    TrainingConfig,
)
from qmica.errors import QmicaError

VERBS = {"train", "plan", "eval", "chat", "merge", "export", "inspect", "models", "doctor"}
JOBS = {
    "train": ("training", "train"),
    "plan": ("planning", "plan"),
    "eval": ("evaluation", "evaluate"),
    "chat": ("chatting", "chat"),
    "merge": ("merging", "merge"),
    "export": ("exporting", "export"),
    "inspect": ("spectra", "inspect"),
}
ROOT = Path(cli.__file__).parents[1]


class Recorder:
    """Stands in every job's place: keeps the arguments of the last call, or raises what it is told to."""

    def __init__(self):
        self.arguments, self.error = None, None

    def __call__(self, *arguments, **more):
        self.arguments = (*arguments, *more.values())
        if self.error is not None:
            raise self.error


@pytest.fixture
def jobs(monkeypatch):
    recorder = Recorder()
    for module, function in JOBS.values():
        fake = types.ModuleType(f"qmica.{module}")
        setattr(fake, function, recorder)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(qmica, module, fake, raising=False)
    return recorder


def error_of(capsys) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qmica: "), lines
    return lines[0].removeprefix("qmica: ")


def child(*words: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=120, **more)


# ---- verbs


def test_the_verbs_are_these():
    assert {name for name in cli.app if not name.startswith("-")} == VERBS


@pytest.mark.parametrize("verb", JOBS)
def test_every_verb_has_its_job(verb):
    module, function = JOBS[verb]
    tree = ast.parse((ROOT / "qmica" / f"{module}.py").read_text(encoding="utf-8"))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_train_hands_over_its_flags(jobs):
    words = "train -m 7b --bits 8 -r 32 -d a.txt b.jsonl --replay c.txt --lr 5e-4 --no-packing --iters 7 -o runs/x"
    assert cli.main(words.split()) == 0
    assert jobs.arguments == (
        ModelConfig(model="7b", bits=8),
        AdapterConfig(rank=32),
        DataConfig(data=("a.txt", "b.jsonl"), replay=("c.txt",), packing=False),
        TrainingConfig(lr=5e-4, steps=7, out=Path("runs/x")),
        None,
    )


def test_plan_takes_the_flags_of_train(jobs, tmp_path):
    assert (
        cli.main(
            ["plan", "-m", "7b", "--bits", "8", "-r", "32", "-d", "a.txt", "--steps", "7", "--memory", "8GB", "--json"]
        )
        == 0
    )
    expected = (
        ModelConfig(model="7b", bits=8),
        AdapterConfig(rank=32),
        DataConfig(data=("a.txt",)),
        TrainingConfig(steps=7, memory="8GB"),
    )
    assert jobs.arguments == (*expected, True)
    run = tmp_path / "config.json"
    run.write_text(json.dumps({"train": Job(*expected).flags(), "versions": {}}))
    assert cli.main(["plan", "-c", str(run)]) == 0
    assert jobs.arguments == (*expected, False)


def test_a_budget_that_is_none(jobs, capsys):
    assert cli.main(["plan", "--memory", "8 bananas"]) == 1
    assert error_of(capsys) == "--memory 8 bananas: give a size such as 8GB, 7.5G, 8GiB or 900MB, or a number of GB"


def test_the_other_verbs_hand_over_theirs(jobs):
    assert cli.main(["eval", "runs/x", "--limit", "3", "--gguf", "a.gguf", "--gguf", "b.gguf+c.gguf", "--json"]) == 0
    assert jobs.arguments == ("runs/x", EvalConfig(limit=3, gguf=(Path("a.gguf"), Path("b.gguf+c.gguf"))), None, True)
    assert cli.main(["eval", "--model", "7b", "--bits", "16"]) == 0
    assert jobs.arguments == (None, EvalConfig(), ModelConfig(model="7b", bits=16), False)
    assert cli.main(["chat", "m.gguf", "--prompt", "-- hello", "--temp", "0.5"]) == 0
    assert jobs.arguments == ("m.gguf", ChatConfig(prompt="-- hello", temp=0.5))
    assert cli.main(["merge", "x", "-o", "y", "--base", "quantized"]) == 0
    assert jobs.arguments == ("x", Path("y"), "quantized", 1.0, "5GB", False)
    assert cli.main(["export", "--quant", "q8_0", "--adapter"]) == 0
    assert jobs.arguments == (None, ExportConfig(quant="Q8_0", adapter=True))
    assert cli.main(["inspect"]) == 0
    assert jobs.arguments == (ModelConfig().model, InspectConfig(), False)
    words = "inspect 7b -r 4 --targets qv --bits 8 4 --plot x --revision v1 --json"
    assert cli.main(words.split()) == 0
    plan = InspectConfig(rank=4, targets="qv", bits=(8, 4), plot=Path("x"), revision="v1")
    assert jobs.arguments == ("7b", plan, True)


def test_resume_takes_a_name_under_runs(jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text('{"train": {}}')
    assert cli.main(["train", "--resume", "mine"]) == 0
    assert jobs.arguments[-1] == Path("runs/mine")


def test_resume_of_nothing(jobs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", "mine"]) == 1
    assert error_of(capsys).startswith("mine is no run")


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_examples_are_real(verb, capsys, tmp_path, monkeypatch):
    """Every line under Examples is a command that parses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "notes").mkdir(parents=True)
    (tmp_path / "runs" / "notes" / "config.json").write_text(json.dumps({"train": {"model": "7b"}, "versions": {}}))
    assert cli.main([verb, "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.split("Examples:")[1].splitlines() if line.strip()]
    assert lines and all(line.startswith(f"qmica {verb}") for line in lines)
    for line in lines:
        cli.app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


# ---- exit statuses


@pytest.mark.parametrize(
    "words, text",
    [
        ("train --rnk 3", "Unknown option: --rnk. Did you mean --rank? See qmica train --help."),
        ("train --bits 5", 'Invalid value "5" for --bits. Choose from: 4, 8, 16, "gguf". See qmica train --help.'),
        ("train --rank x", 'Invalid value for --rank: unable to convert "x" into int. See qmica train --help.'),
        ("train notes.txt", "unexpected notes.txt. See qmica train --help."),
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
        (
            "train --resume x --lr 1 -r 3",
            "--resume continues with the flags the run began with: leave --rank, --lr out",
        ),
        ("train --rank", "parameter --rank requires an argument"),
        ("eval x --model 7b --bits 8", "a run brings its own model: leave --model, --bits out, or RUN."),
        ("eval --bits 8", "--bits belongs to --model, and a run brings its own: name a --model too."),
        ("export a b", "unexpected b. See qmica export --help."),
        ("inspect --bits 16", 'Invalid value "16" for --bits. Choose from: 4, 8. See qmica inspect --help.'),
    ],
)
def test_usage_errors(jobs, capsys, words, text):
    assert cli.main(words.split()) == 2
    assert text in error_of(capsys)
    assert jobs.arguments is None


def test_values_that_make_no_sense(jobs, capsys):
    assert cli.main(["train", "--alpha", "0", "--rank", "-1"]) == 1
    assert error_of(capsys) == "--rank -1: give 1 or more; --alpha 0.0: give more than 0"


def test_a_user_error_is_one_line(jobs, capsys):
    jobs.error = QmicaError("model x not found:\n  look elsewhere")
    assert cli.main(["train"]) == 1
    assert error_of(capsys) == "model x not found: look elsewhere"


def test_a_bug_keeps_its_traceback(jobs, capsys):
    jobs.error = ValueError("planted")
    assert cli.main(["train"]) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and "ValueError: planted" in lines
    assert "bug in qmica" in lines[-1] and "report" in lines[-1]


@pytest.mark.parametrize(
    "said, expected", [(("checkpoint at step 12",), "interrupted: checkpoint at step 12"), ((), "interrupted: nothing")]
)
def test_an_interruption_says_what_was_kept(jobs, capsys, said, expected):
    jobs.error = KeyboardInterrupt(*said)
    assert cli.main(["train"]) == 130
    assert error_of(capsys).startswith(expected)


PLANTED = """
import sys, types
import qmica.cli
job = types.ModuleType("qmica.training")
def train(*arguments):
    raise {error}
job.train = train
sys.modules["qmica.training"] = qmica.training = job
sys.argv = ["qmica", "train"]
sys.exit(qmica.cli.main())
"""


@pytest.mark.parametrize(
    "error, status, text",
    [
        ("ValueError('planted')", 70, "ValueError: planted\nqmica: this is a bug in qmica"),
        ("KeyboardInterrupt('kept step 3')", 130, "qmica: interrupted: kept step 3"),
    ],
)
def test_statuses_of_a_process(error, status, text):
    done = child("-c", PLANTED.format(error=error))
    assert done.returncode == status and text in done.stderr
    assert ("Traceback" in done.stderr) == (status == 70)


def test_statuses_of_the_program():
    assert child("-m", "qmica", "--help").returncode == 0
    assert child("-m", "qmica", "nonsense").returncode == 2
    done = child("-m", "qmica", "train", "--rank", "0")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "qmica: --rank 0: give 1 or more\n")


def test_a_closed_pipe_is_no_bug():
    process = subprocess.Popen(
        [sys.executable, "-m", "qmica", "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == b""


# ---- -c file


def write(folder: Path, content, name="flags.yaml") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_flag_beats_file_beats_default(jobs, tmp_path):
    path = write(tmp_path, "lr: 1e-4\nrank: 8\ndata: [a.txt, b.txt]\npacking: no\nout: runs/z\nsteps:\n")
    assert cli.main(["train", "-c", path, "--rank", "4"]) == 0
    _, adapter, data, training, _ = jobs.arguments
    assert training == TrainingConfig(lr=1e-4, out=Path("runs/z")) and isinstance(training.lr, float)
    assert adapter == AdapterConfig(rank=4)
    assert data == DataConfig(data=("a.txt", "b.txt"), packing=False)
    assert cli.main(["train", "-c", path, "--packing", "--data", "c.txt", "--learning-rate", "2"]) == 0
    assert jobs.arguments[2] == DataConfig(data=("c.txt",)) and jobs.arguments[3].lr == 2.0


def test_keys_may_be_aliases_and_dashed(jobs, tmp_path):
    path = write(tmp_path, "learning_rate: 0.1\nmax-seq-length: 64\nlora_r: 2\ntarget_modules: q_proj,v_proj\n")
    assert cli.main(["train", "-c", path]) == 0
    assert jobs.arguments[1:4] == (
        AdapterConfig(rank=2, targets="q_proj,v_proj"),
        DataConfig(max_seq_length=64),
        TrainingConfig(lr=0.1),
    )


def test_a_runs_config_json_is_a_config_file(jobs, tmp_path):
    """Written as runs.py writes it: every field of the four dataclasses under `train`, other facts beside it."""
    from dataclasses import asdict

    parts = (
        ModelConfig(model="7b", bits=16, threads=1),
        AdapterConfig(rank=3, alpha=1.5, method="lora"),
        DataConfig(data=("x y.txt", "-z.txt"), packing=False),
        TrainingConfig(lr=1e-5, steps=9, out=Path("runs/old"), probe="--what?", grad_checkpoint=False),
    )
    flags = {name: value for part in parts for name, value in asdict(part).items()}
    content = json.dumps({"train": flags, "versions": {"torch": "2"}, "base": {"id": "x"}}, default=str)
    path = write(tmp_path, content, "config.json")
    assert cli.main(["train", "-c", path]) == 0
    assert jobs.arguments == (*parts, None)
    assert cli.main(["train", "-c", path, "--out", "runs/new"]) == 0
    assert jobs.arguments[3].out == Path("runs/new")


def test_other_verbs_read_files_too(jobs, tmp_path):
    path = write(tmp_path, {"export": {"quant": "Q8_0"}, "chat": {"temp": 1}})
    assert cli.main(["export", "-c", path]) == 0 and jobs.arguments[1] == ExportConfig(quant="Q8_0")
    assert cli.main(["chat", "-c", path]) == 0 and jobs.arguments[1] == ChatConfig(temp=1.0)
    assert cli.main(["eval", "-c", write(tmp_path, "model: 7b\nlimit: 2\n")]) == 0
    assert jobs.arguments[1:3] == (EvalConfig(limit=2), ModelConfig(model="7b"))
    assert cli.main(["inspect", "7b", "-c", write(tmp_path, "bits: [8]\nrank: 2\n")]) == 0
    assert jobs.arguments[:2] == ("7b", InspectConfig(bits=(8,), rank=2))


@pytest.mark.parametrize(
    "content, text",
    [
        ("rnak: 3\n", "FILE: unknown key rnak: did you mean rank?"),
        ("learning-rates: 3\n", "FILE: unknown key learning-rates: did you mean learning_rate?"),
        ("zzzzzz: 3\n", "FILE: unknown key zzzzzz: see qmica train --help"),
        ("resume: x\n", "FILE: unknown key resume"),
        ("rank: x\n", 'FILE: Invalid value for rank: unable to convert "x" into int.'),
        ("bits: 5\n", 'FILE: Invalid value "5" for bits. Choose from: 4, 8, 16, "gguf".'),
        ("rank: [1, 2]\n", "FILE: rank takes one value, not a list of 2"),
        ("rank: yes\n", "FILE: rank: true is not a value for --rank"),
        ("rank: {a: 1}\n", 'FILE: rank: {"a": 1} is not a value for --rank'),
        ("rank:\n", "FILE: rank has no value: give one or leave the key out"),
        ("lr: 1\nlearning_rate: 2\n", "FILE: lr and learning_rate are the same flag: leave one out"),
        ("rank: 0\n", "--rank 0: give 1 or more"),
        ("- rank\n", "FILE holds a list: give lines of `flag: value`"),
        ("export: {quant: F16}\n", "FILE has flags for export and none for train"),
        ("a: [1,\nb: 2\n", "FILE is not valid YAML (line 3: "),
        ("\x00", "FILE is not valid YAML ("),
    ],
)
def test_files_that_are_wrong(jobs, tmp_path, capsys, content, text):
    path = write(tmp_path, content)
    assert cli.main(["train", "-c", path]) == 1
    assert error_of(capsys).startswith(text.replace("FILE", f"-c {path}"))
    assert jobs.arguments is None


def test_a_file_that_is_missing_or_no_file(jobs, tmp_path, capsys):
    assert cli.main(["train", "-c", str(tmp_path / "none.yaml")]) == 1
    assert (
        error_of(capsys)
        == f"-c {tmp_path}/none.yaml cannot be read (No such file or directory): give a YAML or JSON file of flags"
    )
    assert cli.main(["train", "-c", str(tmp_path)]) == 1
    assert "cannot be read" in error_of(capsys)
    assert cli.main(["train", "-c", write(tmp_path, "{", "x.json")]) == 1
    assert "is not valid JSON" in error_of(capsys)


FLAGS = {
    "rank": st.integers(1, 99),
    "lr": st.floats(1e-8, 10),
    "steps": st.integers(1, 10**9),
    "seed": st.integers(0, 2**31),
    "packing": st.booleans(),
    "grad_checkpoint": st.booleans(),
    "optimizer": st.sampled_from(["auto", "adamw", "paged_adamw_8bit"]),
    "targets": st.text("abcdefgh_,", min_size=1),
    "probe": st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1),
    "data": st.lists(st.text("abc./ -", min_size=1), min_size=1, max_size=3),
}
SOME = st.fixed_dictionaries({}, optional=FLAGS)


def words_of(flags: dict) -> list[str]:
    """The command line that says the same."""
    words = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [f"{flag}={one}" for one in (value if isinstance(value, list) else [value])]
    return words


@given(file=SOME, line=SOME, is_json=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_mixture_of_flags_and_file(jobs, tmp_path, file, line, is_json):
    path = write(tmp_path, json.dumps({"train": file}) if is_json else file, "f.json" if is_json else "f.yaml")
    assert cli.main(["train", "-c", path, *words_of(line)]) == 0
    found = {name: getattr(part, name) for part in jobs.arguments[:4] for name in part.__dataclass_fields__}
    wanted = {**found, **file, **line}
    wanted["data"] = tuple(wanted["data"])
    assert found == wanted


@given(
    content=st.one_of(st.text(), st.from_regex(r"(!!(int|float|bool|set|timestamp) ?\S*|[\[\]{}&*:, a-z0-9'-]+)\n?"))
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_is_a_bug(jobs, tmp_path, content):
    (tmp_path / "f.yaml").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert cli.main(["train", "-c", str(tmp_path / "f.yaml")]) in (0, 1)


# ---- --help


def test_help_imports_no_torch():
    code = "import sys; from qmica.cli import main; status = main({words}); print(status, *sys.modules)"
    for words in (["--help"], ["train", "--help"], ["--version"], ["train", "--rank", "x"]):
        *_, last = child("-c", code.format(words=words)).stdout.splitlines()
        status, *modules = last.split()
        assert status in ("0", "2")
        assert {"torch", "transformers", "numpy", "huggingface_hub"} & set(modules) == set()


def test_help_is_fast():
    """At most 0.3 s, the median of 10; on a machine that is slow or busy, where importing cyclopts and rich alone takes
    more than half of that, at most twice as long as those imports in alternating runs."""
    seconds = {"help": [], "imports": []}
    commands = {"help": ["-m", "qmica", "--help"], "imports": ["-c", "import cyclopts, rich.console"]}
    for _ in range(10):
        for name, words in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"qmica --help: {medians['help']:.3f} s, of which cyclopts and rich {medians['imports']:.3f} s")
    assert medians["help"] <= max(0.3, 2 * medians["imports"]), medians


def test_version():
    from importlib.metadata import version

    done = child("-m", "qmica", "--version")
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert done.stdout.strip() == version("qmica") == declared
