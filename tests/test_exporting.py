"""Exported GGUF files in real llama.cpp against transformers and PEFT; what is refused before anything is written."""

import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import gguf
import mix_models
import numpy as np
import pytest
import torch
from adapted import (
    TOKENS,
    divergence,
    largest_difference,
    llama_log_p,
    make_peft_adapter,
    make_run,
    transformers_log_p,
)
from gguf import GGMLQuantizationType as T
from go_template import parse_modelfile, prompt
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LLAMA3_ROPE, LONGROPE, WIDE, default_tokenizer, save_tiny, tiny_tokenizer, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmica import architectures, data, durable, exporting, ggml, imatrix, llamacpp, merging, source, tokenizer
from qmica.config import QUANTS, ExportConfig
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile

needs_llama = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")
GELU_ALLOWED = 1e-3  # of Gemma, whose GELU ggml takes from a table of fp16
ALLOWED = 1e-5  # max|Δ log p|

# name -> family, config: everything that a GGUF says differently stands in one of them
MODELS = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    **{family: (family, {}) for family in FAMILIES if family != "llama"},
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
}


def export(run, **options) -> Path:
    return exporting.export(str(run), ExportConfig(**options))


def as_gguf(path, folder, family) -> Path:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return write_gguf(path, network, tiny_tokenizer(default_tokenizer(family)))


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A base as folder and as F32 GGUF, a run on each, and the log p of the tuned model by transformers and PEFT."""
    folder = tmp_path_factory.mktemp(request.param)
    family, config = MODELS[request.param]
    base = save_tiny(folder / "base", family, **config)
    file = as_gguf(folder / "base.gguf", base, family)
    runs = {"folder": make_run(folder / "run", base), "gguf": make_run(folder / "gguf-run", file)}
    tuned = {kind: transformers_log_p(base, run) for kind, run in runs.items()}
    plain, allowed = transformers_log_p(base), GELU_ALLOWED if "gemma" in family else ALLOWED
    return {"base": base, "file": file, "runs": runs, "tuned": tuned, "plain": plain, "allowed": allowed}


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    """A tiny llama folder and a run on it, for what does not need llama.cpp."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_tiny(folder / "base", "llama")
    return base, make_run(folder / "run", base, targets="qv")


@pytest.fixture
def own_run(llama_run, tmp_path):
    """A copy of the run to write into."""
    return Path(shutil.copytree(llama_run[1], tmp_path / "run"))


# ---- the same numbers as transformers


@needs_llama
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_f32_in_llama_cpp_is_transformers_with_the_adapter(case, kind, tmp_path, measured):
    reference = case["tuned"][kind]
    effect = largest_difference(reference, case["plain"])
    assert effect > 100 * case["allowed"], f"the adapter moves log p by {effect:.1e} only"
    merged = llama_log_p(export(case["runs"][kind], quant="F32", out=tmp_path / "merged.gguf"))
    adapter = export(case["runs"][kind], adapter=True, out=tmp_path / "adapter.gguf")
    both, plain = llama_log_p(case["file"], [(adapter, 1.0)]), llama_log_p(case["file"])
    found = {
        "base": largest_difference(plain, case["plain"]),
        "merged": largest_difference(merged, reference),
        "with_adapter": largest_difference(both, reference),
        "between_both": largest_difference(merged, both),
    }
    measured(allowed=case["allowed"], **found, effect=effect)
    assert max(found.values()) <= case["allowed"], found


@needs_llama
def test_half_of_an_adapter_is_not_the_adapter(case, tmp_path):
    adapter = export(case["runs"]["folder"], adapter=True, out=tmp_path / "adapter.gguf")
    half = llama_log_p(case["file"], [(adapter, 0.5)])
    assert largest_difference(half, case["tuned"]["folder"]) > 100 * case["allowed"]
    none = llama_log_p(case["file"], [(adapter, 0.0)])
    assert largest_difference(none, case["plain"]) <= case["allowed"]


@needs_llama
@pytest.mark.parametrize(
    "where, what, broken",
    [
        (architectures.Architecture, "row_order", lambda self, name, config: None),
        (exporting, "_alpha", lambda factors: 4.0),  # the rank: a scale of 1 in place of 2
    ],
)
def test_a_forgotten_property_is_seen(where, what, broken, llama_run, tmp_path, monkeypatch):
    base, run = llama_run
    file = as_gguf(tmp_path / "base.gguf", base, "llama")
    reference = transformers_log_p(base, run)
    monkeypatch.setattr(where, what, broken)
    adapter = export(run, adapter=True, out=tmp_path / "adapter.gguf")
    seen = {"adapter": llama_log_p(file, [(adapter, 1.0)])}
    if what == "row_order":
        seen["merged"] = llama_log_p(export(run, quant="F32", out=tmp_path / "merged.gguf"))
    for name, found in seen.items():
        assert largest_difference(found, reference) > 100 * ALLOWED, f"{name} without {what} passes for right"


