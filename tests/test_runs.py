"""The run folder: its name, how it is found, what a checkpoint survives, and what is said of folders that are none."""

import json
import os
import shutil

import pytest
import tiny
import torch

from qmica import adapter, durable, merging, model, runs, source
from qmica.config import AdapterConfig, Job
from qmica.errors import QmicaError

TENSORS = {
    "adapter": {"A": torch.arange(6.0).reshape(2, 3), "turned": torch.arange(6.0).reshape(2, 3).T},
    "optimizer": {"exp_avg": torch.ones(4, dtype=torch.bfloat16)},
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to work in: runs/ is looked for in the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name="one", train=None, checkpoints=()):
    """A run under runs/ with its config.json and checkpoints after these steps."""
    run = runs.create(runs.HOME / name, "model", "data")
    run.write_config({"train": {} if train is None else train})
    for step in checkpoints:
        run.save_checkpoint(step, TENSORS, {"step": step})
    return run


def adapter_folder(path):
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


def said(call, *arguments):
    """The one line of the error."""
    with pytest.raises(QmicaError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- making and naming


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("smollm2-135m", "almanac", "smollm2-135m-almanac-1"),
        ("org/Some.Model-7B", "notes/My Notes (new).txt", "some-my-notes-new-1"),
        ("/models/llama/", "folder/", "llama-folder-1"),
        ("Mistral_7B", "灯台.jsonl", "mistral_7b-run-1"),
        ("x" * 60, "data.csv", f"{'x' * 40}-data-1"),
    ],
)
def test_names(model, data, name):
    run = runs.create(None, model, data)
    assert run.folder == runs.HOME / name and run.folder.is_dir() and run.name == name


def test_names_are_counted(here):
    for number in (1, 2, 3):
        assert runs.create(None, "m", "d").name == f"m-d-{number}"
    shutil.rmtree(here / "runs" / "m-d-2")
    assert runs.create(None, "m", "d").name == "m-d-2"


def test_a_named_folder_must_be_empty(here):
    assert runs.create(here / "deep" / "run", "m", "d").folder == here / "deep" / "run"
    assert runs.create(here / "deep" / "run", "m", "d").name == "run"
    (here / "deep" / "run" / "notes.txt").write_text("mine")
    assert said(runs.create, here / "deep" / "run", "m", "d").startswith(f"output folder {here}/deep/run is not empty")


# ---- finding


def test_found_by_folder_and_by_name(here):
    run = made("one")
    bare = adapter_folder(here / "elsewhere")
    assert runs.find("one") == runs.find("runs/one") == runs.find(run.folder) == run
    assert runs.find(here / "runs" / "one").folder == here / "runs" / "one"
    assert runs.find("elsewhere").adapter == runs.find(bare.name).folder == bare.relative_to(here)
    assert run.adapter == run.folder / "adapter"


def test_the_newest(here):
    for age, make in enumerate(
        (lambda: made("old").folder, lambda: adapter_folder(runs.HOME / "new"), lambda: runs.HOME / "empty"), start=1
    ):
        folder = make()
        folder.mkdir(exist_ok=True)
        os.utime(folder, (age * 1000, age * 1000))
    (runs.HOME / "model").mkdir()  # a merged model, say, newer than any
    (runs.HOME / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert runs.find() == runs.Run(runs.HOME / "new")
    os.utime(runs.HOME / "old", (9000, 9000))
    assert runs.find(None) == runs.Run(runs.HOME / "old")


def test_nothing_to_find(here):
    text = f"there is no run in {here}/runs: name a run folder, or make one with `qmica train`"
    assert said(runs.find) == text
    looked = "gone is no run: neither gone nor runs/gone holds a run or an adapter; runs here: "
    assert said(runs.find, "gone") == f"{looked}none"
    (here / "gone").mkdir()
    for number in range(9):
        made(f"run{number}")
    assert said(runs.find, "gone") == looked + ", ".join(f"run{number}" for number in range(8))


def test_a_model_is_not_a_run(here):
    """Where a run is asked for; under runs/ as well, where `merge --out` may have put it."""
    for folder in ("llama", "runs/merged"):
        tiny.save_tiny(here / folder)
        text = (
            f"{folder} is a model, neither a run nor an adapter: name what was trained on it, or train with "
            f"`qmica train --model {folder}`"
        )
        assert said(runs.find, folder) == text
        assert said(merging.open_run, folder) == text
    assert said(runs.find, "merged") == text
    assert said(runs.find).startswith("there is no run in ")
    assert said(runs.find, "gone").endswith("; runs here: none")


def test_a_run_goes_before_a_model_of_its_name(here):
    (here / "one").mkdir()
    (here / "one" / "config.json").write_text('{"model_type": "llama"}')
    run = made("one")
    assert runs.find("one") == run


# ---- config.json


def test_config(here):
    """A run's own; of a bare adapter folder none, even where a model's lies beside it."""
    flags = Job.from_flags({"model": "7b", "bits": 8, "lr": 0.5, "out": "x"}).flags()
    run = made(train=flags)
    assert run.config() == {"train": json.loads(json.dumps(flags))}
    assert runs.Run(here / "none").config() == {}
    bare = adapter_folder(here / "bare")
    (bare / "config.json").write_text('{"model_type": "llama"}')
    assert runs.Run(bare).config() == {} and runs.find("bare").adapter.name == "bare"


def test_what_loads_the_base(here):
    """The run's own flags; of a bare adapter what it says of its base, in 4 bits where it does not say in which."""
    flags = Job.from_flags({"model": "7b", "bits": 8, "dtype": "fp32"}).flags()
    base = model.Base("org/model", "abc", 16)
    found = made(train=flags).model_config(base)
    assert found == {
        "model": "7b",
        "revision": None,
        "bits": 8,
        "dtype": "fp32",
        "device": "auto",
        "stream": "none",
        "threads": None,
    }
    bare = runs.Run(adapter_folder(here / "bare"))
    assert bare.model_config(base) == {"model": "org/model", "revision": "abc", "bits": 16}
    assert bare.model_config(model.Base("org/model"))["bits"] == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"train": {', "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode"),
        (b"[]", "it holds no JSON object"),
    ],
)
def test_a_damaged_config_is_named(content, reason):
    """The folder is still found as a run, so that the damage is said and not that nothing is there."""
    run = made()
    (run.folder / "config.json").write_bytes(content)
    assert runs.find() == runs.find("one") == run
    assert said(runs.find("one").config).startswith(f"runs/one/config.json is damaged: {reason}")


