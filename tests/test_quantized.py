"""The quantized model kept on disk: the same bytes as without, loaded by transformers, made again when damaged."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import INT8, apart, logits, ours, theirs
from tiny import save_tiny, write_gguf
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qmica import model, quant, quantized, store
from qmica.source import resolve

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """qwen2 with its biases in bf16, llama with a tied head in fp32, and this as a GGUF."""
    root = tmp_path_factory.mktemp("models")
    wide = {"intermediate_size": 128}  # of columns that are no multiple of 64 bitsandbytes takes wrong scales on AVX512
    save_tiny(root / "qwen2", "qwen2", dtype=torch.bfloat16, **wide)
    save_tiny(root / "llama", "llama", tie_word_embeddings=True, **wide)
    write_gguf(root / "llama.gguf", theirs(root / "llama"))
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def entries(cache) -> list:
    return sorted(cache.glob("*/*"))


def held(path, bits, tmp_path, monkeypatch):
    """The model without a cache: there is a file in its place."""
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("QMICA_CACHE", str(tmp_path / "file"))
        return ours(path, bits)


def linears(network) -> list:
    return [module for name, module in network.named_modules() if "_proj" in name and quant.is_linear(module)]


def in_files(network, tensor) -> bool:
    return any(mapped.place(tensor) for mapped in network.qmica_maps)


def from_transformers(path, **options):
    """Computing in bf16, as the entry's types say."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map={"": "cpu"}, **options).eval()


def stored(network) -> dict[str, list[torch.Tensor]]:
    return {name: module.stored() for name, module in network.named_modules() if quant.is_linear(module)}


# ---- what is loaded


