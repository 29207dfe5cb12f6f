"""The Python API: its verbs stay functions whatever is imported, and its keywords are the fields of the dataclasses."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_cli import JOBS, Recorder
from tiny import save_tiny

import qmica
from qmica import QmicaError
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

FUNCTIONS = (*JOBS, "load", "attach", "save_adapter", "load_adapter", "open_run")


@pytest.fixture
def jobs(monkeypatch):
    recorder = Recorder()
    for module, function in JOBS.values():
        fake = types.ModuleType(f"qmica.{module}")
        setattr(fake, function, recorder)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setattr(qmica, module, fake, raising=False)
    return recorder


def test_verbs_are_functions_after_every_import():
    for module in pkgutil.iter_modules(qmica.__path__):
        if module.name != "__main__":
            importlib.import_module(f"qmica.{module.name}")
    assert {name for name in FUNCTIONS if not inspect.isfunction(getattr(qmica, name))} == set()
    assert set(FUNCTIONS) | {"QmicaError", "__version__"} == set(qmica.__all__)
    assert set(qmica.__all__) <= set(dir(qmica))


def test_importing_qmica_is_light():
    code = "import sys, qmica; print(sorted({'torch', 'numpy', 'transformers', 'cyclopts', 'rich'} & set(sys.modules)))"
    root = Path(qmica.__file__).parents[1]
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=root).strip() == "[]"


def test_train(jobs):
    qmica.train(model="7b", data="notes.txt", bits=4, rank=16, epochs=4, out="runs/notes")
    assert jobs.arguments == (
        ModelConfig(model="7b"),
        AdapterConfig(),
        DataConfig(data=("notes.txt",)),
        TrainingConfig(epochs=4, out=Path("runs/notes")),
        None,
    )


def test_plan(jobs):
    qmica.plan(model="7b", bits=8, steps=3, memory=8)
    options = (ModelConfig(model="7b", bits=8), AdapterConfig(), DataConfig(), TrainingConfig(steps=3, memory="8"))
    assert jobs.arguments == (*options, False)
    qmica.plan()
    assert jobs.arguments[-2] == TrainingConfig()


def test_resume(jobs, tmp_path):
    (tmp_path / "config.json").write_text('{"train": {}}')
    from qmica.runs import Run

    for resume in (tmp_path, str(tmp_path), Run(tmp_path)):
        qmica.train(resume=resume)
        assert jobs.arguments == (ModelConfig(), AdapterConfig(), DataConfig(), TrainingConfig(), tmp_path)
    with pytest.raises(TypeError, match="with the options it began with: leave lr out"):
        qmica.train(resume=tmp_path, lr=1)


def test_the_other_verbs(jobs, tmp_path):
    from qmica.runs import Run

    qmica.export(Run(tmp_path), "notes.gguf", quant="Q8_0")
    assert jobs.arguments == (str(tmp_path), ExportConfig(out=Path("notes.gguf"), quant="Q8_0"))
    qmica.export()
    assert jobs.arguments == (None, ExportConfig())
    qmica.merge("x", "y", base="quantized")
    assert jobs.arguments == ("x", Path("y"), "quantized", 1.0, "5GB", False)
    qmica.chat("m.gguf", prompt="hello")
    assert jobs.arguments == ("m.gguf", ChatConfig(prompt="hello"))
    qmica.eval("x", limit=3)
    assert jobs.arguments == ("x", EvalConfig(limit=3), None, False)
    qmica.eval(model="7b", bits=16)
    assert jobs.arguments == (None, EvalConfig(), ModelConfig(model="7b", bits=16), False)
    qmica.inspect()
    assert jobs.arguments == (ModelConfig().model, InspectConfig(), False)
    qmica.inspect(tmp_path, rank=4, bits=4, plot="x")
    assert jobs.arguments == (str(tmp_path), InspectConfig(rank=4, bits=(4,), plot=Path("x")), False)


@pytest.mark.parametrize(
    "verb, options, text",
    [
        ("train", {"rnak": 3}, r"^rnak is no argument of qmica.train\(\): did you mean rank\?$"),
        ("train", {"batchsize": 3}, "did you mean batch_size"),
        ("plan", {"memroy": 8}, "did you mean memory"),
        ("export", {"quantt": "F16"}, "did you mean quant"),
        ("chat", {"zzz": 1}, "which takes prompt, raw, system"),
        ("load", {"bit": 4}, "did you mean bits"),
        ("inspect", {"plots": "x"}, "did you mean plot"),
    ],
)
def test_unknown_keywords(jobs, verb, options, text):
    with pytest.raises(TypeError, match=text):
        getattr(qmica, verb)(**options)
    assert jobs.arguments is None


@pytest.mark.parametrize(
    "verb, options, text",
    [
        ("train", {"bits": 5}, "^bits=5: choose one of 4, 8, 16, 'gguf'$"),
        ("train", {"method": "dora"}, "^method='dora': choose one of 'mica', 'lora'$"),
        ("plan", {"memory": "much"}, "^--memory much: give a size such as 8GB"),
        ("train", {"rank": 0}, "^--rank 0: give 1 or more$"),
        ("merge", {"base": "4bit"}, "^base='4bit': choose one of 'original', 'quantized'$"),
        ("export", {"quant": "Q9"}, "^--quant Q9: choose one of"),
        ("inspect", {"bits": 16}, "^--bits 16: choose 4, 8 or both$"),
    ],
)
def test_values_that_are_refused(jobs, verb, options, text):
    with pytest.raises(QmicaError, match=text):
        getattr(qmica, verb)(**options)


def test_eval_measures_a_run_or_a_model(jobs):
    for options in ({"run": "x", "model": "7b"}, {"bits": 8}):
        with pytest.raises(TypeError, match=r"^eval\(\) measures a run or a model: (model|bits) belongs to model="):
            qmica.eval(**options)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(qmica, "trian")


def test_version():
    from importlib.metadata import version

    assert qmica.__version__ == version("qmica")


def test_the_pieces_fit(tmp_path):
    """load, attach, save_adapter and load_adapter on a real tiny model: the reloaded adapter gives the same logits."""
    folder = save_tiny(tmp_path / "model", "llama")
    ids = torch.arange(20).unsqueeze(0)
    model, tokenizer = qmica.load(folder, bits=4, dtype="fp32", device="cpu")
    base = model(input_ids=ids).logits
    assert len(tokenizer) > 300
    assert qmica.attach(model, rank=4, targets="qv") is model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {tuple(parameter.shape) for parameter in trained} == {(4, 64)}
    assert torch.equal(model(input_ids=ids).logits, base)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.data.normal_(generator=generator)
    tuned = model(input_ids=ids).logits
    assert (tuned - base).abs().max() > 0.1
    qmica.save_adapter(model, tmp_path / "adapter")
    again, _ = qmica.load(str(folder), bits=4, dtype="fp32", device="cpu")
    qmica.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(input_ids=ids).logits, tuned)