# ---- the adapter of a run


def test_a_run_without_a_result_says_how_to_go_on():
    """Interrupted after a checkpoint, before the first one, and in the middle of writing the result."""
    run = made("one", checkpoints=[3])
    text = "runs/one has no adapter yet, its training has not finished: "
    for attempt in range(2):
        for call in (adapter.open_run, merging.open_run, lambda name: adapter.read_adapter(runs.find(name).adapter)):
            assert said(call, "one") == f"{text}go on with `qmica train --resume runs/one`"
        if not attempt:
            run.adapter.mkdir()
            (run.adapter / "adapter_model.safetensors").write_bytes(b"")
    shutil.rmtree(run.folder / "checkpoints")
    assert said(adapter.open_run, "one") == (
        f"{text}it left no checkpoint to go on from: train again (see --save-every)"
    )


def test_other_folders_without_an_adapter(here):
    """Only a run's own place for its result is said to be a run's."""
    made("one", checkpoints=[3])
    for folder in ("nothing", "adapter", "runs/one/checkpoints"):
        assert (
            said(adapter.read_adapter, folder) == f"{folder} is not an adapter folder: adapter_config.json is missing"
        )


# ---- metrics.jsonl


def test_metrics_are_cut_at_a_step():
    """Rows up to the step stay, what a resumed run writes again goes, its end too."""
    run = made()
    assert run.read_metrics() == []
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 2, "val": 2.2}, {"step": 3, "loss": 1.5}]
    for row in [*rows, {"step": 3, "end": {"loss": 1.5}}]:
        run.log(row)
    assert run.metrics.read_text().count("\n") == 5 and run.read_metrics()[:4] == rows
    run.cut_metrics(3)
    assert run.read_metrics() == rows
    run.cut_metrics(2)
    assert run.read_metrics() == rows[:3]
    run.log(rows[3])
    assert run.read_metrics() == rows
    run.cut_metrics(0)
    assert run.read_metrics() == [] and run.metrics.read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "{", "\0" * 30])
def test_a_torn_last_line_of_metrics_is_dropped(torn):
    """A power cut in the middle of a row must not keep the run from going on."""
    run = made()
    run.log({"step": 1})
    with run.metrics.open("a") as file:
        file.write(torn)
    assert run.read_metrics() == [{"step": 1}]
    run.cut_metrics(1)
    run.log({"step": 2})
    assert run.read_metrics() == [{"step": 1}, {"step": 2}]
    run.metrics.write_text(f'{{"step": 1}}\n{torn}\n{{"step": 3}}\n')
    assert said(run.read_metrics).startswith("runs/one/metrics.jsonl is damaged in line 2: ")


# ---- checkpoints