@needs_llama
def test_rows_are_reordered_across_blocks(llama_run, tmp_path, monkeypatch):
    _, run = llama_run
    whole = export(run, quant="F32", out=tmp_path / "whole.gguf").read_bytes()
    monkeypatch.setattr(exporting, "BLOCK_BYTES", 5 * 64 * 4)  # five rows: no whole number of heads
    assert export(run, quant="F32", out=tmp_path / "blocks.gguf").read_bytes() == whole


@needs_llama
@pytest.mark.parametrize("quant", ["F16", "BF16"])
def test_an_adapter_in_16_bits(llama_run, tmp_path, quant):
    base, run = llama_run
    adapter = export(run, adapter=True, quant=quant, out=tmp_path / "adapter.gguf")
    assert {tensor.type for tensor in GGUFFile.open(adapter, adapter=True).tensors.values()} == {T[quant]}
    found = llama_log_p(as_gguf(tmp_path / "base.gguf", base, "llama"), [(adapter, 1.0)])
    difference = largest_difference(found, transformers_log_p(base, run))
    assert difference < 0.05, f"{quant}: {difference:.1e}"  # measured: 1.6e-3 and 1.1e-2, of an effect of 1.8


@needs_llama
def test_lora_and_a_quantized_base(tmp_path):
    """A trained B in fp32, and the weights that training saw: PEFT on the dequantized weights."""
    base = save_tiny(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, bits=4, method="lora")
    merged = llama_log_p(export(run, quant="F32", out=tmp_path / "merged.gguf"))
    assert largest_difference(merged, transformers_log_p(base, run)) <= ALLOWED
    seen = tmp_path / "seen"
    shutil.copytree(base, seen)
    save_file(nf4_round_trip(load_file(base / "model.safetensors")), seen / "model.safetensors", {"format": "pt"})
    found = llama_log_p(export(run, quant="F32", base="quantized", out=tmp_path / "quantized.gguf"))
    assert largest_difference(found, transformers_log_p(seen, run)) <= ALLOWED
    assert largest_difference(found, merged) > 100 * ALLOWED


def nf4_round_trip(tensors):
    """What bitsandbytes makes of the linears of the decoder layers."""
    import oracle
    from bitsandbytes import functional

    changed = dict(tensors)
    for name, weight in tensors.items():
        if ".layers." in name and weight.dim() == 2:
            packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            changed[name] = oracle.dequantized(packed, state).contiguous()
    return changed


