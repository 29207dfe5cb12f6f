"""Which linears are adapted, on transformers' own models; which weights stay in 16 bits, against what bitsandbytes quantizes."""

import pytest
import torch
from tiny import save_tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qmica import quant, targets
from qmica.errors import QmicaError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
WANTED = {
    "qv": ["q_proj", "v_proj"],
    "attn": ATTENTION,
    "mlp": FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD,
    "k_proj": ["k_proj"],
    "down_proj,q_proj": ["q_proj", "down_proj"],
    " o_proj , up_proj ,": ["o_proj", "up_proj"],
}


def linears_of(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("asked", WANTED)
def test_select(family, asked):
    """In the model's order, every layer's, and never the head."""
    chosen = targets.select(linears_of(tiny_config(family)), asked)
    places = {"q": "self_attn", "k": "self_attn", "v": "self_attn", "o": "self_attn"}
    expected = [
        f"model.layers.{layer}.{places.get(name[0], 'mlp') if name in ATTENTION else 'mlp'}.{name}"
        for layer in (0, 1)
        for name in WANTED[asked]
    ]
    assert sorted(chosen) == sorted(expected)
    assert chosen == [name for name in linears_of(tiny_config(family)) if name in expected]


def test_fused_projections_are_in_the_sets():
    """Phi-3 has qkv_proj and gate_up_proj."""
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model("phi3", **small, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
    names = {
        name: {one.rsplit(".")[-1] for one in targets.select(linears_of(config), name)} for name in ("attn", "mlp")
    }
    assert names == {"attn": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}}


@pytest.mark.parametrize(
    ("asked", "missing"),
    [("q_porj", "q_porj"), ("q_proj,c_attn", "c_attn"), ("lm_head", "lm_head"), ("xyz,abc", "xyz, abc"), ("", "''")],
)
def test_unknown_targets(asked, missing):
    with pytest.raises(QmicaError) as error:
        targets.select(linears_of(tiny_config("llama")), asked)
    names = ", ".join(sorted(ATTENTION + FEED_FORWARD))
    assert str(error.value) == (
        f"targets: no linear of this model is called {missing}; there are {names}, and the sets qv, attn, mlp, all"
    )


def test_a_set_that_a_model_has_nothing_of():
    with pytest.raises(QmicaError, match="no linear of this model is called qv; there are none, and the sets"):
        targets.select(["lm_head", "transformer.c_attn"], "qv")


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_16bit_weights_are_those_that_bitsandbytes_leaves(tmp_path, family, tied):
    folder = save_tiny(tmp_path / "m", family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    quantized = {f"{name}.weight" for name, module in model.named_modules() if quant.bits_of(module) == 8}
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in names if not targets.stays_16bit(name)} == quantized and len(quantized) == 14
    assert targets.stays_16bit("lm_head") and targets.stays_16bit("model.layers.0.self_attn.q_norm.weight")
    assert not targets.stays_16bit("model.layers.0.self_attn.q_proj")
