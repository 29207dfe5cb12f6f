"""Files, folders and hub datasets -> documents: a text, or the messages of a chat. No tokenizer is involved.

How: READERS turn any source into (where, record) pairs, one at a time; FORMATS says for each record format which keys
it needs and how a record becomes a Document. JSON and JSONL are read with the standard library, so that every error
has its line number; `datasets` reads CSV, Parquet and hub ids. The format is found by looking at a file's first
record, and then holds for the whole file: a later record that does not fit is an error, not a second guess. A .txt or
.md file is one document.

What it gives up: a .json file (not a .jsonl) is held in memory while it is read. Tool calls and images are refused by
name.
"""

import codecs
import csv
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmica.errors import QmicaError

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".json", ".csv", ".parquet")
JSON_SPACE = re.compile(r"[ \t\n\r]*")
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
ROLES = ("system", "user", "assistant")
NO_TOOLS = (
    "tools",
    "functions",
    "tool_calls",
    "function_call",
)  # refused: without them a chat teaches something else


@dataclass(frozen=True)
class Document:
    """One text (`text`), or one chat (`messages`, and for each message whether it may be learnt)."""

    where: str  # "notes.jsonl, line 3"
    format: str  # a key of FORMATS
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()  # {"role", "content"} and, if the record has it, "reasoning_content"
    learn: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the index of the right choice, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int


# --- records -> documents


def _text_of(value: Any, what: str) -> str:
    """A string, or the joined text parts of a content list. what: "notes.jsonl, line 3: the content of message 2"."""
    if isinstance(value, list):
        for part in value:
            if not (isinstance(part, Mapping) and part.get("type") == "text"):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise QmicaError(f"{what} has a part of type {kind!r}; qmica learns from text only: remove the record")
        value = "".join(_text_of(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise QmicaError(f"{what} is {_kind(value)}; expected text: correct the record")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise QmicaError(f"{what} has half of a surrogate pair, which is no character: correct the record")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "a list" if isinstance(value, list) else f"of type {type(value).__name__}")


def _message(raw: Any, where: str, number: int, role_key: str, content_key: str) -> dict[str, str]:
    what = f"{where}: message {number}"
    if not isinstance(raw, Mapping) or role_key not in raw or content_key not in raw:
        found = f"the keys {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else _kind(raw)
        raise QmicaError(f"{what}: found {found}; expected {role_key}, {content_key}: correct the record")
    _refuse_tools(raw, what)
    role = SHAREGPT_ROLES.get(raw[role_key], raw[role_key]) if isinstance(raw[role_key], str) else raw[role_key]
    if role not in ROLES:
        hint = " (tool calls are not supported)" if role in ("tool", "function", "observation", "function_call") else ""
        raise QmicaError(
            f"{what}: the role {raw[role_key]!r} is unknown{hint}; allowed are {', '.join(ROLES)}, human, gpt: "
            "rename it or remove the record"
        )
    message = {"role": role, "content": _text_of(raw[content_key], f"{where}: the content of message {number}")}
    if isinstance(raw.get("reasoning_content"), str):
        message["reasoning_content"] = _text_of(raw["reasoning_content"], what)
    return message


def _refuse_tools(record: Mapping, what: str) -> None:
    for key in NO_TOOLS:
        if record.get(key):
            raise QmicaError(f"{what} has {key!r}; tool calls are not supported: remove the key or the record")


def _chat(raw: Any, where: str, key: str, role_key: str = "role", content_key: str = "content") -> tuple:
    """(messages, learn) of a list of raw messages; an assistant message with OpenAI's "weight": 0 is not learnt."""
    if not isinstance(raw, list) or not raw:
        found = "an empty list" if raw == [] else _kind(raw)
        raise QmicaError(f"{where}: {key} is {found}; expected a list of messages: correct the record")
    messages = tuple(_message(m, where, i + 1, role_key, content_key) for i, m in enumerate(raw))
    learn = tuple(m["role"] == "assistant" and r.get("weight") != 0 for m, r in zip(messages, raw, strict=True))
    return messages, learn


def _from_text(record: Mapping, where: str) -> dict:
    return {"text": _text_of(record["text"], f"{where}: text")}


def _from_messages(record: Mapping, where: str) -> dict:
    messages, learn = _chat(record["messages"], where, "messages")
    return {"messages": messages, "learn": learn}


def _from_sharegpt(record: Mapping, where: str) -> dict:
    turns = record["conversations"]
    said = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]
    keys = ("role", "content") if said else ("from", "value")
    messages, learn = _chat(turns, where, "conversations", *keys)
    system = _system(record, where)
    return {"messages": system + messages, "learn": (False,) * len(system) + learn}