# ---- types


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A llama of width 512, where every K-quant applies, a run on it, and its log p."""
    folder = tmp_path_factory.mktemp("wide")
    base = save_tiny(folder / "base", "llama", **WIDE)
    run = make_run(folder / "run", base, rank=8)
    return base, run, transformers_log_p(base, run)


# mean KL(transformers || llama.cpp) in nats; measured over 5 seeds and both families, times 1.3 (the spread is < 8 %)
DIVERGENCE = {
    "F32": 1e-11, "F16": 5.5e-7, "BF16": 3.5e-5, "Q8_0": 4e-4, "Q4_0": 0.042, "Q4_1": 0.033, "Q5_0": 0.011,
    "Q5_1": 0.009, "Q2_K": 0.36, "Q3_K_S": 0.12, "Q3_K_M": 0.095, "Q3_K_L": 0.092, "Q4_K_S": 0.027, "Q4_K_M": 0.0265,
    "Q5_K_S": 0.0085, "Q5_K_M": 0.008, "Q6_K": 0.0029, "IQ4_NL": 0.034, "IQ4_XS": 0.034,
}  # fmt: skip


@needs_llama
@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_in_llama_cpp(wide, quant, tmp_path):
    _, run, reference = wide
    file = export(run, quant=quant, out=tmp_path / "model.gguf")
    assert GGUFFile.open(file).metadata["general.file_type"] == ggml.named(quant).file_type
    found = llama_log_p(file)
    assert np.isfinite(found).all()
    kl = divergence(reference, found)
    print(f"{quant}: {kl:.2e}")
    assert kl < DIVERGENCE[quant], f"{quant}: KL {kl:.2e}, allowed {DIVERGENCE[quant]:.2e}"


@needs_llama
def test_the_printed_table_at_width_512(wide, tmp_path, capsys):
    """llama-quantize's Q4_K_M of two layers: Q6_K for the head and the last layer's v and down, Q4_K for the rest."""
    _, run, _ = wide
    export(run, quant="Q4_K_M", out=tmp_path / "model.gguf")
    said = capsys.readouterr().out
    print(said)
    rows = dict(re.findall(r"^(\w+) +(\d+) +[\d.]+ [kM]?B", said, re.MULTILINE))
    assert rows == {"F32": "5", "Q4_K": "13", "Q6_K": "3"}
    down, v, head = 512 * 768, 256 * 512, 448 * 512
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 3 * 512 * 768
    finer = head + down + v
    sizes = {"F32": 5 * 512 * 4, "Q4_K": (2 * layer + head - down - v) * 144 // 256, "Q6_K": finer * 210 // 256}
    for name, nbytes in sizes.items():
        assert re.search(rf"^{name} .* {re.escape(durable.size_text(nbytes))}\s*$", said, re.MULTILINE), (name, nbytes)
    assert "no multiple" not in said
    assert f"llama-cli -m {tmp_path / 'model.gguf'}" in said
    assert f"qmica chat {tmp_path / 'model.gguf'} --prompt" in said
    assert "with --ollama it comes with a Modelfile for Ollama" in said


@needs_llama
def test_fallbacks_are_said_in_one_line(own_run, capsys):
    export(own_run, quant="Q4_K_M")
    said = capsys.readouterr().out
    # rows of 64, 96 and 128: the head and the last layer's v and down fall to Q8_0, the other 13 matrices to Q5_0
    assert "16 tensors have rows that are no multiple of Q4_K's block of 256: 13 as Q5_0, 3 as Q8_0" in said


# ---- several types at once


@needs_llama
def test_several_types_are_read_once_and_are_what_each_is_alone(wide, tmp_path, monkeypatch, capsys):
    reads, sum_ = [], merging._sum

    def counted(*parts):
        merged = sum_(*parts)
        return replace(merged, read=lambda start, stop: reads.append(start) or merged.read(start, stop))

    monkeypatch.setattr(merging, "_sum", counted)
    quants = ("Q4_K_M", "Q8_0", "F32")
    found = export(wide[1], quant=",".join(quants), out=tmp_path / "several")
    assert found == [tmp_path / "several" / f"run.{quant}.gguf" for quant in quants]
    assert files(tmp_path / "several") == {file.name for file in found}
    assert len(reads) == 14, "7 linears of 2 layers, a block each"
    said = capsys.readouterr().out
    assert said.count("merging 14 linears") == 1
    assert all(f"run.{quant}.gguf:\n" in said and f"run.{quant}.gguf: " in said for quant in quants)
    for quant, file in zip(quants, found, strict=True):
        alone = export(wide[1], quant=quant, out=tmp_path / "alone.gguf")
        assert alone.read_bytes() == file.read_bytes(), quant


@needs_llama
def test_several_types_are_each_told_of(wide, tmp_path, capsys):
    """What rounding leaves, and a Modelfile and a name in Ollama, for each."""
    folder = tmp_path / "several"
    export(wide[1], quant="Q8_0,Q2_K", out=folder, ollama=True)
    said = capsys.readouterr().out
    kept = next(line for line in said.splitlines() if "of the adapter's change rounding keeps" in line)
    assert "Q2_K" in kept, "of the second file too; Q8_0 loses nothing worth a line"
    for quant in ("Q2_K", "Q8_0"):
        assert parse_modelfile((folder / f"run.{quant}.Modelfile").read_text())["from"] == f"./run.{quant}.gguf"
        assert f"ollama create run:{quant} -f {folder / f'run.{quant}.Modelfile'}" in said


def test_several_files_appear_together_or_not_at_all(own_run, monkeypatch):
    before, quantize, calls = files(own_run), ggml.quantize, []

    def failing(rows, type_, *more):
        calls.append(type_)
        if len(calls) == 30:
            raise RuntimeError("disk on fire")
        return quantize(rows, type_, *more)

    monkeypatch.setattr(ggml, "quantize", failing)
    with pytest.raises(RuntimeError):
        export(own_run, quant="Q8_0,Q4_0,F16")
    assert {T.Q8_0, T.Q4_0, T.F16} <= set(calls) and files(own_run) == before


def test_space_is_wanted_for_all_of_several(own_run, monkeypatch):
    before = files(own_run)
    one = export(own_run, quant="F16", out=own_run / "one.gguf").stat().st_size
    (own_run / "one.gguf").unlink()
    monkeypatch.setattr(durable, "free_space", lambda folder: exporting.METADATA_BYTES + 1.5 * one)
    with pytest.raises(QmicaError, match=r"exporting run\.F16\.gguf, run\.BF16\.gguf needs .*, has .* free at"):
        export(own_run, quant="F16,BF16")
    assert files(own_run) == before
    export(own_run, quant="F16", out=own_run / "one.gguf")


def test_several_files_need_a_folder(own_run, tmp_path):
    file = tmp_path / "full"
    file.write_text("x")
    with pytest.raises(
        QmicaError, match=r"cannot write .*full/run\.F16\.gguf: a part of the path is a file, not a folder"
    ):
        export(own_run, quant="F16,BF16", out=file)
    with pytest.raises(QmicaError, match=r"full\.gguf is one file, and --quant F16,BF16 makes 2: name a folder"):
        export(own_run, quant="F16,BF16", out=tmp_path / "full.gguf")
    assert files(tmp_path) >= {"full"} and file.read_text() == "x"


# ---- importance matrices


def importance_of(shapes, seed=3):
    """Of every linear but the embeddings, as llama-imatrix measures by default; loud, so that types change."""
    random = np.random.default_rng(seed)
    linears = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.startswith("blk.")}
    return {name: random.random(shape[-1], np.float32) ** 4 for name, shape in linears.items()}


@pytest.fixture(scope="module")
def weighed(wide, tmp_path_factory):
    """The width-512 model in F32, and an importance matrix for it."""
    folder = tmp_path_factory.mktemp("weighed")
    file = GGUFFile.open(export(wide[1], quant="F32", out=folder / "base.gguf"))
    columns = importance_of({name: tensor.shape for name, tensor in file.tensors.items()})
    matrix = mix_models.write_imatrix(folder / "wide.imatrix.gguf", columns)
    return file, imatrix.read(matrix).columns, matrix  # rounded: the file has sums and a count


@needs_llama
@pytest.mark.parametrize("quant", ["Q4_K_M", "Q2_K", "IQ4_XS", "Q4_0", "Q5_1"])
def test_each_tensor_is_weighed_by_its_own_columns(wide, weighed, quant, tmp_path, capsys):
    """ggml's C on the F32 file's rows, the permuted ones of q and k among them: the columns are llama.cpp's."""
    plain, columns, matrix = weighed
    found = GGUFFile.open(export(wide[1], quant=quant, imatrix=matrix, out=tmp_path / "model.gguf"))
    without = GGUFFile.open(export(wide[1], quant=quant, out=tmp_path / "plain.gguf"))
    for name, tensor in found.tensors.items():
        rows = plain.tensors[name].raw().view(np.float32)
        expected = ggml.quantize(rows, tensor.type, importance=columns.get(name))
        assert np.array_equal(tensor.raw(), expected), name
    changed = {n for n in columns if not np.array_equal(found.tensors[n].raw(), without.tensors[n].raw())}
    assert changed == set(columns)
    said = capsys.readouterr().out
    assert (
        "14 of 16 tensors are weighed by it, measured on wiki.txt (3 chunks); token_embd.weight, output.weight" in said
    )
    keys = {key.removeprefix("quantize.imatrix."): value for key, value in found.metadata.items() if "imatrix" in key}
    assert keys == {"file": "wide.imatrix.gguf", "dataset": "wiki.txt", "entries_count": 14, "chunks_count": 3}
    assert not [key for key in without.metadata if "imatrix" in key]


