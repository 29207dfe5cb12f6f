"""Tokenizer and chat template from any source, and the same tokenizer as GGUF metadata.

A folder's tokenizer.json is taken word for word; a GGUF's vocabulary becomes the same kind of `tokenizers` pipeline,
with the pre-tokenizer that `tokenizer.ggml.pre` names. PRE_TOKENIZERS is that table in both directions: when writing,
the name is found by comparing what the tokenizer does to a probe text with what each row does. A name that is not in
the table is refused: transformers' GGUF reader silently falls back to GPT-2's regex (1 of 13 test strings wrong on
SmolLM2).

Token ids equal llama.cpp's, because that is where the tuned model will run. So, from a GGUF, text is not brought to
Unicode NFC (Qwen's tokenizer.json does that, llama.cpp does not), and a SentencePiece model puts a space in front of
the text after every special token.

Given up: `tekken` and `gpt-4o`, whose regex llama.cpp only approximates, and the kinds of vocabulary other than byte-
level BPE ("gpt2") and SentencePiece BPE ("llama").

Sources: llama.cpp src/llama-vocab.cpp (regexes, defaults, end-of-generation tokens) and conversion/base.py (token
types, padding); sentencepiece's model.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile

# as plain integers: comparing 49,152 of them with an IntEnum's members takes 0.2 s
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = map(
    int,
    (TokenType.NORMAL, TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.BYTE),
)

# ------------------------------------------------------------------------------------------------------ pre-tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    names: values of tokenizer.ggml.pre that llama.cpp treats alike; the first is the one written.
    splits: regexes, each applied to the pieces of the one before; matches and the gaps between them become pieces.
    ignore_merges: a whole piece that is a token stays one, merges or not.
    add_bos: what llama.cpp does when the file does not say.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (_WORDS + r"\p{N}{1,3}" + _REST,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx"), (_WORDS + r"\p{N}{1,3}" + _REST,)),
    PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "solar-open"), (_WORDS + r"\p{N}" + _REST,)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", _GPT2)
    ),
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "a.x-4.0", "exaone4"), (_GPT2,)),
)

# letters of several scripts, runs of digits, spaces, newlines, punctuation, apostrophes: every row cuts it differently
PROBE = "Hello  World\n\n \n\t x12345 3.14 don't DON'T we'Re `a+b=c`!!?\r\n  日本語 текст é½² 🚀👍🏽 (x) \n  end  "


def _pipeline(row: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in row.splits]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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
        f"the GGUF's tokenizer.ggml.pre is {name!r}, which qmica does not know; known are {known}; "
        "use the Hugging Face folder of this model"
    )


def _recognized(pipeline: pre_tokenizers.PreTokenizer | None, ignore_merges: bool) -> PreTokenizer:
    pieces = pipeline.pre_tokenize_str(PROBE) if pipeline else None
    for row in PRE_TOKENIZERS:
        if row.ignore_merges == ignore_merges and pieces == _pipeline(row).pre_tokenize_str(PROBE):
            return row
    raise QmicaError(
        "the way this tokenizer cuts text into words has no name in GGUF that qmica knows "
        f"(known are {', '.join(row.names[0] for row in PRE_TOKENIZERS)}): this model cannot be exported"
    )


# ------------------------------------------------------------------------------------------------------------- loading


def load(source: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a Source: its GGUF's own vocabulary, or the tokenizer files of its folder; no network, no code.

    Raises QmicaError when there is none, or when qmica could not encode text exactly as the model expects.
    """
    if source.kind == "gguf":
        return from_gguf(GGUFFile.open(source.files[0]).metadata)
    return _from_folder(Path(source.folder))


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


