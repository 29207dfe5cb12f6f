"""One mapping over every source: values against transformers, gguf's own dequantization and the safetensors library."""

import importlib.util
import json
import math
import struct
import threading
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from qmica import architectures, weights
from qmica.errors import QmicaError
from qmica.source import Source, resolve
from qmica.weights import LazyTensor, Weights, open_weights, overlay, write_sharded


def source_of(*files, config=None):
    return Source("test", str(files[0]), "safetensors", tuple(files), files[0].parent, config=config or {})


def same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape, (got.dtype, got.shape, expected.shape)
    assert torch.equal(
        got.view(torch.uint8) if got.dim() else got, expected.view(torch.uint8) if got.dim() else expected
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny llama and a tiny qwen2 in bf16."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(root / family, family, dtype=torch.bfloat16) for family in ("llama", "qwen2")}


# ---- safetensors


def test_safetensors_values_rows_and_dtypes(tmp_path):
    tensors = {
        "matrix": torch.randn(7, 5),
        "half": torch.randn(3, 4).to(torch.float16),
        "brain": torch.randn(9, 2, 3).to(torch.bfloat16),
        "vector": torch.randn(11),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "codes": torch.arange(10, dtype=torch.uint8).reshape(10, 1),
        "eight": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_weights(source_of(tmp_path / "model.safetensors"))
    assert set(opened) == set(tensors) and len(opened) == len(tensors)
    for name, expected in tensors.items():
        lazy = opened[name]
        assert (lazy.shape, lazy.dtype, lazy.nbytes) == (tuple(expected.shape), expected.dtype, expected.nbytes)
        same(lazy.load(), expected)
        if expected.dim():
            for start, stop in ((0, 2), (1, 3), (2, None), (0, None), (3, 3), (5, 100)):
                same(lazy.rows(start, stop), expected[start:stop])
            same(torch.cat([lazy.rows(*block) for block in lazy.blocks(40)] or [lazy.load()]), expected)


def test_what_rows_gives_is_the_callers_own(tmp_path):
    expected = torch.randn(6, 4)
    save_file({"a": expected}, tmp_path / "model.safetensors")
    lazy = open_weights(source_of(tmp_path / "model.safetensors"))["a"]
    lazy.rows(0, 3).zero_()
    lazy.load().zero_()
    same(lazy.load(), expected)  # neither the map nor the file has changed
    same(load_file(tmp_path / "model.safetensors")["a"], expected)


def test_blocks_are_bounded_and_cover_all_rows():
    lazy = LazyTensor((1000, 64), torch.bfloat16, None)
    blocks = list(lazy.blocks(nbytes=64 * 4 * 30))
    assert blocks[0] == (0, 30) and blocks[-1] == (990, 1000)
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert list(lazy.blocks(nbytes=1))[:2] == [(0, 1), (1, 2)]  # a row is never cut
    assert len(list(lazy.blocks())) == 1


def test_load_casts_block_by_block(tmp_path, monkeypatch):
    expected = torch.randn(100, 8)
    save_file({"a": expected}, tmp_path / "model.safetensors")
    lazy = open_weights(source_of(tmp_path / "model.safetensors"))["a"]
    sizes = []
    watched = LazyTensor(lazy.shape, lazy.dtype, lambda a, b: (sizes.append(b - a), lazy.read(a, b))[1])
    blocks = LazyTensor.blocks
    monkeypatch.setattr(LazyTensor, "blocks", lambda self: blocks(self, 8 * 4 * 30))
    same(watched.load(torch.bfloat16), expected.to(torch.bfloat16))
    assert sizes == [30, 30, 30, 10]


def test_shards_of_transformers(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    source = resolve(tmp_path)
    assert len(source.files) > 2
    opened = open_weights(source)
    for name, parameter in model.state_dict().items():
        if name in opened:
            same(opened[name].load(), parameter)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert model.state_dict().keys() - opened.keys() == tied


def broken(kind):
    """A safetensors file broken in one way."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    large = json.dumps({"a": {"dtype": "F32", "shape": [2, 1 << 40], "data_offsets": [0, 1 << 43]}}).encode()
    return {
        "empty": b"",
        "short": b"\x01\x02",
        "header too large": struct.pack("<Q", 1 << 62) + header,
        "header cut": struct.pack("<Q", len(header) + 100) + header,
        "no json": struct.pack("<Q", 8) + b"not json" + bytes(16),
        "data cut": struct.pack("<Q", len(header)) + header + bytes(9),
        "beyond the end": struct.pack("<Q", len(large)) + large + bytes(16),
        "gguf": b"GGUF" + bytes(60),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "short", "header too large", "header cut", "no json", "data cut", "beyond the end", "gguf"]
)
def test_hostile_safetensors_is_one_line(tmp_path, kind):
    file = tmp_path / "model.safetensors"
    file.write_bytes(broken(kind))
    with pytest.raises(QmicaError) as caught:
        open_weights(source_of(file))
    said = str(caught.value)
    assert said.startswith(f"{file} is not a sound safetensors file (") and said.count("\n") == 0 and len(said) < 500


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(QmicaError, match=r"2\.safetensors holds a again"):
        open_weights(source_of(tmp_path / "1.safetensors", tmp_path / "2.safetensors"))


# ---- GGUF


TYPES = (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1)


def permuted(weight, heads):
    """llama.cpp's own words: conversion/llama.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(path, folder, type=T.F32):
    """The folder's model as GGUF, matrices in `type`; returns HF name -> what gguf dequantizes, in HF order."""
    source = resolve(folder)
    family, config = architectures.for_config(source.config), source.config
    writer = gguf.GGUFWriter(path, family.name)
    for key, kind, value in family.metadata(config):
        if key != "general.architecture":
            writer.add_key_value(key, value, kind)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    expected = {}
    for name, lazy in open_weights(source).items():
        if family.gguf_name(name) is None:
            continue
        values = lazy.load(torch.float32).numpy()
        linear = name.rsplit(".", 2)[-2]
        moved = permuted(values, heads[linear]) if linear in heads and family.name == "llama" else values
        stored = type if values.ndim == 2 else T.F32
        packed = gguf.quants.quantize(moved, stored)
        writer.add_tensor(family.gguf_name(name), packed, raw_dtype=stored)
        unpacked = gguf.quants.dequantize(packed, stored)
        if moved is not values:  # undo it: (heads, half, 2) -> (heads, 2, half)
            per = values.shape[0] // heads[linear]
            unpacked = (
                unpacked.reshape(heads[linear], per // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
            )
        expected[name] = unpacked
    for key, factors in family.extra_tensors(config).items():
        writer.add_tensor(key, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_gguf_is_the_same_mapping(folders, tmp_path, family, type):
    expected = write_gguf(tmp_path / "model.gguf", folders[family], type)
    opened = open_weights(resolve(tmp_path / "model.gguf"))
    original = open_weights(resolve(folders[family]))
    assert set(opened) == set(expected)
    for name, values in expected.items():
        lazy, values = opened[name], torch.from_numpy(values)
        assert lazy.shape == original[name].shape
        plain = {T.F16: torch.float16, T.BF16: torch.bfloat16}.get(lazy.quantized.type, torch.float32)
        assert lazy.dtype == plain
        same(lazy.load().float(), values)
        rows = lazy.shape[0]
        for start, stop in ((0, 1), (1, rows // 2), (rows // 2 - 1, rows)):
            same(lazy.rows(start, stop).float(), values[start:stop])
        if type == T.F32:
            same(lazy.load(), original[name].load(torch.float32))
        lazy.rows(0, 2).zero_()  # the caller's own memory
        same(lazy.load().float(), values)


def test_gguf_q_rows_really_are_permuted(folders, tmp_path):
    """The comparison above would see a forgotten permutation: raw rows and Hugging Face's differ."""
    write_gguf(tmp_path / "model.gguf", folders["llama"])
    lazy = open_weights(resolve(tmp_path / "model.gguf"))["model.layers.0.self_attn.q_proj.weight"]
    raw = torch.from_numpy(lazy.quantized.raw().view(np.float32).copy())
    apart = float((raw - lazy.load()).abs().max() / raw.abs().max())
    assert apart > 0.1, f"raw and Hugging Face rows differ by {apart:.2e} of the largest weight"


def test_gguf_raw_blocks_are_the_files_bytes(folders, tmp_path):
    write_gguf(tmp_path / "model.gguf", folders["llama"], T.Q4_0)
    opened = open_weights(resolve(tmp_path / "model.gguf"))
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    family = architectures.for_gguf("llama")
    for name, lazy in opened.items():
        theirs = reader[family.gguf_name(name)]
        assert lazy.quantized.type == theirs.tensor_type
        assert lazy.quantized.raw().tobytes() == theirs.data.tobytes()


def test_gguf_config_and_scaled_rope(tmp_path):
    """config is what the folder says, llama3 rope scaling (a tensor in GGUF) included."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = save_tiny(tmp_path / "hf", "llama", rope_parameters=rope)
    write_gguf(tmp_path / "model.gguf", folder)
    opened = open_weights(resolve(tmp_path / "model.gguf"))
    assert opened.config["rope_parameters"] == pytest.approx(rope)
    said = resolve(folder).config
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert opened.config[key] == said[key], key
    assert "rope_freqs.weight" not in opened and opened.gguf.architecture == "llama"


def test_a_gguf_of_another_family_is_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QmicaError, match="'mamba' is not supported; supported are"):
        open_weights(resolve(tmp_path / "model.gguf"))


# ---- bitsandbytes checkpoints


@pytest.fixture(scope="module")
def bnb_folders(folders, tmp_path_factory):
    """The tiny llama, saved by transformers in 4 and 8 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    root, made = tmp_path_factory.mktemp("bnb"), {}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for name, options in {
        "nf4": {**four, "bnb_4bit_use_double_quant": True},
        "nf4-plain": four,
        "int8": {"load_in_8bit": True},
    }.items():
        model = AutoModelForCausalLM.from_pretrained(
            folders["llama"], quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
        )
        model.save_pretrained(root / name)
        made[name] = (root / name, model)
    return made


@pytest.mark.parametrize("name", ["nf4", "nf4-plain", "int8"])
def test_a_packed_checkpoint_is_described_whole(bnb_folders, folders, name):
    folder, model = bnb_folders[name]
    opened = open_weights(resolve(folder))
    linears = [f"model.layers.{layer}.{path}.weight" for layer in range(2) for path in architectures._LINEARS]
    assert sorted(opened.packed) == sorted(linears)
    for weight, parts in opened.packed.items():
        path = weight.removesuffix(".weight")
        module = model.get_submodule(path)
        assert parts[0] == "weight" and all(f"{path}.{part}" in opened for part in parts)
        same(opened[weight].load(), module.weight.data)
        assert opened.shapes[weight] == (module.out_features, module.in_features)
    original = open_weights(resolve(folders["llama"]))
    assert opened.shapes.keys() == original.shapes.keys()
    assert weights.shapes_fingerprint(opened) == weights.shapes_fingerprint(original)
    assert weights.fingerprint(opened) != weights.fingerprint(original)


def test_a_packed_checkpoint_without_its_scales_is_refused(bnb_folders, tmp_path):
    folder, _ = bnb_folders["nf4"]
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.0.self_attn.q_proj.weight.absmax"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(QmicaError, match=f"is incomplete: {lost} is missing"):
        open_weights(resolve(tmp_path))


def test_a_damaged_quantization_state_is_one_line(bnb_folders, tmp_path):
    folder, _ = bnb_folders["nf4"]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b"{]"), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(QmicaError, match=f"the quantization state of {name} is damaged"):
        _ = open_weights(resolve(tmp_path)).shapes


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def cut(name, count):
    return name, lambda tensors: {name: tensors[name][:count].clone()}


def cast(name, dtype):
    return name, lambda tensors: {name: tensors[name].to(dtype)}


def stated(**said):
    """Another description of the weight, or a value of it."""

    def change(tensors):
        text = json.dumps({**json.loads(bytes(tensors[STATE].tolist())), **said})
        return {STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}

    return Q, change


def changed_copy(folder, change, path):
    """A copy of a folder with some tensors changed."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | change(tensors), path / "model.safetensors")
    (path / "config.json").write_bytes((folder / "config.json").read_bytes())
    return path


@pytest.mark.parametrize(
    ("kind", "broken_part"),
    [
        ("nf4", cut(Q, 8)),
        ("nf4", cut(f"{Q}.absmax", 1)),
        ("nf4", cut(f"{Q}.nested_absmax", 0)),
        ("nf4", cut(f"{Q}.quant_map", 2)),
        ("nf4", cut(f"{Q}.nested_quant_map", 1)),
        ("nf4", cast(Q, torch.int64)),
        ("nf4", cast(f"{Q}.absmax", torch.float32)),
        ("nf4-plain", cut(f"{Q}.absmax", 1)),
        ("nf4-plain", cast(f"{Q}.absmax", torch.uint8)),
        ("nf4", stated(blocksize=0)),
        ("nf4", stated(blocksize=64.0)),
        ("nf4", stated(blocksize=4096)),
        ("nf4", stated(nested_blocksize=0)),
        ("nf4", stated(nested_offset=math.nan)),
        ("nf4", stated(quant_type="fp4")),
        ("nf4", stated(dtype="evil")),
        ("nf4", stated(shape=[-128, -64])),
        ("nf4", stated(shape=[math.inf, 64])),
        ("nf4", stated(absmax="evil")),
        ("int8", cut(Q.replace("weight", "SCB"), 5)),
        ("int8", cut(Q.replace("weight", "SCB"), 1)),
        ("int8", cast(Q.replace("weight", "SCB"), torch.int64)),
        ("int8", cast(Q, torch.float32)),
    ],
)
def test_parts_that_bitsandbytes_would_read_beyond_are_refused_by_name(bnb_folders, tmp_path, kind, broken_part):
    """Before its kernels, which take pointers: an empty nested_absmax was a segmentation fault, a short absmax the
    heap's bytes for scales.
    """
    name, change = broken_part
    with pytest.raises(QmicaError, match=rf"{name}\b.*: copy or download it again$"):
        open_weights(resolve(changed_copy(bnb_folders[kind][0], change, tmp_path)))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_embedding_is_refused(bnb_folders, tmp_path, kind):
    """Its codes would be looked up as if they were the rows."""

    def change(tensors):
        stem = Q.removesuffix("weight")
        parts = {name.removeprefix(stem): tensor for name, tensor in tensors.items() if name.startswith(stem)}
        return {f"model.embed_tokens.{part}": tensor.clone() for part, tensor in parts.items()}

    with pytest.raises(QmicaError, match=r"model\.embed_tokens\.weight is packed, which linears alone can be: give "):
        open_weights(resolve(changed_copy(bnb_folders[kind][0], change, tmp_path)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_weight_of_codes_without_bitsandbytes_is_refused(folders, tmp_path, dtype):
    """float8 as DeepSeek has it: its scales lie beside it, and nothing here multiplies with them."""
    extra = {f"{Q}_scale_inv": torch.ones(1, 1)}
    path = changed_copy(folders["llama"], lambda tensors: {**extra, Q: tensors[Q].to(dtype)}, tmp_path)
    with pytest.raises(
        QmicaError, match=rf"{Q} is {weights._DTYPE_NAMES[dtype]}, not numbers of 16 bits or more: give "
    ):
        open_weights(resolve(path))


# ---- overlay


def lazy_of(tensor):
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop].clone())


def test_overlay(folders):
    base = open_weights(resolve(folders["llama"]))
    name = "model.layers.1.mlp.up_proj.weight"
    change = torch.randn(base[name].shape)
    laid = overlay(base, {name: lazy_of(change)})
    assert list(laid) == list(base) and laid.config == base.config
    same(laid[name].load(), change)
    same(laid["model.norm.weight"].load(), base["model.norm.weight"].load())
    assert weights.fingerprint(laid) != weights.fingerprint(base)
    with pytest.raises(ValueError, match=r"model\.nothing"):
        overlay(base, {"model.nothing": lazy_of(change)})
    with pytest.raises(ValueError, match="shape"):
        overlay(base, {name: lazy_of(change[1:])})


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_replaced_packed_weight_loses_its_companions(bnb_folders, kind):
    base = open_weights(resolve(bnb_folders[kind][0]))
    name = "model.layers.0.self_attn.q_proj.weight"
    laid = overlay(base, {name: lazy_of(torch.zeros(base.shapes[name]))})
    left = {one for one in laid if one.startswith("model.layers.0.self_attn.q_proj.")}
    assert left == {name} and name not in laid.packed and len(laid.packed) == len(base.packed) - 1
    assert laid.shapes == base.shapes


# ---- writing


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("most", [10**9, 60_000])
def test_write_sharded_is_read_by_safetensors_and_transformers(folders, tmp_path, dtype, most):
    from transformers import AutoModelForCausalLM

    base = open_weights(resolve(folders["qwen2"]))
    files = write_sharded(base, tmp_path, dtype, most)
    tensors = {}
    for file in files:
        tensors |= load_file(tmp_path / file)
        alone = len(load_file(tmp_path / file)) == 1
        assert alone or sum(one.nbytes for one in load_file(tmp_path / file).values()) <= most
    assert set(tensors) == set(base)
    for name, tensor in tensors.items():
        same(tensor, base[name].load(dtype))
    (tmp_path / "config.json").write_bytes((folders["qwen2"] / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or torch.bfloat16)
    same(model.model.norm.weight.data, tensors["model.norm.weight"])
    again = open_weights(resolve(tmp_path))
    assert weights.shapes_fingerprint(again) == weights.shapes_fingerprint(base)
    if dtype is None:
        assert weights.fingerprint(again) == weights.fingerprint(base)  # whatever files it is spread over
    assert (len(files) > 1) == (most < 10**9)


def test_written_bytes_are_those_of_the_safetensors_library(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).to(torch.float16), "c": torch.arange(3, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_sharded(Weights({name: lazy_of(tensor) for name, tensor in tensors.items()}), tmp_path)
    ours, theirs = (tmp_path / "model.safetensors").read_bytes(), (tmp_path / "theirs.safetensors").read_bytes()
    parse = lambda data: json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # noqa: E731
    assert parse(ours) == parse(theirs) and ours == theirs


def test_packed_parts_are_never_cast(bnb_folders, tmp_path):
    base = open_weights(resolve(bnb_folders["nf4"][0]))
    write_sharded(base, tmp_path, torch.float32)
    written = load_file(tmp_path / "model.safetensors")
    for weight, parts in base.packed.items():
        for part in parts:
            name = weight.removesuffix("weight") + part
            same(written[name], base[name].load())
    assert written["model.norm.weight"].dtype == torch.float32


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def fail(start, stop):
        raise RuntimeError("planted")

    broken = Weights({"a": lazy_of(torch.zeros(3)), "b": LazyTensor((3,), torch.float32, fail)})
    with pytest.raises(RuntimeError, match="planted"):
        write_sharded(broken, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_said_before_writing(tmp_path):
    vast = Weights({"a": LazyTensor((1 << 40, 1 << 20), torch.float32, None)})
    with pytest.raises(QmicaError, match=r"writing 1 tensors needs 4611686018\.4 GB, has .* free at"):
        write_sharded(vast, tmp_path)
    assert list(tmp_path.iterdir()) == []


def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak:
    """The largest growth of anonymous memory inside a with block, sampled every 2 ms."""

    def __enter__(self):
        self.before, self.most, self.on = anonymous_bytes(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.on:
            self.most = max(self.most, anonymous_bytes() - self.before)
            time.sleep(0.002)

    def __exit__(self, *error):
        self.on = False
        self.thread.join()


def test_writing_holds_one_block(tmp_path, monkeypatch):
    """A model of two 100 MB tensors goes through in blocks of 4 MB."""
    try:
        anonymous_bytes()
    except OSError:
        pytest.skip("no /proc on this system")
    blocks = LazyTensor.blocks
    monkeypatch.setattr(LazyTensor, "blocks", lambda self: blocks(self, 4_000_000))
    zeros = LazyTensor((25_000, 1000), torch.float32, lambda a, b: torch.zeros(b - a, 1000))
    tensors = {"a": zeros, "b": zeros}
    write_sharded(Weights({"a": lazy_of(torch.zeros(3))}), tmp_path)  # what a first call allocates once
    with Peak() as written:
        write_sharded(Weights(tensors), tmp_path)
    with Peak() as read:
        opened = open_weights(source_of(tmp_path / "model.safetensors"))
        for lazy in opened.values():
            for start, stop in lazy.blocks():
                lazy.rows(start, stop)
    for what, peak in (("writing", written), ("reading", read)):
        assert peak.most < 40e6, f"{what} held {peak.most / 1e6:.1f} MB of a 200 MB model"


# ---- fingerprints


def test_fingerprints_tell_models_apart(folders, tmp_path):
    base = open_weights(resolve(folders["llama"]))
    shapes, content = weights.shapes_fingerprint(base), weights.fingerprint(base)
    assert len(shapes) == len(content) == 64
    assert weights.fingerprint(open_weights(resolve(folders["llama"]))) == content
    sibling = open_weights(resolve(save_tiny(tmp_path / "sibling", "llama", seed=5, dtype=torch.bfloat16)))
    assert weights.shapes_fingerprint(sibling) == shapes and weights.fingerprint(sibling) != content
    deeper = open_weights(resolve(save_tiny(tmp_path / "deeper", "llama", num_hidden_layers=3)))
    assert weights.shapes_fingerprint(deeper) != shapes
    other = open_weights(resolve(folders["qwen2"]))
    assert weights.shapes_fingerprint(other) != shapes
    found = {content}
    for kind in (T.F32, T.Q8_0, T.Q4_0):
        write_gguf(tmp_path / f"{kind.name}.gguf", folders["llama"], kind)
        packed = open_weights(resolve(tmp_path / f"{kind.name}.gguf"))
        assert weights.shapes_fingerprint(packed) == shapes
        found.add(weights.fingerprint(packed))
    assert len(found) == 4  # the folder and each quantization


def test_extra_buffers_do_not_count(folders, tmp_path):
    tensors = load_file(folders["llama"] / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old Llama-2 checkpoints have these
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    base, old = open_weights(resolve(folders["llama"])), open_weights(resolve(tmp_path))
    assert weights.fingerprint(base) == weights.fingerprint(old)
    assert weights.shapes_fingerprint(base) == weights.shapes_fingerprint(old)


def test_any_tensor_changes_the_fingerprint(folders):
    base = open_weights(resolve(folders["llama"]))
    known = weights.fingerprint(base)
    for name in weights._model_names(base):
        changed = overlay(base, {name: lazy_of(base[name].load() + 1)})
        assert weights.fingerprint(changed) != known, name


def test_a_fingerprint_reads_a_few_kilobytes():
    read = []
    lazy = LazyTensor((1 << 20, 4096), torch.bfloat16, lambda a, b: (read.append(b - a), torch.zeros(b - a, 4096))[1])
    thin = LazyTensor((1 << 20, 1), torch.uint8, lambda a, b: (read.append(b - a), torch.zeros(b - a, 1))[1])
    weights.fingerprint(Weights({"a": lazy, "b": thin}))
    assert read == [1, 1, 1, 1024, 1024, 1024]


# ---- scripts/random_model.py


def random_model():
    path = Path(__file__).parents[1] / "scripts" / "random_model.py"
    spec = importlib.util.spec_from_file_location("random_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_random_model_is_one_for_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    script = random_model()
    config = {**script.PRESETS["tiny"], "model_type": family}
    nbytes = script.write_model(config, tmp_path / "m")
    model, said = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert model.dtype == torch.bfloat16 and nbytes >= 2 * model.num_parameters()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert 0.018 < float(weight.detach().float().std()) < 0.022
    assert not torch.equal(weight, model.model.layers[1].mlp.up_proj.weight)
    source = resolve(tmp_path / "m")
    assert set(open_weights(source)) == set(architectures.for_config(source.config).tensor_names(source.config))


@pytest.mark.parametrize("name", [name for name in random_model().PRESETS if name != "tiny"])
def test_the_catalogue_counts_parameters_as_transformers_does(name):
    from qmica import catalog

    _, shapes = random_model().model_shapes(random_model().PRESETS[name])
    counted = sum(math.prod(shape) for shape in shapes.values())
    assert abs(catalog.find(name).parameters - counted) <= 0.5e7, (catalog.find(name).parameters, counted)