@needs_llama
def test_an_importance_matrix_of_another_model_is_refused(wide, weighed, tmp_path):
    narrow = {name: values[:256] for name, values in weighed[1].items()}
    matrix = mix_models.write_imatrix(tmp_path / "narrow.gguf", narrow)
    with pytest.raises(
        QmicaError, match=r"for another model: blk.0.attn_q.weight has 256 .* and 512 in .*, and 11 more"
    ):
        export(wide[1], imatrix=matrix, out=tmp_path / "model.gguf")
    assert files(tmp_path) == {"narrow.gguf"}


@needs_llama
def test_only_those_types_that_weigh_are_said_to_be_weighed(wide, weighed, tmp_path, capsys):
    plain = export(wide[1], quant="Q8_0", out=tmp_path / "plain.gguf")
    _, fine = export(wide[1], quant="Q4_K_S,Q8_0", imatrix=weighed[2], out=tmp_path)
    assert fine.read_bytes() == plain.read_bytes()
    assert capsys.readouterr().out.count("weighed by it") == 1


# ---- from a GGUF


@pytest.fixture(scope="module")
def wide_gguf(wide, tmp_path_factory):
    """The width-512 model as Q4_K_M, and a run on its q and v only."""
    folder = tmp_path_factory.mktemp("wide-gguf")
    base = export(wide[1], quant="Q4_K_M", out=folder / "base.gguf")
    return base, make_run(folder / "run", base, targets="qv")


@needs_llama
def test_untouched_tensors_are_copied_byte_for_byte(wide_gguf, tmp_path, capsys):
    base, run = wide_gguf
    before = GGUFFile.open(base)
    after = GGUFFile.open(export(run, quant="Q4_K_M", out=tmp_path / "again.gguf"))
    same = {name for name in before.tensors if np.array_equal(before.tensors[name].raw(), after.tensors[name].raw())}
    touched = {f"blk.{layer}.attn_{linear}.weight" for layer in (0, 1) for linear in "qv"}
    assert set(before.tensors) - same == touched
    assert list(after.tensors) == list(before.tensors)
    assert {n: (t.type, t.shape) for n, t in after.tensors.items()} == {
        n: (t.type, t.shape) for n, t in before.tensors.items()
    }
    assert (after.metadata, after.kinds) == (before.metadata, before.kinds)
    said = capsys.readouterr().out
    assert [line.split()[::2][:1] for line in said.splitlines() if "copied byte for byte" in line] == [
        ["F32"],
        ["Q4_K"],
        ["Q6_K"],
    ]
    assert "the base is Q4_K/Q6_K already and is rounded a second time: --adapter beside it is not rounded" in said


@needs_llama
def test_another_type_requantizes_and_keeps_the_metadata(wide_gguf, tmp_path, capsys):
    base, run = wide_gguf
    before, after = GGUFFile.open(base), GGUFFile.open(export(run, quant="Q8_0", out=tmp_path / "again.gguf"))
    said = capsys.readouterr().out
    assert "copied" in said and "second time" not in said  # norms stay F32; Q8_0 is fine enough
    changed = {key for key in before.metadata if after.metadata[key] != before.metadata[key]}
    assert changed == {"general.file_type"} and after.metadata.keys() == before.metadata.keys()
    assert after.tensors["blk.0.ffn_up.weight"].type == T.Q8_0
    original, again = (
        ggml.dequantize(f.tensors["blk.0.attn_k.weight"].raw(), f.tensors["blk.0.attn_k.weight"].type)
        for f in (before, after)
    )
    error = np.abs(again - original).max() / np.abs(original).max()
    assert error < 1 / 127, f"an untouched tensor moved by {error:.1e}"


