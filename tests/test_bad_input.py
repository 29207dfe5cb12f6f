"""What a stranger does wrong: each mistake is one line with exit status 1, and the line says what to do.

Every command runs for real, in this process, through cyclopts to the job. Besides the text it is looked at that nothing
is left behind: no run folder, no half-written file, nothing of a library on the terminal.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import save_tiny, tiny_model, write_gguf

from qmica import cli, durable

TEXT = "The lighthouse keeper counted 1,204 lamps before dawn. "
QUICK = "--steps 2 --max-seq-length 64 --no-grad-checkpoint"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two families as folders, a llama as a GGUF; they are never written to."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "llama", "llama")
    save_tiny(folder / "qwen2", "qwen2")
    write_gguf(folder / "llama.gguf", tiny_model("llama"))
    return folder


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory) -> Path:
    """A run on the llama folder, two steps, no checkpoint; with its adapter as GGUF."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "notes.txt").write_text(TEXT * 8)
    words = f"train --model {models}/llama -d {folder}/notes.txt {QUICK} --rank 4 --out {folder}/run"
    assert cli.main(words.split()) == 0
    assert cli.main(["export", f"{folder}/run", "--adapter"]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(TEXT * 8)
    return tmp_path


@pytest.fixture
def refused(capfd, here, models, trained):
    """Run a command that cannot work: its one line, and nothing new on the disk. {models} and {run} are filled in."""

    def command(line: str) -> str:
        before = sorted(here.rglob("*"))
        capfd.readouterr()
        status = cli.main(shlex.split(line.format(models=models, run=trained)))
        said = capfd.readouterr()
        print(f"$ qmica {line}\n{said.out}{said.err}")
        lines = said.err.splitlines()
        assert status == 1, (status, lines)
        assert len(lines) == 1 and lines[0].startswith("qmica: ") and len(lines[0]) < 500, lines
        assert sorted(here.rglob("*")) == before, "something was left behind"
        return lines[0].removeprefix("qmica: ")

    return command


def small_gguf(path, architecture: str, *entries: tuple[str, object], like=None) -> str:
    """A GGUF of one tensor: `entries` are metadata, strings or integers; `like`: with this file's tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    if like is not None:
        from qmica.gguf_file import GGUFFile

        file = GGUFFile.open(like)
        for key in (key for key in file.metadata if key.startswith("tokenizer.")):
            writer.add_key_value(key, file.metadata[key], file.kinds[key].type, file.kinds[key].element)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def changed_folder(models, folder, **config) -> Path:
    """The llama folder with other words in its config.json."""
    shutil.copytree(models / "llama", folder)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return Path(folder)


# ---- the model


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "7bb",
            "model '7bb' not found: it is no alias (nearest: 7b, 72b), and no file or folder here; a hub id is org/name",
        ),
        ("./nope", "model ./nope not found: no such file or folder; give a path, a hub id (org/name) or an alias"),
        ("a/b.gguf", "model a/b.gguf not found: no such file or folder; give a path, a hub id (org/name) or an alias"),
    ],
)
def test_model_not_found(refused, name, text):
    assert refused(f"train --model {name} -d notes.txt") == text


def test_not_a_gguf(refused, here):
    (here / "model.gguf").write_text("once upon a time")
    assert refused("train --model model.gguf -d notes.txt") == (
        f"{here}/model.gguf is not a GGUF (it starts with b'once', not b'GGUF'): give a GGUF file or a folder of "
        "safetensors"
    )
    assert refused("chat model.gguf --prompt hello").startswith("model.gguf is not a GGUF file: give a .gguf, a run")
    assert refused("eval {run} --limit 1 --gguf model.gguf") == (
        "--gguf asks a file questions, and there are none: give --questions FILE, or a text with --data"
    )
    (here / "asked.jsonl").write_text('{"question": "Who?", "choices": ["a", "b"], "answer": 0}\n')
    said = refused("eval {run} --limit 1 --questions asked.jsonl --gguf model.gguf")
    assert said == "model.gguf is not a GGUF file: it does not start with the bytes GGUF"


def test_a_damaged_gguf(refused, models, here):
    (here / "half.gguf").write_bytes((models / "llama.gguf").read_bytes()[:-5000])
    said = refused("train --model half.gguf -d notes.txt")
    assert re.fullmatch(r".*half.gguf is truncated: \d+ of its \d+ bytes are missing; copy or download it again", said)


SUPPORTED = "supported are llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, granite, olmo2, smollm3"


@pytest.mark.parametrize("name", ["mamba", "nosuchmodel"])  # transformers knows one of them
def test_unsupported_architecture_in_a_folder(refused, models, here, name):
    changed_folder(models, here / "other", model_type=name)
    assert refused("train --model other -d notes.txt") == f"architecture '{name}' is not supported; {SUPPORTED}"


def test_unsupported_architecture_in_a_gguf(refused, models, here):
    small_gguf(here / "other.gguf", "mamba", like=models / "llama.gguf")
    assert refused("train --model other.gguf -d notes.txt") == f"architecture 'mamba' is not supported; {SUPPORTED}"


def test_mixture_of_experts(refused, models, here):
    text = "'{}' is a mixture of experts, which qmica does not train; supported are dense models of the families "
    text += SUPPORTED.removeprefix("supported are ")
    changed_folder(models, here / "other", model_type="qwen2_moe", num_experts=8)
    assert refused("train --model other -d notes.txt") == text.format("qwen2_moe")
    small_gguf(here / "moe.gguf", "llama", ("llama.expert_count", 8), like=models / "llama.gguf")
    assert refused("train --model moe.gguf -d notes.txt") == text.format("llama")


def test_a_vision_projector_and_an_adapter_are_no_models(refused, here, trained):
    small_gguf(here / "mmproj-model.gguf", "clip", ("general.type", "mmproj"))
    assert refused("train --model mmproj-model.gguf -d notes.txt") == (
        f"{here}/mmproj-model.gguf is a vision projector, not a language model; give the model's own GGUF (no mmproj in "
        "its name)"
    )
    assert "mmproj-model.gguf" in refused("chat mmproj-model.gguf --prompt hello")
    said = refused("train --model {run}/run.adapter.gguf -d notes.txt")
    assert said.endswith("is an adapter, not a model; give the GGUF of its base model, and the adapter with --adapter")
    said = refused("train --model {run}/adapter -d notes.txt")
    assert re.fullmatch(r".*/adapter is an adapter, not a model: give the model it belongs to \(.*/llama\)", said)


def test_a_pickle_is_no_model(refused, models, here):
    folder = changed_folder(models, here / "other")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle, which can run code and is never read" in refused("train --model other -d notes.txt")


def test_a_device_that_is_not_here(refused, monkeypatch):
    said = refused("train --model {models}/llama -d notes.txt --device cuda:7")
    assert said.startswith("--device cuda:7 cannot be used here (") and said.endswith("choose cpu, or leave it at auto")


# ---- the data


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("empty.txt", "", "empty.txt is empty: write something into it or delete it"),
        ("white.txt", " \n\n", "white.txt has no text in it: write something into it or leave it out"),
        ("empty.jsonl", "\n", "empty.jsonl has no text in it: write something into it or leave it out"),
        (
            "notes.docx",
            "x",
            "notes.docx has .docx; qmica reads .txt .md .jsonl .json .csv .parquet: convert or rename it",
        ),
        (
            "broken.jsonl",
            '{"text": "a"}\n{"text": oops}\n',
            "broken.jsonl, line 2, column 10: broken JSON (Expecting value): correct the line",
        ),
        (
            "keys.jsonl",
            '{"text": "a"}\n{"body": "b", "id": 1}\n',
            "keys.jsonl, line 2: found the keys body, id; expected text (format text): rename the keys or choose a --format",
        ),
        (
            "asked.jsonl",
            '{"messages": [{"role": "user", "content": "hi"}]}\n',
            "all tokens are masked: none of the 11 tokens of 1 document(s) is to be learnt within --max-seq-length 1024: "
            "raise it, or use --no-mask-prompt",
        ),
    ],
)
def test_unusable_data(refused, here, name, content, text):
    (here / name).write_text(content)
    assert refused(f"train --model {{models}}/llama -d {name}") == text


def test_missing_data(refused, here):
    looked = f"(looked in {here}): give a path, or a dataset of the hub as org/name"
    assert refused("train --model {models}/llama -d none.jsonl") == f"no file or folder 'none.jsonl' {looked}"
    assert (
        refused("train --model {models}/llama -d notes.txt --replay none.txt")
        == f"no file or folder 'none.txt' {looked}"
    )
    assert refused("eval {run} --data none.txt") == f"no file or folder 'none.txt' {looked}"
    (here / "folder").mkdir()
    assert refused("train --model {models}/llama -d folder") == (
        "the folder folder has no file qmica can use (.txt .md .jsonl .json .csv .parquet)"
    )
    assert refused("eval {run} --questions none.jsonl") == (
        f"no file 'none.jsonl' with questions (looked in {here}): give a JSONL file"
    )


# ---- the adapter and the output


def test_rank_above_the_smallest_side(refused):
    """Refused on the first layer that is too narrow, by name: k_proj is 64 x 64 (2 heads of 32)."""
    said = refused(f"train --model {{models}}/llama -d notes.txt {QUICK} --rank 65 --targets k_proj --out run")
    assert said == "model.layers.0.self_attn.k_proj: rank 65 does not fit a 64 x 64 weight: choose 1 to 64"


def test_targets_that_no_layer_has(refused):
    said = refused("train --model {models}/llama -d notes.txt --targets query")
    assert said.startswith("targets: no linear of this model is called query; there are down_proj, gate_proj, k_proj,")


def test_output_folder_not_empty(refused, here):
    (here / "full").mkdir()
    (here / "full" / "thesis.txt").write_text("mine")
    text = "output folder full is not empty (it holds thesis.txt): choose another --out, or empty it"
    assert refused(f"train --model {{models}}/llama -d notes.txt {QUICK} --out full") == text
    assert refused("merge {run} --out full") == text
    said = refused(f"train --model {{models}}/llama -d notes.txt {QUICK} --out notes.txt")
    assert said == "output folder notes.txt is a file: choose another --out"
    assert refused("export {run} --out full").startswith("cannot write full: it is a folder; give a file name")


def test_no_space_for_the_export(refused, monkeypatch):
    monkeypatch.setattr(durable, "free_space", lambda folder: 4096)
    said = refused("export {run} --quant Q4_K_M --out small.gguf")
    assert re.fullmatch(
        r"exporting small.gguf needs [\d.]+ MB, has 4 kB free at \.: free some space or choose another folder", said
    )
    said = refused("merge {run} --out merged")
    assert re.fullmatch(r"merging into merged needs \d+ kB, has 4 kB free at .*: free some space or choose .*", said)


def test_the_adapter_on_the_wrong_base(refused, models, trained, here):
    """The run's model is another one now: refused by every verb, with both ids."""
    shutil.copytree(trained, here / "run")
    config = json.loads((here / "run" / "config.json").read_text())
    config["train"]["model"] = str(models / "qwen2")
    (here / "run" / "config.json").write_text(json.dumps(config))
    for words in ("export run", "export run --adapter", "merge run", "eval run --limit 1", "chat run --prompt hello"):
        said = refused(words)
        assert said.startswith(f"the adapter in run/adapter was trained on {models}/llama, "), said
        assert f"{models}/qwen2" in said and said.endswith("give the model that it was trained on"), said


def test_an_adapter_gguf_on_the_wrong_base(refused, models, here):
    write_gguf(here / "qwen2.gguf", tiny_model("qwen2"))
    said = refused("chat qwen2.gguf --adapter {run}/run.adapter.gguf --prompt hello")
    assert re.fullmatch(
        r"llama.cpp cannot put the adapter .*: model arch and LoRA arch mismatch; give its own base", said
    )
    assert refused("chat {models}/llama.gguf --adapter none.gguf --prompt hello") == (
        "none.gguf is not a file: give the path of an adapter GGUF (qmica export --adapter makes one)"
    )
    assert refused("chat {run} --adapter {run}/run.adapter.gguf --prompt hello") == (
        "--adapter is for a GGUF file: a run brings its own adapter"
    )


def test_an_adapter_has_no_k_quants(refused):
    assert refused("export {run} --adapter --quant Q4_K_S --out a.gguf") == (
        "--quant Q4_K_S is for merged models: an adapter is written in F32 (the default), F16 or BF16"
    )


# ---- runs


@pytest.mark.parametrize("verb", ["eval", "chat", "merge", "export"])
def test_without_a_run(refused, here, verb):
    said = f"there is no run in {here}/runs: name a run folder, or make one with `qmica train`"
    assert refused(verb) == said
    looked = "nothing is no run: neither nothing nor runs/nothing holds a run or an adapter; runs here: none"
    assert refused(f"{verb} nothing") == looked


def test_resume_without_checkpoints(refused):
    said = refused("train --resume {run}")
    assert re.fullmatch(r".*/run cannot be resumed: it has no checkpoints \(see --save-every\)", said)
    assert refused("train --resume nothing").startswith("nothing is no run: neither nothing nor runs/nothing")


# ---- other outcomes


def test_a_bug_keeps_its_traceback(trained, monkeypatch, capsys):
    from qmica import exporting

    def broken(*_, **__):
        raise ValueError("planted")

    monkeypatch.setattr(exporting, "write", broken)
    assert cli.main(["export", str(trained), "--out", "planted.gguf"]) == 70
    errors = capsys.readouterr().err
    print(f"exit status 70\n{errors}")
    assert "Traceback (most recent call last)" in errors and "in broken" in errors and "ValueError: planted" in errors
    assert errors.splitlines()[-1].startswith("qmica: this is a bug in qmica: please report it")
    assert not list(Path().glob("*planted*")), "a half-written file is left"


@pytest.mark.parametrize("line", ["train --bits 5", "train --nonsense 1", "chat a b", "exprot", "eval --limit many"])
def test_usage(line, capsys):
    assert cli.main(line.split()) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("qmica: ") and "--help" in said
