"""A GGUF in llama.cpp and a run in transformers answer alike; streaming, turns, Ctrl-C, and errors of one line."""

import io
import os
import signal
import subprocess
import sys

import pytest
import small_runs
import tiny
import torch
from transformers import AutoModelForCausalLM

from qmica import adapter, chatting, exporting
from qmica.config import ChatConfig, ExportConfig
from qmica.errors import QmicaError

PROMPT = "Who counted the lamps of the keeper?"
GREEDY = ChatConfig(prompt=PROMPT, max_tokens=20, ctx=256, threads=1)


def changed(**changes) -> ChatConfig:
    return ChatConfig(**{**vars(GREEDY), **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny llama whose weights bf16 holds exactly, so that a file in F32 and a model in 16 bits are the same."""
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """An adapter folder with a loud adapter, in fp32 arithmetic at 16 bits, its run's config beside it."""
    flags = small_runs.make(tmp_path_factory.mktemp("run"))
    quick = {"steps": 3, "lr": 0.05, "bits": 16, "dropout": 0.0, "val_split": 0.0, "warmup": 0.0}
    return small_runs.train({**flags, "model": str(base)}, **quick, out=tmp_path_factory.mktemp("out") / "run")


@pytest.fixture(scope="module")
def base_gguf(base, tmp_path_factory):
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "base.gguf", network, "llama")


@pytest.fixture(scope="module")
def merged_gguf(run, tmp_path_factory):
    return exporting.export(
        str(run.folder), ExportConfig(out=tmp_path_factory.mktemp("merged") / "m.gguf", quant="F32")
    )


@pytest.fixture(scope="module")
def adapter_gguf(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter") / "a.gguf"
    return exporting.export(str(run.folder), ExportConfig(out=out, adapter=True))


def said(capsys, target, config) -> str:
    capsys.readouterr()
    chatting.chat(str(target), config)
    return capsys.readouterr().out


def test_a_run_and_its_gguf_answer_alike(run, base_gguf, merged_gguf, adapter_gguf, capsys):
    """Greedily: the run, its merged F32 GGUF, and the base's GGUF with the adapter's on it; and not the base."""
    here = said(capsys, run.folder, GREEDY)
    assert len(here.strip()) > 10
    assert said(capsys, merged_gguf, GREEDY) == here
    assert said(capsys, base_gguf, changed(adapter=adapter_gguf)) == here
    assert said(capsys, base_gguf, GREEDY) != here


def test_a_part_of_the_adapter_answers_alike(run, base_gguf, adapter_gguf, tmp_path, capsys):
    """0.4 of it: the run, its merged GGUF, its adapter's, and the whole adapter that llama.cpp scales."""
    half = {"scale": 0.4}
    here = said(capsys, run.folder, changed(**half))
    exported = {}
    for kind in (False, True):
        exported[kind] = tmp_path / f"{kind}.gguf"
        exporting.export(str(run.folder), ExportConfig(out=exported[kind], adapter=kind, quant="F32", **half))
        assert "at 0.4 of the adapter's strength" in " ".join(capsys.readouterr().out.split())
    assert said(capsys, exported[False], GREEDY) == here
    assert said(capsys, base_gguf, changed(adapter=exported[True])) == here
    assert said(capsys, base_gguf, changed(adapter=adapter_gguf, **half)) == here
    assert said(capsys, run.folder, GREEDY) != here != said(capsys, base_gguf, GREEDY)


@pytest.mark.parametrize("ctx", [64, 300])
def test_any_context_will_do(merged_gguf, capsys, ctx):
    """llama.cpp rounds a context up to 256 tokens and takes its batch from the number before."""
    assert said(capsys, merged_gguf, changed(ctx=ctx)) == said(capsys, merged_gguf, GREEDY)


def test_a_gguf_is_answered_without_torch(merged_gguf):
    """torch and transformers take seconds to import, and llama.cpp needs neither."""
    code = (
        "import sys; from qmica import chatting, config; chatting.chat(sys.argv[1], config.ChatConfig(prompt='hi', "
        "max_tokens=2, ctx=256)); sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    child = subprocess.run([sys.executable, "-c", code, merged_gguf], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_an_answer_is_that_of_transformers_generate(run, capsys):
    network, tokens = adapter.open_run(run)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    ids = tokens.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = network.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    wanted = tokens.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said(capsys, run.folder, changed(system="Be brief.")).strip() == wanted.strip()


@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_answers_come_in_pieces(run, merged_gguf, kind, capsys, monkeypatch):
    """What is printed comes piece by piece, not at the end; transformers' streamer waits for the end of a word."""
    pieces = []
    real = print

    def watched(*words, **options):
        pieces.append("".join(words))
        real(*words, **options)

    monkeypatch.setattr("builtins.print", watched)
    chatting.chat(str(run.folder if kind == "run" else merged_gguf), GREEDY)
    assert len([piece for piece in pieces if piece]) > 2


@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_sampling_follows_its_seed(run, merged_gguf, kind, capsys):
    target = run.folder if kind == "run" else merged_gguf
    hot = changed(temp=1.5, seed=1)
    assert said(capsys, target, hot) == said(capsys, target, hot)
    assert len({said(capsys, target, changed(temp=1.5, seed=seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_a_conversation_from_standard_input(run, merged_gguf, kind, capsys, monkeypatch):
    """Each turn is asked with all before it; empty lines are passed over; the end of the input ends it."""
    target = run.folder if kind == "run" else merged_gguf
    asked = []
    real = chatting._say
    monkeypatch.setattr(chatting, "_say", lambda pieces: asked.append(real(pieces)) or asked[-1])
    seen = []
    opened = chatting._open

    def watched(*arguments):
        answer = opened(*arguments)
        return lambda messages: (seen.append([dict(message) for message in messages]), answer(messages))[1]

    monkeypatch.setattr(chatting, "_open", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who counts?\n\nAnd why?\n"))
    out = said(capsys, target, changed(prompt=None, system="Be brief.", max_tokens=8))
    assert out.startswith(chatting.HINT) and all(text in out for text in asked) and len(asked) == 2
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
    ]
    assert seen[1][2]["content"] == asked[0] and seen[1][3]["content"] == "And why?"


@pytest.fixture
def interruptible():
    """A shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_ctrl_c_stops_the_answer_and_not_the_program(run, merged_gguf, kind, capsys, monkeypatch):
    """A real SIGINT after the second piece: the answer ends there, the next question is answered."""
    target = run.folder if kind == "run" else merged_gguf
    count, real = [0], chatting._say

    def interrupting(pieces):
        def through():
            try:
                for number, piece in enumerate(pieces):
                    yield piece
                    if count[0] == 1 and number == 1:
                        os.kill(os.getpid(), signal.SIGINT)
            finally:
                pieces.close()

        count[0] += 1
        return real(through())

    monkeypatch.setattr(chatting, "_say", interrupting)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nAnd who else?\n"))
    out = said(capsys, target, changed(prompt=None, max_tokens=60))
    first, second = out.split("> ")[1:3]
    assert first.endswith(" [stopped]\n") and "[stopped]" not in second and len(first) < len(second)
    assert count == [2]


def test_too_long_a_question_does_not_cost_the_conversation(run, merged_gguf, capsys, monkeypatch):
    long = "lamp " * 400
    for target in (run.folder, merged_gguf):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{long}\nWho counts?\n"))
        out = said(capsys, target, changed(prompt=None, max_tokens=8))
        refused, answered = out.split("> ")[1:3]
        assert "tokens do not fit into the context of 256: shorten the text or raise --ctx" in refused
        assert answered.strip() and "do not fit" not in answered


@pytest.mark.parametrize("kind", ["run", "gguf"])
def test_a_prompt_longer_than_the_context(run, merged_gguf, kind):
    with pytest.raises(QmicaError, match=r"\d+ tokens do not fit into the context of 256: .*raise --ctx"):
        chatting.chat(str(run.folder if kind == "run" else merged_gguf), changed(prompt="lamp " * 400))


def test_without_a_chat_template_the_text_is_continued(base, tmp_path, capsys):
    """Behind the system message, where one is given; the same in both engines, and with `raw` where there is one."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = tiny.tiny_tokenizer("llama")
    templated = tiny.write_gguf(tmp_path / "templated.gguf", network, tokens)
    asked = [{"role": "user", "content": PROMPT}]
    assert chatting._prompt_ids(tokens, asked, raw=True).tolist() == [tokens(PROMPT)["input_ids"]]
    assert chatting._prompt_ids(tokens, asked).tolist() != [tokens(PROMPT)["input_ids"]]
    tokens.chat_template = None
    plain = tiny.write_gguf(tmp_path / "plain.gguf", network, tokens)
    answers = []
    for system in (None, "The lamps of old."):
        text = PROMPT if system is None else f"{system}\n\n{PROMPT}"
        ids = tokens(text, return_tensors="pt")["input_ids"]
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        answers.append(tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        assert said(capsys, plain, changed(system=system)).strip() == answers[-1].strip()
        assert said(capsys, templated, changed(system=system, raw=True)).strip() == answers[-1].strip()
        messages = [{"role": "system", "content": system}] if system else []
        assert chatting._prompt_ids(tokens, [*messages, {"role": "user", "content": PROMPT}]).tolist() == ids.tolist()
    assert answers[0] != answers[1]


def test_what_the_generating_thread_raises_is_raised(run, monkeypatch):
    network, tokens = adapter.open_run(run)

    def broken(**arguments):
        raise ValueError("planted")

    monkeypatch.setattr(network, "generate", broken)
    answer = chatting._transformers_answers(network, tokens, GREEDY)
    with pytest.raises(ValueError, match="planted"):
        list(answer([{"role": "user", "content": PROMPT}]))


def test_errors_of_one_line(run, base_gguf, adapter_gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.gguf").write_text("no GGUF")
    for target, config, text in (
        ("text.gguf", GREEDY, r"text\.gguf is not a GGUF file: give a \.gguf, a run folder"),
        ("gone.gguf", GREEDY, r"gone\.gguf does not exist: give a \.gguf, a run folder"),
        ("gone", GREEDY, r"gone is no run: neither gone nor runs/gone holds a run or an adapter"),
        (None, GREEDY, r"there is no run in .*: name a run folder, or make one with `qmica train`"),
        (str(run.folder), changed(adapter=adapter_gguf), "--adapter is for a GGUF file: a run brings its own adapter"),
        (
            str(base_gguf),
            changed(scale=0.5),
            r"--scale 0\.5 is for a run, or for --adapter: what is merged into .*base",
        ),
        (str(base_gguf), changed(adapter=tmp_path / "no.gguf"), r"no\.gguf is not a file: give the path of an adapter"),
        (str(base_gguf), changed(adapter=base_gguf), r"base\.gguf is not an adapter GGUF .general\.type is 'model'"),
        (str(adapter_gguf), GREEDY, r"a\.gguf is an adapter, not a model; give the GGUF of its base model"),
    ):
        with pytest.raises(QmicaError, match=text) as error:
            chatting.chat(target, config)
        assert "\n" not in str(error.value)
        print(error.value)
