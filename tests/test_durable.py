"""Old content or new, never a mixture, and no litter: failures are planted at every step of a durable write."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time

import pytest

from qmica import durable
from qmica.errors import QmicaError


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_success_replaces_and_leaves_no_sibling(tmp_path):
    path = tmp_path / "deep" / "er" / "model.bin"
    for content in (b"first", b"second"):
        with durable.replacing(path) as part:
            assert part.parent == path.parent and part != path
            part.write_bytes(content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["model.bin"]


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt(), QmicaError("said so")])
def test_failure_in_the_middle_keeps_the_old_content(tmp_path, failure):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(failure)), durable.replacing(path) as part:
        part.write_bytes(b"half of the n")
        raise failure
    assert path.read_bytes() == b"old" and names(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_of_sync_or_rename_keeps_the_old_content(tmp_path, monkeypatch, step):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(errno.EIO, "planted")

    with pytest.raises(OSError, match="planted"), durable.replacing(path) as part:
        part.write_bytes(b"new")
        monkeypatch.setattr(os, step, fail)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["model.bin"]


def test_data_is_synced_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    steps, path = [], tmp_path / "a.json"
    real_sync, real_replace = durable.sync, os.replace
    monkeypatch.setattr(durable, "sync", lambda p: (steps.append(os.path.basename(p)), real_sync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), real_replace(a, b)))
    durable.write_json(path, {"a": 1})
    assert steps[0].startswith("a.json.") and steps[1:] == ["rename", tmp_path.name]


def test_full_disk_and_permission_are_one_line(tmp_path):
    path = tmp_path / "out.gguf"
    with pytest.raises(QmicaError) as caught, durable.replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"cannot write {path}: the disk is full: free some space or choose another folder"
    with pytest.raises(PermissionError), durable.replacing(path):  # another file's trouble keeps its own text
        raise PermissionError(errno.EACCES, "Permission denied", "/other/file")
    (tmp_path / "file").write_text("x")
    with pytest.raises(QmicaError, match="a part of the path is a file"), durable.replacing(tmp_path / "file" / "a"):
        pass
    with pytest.raises(QmicaError, match="it is a folder"), durable.replacing(tmp_path):
        pass


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(QmicaError, match="permission denied"), durable.replacing(tmp_path / "a") as part:
        part.write_text("x")


def test_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "step-000100"
    with pytest.raises(ValueError), durable.replacing_folder(path) as part:
        (part / "sub").mkdir()
        (part / "sub" / "adapter.safetensors").write_bytes(b"x")
        raise ValueError
    assert names(tmp_path) == []
    path.mkdir()  # an empty one may be there
    with durable.replacing_folder(path) as part:
        (part / "sub").mkdir()
        (part / "sub" / "adapter.safetensors").write_bytes(b"x")
        assert names(path) == []
    assert names(tmp_path) == ["step-000100"] and (path / "sub" / "adapter.safetensors").read_bytes() == b"x"
    with pytest.raises(QmicaError, match="is not empty"), durable.replacing_folder(path):
        pass
    assert names(tmp_path) == ["step-000100"]


def test_require_empty(tmp_path):
    durable.require_empty(tmp_path / "missing")
    durable.require_empty(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(QmicaError) as caught:
        durable.require_empty(tmp_path)
    said = "is not empty (it holds a): choose another --out, or empty it"
    assert str(caught.value) == f"output folder {tmp_path} {said}"
    (tmp_path / "b").touch()
    with pytest.raises(QmicaError, match="a and 1 more"):
        durable.require_empty(tmp_path)
    with pytest.raises(QmicaError, match="is a file"):
        durable.require_empty(tmp_path / "a")


def test_require_space(tmp_path, monkeypatch):
    durable.require_space(tmp_path / "not" / "there", 1, "this test")
    monkeypatch.setattr(durable, "free_space", lambda folder: 1_260_000_000)
    durable.require_space(tmp_path, 1_260_000_000, "the export")
    with pytest.raises(QmicaError) as caught:
        durable.require_space(tmp_path, 4.68e9, "the export")
    advice = "free some space or choose another folder"
    assert str(caught.value) == f"the export needs 4.7 GB, has 1.3 GB free at {tmp_path}: {advice}"


def test_size_text():
    shown = [durable.size_text(n) for n in (0, 17, 12_300, 98_100_000, 15_231_000_000)]
    assert shown == ["0 bytes", "17 bytes", "12 kB", "98.1 MB", "15.2 GB"]


def test_text_and_json_are_utf8_with_newlines(tmp_path):
    durable.write_text(tmp_path / "a.txt", "Zürich\n東京\n")
    assert (tmp_path / "a.txt").read_bytes() == "Zürich\n東京\n".encode()
    durable.write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"ü": [1, 2.5, None]}
    with pytest.raises(ValueError):
        durable.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == ["a.json", "a.txt"]


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 20) + 1])
def test_sha256(tmp_path, length):
    (tmp_path / "a").write_bytes(b"q" * length)
    assert durable.sha256(tmp_path / "a") == hashlib.sha256(b"q" * length).hexdigest()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "here"))
    assert durable.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("QMICA_CACHE")
    assert durable.cache_folder().name.lower() in ("qmica", "cache")


HOLD = """
import sys, time
from qmica.durable import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_between_processes(tmp_path):
    path = tmp_path / "cache" / "subspace"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "held\n"
            started = time.monotonic()
            with pytest.raises(QmicaError) as caught, durable.locked(path, timeout=0.3):
                pass
            assert 0.25 < time.monotonic() - started < 10
            assert str(caught.value).startswith(
                f"{path} is in use by another qmica process (waited 0.3 s for {path}.lock)"
            )
        finally:
            child.kill()  # killed outright: the system frees its lock
    with durable.locked(path, timeout=20):
        pass


def test_lock_is_freed_after_an_exception(tmp_path):
    with pytest.raises(ValueError), durable.locked(tmp_path / "a"):
        raise ValueError
    with durable.locked(tmp_path / "a", timeout=1):
        pass


def test_import_is_light():
    code = "import sys, qmica.durable; print([m for m in ('torch', 'numpy', 'filelock') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
