"""Merged weights against arithmetic in float64, bitsandbytes and PEFT; merged folders read back by transformers."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapted import make_peft_adapter, make_run, transformers_log_p
from safetensors.torch import load_file
from tiny import WIDE, save_tiny, tiny_tokenizer, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from qmica import adapter, durable, merging, model, quant, source, weights
from qmica.errors import QmicaError

LINEARS = ("q_proj", "v_proj")
CPU = torch.device("cpu")


def opened(base):
    return weights.open_weights(source.resolve(str(base)))


def files(folder) -> set[str]:
    return {path.name for path in Path(folder).rglob("*")}


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A llama folder, the same as F32 GGUF, and a run on q and v of each."""
    folder = tmp_path_factory.mktemp("merging")
    base = save_tiny(folder / "base", "llama", dtype=torch.bfloat16)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    file = write_gguf(folder / "base.gguf", network, tiny_tokenizer("llama"))
    runs = {"folder": make_run(folder / "run", base, targets="qv"), "gguf": make_run(folder / "gguf-run", file)}
    return {"base": base, "file": file, "runs": runs}


@pytest.fixture
def own_run(made, tmp_path):
    """A copy of the folder's run to write into."""
    return Path(shutil.copytree(made["runs"]["folder"], tmp_path / "run"))


# ---- the weights


def expected(weight: torch.Tensor, part: adapter.Factors) -> np.ndarray:
    """W + alpha / rank · B A in float64."""
    return weight.double().numpy() + part.scale * part.B.double().numpy() @ part.A.double().numpy()


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_merged_is_weight_plus_delta(made, kind):
    base = opened(made["base"] if kind == "folder" else made["file"])
    part = adapter.read_adapter(made["runs"][kind])
    merged = merging.merged(base, part)
    changed = {f"{path}.weight" for path in part.factors}
    assert set(merged) == set(base) and changed <= set(base)
    for name, tensor in merged.items():
        if name not in changed:
            assert tensor is base[name]
            continue
        oracle = expected(base[name].load(), part.factors[name.removesuffix(".weight")])
        moved = np.abs(oracle - base[name].load().double().numpy()).max()
        error = np.abs(tensor.load().double().numpy() - oracle).max()
        assert moved > 1e-3 and error < 1e-6, f"{name}: wrong by {error:.1e}, moved by {moved:.1e}"


def test_a_part_of_an_adapter_moves_the_weights_by_that_part(made, tmp_path):
    base, folder = opened(made["base"]), made["runs"]["folder"]
    whole, part = (adapter.read_adapter(folder, share) for share in (1.0, 0.3))
    for path, factors in part.factors.items():
        assert torch.allclose(factors.delta(), 0.3 * whole.factors[path].delta(), rtol=1e-6, atol=0)
        moved = merging.merged(base, part)[f"{path}.weight"].load() - base[f"{path}.weight"].load().float()
        assert torch.allclose(moved, 0.3 * whole.factors[path].delta(), atol=1e-6)
    network, _ = adapter.open_run(folder, scale=0.3)  # and what is saved again is what was opened
    again = adapter.read_adapter(adapter.save_adapter(network, tmp_path / "again"))
    assert {path: f.scale for path, f in again.factors.items()} == {path: f.scale for path, f in part.factors.items()}
    out = merging.merge(str(folder), tmp_path / "out", scale=0.3)
    name, factors = next((f"{path}.weight", factors) for path, factors in part.factors.items())
    written = load_file(out / "model.safetensors")[name]
    assert torch.equal(written, (base[name].load().float() + factors.delta()).bfloat16())
    with pytest.raises(QmicaError, match=r"^--scale 0: give more than 0$"):
        merging.merge(str(folder), tmp_path / "none", scale=0)


def test_rows_are_those_of_the_whole(made):
    merged = merging.merged(opened(made["base"]), adapter.read_adapter(made["runs"]["folder"]), "quantized")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        whole, rows = merged[name].load(), merged[name].rows(5, 9)
        assert torch.allclose(whole[5:9], rows, atol=1e-6, rtol=0)
        rows.zero_()  # the caller's own
        assert torch.equal(merged[name].load(), whole)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_quantized_base_is_what_training_saw(made, bits):
    """Oracle: the linears of the model that `model.load` makes for training."""
    seen = model.load(source.resolve(str(made["base"])), bits, "fp32", "cpu")
    part = adapter.read_adapter(made["runs"]["folder"])
    base, rounding = opened(made["base"]), merging.Rounding()
    merged = merging.merged(base, part, "quantized", bits, rounding)
    difference = total = 0.0
    for name, tensor in merged.items():
        path = name.removesuffix(".weight")
        if ".layers." not in name or len(tensor.shape) < 2:
            assert tensor is base[name]
            continue
        weight = quant.dequantize(seen.get_submodule(path))
        oracle = expected(weight, part.factors[path]) if path in part.factors else weight.double().numpy()
        error = np.abs(tensor.load().double().numpy() - oracle).max()
        assert error < 1e-6, f"{name} at {bits} bits: {error:.1e}"
        original = base[name].load().float()
        difference += float((original - weight).square().sum())
        total += float(original.square().sum())
    assert rounding.difference == pytest.approx(difference, rel=1e-4)
    assert rounding.total == pytest.approx(total, rel=1e-4)
    assert {4: 0.05, 8: 0.001, 16: 0.0}[bits] <= (difference / total) ** 0.5 < {4: 0.15, 8: 0.02, 16: 1e-9}[bits]


