"""Tokenizer and chat template from any source, and the same tokenizer as GGUF metadata.

A folder's tokenizer.json is taken word for word; a GGUF's vocabulary becomes the same kind of `tokenizers` pipeline,
with the pre-tokenizer that `tokenizer.ggml.pre` names. PRE_TOKENIZERS is that table in both directions: when writing,
the name is found by comparing what the tokenizer does to a probe text with what each row does. A name that is not in
the table is refused: transformers' GGUF reader silently falls back to GPT-2's regex (1 of 13 test strings wrong on
SmolLM2).

Token ids equal llama.cpp's, because that is where the tuned model will run. So, from a GGUF, text is not brought to
Unicode NFC (Qwen's tokenizer.json does that, llama.cpp does not), a SentencePiece model puts a space in front of the
text after every special token, `tekken` and `gpt-4o` are cut by llama.cpp's approximation of their regex (a folder's
by the regex itself: the two differ at combining marks and capitals beyond ASCII), and Phi-3's special tokens swallow
the space after them only where llama.cpp sees from `general.name` that it is Phi-3 (name_that_fits).

Given up: kinds of vocabulary other than byte-level BPE ("gpt2") and SentencePiece BPE ("llama"); what a folder's added
tokens say of the space before them (lstrip), which a GGUF cannot; the 4,382 letters and digits that came with Unicode
16 (Garay, more hieroglyphs), which llama.cpp's tables do not have; and after Phi-3's special tokens the spaces beyond
ASCII, which `tokenizers` swallows and llama.cpp does not. What would change ids without a word is refused on export:
dropout, pieces with a prefix or suffix, tokens that are whole words only, others than BOS and EOS around a text.

Sources: llama.cpp src/llama-vocab.cpp (regexes, defaults, control and end-of-generation tokens), src/unicode.cpp (how
it approximates), conversion/base.py (token types, padding); sentencepiece's model.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmica.architectures import text_config
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.source import read_json
from qmica.templates import require_short

# as plain integers: comparing 49,152 of them with an IntEnum's members takes 0.2 s
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = map(
    int,
    (TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.BYTE),
)

MOST_TOKENS = 1 << 20  # four times Gemma's: an id beyond would make a list of so many tokens first

# ------------------------------------------------------------------------------------------------------ pre-tokenizers

# not (?i:'s|…), which takes 'ſ (U+017F) for 's: llama.cpp does not
_WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cased(upper: str, lower: str, ending: str, digits: str) -> str:
    """Words that end where a capital follows a small letter, as tekken and gpt-4o cut them."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}"
    return words + f"|{digits}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)


_ENDING = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
# llama.cpp knows capitals and small letters in ASCII only, other letters are both, and marks are no letters
_CASES = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_OWN_CASES = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    names: values of tokenizer.ggml.pre that llama.cpp treats alike; the first is the one written.
    splits: regexes, each applied to the pieces of the one before; matches and the gaps between them become pieces.
    ignore_merges: a whole piece that is a token stays one, merges or not.
    add_bos: what llama.cpp does when the file does not say.
    own: the family's own regexes, where llama.cpp only approximates them: a folder's tokenizer cuts by these.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    own: tuple[str, ...] = ()


PRE_TOKENIZERS = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        (_WORDS + r"\p{N}{1,3}" + _REST,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe"), (_WORDS + r"\p{N}{1,3}" + _REST,)),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "solar-open", "kormo", "f2llmv2", "hunyuan", "grok-2"),
        (_WORDS + r"\p{N}" + _REST,),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    PreTokenizer(
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "a.x-4.0", "exaone4", "gigachat"),
            *("modern-bert", "granite-docling"),
        ),
        (_GPT2,),
    ),
    PreTokenizer(
        ("tekken",),
        (_cased(*_CASES, "", r"\p{N}"),),
        ignore_merges=True,
        add_bos=True,
        own=(_cased(*_OWN_CASES, "", r"\p{N}"),),
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (_cased(*_CASES, _ENDING, r"\p{N}{1,3}"),),
        own=(_cased(*_OWN_CASES, _ENDING, r"\p{N}{1,3}"),),
    ),
)