@needs_llama
def test_a_split_source_with_rope_freqs_becomes_one_file(tmp_path):
    base = save_tiny(tmp_path / "base", "llama", rope_parameters=LLAMA3_ROPE)
    whole = as_gguf(tmp_path / "base.gguf", base, "llama")
    first = split(whole, tmp_path / "parts", 8)
    run = make_run(tmp_path / "run", first)
    out = export(run, quant="F32", out=tmp_path / "out.gguf")
    again = GGUFFile.open(out)
    assert not [key for key in again.metadata if key.startswith("split.")]
    rope = GGUFFile.open(whole).tensors["rope_freqs.weight"].raw()
    assert np.array_equal(again.tensors["rope_freqs.weight"].raw(), rope)
    assert largest_difference(llama_log_p(out), transformers_log_p(base, run)) <= ALLOWED


def split(path, folder, tensors: int) -> Path:
    """The same GGUF in parts of so many tensors, by gguf's own writer: the first part."""
    folder.mkdir()
    file = GGUFFile.open(path)
    writer = gguf.GGUFWriter(folder / "base.gguf", file.architecture, split_max_tensors=tensors)
    for key, value in file.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, *file.kinds[key])
    for name, tensor in file.tensors.items():
        writer.add_tensor(name, tensor.raw().view(np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.iterdir())


def test_what_a_folder_says_of_itself(llama_run, tmp_path):
    base, run = llama_run
    copy = Path(shutil.copytree(base, tmp_path / "a-model"))
    (copy / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\nlicense: none\n")
    moved = Path(shutil.copytree(run, tmp_path / "notes"))
    edit(moved / "qmica.json", lambda said: said["base"].update(id=str(copy)))
    said = GGUFFile.open(export(moved, quant="F32")).metadata
    expected = {"type": "model", "architecture": "llama", "name": "notes", "license": "apache-2.0", "file_type": 0}
    assert {key: said[f"general.{key}"] for key in expected} == expected
    assert (said["general.base_model.count"], said["general.base_model.0.name"]) == (1, "a-model")
    card = GGUFFile.open(export(moved, adapter=True), adapter=True).metadata
    lora = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0, "general.name": "notes"}
    assert {key: card[key] for key in lora} == lora
    assert not [key for key in card if key.startswith("tokenizer.")]


@needs_llama
def test_phi_3_is_in_the_name_where_llama_cpp_goes_by_it(tmp_path):
    """Phi-3's special tokens swallow the newline after them: trained so, served so."""
    run = make_run(tmp_path / "run", save_tiny(tmp_path / "base", "llama", tokenizer="phi3"), targets="qv")
    file = export(run, quant="F32", out=tmp_path / "phi.gguf")
    assert GGUFFile.open(file).metadata["general.name"] == "run (Phi-3)"
    chat = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    with llamacpp.Llama(file, context=256, threads=1) as llama:
        assert llama.tokenize(chat, add_bos=True) == tiny_tokenizer("phi3")(chat).input_ids


def test_default_names(own_run, capsys):
    assert export(own_run, quant="q8_0") == own_run / "run.Q8_0.gguf"
    assert export(own_run, adapter=True) == own_run / "run.adapter.gguf"
    said = capsys.readouterr().out
    assert f"llama-cli -m BASE.gguf --lora {own_run / 'run.adapter.gguf'}" in said


@needs_llama
def test_a_real_model(smollm2_gguf, tmp_path, capsys):
    """SmolLM2 in Q4_1: what the adapter does not touch is copied, and both ways to use it agree."""
    paths = {f"model.layers.{i}.self_attn.{p}_proj": (r, 576) for i in range(30) for p, r in (("q", 576), ("v", 192))}
    run = make_peft_adapter(tmp_path / "run", smollm2_gguf, paths)
    merged = GGUFFile.open(export(run, quant="Q4_1", out=tmp_path / "merged.gguf"))
    assert re.search(r"Q4_1 +210 +\S+ MB +150 copied byte for byte", capsys.readouterr().out)
    before = GGUFFile.open(smollm2_gguf)
    same = {n for n, tensor in before.tensors.items() if np.array_equal(tensor.raw(), merged.tensors[n].raw())}
    assert before.tensors.keys() - same == {f"blk.{i}.attn_{p}.weight" for i in range(30) for p in "qv"}
    adapter = export(run, adapter=True, out=tmp_path / "adapter.gguf")
    assert f"llama-cli -m {smollm2_gguf} --lora {adapter}" in capsys.readouterr().out
    plain, both, one = llama_log_p(smollm2_gguf), llama_log_p(smollm2_gguf, [(adapter, 1.0)]), llama_log_p(merged.path)
    effect, kl = divergence(both, plain), divergence(both, one)
    print(f"SmolLM2: {kl:.2e} of {effect:.2e}")
    assert kl < 0.25 * effect, (
        f"KL {kl:.2e} between the adapter beside the base and in it, of an effect of {effect:.2e}"
    )


# ---- in parts


@needs_llama
@pytest.mark.parametrize("quant", ["F16", "Q4_K_M"])
def test_parts_are_one_model(wide, tmp_path, quant, capsys):
    """llama.cpp and our own reader open the first part; the parts hold what the one file holds."""
    whole = export(wide[1], quant=quant, out=tmp_path / "whole.gguf")
    first = export(wide[1], quant=quant, out=tmp_path / "parts.gguf", max_shard_size="1MB")
    said = capsys.readouterr().out
    parts = sorted(first.parent.iterdir())
    count = len(parts)
    assert first == parts[0] == tmp_path / "parts" / f"parts-00001-of-{count:05d}.gguf" and count > 2
    assert f"{tmp_path / 'parts'}: {count} parts" in said and f"llama-cli -m {first}" in said
    one, many = GGUFFile.open(whole), GGUFFile.open(first)
    assert list(many.tensors) == list(one.tensors)
    assert all(np.array_equal(many.tensors[n].raw(), tensor.raw()) for n, tensor in one.tensors.items())
    added = {"split.no": 0, "split.count": count, "split.tensors.count": len(one.tensors)}
    assert many.metadata == {**one.metadata, **added}
    assert np.array_equal(llama_log_p(first), llama_log_p(whole))
    sizes = [sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(part).tensors) for part in parts]
    largest = max(tensor.nbytes for tensor in one.tensors.values())
    assert all(size <= max(1_000_000, largest) for size in sizes) and sum(sizes) == sum(
        tensor.nbytes for tensor in one.tensors.values()
    )