def test_one_tensor_is_whole_at_a_time(made):
    """A second block does not make the tensor again, another tensor frees it."""
    held, calls = merging._Held(), []
    make = {name: lambda name=name: calls.append(name) or torch.zeros(4, 2) for name in "ab"}
    lazy = {name: held.lazy(name, (4, 2), make[name]) for name in "ab"}
    for name in "aab":
        lazy[name].rows(0, 2)
    assert calls == ["a", "b"] and held.name == "b"


@pytest.fixture(scope="module")
def packed(made, tmp_path_factory):
    """Checkpoints that bitsandbytes quantized, 4 and 8 bits, saved by transformers; and a run on each."""
    folders = {}
    for bits, config in {
        4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        8: BitsAndBytesConfig(load_in_8bit=True),
    }.items():
        folder = tmp_path_factory.mktemp(f"packed-{bits}") / "base"
        network = AutoModelForCausalLM.from_pretrained(made["base"], quantization_config=config, device_map="cpu")
        network.save_pretrained(folder)
        tiny_tokenizer("llama").save_pretrained(folder)
        folders[bits] = folder, make_run(folder.parent / "run", folder, bits=bits, targets="qv")
    return folders


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_is_unpacked(packed, bits, tmp_path, capsys):
    folder, run = packed[bits]
    base, part = opened(folder), adapter.read_adapter(run)
    seen = model.load(source.resolve(str(folder)), bits, "fp32", "cpu")
    merged = merging.merged(base, part)
    assert not merged.packed and set(merged) == {name for name in seen.state_dict() if name in base.shapes}
    both = merging.merged(base, part, "quantized", bits)
    for name, tensor in merged.items():
        path = name.removesuffix(".weight")
        assert torch.equal(tensor.load(), both[name].load())
        if path in part.factors:
            oracle = expected(quant.dequantize(seen.get_submodule(path)), part.factors[path])
            assert np.abs(tensor.load().double().numpy() - oracle).max() < 1e-6
    out = merging.merge(str(run), tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert "its original weights are those that training saw" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


# ---- the folder


def test_the_merged_folder_is_a_model_for_transformers(made, own_run, capsys):
    out = merging.merge(str(own_run))
    assert out == own_run / "merged"
    stored = load_file(out / "model.safetensors")
    merged = merging.merged(opened(made["base"]), adapter.read_adapter(own_run))
    assert stored.keys() == merged.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, merged[name].load().bfloat16()), name
    difference = np.abs(transformers_log_p(out) - transformers_log_p(made["base"], own_run)).max()
    effect = np.abs(transformers_log_p(out) - transformers_log_p(made["base"])).max()
    assert difference < 0.1 < 1.0 < effect, (
        f"{difference:.2e} of {effect:.2e}"
    )  # bf16 of a loud model; measured 0.02 of 2
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    for name in names:
        assert (out / name).read_bytes() == (made["base"] / name).read_bytes(), name
    said = capsys.readouterr().out
    assert re.search(r"merging 4 linears into \S+/base, its own weights \(--base quantized takes the bf16 ones", said)
    assert f"from_pretrained('{out}')" in said and f"qmica export {own_run}" in said


def test_the_quantized_base_says_how_far_it_is(own_run, tmp_path, capsys):
    edit(own_run / "qmica.json", lambda said: said["base"].update(bits=4))
    merging.merge(str(own_run), tmp_path / "out", "quantized")
    said = capsys.readouterr().out
    assert "base as training saw it, NF4 dequantized (--base original takes its own weights)" in said
    share = re.search(r"the quantized weights differ from the original ones by ([\d.]+) % \(root mean square\)", said)
    assert 5 < float(share[1]) < 15  # NF4 of normal weights: 9.6 %


def test_a_gguf_becomes_a_folder(made, tmp_path, capsys):
    run = made["runs"]["gguf"]
    out = merging.merge(str(run), tmp_path / "out")
    difference = np.abs(transformers_log_p(out) - transformers_log_p(made["base"], run)).max()
    assert difference < 0.1, f"{difference:.2e}"
    text = "The keeper counted 1,204 lamps.<|eot_id|>"
    ours, base = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(made["base"])
    assert ours(text).input_ids == base(text).input_ids
    messages = [{"role": "user", "content": "How many?"}]
    assert ours.apply_chat_template(messages, tokenize=False) == base.apply_chat_template(messages, tokenize=False)
    assert GenerationConfig.from_pretrained(out).eos_token_id == base.eos_token_id
    assert "the GGUF's weights, dequantized" in capsys.readouterr().out


