"""What GGUF and Hugging Face call the same model: tensor names, hyper-parameters, row order; one table row a family.

Every row is read in both directions: `for_config(config)` for writing a GGUF, `for_gguf(name)` for reading one. A
config is built from a GGUF's own metadata and tensor shapes, never by transformers' reader, which drops llama3 rope
scaling and explicit head sizes. What a row cannot express (another rope type, a sliding window, experts) is refused
by name, before anything is trained.

    arch = for_gguf("llama")
    config = arch.hf_config(file.metadata, shapes, rope_freqs)       # the content of config.json
    arch.hf_name("blk.3.attn_q.weight")                              # model.layers.3.self_attn.q_proj.weight
    hf_rows = gguf_rows[np.argsort(arch.row_order(name, config))]    # undo llama.cpp's q/k permutation

Given up: models with experts, several tensors fused into one or one cut into several, and tensors whose values (not
only their rows) change on the way; the rows for families that need those come with them.

Sources: llama.cpp conversion/base.py and conversion/llama.py (keys, permutation, rope_freqs), src/llama-model.cpp and
src/llama-context.cpp (what a missing key means), transformers modeling_rope_utils.py (rope formulas).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

from qmica.errors import QmicaError

REQUIRED = "required"  # as a default: the key must be there
U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


@dataclass(frozen=True)
class Hyperparameter:
    """One number: `{architecture}.{key}` in a GGUF, `attribute` in config.json; without it `default`.

    A default naming another attribute means "the same as that one" (num_key_value_heads without grouped queries).
    """

    key: str
    attribute: str
    type: GGUFValueType
    default: Any = REQUIRED


@dataclass(frozen=True)
class Biases:
    """Linears of one layer that carry a bias: always (flag None) or where the config's `flag` is true."""

    flag: str | None
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """A family of models: everything GGUF and Hugging Face say differently about it."""

    name: str  # general.architecture
    model_type: str  # config.json
    hf_class: str
    tensors: Mapping[str, str]  # HF stem -> GGUF stem, without .weight/.bias; {i} is the layer
    hyperparameters: tuple[Hyperparameter, ...]
    biases: tuple[Biases, ...]
    permuted: Mapping[str, str]  # linear whose rows llama.cpp reorders -> the attribute that counts its heads
    rope_types: tuple[str, ...]
    fixed: Mapping[str, Any]  # attributes that GGUF cannot say: the only value llama.cpp computes with

    # -- names

    def gguf_name(self, hf_name: str) -> str | None:
        """model.layers.0.mlp.up_proj.weight -> blk.0.ffn_up.weight; None when it is no tensor of this family."""
        return _translate(hf_name, self.tensors) if self._may_exist(hf_name) else None

    def hf_name(self, gguf_name: str) -> str | None:
        """blk.0.ffn_up.weight -> model.layers.0.mlp.up_proj.weight; None when it is no tensor of this family."""
        name = _translate(gguf_name, {gguf: hf for hf, gguf in self.tensors.items()})
        return name if name and self._may_exist(name) else None

    def _may_exist(self, hf_name: str) -> bool:
        linears = [linear for group in self.biases for linear in group.linears]
        return not hf_name.endswith(".bias") or any(hf_name.endswith(f".{linear}.bias") for linear in linears)

    def tensor_names(self, config: Any) -> Iterator[str]:
        """The Hugging Face names of every tensor a model with this config has (a tied lm_head is not one)."""
        config = as_dict(config)
        on = [group for group in self.biases if group.flag is None or config.get(group.flag)]
        biased = tuple(f".{linear}" for group in on for linear in group.linears)
        for stem in self.tensors:
            if stem == "lm_head" and config.get("tie_word_embeddings"):
                continue
            for layer in range(self._value(config, "num_hidden_layers")) if "{i}" in stem else (0,):
                name = stem.replace("{i}", str(layer))
                yield f"{name}.weight"
                if name.endswith(biased):
                    yield f"{name}.bias"

    # -- rows

    def row_order(self, hf_name: str, config: Any) -> np.ndarray | None:
        """The order with `gguf_rows = hf_rows[order]` for a q/k weight or bias that llama.cpp permutes, else None.

        Hugging Face rotates halves of a head, llama.cpp neighbouring pairs: within each head, row (half, j) moves to
        (j, half) (llama.cpp conversion/llama.py, LlamaModel.permute).  `argsort` of it undoes the permutation.
        The same order permutes the rows of an adapter's B.
        """
        linear = hf_name.rsplit(".", 2)[-2] if hf_name.count(".") > 1 else ""
        if linear not in self.permuted:
            return None
        config = as_dict(config)
        heads, size = self._value(config, self.permuted[linear]), self.head_dim(config)
        return np.arange(heads * size).reshape(heads, 2, size // 2).transpose(0, 2, 1).reshape(-1)

    # -- hyper-parameters, GGUF -> config.json

    def hf_config(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple], rope_freqs: np.ndarray | None = None
    ) -> dict[str, Any]:
        """The content of config.json (transformers 5) for a GGUF.

        metadata: the GGUF's keys and values; shapes: GGUF tensor name -> shape, slowest dimension first;
        rope_freqs: the data of `rope_freqs.weight` (head_dim / 2,), required when the file has that tensor.
        Raises QmicaError when the file holds something this family does not have, or lacks something it needs.
        """
        self._refuse_metadata(metadata)
        self._refuse_tensors(shapes)
        config = {"architectures": [self.hf_class], "model_type": self.model_type, **self.fixed}
        for row in self.hyperparameters:
            value = self._read(row, metadata, shapes, config)
            if config.setdefault(row.attribute, value) != value:
                raise QmicaError(
                    f"the GGUF's heads have keys of {config[row.attribute]} and values of {value} numbers: qmica's "
                    f"{self.name} models have one size for both; use another model"
                )
        config["tie_word_embeddings"] = "output.weight" not in shapes
        for group in self.biases:
            if group.flag:
                config[group.flag] = self._bias_flag(group, shapes)
        config.update(special_token_ids(metadata))
        config["rope_parameters"] = self._read_rope(metadata, shapes, rope_freqs, config)
        self._require_tensors(config, shapes)
        return config

    def _read(self, row: Hyperparameter, metadata: Mapping, shapes: Mapping, config: Mapping) -> Any:
        value = metadata.get(f"{self.name}.{row.key}")
        if row.attribute == "vocab_size":  # the key is missing in old files; the embedding has one row a token
            value = shapes["token_embd.weight"][0]
        elif row.attribute == "head_dim" and value is None:
            value = shapes["blk.0.attn_q.weight"][0] // config["num_attention_heads"]
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise QmicaError(
                    f"{self.name}.{row.key} differs from layer to layer ({value[:4]}...): qmica reads only models "
                    "whose layers are all alike; use another model"
                )
            value = value[0]
        if value is None and row.default == REQUIRED:
            raise QmicaError(f"the GGUF has no {self.name}.{row.key}: it is not complete; download it again")
        if value is None:
            value = config.get(row.default, row.default)
        number = shortest_float(value)
        if number <= 0 or (row.type == U32 and number != int(number)):
            raise QmicaError(f"the GGUF has {self.name}.{row.key} = {value}: it is broken; download it again")
        return number if row.type == F32 else int(value)

    def _refuse_metadata(self, metadata: Mapping) -> None:
        if metadata.get(f"{self.name}.expert_count", 0):
            raise QmicaError(_experts(self.name))
        for key, neutral in UNSUPPORTED_KEYS.items():
            value = metadata.get(f"{self.name}.{key}")
            if value is not None and value not in neutral:
                raise QmicaError(
                    f"the GGUF sets {self.name}.{key} = {value}, which qmica's {self.name} models do not have; "
                    "use another model"
                )

    def _refuse_tensors(self, shapes: Mapping) -> None:
        extra = EXTRA_TENSORS if "llama3" in self.rope_types else ()
        unknown = [name for name in shapes if name not in extra and self.hf_name(name) is None]
        if any("_exps." in name or "ffn_gate_inp" in name for name in unknown):
            raise QmicaError(_experts(self.name))
        if unknown:
            raise QmicaError(
                f"the GGUF has tensors that a {self.name} model does not have: {', '.join(unknown[:3])}"
                f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; use another model"
            )
        if "token_embd.weight" not in shapes or "blk.0.attn_q.weight" not in shapes:
            raise QmicaError(
                "the GGUF has no weights of a language model (token_embd, blk.0); is it a vocabulary only?"
            )

    def _require_tensors(self, config: Mapping, shapes: Mapping) -> None:
        wanted = {**config, "num_hidden_layers": min(config["num_hidden_layers"], len(shapes))}  # a header may lie
        missing = [name for name in map(self.gguf_name, self.tensor_names(wanted)) if name not in shapes]
        if missing:
            raise QmicaError(
                f"the GGUF lacks {len(missing)} tensors of a {self.name} model with {config['num_hidden_layers']} "
                f"layers, {missing[0]} first: it is not complete; download it again (all parts of a split file)"
            )

    def _bias_flag(self, group: Biases, shapes: Mapping) -> bool:
        stems = [stem for stem in self.tensors if any(stem.endswith(f".{linear}") for linear in group.linears)]
        return any(self.tensors[stem].replace("{i}", "0") + ".bias" in shapes for stem in stems)

    # -- hyper-parameters, config.json -> GGUF

    def metadata(self, config: Any) -> list[tuple[str, GGUFValueType, Any]]:
        """The GGUF keys (without general.*) for a config, as (key, type, value) in llama.cpp's order.

        Raises QmicaError naming what this family's GGUF cannot express.
        """
        config = as_dict(config)
        self.check(config)
        values = [(row.key, row.type, self._value(config, row.attribute)) for row in self.hyperparameters]
        return [(f"{self.name}.{key}", kind, value) for key, kind, value in values + self._write_rope(config)]

    def extra_tensors(self, config: Any) -> dict[str, np.ndarray]:
        """Tensors a GGUF has beyond the model's own: rope_freqs.weight (head_dim / 2,) float32 for llama3 scaling."""
        config = as_dict(config)
        rope = rope_parameters(config)
        if rope["rope_type"] != "llama3":
            return {}
        return {"rope_freqs.weight": llama3_factors(rope, self.head_dim(config)).astype(np.float32)}

    def check(self, config: Any) -> None:
        """Raise QmicaError when the config asks for something this family's GGUF cannot express."""
        config = as_dict(config)
        for attribute, value in self.fixed.items():
            if config.get(attribute, value) not in (value, None):
                raise QmicaError(
                    f"this {self.model_type} model has {attribute} = {config[attribute]}, and a GGUF can only express "
                    f"{value}; use another model"
                )
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise QmicaError(f"this {self.model_type} model has sliding-window layers, which its GGUF cannot express")
        rope = rope_parameters(config)
        if rope["rope_type"] not in self.rope_types:
            raise QmicaError(_rope_refusal(self.model_type, rope["rope_type"], self.rope_types))
        for name, value in FIXED_ROPE.items():
            if rope.get(name) not in (value, None):
                raise QmicaError(
                    f"this {self.model_type} model has {name} = {rope[name]} in its rope parameters, and llama.cpp can "
                    f"only compute {value}; use another model"
                )
        for row in self.hyperparameters:
            self._value(config, row.attribute)

    def head_dim(self, config: Any) -> int:
        """Width of one attention head."""
        return self._value(as_dict(config), "head_dim")

    def _value(self, config: Mapping, attribute: str) -> Any:
        row = next(row for row in self.hyperparameters if row.attribute == attribute)
        value = config.get(attribute)
        if value is None and attribute == "head_dim":
            return self._value(config, "hidden_size") // self._value(config, "num_attention_heads")
        if value is None and row.default == REQUIRED:
            raise QmicaError(f"config.json has no {attribute}: it is not the config of a {self.model_type} model")
        if value is None:
            value = self._value(config, row.default) if isinstance(row.default, str) else row.default
        return value

    # -- rope

    def _read_rope(self, metadata: Mapping, shapes: Mapping, rope_freqs, config: Mapping) -> dict[str, Any]:
        keys = {key.removeprefix(f"{self.name}.rope."): value for key, value in metadata.items()}
        rope = {"rope_type": "default", "rope_theta": shortest_float(keys.get("freq_base", 10000.0))}
        if keys.get("dimension_count", config["head_dim"]) != config["head_dim"]:
            raise QmicaError(
                f"the GGUF rotates {keys['dimension_count']} of {config['head_dim']} dimensions of a head: qmica's "
                f"{self.name} models rotate all of them; use another model"
            )
        if "rope_freqs.weight" in shapes:
            if rope_freqs is None:
                raise ValueError("hf_config needs the data of rope_freqs.weight")
            return recover_llama3(np.asarray(rope_freqs, np.float64), rope["rope_theta"], config["head_dim"])
        # a factor without a type is linear for llama.cpp (src/llama-model.cpp, load_hparams)
        factor = shortest_float(keys.get("scaling.factor", keys.get("scale_linear", 0.0)))
        kind = keys.get("scaling.type", "linear")
        if factor in (0.0, 1.0) or kind == "none":
            return rope
        if kind not in self.rope_types:
            raise QmicaError(_rope_refusal(self.name, kind, self.rope_types))
        rope |= {"rope_type": kind, "factor": factor}
        return rope | _read_yarn(keys, factor, config) if kind == "yarn" else rope

    def _write_rope(self, config: Mapping) -> list[tuple[str, GGUFValueType, Any]]:
        rope = rope_parameters(config)
        rows = [("rope.dimension_count", U32, self.head_dim(config)), ("rope.freq_base", F32, rope["rope_theta"])]
        kind = rope["rope_type"]
        if kind in ("linear", "yarn"):
            rows += [("rope.scaling.type", GGUFValueType.STRING, kind)]
            rows += [("rope.scaling.factor", F32, float(rope["factor"]))]
        if kind == "yarn":
            rows += _write_yarn(rope)
        return rows