# letters of several scripts, runs of digits, spaces, newlines, punctuation, apostrophes, capitals within words, marks:
# every row cuts it differently
PROBE = (
    "Hello  World\n\n \n\t x12345 3.14 don't DON'T we'Re `a+b=c`!!?\r\n  日本語 текст é½² 🚀👍🏽 (x) \n  end  "
    "camelCase HTMLPage École ПриВЕТ हिन्दी e\u0301 a//\n/b "
)


def _pipeline(splits: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splits]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _named(name: Any) -> PreTokenizer:
    for row in PRE_TOKENIZERS:
        if name in row.names:
            return row
    known = ", ".join(name for row in PRE_TOKENIZERS for name in row.names)
    if name in (None, "default"):
        raise QmicaError(
            "the GGUF does not say how its tokenizer cuts text (tokenizer.ggml.pre is missing or 'default'): it was "
            "made by an old converter; use a newer GGUF or the Hugging Face folder of this model"
        )
    raise QmicaError(
        f"the GGUF's tokenizer.ggml.pre is {repr(name)[:80]}, which qmica does not know; known are {known}; "
        "use the Hugging Face folder of this model"
    )


def _recognized(pipeline: pre_tokenizers.PreTokenizer | None, state: Mapping[str, Any]) -> PreTokenizer:
    """The row that cuts PROBE as `pipeline` does. Of two that differ in ignore_merges only, the tokenizer's own, or
    either where that changes nothing. state: the tokenizer.json."""
    pieces = pipeline.pre_tokenize_str(PROBE) if pipeline else None
    rows = [
        row for row in PRE_TOKENIZERS if any(_pipeline(way).pre_tokenize_str(PROBE) == pieces for way in _ways(row))
    ]
    ignores = bool(state["model"].get("ignore_merges"))
    same = [row for row in rows if row.ignore_merges == ignores]
    if same or (rows and _merges_reach_everything(state)):
        return (same or rows)[0]
    raise QmicaError(
        "the way this tokenizer cuts text into words has no name in GGUF that qmica knows "
        f"(known are {', '.join(row.names[0] for row in PRE_TOKENIZERS)}): this model cannot be exported"
    )


def _ways(row: PreTokenizer) -> list[tuple[str, ...]]:
    return [splits for splits in (row.own, row.splits) if splits]


def _merges_reach_everything(state: Mapping[str, Any]) -> bool:
    """Whether ignore_merges changes nothing, as in vocabularies made of tiktoken ranks: every token has its merges."""
    model = state["model"]
    bpe = models.BPE(vocab=model["vocab"], merges=_pairs(model["merges"]))
    words = model["vocab"].keys() - {added["content"] for added in state["added_tokens"]}
    return all(len(bpe.tokenize(word)) <= 1 for word in words)


def _pairs(merges: Sequence[Any]) -> list[tuple[str, str]]:
    """A tokenizer.json's merges: "a b" in older files, ["a", "b"] in newer ones."""
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges]


# ------------------------------------------------------------------------------------------------------------- loading