def test_a_small_model_stays_one_file(own_run):
    assert export(own_run, quant="Q8_0", max_shard_size="1GB") == own_run / "run.Q8_0.gguf"


def test_parts_whole_or_not_at_all(wide, tmp_path, monkeypatch):
    run = Path(shutil.copytree(wide[1], tmp_path / "run"))
    before, calls, quantize = files(tmp_path), [], ggml.quantize

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return quantize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ggml, "quantize", failing)
        with pytest.raises(KeyboardInterrupt):
            export(run, quant="F16", max_shard_size="1MB")
    assert files(tmp_path) == before and len(calls) == 12
    first = export(run, quant="F16", max_shard_size="1MB")
    with pytest.raises(QmicaError, match=r"output folder \S+/run\.F16 is not empty \(it holds run\.F16-00001-of-"):
        export(run, quant="F16", max_shard_size="1MB")
    assert GGUFFile.open(first).tensors


# ---- for Ollama


def test_a_modelfile_beside_the_model(own_run, llama_run, capsys):
    file = export(own_run, quant="Q8_0", ollama=True)
    path = own_run / "run.Q8_0.Modelfile"
    assert capsys.readouterr().out.splitlines()[-1] == f"  ollama create run -f {path}"
    said = parse_modelfile(path.read_text())
    assert (path.parent / said["from"]).samefile(file)
    assert set(said["stop"]) == {"<|eot_id|>", "<|end_of_text|>"} and said["num_ctx"] == 512
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many lamps?"}]
    tokens = AutoTokenizer.from_pretrained(llama_run[0])
    expected = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokens.bos_token + prompt(said, messages) == expected  # Ollama has llama.cpp put BOS before it
    assert GGUFFile.open(file).metadata["tokenizer.ggml.add_bos_token"] is True


def test_a_modelfile_beside_an_adapter(own_run, llama_run, tmp_path, capsys):
    export(own_run, adapter=True, ollama=True)
    assert f"ollama create run -f {own_run / 'run.adapter.Modelfile'}" in capsys.readouterr().out
    text = (own_run / "run.adapter.Modelfile").read_text()
    said = parse_modelfile(text)
    assert (said["from"], said["adapter"]) == ("./BASE.gguf", "./run.adapter.gguf")
    assert text.startswith(f"# BASE.gguf: {llama_run[0]} as a GGUF, in any type\n")
    base = as_gguf(tmp_path / "base.gguf", llama_run[0], "llama")
    run = make_run(tmp_path / "gguf-run", base)
    adapter = export(run, adapter=True, ollama=True)
    said = parse_modelfile(adapter.with_suffix(".Modelfile").read_text())
    assert Path(said["from"]).samefile(base) and (run / said["adapter"]).samefile(adapter)
    assert said["template"] == parse_modelfile(text)["template"]


def test_a_modelfile_beside_a_split_base(llama_run, tmp_path):
    """Ollama reads no parts."""
    base = as_gguf(tmp_path / "base.gguf", llama_run[0], "llama")
    first = split(base, tmp_path / "parts", 9)
    run = make_run(tmp_path / "run", first)
    text = export(run, adapter=True, ollama=True).with_suffix(".Modelfile").read_text()
    assert text.startswith(f"# BASE.gguf: of llama-gguf-split --merge {first} BASE.gguf\n")
    assert parse_modelfile(text)["from"] == "./BASE.gguf"