def _read(kind: type, folder: Path) -> PreTrainedTokenizerFast:
    try:
        return kind.from_pretrained(folder, local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # `tokenizers` raises bare Exception for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QmicaError(f"the tokenizer in {folder} cannot be read ({reason}); download it again") from error


def from_gguf(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF's `tokenizer.*` metadata describes, with the ids llama.cpp gives.

    Raises QmicaError for a kind of vocabulary or pre-tokenizer that qmica does not know, naming it.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _BACKENDS:
        raise QmicaError(
            f"the GGUF's tokenizer is of kind {kind!r}; qmica knows {' and '.join(map(repr, _BACKENDS))}: use another "
            "model, or its Hugging Face folder"
        )
    tokens, types = _vocabulary(metadata)
    backend, defaults = _BACKENDS[kind](metadata, tokens, types)
    _add_tokens(backend, tokens, types)
    ids = {**defaults["ids"], **_special_ids(metadata, len(tokens))}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token="bos" in ids and bool(metadata.get("tokenizer.ggml.add_bos_token", defaults["add_bos"])),
        add_eos_token="eos" in ids and bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[id] for role, id in ids.items()},
    )


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise QmicaError("the GGUF has no vocabulary (tokenizer.ggml.tokens): use a complete GGUF of this model")
    # as llama.cpp names empty tokens; bytes that are no UTF-8 can never be typed, but must stay distinct
    tokens = [t.decode("utf-8", "backslashreplace") if isinstance(t, bytes) else t for t in tokens]
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    types = list(metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(types) != len(tokens) or len(ids) != len(tokens):
        raise QmicaError(
            f"the GGUF's vocabulary is broken: {len(tokens)} tokens, {len(ids)} of them different, {len(types)} token "
            "types; download it again"
        )
    for token in END_OF_TURN:  # llama.cpp treats these as control tokens whatever the file says
        if token in ids:
            types[ids[token]] = _CONTROL
    while types[-1] == _UNUSED:  # the padding up to the embedding's rows
        tokens.pop()
        types.pop()
    return tokens, types


def _special_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    keys = {role: f"tokenizer.ggml.{name}_token_id" for role, name in SPECIAL_IDS.items()}
    ids = {role: metadata[key] for role, key in keys.items() if key in metadata}
    return {role: id for role, id in ids.items() if 0 <= id < count}


def _add_tokens(backend: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    def of(*kinds: int) -> list[AddedToken]:
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        return [AddedToken(token, special=_USER_DEFINED not in kinds, normalized=False) for token in chosen]

    backend.add_tokens(of(_USER_DEFINED))
    backend.add_special_tokens(of(_CONTROL, _UNKNOWN))


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Tokenizer, dict[str, Any]]:
    row = _named(metadata.get("tokenizer.ggml.pre"))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    used = {part for merge in merges for part in (*merge, "".join(merge))}
    if not merges or not used <= vocab.keys() or min(map(len, merges)) < 2:
        raise QmicaError(
            f"the GGUF's {len(merges)} merges do not fit its {len(tokens)} tokens ({len(used - vocab.keys())} parts "
            "are no tokens); download it again"
        )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = _pipeline(row)
    backend.decoder = decoders.ByteLevel()
    return backend, {"ids": {}, "add_bos": row.add_bos}


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Tokenizer, dict[str, Any]]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) < len(tokens):
        raise QmicaError("the GGUF's SentencePiece vocabulary has no scores (tokenizer.ggml.scores); download it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    merges = _merges(tokens, scores, types)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    defaults = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, for files without the keys
    return backend, {"ids": {role: id for role, id in defaults.items() if id < len(tokens)}, "add_bos": True}


def _merges(tokens: list[str], scores: Sequence[float], types: list[int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score of the whole first: SentencePiece BPE as a list of merges."""
    plain = (_NORMAL, _UNUSED)
    vocab = {token: scores[i] for i, token in enumerate(tokens) if types[i] in plain}
    pairs = [
        (-score, token, cut)
        for token, score in vocab.items()
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs.sort(key=lambda pair: pair[0])  # stable: by id among equal scores, the longest left part first
    return [(token[:cut], token[cut:]) for _, token, cut in pairs]


_BACKENDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    """A folder with tokenizer.model alone, as the first Llama models came; transformers needs protobuf for it."""
    import sentencepiece

    path = folder / "tokenizer.model"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise QmicaError(f"{path} is not a SentencePiece model; download it again") from error
    tokenizer = from_gguf(_sentencepiece_metadata(model, folder))
    bos = [tokenizer.bos_token_id] if tokenizer.add_bos_token else []
    if tokenizer(PROBE).input_ids != bos + model.encode(PROBE):
        raise QmicaError(
            f"{path} is not of Llama's kind of SentencePiece (BPE without normalization): qmica would encode text "
            "differently; save the model with a tokenizer.json"
        )
    return tokenizer


def _sentencepiece_metadata(model: Any, folder: Path) -> dict[str, Any]:
    config = _json(folder / "tokenizer_config.json")
    tokens = [model.id_to_piece(i) for i in range(len(model))]
    scores = [model.get_score(i) for i in range(len(model))]
    types = [_piece_type(model, i) for i in range(len(model))]
    added = {int(i): (row["content"], row.get("special")) for i, row in config.get("added_tokens_decoder", {}).items()}
    added |= {i: (token, False) for token, i in _json(folder / "added_tokens.json").items() if i not in added}
    for i, (token, special) in sorted(added.items()):
        while len(tokens) <= i:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(-1000.0)
            types.append(_UNUSED)
        control = special or _looks_special(token)
        tokens[i], types[i] = token, _CONTROL if control else _USER_DEFINED
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
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
    if isinstance(config.get("chat_template"), str):
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata


def _piece_type(model: Any, i: int) -> int:
    checks = {
        _UNKNOWN: model.is_unknown,
        _CONTROL: model.is_control,
        _UNUSED: model.is_unused,
        _BYTE: model.is_byte,
    }
    return next((kind for kind, check in checks.items() if check(i)), _NORMAL)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QmicaError(f"{path} is not valid JSON ({error}); download it again") from error


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
    "<end_of_utterance>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)
_TURNS = END_OF_TURN[:4]  # those that may be written as the GGUF's end-of-turn token


def end_of_turn_ids(tokenizer: PreTrainedTokenizerFast, generation_config: Any = None) -> set[int]:
    """Ids after which a turn is over: eos, eot, the known texts of the vocabulary, and a generation config's own.

    Every one of them is a training target at the end of an assistant turn, and stops a generation.
    """
    added = tokenizer.get_added_vocab()
    own = getattr(generation_config, "eos_token_id", None)
    own = [*own] if isinstance(own, Iterable) else [own]
    ids = {added.get(text) for text in (getattr(tokenizer, "eot_token", None), *END_OF_TURN)}
    return (ids | {tokenizer.eos_token_id, *own}) - {None}


# ------------------------------------------------------------------------------------------------------------- writing

SPECIAL_IDS = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}  # role -> GGUF's word

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
    row = _recognized(tokenizer.backend_tokenizer.pre_tokenizer, bool(state["model"].get("ignore_merges")))
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in state["model"]["merges"]]
    merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
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
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, len(rank))
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
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise QmicaError(
            f"the tokenizer has tokens up to id {max(by_id)} and the model {vocab_size} rows of embeddings: they do "
            "not belong together"
        )
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
    return token == "<pad>" or token[:2] + token[-2:] in ("<||>", "<｜｜>")


def _special_entries(tokenizer) -> list[Entry]:
    added = tokenizer.get_added_vocab()
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad")}
    turns = [text for text in (getattr(tokenizer, "eot_token", None), *_TURNS) if text in added]
    ids["eot"] = added[turns[0]] if turns else None
    entries = [
        (f"tokenizer.ggml.{name}_token_id", GGUFValueType.UINT32, ids[role], None)
        for role, name in SPECIAL_IDS.items()
        if ids[role] is not None
    ]
    text = tokenizer("x").input_ids  # what the tokenizer does, whatever flags or post-processor make it do so
    entries += [("tokenizer.ggml.add_bos_token", _BOOL, text[:1] == [ids["bos"]], None)]
    entries += [("tokenizer.ggml.add_eos_token", _BOOL, text[-1:] == [ids["eos"]], None)]
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return entries + ([("tokenizer.chat_template", _STRING, template, None)] if template else [])
