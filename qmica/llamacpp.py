"""Running a GGUF in real llama.cpp: raw logits, log-probabilities of answers, streamed text; its C library for ggml.

How: ctypes on the functions of llama.h that the extension inside the `xllamacpp` wheel exports. The parameter structs
stay opaque 512 bytes in which a few fields are set; where those fields stand is checked against the defaults that the
library itself gives, so that another layout is an error and not a wild write. In exact mode (the default) the key-value
cache is F32, flash attention is off and everything runs on the CPU: on F32 weights log-probabilities then agree with
transformers to 1e-6 (1e-3 with llama.cpp's F16 cache). Prompts keep their common beginning in the cache, and the
answers to one prompt share it.

What it gives up: one sequence of text at a time (no serving), sampling by temperature and top-p only. A call into
llama.cpp cannot be interrupted, so Ctrl-C takes effect after the current token, or the current 512 of a prompt.
Source of the signatures: llama.cpp's include/llama.h as of xllamacpp 2026.10 (build 11549).
"""

from __future__ import annotations

import codecs
import ctypes
import importlib.util
import os
import re
import struct
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qmica import templates
from qmica.errors import QmicaError

INSTALL = "pip install 'qmica[llamacpp]'"
BATCH = 512  # tokens a call; the output buffer is BATCH x vocabulary floats (100 MB for 49,152 tokens)
CHOICES = 8  # answers scored together


# ---- the library


def available() -> bool:
    """Whether xllamacpp is installed. That it also works is seen by using it (`library`, `Llama`)."""
    return _extension() is not None


def has_library() -> bool:
    """Whether there is a C library with ggml's functions: the one that QMICA_GGML names, or xllamacpp's."""
    return bool(os.environ.get("QMICA_GGML")) or available()


def library() -> ctypes.CDLL:
    """The C library with ggml's functions: the one QMICA_GGML names, else the one inside xllamacpp."""
    named = os.environ.get("QMICA_GGML")
    return _load(named) if named else _load(_required_extension())


def _extension() -> str | None:
    package = importlib.util.find_spec("xllamacpp")
    folders = package.submodule_search_locations if package else None
    found = [file for folder in folders or () for file in Path(folder).glob("xllamacpp*") if file.suffix in _SUFFIXES]
    return str(found[0]) if found else None


_SUFFIXES = {".so", ".pyd", ".dylib"}


def _required_extension() -> str:
    path = _extension()
    if path is None:
        raise QmicaError(
            f"llama.cpp is needed for this and xllamacpp is not installed: {INSTALL} "
            "(for K-quants, QMICA_GGML may name another libggml instead)"
        )
    return path


@cache
def _load(path: str) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        remedy = (
            "correct or unset QMICA_GGML" if path == os.environ.get("QMICA_GGML") else f"install it again, {INSTALL}"
        )
        raise QmicaError(f"the library {path} cannot be loaded ({error}): {remedy}") from error
    if not hasattr(loaded, "ggml_quantize_chunk"):
        raise QmicaError(f"the library {path} does not export ggml_quantize_chunk: set QMICA_GGML to a libggml")
    return loaded


class _Params(ctypes.Structure):
    """A parameter struct of llama.h, as bytes (168 and 80 of them are used): it is passed and returned by value."""

    _fields_ = (("bytes", ctypes.c_uint8 * 512),)

    def get(self, field: tuple[int, str]) -> Any:
        return struct.unpack_from(field[1], bytes(self.bytes), field[0])[0]

    def set(self, field: tuple[int, str], value: Any) -> None:
        struct.pack_into(field[1], self.bytes, field[0], value)


class _Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


# Fields of the parameter structs that are set here: name -> ((offset in bytes, format), default by which it is known).
# Found by laying llama.h beside the bytes of llama_*_default_params(). The run of four -1, two 0, four -1.0 around
# flash_attn_type, and the two types behind ten pointers' bytes, are what an inserted field would move.
_CONTEXT = {
    "n_ctx": ((0, "<I"), 512),
    "n_batch": ((4, "<I"), 2048),
    "n_ubatch": ((8, "<I"), 512),
    "n_seq_max": ((12, "<I"), 1),
    "rope_scaling_type": ((40, "<i"), -1),
    "pooling_type": ((44, "<i"), -1),
    "attention_type": ((48, "<i"), -1),
    "flash_attn_type": ((52, "<i"), -1),
    "rope_freq_base": ((56, "<f"), 0.0),
    "rope_freq_scale": ((60, "<f"), 0.0),
    "yarn_ext_factor": ((64, "<f"), -1.0),
    "yarn_beta_slow": ((76, "<f"), -1.0),
    "yarn_orig_ctx": ((80, "<I"), 0),
    "defrag_thold": ((84, "<f"), -1.0),
    "cb_eval_user_data": ((96, "<Q"), 0),
    "type_k": ((104, "<i"), 1),
    "type_v": ((108, "<i"), 1),
    "abort_callback": ((112, "<Q"), 0),
    "embeddings": ((136, "<B"), 0),
    "offload_kqv": ((137, "<B"), 1),
    "op_offload": ((139, "<B"), 1),
    "kv_unified": ((141, "<B"), 0),
}
_MODEL = {
    "devices": ((0, "<Q"), 0),
    "tensor_buft_overrides": ((8, "<Q"), 0),
    "n_gpu_layers": ((16, "<i"), -1),
    "split_mode": ((20, "<i"), 1),
}
_F32, _F16 = 0, 1
_CPU, _ALL_LAYERS = 0, -1
_FLASH_OFF, _FLASH_AUTO = 0, -1