def test_a_modelfile_of_a_base_model(llama_run, tmp_path):
    """It goes on with a text; one that was taught chats gets the form in which it was taught them."""
    base = Path(shutil.copytree(llama_run[0], tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    run = tmp_path / "run"
    make_run(run / "adapter", base, targets="qv")
    for formats, template in ((["text"], "{{ .Prompt }}"), (["messages", "text"], None)):
        record = {"train": {"model": str(base), "revision": None, "bits": 16}, "data": {"formats": formats}}
        (run / "config.json").write_text(json.dumps(record))
        export(run, adapter=True, ollama=True)
        said = parse_modelfile((run / "run.adapter.Modelfile").read_text())
        if template:
            assert said["template"] == template
        file = export(run, quant="F32", out=tmp_path / "merged.gguf")  # llama-cli and qmica chat ask as it was taught
        assert (tokenizer.CHAT_TEMPLATE in GGUFFile.open(file).metadata) == (template is None)
    assert tokenizer.load(source.resolve(file)).chat_template == data.chat_template(
        tokenizer.load(source.resolve(base))
    )
    assert prompt(said, [{"role": "user", "content": "Hi"}]) == "### User:\nHi\n\n### Assistant:\n"


def test_a_modelfile_of_a_real_model(smollm2_gguf, tmp_path, capsys):
    run = make_peft_adapter(tmp_path / "run", smollm2_gguf, {"model.layers.0.self_attn.q_proj": (576, 576)})
    export(run, adapter=True, ollama=True)
    said = parse_modelfile((run / "run.adapter.Modelfile").read_text())
    assert said["system"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert said["stop"] == ["<|endoftext|>", "<|im_end|>", "<reponame>"] and said["num_ctx"] == 8192
    assert prompt(said, [{"role": "user", "content": "Hi"}]) == (
        f"<|im_start|>system\n{said['system']}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# ---- whole or not at all


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError("disk on fire")])
def test_an_interrupted_export_leaves_nothing(own_run, monkeypatch, failure):
    before, calls, quantize = files(own_run), [], ggml.quantize

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise failure
        return quantize(*arguments)

    monkeypatch.setattr(ggml, "quantize", failing)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        export(own_run, quant="Q8_0")
    assert len(calls) == 5 and files(own_run) == before


def test_a_failed_export_leaves_the_old_file(own_run, monkeypatch):
    file = export(own_run, quant="Q8_0")
    content = file.read_bytes()
    monkeypatch.setattr(exporting, "check", lambda *_: exporting.GGUFFile.open(own_run / "adapter_config.json"))
    with pytest.raises(QmicaError, match="not a GGUF"):
        export(own_run, quant="Q8_0")
    assert file.read_bytes() == content and len(list(own_run.glob("*.gguf*"))) == 1


def test_damage_is_seen_when_the_file_is_read_back(own_run, monkeypatch):
    written = exporting.write

    def damaged(paths, plans):
        samples = written(paths, plans)
        tensor = GGUFFile.open(paths[0]).tensors["blk.1.attn_v.weight"]
        with open(paths[0], "r+b") as file:
            file.seek(tensor.offset + tensor.nbytes - 1)
            file.write(b"\x55" if tensor.raw()[-1, -1] != 0x55 else b"\xaa")
        return samples

    monkeypatch.setattr(exporting, "write", damaged)
    with pytest.raises(RuntimeError, match=r"the bytes of blk\.1\.attn_v\.weight were not read back"):
        export(own_run, quant="Q8_0")
    assert not list(own_run.glob("*.gguf*"))


def test_no_space_is_said_before_writing(own_run, monkeypatch):
    monkeypatch.setattr(durable, "free_space", lambda folder: 1_000_000)
    before = files(own_run)
    with pytest.raises(QmicaError) as error:
        export(own_run, quant="F16")
    assert re.fullmatch(
        rf"exporting run\.F16\.gguf needs 16\.\d MB, has 1\.0 MB free at {re.escape(str(own_run))}: "
        "free some space or choose another folder",
        str(error.value),
    )
    assert files(own_run) == before
    assert export(own_run, adapter=True).stat().st_size < 1_000_000


def test_a_weight_that_is_not_a_number_is_named(own_run):
    tensors = load_file(own_run / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors[name][0, 0] = 1e7
    save_file(tensors, own_run / "adapter_model.safetensors")
    with pytest.raises(QmicaError, match=r"^blk\.1\.attn_v\.weight: a weight to be written as F16 is above 65504"):
        export(own_run, quant="F16")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, own_run / "adapter_model.safetensors")
    with pytest.raises(QmicaError, match=r"layers\.1\.self_attn\.v_proj holds what is no number \(NaN or infinite\)"):
        export(own_run, quant="Q8_0")
    assert not list(own_run.glob("*.gguf*"))


def test_the_base_is_never_overwritten(llama_run, tmp_path):
    file = as_gguf(tmp_path / "base.gguf", llama_run[0], "llama")
    run, content = make_run(tmp_path / "run", file), file.read_bytes()
    with pytest.raises(QmicaError, match=r"base\.gguf is the base model itself: choose another name"):
        export(run, quant="F32", out=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_K_M"])
def test_types_that_an_adapter_cannot_have(own_run, quant):
    with pytest.raises(QmicaError) as error:
        export(own_run, adapter=True, quant=quant)
    assert str(error.value) == (
        f"--quant {quant} is for merged models: an adapter is written in F32 (the default), F16 or BF16"
    )


# ---- without llama.cpp


@pytest.fixture
def without_llama(monkeypatch):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)


def test_a_k_quant_whose_tensors_all_fall_back_does_without(own_run, without_llama):
    before = files(own_run)
    export(own_run, quant="Q4_K_M")
    assert files(own_run) - before == {"run.Q4_K_M.gguf"}


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q6_K"])
def test_a_k_quant_without_llama_cpp_is_refused_before_writing(wide, without_llama, tmp_path, quant):
    with pytest.raises(QmicaError, match=r"xllamacpp is not installed: pip install 'qmica\[llamacpp\]'"):
        export(wide[1], quant=quant, out=tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0", "BF16"])
def test_the_simple_types_do_without_llama_cpp(wide, monkeypatch, tmp_path, quant, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(llamacpp, "_extension", lambda: None)
        file = export(wide[1], quant=quant, out=tmp_path / "model.gguf")
    said = "output.weight: Q8_0 in place of Q6_K, which needs pip install 'qmica[llamacpp]'"
    assert (said in capsys.readouterr().out) == (quant == "Q4_0")
    if llamacpp.available():
        kl = divergence(wide[2], llama_log_p(file))
        assert kl < DIVERGENCE[quant], f"{quant}: {kl:.2e}"


# ---- the wrong base


def test_another_family_is_refused_by_name(own_run, llama_run, tmp_path):
    base = Path(shutil.copytree(llama_run[0], tmp_path / "base"))
    edit(base / "config.json", lambda config: config.update(model_type="gpt_neox"))
    edit(own_run / "qmica.json", lambda said: said["base"].update(id=str(base)))
    for options in ({"quant": "F32"}, {"adapter": True}):
        with pytest.raises(
            QmicaError, match=r"architecture 'gpt_neox' is not supported; supported are llama, mistral, qwen2"
        ):
            export(own_run, **options)


@pytest.mark.parametrize("options", [{"quant": "Q8_0"}, {"adapter": True}])
def test_an_adapter_on_the_wrong_base_is_refused_with_both_names(own_run, tmp_path, options):
    other = save_tiny(tmp_path / "other", "llama", num_hidden_layers=3)
    trained_on = json.loads((own_run / "qmica.json").read_text())["base"]["id"]
    folder = tmp_path / "moved"
    folder.mkdir()
    own_run.rename(folder / "adapter")
    (folder / "config.json").write_text(json.dumps({"train": {"model": str(other), "revision": None, "bits": 4}}))
    with pytest.raises(QmicaError) as error:
        export(folder, **options)
    assert trained_on in str(error.value) and str(other) in str(error.value) and "\n" not in str(error.value)
    assert not list(folder.glob("*.gguf*"))


# ---- memory

MEASURE = """
    import sys, threading, time
    from pathlib import Path
    from qmica import exporting, merging
    from qmica.config import ExportConfig

    def field(name):
        text = open("/proc/self/status").read()
        return int(text.split(name + ":")[1].split()[0]) * 1024

    def measured(job):
        before, peak, done = field("RssAnon"), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, field("RssAnon"))

        thread = threading.Thread(target=watch)
        thread.start()
        job()
        done.set()
        thread.join()
        print("MEASURED", peak - before, field("VmHWM"))

    run, out = sys.argv[1], Path(sys.argv[2])
    measured(lambda: exporting.export(run, ExportConfig(quant="F16", out=out / "out.gguf", threads=2)))
    measured(lambda: merging.merge(run, out / "merged"))
"""

# 193 million weights, 1.05 million a tensor: 386 MB in 16 bits, 772 MB in fp32, where 313 MB are allowed
LARGE = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 26,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def large_run(tmp_path_factory, llama_run):
    folder = tmp_path_factory.mktemp("large")
    (folder / "large.json").write_text(json.dumps(LARGE))
    script = Path(__file__).parents[1] / "scripts" / "random_model.py"
    tokenizer = ["--tokenizer", llama_run[0]]
    subprocess.run([sys.executable, script, folder / "large.json", folder / "base", *tokenizer], check=True)
    paths = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(26) for p in "qkvo"]
    yield make_peft_adapter(folder / "run", folder / "base", dict.fromkeys(paths, (1024, 1024)), rank=16)
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_three_tensors(large_run, tmp_path):
    largest, whole = 4 * 1024 * 1024, 2 * 193_000_000
    limit = 3 * largest + 300_000_000
    assert limit < 0.85 * whole, "the model is too small to tell"
    arguments = [sys.executable, "-c", textwrap.dedent(MEASURE), large_run, tmp_path]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, pair)) for pair in re.findall(r"MEASURED (\d+) (\d+)", done.stdout)]
    for what, (peak, resident) in zip(("export", "merge"), found, strict=True):
        said = f"{what}: {peak / 1e6:.0f} MB of anonymous memory, allowed {limit / 1e6:.0f}; VmHWM {resident / 1e6:.0f}"
        print(said)
        assert peak <= limit, said
    shutil.rmtree(tmp_path)


def test_the_tokens_fit_every_tiny_model():
    assert max(TOKENS) < 448 and len(set(TOKENS)) > 30
