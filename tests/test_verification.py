"""--verify: what is printed against oracles, and that a broken file is found and a sound one is not."""

import itertools
import re

import numpy as np
import pytest
import small_runs
import torch
from adapted import divergence, log_softmax, make_run
from tiny import WIDE, save_tiny, tiny_tokenizer, write_gguf
from transformers import AutoModelForCausalLM

from qmica import architectures, exporting, ggml, llamacpp, merging, runs, tokenizer, verification
from qmica.config import ExportConfig
from qmica.errors import QmicaError

needs_llama = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A llama of width 512 as folder and as F32 GGUF, and a run on each."""
    folder = tmp_path_factory.mktemp("verification")
    base = save_tiny(folder / "base", "llama", dtype=torch.bfloat16, **WIDE)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    file = write_gguf(folder / "base.gguf", network, tiny_tokenizer("llama"))
    return {
        "base": base,
        "run": make_run(folder / "run", base, size=2),
        "gguf-run": make_run(folder / "gguf-run", file, size=2),
    }


LLAMA = "the file, llama.cpp"


def rows(said: str) -> dict[tuple[str, str], list[float]]:
    """(one, other) -> [KL, share of the same tokens, share of what was learnt] of the printed table."""
    found = re.findall(r"^(\S.*?) {2,}(\S.*?) {2,}(\S+) +(-?\d+) %(?: +(-?\d+) %)?\s*$", said, re.MULTILINE)
    return {(one, other): [float(kl), int(same) / 100, int(kept or -999) / 100] for one, other, kl, same, kept in found}


def peft_log_p(base, run, asked) -> list[np.ndarray]:
    """Of the base, and with the adapter on it."""
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    found = []
    for make in (lambda: plain, lambda: PeftModel.from_pretrained(plain, run).eval()):
        network = make()
        with torch.no_grad():
            logits = [network(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in asked]
        found.append(np.concatenate([log_softmax(one) for one in logits]))
    return found


@needs_llama
@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K_M", "Q2_K"])
def test_an_export_is_compared_with_what_was_trained(made, tmp_path, capsys, quant):
    file = tmp_path / "model.gguf"
    exporting.export(str(made["run"]), ExportConfig(quant=quant, out=file, verify=True))
    found = rows(capsys.readouterr().out)
    models = (verification.MERGED, verification.REREAD, LLAMA)
    assert set(found) == {
        *((verification.TRAINED, other) for other in (verification.BASE, *models)),
        *itertools.combinations(models, 2),
    }
    asked = verification.texts(runs.find(str(made["run"])), tokenizer.load(merging.open_run(str(made["run"])).source))
    assert sum(map(len, asked)) == verification.TEXTS * verification.TOKENS
    base, trained = peft_log_p(made["base"], made["run"], asked)  # the oracle
    with llamacpp.Llama(file, threads=1) as llama:
        theirs = np.concatenate([log_softmax(llama.logits(ids)) for ids in asked])
    kl, same, kept = found[verification.TRAINED, LLAMA]
    assert kl == pytest.approx(divergence(trained, theirs), rel=0.1, abs=2e-6), quant
    assert same == pytest.approx((trained.argmax(-1) == theirs.argmax(-1)).mean(), abs=0.02)
    weight, change = np.exp(trained) + np.exp(base), trained - base
    assert kept == pytest.approx((weight * change * (theirs - base)).sum() / (weight * change**2).sum(), abs=0.02)
    assert found[verification.TRAINED, verification.BASE][0] > 20 * found[verification.TRAINED, verification.MERGED][0]
    assert found[verification.REREAD, LLAMA][0] < verification.READ / 20  # measured: 3e-4 and less


@needs_llama
def test_an_adapter_beside_its_base(made, tmp_path, capsys):
    exporting.export(str(made["gguf-run"]), ExportConfig(adapter=True, out=tmp_path / "a.gguf", verify=True))
    found = rows(capsys.readouterr().out)
    others = {(verification.TRAINED, other) for other in (verification.BASE, verification.REREAD, LLAMA)}
    assert set(found) == others | {(verification.REREAD, LLAMA)}
    assert found[verification.TRAINED, LLAMA][0] < 1e-3 and found[verification.TRAINED, LLAMA][2] > 0.98
    exporting.export(str(made["run"]), ExportConfig(adapter=True, out=tmp_path / "b.gguf", verify=True))
    said = capsys.readouterr().out
    assert f"not verified in llama.cpp: that needs the GGUF of {made['base']} that it goes beside" in said


def test_a_merge_is_compared(made, tmp_path, capsys):
    merging.merge(str(made["run"]), tmp_path / "merged", verify=True)
    found = rows(capsys.readouterr().out)
    assert set(found) == {(verification.TRAINED, other) for other in (verification.BASE, verification.MERGED)}
    assert 0 < found[verification.TRAINED, verification.MERGED][0] < verification.ROUNDED / 5


def test_without_llama_cpp_it_says_how_to_get_it(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    exporting.export(str(made["run"]), ExportConfig(quant="Q8_0", out=tmp_path / "model.gguf", verify=True))
    said = capsys.readouterr().out
    assert f"not verified in llama.cpp: that needs {llamacpp.INSTALL}" in said
    assert not [pair for pair in rows(said) if LLAMA in pair] and len(rows(said)) == 4


# ---- broken


def misorder(patch) -> None:
    """Rows of q and k in Hugging Face's order: what transformers reads back is right all the same."""
    patch.setattr(architectures.Architecture, "row_order", lambda self, name, config: None)


