"""Adapters against PEFT's own: the same B, losses and logits; what is stored comes back; Trainer and TRL save it.

PEFT computes in fp32 on weights that stand in bf16, as the tiny folder has them, so that both see the same numbers.
"""

import dataclasses
import json
import logging
import shutil

import datasets
import numpy as np
import pytest
import tiny
import torch
from adapted import make_peft_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import qmica
from qmica import adapter, model, quant, source, subspace, targets
from qmica.config import AdapterConfig
from qmica.errors import QmicaError
from qmica.linear import MicaLinear
from qmica.weights import open_weights

datasets.disable_progress_bars()

BITS = (4, 8, 16)
RANK, ALPHA = 4, 12.0
OPTIONS = AdapterConfig(rank=RANK, alpha=ALPHA)
LINEARS = targets.SETS["all"]
IDS = torch.randint(0, 380, (2, 32), generator=torch.Generator().manual_seed(3))
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
THEIR_BITS = {4: {"quantization_config": NF4}, 8: {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A llama's folder, in bf16."""
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def separated(base, tmp_path_factory):
    """A llama's folder whose linears have singular values that lie evenly apart, in bf16."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in network.named_modules():
        if name.endswith(LINEARS):
            U, S, Vh = torch.linalg.svd(module.weight.data, full_matrices=False)
            module.weight.data = U @ torch.diag(torch.linspace(2.0, 0.1, len(S))) @ Vh
    folder = tmp_path_factory.mktemp("separated") / "llama"
    network.bfloat16().save_pretrained(folder)
    return folder


def loaded(folder, bits=16):
    """qmica's model of a folder, in fp32."""
    return model.load(source.resolve(str(folder)), bits, "fp32", "cpu")


def transformers_model(folder, bits=16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **THEIR_BITS.get(bits, {}))


def attached(folder, bits=16, options=OPTIONS, seed=0):
    return adapter.attach(loaded(folder, bits), options, seed)


def peft_model(folder, **options):
    """PEFT's own adapter on every linear of a folder's model; MiCA, unless options say otherwise."""
    config = {"init_lora_weights": "mica", "task_type": "CAUSAL_LM", "target_modules": list(LINEARS), **options}
    return get_peft_model(transformers_model(folder), LoraConfig(r=RANK, lora_alpha=ALPHA, **config))


def trained(network, steps=6, lr=2e-2):
    """The losses of AdamW steps on IDS, and of what they lead to."""
    optimizer = torch.optim.AdamW([part for part in network.parameters() if part.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = network(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, network(input_ids=IDS, labels=IDS, use_cache=False).loss.item()]


def logits(network):
    with torch.no_grad():
        return network(input_ids=IDS, use_cache=False).logits.float()


def largest(one, other):
    return float((one - other).abs().max())


def same(one, other):
    """Equal but for the order of fp32 sums: PEFT adds the adapter's product to the base's, qmica adds it within that
    product, so that no second output is written. Of the largest logit; measured: at most 5e-7.
    """
    return largest(one, other) <= 2e-6 * float(other.abs().max())


def bases(network):
    """Each B by module path, a copy."""
    return {path: layer.B.detach().clone() for path, layer in adapter.layers(network)}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


def projector_distance(one, other):
    """Largest element of the difference of the two projectors, in float64."""
    projectors = [B @ B.T for B in (np.asarray(B.double()) for B in (one, other))]
    return float(np.abs(projectors[0] - projectors[1]).max())


def whole_bases(monkeypatch, network, options=OPTIONS):
    """Attach, and return each B before it is rounded to bf16."""
    seen, real = [], MicaLinear.from_base.__func__

    def watched(cls, linear, B, *rest):
        seen.append(B)
        return real(cls, linear, B, *rest)

    monkeypatch.setattr(MicaLinear, "from_base", classmethod(watched))
    adapter.attach(network, options)
    return dict(zip((path for path, _ in adapter.layers(network)), seen, strict=True))


# ---- B against PEFT and numpy


@pytest.mark.parametrize("bits", [4, 8])
def test_B_from_the_original(separated, monkeypatch, tmp_path, bits):
    """Beside a quantized model: numpy's of the weights in the folder, and not of what was made of them."""
    network = loaded(separated, bits)
    seen = whole_bases(monkeypatch, network, dataclasses.replace(OPTIONS, subspace_from="original"))
    moved = whole_bases(monkeypatch, loaded(separated, bits), OPTIONS)
    weights = open_weights(source.resolve(str(separated)))
    for path, B in seen.items():
        U = np.linalg.svd(weights[f"{path}.weight"].load(torch.float64).numpy(), full_matrices=False)[0]
        minor = torch.from_numpy(U[:, -RANK:].copy())
        assert projector_distance(B, minor) < 1e-6 < projector_distance(moved[path], minor)
    saved = json.loads((adapter.save_adapter(network, tmp_path / "a") / "qmica.json").read_text())
    assert saved["adapter"]["subspace_from"] == "original" and saved["base"]["bits"] == bits
    assert adapter.read_adapter(tmp_path / "a").options.subspace_from == "original"


def test_the_original_of_a_gguf_is_its_dequantized_weights(monkeypatch, tmp_path):
    """In Hugging Face's order of rows, which a GGUF permutes."""
    file = tiny.write_gguf(tmp_path / "m.gguf", tiny.tiny_model("llama"))
    seen = whole_bases(monkeypatch, loaded(file, 4), dataclasses.replace(OPTIONS, subspace_from="original"))
    weights = open_weights(source.resolve(str(file)))
    for path, B in seen.items():
        U = np.linalg.svd(weights[f"{path}.weight"].load(torch.float64).numpy(), full_matrices=False)[0]
        assert projector_distance(B, torch.from_numpy(U[:, -RANK:].copy())) < 1e-5


def test_where_there_is_no_original(base, tmp_path):
    original = dataclasses.replace(OPTIONS, subspace_from="original")
    with pytest.raises(QmicaError) as error:
        adapter.attach(transformers_model(base), original)
    assert str(error.value) == "--subspace-from original needs the model's files: load the model with qmica.load"
    packed = tmp_path / "packed"
    transformers_model(base, 4).save_pretrained(packed)
    with pytest.raises(QmicaError, match=r"was quantized by bitsandbytes \(.*q_proj and 13 more\) and has no original"):
        adapter.attach(loaded(packed, 4), original)


def test_B_is_pefts(separated, monkeypatch):
    """Before rounding. Measured over all 14 linears: 4e-7, from PEFT's fp32 SVD."""
    theirs = {
        path.removeprefix(adapter.PREFIX): layer.lora_B["default"].weight.data
        for path, layer in peft_model(separated).named_modules()
        if path.endswith(LINEARS)
    }
    network = loaded(separated)
    ours = whole_bases(monkeypatch, network)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    distances = {path: projector_distance(B, theirs[path]) for path, B in ours.items()}
    print(f"projectors at most {max(distances.values()):.1e} from PEFT's, over {len(distances)} linears")
    for path, B in ours.items():
        linear = network.get_submodule(path).base
        values = np.linalg.svd(linear.weight.double().numpy(), compute_uv=False)
        assert B.dtype == torch.float32 and B.shape == (linear.out_features, RANK)
        gap = values[-RANK - 1] - values[-RANK]
        assert gap > 0.01 * values[0], f"{path}: the minor singular values are not apart: {gap:.1e}"
        assert distances[path] < 1e-4, f"{path}: {distances[path]:.1e}"


def dequantized(linear):
    """The weight by its format's definition, float64 (out, in): NF4 in blocks of 64 whose scales are quantized too."""
    weight = linear.weight.data.double().numpy()
    if quant.bits_of(linear) == 8:
        return weight * linear.weight.SCB.double().numpy()[:, None] / 127
    if quant.bits_of(linear) == 16:
        return weight
    state, inner = linear.weight.quant_state, linear.weight.quant_state.state2
    outer = inner.absmax.double().repeat_interleave(256)[: len(state.absmax)]
    scales = inner.code.double()[state.absmax.long()] * outer + state.offset
    packed = linear.weight.data.flatten().long()
    values = state.code.double()[torch.stack([packed >> 4, packed & 15], dim=1).flatten()]
    return (values * scales.repeat_interleave(64)).reshape(state.shape).numpy()


@pytest.mark.parametrize("bits", BITS)
def test_B_is_the_svd_of_the_dequantized_weight(base, monkeypatch, bits):
    """numpy in float64, each column but for its sign. Measured: projectors 1e-7 apart, 1e-3 after rounding to bf16."""
    network = loaded(base, bits)
    whole = whole_bases(monkeypatch, network)
    for path, layer in adapter.layers(network):
        assert quant.bits_of(layer.base) == bits
        B = np.linalg.svd(dequantized(layer.base), full_matrices=False)[0][:, -RANK:]
        distance = projector_distance(whole[path], torch.from_numpy(B))
        assert distance < 1e-6, f"{path}: {distance:.1e}"
        cosines = np.abs((whole[path].double().numpy() * B).sum(0))
        assert cosines.min() > 1 - 1e-6, f"{path}: the columns are not those of U: {cosines}"
        assert torch.equal(layer.B, whole[path].bfloat16()) and not layer.A.any()
        assert projector_distance(layer.B, whole[path]) < 1e-2


@pytest.mark.parametrize("bits", BITS)
def test_a_fresh_adapter_changes_nothing(base, bits):
    network = loaded(base, bits)
    before = logits(network)
    assert adapter.attach(network, OPTIONS) is network
    assert torch.equal(logits(network), before)


# ---- training against PEFT


def test_twenty_steps_are_pefts(base, tmp_path):
    """From PEFT's own B, in fp32, at 16 bits. Measured: from 9.0 to 0.6, at most 1e-6 apart."""
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path)
    ours = adapter.load_adapter(loaded(base), tmp_path)
    wanted, found = trained(theirs, steps=20), trained(ours, steps=20)
    apart = max(abs(one - other) for one, other in zip(found, wanted, strict=True))
    print(f"20 losses from {wanted[0]:.3f} to {wanted[-1]:.3f}, at most {apart:.1e} from PEFT's")
    assert apart < 1e-5, f"the losses are {apart:.1e} apart: {found} for {wanted}"
    assert wanted[-1] < wanted[0] - 5, f"little was learnt: {wanted}"


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_a_mica_adapter_of_pefts_is_continued(base, tmp_path, rank_stabilized):
    """Its logits, its further losses, its B; saved again, PEFT reads it as a plain LoRA."""
    theirs = peft_model(base, use_rslora=rank_stabilized)
    trained(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "mica" and config["use_rslora"] is rank_stabilized
    ours = adapter.load_adapter(loaded(base), tmp_path / "theirs")
    assert ours.qmica_adapter.method == "mica"
    assert same(logits(ours), logits(theirs))
    before = bases(ours)
    apart = max(abs(one - other) for one, other in zip(trained(ours), trained(theirs), strict=True))
    assert apart < 1e-5, f"the losses are {apart:.1e} apart"
    assert equal(bases(ours), before)
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert all(torch.equal(B, tensors[f"{adapter.PREFIX}{path}.lora_B.weight"]) for path, B in before.items())
    adapter.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(transformers_model(base), tmp_path / "ours")
    assert same(logits(again), logits(ours)), f"{largest(logits(again), logits(ours)):.1e} apart"


def test_a_lora_of_pefts_trains_on_as_one(base, tmp_path):
    theirs = peft_model(base, init_lora_weights=True, layers_to_transform=[1])
    trained(theirs)
    theirs.save_pretrained(tmp_path)
    ours = adapter.load_adapter(loaded(base), tmp_path)
    assert ours.qmica_adapter.method == "lora" and same(logits(ours), logits(theirs))
    assert sorted({path.split(".")[2] for path, _ in adapter.layers(ours)}) == ["1"]
    before = bases(ours)
    apart = max(abs(one - other) for one, other in zip(trained(ours), trained(theirs), strict=True))
    assert apart < 1e-5, f"the losses are {apart:.1e} apart"
    assert not any(torch.equal(B, before[path]) for path, B in bases(ours).items())


# ---- PEFT reads ours


@pytest.mark.parametrize(("bits", "method"), [(16, "mica"), (4, "mica"), (16, "lora"), (4, "lora")])
def test_peft_gives_our_logits(tmp_path, bits, method):
    """Without a flag, where the adapter moves the logits by 10. Of columns that are no multiple of 64 bitsandbytes takes
    wrong scales on a CPU with AVX512.
    """
    base = tiny.save_tiny(tmp_path / "llama", dtype=torch.bfloat16, intermediate_size=128)
    network = attached(base, bits, AdapterConfig(rank=RANK, alpha=ALPHA, method=method))
    with adapter.switched(network, False):
        bare = logits(network)
    trained(network)
    folder = adapter.save_adapter(network, tmp_path / "ours")
    # in training mode: in evaluation bitsandbytes repacks 4-bit weights for CPUs with bf16 instructions
    theirs = PeftModel.from_pretrained(transformers_model(base, bits), folder).train()
    assert type(theirs.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")).__module__.startswith("peft.")
    effect = largest(logits(network), bare)
    assert effect > 1, f"the adapter moves the logits by {effect:.1e} only"
    difference = largest(logits(theirs), logits(network))
    print(f"PEFT's logits are {difference:.1e} from ours, of an effect of {effect:.1f}")
    assert same(logits(theirs), logits(network)), f"{difference:.1e} of {effect:.1f}"


def test_what_is_written(base, tmp_path):
    """PEFT's two files with nothing for it to compute, and qmica.json."""
    network = attached(base, 4, AdapterConfig(rank=RANK, alpha=ALPHA, dropout=0.1, targets="qv"))
    trained(network, steps=1)
    assert adapter.save_adapter(network, tmp_path / "ours") == tmp_path / "ours"
    names = ("adapter_config.json", "adapter_model.safetensors", "qmica.json")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(names)
    config, ours = (json.loads((tmp_path / "ours" / names[i]).read_text()) for i in (0, 2))
    assert config["init_lora_weights"] is True and config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (RANK, ALPHA, 0.1)
    assert config["base_model_name_or_path"] == str(base) and config["target_modules"] == ["q_proj", "v_proj"]
    assert ours["adapter"] == dataclasses.asdict(network.qmica_adapter)
    assert ours["adapter"]["subspace_from"] == "quantized"
    assert ours["base"] == dataclasses.asdict(network.qmica_base) and ours["base"]["bits"] == 4
    assert ours["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    tensors = load_file(tmp_path / "ours" / names[1])
    for path, layer in adapter.layers(network):
        for half, dtype in (("A", torch.float32), ("B", torch.bfloat16)):
            tensor = tensors.pop(f"base_model.model.{path}.lora_{half}.weight")
            assert tensor.dtype == dtype and torch.equal(tensor, getattr(layer, half).detach())
    assert not tensors


def test_nothing_to_save(base, tmp_path):
    with pytest.raises(QmicaError, match=r"^this model has no adapter to save: call qmica.attach\(model\) first$"):
        adapter.save_adapter(loaded(base), tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---- loading


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A trained adapter's folder and its model's logits, by bits."""
    made = {}
    for bits in BITS:
        network = attached(base, bits)
        trained(network)
        folder = tmp_path_factory.mktemp(f"saved{bits}") / "adapter"
        made[bits] = (adapter.save_adapter(network, folder), logits(network))
    return made


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("way", ["load_adapter", "restore"])
def test_B_is_as_stored_and_stays(base, saved, tmp_path, bits, way):
    """Not recomputed: a stored B that no SVD gives comes back bit for bit, and training does not move it."""
    tensors = load_file(saved[bits][0] / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator).bfloat16()
    network = loaded(base, bits)
    if way == "restore":
        assert adapter.restore(network, tensors, OPTIONS) is network
    else:
        shutil.copytree(saved[bits][0], tmp_path, dirs_exist_ok=True)
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        assert qmica.load_adapter(network, tmp_path) is network
    for steps in (0, 3):
        trained(network, steps)
        moved = []
        for path, layer in adapter.layers(network):
            A, B = (tensors[f"{adapter.PREFIX}{path}.lora_{half}.weight"] for half in "AB")
            assert torch.equal(layer.B, B) and layer.B.dtype == B.dtype and not layer.B.requires_grad
            moved.append(not torch.equal(layer.A.detach(), A))
        assert len(moved) == 14 and all(moved) == any(moved) == bool(steps)
    trainable = {name for name, part in network.named_parameters() if part.requires_grad}
    assert trainable == {f"{path}.A" for path, _ in adapter.layers(network)}


@pytest.mark.parametrize("bits", BITS)
def test_a_loaded_adapter_is_the_trained_model(base, saved, bits):
    folder, wanted = saved[bits]
    network = loaded(base, bits)
    bare = logits(network)
    adapter.load_adapter(network, folder)
    assert torch.equal(logits(network), wanted) and largest(wanted, bare) > 1
    assert network.qmica_adapter == OPTIONS
    assert all(layer.scale == ALPHA / RANK for _, layer in adapter.layers(network))


def test_open_run(base, saved):
    """An adapter folder says which base it needs, and in which bits; both can be overruled."""
    folder, wanted = saved[8]
    network, tokens = qmica.open_run(folder, dtype="fp32", device="cpu")
    assert torch.equal(logits(network), wanted) and tokens.decode(tokens("lamps")["input_ids"][-1:])
    bare, _ = qmica.open_run(folder, tuned=False, bits=16, dtype="fp32", device="cpu")
    assert torch.equal(logits(bare), logits(loaded(base))) and quant.stored_bits(bare) == 16


@pytest.mark.parametrize("method", ["mica", "lora"])
def test_what_is_saved_twice_is_the_same(base, tmp_path, method):
    """What was loaded is written as it was read, over its own files as well."""
    network = attached(base, 4, AdapterConfig(rank=RANK, method=method))
    trained(network, steps=2)
    for name in ("one", "one", "other"):
        adapter.save_adapter(network, tmp_path / name)
        network = adapter.load_adapter(loaded(base, 4), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), path.name


# ---- the wrong base


def test_another_architecture_is_refused(saved, tmp_path):
    other = loaded(tiny.save_tiny(tmp_path / "other", num_hidden_layers=1))
    folder = saved[16][0]
    with pytest.raises(QmicaError, match=r"^the adapter in .* was trained on .*/llama, which .*/other is not: .*$"):
        adapter.load_adapter(other, folder)
    assert not list(adapter.layers(other))


def test_layers_that_do_not_fit_are_named(base, tmp_path):
    """An adapter of PEFT's knows no shapes of its base but those of its own tensors."""
    peft_model(base, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "theirs")
    other = loaded(tiny.save_tiny(tmp_path / "other", intermediate_size=128))
    said = (
        r"^the adapter in .*/theirs is for .*/llama, not for .*/other: 2 of 4 layers do not fit "
        r"\(model\.layers\.0\.mlp\.down_proj, model\.layers\.1\.mlp\.down_proj\)$"
    )
    with pytest.raises(QmicaError, match=said):
        adapter.load_adapter(other, tmp_path / "theirs")
    assert not list(adapter.layers(other))


def test_other_weights_of_the_same_shapes_are_warned_of_once(base, saved, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="qmica"):
        adapter.load_adapter(loaded(base, 4), saved[16][0])  # the same files in other bits
        assert not caplog.records
        adapter.load_adapter(loaded(tiny.save_tiny(tmp_path / "sibling", seed=1)), saved[16][0])
    (record,) = caplog.records
    assert record.getMessage() == (
        f"the adapter was trained on {base}; {tmp_path / 'sibling'} has its shapes but other weights "
        "(another quantization or a sibling)"
    )


# ---- what cannot be read


def edited(saved, folder, **changes):
    """A copy of the adapter at 16 bits, its adapter_config.json changed."""
    shutil.copytree(saved[16][0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize("key", adapter.REFUSED)
def test_options_that_change_the_arithmetic_are_refused(saved, tmp_path, key):
    adapter.read_adapter(edited(saved, tmp_path / "off", **{key: None}))
    folder = edited(saved, tmp_path / "on", **{key: {"q_proj": 8}})
    with pytest.raises(QmicaError) as error:
        adapter.read_adapter(folder)
    assert str(error.value) == f"{folder} cannot be used: it has {key}; qmica reads plain LoRA and MiCA adapters"


@pytest.mark.parametrize("start", [*adapter.REFUSED_STARTS, "pissa_niter_16", "PiSSA"])
def test_starts_that_change_the_base_are_refused(saved, tmp_path, start):
    folder = edited(saved, tmp_path / "on", init_lora_weights=start)
    with pytest.raises(QmicaError) as error:
        adapter.read_adapter(folder)
    assert str(error.value) == (
        f"{folder} cannot be used: it has init_lora_weights {start!r}, which changes the base too; "
        "qmica reads plain LoRA and MiCA adapters"
    )


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_do_not_are_read(saved, tmp_path, start):
    folder = edited(saved, tmp_path / "on", init_lora_weights=start)
    assert len(adapter.read_adapter(folder).factors) == 14


# What says where the adapter is, how it began or was made, but not how it computes; `bias` shows in its tensors.
HARMLESS = """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
exclude_modules lora_alpha lora_dropout bias use_rslora init_lora_weights layers_to_transform layers_pattern
megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
ensure_weight_tying"""


def test_every_option_of_pefts_was_looked_at():
    new = {field.name for field in dataclasses.fields(LoraConfig)} - {*HARMLESS.split(), *adapter.REFUSED}
    assert not new, f"PEFT has {new}: refuse what B and A alone cannot say, or list it above"


def test_other_peft_types_and_biases_are_refused(base, saved, tmp_path):
    folder = edited(saved, tmp_path / "vera", peft_type="VERA")
    with pytest.raises(QmicaError, match="cannot be used: it has peft_type VERA; qmica reads plain LoRA and MiCA"):
        adapter.read_adapter(folder)
    qwen = tiny.save_tiny(tmp_path / "qwen2", "qwen2")
    peft_model(qwen, target_modules=["q_proj"], bias="lora_only").save_pretrained(tmp_path / "bias")
    with pytest.raises(QmicaError, match=r"safetensors is not a plain LoRA: 6 tensors, 2 pairs of lora_A and lora_B$"):
        adapter.read_adapter(tmp_path / "bias")


def test_a_regular_expression_of_pefts_is_read(base, tmp_path):
    peft_model(base, target_modules=r".*\.1\..*q_proj").save_pretrained(tmp_path)
    assert list(adapter.read_adapter(tmp_path).factors) == ["model.layers.1.self_attn.q_proj"]


DAMAGES = {
    "adapter_config.json": [
        (None, r"is not an adapter folder: adapter_config.json is missing"),
        (b"{", r"adapter_config.json is damaged: Expecting property name"),
        (b"\xff\xfe", r"adapter_config.json is damaged: 'utf-8' codec"),
        (b"[]", r"adapter_config.json is damaged: it holds no JSON object"),
        (b'{"peft_type": "LORA"}', r"or qmica.json is damaged, or of a newer qmica \(KeyError: 'r'\)"),
        (b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}', r"is damaged, or of a newer qmica \(ZeroDivisionError: "),
    ],
    "qmica.json": [
        (b"", r"qmica.json is damaged: Expecting value"),
        (b'{"adapter": {"rank": 4, "shift": 1}}', r"or of a newer qmica \(TypeError: .*'shift'"),
        (b'{"adapter": {"rank": 4}}', r"or of a newer qmica \(KeyError: 'base'\)"),
    ],
    "adapter_model.safetensors": [
        (None, r"adapter_model.safetensors cannot be read: .*[Nn]o such file"),
        (b"nonsense", r"adapter_model.safetensors cannot be read: "),
    ],
}


@pytest.mark.parametrize(("name", "damage"), [(name, one) for name, several in DAMAGES.items() for one in several])
def test_damaged_files_are_named(saved, tmp_path, name, damage):
    content, text = damage
    folder = edited(saved, tmp_path / "damaged")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(QmicaError, match=text) as error:
        adapter.read_adapter(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_tensors_without_a_partner_are_named(saved, tmp_path):
    folder = edited(saved, tmp_path / "damaged")
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    for kept, text in (({}, "0 tensors, 0 pairs"), (halves, "14 tensors, 14 pairs")):
        save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(QmicaError, match=rf"safetensors is not a plain LoRA: {text} of lora_A and lora_B$"):
            adapter.read_adapter(folder)


# ---- attaching


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("qv", "q_proj v_proj"),
        ("attn", "q_proj k_proj v_proj o_proj"),
        ("mlp", "gate_proj up_proj down_proj"),
        ("all", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("k_proj, down_proj", "k_proj down_proj"),
    ],
)
def test_targets(base, choice, names):
    """In every layer, never the head; everything else is frozen."""
    counted = []
    network = adapter.attach(
        loaded(base, 4), AdapterConfig(rank=2, targets=choice), progress=lambda *counts: counted.append(counts)
    )
    paths = [path for path, _ in adapter.layers(network)]
    assert sorted(path.split(".", 3)[-1].split(".")[-1] for path in paths) == sorted(names.split() * 2)
    assert {path.split(".")[2] for path in paths} == {"0", "1"}
    trainable = {name for name, part in network.named_parameters() if part.requires_grad}
    assert trainable == {f"{path}.A" for path in paths}
    assert counted == [(done, len(paths)) for done in range(1, len(paths) + 1)]
    assert all((layer.rank, layer.scale) == (2, 2.0) for _, layer in adapter.layers(network))


def test_what_does_not_fit_is_named_and_leaves_the_model_bare(base):
    network = loaded(base)
    wrong = {
        AdapterConfig(targets="q_proj,query"): (
            "targets: no linear of this model is called query; there are down_proj, gate_proj, k_proj, o_proj, q_proj, "
            "up_proj, v_proj, and the sets qv, attn, mlp, all"
        ),
        AdapterConfig(targets="lm_head"): "targets: no linear of this model is called lm_head; there are down_proj, ",
        AdapterConfig(rank=65): (
            "model.layers.0.self_attn.q_proj: rank 65 does not fit a 128 x 64 weight: choose 1 to 64"
        ),
    }
    for options, text in wrong.items():
        with pytest.raises(QmicaError) as error:
            adapter.attach(network, options)
        assert str(error.value).startswith(text), error.value
    assert not list(adapter.layers(network))


def test_the_first_layer_whose_rank_does_not_fit_is_named(tmp_path):
    """Layers before it fit: the model is bare afterwards all the same, and takes an adapter that fits."""
    network = loaded(tiny.save_tiny(tmp_path / "narrow", intermediate_size=48))
    with pytest.raises(QmicaError, match=r"^model.layers.0.mlp.gate_proj: rank 64 does not fit a 48 x 64 weight"):
        adapter.attach(network, AdapterConfig(rank=64))
    assert not list(adapter.layers(network))
    assert len(list(adapter.layers(adapter.attach(network, AdapterConfig(rank=48))))) == 14


def test_a_second_adapter_is_refused(base, saved):
    network = attached(base)
    said = r"^this model has an adapter already: load the base again, or train the one it has$"
    for put in (lambda: adapter.attach(network, OPTIONS), lambda: adapter.load_adapter(network, saved[16][0])):
        with pytest.raises(QmicaError, match=said):
            put()
    assert len(list(adapter.layers(network))) == 14


def test_switched(base):
    """Off inside, on again afterwards, after an error too."""
    network = loaded(base)
    bare = logits(network)
    trained(adapter.attach(network, OPTIONS))
    tuned = logits(network)
    assert largest(tuned, bare) > 1
    with adapter.switched(network, True):
        assert torch.equal(logits(network), tuned)
    with pytest.raises(KeyError), adapter.switched(network, False):
        assert torch.equal(logits(network), bare)
        raise KeyError
    assert torch.equal(logits(network), tuned)


@pytest.mark.parametrize("options", [{"components": "random"}, {"method": "lora"}])
def test_what_is_drawn_comes_from_the_seed_alone(base, options):
    """Whatever was drawn before; and nothing is drawn from the caller's generator."""
    drawn = []
    half = "A" if "method" in options else "B"
    for seed, before in ((5, 1), (5, 2), (6, 1)):
        torch.manual_seed(before)
        network = attached(base, 4, AdapterConfig(rank=RANK, **options), seed)
        drawn.append({path: getattr(layer, half) for path, layer in adapter.layers(network)})
        after = torch.rand(4)
        torch.manual_seed(before)
        assert torch.equal(torch.rand(4), after)
    assert equal(drawn[0], drawn[1]) and not any(torch.equal(drawn[0][path], drawn[2][path]) for path in drawn[0])
    assert len({part.flatten()[0].item() for part in drawn[0].values()}) == 14  # each layer has its own


@pytest.mark.parametrize("which", ["major", "random"])
def test_other_components(base, which):
    network = attached(base, 4, AdapterConfig(rank=RANK, components=which))
    for path, layer in adapter.layers(network):
        B = layer.B.float()
        apart = largest(B.T @ B, torch.eye(RANK))
        assert apart < 2e-2, f"{path}: the columns are {apart:.1e} from orthonormal"
        major = subspace.major_subspace(quant.dequantize(layer.base), RANK)
        near = projector_distance(layer.B, major)
        assert (near < 1e-2) == (which == "major"), f"{path}: {near:.1e}"


def test_lora_trains_both(base):
    """As PEFT's: B zero, A noise within 1 / sqrt(in); both move."""
    network = attached(base, 4, AdapterConfig(rank=RANK, method="lora"))
    for _, layer in adapter.layers(network):
        bound = layer.in_features**-0.5
        assert not layer.B.any() and 0.8 * bound < layer.A.abs().max() <= bound
    before = {name: part.detach().clone() for name, part in network.named_parameters() if part.requires_grad}
    assert before.keys() == {f"{path}.{half}" for path, _ in adapter.layers(network) for half in "AB"}
    losses = trained(network)
    assert losses[-1] < losses[0] - 1, losses
    after = dict(network.named_parameters())
    assert not any(torch.equal(after[name], part) for name, part in before.items())


@pytest.mark.parametrize("bits", BITS)
def test_a_model_of_transformers_own(base, tmp_path, bits):
    """Loaded by transformers (and quantized by bitsandbytes there): it trains, and qmica's own model takes the result."""
    network = transformers_model(base, bits)
    assert qmica.attach(network, rank=RANK) is network
    losses = trained(network)
    assert losses[-1] < losses[0] - 1, losses
    found = adapter.base_of(network)
    assert (found.id, found.bits, found.shapes) == (str(base), bits, None)
    adapter.save_adapter(network, tmp_path)
    again = adapter.load_adapter(loaded(base, bits), tmp_path)
    difference = largest(logits(again), logits(network))
    assert difference == 0, f"{difference:.1e}"


# ---- Trainer and TRL

TEXTS = tiny.TEXT.splitlines()[:4]  # one batch: every step sees them all


def padding_tokenizer():
    tokens = tiny.tiny_tokenizer()
    tokens.pad_token = "<|end_of_text|>"
    return tokens


def in_trainer(network, folder, **options):
    tokens = padding_tokenizer()
    windows = np.array(tokens(" ".join(TEXTS))["input_ids"][:120]).reshape(4, 30).tolist()
    rows = [{"input_ids": ids, "labels": ids} for ids in windows]
    return Trainer(network, TrainingArguments(folder, **options), train_dataset=rows, processing_class=tokens)


def in_sft_trainer(network, folder, **options):
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    config = SFTConfig(folder, max_length=64, **options)
    return SFTTrainer(network, config, train_dataset=rows, processing_class=padding_tokenizer())


# TRL casts what it trains to bf16 where transformers quantized the model
TRAINERS = [
    *((make, loaded, bits, torch.float32) for make in (in_trainer, in_sft_trainer) for bits in BITS),
    (in_trainer, transformers_model, 4, torch.float32),
    *((in_sft_trainer, transformers_model, bits, torch.bfloat16) for bits in (4, 8)),
]


@pytest.mark.parametrize(("make", "load", "bits", "dtype"), TRAINERS)
def test_trainers_train_and_save_the_adapter(base, tmp_path, make, load, bits, dtype):
    """Every folder they write holds an adapter with A in fp32 that gives the trained model's logits."""
    network = adapter.attach(load(base, bits), OPTIONS)
    before = bases(network)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1}
    trainer = make(network, str(tmp_path / "out"), learning_rate=2e-2, lr_scheduler_type="constant", **options, **quiet)
    assert {layer.A.dtype for _, layer in adapter.layers(network)} == {dtype}
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.3, losses
    assert equal(bases(network), before)
    trainer.save_model(str(tmp_path / "model"))
    network.save_pretrained(tmp_path / "pretrained")
    last = ("out/checkpoint-4", "model", "pretrained")
    for name in ("out/checkpoint-2", *last):
        assert {"adapter_config.json", "adapter_model.safetensors", "qmica.json"} <= names_in(tmp_path / name)
        assert not list((tmp_path / name).glob("model*.safetensors"))
        factors = adapter.read_adapter(tmp_path / name).factors
        assert {part.A.dtype for part in factors.values()} == {torch.float32}
        assert equal({path: part.B for path, part in factors.items()}, before)
        again = adapter.load_adapter(loaded(base, bits), tmp_path / name)
        difference = largest(logits(again), logits(network))
        assert (difference == 0) == (name in last), f"{name}: {difference:.1e}"


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_other_processes_write_nothing(base, tmp_path):
    attached(base, 4).save_pretrained(tmp_path / "other", is_main_process=False, state_dict={}, max_shard_size="1GB")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "half, data, text",
    [
        ("A", torch.ones(64), r"has an A of \(64,\) and a B of"),
        ("A", torch.ones(8, 64), r"has an A of \(8, 64\) and a B of .*, and its config says rank 4"),
        ("B", torch.ones(128, 8), "has an A of .* and its config says rank 4"),
        ("B", torch.full((128, 4), torch.nan), r"holds what is no number \(NaN or infinite\)"),
        ("A", torch.ones(4, 64, dtype=torch.int32), "holds what is no number"),
    ],
)
def test_pairs_that_are_none_are_refused(tmp_path, half, data, text):
    """A rank of the config's other than the tensors' would scale what was learnt."""
    folder = make_peft_adapter(tmp_path / "a", "base", {"model.layers.0.self_attn.q_proj": (128, 64)})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"] = data
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(QmicaError, match=text):
        adapter.read_adapter(folder)