def _system(record: Mapping, where: str) -> tuple[dict[str, str], ...]:
    system = record.get("system")
    return ({"role": "system", "content": _text_of(system, f"{where}: system")},) if system else ()


def _from_prompt(record: Mapping, where: str) -> dict:
    """A string is one message of the user or the assistant; of two lists only the completion's turns are learnt."""
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": _text_of(prompt, f"{where}: prompt")}]
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": _text_of(completion, f"{where}: completion")}]
    before, _ = _chat(prompt, where, "prompt")
    after, learn = _chat(completion, where, "completion")
    system = _system(record, where) if before[0]["role"] != "system" else ()
    return {"messages": system + before + after, "learn": (False,) * len(system + before) + learn}


def _from_alpaca(record: Mapping, where: str) -> dict:
    """Stanford Alpaca's keys; `history` (pairs of earlier turns) and `system` are those of LLaMA-Factory."""
    asked, given = (_text_of(record.get(key) or "", f"{where}: {key}") for key in ("instruction", "input"))
    messages = list(_system(record, where))
    for pair in record.get("history") or ():
        if not isinstance(pair, list) or len(pair) != 2:
            raise QmicaError(f"{where}: history is no list of [instruction, answer] pairs: correct the record")
        for role, value in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _text_of(value, f"{where}: history")})
    messages.append({"role": "user", "content": f"{asked}\n\n{given}" if given else asked})
    messages.append({"role": "assistant", "content": _text_of(record["output"], f"{where}: output")})
    return {"messages": tuple(messages), "learn": tuple(m["role"] == "assistant" for m in messages)}


@dataclass(frozen=True)
class Format:
    keys: tuple[str, ...]
    read: Callable[[Mapping, str], dict]


# looked for in this order: public sets carry a rendered `text` beside instruction/output, or a `prompt` beside messages
FORMATS = {
    "messages": Format(("messages",), _from_messages),
    "sharegpt": Format(("conversations",), _from_sharegpt),
    "prompt": Format(("prompt", "completion"), _from_prompt),
    "alpaca": Format(("instruction", "output"), _from_alpaca),
    "text": Format(("text",), _from_text),
}


def _expected(name: str) -> str:
    if name in FORMATS:
        return f"{' + '.join(FORMATS[name].keys)} (format {name})"
    return " | ".join(" + ".join(f.keys) for f in FORMATS.values())


def _unusable(where: str, record: Any, name: str) -> QmicaError:
    found = f"found the keys {', '.join(map(str, record)) or '(none)'}" if isinstance(record, Mapping) else ""
    found = found or f"found {_kind(record) if not isinstance(record, str) else 'a string'}, not an object"
    return QmicaError(f"{where}: {found}; expected {_expected(name)}: rename the keys or choose a --format")


def detect(record: Any, where: str) -> str:
    """The name of the first format whose keys `record` has; QmicaError with the keys found and expected."""
    if isinstance(record, Mapping):
        for name, row in FORMATS.items():
            if all(key in record for key in row.keys):
                return name
    raise _unusable(where, record, "auto")


def document(record: Any, where: str, name: str) -> Document:
    """The Document of one record in format `name`. QmicaError: missing keys, or a wrong value."""
    row = FORMATS[name]
    if not isinstance(record, Mapping) or any(key not in record for key in row.keys):
        raise _unusable(where, record, name)
    if name != "text":
        _refuse_tools(record, where)
    return Document(where, name, **row.read(record, where))