@pytest.mark.parametrize("name", ["qwen2", "llama", "llama.gguf"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_byte_is_that_of_the_held_model(folders, cache, tmp_path, monkeypatch, name, bits):
    plain = held(folders / name, bits, tmp_path, monkeypatch)
    assert not cache.exists() and not any(in_files(plain, linear.stored()[0]) for linear in linears(plain))
    for time in ("made", "found"):
        mapped = ours(folders / name, bits)
        assert len(entries(cache)) == 1 and len(mapped.qmica_maps) == 1, time
        assert all(in_files(mapped, linear.stored()[0]) for linear in linears(mapped))
        for path, tensors in stored(plain).items():
            found = mapped.get_submodule(path)
            assert quant.bits_of(found) == quant.bits_of(plain.get_submodule(path))
            assert all(
                one.dtype == two.dtype and torch.equal(one, two)
                for one, two in zip(tensors, found.stored(), strict=True)
            )
        for (path, one), two in zip(plain.named_parameters(), mapped.parameters(), strict=True):
            assert one.dtype == two.dtype and torch.equal(one, two), path
        assert torch.equal(logits(mapped), logits(plain)) and mapped.qmica_base == plain.qmica_base
        assert mapped.generation_config.to_dict() == plain.generation_config.to_dict()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weights_are_pages_of_the_file(folders, cache, bits):
    """All but norms and biases, which are kept in the compute dtype."""
    network = ours(folders / "qwen2", bits)
    assert [mapped.path for mapped in network.qmica_maps] == [entries(cache)[0] / "model.safetensors"]
    assert all(in_files(network, tensor) for linear in linears(network) for tensor in linear.stored()[:2])
    assert in_files(network, network.model.embed_tokens.weight) and in_files(network, network.lm_head.weight)
    assert not in_files(network, network.model.norm.weight)


def test_sources_that_need_no_copy(folders, cache, tmp_path):
    """bf16 for --bits 16, and what bitsandbytes packed, are mapped where they are; other 16-bit sources are held."""
    assert [mapped.path for mapped in ours(folders / "qwen2", 16).qmica_maps] == [folders / "qwen2/model.safetensors"]
    theirs(folders / "qwen2", quantization_config=NF4).save_pretrained(tmp_path / "packed")
    packed = ours(tmp_path / "packed", 4)
    (mapped,) = packed.qmica_maps
    assert mapped.path == tmp_path / "packed/model.safetensors"
    assert mapped.place(packed.model.layers[0].mlp.up_proj.weight)
    single = ours(folders / "llama", 16)
    assert not in_files(single, single.model.layers[0].mlp.up_proj.weight)
    assert ours(folders / "llama.gguf", 16).qmica_maps == () and not cache.exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_digests_kept_are_those_of_the_bytes(folders, bits):
    network = ours(folders / "qwen2", bits)
    assert len(linears(network)) == 14
    for linear in linears(network):
        assert quant.Stored(linear).digest() == linear.known_digest == store.digest(linear.stored())


@pytest.mark.parametrize(("bits", "config"), [(4, NF4), (8, INT8)])
def test_transformers_loads_an_entry(folders, cache, bits, config, exact_bitsandbytes):
    """With its own quantization's logits, bit for bit."""
    ours(folders / "qwen2", bits)
    entry = from_transformers(entries(cache)[0])
    own = from_transformers(folders / "qwen2", quantization_config=config)
    assert apart(entry, own) == 0.0, f"{apart(entry, own):.1e}"
    assert apart(entry, from_transformers(folders / "qwen2")) > 1e-3
    assert entry.generation_config.eos_token_id == own.generation_config.eos_token_id is not None
    for path, linear in own.named_modules():
        assert type(linear) is type(entry.get_submodule(path))


def test_transformers_loads_an_entry_of_a_gguf(folders, cache, exact_bitsandbytes):
    """Its F32 norms are there in bf16, as transformers takes one type only; the loader here has them in fp32."""
    ours(folders / "llama.gguf", 4)
    assert (entries(cache)[0] / "vectors.safetensors").exists()
    entry = from_transformers(entries(cache)[0])
    own = from_transformers(folders / "llama")
    weight = entry.model.layers[0].mlp.up_proj.weight
    packed, state = bnb_quantized(theirs(folders / "llama").model.layers[0].mlp.up_proj.weight)
    assert torch.equal(weight, packed) and torch.equal(weight.quant_state.absmax, state.absmax)
    assert 0.01 < apart(entry, own) < 0.5, f"{apart(entry, own):.1e}"
    assert torch.equal(entry.model.norm.weight, own.model.norm.weight)


def bnb_quantized(weight):
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")


def test_shards(folders, cache, monkeypatch, exact_bitsandbytes):
    """A weight's parts lie in one file, as transformers wants them."""
    one = ours(folders / "qwen2", 4)
    shutil.rmtree(cache)
    write = quantized.write_sharded
    monkeypatch.setattr(quantized, "write_sharded", lambda weights, folder: write(weights, folder, None, 30_000))
    many = ours(folders / "qwen2", 4)
    assert len(many.qmica_maps) > 3 and torch.equal(logits(one), logits(many))
    for file in entries(cache)[0].glob("*.safetensors"):
        names = set(load_file(file))
        packed = {name for name in names if f"{name}.absmax" in names}
        assert len(names & {f"{name}.nested_absmax" for name in packed}) == len(packed)
        assert sum("absmax" in name for name in names) == 2 * len(packed)
    own = from_transformers(folders / "qwen2", quantization_config=NF4)
    assert apart(from_transformers(entries(cache)[0]), own) == 0.0


# ---- which entry


def test_a_changed_source_has_another_entry(folders, cache, tmp_path):
    path = shutil.copytree(folders / "qwen2", tmp_path / "copy")
    before = logits(ours(path, 4))
    assert len(entries(cache)) == 1
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][20] *= 3  # a row that the fingerprint does not sample
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    after = ours(path, 4)
    assert len(entries(cache)) == 2 and not torch.equal(logits(after), before)
    ours(path, 8)
    assert len(entries(cache)) == 3
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    ours(path, 4)
    assert len(entries(cache)) == 4
    ours(path, 4)
    assert len(entries(cache)) == 4


# ---- damage


def cut(entry):
    file = entry / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def zeros(entry):
    (entry / "model.safetensors").write_bytes(bytes((entry / "model.safetensors").stat().st_size))


def without_a_part(entry):
    tensors = load_file(entry / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"]
    save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})


def another_shape(entry):
    tensors = load_file(entry / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][1:].clone()
    save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})


def another_type(entry):
    tensors = load_file(entry / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.float16)
    save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})


