"""Scores against one-by-one scoring, transformers against llama.cpp, and what `eval` measures of a run."""

import json
import math
import random

import numpy as np
import pytest
import small_runs
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmica import adapter, evaluation, model, runs, source
from qmica.config import EvalConfig, ModelConfig
from qmica.errors import QmicaError
from qmica.llamacpp import Llama
from qmica.records import Question

COLOURS = ("red", "blue", "warm", "old")
THINGS = ("lamp", "book", "bread", "thread", "harbour", "lighthouse", "bay", "oil")
FACTS = {thing: COLOURS[i % 4] for i, thing in enumerate(THINGS)}


def question(thing: str, seed: int) -> Question:
    choices = random.Random(seed).sample(COLOURS, 4)
    return Question(f"What is the {thing} of the keeper?", tuple(choices), choices.index(FACTS[thing]))


QUESTIONS = [question(thing, seed) for seed, thing in enumerate(THINGS)]


def write_questions(path, questions=QUESTIONS):
    rows = [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama with a chat template."""
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture(scope="module")
def network(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def gguf(network, tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "model.F32.gguf", network, "llama")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run that knows the colours: trained on questions and answers as text until it says them."""
    home = tmp_path_factory.mktemp("learnt")
    flags = small_runs.make(home)
    texts = home / "texts.jsonl"
    rows = [{"text": f"Question: {q.question}\nAnswer: {q.choices[q.answer]}"} for q in QUESTIONS]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    learning = {"steps": 60, "lr": 2e-2, "rank": 16, "dropout": 0.0, "val_split": 0.0, "max_seq_length": 256}
    settings = {"batch_size": 4, "grad_accum": 1, "grad_checkpoint": False, "bits": 16}
    return small_runs.train(flags, **learning, **settings, data=(str(texts),), out=home / "run")


def asked(seed: int = 0, count: int = 11) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of 3 to 30 tokens with 2 to 5 answers of 1 to 6."""
    draw = random.Random(seed)
    text = lambda low, high: [draw.randrange(5, 380) for _ in range(draw.randint(low, high))]  # noqa: E731
    return [(text(3, 30), [text(1, 6) for _ in range(draw.randint(2, 5))]) for _ in range(count)]


@torch.no_grad()
def one_by_one(network, prompt: list[int], answer: list[int]) -> float:
    """The mean log-probability of an answer's tokens, from a forward of prompt and answer alone."""
    ids = torch.tensor([prompt + answer])
    chances = network(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(np.mean([chances[place, token] for place, token in zip(places, answer, strict=True)]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_branches_score_as_lone_answers(family):
    """Measured: 2e-6 in mean log-probability, over prompts and answers of all lengths in one batch."""
    network = tiny.tiny_model(family)
    questions = asked()
    found = evaluation.branch_scores(network, questions)
    wanted = [[one_by_one(network, prompt, answer) for answer in answers] for prompt, answers in questions]
    apart = max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
    spread = max(max(row) - min(row) for row in wanted)
    assert apart < 1e-5 < 1e-3 * spread, f"{apart:.1e} apart, the answers of a question up to {spread:.1f}"


def test_branches_score_as_lone_answers_through_an_adapter(learnt):
    """With the adapter on, in qmica's own modules: the scores are those of a plain forward, and not the base's."""
    tuned, _ = adapter.open_run(learnt)
    questions = asked(1, 5)
    found = evaluation.branch_scores(tuned, questions)
    with adapter.switched(tuned, False):
        base = evaluation.branch_scores(tuned, questions)
    wanted = [[one_by_one(tuned, prompt, answer) for answer in answers] for prompt, answers in questions]
    apart = max(abs(a - b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
    moved = min(abs(a - b) for x, y in zip(found, base, strict=True) for a, b in zip(x, y, strict=True))
    assert apart < 1e-5 and moved > 1e-3, f"{apart:.1e} from one by one, {moved:.1e} from the base"


def test_transformers_and_llama_cpp_score_alike(network, folder, gguf):
    """The same questions, each engine with its own tokenizer and cache: measured 4e-6 apart."""
    here = evaluation.InTransformers(network, AutoTokenizer.from_pretrained(folder))
    with Llama(gguf, threads=1) as llama:
        there = evaluation.InLlamaCpp(llama)
        put = [
            [(reader.prompt(q.question), [*map(reader.answer_ids, q.choices)]) for q in QUESTIONS]
            for reader in (here, there)
        ]
        assert put[0] == put[1]
        scores = [np.array(list(reader.means(put[0]))) for reader in (here, there)]
        assert evaluation.accuracy(here, QUESTIONS) == evaluation.accuracy(there, QUESTIONS)
        words = [list(reader.words([prompt for prompt, _ in put[0]])) for reader in (here, there)]
    apart = float(np.abs(scores[0] - scores[1]).max())
    assert apart < 2e-5, f"{apart:.1e} apart"
    assert words[0] == words[1] and len(set(words[0])) > 1


@pytest.mark.parametrize("kind", ["llama", "qwen2", "smollm", "spm"])
def test_a_question_is_put_as_text(network, kind, tmp_path):
    """Prompt and answer together are the tokens of the whole text, in both engines."""
    tokens = tiny.tiny_tokenizer(kind)
    here = evaluation.InTransformers(network, tokens)
    asked, said = here.prompt("Who keeps it?"), here.answer_ids("the weaver's 12 lamps")
    assert asked + said == tokens("Question: Who keeps it?\nAnswer: the weaver's 12 lamps")["input_ids"]
    with Llama(tiny.write_gguf(tmp_path / "model.gguf", network, tokens), threads=1) as llama:
        there = evaluation.InLlamaCpp(llama)
        assert (there.prompt("Who keeps it?"), there.answer_ids("the weaver's 12 lamps")) == (asked, said)


def test_a_run_that_learnt_knows_and_its_base_does_not(learnt, tmp_path, capsys):
    """Base and tuned are one model with its adapter off and on: eight facts, four choices."""
    config = EvalConfig(questions=write_questions(tmp_path / "q.jsonl"), free=8, limit=8)
    result = evaluation.evaluate(str(learnt.folder), config)
    base, tuned = result["scores"]
    assert (base["name"], tuned["name"]) == ("base", "tuned")
    assert tuned["accuracy"] == 1.0 and tuned["free"] == "8/8", tuned
    assert base["accuracy"] < 0.8 and base["free"] == "0/8", base
    said = capsys.readouterr().out
    assert "accuracy (8 questions)" in said and "free answers" in said and "8/8" in said
    assert f"perplexity x {tuned['perplexity'] / base['perplexity']:.2f}; next: `qmica export" in said


def test_a_part_of_the_adapter_is_between_base_and_all_of_it(learnt, tmp_path, capsys):
    """And the next line takes the same part along."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    found = {}
    for scale in (1.0, 0.3):
        config = EvalConfig(data=(str(text),), limit=3, scale=scale)
        result = evaluation.evaluate(str(learnt.folder), config)
        found[scale] = [row["loss"] for row in result["scores"]]
        assert result["scale"] == scale
    (base, whole), (same, part) = found[1.0], found[0.3]
    assert base == same and abs(part - base) < 0.6 * abs(whole - base) and abs(part - base) > 1e-3, found
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"`qmica export {learnt.folder} --scale 0.3 --quant Q4_K_M`, `qmica chat {learnt.folder} --scale 0.3`" in said
    )


def test_ggufs_are_asked_beside_the_run(learnt, gguf, tmp_path, capsys):
    """A GGUF, and one with a + in its name, which is no adapter's; without text there is no perplexity of them."""
    odd = tmp_path / "c++.gguf"
    odd.write_bytes(gguf.read_bytes())
    config = EvalConfig(questions=write_questions(tmp_path / "q.jsonl"), gguf=(gguf, odd), limit=4)
    scores = evaluation.evaluate(str(learnt.folder), config, as_json=True)["scores"]
    assert [row["name"] for row in scores] == ["base", "tuned", "model.F32.gguf", "c++.gguf"]
    assert scores[2]["accuracy"] == scores[3]["accuracy"] == scores[0]["accuracy"]
    assert scores[2]["perplexity"] is None
    assert json.loads(capsys.readouterr().out)["scores"] == scores


@torch.no_grad()
def plain_perplexity(network, tokens, path, window: int) -> float:
    """exp of transformers' own mean loss over windows of [BOS] text EOS, each window on its own."""
    ids = tokens(path.read_text())["input_ids"] + [tokens.eos_token_id]
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = torch.tensor([ids[start : start + window]])
        total += network(input_ids=part, labels=part, use_cache=False).loss.item() * (part.shape[1] - 1)
        count += part.shape[1] - 1
    return math.exp(total / count)


def test_perplexity_is_that_of_transformers_own_loss(network, folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    config = EvalConfig(data=(str(text),), max_seq_length=48)
    found = evaluation.evaluate(None, config, ModelConfig(str(folder), bits=16, dtype="fp32", device="cpu"))
    (row,) = found["scores"]
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()
    wanted = plain_perplexity(rounded, AutoTokenizer.from_pretrained(folder), text, 48)
    apart = abs(row["perplexity"] / wanted - 1)
    assert apart < 1e-5, f"{row['perplexity']:.4f} here, {wanted:.4f} by transformers: {apart:.1e} apart"
    assert row["loss"] == pytest.approx(math.log(row["perplexity"]))
    assert row["name"] == "base" and row["accuracy"] is None and found["questions"] == 0
    assert "accuracy" not in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(learnt, tmp_path, capsys):
    """A run on a user's own data is asked nothing unless questions are given."""
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    result = evaluation.evaluate(str(learnt.folder), EvalConfig(data=(str(text),), limit=3), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == result and set(printed) == {"scores", "questions", "tokens", "scale"}
    assert printed["questions"] == 0 and printed["tokens"] > 0
    for row in printed["scores"]:
        assert set(row) == {"name", "loss", "perplexity", "accuracy", "free"}
        assert row["accuracy"] is None and row["free"] is None and row["perplexity"] > 1


def test_evaluating_leaves_the_adapter_on(network, folder):
    loaded = model.load(source.resolve(str(folder)), 16, "fp32", "cpu")
    adapter.attach(loaded)
    with adapter.switched(loaded, False):
        assert not any(layer.enabled for _, layer in adapter.layers(loaded))
    assert all(layer.enabled for _, layer in adapter.layers(loaded))


def test_what_is_missing_is_said(tmp_path, monkeypatch, learnt):
    monkeypatch.setattr(runs, "HOME", tmp_path / "runs")
    with pytest.raises(QmicaError, match=r"there is no run in .*: name a run folder, or make one with `qmica train`"):
        evaluation.evaluate()
    with pytest.raises(QmicaError, match=r"nothing is no run: neither nothing nor .* holds a run or an adapter"):
        evaluation.evaluate("nothing")


def test_it_is_said_before_a_model_is_loaded(tmp_path, monkeypatch, learnt):
    monkeypatch.setattr(adapter, "open_run", lambda run: pytest.fail("the model was loaded first"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 0}\n')
    for config, text in (
        (EvalConfig(questions=tmp_path / "none.jsonl"), r"none\.jsonl"),
        (EvalConfig(questions=questions, gguf=(tmp_path / "no.gguf",)), r"no\.gguf"),
        (EvalConfig(gguf=(tmp_path / "no.gguf",)), r"--gguf asks a file questions, and there are none"),
    ):
        with pytest.raises(QmicaError, match=text):
            evaluation.evaluate(str(learnt.folder), config)
    with pytest.raises(QmicaError, match=r"^--scale 0\.5 is for a run: a --model alone has no adapter$"):
        evaluation.evaluate(None, EvalConfig(scale=0.5), ModelConfig("smollm2-135m"))