_P, _I32, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _P)
_SIGNATURES: dict[str, tuple[Any, list]] = {
    "llama_log_set": (None, [_LOG, _P]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Params, []),
    "llama_context_default_params": (_Params, []),
    "llama_model_load_from_file": (_P, [_TEXT, _Params]),
    "llama_model_free": (None, [_P]),
    "llama_init_from_model": (_P, [_P, _Params]),
    "llama_free": (None, [_P]),
    "llama_n_ctx": (ctypes.c_uint32, [_P]),
    "llama_n_batch": (ctypes.c_uint32, [_P]),
    "llama_n_seq_max": (ctypes.c_uint32, [_P]),
    "llama_set_n_threads": (None, [_P, _I32, _I32]),
    "llama_model_n_ctx_train": (_I32, [_P]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_model_chat_template": (_TEXT, [_P, _TEXT]),
    "llama_vocab_n_tokens": (_I32, [_P]),
    "llama_vocab_bos": (_I32, [_P]),
    "llama_vocab_eos": (_I32, [_P]),
    "llama_vocab_is_eog": (_BOOL, [_P, _I32]),
    "llama_vocab_get_text": (_TEXT, [_P, _I32]),
    "llama_vocab_get_add_bos": (_BOOL, [_P]),
    "llama_tokenize": (_I32, [_P, _TEXT, _I32, _P, _I32, _BOOL, _BOOL]),
    "llama_detokenize": (_I32, [_P, _P, _I32, _P, _I32, _BOOL, _BOOL]),
    "llama_token_to_piece": (_I32, [_P, _I32, _P, _I32, _I32, _BOOL]),
    "llama_adapter_lora_init": (_P, [_P, _TEXT]),
    "llama_set_adapters_lora": (_I32, [_P, _P, ctypes.c_size_t, _P]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_clear": (None, [_P, _BOOL]),
    "llama_memory_seq_rm": (_BOOL, [_P, _I32, _I32, _I32]),
    "llama_memory_seq_cp": (None, [_P, _I32, _I32, _I32, _I32]),
    "llama_decode": (_I32, [_P, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_P]),
}

_errors: deque[str] = deque(maxlen=8)  # what llama.cpp logged as errors, for our own error texts
_PREAMBLE = re.compile(r"^(?:(?:llama|gguf|ggml)\w*: |error loading model: |failed to apply lora adapter: )+")


@_LOG
def _remember_errors(level: int, text: bytes | None, _: Any) -> None:
    if level == 4 and text:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode("utf-8", "replace").strip())


@cache
def _llama() -> ctypes.CDLL:
    """xllamacpp's library with the signatures set, its log silenced and the layout of its structs checked."""
    path = _required_extension()
    lib = _load(path)
    missing = [name for name in _SIGNATURES if not hasattr(lib, name)]
    if missing:
        raise QmicaError(f"this xllamacpp does not export {missing[0]}: install the tested version, {INSTALL}")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    check_layout(lib.llama_context_default_params(), _CONTEXT, "context")
    check_layout(lib.llama_model_default_params(), _MODEL, "model")
    lib.llama_log_set(_remember_errors, None)
    lib.llama_backend_init()
    return lib


def check_layout(defaults: _Params, fields: Mapping[str, tuple[tuple[int, str], Any]], what: str) -> None:
    """QmicaError unless every field has its known default where it is expected to stand."""
    for name, (field, expected) in fields.items():
        found = defaults.get(field)
        if found != expected:
            raise QmicaError(
                f"this xllamacpp has another layout of llama.cpp's {what} parameters ({name} is {found!r}, and "
                f"{expected!r} was expected): install the tested version, {INSTALL}"
            )


# ---- a model


class Llama:
    """A GGUF model in llama.cpp, with any number of adapter GGUFs (path, scale) on it. Close it, or use `with`.

    context: tokens that prompt and answer may have together (default: what the model was trained for, at most 4096).
    threads: default the CPUs this process may use. exact: see the module. Raises QmicaError for a file that llama.cpp
    does not take."""

    def __init__(
        self,
        path: str | Path,
        adapters: Sequence[tuple[str | Path, float]] = (),
        context: int | None = None,
        threads: int | None = None,
        exact: bool = True,
    ) -> None:
        self._lib = _llama()
        self.path = Path(path)
        self._model = _load_model(self._lib, self.path, gpu_layers=_CPU if exact else _ALL_LAYERS)
        owned = [self._model, None]
        self._finalizer = weakref.finalize(self, _free, self._lib, owned)
        size = context or min(self._lib.llama_model_n_ctx_train(self._model), 4096)
        self._context = owned[1] = _new_context(self._lib, self._model, size, exact)
        self._memory = self._lib.llama_get_memory(self._context)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        count = threads or cpus()
        self._lib.llama_set_n_threads(self._context, count, count)
        self._adapters = [_load_adapter(self._lib, self._model, Path(file)) for file, _ in adapters]
        self._cached: list[int] = []  # the tokens of sequence 0 that are in the key-value cache
        self.scale_adapters([scale for _, scale in adapters])

    def close(self) -> None:
        """Frees model and context; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def context(self) -> int:
        return self._lib.llama_n_ctx(self._context)

    @property
    def vocab_size(self) -> int:
        return self._lib.llama_vocab_n_tokens(self._vocab)

    def scale_adapters(self, scales: Sequence[float]) -> None:
        """Sets the adapters' scales, in the order they were given; 0 for all of them is the base model."""
        if len(scales) != len(self._adapters):
            raise ValueError(f"{len(scales)} scales for {len(self._adapters)} adapters")
        count = len(scales)
        pointers, values = (_P * count)(*self._adapters), (ctypes.c_float * count)(*scales)
        if self._lib.llama_set_adapters_lora(self._context, pointers, count, values):
            raise RuntimeError(f"llama.cpp refused the adapters: {_last_error()}")
        self._cached = []

    # -- text and tokens

    def tokenize(self, text: str, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids. special: read `<|im_start|>` and the like as their tokens. add_bos: what the file says is added
        around a text (BOS, where `tokenizer.ggml.add_bos_token`)."""
        data = text.encode("utf-8")
        tokens = np.empty(len(data) + 8, np.int32)  # a token is a byte or more, but for BOS, EOS and a space
        count = self._lib.llama_tokenize(
            self._vocab, data, len(data), tokens.ctypes.data, len(tokens), add_bos, special
        )
        if count < 0:
            raise RuntimeError(f"llama.cpp needs {-count} tokens for {len(data)} bytes")
        return tokens[:count].tolist()

    def detokenize(self, tokens: Sequence[int], special: bool = True) -> str:
        """The text of the tokens; without `special` control tokens have none."""
        ids = np.asarray(tokens, np.int32)
        buffer = ctypes.create_string_buffer(64)
        for _ in range(2):
            count = self._lib.llama_detokenize(
                self._vocab, ids.ctypes.data, len(ids), buffer, len(buffer), False, special
            )
            if count >= 0:
                break
            buffer = ctypes.create_string_buffer(-count)
        return buffer.raw[:count].decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation (EOS, end of turn)."""
        return self._lib.llama_vocab_is_eog(self._vocab, token)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._lib.llama_model_chat_template(self._model, None))

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages in the file's own chat template, open for the assistant's answer. QmicaError without one."""
        template = self._lib.llama_model_chat_template(self._model, None)
        if not template:
            raise QmicaError(f"{self.path} has no chat template: give the text to be continued with --prompt")
        special = {f"{name}_token": self._special_text(name) for name in ("bos", "eos")}
        try:
            return templates.render(template.decode("utf-8"), messages, **special)
        except templates.ERRORS as error:
            why = templates.reason(error)
            raise QmicaError(f"the chat template of {self.path} does not take these messages: {why}") from error

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """`chat_prompt` as tokens, with one BOS where the file wants one (templates often write it themselves)."""
        text, bos = self.chat_prompt(messages), self._special_text("bos")
        return self.tokenize(text, add_bos=not (bos and text.startswith(bos)))

    def _special_text(self, name: str) -> str:
        token = getattr(self._lib, f"llama_vocab_{name}")(self._vocab)
        return self._lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace") if token >= 0 else ""

    # -- numbers

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 (len(tokens), vocabulary): the raw logits after each token, evaluated from an empty cache."""
        self._forget(0)
        blocks = [block for block, _ in self._run(tokens, range(len(tokens)), [0] * len(tokens), [True] * len(tokens))]
        return np.concatenate(blocks) if blocks else np.empty((0, self.vocab_size), np.float32)

    def log_probabilities(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each answer, float64 (its length,): the log-probability of each of its tokens after the prompt and the
        tokens before it. The prompt (not empty) is evaluated once for all, what it shares with the last one not again;
        answers are evaluated together, each seeing the prompt and itself."""
        first = _log_softmax(self._prefill(prompt)[None])[0]
        scores: list[np.ndarray] = []
        for start in range(0, len(answers), CHOICES):
            scores += self._score(len(prompt), first, answers[start : start + CHOICES])
        return scores

    def _score(self, start: int, first: np.ndarray, answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Up to CHOICES answers, in the sequences 1, 2, … that begin as copies of sequence 0 (no memory: shared)."""
        inputs = [(i, k) for i, answer in enumerate(answers) for k in range(len(answer) - 1)]
        if start + len(inputs) > self.context:
            raise self._too_long(start + len(inputs))
        for i in range(len(answers)):
            self._lib.llama_memory_seq_cp(self._memory, 0, i + 1, -1, -1)
        scores = [np.full(len(answer), first[answer[0]] if len(answer) else 0.0) for answer in answers]
        tokens, positions = [answers[i][k] for i, k in inputs], [start + k for _, k in inputs]
        try:
            for block, rows in self._run(tokens, positions, [i + 1 for i, _ in inputs], [True] * len(inputs)):
                logs = _log_softmax(block)
                for row, (i, k) in zip(logs, inputs[rows], strict=True):
                    scores[i][k + 1] = row[answers[i][k + 1]]
        finally:
            for i in range(len(answers)):
                self._lib.llama_memory_seq_rm(self._memory, i + 1, -1, -1)
        return scores

    def generate(
        self,
        tokens: Sequence[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Token ids that continue `tokens`, one by one, until an end token (not given), max_tokens or a full context.

        temperature 0 takes the likeliest token; above it, sampling among the likeliest that make up `top_p`.
        Closing the generator stops it; other calls in between do no harm."""
        generator = np.random.default_rng(seed)
        text = list(tokens)
        for _ in range(max_tokens):
            token = _sample(self._prefill(text), temperature, top_p, generator)
            if self.is_end(token):
                return
            yield token
            text.append(token)
            if len(text) > self.context:
                return

    def pieces(self, tokens: Iterator[int] | Sequence[int]) -> Iterator[str]:
        """The text of tokens as they come, cut only between characters (a character may take several tokens)."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        buffer = ctypes.create_string_buffer(1024)
        for token in tokens:
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
            piece = decoder.decode(buffer.raw[: max(count, 0)])
            if piece:
                yield piece
        rest = decoder.decode(b"", final=True)
        if rest:
            yield rest

    # -- evaluating

    def _prefill(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits (vocabulary,) after the last token, evaluating only what sequence 0 does not hold already."""
        if not len(tokens):
            raise QmicaError("there is no text to continue: give a prompt of one token or more")
        if len(tokens) > self.context:
            raise self._too_long(len(tokens))
        keep = _common(self._cached, tokens[:-1])
        keep = self._forget(keep)
        new = list(tokens[keep:])
        wanted = [False] * (len(new) - 1) + [True]
        rows = [
            block[-1] for block, _ in self._run(new, range(keep, len(tokens)), [0] * len(new), wanted) if len(block)
        ]
        self._cached = list(tokens)
        return rows[-1]

    def _forget(self, keep: int) -> int:
        """Drops all but the first `keep` tokens of sequence 0 from the cache; -> how many it really holds."""
        if keep == 0 or not self._lib.llama_memory_seq_rm(self._memory, 0, keep, -1):
            self._lib.llama_memory_clear(self._memory, True)
            keep = 0
        self._cached = self._cached[:keep]  # what is evaluated next counts only once it is done
        return keep

    def _run(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> Iterator[tuple[np.ndarray, slice]]:
        """Evaluates the tokens, a batch at a time: (logits of the wanted ones (wanted, vocabulary), which of them)."""
        arrays = [np.asarray(list(a), t) for a, t in zip((tokens, positions, sequences, wanted), "iiib", strict=True)]
        vocabulary, size = self.vocab_size, self._lib.llama_n_batch(self._context)
        self._check_tokens(arrays[0], vocabulary)
        done = 0
        for start in range(0, len(tokens), size):
            part = [array[start : start + size] for array in arrays]
            self._decode(*part)
            count = int(part[3].sum())
            if count:
                logits = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (count, vocabulary))
                yield logits.copy(), slice(done, done + count)
            done += count

    def _decode(self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, wanted: np.ndarray) -> None:
        ones = np.ones(len(tokens), np.int32)
        pointers = sequences.ctypes.data + sequences.itemsize * np.arange(len(tokens), dtype=np.uintp)
        arrays = (positions, ones, pointers, wanted)
        batch = _Batch(len(tokens), tokens.ctypes.data, None, *(array.ctypes.data for array in arrays))
        status = self._lib.llama_decode(self._context, batch)
        if status == 1:
            raise self._too_long(int(positions[-1]) + 1)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}: {_last_error()}")

    def _check_tokens(self, tokens: np.ndarray, vocabulary: int) -> None:
        outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if len(outside):
            raise ValueError(f"token {outside[0]} is outside of the vocabulary of {vocabulary}")

    def _too_long(self, count: int) -> QmicaError:
        return QmicaError(
            f"{count} tokens do not fit into the context of {self.context}: shorten the text or raise --ctx"
        )


# ---- pieces of it


def _load_model(lib: ctypes.CDLL, path: Path, gpu_layers: int) -> int:
    if not path.is_file():
        raise QmicaError(f"{path} is not a file: give the path of a GGUF model")
    params = lib.llama_model_default_params()
    params.set(_MODEL["n_gpu_layers"][0], gpu_layers)
    _errors.clear()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise QmicaError(f"llama.cpp cannot load {path}: {_last_error()}")
    return model


def _new_context(lib: ctypes.CDLL, model: int, size: int, exact: bool) -> int:
    size = -(-size // 256) * 256  # llama.cpp pads so itself, but takes n_batch from the number before it
    wanted = {
        "n_ctx": size,
        "n_batch": BATCH,
        "n_ubatch": BATCH,
        "n_seq_max": 1 + CHOICES,
        "kv_unified": 1,  # sequences share one cache: copies of a prompt take no memory
        "type_k": _F32 if exact else _F16,
        "type_v": _F32 if exact else _F16,
        "flash_attn_type": _FLASH_OFF if exact else _FLASH_AUTO,
        "offload_kqv": not exact,
        "op_offload": not exact,
    }
    params = lib.llama_context_default_params()
    for name, value in wanted.items():
        params.set(_CONTEXT[name][0], value)
    _errors.clear()
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise QmicaError(f"llama.cpp cannot make a context of {size} tokens: {_last_error()}; try a smaller --ctx")
    got = (lib.llama_n_ctx(context), lib.llama_n_batch(context), lib.llama_n_seq_max(context))
    if got[0] < size or got[1:] != (min(BATCH, got[0]), 1 + CHOICES):
        raise RuntimeError(f"llama.cpp read the context parameters otherwise: {got}")
    return context


def _load_adapter(lib: ctypes.CDLL, model: int, path: Path) -> int:
    """The adapter's handle; it lives and dies with the model."""
    if not path.is_file():
        raise QmicaError(f"{path} is not a file: give the path of an adapter GGUF (qmica export --adapter makes one)")
    _errors.clear()
    adapter = lib.llama_adapter_lora_init(model, os.fsencode(path))
    if not adapter:
        raise QmicaError(f"llama.cpp cannot put the adapter {path} on this model: {_last_error()}; give its own base")
    return adapter


def _free(lib: ctypes.CDLL, owned: list) -> None:
    model, context = owned
    if context:
        lib.llama_free(context)
    lib.llama_model_free(model)


def _last_error() -> str:
    """llama.cpp's reasons, without its functions' names and the lines that only repeat that it failed."""
    lines = [_PREAMBLE.sub("", line.strip()) for text in _errors for line in text.splitlines()]
    reasons = [line for line in lines if line and not line.startswith("failed to load model")]
    return " / ".join(reasons) or "it gives no reason"


def cpus() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _common(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    same = (i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b)
    return next(same, min(len(held), len(tokens)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 (n, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _sample(logits: np.ndarray, temperature: float, top_p: float, generator: np.random.Generator) -> int:
    if not np.isfinite(logits.max()):
        raise QmicaError("the model answers with numbers that are none (NaN or infinite): the file is broken")
    if temperature <= 0:
        return int(logits.argmax())
    chances = np.exp(_log_softmax(logits[None] / temperature)[0])
    order = np.argsort(-chances, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    kept = order[before < top_p]  # never empty: before the first there is 0
    return int(generator.choice(kept, p=chances[kept] / chances[kept].sum()))