def no_state(entry):
    tensors = load_file(entry / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"][:] = 0
    save_file(tensors, entry / "model.safetensors", metadata={"format": "pt"})


def no_digest(entry):
    about = json.loads((entry / "qmica.json").read_text())
    del about["digests"]["model.layers.1.mlp.up_proj"]
    (entry / "qmica.json").write_text(json.dumps(about))


DAMAGES = {
    "cut": cut,
    "zeros": zeros,
    "without a part": without_a_part,
    "another shape": another_shape,
    "another type": another_type,
    "no state": no_state,
    "no digest": no_digest,
    "no weights": lambda entry: (entry / "model.safetensors").unlink(),
    "no config": lambda entry: (entry / "config.json").unlink(),
    "no about": lambda entry: (entry / "qmica.json").unlink(),
    "empty about": lambda entry: (entry / "qmica.json").write_text("[]"),
    "empty": lambda entry: [file.unlink() for file in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_said_and_made_again(folders, cache, caplog, damage):
    before = logits(ours(folders / "qwen2", 4))
    (entry,) = entries(cache)
    names = {file.name for file in entry.iterdir()}
    DAMAGES[damage](entry)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(ours(folders / "qwen2", 4)), before)
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0], caplog.messages
    assert caplog.messages[0].startswith(f"{entry} is damaged (")
    assert caplog.messages[0].endswith("): the model is quantized again")
    assert entries(cache) == [entry] and {file.name for file in entry.iterdir()} == names
    assert torch.equal(logits(ours(folders / "qwen2", 4)), before) and len(caplog.messages) == 1


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-4])])
def test_vectors_that_are_gone(folders, cache, caplog, damage):
    before = logits(ours(folders / "llama.gguf", 4))
    (entry,) = entries(cache)
    damage(entry / "vectors.safetensors")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(ours(folders / "llama.gguf", 4)), before)
    assert said_once(caplog).startswith(f"{entry} is damaged (") and (entry / "vectors.safetensors").exists()


def test_a_half_written_sibling_is_no_entry(folders, cache):
    """What a killed process leaves lies beside, under another name."""
    before = logits(ours(folders / "qwen2", 4))
    (entry,) = entries(cache)
    os.rename(entry, f"{entry}.3f2a9c01.part")
    cut(cache / f"{entry}.3f2a9c01.part")
    assert torch.equal(logits(ours(folders / "qwen2", 4)), before) and entry in entries(cache)


# ---- a cache that cannot be written


def said_once(caplog) -> str:
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0], caplog.messages
    return caplog.messages[0]


def test_no_cache(folders, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        network = held(folders / "qwen2", 4, tmp_path, monkeypatch)
    assert quant.stored_bits(network) == 4
    assert said_once(caplog).startswith("the quantized model is held in memory, as it cannot be kept: cannot write ")


def test_no_space(folders, cache, monkeypatch, caplog):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with caplog.at_level(logging.WARNING):
        assert quant.stored_bits(ours(folders / "qwen2", 4)) == 4
    assert re.search(r"cannot be kept: writing 97 tensors needs \d+ kB, has 1 kB free at ", said_once(caplog))
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def test_a_damaged_entry_that_cannot_be_removed(folders, cache, monkeypatch, caplog):
    before = logits(ours(folders / "qwen2", 4))
    cut(entries(cache)[0])
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(ours(folders / "qwen2", 4)), before)
    assert [text.split(" (")[0].split(",")[0] for text in caplog.messages] == [
        f"{entries(cache)[0]} is damaged",
        "the quantized model is held in memory",
    ]


def test_two_processes_at_once(folders, cache, tmp_path):
    """Both load, and one entry is left."""
    code = "import sys; from qmica import model, source; model.load(source.resolve(sys.argv[1]), 4, 'fp32', 'cpu')"
    run = [sys.executable, "-c", code, str(folders / "qwen2")]
    children = [subprocess.Popen(run, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        _, said = child.communicate()
        assert child.returncode == 0 and said == "", said
    assert len(entries(cache)) == 1
    assert torch.equal(logits(ours(folders / "qwen2", 4)), logits(ours(folders / "qwen2", 4)))


# ---- bounds


def test_one_tensor_at_a_time_is_quantized_once(folders, monkeypatch):
    """Making an entry reads each weight once and holds the parts of one."""
    made = []
    quantize = quant.quantize
    monkeypatch.setattr(quant, "quantize", lambda *given: made.append(tuple(given[0].shape)) or quantize(*given))
    seen = []
    model.load(resolve(folders / "qwen2"), 4, "fp32", "cpu", lambda *step: seen.append(step))
    assert len(made) == 14 + 1 and seen == [(done, 14) for done in range(1, 15)]  # and the head, in 16 bits