def steps(run):
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def test_a_checkpoint_comes_back():
    run = made()
    folder = run.save_checkpoint(7, TENSORS, {"step": 7, "tokens": 1200, "nested": {"a": [1, None, 0.1]}})
    assert folder == run.folder / "checkpoints" / "step-000007"
    files = ["adapter.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    found = run.last_checkpoint()
    assert (found.folder, found.step) == (folder, 7)
    assert found.state() == {"step": 7, "tokens": 1200, "nested": {"a": [1, None, 0.1]}}
    for name, wanted in TENSORS.items():
        tensors = found.tensors(name)
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], part) and tensors[key].dtype == part.dtype for key, part in wanted.items())


def test_the_manifest_is_of_every_file():
    folder = made(checkpoints=[7]).folder / "checkpoints" / "step-000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest) == ["adapter.safetensors", "optimizer.safetensors", "state.json"]
    for name, seal in manifest.items():
        assert seal == {"bytes": (folder / name).stat().st_size, "sha256": durable.sha256(folder / name)}


def test_the_newest_two_are_kept():
    """By their steps' number, not by the letters of their names."""
    run = made()
    for step in (999_998, 999_999, 1_000_000):
        run.save_checkpoint(step, TENSORS, {"step": step})
    assert steps(run) == ["step-1000000", "step-999999"] and runs.KEPT == 2
    assert run.last_checkpoint().step == 1_000_000


def test_a_step_is_written_again():
    """A run that was resumed from an older checkpoint comes by here once more."""
    run = made(checkpoints=[2, 4])
    run.save_checkpoint(4, TENSORS, {"step": 4, "again": True})
    assert run.last_checkpoint().state() == {"step": 4, "again": True}
    assert steps(run) == ["step-000002", "step-000004"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["one byte", "cut short", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over(name, damage):
    """For the one before it; where that is damaged too, both are named."""
    run = made(checkpoints=[2, 4])
    for step, older in ((4, 2), (2, None)):
        path = run.folder / "checkpoints" / f"step-{step:06d}" / name
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            changed = bytes([content[0] ^ 1]) + content[1:]
            path.write_bytes({"one byte": changed, "cut short": content[:-1], "empty": b""}[damage])
        if older:
            assert run.last_checkpoint().step == older
    text = said(run.last_checkpoint)
    if name != "manifest.json":
        problem = f"/{name} is missing or damaged"
    else:
        problem = " has no manifest.json" if damage == "gone" else "/manifest.json is damaged"
    assert text == f"runs/one cannot be resumed: step-000004{problem}; step-000002{problem}"


@pytest.mark.parametrize("content", ["{}", "[]", '"a"', "null"])
def test_a_manifest_that_vouches_for_nothing_is_damaged(content):
    run = made(checkpoints=[2, 4])
    (run.folder / "checkpoints" / "step-000004" / "manifest.json").write_text(content)
    assert run.last_checkpoint().step == 2


def test_what_a_killed_writer_left_is_no_checkpoint():
    """Its sibling may be whole but for the rename: it is neither resumed from nor counted among those kept."""
    run = made(checkpoints=[2, 4])
    place = run.folder / "checkpoints"
    shutil.copytree(place / "step-000004", place / "step-000006.1a2b3c4d.part")
    (place / "step-old").mkdir()
    assert run.last_checkpoint().step == 4
    run.save_checkpoint(6, TENSORS, {"step": 6})
    assert steps(run) == ["step-000004", "step-000006", "step-000006.1a2b3c4d.part", "step-old"]


def test_a_failed_checkpoint_leaves_the_others(monkeypatch):
    """The disk fills up while it is written: no litter, and the newest whole one is the one before."""
    run = made(checkpoints=[2, 4])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "save_file", full)
    assert "the disk is full" in said(run.save_checkpoint, 6, TENSORS, {"step": 6})
    assert steps(run) == ["step-000002", "step-000004"] and run.last_checkpoint().step == 4


def test_no_checkpoints(here):
    text = "cannot be resumed: it has no checkpoints (see --save-every)"
    assert said(made().last_checkpoint) == f"runs/one {text}"
    assert said(runs.Run(adapter_folder(here / "bare")).last_checkpoint) == f"{here}/bare {text}"


# ---- the whole of it


def test_a_run_with_its_result_is_opened(here):
    """Base, bits and adapter from the run's own folder, by its name."""
    base = tiny.save_tiny(here / "llama", dtype=torch.bfloat16)
    flags = Job.from_flags({"model": str(base), "bits": 8, "dtype": "fp32", "device": "cpu"}).flags()
    run = made(train=flags)
    network = adapter.attach(model.load(source.resolve(str(base)), 8, "fp32", "cpu"), AdapterConfig(rank=2))
    adapter.save_adapter(network, run.adapter)
    for name in ("one", None, run):
        opened, _ = adapter.open_run(name)
        assert adapter.base_of(opened) == adapter.base_of(network) and opened.qmica_adapter.rank == 2
        assert len(list(adapter.layers(opened))) == 14