def load(source: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a Source: its GGUF's own vocabulary, or the tokenizer files of its folder; no network, no code.

    Raises QmicaError when there is none, or when qmica could not encode text exactly as the model expects.
    """
    if source.kind == "gguf":
        return from_gguf(GGUFFile.open(source.files[0]).metadata)
    folder = Path(source.folder)
    return _within_rows(_from_folder(folder), folder / "config.json")


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").is_file():
        # not AutoTokenizer: it rebuilds what tokenizer_config.json declares, and a SmolLM2 folder, which declares
        # GPT2Tokenizer, then cuts "a 123" into "a", " 123" and no longer into digits (transformers 5.23)
        return _read(PreTrainedTokenizerFast, folder)
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read(AutoTokenizer, folder)
    raise QmicaError(
        f"{folder} has no tokenizer: one of tokenizer.json, tokenizer.model, or vocab.json with merges.txt must lie "
        "beside config.json"
    )


def _within_rows(tokenizer: PreTrainedTokenizerFast, config: Path) -> PreTrainedTokenizerFast:
    """The tokenizer without the added tokens that the model, as its config.json says, has no row for. They are then
    text as any other, as in llama.cpp, whose converter leaves them out (conversion/base.py): Gemma 3's 1B has one for
    images, tunes of Llama 2 one for padding. QmicaError where the vocabulary itself is larger than the embedding.
    """
    rows = text_config(read_json(config)).get("vocab_size") if config.is_file() else None
    if not isinstance(rows, int):
        return tokenizer
    beyond = {token for token, id in tokenizer.get_added_vocab().items() if id >= rows}
    if beyond:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        _forget(state, beyond)
        with _readable(config.parent):
            tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        for role in [role for role, token in tokenizer.special_tokens_map.items() if token in beyond]:
            setattr(tokenizer, role, None)
        tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if str(token) not in beyond]
    _require_rows(tokenizer, rows)
    return tokenizer


def _forget(state: dict, tokens: set[str]) -> None:
    """Take added tokens out of a tokenizer.json: some are in the vocabulary and its merges too."""
    state["added_tokens"] = [row for row in state["added_tokens"] if row["content"] not in tokens]
    model = state["model"]
    if isinstance(model["vocab"], dict):  # not Unigram's list
        model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in tokens}
    if "merges" in model:
        model["merges"] = [(a, b) for a, b in _pairs(model["merges"]) if not {a, b, a + b} & tokens]


def _require_rows(tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= rows:
        raise QmicaError(
            f"the tokenizer has tokens up to id {last} and the model {rows} rows of embeddings: they do not belong "
            "together; download the model again"
        )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Whatever `tokenizers` raises for a broken file, as a QmicaError."""
    try:
        yield
    except BaseException as error:  # `tokenizers` raises bare Exception for a broken file, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of pyo3, no Exception
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QmicaError(f"the tokenizer in {folder} cannot be read ({reason}); download it again") from error


def _read(kind: type, folder: Path) -> PreTrainedTokenizerFast:
    with _readable(folder):
        tokenizer = kind.from_pretrained(folder, local_files_only=True, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = _templates(tokenizer.chat_template)
    return tokenizer


def _templates(found: Any) -> str | dict[str, str] | None:
    """A chat template, or several by name with a default, as a tokenizer's files have them; None for anything else.
    QmicaError for one that is too long."""
    if isinstance(found, list):
        rows = [row for row in found if isinstance(row, dict) and isinstance(row.get("name"), str)]
        found = {row["name"]: row.get("template") for row in rows}
    if isinstance(found, dict):
        texts = {name: require_short(text) for name, text in found.items() if isinstance(text, str)}
        return texts if "default" in texts else None
    return require_short(found) if isinstance(found, str) else None


def from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF's metadata describes (`tokenizer.*`, and `general.name`), with the ids llama.cpp gives.

    Raises QmicaError for a kind of vocabulary or pre-tokenizer that qmica does not know, naming it.
    """
    return _described(metadata, _swallows_spaces(metadata))


def _described(metadata: Mapping[str, Any], swallows: Callable[[str], bool]) -> PreTrainedTokenizerFast:
    """from_gguf's; swallows: whether white space after this added token is dropped."""
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _BACKENDS:
        raise QmicaError(
            f"the GGUF's tokenizer is of kind {repr(kind)[:80]}; qmica knows {' and '.join(map(repr, _BACKENDS))}: "
            "use another model, or its Hugging Face folder"
        )
    tokens, types = _vocabulary(metadata)
    backend, defaults = _BACKENDS[kind](metadata, tokens, types)
    _add_tokens(backend, tokens, types, swallows)
    ids = {**defaults["ids"], **_special_ids(metadata, len(tokens))}
    return PreTrainedTokenizerFast(
        tokenizer_object=_Handed(backend),
        add_bos_token="bos" in ids and bool(metadata.get("tokenizer.ggml.add_bos_token", defaults["add_bos"])),
        add_eos_token="eos" in ids and bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=_templates(metadata.get(CHAT_TEMPLATE)),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[id] for role, id in ids.items()},
    )


class _Handed:
    """A backend that transformers may keep: it deep-copies what it is given, 3.4 of 6.6 s for Gemma's tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend

    def __deepcopy__(self, memo: dict) -> Tokenizer:
        return self.backend


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = _array(metadata, "tokens", str, bytes)
    if not tokens:
        raise QmicaError("the GGUF has no vocabulary (tokenizer.ggml.tokens): use a complete GGUF of this model")
    if len(tokens) > MOST_TOKENS:
        raise QmicaError(
            f"the GGUF's vocabulary has {len(tokens):,} tokens, and qmica takes up to {MOST_TOKENS:,}: no real one has "
            "more; download it again"
        )
    # as llama.cpp names empty tokens; bytes that are no UTF-8 can never be typed, but must stay distinct
    tokens = [t.decode("utf-8", "backslashreplace") if isinstance(t, bytes) else t for t in tokens]
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = _array(metadata, "token_type", int) or [_NORMAL] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(ids) != len(tokens):
        raise QmicaError(
            f"the GGUF's vocabulary is broken: {len(tokens)} tokens, {len(ids)} of them different, {len(types)} token "
            "types; download it again"
        )
    for token in _ALWAYS_CONTROL & ids.keys():
        types[ids[token]] = _CONTROL
    while len(types) > 1 and types[-1] == _UNUSED:  # the padding up to the embedding's rows
        tokens.pop()
        types.pop()
    return tokens, types


def _array(metadata: Mapping[str, Any], name: str, *kinds: type) -> list:
    """tokenizer.ggml.<name>, a list of its own, [] where there is none; QmicaError where other things stand in it."""
    values = metadata.get(f"tokenizer.ggml.{name}") or []
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kinds) for value in values):
        raise QmicaError(
            f"the GGUF's tokenizer.ggml.{name} is no list of {kinds[0].__name__} as it has to be; download it again"
        )
    return list(values)


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    keys = {role: f"tokenizer.ggml.{name}_token_id" for role, name in SPECIAL_IDS.items()}
    ids = {role: metadata[key] for role, key in keys.items() if key in metadata}
    return {role: id for role, id in ids.items() if isinstance(id, int) and 0 <= id < count}


_PHI3 = ("phi-3", "phi3")  # in general.name, whatever its case
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")  # the special tokens of Phi-3 that leave the space after them alone


def _swallows_spaces(metadata: Mapping[str, Any]) -> Callable[[str], bool]:
    """llama.cpp's attribute RSTRIP, which no key of GGUF holds: it knows Phi-3 by its name (src/llama-vocab.cpp)."""
    name = str(metadata.get("general.name", "")).lower()
    is_phi3 = any(text in name for text in _PHI3)
    return lambda token: is_phi3 and token not in _PHI3_KEEPS


def name_that_fits(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """`name` as general.name of a GGUF with this tokenizer: "Phi-3" stands in it only where llama.cpp wants it so.

    By that name llama.cpp lets special tokens swallow the space after them; a file of that name without Phi-3's own
    special tokens it cannot load.
    """
    added = tokenizer.added_tokens_decoder.values()
    known = tokenizer.get_vocab()
    fits = all(token in known for token in ("</s>", *_PHI3_KEEPS))
    if any(text in name.lower() for text in _PHI3):
        return name if fits else re.sub(r"(?i)phi(-?)3", r"phi_3", name)
    return f"{name} (Phi-3)" if fits and any(token.rstrip for token in added) else name


def _add_tokens(
    backend: Tokenizer, tokens: Sequence[str], types: Sequence[int], swallows: Callable[[str], bool]
) -> None:
    def of(*kinds: int) -> list[AddedToken]:
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        special = _USER_DEFINED not in kinds
        return [AddedToken(token, special=special, normalized=False, rstrip=swallows(token)) for token in chosen]

    backend.add_tokens(of(_USER_DEFINED))
    backend.add_special_tokens(of(_CONTROL, _UNKNOWN))


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, dict[str, Any]]:
    row = _named(metadata.get("tokenizer.ggml.pre"))
    vocab = {token: i for i, token in enumerate(tokens)}
    # of two equal merges llama.cpp keeps the first, `tokenizers` the last
    merges = [tuple(merge.split(" ", 1)) for merge in dict.fromkeys(_array(metadata, "merges", str))]
    used = {part for merge in merges for part in (*merge, "".join(merge))}
    if not merges or not used <= vocab.keys() or min(map(len, merges)) < 2:
        raise QmicaError(
            f"the GGUF's {len(merges)} merges do not fit its {len(tokens)} tokens ({len(used - vocab.keys())} parts "
            "are no tokens); download it again"
        )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = _pipeline(row.splits)
    backend.decoder = decoders.ByteLevel()
    return backend, {"ids": {}, "add_bos": row.add_bos}


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Tokenizer, dict[str, Any]]:
    scores = _array(metadata, "scores", int, float)
    if len(scores) < len(tokens):
        raise QmicaError("the GGUF's SentencePiece vocabulary has no scores (tokenizer.ggml.scores); download it again")
    if sum(len(token) ** 2 for token in tokens) > LONGEST:
        raise QmicaError(
            f"the GGUF's SentencePiece vocabulary has tokens of up to {max(map(len, tokens))} characters: no real one "
            "has; download it again"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(tokens, scores)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    defaults = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, for files without the keys
    return backend, {"ids": {role: id for role, id in defaults.items() if id < len(tokens)}, "add_bos": True}


def _merges(tokens: list[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score of the whole first: SentencePiece BPE as a list of merges.

    Tokens of every type count, as in llama.cpp (llm_tokenizer_spm_session). Raises QmicaError for a file without real
    scores: there llama.cpp merges the leftmost pair, whatever it is, which no list of merges can say.
    """
    vocab = set(tokens)
    pairs = [
        (-score, token, cut)
        for token, score in zip(tokens, scores, strict=False)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: pair[0])  # stable: by id among equal scores, the longest left part first
    different, made = len({pair[0] for pair in pairs}), len({pair[1] for pair in pairs})
    if different < made / 2:  # real ones: as many as tokens
        raise QmicaError(
            f"the GGUF's SentencePiece vocabulary has only {different} different scores for {made} merged tokens: it "
            "was converted without the model's tokenizer.model, and llama.cpp cuts text with it otherwise than the "
            "model was trained; use another GGUF or the Hugging Face folder of this model"
        )
    return [(token[:cut], token[cut:]) for _, token, cut in pairs]


# the squares of all tokens' lengths together: every cut of every token is tried; Gemma's 262,144 have 1.6e7
LONGEST = 3e8
_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """A folder with tokenizer.model alone, as the first Llama models came; transformers needs protobuf for it."""
    import sentencepiece

    path = folder / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise QmicaError(f"{path} is not a SentencePiece model; download it again") from error
    added = _added_tokens(folder)
    swallowing = {token.content for token in added.values() if token.rstrip}
    tokenizer = _described(_sentencepiece_metadata(model, added, folder), swallowing.__contains__)
    if tokenizer(PROBE, add_special_tokens=False).input_ids != model.encode(PROBE):
        raise QmicaError(
            f"{path} is not of Llama's kind of SentencePiece (BPE without normalization): qmica would encode text "
            "differently; save the model with a tokenizer.json"
        )
    return tokenizer


def _added_tokens(folder: Path) -> dict[int, AddedToken]:
    """What lies beside a tokenizer.model: the tokens that tokenizer_config.json and added_tokens.json add to it."""
    config, more = folder / "tokenizer_config.json", folder / "added_tokens.json"
    rows = _json(config).get("added_tokens_decoder") or {}
    if not isinstance(rows, dict):
        raise QmicaError(f"{config}: added_tokens_decoder is a {type(rows).__name__}, not an object; download it again")
    added = {id: AddedToken(text) for text, id in _json(more).items() if _is_added(more, text, id)}
    for key, row in rows.items():
        row = row if isinstance(row, dict) else {}
        id, text = int(key) if re.fullmatch("[0-9]{1,9}", key) else key, row.get("content")
        if _is_added(config, text, id):
            added[id] = AddedToken(text, special=bool(row.get("special")), rstrip=bool(row.get("rstrip")))
    return added


def _is_added(path: Path, text: Any, id: Any) -> bool:
    """True; QmicaError where it is no text with an id that a vocabulary can have."""
    if type(id) is int and 0 <= id < MOST_TOKENS and isinstance(text, str):
        return True
    raise QmicaError(
        f"{path}: the added token {repr(text)[:80]} has the id {repr(id)[:80]}; it has to be a text with an id from 0 "
        f"to {MOST_TOKENS - 1}: download the file again"
    )


def _sentencepiece_metadata(model: Any, added: Mapping[int, AddedToken], folder: Path) -> dict[str, Any]:
    config = _json(folder / "tokenizer_config.json")
    tokens, scores, types = map(list, zip(*_pieces(model.serialized_model_proto()), strict=True))
    for i, token in sorted(added.items()):
        while len(tokens) <= i:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(-1000.0)
            types.append(_UNUSED)
        control = token.special or _looks_special(token.content)
        tokens[i], types[i] = token.content, _CONTROL if control else _USER_DEFINED
    spaced = [t.replace("▁", " ") if kind == _USER_DEFINED else t for t, kind in zip(tokens, types, strict=True)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": spaced,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": model.encode("x", out_type=str)[0].startswith("▁"),
        "tokenizer.ggml.add_bos_token": config.get("add_bos_token", True),
        "tokenizer.ggml.add_eos_token": config.get("add_eos_token", False),
    }
    for role, own in (
        ("bos", model.bos_id()),
        ("eos", model.eos_id()),
        ("unk", model.unk_id()),
        ("pad", model.pad_id()),
    ):
        named = config.get(f"{role}_token") or ""
        named = named.get("content") if isinstance(named, dict) else named
        metadata[f"tokenizer.ggml.{SPECIAL_IDS[role]}_token_id"] = tokens.index(named) if named in tokens else own
    path = folder / "chat_template.jinja"
    template = _templates(_utf8(path) if path.is_file() else config.get("chat_template"))
    template = template["default"] if isinstance(template, dict) else template
    return metadata | ({CHAT_TEMPLATE: template} if template is not None else {})


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QmicaError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from error


def _pieces(proto: bytes) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a SentencePiece model (sentencepiece_model.proto: ModelProto.pieces).

    Read here because sentencepiece's Python does not tell which pieces are user-defined, as Gemma's runs of newlines
    are. Its types have the numbers that GGUF's TokenType has.
    """
    pieces = [dict(_fields(value)) for number, value in _fields(proto) if number == 1]
    return [
        (piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, _NORMAL))
        for piece in pieces
    ]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message: an int for a varint, otherwise the bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
        else:
            size, place = _varint(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value, place = message[place : place + size], place + size
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number that begins at `place`, seven bits a byte, and where it ends."""
    number = shift = 0
    while True:
        byte = message[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# --------------------------------------------------------------------------------------------------------- end of turn

# texts that end a turn for llama.cpp (src/llama-vocab.cpp, special_eog_ids), the turn's own before the text's
END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<turn|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "[e~[",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "[EOS]",
)
_TURNS = END_OF_TURN[:4]  # those that may be written as the GGUF's end-of-turn token

# control tokens of code models by their text (special_fim_*_id): these, and those that end a generation as well
FILL_IN = (
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
)
_FILL_IN_ENDS = (
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
_ALWAYS_CONTROL = {*END_OF_TURN, *FILL_IN, *_FILL_IN_ENDS}  # for llama.cpp, whatever a file says


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, generation_config: Any = None) -> set[int]:
    """Ids after which a turn is over: eos, eot, eom, the known texts of the vocabulary, a generation config's own.

    Every one of them is a training target at the end of an assistant turn, and stops a generation.
    """
    added = tokenizer.get_added_vocab()
    own = known_ids(getattr(generation_config, "eos_token_id", None))
    named = (getattr(tokenizer, f"{role}_token", None) for role in ("eot", "eom"))
    ids = {added.get(text) for text in (*named, *END_OF_TURN, *_FILL_IN_ENDS)}
    return (ids | {tokenizer.eos_token_id, *own}) - {None}


def known_ids(eos_token_id: Any) -> list[int]:
    """The ids in a generation config's eos_token_id: one, several, or whatever stands there that is none."""
    given = eos_token_id if isinstance(eos_token_id, (list, tuple, set)) else [eos_token_id]
    return [id for id in given if type(id) is int and 0 <= id < MOST_TOKENS]


# ------------------------------------------------------------------------------------------------------------- writing

CHAT_TEMPLATE = "tokenizer.chat_template"  # GGUF's key

# role -> GGUF's word
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}

_STRING, _BOOL, _ARRAY = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.ARRAY
Entry = tuple[str, GGUFValueType, Any, GGUFValueType | None]


def gguf_metadata(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[Entry]:
    """The tokenizer as GGUF metadata for GGUFWriter.add_key_value: (key, type, value, an array's element type or None).

    vocab_size: rows of the embedding; ids without a token become `[PAD<id>]`, unused.  Raises QmicaError when GGUF
    cannot express the tokenizer (naming what), or when there are fewer rows than tokens.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise QmicaError(
            f"the tokenizer is of kind {state['model']['type']}; a GGUF of qmica's families can express BPE only"
        )
    _refuse_unsayable(tokenizer, state)
    tokens, types = _padded(tokenizer, state, vocab_size)
    if not state["model"].get("byte_fallback"):
        return _describe_byte_level(tokenizer, state, tokens, types) + _special_entries(tokenizer)
    entries = _describe_sentencepiece(tokenizer, state, tokens, types) + _special_entries(tokenizer)
    again = from_gguf({key: value for key, _, value, _ in entries})
    if again(PROBE).input_ids != tokenizer(PROBE).input_ids:
        raise QmicaError(
            "this SentencePiece tokenizer cuts text in a way that a GGUF cannot express: this model cannot be exported"
        )
    return entries


def _describe_byte_level(tokenizer, state: Mapping, tokens: list[str], types: list[int]) -> list[Entry]:
    _refuse_normalizer(state, allowed=("NFC",))  # llama.cpp does without NFC, as its converter does
    row = _recognized(tokenizer.backend_tokenizer.pre_tokenizer, state)
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(state["model"]["merges"])]
    return [
        ("tokenizer.ggml.model", _STRING, "gpt2", None),
        ("tokenizer.ggml.pre", _STRING, row.names[0], None),
        ("tokenizer.ggml.tokens", _ARRAY, tokens, _STRING),
        ("tokenizer.ggml.token_type", _ARRAY, types, GGUFValueType.INT32),
        ("tokenizer.ggml.merges", _ARRAY, merges, _STRING),
    ]


def _describe_sentencepiece(tokenizer, state: Mapping, tokens: list[str], types: list[int]) -> list[Entry]:
    _refuse_normalizer(state, allowed=("Prepend", "Replace"))
    rank: dict[str, int] = {}  # a token's place among all merged ones, as SentencePiece's own scores count
    # what is user-defined or control is found before anything is merged
    mergeable = {t for t, kind in zip(tokens, types, strict=True) if kind not in (_USER_DEFINED, _CONTROL)}
    for token in (left + right for left, right in _pairs(state["model"]["merges"])):
        if token in mergeable:
            rank.setdefault(token, len(rank))
    lowest = -float(len(rank))
    scores = [-float(rank[token]) if token in rank else lowest for token in tokens]
    types = [_byte_or(kind, token) for kind, token in zip(types, tokens, strict=True)]
    if tokenizer.unk_token in tokens:
        types[tokens.index(tokenizer.unk_token)] = _UNKNOWN
    # the first piece of a text, cut off from what follows it: with a prefix it begins with ▁
    first = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens[0]
    return [
        ("tokenizer.ggml.model", _STRING, "llama", None),
        ("tokenizer.ggml.pre", _STRING, "default", None),
        ("tokenizer.ggml.tokens", _ARRAY, tokens, _STRING),
        ("tokenizer.ggml.scores", _ARRAY, scores, GGUFValueType.FLOAT32),
        ("tokenizer.ggml.token_type", _ARRAY, types, GGUFValueType.INT32),
        ("tokenizer.ggml.add_space_prefix", _BOOL, first.startswith("▁"), None),
    ]


def _refuse_unsayable(tokenizer, state: Mapping) -> None:
    """QmicaError for what no key of GGUF holds, so that llama.cpp would give other ids without a word."""
    model, added = state["model"], state["added_tokens"]
    wrong = [f"model.{key} is {repr(model[key])[:80]}" for key in _UNSAYABLE if model.get(key)]
    wrong += [f"the added token {row['content']!r} is single_word" for row in added if row.get("single_word")]
    wrong = wrong or _put_around(tokenizer)  # dropout would make any ids of these
    if wrong:
        raise QmicaError(
            f"{wrong[0]} in this model's tokenizer, which a GGUF cannot express: this model cannot be exported"
        )


_UNSAYABLE = ("dropout", "end_of_word_suffix", "continuing_subword_prefix")


def _put_around(tokenizer) -> list[str]:
    """What a tokenizer puts before a text beside BOS, and behind it beside EOS."""
    alone, whole = tokenizer("x", add_special_tokens=False).input_ids, tokenizer("x").input_ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), len(whole))
    sides = ("before", whole[:at], tokenizer.bos_token_id), ("behind", whole[at + len(alone) :], tokenizer.eos_token_id)
    return [
        f"{' '.join(map(str, tokenizer.convert_ids_to_tokens(ids[:5])))!r} (ids {ids[:5]}) is put {side} every text"
        for side, ids, own in sides
        if ids not in ([], [own])
    ]


def _refuse_normalizer(state: Mapping, allowed: tuple[str, ...]) -> None:
    normalizer = state.get("normalizer") or {}
    for part in normalizer.get("normalizers", [normalizer] if normalizer else []):
        if part["type"] not in allowed:
            raise QmicaError(
                f"the tokenizer normalizes text ({part['type']}), which a GGUF cannot express: this model cannot be "
                "exported"
            )


def _byte_or(kind: int, token: str) -> int:
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return _BYTE if is_byte else kind


def _padded(tokenizer, state: Mapping, vocab_size: int) -> tuple[list[str], list[int]]:
    _require_rows(tokenizer, vocab_size)
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    types = [_NORMAL if id in by_id else _UNUSED for id in range(vocab_size)]
    for added in state["added_tokens"]:
        id, token = added["id"], added["content"]
        if added["special"] or _looks_special(token):
            types[id] = _CONTROL
        else:
            tokens[id], types[id] = token.replace("▁", " "), _USER_DEFINED
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether an added token that is not marked special is a control token all the same (conversion/base.py)."""
    texts = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    known = token in texts or token in _ALWAYS_CONTROL
    return known or any(token.startswith(first) and token.endswith(last) for first, last in ends)


def _special_entries(tokenizer) -> list[Entry]:
    added = tokenizer.get_added_vocab()
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    turns = [text for text in (getattr(tokenizer, "eot_token", None), *_TURNS) if text in added]
    ids["eot"] = added[turns[0]] if turns else None
    ids["eom"] = added.get(getattr(tokenizer, "eom_token", None))
    entries = [
        (f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32, ids[role], None)
        for role, name in SPECIAL_IDS.items()
        if ids[role] is not None
    ]
    text = tokenizer("x").input_ids  # what the tokenizer does, whatever flags or post-processor make it do so
    entries += [("tokenizer.ggml.add_bos_token", _BOOL, text[:1] == [ids["bos"]], None)]
    entries += [("tokenizer.ggml.add_eos_token", _BOOL, text[-1:] == [ids["eos"]], None)]
    template = _templates(tokenizer.chat_template)
    template = template["default"] if isinstance(template, dict) else template
    return entries + ([(CHAT_TEMPLATE, _STRING, template, None)] if template else [])
