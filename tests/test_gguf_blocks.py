"""`--bits gguf`: training beside a GGUF's own blocks. What is computed is what the file's dequantized weights give, its
gradients those of float64, its memory pages of the file, and its loss llama.cpp's for that very file and the adapter.
"""

import itertools
import json
from pathlib import Path

import gguf
import hollow
import numpy as np
import pytest
import torch
from small_runs import DOCUMENTS
from tiny import TEXT, WIDE, save_tiny, tiny_model, write_gguf
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import qmica
from qmica import (
    adapter,
    checkpointing,
    ggml,
    loss,
    memory,
    merging,
    model,
    packing,
    quant,
    runs,
    samples,
    source,
    streaming,
    unpacking,
    window,
)
from qmica import weights as files
from qmica.config import AdapterConfig
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.linear import MicaLinear
from qmica.unpacking import Blocks
from qmica.weights import open_weights

T = gguf.GGMLQuantizationType
CPU = torch.device("cpu")
MIXED = (T.Q4_K, T.Q6_K, T.Q2_K, T.Q5_0, T.Q3_K, T.Q8_0, T.Q5_K, T.Q4_1, T.Q5_1, T.Q4_0, T.F16)


def requantized(path, out, types, **options):
    """A GGUF again with its matrices, in the file's order, in these types, over and over."""
    file, types = GGUFFile.open(path), itertools.cycle(types)
    writer = gguf.GGUFWriter(out, file.architecture, **options)
    for key, value in file.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, *file.kinds[key])
    for name, tensor in file.tensors.items():
        kind = next(types) if len(tensor.shape) == 2 else T.F32
        values = ggml.dequantize(tensor.raw(), tensor.type).reshape(tensor.shape)
        packed = ggml.quantize(values.reshape(-1, tensor.shape[-1]), kind)
        writer.add_tensor(name, packed if len(tensor.shape) == 2 else packed[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A loud llama of width 512 whose matrices are of every sort."""
    folder = tmp_path_factory.mktemp("mixed")
    return requantized(write_gguf(folder / "f32.gguf", tiny_model("llama", **WIDE)), folder / "mixed.gguf", MIXED)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A small qwen2, which has biases, its head tied to an embedding in Q8_0."""
    folder = tmp_path_factory.mktemp("tied")
    whole = write_gguf(folder / "f32.gguf", tiny_model("qwen2", tie_word_embeddings=True))
    return requantized(whole, folder / "tied.gguf", (T.Q8_0, T.Q5_1))


def loaded(path, **options):
    return model.load(source.resolve(str(path)), "gguf", "fp32", "cpu", **options)


def transformers_own(path) -> nn.Module:
    """The oracle: transformers' model with the file's weights dequantized by gguf's numpy code, in fp32."""
    weights = open_weights(source.resolve(str(path)))
    network = AutoModelForCausalLM.from_config(model.read_config(source.resolve(str(path))), dtype=torch.float32)
    missing, unexpected = network.load_state_dict({n: t.load(torch.float32) for n, t in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return network.eval()


def random_ids(network, count: int = 40) -> torch.Tensor:
    return torch.randint(0, network.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(3))


# ---- what is held


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_weights_are_the_files(kind, request):
    """Each matrix, embedding and head too, is a view of the file and dequantizes to what gguf's numpy code says."""
    path = request.getfixturevalue(kind)
    network, weights = loaded(path), open_weights(source.resolve(str(path)))
    (mapped,) = network.qmica_maps
    types = set()
    for name, tensor in weights.items():
        module = network.get_submodule(name.rpartition(".")[0])
        if len(tensor.shape) == 2:
            stored = tensor.quantized
            assert mapped.place(module.weight.data) == (stored.offset, stored.offset + stored.nbytes), name
            everything = torch.arange(tensor.shape[0])
            held = module(everything) if isinstance(module, nn.Embedding) else quant.dequantize(module)
            assert torch.equal(held, tensor.load(torch.float32)), name
            types.add(stored.type)
    assert types == (set(MIXED) if kind == "mixed" else {T.Q8_0, T.Q5_1})
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    assert (head.weight is embedding.weight) == (kind == "tied")
    assert quant.stored_bits(network) == "gguf" and {
        quant.bits_of(m) for m in network.modules() if quant.is_linear(m)
    } == {"gguf"}


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_logits_are_those_of_the_dequantized_weights(kind, request):
    path = request.getfixturevalue(kind)
    ours, theirs = loaded(path), transformers_own(path)
    ids = random_ids(ours)
    with torch.no_grad():
        found, expected = (n(input_ids=ids, use_cache=False).logits.log_softmax(-1) for n in (ours, theirs))
    apart = float((found - expected).abs().max())
    print(f"{kind}: log-probabilities {apart:.1e} apart")
    assert apart < 1e-5
    head = loss.Head.of(ours)
    assert type(head) is loss.Head, "the packed head gives the model's own logits"


def test_parts_are_mapped_each(mixed, tmp_path):
    requantized(mixed, tmp_path / "m.gguf", MIXED, split_max_tensors=8)
    path = tmp_path / "m-00001-of-00003.gguf"
    network, weights = loaded(path), open_weights(source.resolve(str(path)))
    assert len(network.qmica_maps) == 3
    for name, module in network.named_modules():
        if quant.is_linear(module):
            assert torch.equal(quant.dequantize(module), weights[f"{name}.weight"].load(torch.float32)), name
            assert sum(mapped.place(module.weight.data) is not None for mapped in network.qmica_maps) == 1


def test_without_a_map_the_blocks_are_copied(mixed, monkeypatch):
    monkeypatch.setattr(files, "_map", lambda path: None)
    network, ids = loaded(mixed), random_ids(loaded(mixed))
    assert network.qmica_maps == ()
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(network(input_ids=ids).logits, loaded(mixed)(input_ids=ids).logits)
    with pytest.raises(
        QmicaError, match=r"^--stream disk: the weights of .* are held in memory, not mapped: use .*gguf"
    ):
        window.attach(network)


def test_an_embedding_that_scales_keeps_its_scale():
    """Gemma's own class multiplies in the weight's dtype, which is uint8 here."""
    raw = torch.from_numpy(ggml.quantize(np.random.default_rng(0).standard_normal((50, 64), np.float32), T.Q8_0))
    module = Gemma3TextScaledWordEmbedding(50, 64, None, embed_scale=64**0.5 + 0.3)
    plain = Gemma3TextScaledWordEmbedding(50, 64, None, embed_scale=64**0.5 + 0.3)
    plain.weight.data = unpacking.unpack(raw, T.Q8_0)
    quant.embed_blocks(module, Blocks(raw, T.Q8_0), torch.float32, CPU)
    ids = torch.tensor([[3, 49, 0]])
    assert torch.equal(module(ids), plain(ids))


def test_packed_weights_take_no_memory_of_the_process(tmp_path):
    """67 MB of Q8_0: nothing is read at loading, and nothing is anonymous."""
    path = hollow.write_gguf(tmp_path / "wide.gguf", {**_LARGE, "num_hidden_layers": 4}, T.Q8_0)
    before = memory.measure(CPU)
    network = loaded(path)
    took = memory.measure(CPU) - before
    held = sum(part.nbytes for m in network.modules() if quant.is_linear(m) for part in m.stored())
    print(f"{took / 1e6:.1f} MB for {held / 1e6:.1f} MB of blocks")
    assert held > 60e6 and took < 8e6


_LARGE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_a_digest_is_that_of_the_file(kind, request):
    """So that subspaces are found again whether they were asked of the held or of the original weights."""
    path = request.getfixturevalue(kind)
    network, weights = loaded(path), open_weights(source.resolve(str(path)))
    for name, module in network.named_modules():
        if quant.is_linear(module) and f"{name}.weight" in weights and module.type not in unpacking.PLAIN:
            assert quant.Stored.of(module).digest() == weights[f"{name}.weight"].digest(), name


def test_a_digest_tells_type_and_order():
    raw = torch.randint(64, (8, 288), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    orders = None, torch.arange(8).flip(0)
    linears = [
        quant.from_blocks(Blocks(raw, kind, order), None, CPU) for kind in (T.Q4_K, T.IQ4_NL) for order in orders
    ]
    assert len({quant.Stored.of(linear).digest() for linear in linears}) == 4


# ---- gradients


def random_linear(kind: T, rows: int = 96, columns: int = 512, moved: bool = True, bias: bool = True) -> nn.Module:
    values = np.random.default_rng(1).standard_normal((rows, columns), np.float32) / columns**0.5
    raw = torch.from_numpy(ggml.quantize(values, kind))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2)) if moved else None
    return quant.from_blocks(Blocks(raw, kind, order), torch.arange(rows) / rows if bias else None, CPU)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("panels", [True, False])
@pytest.mark.parametrize("kind", MIXED, ids=lambda kind: kind.name)
def test_gradients_are_those_of_float64(monkeypatch, kind, panels):
    """y, dX and dA of W + s B A against the same in float64 with the dequantized W, whole and in panels of 7 rows."""
    if panels:
        monkeypatch.setattr(quant, "piece_rows", lambda out, columns: 7)
    base = random_linear(kind)
    weight = torch.from_numpy(gguf.quants.dequantize(base.weight.numpy(), kind).astype(np.float64))[base.order]
    generator = torch.Generator().manual_seed(3)
    layer = MicaLinear.from_base(base, torch.linalg.qr(torch.randn(96, 4, generator=generator))[0], alpha=8)
    layer.A.data.normal_(std=0.1, generator=generator)
    x = torch.randn(2, 9, 512, generator=generator, requires_grad=True)
    dy = torch.randn(2, 9, 96, generator=generator)
    y = layer(x)
    y.backward(dy)
    X, A, B = x.detach().double().requires_grad_(), layer.A.detach().double().requires_grad_(), layer.B.double()
    expected = X @ weight.T + base.bias.double() + layer.scale * (X @ A.T @ B.T)
    expected.backward(dy.double())
    errors = [relative(*pair) for pair in ((y.detach(), expected.detach()), (x.grad, X.grad), (layer.A.grad, A.grad))]
    print(f"{kind.name}: y, dX, dA off by {', '.join(f'{error:.1e}' for error in errors)}")
    assert max(errors) < 2e-6
    assert base.weight.grad is None and base.weight.dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_computes_with_the_rounded_weight(dtype):
    base = random_linear(T.Q4_K, bias=False)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(3)).to(dtype)
    twin = nn.functional.linear(x, quant.dequantize(base).to(dtype))
    assert torch.equal(base(x), twin) and twin.dtype == dtype


def test_nothing_is_kept_on_the_graph():
    linear, saved = random_linear(T.Q6_K), []
    x = torch.randn(3, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = linear(x * 1)
    assert not saved or all(part.shape == () for part in saved)
    assert not [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]


# ---- subspaces


def test_B_comes_from_the_dequantized_weight(mixed, monkeypatch, tmp_path):
    """And is the same asked of the file's weights: both from one entry of the cache, but for those of F16."""
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "cache"))
    held, asked = loaded(mixed), loaded(mixed)
    adapter.attach(held, AdapterConfig(rank=4, targets="qv"))
    adapter.attach(asked, AdapterConfig(rank=4, targets="qv", subspace_from="original"))
    plain = sum(layer.base.type in unpacking.PLAIN for _, layer in adapter.layers(held))
    assert asked.qmica_subspaces.stored == asked.qmica_subspaces.total - plain
    for (name, one), (_, other) in zip(adapter.layers(held), adapter.layers(asked), strict=True):
        weight = quant.dequantize(one.base).double()
        least = torch.linalg.svdvals(weight)[-4:].square().sum()
        energy = float((one.B.double().T @ weight).square().sum() / least)
        assert energy < 1.1, f"{name}: B carries {energy:.4f} times the least"  # 1.05, by the rounding to bf16
        assert torch.equal(one.B, other.B)


# ---- streams


def gradients(network) -> list[torch.Tensor]:
    ids = random_ids(network)
    count = ids.shape[1]
    batch = packing.Batch(
        ids, torch.arange(count)[None], ids.clone(), torch.zeros_like(ids, dtype=torch.bool), count, 0, count
    )
    loss.summed_loss(network, batch).backward()
    found = [layer.A.grad.clone() for _, layer in adapter.layers(network)]
    network.zero_grad(set_to_none=True)
    return found


def adapted(path, **options) -> nn.Module:
    network = loaded(path, **options)
    adapter.attach(network, AdapterConfig(rank=4, components="random"))
    for _, layer in adapter.layers(network):
        layer.A.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    loss.Head.of(network)
    checkpointing.set_modes(network, ["checkpoint"] * network.config.num_hidden_layers)
    return network.train()


def test_streams_change_no_bit(mixed):
    """From the disk (the window over the file's map), and as to a GPU, by slots, in this machine's memory."""
    network = adapted(mixed)
    plain = gradients(network)
    assert all(part.abs().max() > 0 for part in plain)
    on_disk = window.attach(network)
    assert all(torch.equal(one, other) for one, other in zip(gradients(network), plain, strict=True))
    on_disk.remove()
    streaming.stream_layers(checkpointing.decoder_layers(network), streaming.InMemory())
    assert all(torch.equal(one, other) for one, other in zip(gradients(network), plain, strict=True))


# ---- merged


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_merged_into_the_files_own_weights(kind, request, tmp_path):
    """`--base quantized` and `original` are one: what gguf dequantizes, and the delta."""
    path = request.getfixturevalue(kind)
    made = adapter.save_adapter(adapted(path), tmp_path / "run")
    opened = merging.open_run(str(made))
    assert (
        opened.bits
        == opened.adapter.base.bits
        == json.loads((made / "qmica.json").read_text())["base"]["bits"]
        == "gguf"
    )
    for base in ("original", "quantized"):
        rounding = merging.Rounding()
        for name, tensor in merging.merged(opened.weights, opened.adapter, base, opened.bits, rounding).items():
            expected, part = (
                opened.weights[name].load(torch.float32),
                opened.adapter.factors.get(name.removesuffix(".weight")),
            )
            expected = expected if part is None else expected + part.delta()
            assert torch.allclose(tensor.load().float(), expected, atol=1e-6, rtol=0), (base, name)
        assert rounding.total == 0
    for base in ("original", "quantized"):
        text = merging.describe(opened, base)
        assert "those that training saw" in text and "--base" not in text


# ---- what is refused


def test_a_folder_has_no_blocks(tmp_path):
    folder = save_tiny(tmp_path / "folder", "qwen2")
    for job in (
        lambda: model.load(source.resolve(str(folder)), "gguf", "fp32", "cpu"),
        lambda: qmica.plan(model=str(folder), bits="gguf"),
    ):
        with pytest.raises(
            QmicaError, match=r"^--bits gguf: .*folder is no GGUF, .*: give --model FILE.gguf, or --bits 4, 8 or 16$"
        ):
            job()


def test_a_type_without_code_is_named(tmp_path):
    path = hollow.write_gguf(tmp_path / "m.gguf", _LARGE, T.TQ1_0)
    for job in (lambda: loaded(path), lambda: qmica.plan(model=str(path), bits="gguf")):
        with pytest.raises(
            QmicaError, match=r"^--bits gguf: model\..* is TQ1_0, and blocks are unpacked of F32, .*Q4_K"
        ):
            job()


# ---- the job, and llama.cpp


@pytest.mark.parametrize("kind", ["mixed", "tied"])
def test_the_plan_counts_the_packed_bytes(kind, request):
    path = request.getfixturevalue(kind)
    planned = qmica.plan(model=str(path), bits="gguf", dtype="fp32", device="cpu", max_seq_length=32)
    network = loaded(path)
    parts = {id(part): part.nbytes for part in network.parameters()}
    held = planned["memory"]["parts"]["weights"] + planned["memory"]["mapped"]
    assert held == sum(parts.values())
    matrices = sum(part.nbytes for part in network.parameters() if part.dtype == torch.uint8)
    assert planned["memory"]["mapped"] == matrices and planned["disk"]["quantized cache"] == 0
    assert planned["time"]["rates"]["dequantizing"] > 0


def losses(run, held_out, windows: int) -> dict[str, float]:
    """Of held-out documents in qmica and in llama.cpp, base and tuned, as `qmica eval` measures them."""
    base, extra = Path(run.model_config(None)["model"]), qmica.export(run, adapter=True)
    files = (base, Path(f"{base}+{extra}"))
    said = qmica.eval(run, data=str(held_out), gguf=files, max_seq_length=128, limit=windows)
    found = {
        name: row["loss"]
        for name, row in zip(("base", "tuned", "llama base", "llama tuned"), said["scores"], strict=True)
    }
    apart = max(abs(found[name] / found[f"llama {name}"] - 1) for name in ("base", "tuned"))
    print(", ".join(f"{name} {value:.4f}" for name, value in found.items()), f": {apart:.2%} apart at most")
    return found


def train(path, folder, lines, **flags) -> runs.Run:
    (folder / "learnt.jsonl").write_text("\n".join(lines))
    options = {"rank": 8, "max_seq_length": 128, "dtype": "fp32", "device": "cpu", "warmup": 0, "schedule": "constant"}
    learnt = str(folder / "learnt.jsonl")
    return qmica.train(model=str(path), bits="gguf", data=learnt, out=folder / "run", **{**options, **flags})


def test_llama_computes_the_loss_that_training_reports(smollm2_gguf, tmp_path, capsys):
    """SmolLM2's own Q4_1 and the adapter: the same loss of a held-out text to 1 %, and the adapter moves it by far
    more.
    """
    lines = Path(samples.ALMANAC[0]).read_text(encoding="utf-8").splitlines()
    (tmp_path / "held-out.jsonl").write_text("\n".join(lines[-40:]))
    run = train(smollm2_gguf, tmp_path, lines[:-40], steps=12, lr=2e-3, targets="all")
    said = capsys.readouterr().out
    assert "as the GGUF has it: " in said and "4 bits" not in said
    assert run.config()["base"]["bits"] == run.config()["train"]["bits"] == "gguf"
    found = losses(run, tmp_path / "held-out.jsonl", 8)
    assert found["base"] == pytest.approx(found["llama base"], rel=0.01)
    assert found["tuned"] == pytest.approx(found["llama tuned"], rel=0.01)
    assert found["llama base"] - found["llama tuned"] > 0.1 * found["llama base"], "the adapter does too little to tell"


def test_in_fp32_llama_cpp_reads_the_same_text(tmp_path):
    """Of weights that nothing rounds, the loss is the same to what fp32 sums allow: it is of the very same tokens."""
    whole = write_gguf(tmp_path / "f32.gguf", tiny_model("llama"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    said = qmica.eval(model=str(whole), bits="gguf", dtype="fp32", data=str(tmp_path / "text.txt"), gguf=(whole,))
    ours, theirs = (row["loss"] for row in said["scores"])
    assert ours == pytest.approx(theirs, rel=1e-6) and said["tokens"] > 400


ALL_OF = {"Q4_K": T.Q4_K, "Q6_K": T.Q6_K, "Q2_K": T.Q2_K, "Q5_0": T.Q5_0, "mixed": MIXED}


@pytest.mark.parametrize("kind", ALL_OF)
def test_llama_computes_the_loss_of_other_types(kind, tmp_path):
    types = ALL_OF[kind] if isinstance(ALL_OF[kind], tuple) else (ALL_OF[kind],)
    whole = write_gguf(tmp_path / "f32.gguf", tiny_model("llama", **WIDE))
    path = requantized(whole, tmp_path / "base.gguf", types)
    (tmp_path / "held-out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[-8:]))
    lines = [json.dumps({"text": text}) for text in DOCUMENTS[:-8]]
    found = losses(train(path, tmp_path, lines, steps=6, lr=5e-3), tmp_path / "held-out.jsonl", 8)
    assert found["base"] == pytest.approx(found["llama base"], rel=0.01)
    assert found["tuned"] == pytest.approx(found["llama tuned"], rel=0.01)
    assert found["llama base"] - found["llama tuned"] > 0.1 * found["llama base"]