def test_a_merged_folder_can_be_a_base(made, own_run, tmp_path):
    out = merging.merge(str(own_run), tmp_path / "merged")
    again = merging.merge(str(make_run(tmp_path / "again", out)), tmp_path / "twice")
    assert weights.shapes_fingerprint(opened(again)) == weights.shapes_fingerprint(opened(made["base"]))


def test_shards(tmp_path):
    """No file above --max-shard-size, an index that transformers follows, the same tensors as in one file."""
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.bfloat16, **WIDE)
    run = make_run(tmp_path / "run", base, targets="qv")
    whole, shards = (
        merging.merge(str(run), tmp_path / "whole"),
        merging.merge(str(run), tmp_path / "shards", max_shard_size="1MB"),
    )
    sizes = {file.name: file.stat().st_size for file in shards.glob("*.safetensors")}
    assert len(sizes) >= 4 and max(sizes.values()) < 1_000_000 + 4096, sizes
    assert not list(whole.glob("*.index.json")) and (shards / "model.safetensors.index.json").exists()
    tensors = {name: tensor for file in sizes for name, tensor in load_file(shards / file).items()}
    stored = load_file(whole / "model.safetensors")
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert np.array_equal(transformers_log_p(shards), transformers_log_p(whole))


@pytest.mark.parametrize("size", ["0", "12", "5 apples", "900kB", "-1GB"])
def test_sizes_that_make_no_sense(own_run, tmp_path, size):
    if size == "12":  # a plain number is GB
        assert merging.merge(str(own_run), tmp_path / "out", max_shard_size=size).exists()
        return
    with pytest.raises(QmicaError) as error:
        merging.merge(str(own_run), tmp_path / "out", max_shard_size=size)
    assert str(error.value) == f"--max-shard-size {size}: give a size such as 5GB or 900MB, 1MB or more"
    assert not (tmp_path / "out").exists()


# ---- what is refused, and what is left behind


def test_a_filled_folder_is_refused(own_run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(QmicaError, match=r"output folder \S+/out is not empty \(it holds thesis.txt\): choose another"):
        merging.merge(str(own_run), tmp_path / "out")
    assert files(tmp_path / "out") == {"thesis.txt"}


def test_no_space_is_said_before_writing(own_run, tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "free_space", lambda folder: 1000)
    with pytest.raises(
        QmicaError, match=r"^merging into \S+/out needs \d+ kB, has 1 kB free at \S+/out: free some space"
    ):
        merging.merge(str(own_run), tmp_path / "out")
    assert files(tmp_path) == {"run"} | files(own_run)


def test_an_interrupted_merge_leaves_nothing(own_run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_write_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merging.merge(str(own_run), tmp_path / "out")
    assert files(tmp_path) == {"run"} | files(own_run)


def trained_elsewhere(own_run, tmp_path, base) -> Path:
    """A run folder whose config names `base`, with an adapter that was trained on another model."""
    folder = tmp_path / "moved"
    folder.mkdir()
    own_run.rename(folder / "adapter")
    (folder / "config.json").write_text(json.dumps({"train": {"model": str(base), "revision": None, "bits": 4}}))
    return folder


def test_other_shapes_are_refused_with_both_names(made, own_run, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", intermediate_size=64)
    with pytest.raises(QmicaError) as error:
        merging.merge(str(trained_elsewhere(own_run, tmp_path, other)), tmp_path / "out")
    assert re.fullmatch(
        rf"the adapter in \S+ was trained on {made['base']}, which {other} is not: their tensors differ in names or "
        "shapes; give the model that it was trained on",
        str(error.value),
    )


def test_other_weights_of_the_same_shapes_are_one_warning(made, own_run, tmp_path, caplog):
    sibling = save_tiny(tmp_path / "sibling", "llama", seed=1, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        merging.open_run(str(trained_elsewhere(own_run, tmp_path, sibling)))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("qmica")]
    assert len(said) == 1 and str(sibling) in said[0] and str(made["base"]) in said[0]


def test_an_adapter_of_peft_on_the_wrong_base(made, tmp_path):
    shapes = {"model.layers.0.self_attn.q_proj": (128, 32), "model.layers.7.mlp.up_proj": (96, 64)}
    run = make_peft_adapter(tmp_path / "run", made["base"], shapes)
    edit(run / "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(made["base"])))
    with pytest.raises(
        QmicaError, match=r"for \S+base, not for \S+base: 2 of 2 layers do not fit \(model.layers.0.self"
    ):
        merging.open_run(str(run))


def test_a_head_that_is_the_embedding_cannot_be_merged(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    run = make_peft_adapter(tmp_path / "run", base, {"lm_head": (448, 64)})
    with pytest.raises(QmicaError, match=r"changes lm_head, which \S+ shares with its embedding: it cannot be merged"):
        merging.open_run(str(run))
    untied = save_tiny(tmp_path / "untied", "llama")
    edit(run / "adapter_config.json", lambda config: config.update(base_model_name_or_path=str(untied)))
    part = merging.open_run(str(run))
    assert not torch.equal(
        merging.merged(part.weights, part.adapter)["lm_head.weight"].load(), part.weights["lm_head.weight"].load()
    )
