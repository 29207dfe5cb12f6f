"""Every record format and file type, by what comes out of it; every way a file can be wrong, by the error's text."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmica import records
from qmica.errors import QmicaError
from qmica.records import Question, read, read_questions

ASKED = {"role": "user", "content": "Who counts?"}
SAID = {"role": "assistant", "content": "The keeper."}
SYSTEM = {"role": "system", "content": "Be brief."}

# record -> (format, messages, which may be learnt)
CHATS = {
    "messages": ({"messages": [SYSTEM, ASKED, SAID]}, "messages", [SYSTEM, ASKED, SAID], [0, 0, 1]),
    "messages win over prompt": ({"prompt": "x", "messages": [ASKED, SAID]}, "messages", [ASKED, SAID], [0, 1]),
    "openai weight": ({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}, "messages", None, [0, 0, 0, 1]),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "counts?"}]},
                SAID,
            ]
        },
        "messages",
        [ASKED, SAID],
        [0, 1],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "Who counts?"}, {"from": "gpt", "value": "The keeper."}],
            "system": "Be brief.",
        },
        "sharegpt",
        [SYSTEM, ASKED, SAID],
        [0, 0, 1],
    ),
    "conversations of roles": ({"conversations": [ASKED, SAID]}, "sharegpt", [ASKED, SAID], [0, 1]),
    "prompt": ({"prompt": "Who counts?", "completion": "The keeper."}, "prompt", [ASKED, SAID], [0, 1]),
    "prompt of lists": (
        {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]},
        "prompt",
        [ASKED, SAID, ASKED, SAID],
        [0, 0, 0, 1],  # only the completion is learnt, not the answer within the prompt
    ),
    "alpaca": ({"instruction": "Who counts?", "output": "The keeper."}, "alpaca", [ASKED, SAID], [0, 1]),
    "alpaca wins over its rendered text": (
        {"instruction": "Who", "input": "counts?", "output": "The keeper.", "text": "Below is an instruction"},
        "alpaca",
        [{"role": "user", "content": "Who\n\ncounts?"}, SAID],
        [0, 1],
    ),
    "alpaca with history": (
        {"instruction": "Who counts?", "output": "The keeper.", "history": [["Who counts?", "The keeper."]]},
        "alpaca",
        [ASKED, SAID, ASKED, SAID],
        [0, 1, 0, 1],
    ),
    "reasoning": (
        {"messages": [ASKED, {**SAID, "reasoning_content": "Hm.", "name": "Bot"}]},
        "messages",
        [ASKED, {**SAID, "reasoning_content": "Hm."}],
        [0, 1],
    ),
}


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CHATS)
def test_chat_formats(tmp_path, name):
    record, format, messages, learn = CHATS[name]
    path = write(tmp_path / "a.jsonl", [record])
    for asked in ("auto", format):
        (document,) = read(path, asked)
        assert (document.format, document.text, document.where) == (format, None, f"{path}, line 1")
        assert messages is None or list(document.messages) == messages
        assert [int(wanted) for wanted in document.learn] == learn


def test_a_text_file_is_one_document(tmp_path):
    """Byte order mark and line ends of Windows do not reach the model; blank lines and U+2028 are text."""
    (document,) = read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\rthree \xe2\x80\xa8 four\n"))
    assert document.text == "one\n\ntwo\nthree \u2028 four\n"


def test_every_kind_of_json_is_read_with_line_numbers(tmp_path):
    rows = [{"text": "one"}, {"text": "two\u2028still"}]
    pretty = json.dumps(rows, indent=1, ensure_ascii=False)
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name, content, numbers in (
        ("a.jsonl", "\ufeff" + lines, (1, 2)),
        ("b.jsonl", "\n" + lines + "\n\n", (2, 3)),
        ("c.jsonl", pretty, (2, 5)),  # a list under the wrong name
        ("d.json", pretty, (2, 5)),
        ("e.json", lines, (1, 2)),  # lines under the wrong name
        ("f.json", json.dumps(rows[0], indent=1) + "\n" + json.dumps(rows[1]), (1, 4)),
    ):
        path = write(tmp_path / name, content)
        found = [(document.text, document.where) for document in read(path)]
        assert found == [(row["text"], f"{path}, line {n}") for row, n in zip(rows, numbers, strict=True)], name


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.fixed_dictionaries({"text": st.text(min_size=1).filter(str.strip), "n": st.floats()}), min_size=1)
)
def test_json_values_are_those_of_the_standard_library(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
        read_text = path.read_bytes().decode().replace("\r\n", "\n")
        assert [value["text"] for _, value in records._values(read_text)] == [row["text"] for row in rows]


def test_csv_cells_stay_text(tmp_path):
    """pandas alone would make 7 of "007" and nothing of "NA"."""
    path = write(tmp_path / "a.csv", '\ufeffprompt,completion\r\n007,NA\r\n"two, and\nthree",""\r\n')
    documents = list(read(path))
    assert [[m["content"] for m in d.messages] for d in documents] == [["007", "NA"], ["two, and\nthree", ""]]
    assert [d.where for d in documents] == [f"{path}, row 1", f"{path}, row 2"]
    (semicolons,) = read(write(tmp_path / "b.csv", "text;other\nhello, you;x\n"))
    assert semicolons.text == "hello, you"


def test_parquet(tmp_path):
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_list([{"messages": [ASKED, SAID]}, {"messages": [SYSTEM, ASKED, SAID]}]).to_parquet(str(path))
    assert [list(d.messages) for d in read(path)] == [[ASKED, SAID], [SYSTEM, ASKED, SAID]]
    assert not list(tmp_path.glob("*cache*"))


def test_a_folder_is_its_usable_files_sorted_each_in_its_own_format(tmp_path):
    write(tmp_path / "b.jsonl", [{"prompt": "Who counts?", "completion": "The keeper."}])
    write(tmp_path / "sub" / "c.MD", "# Lamps")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "image.png", b"\x89PNG")
    write(tmp_path / ".git" / "d.txt", "hidden")
    assert [d.format for d in read(tmp_path)] == ["text", "prompt", "text"]
    assert [d.text for d in read([tmp_path, tmp_path / "a.txt"])] == ["one", None, "# Lamps", "one"]


def test_blank_records_of_a_data_set_are_passed_over(tmp_path):
    path = write(tmp_path / "wiki.jsonl", [{"text": ""}, {"text": " = Lamps = \n"}, {"text": "\n"}])
    assert [d.text for d in read(path)] == [" = Lamps = \n"]


BAD = {
    "empty.txt": ("", "{path} is empty: write something into it or delete it"),
    "bom.txt": (b"\xef\xbb\xbf", "{path} is empty: write something into it or delete it"),
    "blank.md": (" \n\n", "{path} has no text in it: write something into it or leave it out"),
    "blank.jsonl": ("\n\n", "{path} has no text in it: write something into it or leave it out"),
    "list.json": ("[]", "{path} has no text in it: write something into it or leave it out"),
    "latin.txt": (b"caf\xc3\xa9\ncaf\xe9\n", "{path} is not UTF-8 text (byte 0xe9 on line 2): save it as UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}', "{path} is not UTF-8 text (byte 0xe9 on line 2)"),
    "utf16.txt": ("lamps".encode("utf-16"), "{path} is not UTF-8 text (it is UTF-16): save it as UTF-8"),
    "broken.jsonl": (
        '{"text": "a"}\n{"text": "b"\n',
        "{path}, line 2, column 13: broken JSON (Expecting ',' delimiter): correct the line",
    ),
    "broken.json": (
        '[{"text": "a"},\n {"text": b}]',
        "{path}, line 2, column 11: broken JSON (Expecting value): correct the line",
    ),
    "comma.json": ('[{"text": "a"}\n{"text": "b"}]', "{path}, line 2, column 1: broken JSON (Expecting ',' delimiter)"),
    "open.json": ('[{"text": "a"},\n', "{path}, line 2, column 1: broken JSON (Expecting value)"),
    "extra.json": ('[{"text": "a"}]\nx', "{path}, line 1, column 16: broken JSON (Extra data)"),
    "deep.jsonl": ("[" * 100_000, "{path}, line 1: JSON nested too deep, or a number too long: correct the line"),
    "list.jsonl": ('{"text": "a"}\n[1]', "{path}, line 2: found a list, not an object; expected text (format text)"),
    "number.jsonl": ('{"text": "a"}\n' + "9" * 5000, "{path}, line 2: JSON nested too deep, or a number too long"),
    "keys.jsonl": (
        [{"titel": "x", "body": "y"}],
        "{path}, line 1: found the keys titel, body; expected messages | conversations | prompt + completion | "
        "instruction + output | text: rename the keys or choose a --format",
    ),
    "second.jsonl": (
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "answer": "b"}],
        "{path}, line 2: found the keys prompt, answer; expected prompt + completion (format prompt): rename the keys",
    ),
    "string.jsonl": (["text"], "{path}, line 1: found a string, not an object; expected messages | conv"),
    "type.jsonl": ([{"text": 7}], "{path}, line 1: text is a number; expected text: correct the record"),
    "null.jsonl": ([{"prompt": "a", "completion": None}], "{path}, line 1: completion is null; expected text"),
    "surrogate.jsonl": ('{"text": "\\ud800"}', "{path}, line 1: text has half of a surrogate pair"),
    "role.jsonl": (
        [{"messages": [{"role": "narrator", "content": "x"}]}],
        "{path}, line 1: message 1: the role 'narrator' is unknown; allowed are system, user, assistant, human, gpt: "
        "rename it or remove the record",
    ),
    "tool.jsonl": (
        [{"messages": [ASKED, {"role": "tool", "content": "x"}]}],
        "{path}, line 1: message 2: the role 'tool' is unknown (tool calls are not supported); allowed are",
    ),
    "calls.jsonl": (
        [{"messages": [ASKED, {**SAID, "tool_calls": [{}]}]}],
        "{path}, line 1: message 2 has 'tool_calls'; tool calls are not supported: remove the key or the record",
    ),
    "tools.jsonl": (
        [{"tools": [{}], "messages": [ASKED, SAID]}],
        "{path}, line 1 has 'tools'; tool calls are not supported: remove the key or the record",
    ),
    "image.jsonl": (
        [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
        "{path}, line 1: the content of message 1 has a part of type 'image_url'; qmica learns from text only",
    ),
    "content.jsonl": (
        [{"messages": [{"role": "user", "text": "x"}]}],
        "{path}, line 1: message 1: found the keys role, text; expected role, content: correct the record",
    ),
    "from.jsonl": (
        [{"conversations": [{"from": "human", "content": "x"}]}],
        "{path}, line 1: message 1: found the keys from, content; expected from, value: correct the record",
    ),
    "none.jsonl": ([{"messages": []}], "{path}, line 1: messages is an empty list; expected a list of messages"),
    "text.jsonl": ([{"messages": "hi"}], "{path}, line 1: messages is of type str; expected a list of messages"),
    "history.jsonl": (
        [{"instruction": "a", "output": "b", "history": [["x"]]}],
        "{path}, line 1: history is no list of [instruction, answer] pairs: correct the record",
    ),
    "twice.csv": ("text,text\na,b\n", "{path}: its first line, the column names, has a name twice: text, text"),
    "header.csv": ("a,b\n1,2\n", "{path}, row 1: found the keys a, b; expected messages | conversations"),
    "ragged.csv": ('text\n"a\n', "{path} cannot be read as csv ("),
    "not.parquet": ("PAR", "{path} cannot be read as parquet ("),
    "scan.pdf": (b"%PDF", "{path} has .pdf; qmica reads .txt .md .jsonl .json .csv .parquet: convert or rename it"),
    "notes": (b"x", "{path} has no suffix; qmica reads .txt .md .jsonl .json .csv .parquet: convert or rename it"),
}


def complaint(call) -> str:
    with pytest.raises(QmicaError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, expected = BAD[name]
    path = write(tmp_path / name, content)
    assert complaint(lambda: list(read(path))).startswith(expected.format(path=path))


def test_bad_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert complaint(lambda: list(read("notes.txt"))) == (
        f"no file or folder 'notes.txt' (looked in {tmp_path}): give a path, or a dataset of the hub as org/name"
    )
    assert complaint(lambda: list(read("A whole text\0, not a path. " * 100))).startswith("no file or folder 'A whole")
    assert complaint(lambda: list(read(()))).startswith("no data was given: name a file")
    (tmp_path / "folder").mkdir()
    nothing = "the folder folder has no file qmica can use (.txt .md .jsonl .json .csv .parquet)"
    assert complaint(lambda: list(read("folder"))) == nothing
    empty = write(tmp_path / "folder" / "b.txt", "")
    write(tmp_path / "folder" / "a.txt", "fine")
    assert complaint(lambda: list(read("folder"))).startswith(f"{empty.relative_to(tmp_path)} is empty: ")
    assert complaint(lambda: list(read("folder/a.txt", "messages"))) == (
        "folder/a.txt: found the keys text; expected messages (format messages): rename the keys or choose a --format"
    )
    assert complaint(lambda: list(read("folder/a.txt", "chatml"))) == (
        "--format 'chatml' is unknown; allowed are auto, messages, sharegpt, prompt, alpaca, text"
    )


def test_an_unreadable_file(tmp_path, monkeypatch):
    """The tests may run as root, who may read everything: the refusal is planted."""
    path = write(tmp_path / "a.txt", "one")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(records.READERS, ".txt", refuse)
    assert complaint(lambda: list(read(path))) == f"{path} cannot be read (Permission denied): check the file"


# --- the hub, by the real code of `datasets`, in a child process, as it reads HF_ENDPOINT once

SET = {"train.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}
CHILD = """
from qmica.errors import QmicaError
from qmica.records import read
for name in ("org/set", "org/nothing"):
    try:
        print([(d.text, d.where) for d in read(name)])
    except QmicaError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """What `datasets` 5 asks of a dataset repository, found by logging its requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        files = [{"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in SET.items()]
        info = {"id": "org/set", "sha": "a" * 40, "private": False, "gated": False, "tags": [], "siblings": []}
        asked = re.fullmatch(r"/datasets/org/set/resolve/[^/]+/(.+)", path)
        if asked and asked[1] in SET:
            self.answer(200, SET[asked[1]], ETag=hashlib.sha1(SET[asked[1]]).hexdigest())
        elif re.fullmatch(r"/api/datasets/org/set/tree/[^/]+", path):
            self.answer(200, json.dumps(files).encode())
        elif re.fullmatch(r"/api/datasets/org/set(/revision/.*)?", path):
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b"{}", **{"X-Error-Code": "EntryNotFound" if "org/set" in path else "RepoNotFound"})

    do_GET = do_HEAD

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": "a" * 40, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def test_hub_datasets(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    paths = {"PYTHONPATH": str(Path(records.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    try:
        child = [sys.executable, "-c", CHILD]
        done = subprocess.run(child, env=kept | ours | paths, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    finally:
        server.shutdown()
        server.server_close()
    first, second = done.stdout.splitlines()
    assert first == str([("one", "org/set, row 1"), ("two", "org/set, row 2")]), done.stderr
    assert second.startswith(
        "cannot load 'org/nothing': there is no such file or folder here, and as a dataset of the hub it fails ("
    )
    assert second.endswith("check the name (org/name or org/name:config), the network and HF_TOKEN")


# --- questions

GOOD = {"question": "Who counts?", "choices": ["the keeper", "the baker"], "answer": 0}
BAD_QUESTIONS = {
    "keys": ({"question": "x", "choices": ["a", "b"]}, "found the keys question, choices; expected question, choices"),
    "kind": ([1], "found a list; expected question, choices, answer: correct the line"),
    "text": ({**GOOD, "question": 7}, "question is a number; expected text: correct the record"),
    "choice": ({**GOOD, "choices": ["a", 7]}, "choice 1 is a number; expected text: correct the record"),
    "few": ({**GOOD, "choices": ["a"]}, "choices must be a list of at least two texts: correct the line"),
    "string": ({**GOOD, "choices": "ab"}, "choices must be a list of at least two texts: correct the line"),
    "empty": ({**GOOD, "choices": ["a", " "]}, "the question or a choice is empty: correct the line"),
    "twice": ({**GOOD, "choices": ["a", "a"]}, "a choice stands twice, so the answer is not unique: correct the line"),
    "high": ({**GOOD, "answer": 2}, "answer is 2; expected an index from 0 to 1: correct the line"),
    "letter": ({**GOOD, "answer": "A"}, "answer is 'A'; expected an index from 0 to 1: correct the line"),
    "true": ({**GOOD, "answer": True}, "answer is True; expected an index from 0 to 1: correct the line"),
}


def test_questions(tmp_path):
    path = write(tmp_path / "q.jsonl", [GOOD, {**GOOD, "answer": 1, "topic": "ignored"}])
    choices = ("the keeper", "the baker")
    assert read_questions(path) == [Question("Who counts?", choices, 0), Question("Who counts?", choices, 1)]


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_bad_questions(tmp_path, name):
    record, expected = BAD_QUESTIONS[name]
    path = write(tmp_path / "q.jsonl", [GOOD, record])
    assert complaint(lambda: read_questions(path)).startswith(f"{path}, line 2: {expected}")


def test_bad_question_files(tmp_path):
    path = tmp_path / "q.jsonl"
    missing = f"no file {str(path)!r} with questions (looked in {os.getcwd()}): give a JSONL file"
    assert complaint(lambda: read_questions(path)) == missing
    write(path, "\n")
    assert complaint(lambda: read_questions(path)).startswith(f"{path} has no questions: write lines of")
    write(path, '{"question": "x",\n')
    assert complaint(lambda: read_questions(path)).startswith(f"{path}, line 1, column")