# --- files -> records


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """UTF-8 with or without a byte order mark, any line ends -> text with "\\n". QmicaError names byte and line."""
    try:
        text = raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        utf16 = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        what = "it is UTF-16" if utf16 else f"byte 0x{raw[error.start]:02x} on line {line}"
        raise QmicaError(f"{path} is not UTF-8 text ({what}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _broken(error: Exception, path: Path, line: int) -> QmicaError:
    """json's errors, those without a position (numbers of 4,300 digits, a thousand open brackets) among them."""
    if isinstance(error, json.JSONDecodeError):
        return QmicaError(f"{path}, line {line}, column {error.colno}: broken JSON ({error.msg}): correct the line")
    return QmicaError(f"{path}, line {line}: JSON nested too deep, or a number too long: correct the line")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decode(raw, path, number).rstrip()
            if not text:
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _broken(error, path, number) from None
            yield f"{path}, line {number}", value


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """(offset, value) of each value of a JSON list, or of values written one after another. json.JSONDecodeError."""
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 0)
    if not text.startswith("[", at):
        while at < len(text):
            value, end = decode(text, at)
            yield at, value
            at = _skip(text, end)
        return
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        value, end = decode(text, at)
        yield at, value
        at = _skip(text, end)
        if text.startswith(",", at):
            at = _skip(text, at + 1)
        elif not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, at + 1)


def _skip(text: str, at: int) -> int:
    return JSON_SPACE.match(text, at).end()


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decode(path.read_bytes(), path)
    line, counted = 1, 0
    try:
        for at, value in _values(text):
            line, counted = line + text.count("\n", counted, at), at
            yield f"{path}, line {line}", value
    except (ValueError, RecursionError) as error:
        raise _broken(error, path, getattr(error, "lineno", line)) from None


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A .jsonl that begins with a bracket is a JSON list under another name."""
    with open(path, "rb") as file:
        head = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()
    return _json_values(path) if path.suffix.lower() == ".json" or head[:1] == b"[" else _json_lines(path)


def _text(path: Path) -> Iterator[tuple[str, Any]]:
    yield str(path), {"text": _decode(path.read_bytes(), path)}


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Every cell is text: "007" stays "007" and "NA" stays "NA" (pandas would make 7 and nothing of them)."""
    from datasets import Features, Value

    with open(path, "rb") as file:
        head = _decode(file.readline(), path)
    separator = max(",;\t", key=head.count)
    names = next(csv.reader([head], delimiter=separator), [])
    if len(set(names)) < len(names):
        raise QmicaError(f"{path}: its first line, the column names, has a name twice: {', '.join(names)}")
    options = {"features": Features({name: Value("string") for name in names}), "sep": separator}
    return _rows("csv", path, keep_default_na=False, encoding="utf-8-sig", **options)


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    return _rows("parquet", path)