def forget(patch) -> None:
    """A file of the base alone."""
    merged = merging.merged
    patch.setattr(merging, "merged", lambda base, part, *rest: base if len(rest) == 4 else merged(base, part, *rest))


def garble(patch) -> None:
    """A packing that loses the signs, the same for every reader."""
    quantize = ggml.quantize
    patch.setattr(ggml, "quantize", lambda rows, *rest: quantize(np.abs(rows) if len(rows) > 16 else rows, *rest))


@needs_llama
@pytest.mark.parametrize("quant", ["F32", "Q4_K_M", "Q2_K"])
@pytest.mark.parametrize(
    "how, problem",
    [
        (
            misorder,
            r"the file, llama\.cpp is 0\.\d+ nats from the file, transformers, and 0\.05 is the most that its type",
        ),
        (
            forget,
            r"(only -?\d % of what was learnt is in the file, transformers|the file, transformers is 0\.\d+ nats)",
        ),
        (
            garble,
            r"(only -?\d+ % of what was learnt|the file, transformers is \d+(\.\d+)? nats from merged, bf16, and)",
        ),
    ],
)
def test_a_broken_file_is_found(made, tmp_path, monkeypatch, capsys, quant, how, problem):
    how(monkeypatch)
    (tmp_path / "model.gguf").write_bytes(b"an older one")
    with pytest.raises(QmicaError, match=r"model\.gguf came out broken: " + problem) as error:
        exporting.export(str(made["run"]), ExportConfig(quant=quant, out=tmp_path / "model.gguf", verify=True))
    print(capsys.readouterr().out[-800:], error.value)
    assert str(error.value).endswith("; it was not written; please report it")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an older one"]


@needs_llama
def test_other_tokens_are_found(made, tmp_path, monkeypatch):
    """A file that forgets BOS: its logits are right, what it reads is not."""
    monkeypatch.setattr(
        exporting.tokenizer,
        "gguf_metadata",
        lambda *arguments, real=tokenizer.gguf_metadata: [
            (key, kind, False if key.endswith("add_bos_token") else value, element)
            for key, kind, value, element in real(*arguments)
        ],
    )
    with pytest.raises(
        QmicaError,
        match=r"model\.gguf came out broken: llama\.cpp cuts '.*' into other tokens than training did \(\d+ ",
    ):
        exporting.export(str(made["run"]), ExportConfig(quant="Q8_0", out=tmp_path / "model.gguf", verify=True))


@needs_llama
def test_several_files_are_compared_with_one_answer(made, tmp_path, monkeypatch, capsys):
    """The model as trained is loaded once; a broken file takes the sound one with it, and neither is written."""
    asked, real = [], verification.in_training
    monkeypatch.setattr(verification, "in_training", lambda *arguments: asked.append(arguments) or real(*arguments))
    exporting.export(str(made["run"]), ExportConfig(quant="F32,Q8_0", out=tmp_path / "out", verify=True))
    assert len(asked) == 1 and capsys.readouterr().out.count("same next token") == 2
    limits = verification.limit_of
    monkeypatch.setattr(verification, "limit_of", lambda quant: 0.0 if quant == "Q8_0" else limits(quant))
    with pytest.raises(QmicaError, match=r"other/run\.Q8_0\.gguf came out broken"):
        exporting.export(str(made["run"]), ExportConfig(quant="F32,Q8_0", out=tmp_path / "other", verify=True))
    assert not list((tmp_path / "other").iterdir())


