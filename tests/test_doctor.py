"""doctor exercises the engines: all pass on a sound machine, a broken one is found, named and given a hint."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from qmica import cli, doctor, ggml, llamacpp, quant
from qmica.errors import QmicaError


def works(found: dict) -> dict[str, bool]:
    return {check["name"]: check["works"] for check in found["checks"]}


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.examine()


def test_everything_works_here(found):
    for check in found["checks"]:
        print(check)
    expected = {"bitsandbytes NF4 on cpu", "bitsandbytes int8 on cpu", "GGUF Q8_0 on cpu"}
    assert expected | {"ggml Q4_K", "llama.cpp (xllamacpp)"} <= set(works(found))
    assert all(works(found).values())
    assert all(check["hint"] is None and check["seconds"] >= 0 for check in found["checks"])
    doctor.require_working(found)


def test_the_machine(found):
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"].count(".") == 2
    machine = found["machine"]
    assert 0 < machine["memory"]["free"] <= machine["memory"]["total"]
    assert machine["cpu_threads"] >= 1 and all(free > 0 for free in machine["disk_free"].values())
    assert set(machine["cpu_features"]) == {"AVX2", "AVX512", "AVX512-BF16", "AMX"}
    assert len(machine["gpus"]) == torch.cuda.device_count()


MAKERS = {
    "NF4": (partial(doctor._quantized, 4), doctor.NF4_ERROR),
    "int8": (partial(doctor._quantized, 8), doctor.INT8_ERROR),
    "Q8_0": (doctor._blocks, doctor.Q8_0_ERROR),
}


@pytest.mark.parametrize("name", MAKERS)
def test_bounds_of_the_quantizers_hold_over_seeds(name):
    make, bounds = MAKERS[name]
    errors = []
    for seed in range(20):
        weight = torch.randn(doctor.OUT, doctor.COLUMNS, generator=torch.Generator().manual_seed(seed))
        layer = make(weight, torch.device("cpu"))
        errors.append(doctor._distance(quant.dequantize(layer), weight))
    print(f"{name}: {min(errors):.4f} to {max(errors):.4f}")
    assert bounds[0] < min(errors) * 0.95 and max(errors) * 1.05 < bounds[1]


def broken_weights(layer, dtype=torch.float32):
    return layer.weight.new_zeros(doctor.OUT, doctor.COLUMNS, dtype=dtype)


BREAKAGES = {
    "weights come back as zeros": (
        quant,
        "dequantize",
        broken_weights,
        ("bitsandbytes", "GGUF"),
        "the weights are off by 1",
    ),
    "the gradient is lost": (
        quant.FrozenMatmul,
        "backward",
        staticmethod(lambda ctx, dy: (torch.zeros(8, doctor.COLUMNS), None)),
        ("bitsandbytes", "GGUF"),
        "the gradient is off by 1",
    ),
    "ggml packs another type": (
        ggml,
        "dequantize",
        lambda raw, kind: np.full((doctor.OUT, doctor.COLUMNS), np.nan, np.float32),
        ("ggml Q4_K",),
        "the weights are off by nan",
    ),
    "llama.cpp computes something else": (
        llamacpp.Llama,
        "logits",
        lambda self, tokens: np.zeros((1, doctor.VOCABULARY), np.float32),
        ("llama.cpp",),
        "the logits are off by",
    ),
    "llama.cpp crashes": (
        llamacpp.Llama,
        "logits",
        lambda self, tokens: 1 / 0,
        ("llama.cpp",),
        "ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_engine_is_found(name, monkeypatch):
    where, attribute, replacement, engines, text = BREAKAGES[name]
    monkeypatch.setattr(where, attribute, replacement)
    found = doctor.examine()
    broken = [check for check in found["checks"] if not check["works"]]
    assert all(any(check["name"].startswith(engine) for check in broken) for engine in engines)
    assert all(check["name"].startswith(engines) for check in broken)
    assert all(text in check["seen"] and check["hint"] for check in broken), broken
    with pytest.raises(QmicaError, match=rf"^{len(broken)} of \d+ checks failed: {engines[0].split(' ')[0]}"):
        doctor.require_working(found)


def test_what_is_not_installed_is_not_needed(monkeypatch, capsys):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    monkeypatch.setattr(llamacpp, "_llama", llamacpp._llama.__wrapped__)  # without what it remembers of this process
    monkeypatch.delenv("QMICA_GGML", raising=False)
    found = doctor.examine()
    missing = [check for check in found["checks"] if not check["works"]]
    assert [check["name"] for check in missing] == ["ggml Q4_K", "llama.cpp (xllamacpp)"]
    assert not any(check["needed"] for check in missing)
    doctor.require_working(found)
    doctor.show(found)
    text = capsys.readouterr().out
    assert "missing llama.cpp (xllamacpp): " in text and "pip install 'qmica[llamacpp]'" in text


def test_numpy_sees_every_part_of_the_layer():
    """The oracle is no formality: without any one tensor its logits move by far more than the bound of 1e-4."""
    tensors = doctor._one_layer(np.random.default_rng(0))
    whole = doctor._first_logits(tensors, 3)
    unseen = {"blk.0.attn_q", "blk.0.attn_k"}  # one token attends to itself alone
    for name in set(tensors) - unseen:
        moved = np.abs(doctor._first_logits({**tensors, name: tensors[name] * 0.5}, 3) - whole).max()
        assert moved > 0.01, (name, moved)


def test_the_verb(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ok      bitsandbytes NF4 on cpu: weights within 9." in text and "Next: qmica train" in text
    assert cli.main(["doctor", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"versions", "machine", "checks"}
    monkeypatch.setattr(llamacpp.Llama, "logits", lambda self, tokens: np.zeros((1, 3)))
    assert cli.main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert not works(json.loads(shown.out))["llama.cpp (xllamacpp)"]
    assert shown.err.startswith("qmica: 1 of ") and len(shown.err.splitlines()) == 1


@pytest.mark.gpu
def test_the_gpu_is_exercised(found):
    assert {"bitsandbytes NF4 on cuda:0", "bitsandbytes int8 on cuda:0", "GGUF Q8_0 on cuda:0"} <= set(works(found))
    assert found["machine"]["gpus"][0]["memory"]["free"] > 0
