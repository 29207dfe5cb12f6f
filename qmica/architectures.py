"""What GGUF and Hugging Face call the same model: tensor names, hyper-parameters, row order; one table row a family.

Every row is read in both directions: `for_config(config)` for writing a GGUF, `for_gguf(name)` for reading one. A
config is built from a GGUF's own metadata and tensor shapes, never by transformers' reader, which drops llama3 rope
scaling and explicit head sizes. What a row cannot express (another rope type, other layers, experts) is refused
by name, before anything is trained.

    arch = for_gguf("llama")
    config = arch.hf_config(file.metadata, shapes, factors)          # the content of config.json
    arch.hf_name("blk.3.attn_q.weight")                              # model.layers.3.self_attn.q_proj.weight
    hf_rows = gguf_rows[np.argsort(arch.row_order(name, config))]    # undo llama.cpp's q/k permutation
    hf_norm = gguf_norm - arch.offset(name)                          # Gemma's norms count from zero there

A new family is one row of ARCHITECTURES and one tiny model in tests/test_architectures.py: its tensors, the numbers of
its config, and under `fixed` what llama.cpp's graph of it computes whatever the file says.

Given up: models with experts, and tensors that are cut into several on the way (phi3's fused ones stay fused on both
sides).

Sources: llama.cpp conversion/*.py (keys, permutation, offsets), src/models/*.cpp (what each graph has built in),
src/llama-model.cpp (what a missing key means).
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFValueType

from qmica import rope
from qmica.errors import QmicaError
from qmica.rope import shortest_float

REQUIRED = object()  # as a default: the key must be there
MOST_LAYERS = 1000  # Llama 3.1 405B has 126: what says more is broken, and lists would be made of that length
U32, F32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


@dataclass(frozen=True)
class Hyperparameter:
    """One number: `{architecture}.{key}` in a GGUF, `attribute` in config.json; where that leaves it out `default`.

    The default is the one of transformers' config class: a number, a rule (architecture, config) -> number, or None for
    a number that a model may be without, which 0 stands for in the GGUF. A GGUF without the key: see ABSENT.
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
    fixed: Mapping[str, Any]  # attributes that GGUF cannot say: the only value llama.cpp computes with, or its rule
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rope_theta: float = 10000.0  # where config.json leaves it out
    tied: bool = False  # whether the head is the embedding where config.json leaves it out
    biases: tuple[Biases, ...] = ()
    permuted: Mapping[str, str] = field(
        default_factory=dict
    )  # linear whose rows llama.cpp reorders -> its heads' count
    norm_offset: float = 0.0  # a norm's weight in the GGUF less that of Hugging Face
    partial_rotary: bool = False  # whether a part of a head may stay as it is
    local_rope: bool = False  # whether sliding-window layers rotate by a theta of their own, unscaled
    full_every: int = 1  # the last of so many layers sees the whole text, the others a sliding window
    windowless: bool = False  # llama.cpp computes no sliding window: the same up to its length, which the file says

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
            if stem == "lm_head" and config.get("tie_word_embeddings", self.tied):
                continue
            for layer in range(self.value(config, "num_hidden_layers")) if "{i}" in stem else (0,):
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
        heads, size = self.value(config, self.permuted[linear]), self.head_dim(config)
        return np.arange(heads * size).reshape(heads, 2, size // 2).transpose(0, 2, 1).reshape(-1)

    def offset(self, hf_name: str) -> float:
        """What the GGUF's values are above Hugging Face's: 1 for a norm of Gemma, which there multiplies by 1 + w."""
        return self.norm_offset if hf_name.endswith("norm.weight") else 0.0

    # -- hyper-parameters, GGUF -> config.json

    def hf_config(
        self, metadata: Mapping[str, Any], shapes: Mapping[str, tuple], factors: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """The content of config.json (transformers 5) for a GGUF.

        metadata: the GGUF's keys and values; shapes: GGUF tensor name -> shape, slowest dimension first; factors: the
        data of those of `factor_tensors` that the file has, each (dimensions that rotate / 2,).
        Raises QmicaError when the file holds something this family does not have, or lacks something it needs.
        """
        self._refuse_metadata(metadata)
        self._refuse_tensors(shapes)
        config = {"architectures": [self.hf_class], "model_type": self.model_type}
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
        self._require_tensors(config, shapes)  # before anything is made for each layer: their number may be a lie
        config = {**self._fixed(config), **config, **special_token_ids(metadata, config["vocab_size"])}
        self._refuse_pattern(metadata, config)
        self._refuse_fixed(config)
        self._refuse_sizes(config, shapes)
        config["rope_parameters"] = self._read_rope(metadata, factors or {}, config)
        return config

    def _read(self, row: Hyperparameter, metadata: Mapping, shapes: Mapping, config: Mapping) -> Any:
        value = metadata.get(f"{self.name}.{row.key}")
        if row.attribute == "vocab_size":  # the key is missing in old files; the embedding has one row a token
            value = shapes["token_embd.weight"][0]
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise QmicaError(
                    f"{self.name}.{row.key} differs from layer to layer ({value[:4]}...): qmica reads only models "
                    "whose layers are all alike; use another model"
                )
            value = value[0]
        if value is None:
            absent = ABSENT.get(row.key, row.default)
            value = absent(self, config) if callable(absent) else absent
        if value is REQUIRED:
            raise QmicaError(f"the GGUF has no {self.name}.{row.key}: it is not complete; download it again")
        if row.default is None and not value:
            return None
        number = shortest_float(value)
        if number <= 0 or (row.type == U32 and (number != int(number) or number >= 2**32)):
            raise QmicaError(f"the GGUF has {self.name}.{row.key} = {value}: it is broken; download it again")
        return number if row.type == F32 else int(value)

    def _fixed(self, config: Mapping) -> dict[str, Any]:
        """The values of attributes that llama.cpp's graph has built in, for a model with this config."""
        return {name: value(self, config) if callable(value) else value for name, value in self.fixed.items()}

    def _layer_types(self, config: Mapping) -> list[str]:
        layers = range(1, self.value(config, "num_hidden_layers") + 1)
        return ["sliding_attention" if layer % self.full_every else "full_attention" for layer in layers]

    def _refuse_pattern(self, metadata: Mapping, config: Mapping) -> None:
        """A file may say which layers slide (as a number, or for each layer): only the family's own ones can."""
        said = metadata.get(f"{self.name}.attention.sliding_window_pattern", self.full_every)
        own = [kind == "sliding_attention" for kind in self._layer_types(config)]
        if said not in (self.full_every, own):
            raise QmicaError(
                f"the GGUF has {self.name}.attention.sliding_window_pattern = {said!s:.40}: qmica's {self.name} models "
                f"see the whole text in every layer of {self.full_every}; use another model"
            )

    def _refuse_metadata(self, metadata: Mapping) -> None:
        if metadata.get(f"{self.name}.expert_count", 0):
            raise QmicaError(_experts(self.name))
        own = {row.key for row in self.hyperparameters}
        for key in UNSUPPORTED_KEYS.keys() - own:
            value, neutral = metadata.get(f"{self.name}.{key}"), UNSUPPORTED_KEYS[key]
            if value is not None and value not in neutral:
                raise QmicaError(
                    f"the GGUF sets {self.name}.{key} = {value}, which qmica's {self.name} models do not have; "
                    "use another model"
                )

    def _refuse_tensors(self, shapes: Mapping) -> None:
        unknown = [name for name in shapes if name not in self.factor_tensors and self.hf_name(name) is None]
        if any("_exps." in name or "ffn_gate_inp" in name for name in unknown):
            raise QmicaError(_experts(self.name))
        if unknown:
            raise QmicaError(
                f"the GGUF has tensors that a {self.name} model does not have: {', '.join(unknown[:3])}"
                f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; use another model"
            )
        if "token_embd.weight" not in shapes or "blk.0.attn_output.weight" not in shapes:
            raise QmicaError(
                "the GGUF has no weights of a language model (token_embd, blk.0); is it a vocabulary only?"
            )

    def _require_tensors(self, config: Mapping, shapes: Mapping) -> None:
        wanted = {**config, "num_hidden_layers": min(config["num_hidden_layers"], len(shapes))}  # a header may lie
        expected = dict.fromkeys(map(self.gguf_name, self.tensor_names(wanted)))
        missing = [name for name in expected if name not in shapes]
        extra = [name for name in shapes if name not in expected and name not in self.factor_tensors]
        if extra and not missing:
            raise QmicaError(
                f"the GGUF has {len(extra)} tensors that a {self.name} model with {config['num_hidden_layers']} layers "
                f"does not have, {extra[0]} first: its header is broken; download it again"
            )
        if missing:
            raise QmicaError(
                f"the GGUF lacks {len(missing)} tensors of a {self.name} model with {config['num_hidden_layers']} "
                f"layers, {missing[0]} first: it is not complete; download it again (all parts of a split file)"
            )

    def _refuse_sizes(self, config: Mapping, shapes: Mapping) -> None:
        """What is made from the header's numbers would be as large as they say: they must be those of the tensors."""
        width, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        sizes = {
            "token_embd.weight": (config["vocab_size"], width),
            "blk.0.attn_output.weight": (width, heads * dim),
            "blk.0.attn_k.weight": (groups * dim, width),
            "blk.0.attn_qkv.weight": ((heads + 2 * groups) * dim, width),
            "blk.0.ffn_down.weight": (width, inner),
        }
        wrong = [name for name, size in sizes.items() if tuple(shapes.get(name, size)) != size]
        if wrong:
            raise QmicaError(
                f"the GGUF's {wrong[0]} is {tuple(shapes[wrong[0]])}, and its header says {sizes[wrong[0]]}: it is "
                "broken; download it again"
            )
        if heads % groups or dim % 2:
            raise QmicaError(
                f"the GGUF has {heads} heads for {groups} of keys, of {dim} numbers each: it is broken; download it "
                "again"
            )

    def _bias_flag(self, group: Biases, shapes: Mapping) -> bool:
        stems = [stem for stem in self.tensors if any(stem.endswith(f".{linear}") for linear in group.linears)]
        return any(self.tensors[stem].replace("{i}", "0") + ".bias" in shapes for stem in stems)

    @property
    def factor_tensors(self) -> tuple[str, ...]:
        """GGUF tensors that are no weights of the model but numbers of its config: the factors of a rope type."""
        return tuple(name for kind in self.rope_types for name in rope.SCALINGS[kind].names)

    # -- hyper-parameters, config.json -> GGUF

    def metadata(self, config: Any) -> list[tuple[str, GGUFValueType, Any]]:
        """The GGUF keys (without general.*) for a config, as (key, type, value) in llama.cpp's order.

        Raises QmicaError naming what this family's GGUF cannot express.
        """
        config = as_dict(config)
        self.check(config)
        values = [(row.key, row.type, self._written(config, row.attribute)) for row in self.hyperparameters]
        rows, _ = rope.write(self._rope(config), self._frame(config))
        if self.local_rope:
            rows.append(("rope.freq_base_swa", F32, rope.local_parameters(config)["rope_theta"]))
        return [(f"{self.name}.{key}", kind, value) for key, kind, value in values + rows]

    def _written(self, config: Mapping, attribute: str) -> Any:
        """A number as the GGUF says it: 0 for none, and a context no longer than a window that is not computed."""
        value = self.value(config, attribute) or 0
        window = config.get("sliding_window") if self.windowless else None
        return min(value, window) if window and attribute == "max_position_embeddings" else value

    def extra_tensors(self, config: Any) -> dict[str, np.ndarray]:
        """Tensors a GGUF has beyond the model's own: those of `factor_tensors` that its rope type has, float32."""
        config = as_dict(config)
        return rope.write(self._rope(config), self._frame(config))[1]

    def check(self, config: Any) -> None:
        """Raise QmicaError when the config asks for something this family's GGUF cannot express."""
        config = as_dict(config)
        self._require_numbers(config)
        self._refuse_fixed(config)
        types = config.get("layer_types")
        if types and types != self._layer_types(config):
            raise QmicaError(
                f"this {self.model_type} model has sliding-window layers other than its GGUF can express: llama.cpp "
                f"sees the whole text in every layer of {self.full_every}; use another model"
            )
        self._refuse_rope(self._rope(config))
        if self.local_rope:
            self._refuse_rope(rope.local_parameters(config), ("default",))
        try:
            rope.write(self._rope(config), self._frame(config))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise QmicaError(f"config.json's rope parameters are not complete ({error}): download it again") from error

    def _require_numbers(self, config: Mapping) -> None:
        """Before anything is computed from them: numbers above 0, layers in a number that a model may have."""
        for row in self.hyperparameters:
            value = self.value(config, row.attribute)
            most = {"num_hidden_layers": MOST_LAYERS}.get(row.attribute, 2**32 - 1 if row.type == U32 else math.inf)
            kinds = int if row.type == U32 else (int, float)
            if value is not None and not (isinstance(value, kinds) and 0 < value <= most and value < math.inf):
                raise QmicaError(
                    f"config.json has {row.attribute} = {value!r:.40}, which no {self.model_type} model has: it is "
                    "broken; download it again"
                )
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(config.get(key) or {}, Mapping):
                raise QmicaError(f"config.json has {key} = {config[key]!r:.40}: it is broken; download it again")

    def _refuse_fixed(self, config: Mapping) -> None:
        for attribute, value in self._fixed(config).items():
            if config.get(attribute, value) not in (value, None):
                raise QmicaError(
                    f"this {self.model_type} model has {attribute} = {config[attribute]!s:.60}, and a GGUF can only "
                    f"express {value!s:.60}; use another model"
                )

    def _refuse_rope(self, said: Mapping, allowed: tuple[str, ...] | None = None) -> None:
        allowed = allowed or self.rope_types
        if said["rope_type"] not in allowed:
            raise QmicaError(_rope_refusal(self.model_type, said["rope_type"], allowed))
        built_in = rope.FIXED if self.partial_rotary else rope.FIXED | {"partial_rotary_factor": 1.0}
        for name, value in built_in.items():
            if said.get(name) not in (value, None):
                raise QmicaError(
                    f"this {self.model_type} model has {name} = {said[name]} in its rope parameters, and llama.cpp can "
                    f"only compute {value}; use another model"
                )

    def head_dim(self, config: Any) -> int:
        """Width of one attention head."""
        return self.value(config, "head_dim")

    def value(self, config: Any, attribute: str) -> Any:
        """A number of config.json, or what transformers takes where it is left out.

        Raises QmicaError for one that must be there, and for a null in place of a number that llama.cpp always has.
        """
        config = as_dict(config)
        value, default = config.get(attribute), self._defaults[attribute]
        if value is not None:
            return value
        if callable(default):
            return default(self, config)
        if default is REQUIRED:
            raise QmicaError(f"config.json has no {attribute}: it is not the config of a {self.model_type} model")
        if attribute in config and default is not None:
            raise QmicaError(
                f"this {self.model_type} model has {attribute} = null, and a GGUF can only express a number; use "
                "another model"
            )
        return default

    @property
    def _defaults(self) -> dict[str, Any]:
        return {row.attribute: row.default for row in self.hyperparameters}

    # -- rope

    def _rope(self, config: Mapping) -> rope.Rope:
        return rope.parameters(config, self.rope_theta)

    def _frame(self, config: Mapping) -> rope.Frame:
        share = self._rope(config)["partial_rotary_factor"]
        return rope.Frame(int(self.head_dim(config) * share), self.value(config, "max_position_embeddings"))

    def _read_rope(self, metadata: Mapping, factors: Mapping, config: Mapping) -> dict[str, Any]:
        start = f"{self.name}.rope."
        keys = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        size = config["head_dim"]
        dims = keys.get("dimension_count", size)
        if dims not in (range(2, size + 1, 2) if self.partial_rotary else (size,)):
            some = f"an even number up to {size}" if self.partial_rotary else "all of them"
            raise QmicaError(
                f"the GGUF rotates {dims!s:.20} of {size} dimensions of a head: qmica's {self.name} models rotate "
                f"{some}; use another model"
            )
        said = rope.read(keys, factors, rope.Frame(dims, config["max_position_embeddings"]))
        self._refuse_rope(said)
        if dims != size:
            said["partial_rotary_factor"] = dims / size
        if not self.local_rope:
            return said
        local = {"rope_type": "default", "rope_theta": rope.number(keys, "freq_base_swa", 10000.0)}
        return {"full_attention": said, "sliding_attention": local}


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


def _all_heads(arch: Architecture, config: Mapping) -> int:
    """Keys and values have as many heads as queries."""
    return arch.value(config, "num_attention_heads")


def _equal_heads(arch: Architecture, config: Mapping) -> int:
    """The width divided by the heads."""
    return arch.value(config, "hidden_size") // arch.value(config, "num_attention_heads")


def _context(arch: Architecture, config: Mapping) -> int:
    return arch.value(config, "max_position_embeddings")


# what llama.cpp takes where a GGUF has no such key (src/llama-model.cpp, load_hparams), whatever the family
ABSENT = {
    "attention.head_count_kv": _all_heads,
    "attention.key_length": _equal_heads,
    "attention.value_length": _equal_heads,
    "rope.scaling.original_context_length": _context,
}


# `sizes`: what a family's config.json may leave out, beside these two, as transformers' config class defaults it
def _numbers(epsilon: float = 1e-6, **sizes: int) -> tuple[Hyperparameter, ...]:
    rows = (
        ("vocab_size", "vocab_size"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
    )
    defaults = {"num_key_value_heads": _all_heads, "head_dim": _equal_heads, **sizes}
    numbers = tuple(Hyperparameter(key, name, U32, defaults.get(name, REQUIRED)) for key, name in rows)
    return (*numbers, Hyperparameter("attention.layer_norm_rms_epsilon", "rms_norm_eps", F32, epsilon))


def _attention_scalar(largest: int) -> Callable[[Architecture, Mapping], int]:
    """Gemma's query_pre_attn_scalar: llama.cpp tells the 27B model, which differs, by its number of layers."""
    return lambda arch, config: (
        _equal_heads(arch, config) if arch.value(config, "num_hidden_layers") == largest else arch.head_dim(config)
    )


def _no_rope_layers(arch: Architecture, config: Mapping) -> list[int]:
    """SmolLM3: 1 for a layer that rotates, 0 for every fourth (llama.cpp src/models/smollm3.cpp)."""
    return [int(layer % 4 != 0) for layer in range(1, arch.value(config, "num_hidden_layers") + 1)]


_PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_SILU = {"hidden_act": "silu"}
_PLAIN = {**_SILU, "attention_bias": False, "use_sliding_window": False}


def _layer(**renamed: str) -> dict[str, str]:
    return {f"model.layers.{{i}}.{hf.replace('__', '.')}": f"blk.{{i}}.{gguf}" for hf, gguf in renamed.items()}


_HEAD_NORMS = _layer(self_attn__q_norm="attn_q_norm", self_attn__k_norm="attn_k_norm")
_POST_NORMS = _layer(post_attention_layernorm="post_attention_norm", post_feedforward_layernorm="post_ffw_norm")
_GEMMA_TENSORS = {
    **{hf: gguf for hf, gguf in _LLAMA_TENSORS.items() if hf != "lm_head"},
    **_POST_NORMS,
    **_layer(pre_feedforward_layernorm="ffn_norm"),
}
_FUSED = {**_layer(self_attn__qkv_proj="attn_qkv", mlp__gate_up_proj="ffn_up")}
_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
}


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(  # Llama 1 to 3.x, SmolLM2, TinyLlama, Yi
        name="llama",
        model_type="llama",
        hf_class="LlamaForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_numbers(),
        biases=(
            Biases("attention_bias", ("q_proj", "k_proj", "v_proj", "o_proj")),
            Biases("mlp_bias", ("gate_proj", "up_proj", "down_proj")),
        ),
        permuted=_PERMUTED,
        rope_types=("default", "linear", "llama3", "yarn"),
        fixed=_SILU,
    ),
    Architecture(  # written as a llama, and read back as one
        name="llama",
        model_type="mistral",
        hf_class="MistralForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_numbers(num_key_value_heads=8),
        permuted=_PERMUTED,
        rope_types=("default", "linear", "llama3", "yarn"),
        fixed=_SILU,
        windowless=True,  # of Mistral 7B 0.1 alone, 4096
    ),
    Architecture(
        name="qwen2",
        model_type="qwen2",
        hf_class="Qwen2ForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_numbers(num_key_value_heads=32),
        biases=(Biases(None, ("q_proj", "k_proj", "v_proj")),),
        fixed={**_SILU, "use_sliding_window": False},
    ),
    Architecture(
        name="qwen3",
        model_type="qwen3",
        hf_class="Qwen3ForCausalLM",
        tensors={**_LLAMA_TENSORS, **_HEAD_NORMS},
        hyperparameters=_numbers(num_key_value_heads=32, head_dim=128),
        fixed=_PLAIN,
    ),
    Architecture(
        name="gemma2",
        model_type="gemma2",
        hf_class="Gemma2ForCausalLM",
        tensors=_GEMMA_TENSORS,
        hyperparameters=(
            *_numbers(num_key_value_heads=4, head_dim=256),
            Hyperparameter("attention.sliding_window", "sliding_window", U32, 4096),
            Hyperparameter("attn_logit_softcapping", "attn_logit_softcapping", F32, 50.0),
            Hyperparameter("final_logit_softcapping", "final_logit_softcapping", F32, 30.0),
        ),
        rope_types=("default",),
        fixed={**_GEMMA, "query_pre_attn_scalar": _attention_scalar(46)},
        norm_offset=1.0,
        full_every=2,
    ),
    Architecture(  # the text part of the larger models too
        name="gemma3",
        model_type="gemma3_text",
        hf_class="Gemma3ForCausalLM",
        tensors={**_GEMMA_TENSORS, **_HEAD_NORMS},
        hyperparameters=(
            *_numbers(
                vocab_size=262208,
                max_position_embeddings=131072,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256,
            ),
            Hyperparameter("attention.sliding_window", "sliding_window", U32, 4096),
            Hyperparameter("final_logit_softcapping", "final_logit_softcapping", F32, None),
        ),
        rope_types=("default", "linear"),
        fixed={
            **_GEMMA,
            "query_pre_attn_scalar": _attention_scalar(62),
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        norm_offset=1.0,
        rope_theta=1e6,
        local_rope=True,
        full_every=6,
    ),
    Architecture(  # Phi-3 and Phi-4
        name="phi3",
        model_type="phi3",
        hf_class="Phi3ForCausalLM",
        tensors={**{hf: gguf for hf, gguf in _LLAMA_TENSORS.items() if not hf.endswith(_SPLIT)}, **_FUSED},
        hyperparameters=(
            *_numbers(1e-5),
            Hyperparameter("attention.sliding_window", "sliding_window", U32, None),
            Hyperparameter("rope.scaling.original_context_length", "original_max_position_embeddings", U32, 4096),
        ),
        rope_types=("default", "longrope"),
        fixed={**_SILU, "head_dim": _equal_heads},
        partial_rotary=True,  # Phi-4-mini
        windowless=True,
    ),
    Architecture(
        name="granite",
        model_type="granite",
        hf_class="GraniteForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=(
            *_numbers(),
            Hyperparameter("attention.scale", "attention_multiplier", F32, 1.0),
            Hyperparameter("embedding_scale", "embedding_multiplier", F32, 1.0),
            Hyperparameter("residual_scale", "residual_multiplier", F32, 1.0),
            Hyperparameter("logit_scale", "logits_scaling", F32, 1.0),
        ),
        permuted=_PERMUTED,
        fixed={**_SILU, "attention_bias": False, "mlp_bias": False},
    ),
    Architecture(
        name="olmo2",
        model_type="olmo2",
        hf_class="Olmo2ForCausalLM",
        tensors={
            **{hf: gguf for hf, gguf in _LLAMA_TENSORS.items() if not hf.endswith("input_layernorm")},
            **_HEAD_NORMS,
            **_POST_NORMS,
        },
        hyperparameters=_numbers(1e-5),
        fixed={**_SILU, "attention_bias": False, "tie_word_embeddings": False, "head_dim": _equal_heads},
    ),
    Architecture(
        name="smollm3",
        model_type="smollm3",
        hf_class="SmolLM3ForCausalLM",
        tensors=_LLAMA_TENSORS,
        hyperparameters=_numbers(num_key_value_heads=4),
        permuted=_PERMUTED,
        rope_theta=2e6,
        tied=True,
        fixed={**_PLAIN, "mlp_bias": False, "no_rope_layers": _no_rope_layers},
    ),
)

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
    "rope.scaling.yarn_beta_fast": (32.0,),  # ignored by llama.cpp, see rope.FIXED
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
    """The supported families, for messages: "llama, mistral, qwen2, ..."."""
    return ", ".join(arch.model_type.removesuffix("_text") for arch in ARCHITECTURES)


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
    if not name or not isinstance(name, str):
        raise QmicaError(f"config.json has no model_type; supported are {supported()}")
    for arch in ARCHITECTURES:
        if arch.model_type == name:
            arch.check(config)
            return arch
    experts = any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    raise QmicaError(_unsupported(name, experts or "moe" in name or name in MIXTURES))


# ---- models that also see: their text part is one of a family

TEXT_PARTS = {"gemma3": "gemma3_text"}  # model_type of the whole -> of its part (Gemma 3 from 4B)
_TEXT_NAMES = (  # of its tensors, as on the hub and as transformers 5 saves them
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    *((start, None) for part in ("vision_tower.", "multi_modal_projector.") for start in (part, f"model.{part}")),
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a model's text part where it has another, else `config`."""
    part = TEXT_PARTS.get(str(config.get("model_type")))
    if part is None or not isinstance(config.get("text_config"), Mapping):
        return config
    beside = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "dtype")
    arch = next(arch for arch in ARCHITECTURES if arch.model_type == part)
    said = {name: config[name] for name in beside if name in config}
    return {**config["text_config"], **said, "model_type": part, "architectures": [arch.hf_class]}


def text_name(name: str) -> str | None:
    """A tensor's name in the text part; None for a tensor of another part."""
    for start, new in _TEXT_NAMES:
        if name.startswith(start):
            return None if new is None else new + name.removeprefix(start)
    return name


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


def special_token_ids(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int | None]:
    """bos/eos/pad_token_id of config.json from a GGUF's tokenizer keys; those that are no token's are None."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    said = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: id if isinstance(id, int) and 0 <= id < vocab_size else None for name, id in said.items()}


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