def test_a_broken_merge_is_not_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "near", lambda *_: 0.0)
    with pytest.raises(QmicaError, match=r"merged came out broken: merged, bf16 is \S+ nats from as trained"):
        merging.merge(str(made["run"]), tmp_path / "merged", verify=True)
    assert not list(tmp_path.iterdir())


def answers(rows: int, seed: int) -> np.ndarray:
    return log_softmax(np.random.default_rng(seed).normal(size=(rows, 9))).astype(np.float32)


def test_what_is_known_to_be_cut_otherwise_is_a_note(capsys):
    """Families whose regex llama.cpp approximates: combining marks, capitals beyond ASCII (tokenizer.py)."""
    check = verification.Verification([[1]])
    check.add(verification.TRAINED, answers(5, 0))
    check.add(verification.BASE, answers(5, 1))
    check.cut("the same", [1, 2], [1, 2])
    check.cut("नमस्ते", [1, 2], [1, 3])
    other = check.copy()
    check.report("file")
    assert "llama.cpp cuts 'नमस्ते' into other tokens than training did (2 and 2)" in capsys.readouterr().out
    other.cut("plain", [1, 2], [1, 2, 3])
    with pytest.raises(QmicaError, match=r"^file came out broken: llama.cpp cuts 'plain' into .* \(3 and 2\); it was"):
        other.report("file")


@pytest.mark.parametrize("size, found", [(1e-3, False), (1.0, True)])
def test_a_change_below_the_rounding_is_not_looked_for(size, found):
    """What was learnt is a thousandth of what rounding does: how much of it there is cannot be told."""
    base = answers(50, 0)
    trained = log_softmax(base + size * answers(50, 1)).astype(np.float32)
    rounded = log_softmax(base + 0.3 * answers(50, 2)).astype(np.float32)
    check = verification.Verification([[1]])
    for name, said in ((verification.TRAINED, trained), (verification.BASE, base), ("the file", rounded)):
        check.add(name, said)
    assert verification.effect_kept(trained, base, rounded) < verification.KEPT
    try:
        check.report("file")
        assert not found
    except QmicaError as error:
        assert found and "of what was learnt is in the file" in str(error)


def test_limits_go_by_bits():
    found = {quant: verification.limit_of(quant) for quant in ("Q8_0", "Q4_0", "IQ4_XS", "IQ4_NL", "Q3_K_M", "Q2_K")}
    assert list(found.values()) == [verification.ROUNDED, *3 * [verification.QUANTIZED], *2 * [verification.COARSE]]


# ---- texts


def test_texts_are_what_the_run_learnt_from(tmp_path):
    run = small_runs.train(small_runs.make(tmp_path), out=tmp_path / "run")
    tokens = tokenizer.load(merging.open_run(str(run.folder)).source)
    found = [tokens.decode(ids, skip_special_tokens=True) for ids in verification.texts(run, tokens)]
    assert len(found) == verification.TEXTS
    assert all(any(text in document for document in small_runs.DOCUMENTS) for text in found), found
    (tmp_path / "documents.jsonl").unlink()  # no longer there: general text
    found = [tokens.decode(ids, skip_special_tokens=True) for ids in verification.texts(run, tokens)]
    assert len(found) == verification.TEXTS and not any("Keeper" in text for text in found)


def test_the_divergence():
    one, other = (log_softmax(np.random.default_rng(seed).normal(size=(5, 9))).astype(np.float32) for seed in (0, 1))
    kl, same = verification.compare(one, other)
    assert kl == pytest.approx(divergence(one.astype(np.float64), other.astype(np.float64)), rel=1e-4)
    assert same == (one.argmax(-1) == other.argmax(-1)).mean()
    assert verification.compare(one, one) == (0.0, 1.0)