def _rows(kind: str, path: Path, **options) -> Iterator[tuple[str, Any]]:
    """Streamed, so that `datasets` does not write a second copy of the file into its cache."""
    from datasets import load_dataset

    try:
        rows = load_dataset(kind, data_files=os.path.abspath(path), split="train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except QmicaError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets share no base class; the reason is passed on
        raise QmicaError(f"{path} cannot be read as {kind} ({_reason(error)}): check the file") from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """A library whose warnings are not shown: what goes wrong is raised as well."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _hub(name: str) -> Iterator[tuple[str, Any]]:
    """The train split (or the only split) of the hub dataset `org/name` or `org/name:config`."""
    from datasets import load_dataset

    match = HUB_ID.fullmatch(name)
    try:
        with _quiet("huggingface_hub"):  # twelve lines on retries where the hub cannot be reached
            splits = load_dataset(match["id"], match["config"])
    except Exception as error:  # network, no such repository, no such configuration
        raise QmicaError(
            f"cannot load {name!r}: there is no such file or folder here, and as a dataset of the hub it fails "
            f"({_reason(error)}): check the name (org/name or org/name:config), the network and HF_TOKEN"
        ) from error
    split = "train" if "train" in splits else next(iter(splits))
    if split != "train" and len(splits) > 1:
        raise QmicaError(f"{name} has no train split, only {', '.join(splits)}: save the one you mean as Parquet")
    for number, row in enumerate(splits[split], 1):
        yield f"{name}, row {number}", row


READERS = {".txt": _text, ".md": _text, ".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def files(path: Path) -> list[Path]:
    """The file itself, or every usable file below a folder (hidden ones excepted), sorted by name."""
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            suffix = path.suffix or "no suffix"
            raise QmicaError(f"{path} has {suffix}; qmica reads {' '.join(SUFFIXES)}: convert or rename it")
        return [path]
    below = (p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
    found = sorted(p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not found:
        raise QmicaError(f"the folder {path} has no file qmica can use ({' '.join(SUFFIXES)})")
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a text given in place of a path: too long for a file name, or with a NUL
        return False


def _sources(name: str) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Any]]]]]:
    path = Path(name).expanduser()
    if _exists(path):
        for file in files(path):
            if file.stat().st_size <= len(codecs.BOM_UTF8) and not file.read_bytes().removeprefix(codecs.BOM_UTF8):
                raise QmicaError(f"{file} is empty: write something into it or delete it")
            yield str(file), lambda file=file: READERS[file.suffix.lower()](file)
    elif HUB_ID.fullmatch(name) and path.suffix.lower() not in READERS:
        yield name, lambda: _hub(name)
    else:
        raise QmicaError(
            f"no file or folder {name[:200]!r} (looked in {os.getcwd()}): "
            "give a path, or a dataset of the hub as org/name"
        )


def read(data: str | os.PathLike | Sequence, format: str = "auto") -> Iterator[Document]:
    """Every document of the files, folders and hub datasets `data`, in order, one at a time.

    format: "auto" (found at the first record of each file) or a key of FORMATS, which then every record must have.
    Texts and records of white space alone are passed over in data sets, but a file of nothing else is an error.
    QmicaError: anything missing, unreadable or not understood, with file, line, what was found and what was expected.
    """
    if format not in ("auto", *FORMATS):
        raise QmicaError(f"--format {format!r} is unknown; allowed are auto, {', '.join(FORMATS)}")
    names = [data] if isinstance(data, str | os.PathLike) else list(data)
    if not names:
        raise QmicaError("no data was given: name a file, a folder or a dataset of the hub with --data")
    for source, rows in (pair for name in names for pair in _sources(os.fspath(name))):
        try:
            yield from _documents(source, rows(), format)
        except OSError as error:
            raise QmicaError(f"{source} cannot be read ({error.strerror or error}): check the file") from error


def _documents(source: str, rows: Iterator[tuple[str, Any]], format: str) -> Iterator[Document]:
    count = 0
    for where, record in rows:
        format = detect(record, where) if format == "auto" else format
        found = document(record, where, format)
        if found.text is None or found.text.strip():
            count += 1
            yield found
    if not count:
        raise QmicaError(f"{source} has no text in it: write something into it or leave it out")


# --- questions


def read_questions(path: str | os.PathLike) -> list[Question]:
    """The questions of a JSONL file of {"question", "choices", "answer"}, `answer` an index from 0.

    QmicaError: the file is missing or empty, or the first line that is not such a question, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise QmicaError(f"no file {str(path)!r} with questions (looked in {os.getcwd()}): give a JSONL file")
    questions = [_question(record, where) for where, record in _json_lines(path)]
    if not questions:
        raise QmicaError(f'{path} has no questions: write lines of {{"question": …, "choices": […], "answer": 0}}')
    return questions


def _question(record: Any, where: str) -> Question:
    keys = ("question", "choices", "answer")
    if not isinstance(record, Mapping) or any(key not in record for key in keys):
        found = f"the keys {', '.join(map(str, record)) or '(none)'}" if isinstance(record, Mapping) else _kind(record)
        raise QmicaError(f"{where}: found {found}; expected {', '.join(keys)}: correct the line")
    text = _text_of(record["question"], f"{where}: question")
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise QmicaError(f"{where}: choices must be a list of at least two texts: correct the line")
    texts = tuple(_text_of(choice, f"{where}: choice {i}") for i, choice in enumerate(choices))
    if not text.strip() or not all(choice.strip() for choice in texts):
        raise QmicaError(f"{where}: the question or a choice is empty: correct the line")
    if len(set(texts)) < len(texts):
        raise QmicaError(f"{where}: a choice stands twice, so the answer is not unique: correct the line")
    answer = record["answer"]
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise QmicaError(
            f"{where}: answer is {answer!r}; expected an index from 0 to {len(texts) - 1}: correct the line"
        )
    return Question(text, texts, answer)