# -------------------------------------------------------------------------------------------------------- the families

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
    **{f"model.layers.{{i}}.{hf}": f"blk.{{i}}.{gguf}" for hf, gguf in _LINEARS.items()},
}


_HYPERPARAMETERS = (
    Hyperparameter("vocab_size", "vocab_size", U32),
    Hyperparameter("context_length", "max_position_embeddings", U32),
    Hyperparameter("embedding_length", "hidden_size", U32),
    Hyperparameter("block_count", "num_hidden_layers", U32),
    Hyperparameter("feed_forward_length", "intermediate_size", U32),
    Hyperparameter("attention.head_count", "num_attention_heads", U32),
    Hyperparameter("attention.head_count_kv", "num_key_value_heads", U32, "num_attention_heads"),
    Hyperparameter("attention.key_length", "head_dim", U32),
    Hyperparameter("attention.value_length", "head_dim", U32),
    Hyperparameter("attention.layer_norm_rms_epsilon", "rms_norm_eps", F32, 1e-6),
)


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(  # Llama 1 to 3.x, SmolLM2, TinyLlama, Yi
        name="llama",
        model_type="llama",
        hf_class="LlamaForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_HYPERPARAMETERS,
        biases=(
            Biases("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
            Biases("mlp_bias", ("gate_proj", "up_proj", "down_proj")),
        ),
        permuted={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
        rope_types=("default", "linear", "llama3", "yarn"),
        fixed={"hidden_act": "silu"},
    ),
    Architecture(
        name="qwen2",
        model_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_HYPERPARAMETERS,
        biases=(Biases(None, ("q_proj", "k_proj", "v_proj")),),
        permuted={},
        rope_types=("default", "linear", "yarn"),
        fixed={"hidden_act": "silu", "use_sliding_window": False},
    ),
)

# rope numbers that llama.cpp has built in: it does not read yarn_beta_fast and yarn_beta_slow for these families (ran:
# with 20 and 2 in the file its log-probabilities are those of 32 and 1 to 7e-5, and 2.9 off those of transformers)
FIXED_ROPE = {"partial_rotary_factor": 1.0, "truncate": True, "beta_fast": 32, "beta_slow": 1}

EXTRA_TENSORS = ("rope_freqs.weight",)  # read into the config, no weights of the model

# keys of llama.cpp that change what is computed, with the values under which they change nothing
UNSUPPORTED_KEYS = {
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_beta_fast": (32.0,),  # ignored by llama.cpp, see FIXED_ROPE
    "rope.scaling.yarn_beta_slow": (1.0,),
}

# general.architecture or model_type of well-known mixtures of experts whose name does not contain "moe"
MIXTURES = {
    "mixtral",
    "dbrx",
    "arctic",
    "grok",
    "deepseek2",
    "deepseek_v2",
    "deepseek_v3",
    "llama4",
    "gpt-oss",
    "gpt_oss",
}


def supported() -> str:
    """The supported families, for messages: "llama, qwen2"."""
    return ", ".join(arch.model_type for arch in ARCHITECTURES)


def for_gguf(name: str) -> Architecture:
    """The row for a GGUF's general.architecture; QmicaError naming it and the supported ones when there is none."""
    for arch in ARCHITECTURES:
        if arch.name == name:
            return arch
    raise QmicaError(_unsupported(name, "moe" in name or name in MIXTURES))


def for_config(config: Any) -> Architecture:
    """The row for a config.json (dict) or PretrainedConfig, checked; QmicaError naming what is not supported."""
    config = as_dict(config)
    name = config.get("model_type")
    if not name:
        raise QmicaError(f"config.json has no model_type; supported are {supported()}")
    for arch in ARCHITECTURES:
        if arch.model_type == name:
            arch.check(config)
            return arch
    experts = any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    raise QmicaError(_unsupported(name, experts or "moe" in name or name in MIXTURES))


def _translate(name: str, table: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"(.+)\.(weight|bias)", name)
    if not match:
        return None
    layer = re.search(r"(?<=\.)\d+(?=\.)", match[1])
    target = table.get(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", match[1], count=1))
    if target is None:
        return None
    return f"{target.replace('{i}', layer[0]) if layer else target}.{match[2]}"


def as_dict(config: Any) -> Mapping[str, Any]:
    """A config.json's content as it is; a PretrainedConfig as a dict."""
    return config if isinstance(config, Mapping) else config.to_dict()


def special_token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """bos/eos/pad_token_id of config.json from a GGUF's tokenizer keys; those the file does not name are None."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}


def shortest_float(value: Any) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 was written as 1e-05.

    Raises QmicaError for what is no finite number.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise QmicaError(f"the GGUF has {value!r:.40} where a number belongs: it is broken; download it again")
    return float(str(np.float32(value)))


# ---------------------------------------------------------------------------------------------------------------- rope


def rope_parameters(config: Any) -> dict[str, Any]:
    """rope_type, rope_theta and the type's own numbers, from transformers 5's `rope_parameters` or the older
    `rope_theta` + `rope_scaling`."""
    config = as_dict(config)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if rope["rope_type"] in ("llama3", "yarn"):
        context = config.get("max_position_embeddings")
        original = rope.setdefault("original_max_position_embeddings", context)
        if rope.get("factor") is None:  # DeepSeek's way of writing yarn
            rope["factor"] = context / original
    return rope


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """What llama3 scaling divides each frequency by, (head_dim / 2,) float64: 1 for short waves, `factor` for long.

    Llama 3.1's formula (transformers modeling_rope_utils.py::_compute_llama3_parameters, llama.cpp
    conversion/llama.py).
    """
    wave = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] / wave  # of a dimension within the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def recover_llama3(factors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The rope_parameters whose llama3_factors are `factors` (to 1e-5, the float32 noise of llama.cpp's converter).

    Tries the settings in use (Llama 3.1: 8192, 8, 1, 4; 3.2: factor 32), then solves for others: between the plain
    and the scaled waves 1/factors is linear in the frequency, which gives the ratio of the original context and the two
    frequency factors (only ratios matter, so low_freq_factor is taken as 1).  QmicaError when nothing gives them.
    """
    if np.allclose(factors, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    factor = shortest_float(factors.max())
    for original, high in [(8192, 4.0), *_solve_llama3(factors, factor, theta, head_dim)]:
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if factors.shape == (head_dim // 2,) and np.allclose(llama3_factors(rope, head_dim), factors, rtol=1e-5):
            return rope
    raise QmicaError(
        f"the GGUF's rope_freqs.weight (largest factor {factor:g}) is no llama3 rope scaling that qmica can express: "
        "known are original context 8192 with factors 8 and 32; use the Hugging Face folder of this model"
    )


def _solve_llama3(factors: np.ndarray, factor: float, theta: float, head_dim: int) -> list[tuple[int, float]]:
    wave = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    between = (factors > 1.0 + 1e-5) & (factors < factor * (1.0 - 1e-5))
    if factors.shape != wave.shape or between.sum() < 2:
        return []
    smooth = (1.0 / factors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, offset = np.polyfit(1.0 / wave[between], smooth, 1)  # smooth = (original / wave - 1) / (high - 1)
    if offset >= 0.0:
        return []
    return [(round(-slope / offset), float(round(1.0 - 1.0 / offset, 3)))]


def yarn_attention(factor: float) -> float:
    """YaRN's own attention factor, 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _read_yarn(keys: Mapping[str, Any], factor: float, config: Mapping) -> dict[str, Any]:
    original = int(keys.get("scaling.original_context_length", config["max_position_embeddings"]))
    rope = {"original_max_position_embeddings": original}
    # llama.cpp multiplies its own 0.1 ln(factor) + 1 by attn_factor; transformers' attention_factor replaces it
    multiplier = keys.get("scaling.attn_factor", 1.0)
    if multiplier != 1.0:
        rope["attention_factor"] = shortest_float(multiplier * yarn_attention(factor))
    return rope


def _write_yarn(rope: Mapping[str, Any]) -> list[tuple[str, GGUFValueType, Any]]:
    factor = float(rope["factor"])
    attention = rope.get("attention_factor")
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and scale and scale_all:
        grown = math.log(factor) if factor > 1.0 else 0.0
        attention = (0.1 * scale * grown + 1.0) / (0.1 * scale_all * grown + 1.0)
    rows = [("rope.scaling.original_context_length", U32, int(rope["original_max_position_embeddings"]))]
    if attention is not None:  # llama.cpp multiplies, transformers replaces
        rows.append(("rope.scaling.attn_factor", F32, attention / yarn_attention(factor)))
    return rows


# ------------------------------------------------------------------------------------------------------------ messages


def _experts(name: str) -> str:
    return (
        f"{name!r} is a mixture of experts, which qmica does not train; supported are dense models of the families "
        f"{supported()}"
    )


def _unsupported(name: str, experts: bool) -> str:
    if experts:
        return _experts(name)
    return f"architecture {name!r} is not supported; supported are {supported()}"


def _rope_refusal(name: str, kind: str, allowed: tuple[str, ...]) -> str:
    return f"this {name} model has rope type {kind!r}, which qmica cannot export; supported are {', '.join(allowed)}"
