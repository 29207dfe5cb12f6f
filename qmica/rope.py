"""How positions are scaled beyond a model's original context: Hugging Face's rope_parameters, GGUF's keys and tensors.

One table row a type (SCALINGS), used in both directions: the keys it has under `{architecture}.rope.`, the tensors that
hold its factors, and how the numbers of one are made from the other. llama.cpp applies every factor to the same plain
frequencies theta^(-2i/d), so that a type is a few numbers or one factor a frequency.

    rope = parameters(config)                               # rope_type, rope_theta and the type's own numbers
    rows, tensors = write(rope, Frame(dims=64, context=8192))    # GGUF keys, GGUF tensors
    again = read(keys, tensors, Frame(dims=64, context=8192))    # rope_parameters

Given up: `dynamic` scaling, which llama.cpp does not have, and rotations of a part of the head where the family's graph
in llama.cpp rotates all of it.

Sources: transformers modeling_rope_utils.py (formulas), llama.cpp conversion/llama.py and conversion/phi.py (what is
written), src/llama-model.cpp and src/llama-context.cpp (what a missing key means, and what yarn multiplies).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFValueType

from qmica.errors import QmicaError

U32, F32, STRING = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
Row = tuple[str, GGUFValueType, Any]  # key after `{architecture}.`, type, value
Rope = dict[str, Any]
LARGEST = float(np.finfo(np.float32).max)

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

# rope numbers that llama.cpp has built in: it does not read yarn_beta_fast and yarn_beta_slow for these families (ran:
# with 20 and 2 in the file its log-probabilities are those of 32 and 1 to 7e-5, and 2.9 off those of transformers)
FIXED = {"truncate": True, "beta_fast": 32, "beta_slow": 1}


@dataclass(frozen=True)
class Frame:
    """Of the model: how many dimensions of a head rotate, and the longest text."""

    dims: int
    context: int


def shortest_float(value: Any) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.999999747378752e-06 was written as 1e-05.

    Raises QmicaError for what is no finite number.
    """
    if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise QmicaError(f"the GGUF has {value!r:.40} where a number belongs: it is broken; download it again")
    return float(str(np.float32(value)))


def parameters(config: Mapping[str, Any], theta: float = 10000.0) -> Rope:
    """rope_type, rope_theta and the type's own numbers, from transformers 5's `rope_parameters` or the older
    `rope_theta` + `rope_scaling`; of a model that rotates its sliding-window layers differently, those of the others.
    theta: the family's, where config.json leaves it out.
    """
    rope = dict(_of_layers(config, "full_attention") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", config.get("rope_theta") or theta)
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if rope["rope_type"] in ("llama3", "yarn", "longrope", "su"):
        context = config.get("max_position_embeddings")
        # phi3 says it beside rope_scaling, and there it counts (transformers standardize_rope_params)
        beside = config.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = beside or rope.get("original_max_position_embeddings") or context
        if rope.get("factor") is None:  # DeepSeek's and Phi's way of writing it
            rope["factor"] = context / rope["original_max_position_embeddings"]
    if rope["rope_type"] == "su":  # longrope, in Phi-3's first configs
        rope["rope_type"] = "longrope"
    return rope


def local_parameters(config: Mapping[str, Any]) -> Rope:
    """Those of Gemma 3's sliding-window layers, which no older form scales (transformers configuration_gemma3.py)."""
    nested = "sliding_attention" in (config.get("rope_parameters") or {})
    rope = dict(_of_layers(config, "sliding_attention") or {}) if nested else {}
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", config.get("rope_local_base_freq") or 10000.0)
    return rope


def _of_layers(config: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """transformers 5's rope_parameters: one for all layers, or one for each kind."""
    rope = config.get("rope_parameters") or {}
    nested = "full_attention" in rope or "sliding_attention" in rope
    return rope.get(kind) if nested else rope


# ---- both directions


@dataclass(frozen=True)
class Scaling:
    """One rope_type: the keys and the tensors that say it in a GGUF, and the names of these tensors."""

    rows: Callable[[Rope], list[Row]] = lambda rope: []
    tensors: Callable[[Rope, Frame], dict[str, np.ndarray]] = lambda rope, frame: {}
    names: tuple[str, ...] = ()


def write(rope: Rope, frame: Frame) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The GGUF keys (after `{architecture}.`) and the tensors (dims / 2,) float32 of `rope`."""
    rows = [("rope.dimension_count", U32, frame.dims), ("rope.freq_base", F32, rope["rope_theta"])]
    scaling = SCALINGS[rope["rope_type"]]
    made = {name: np.asarray(data, np.float32) for name, data in scaling.tensors(rope, frame).items()}
    return rows + scaling.rows(rope), made


def read(keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], frame: Frame) -> Rope:
    """rope_parameters from the GGUF's keys (after `{architecture}.rope.`) and tensors. QmicaError for numbers that are
    none, and for factors that no type explains.
    """
    theta = number(keys, "freq_base", 10000.0, above=1)
    if FREQS in tensors:
        return recover_llama3(np.asarray(tensors[FREQS], np.float64), theta, frame.dims)
    if LONG in tensors:
        return {"rope_type": "longrope", "rope_theta": theta, **_read_longrope(keys, tensors, frame)}
    # a factor without a type is linear for llama.cpp (src/llama-model.cpp, load_hparams), and 0 is none
    kind, factors = keys.get("scaling.type", "linear"), ("scaling.factor", "scale_linear")
    factor = next((number(keys, key, 1.0) for key in factors if keys.get(key)), 1.0)
    if factor == 1.0 or kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    return rope | _read_yarn(keys, factor, frame) if kind == "yarn" else rope


def number(keys: Mapping[str, Any], key: str, default: float, above: float = 0) -> float:
    """A number of the GGUF's, above a bound (at 1 a logarithm of it is 0, and what is divided by that infinite)."""
    value = shortest_float(keys.get(key, default))
    if value <= above:
        raise QmicaError(f"the GGUF has rope.{key} = {value:g}: it is broken; download it again")
    return value


# ---- linear


def _write_linear(rope: Rope) -> list[Row]:
    return [
        ("rope.scaling.type", STRING, rope["rope_type"]),
        ("rope.scaling.factor", F32, float(rope["factor"])),
    ]


# ---- yarn


def yarn_attention(factor: float) -> float:
    """YaRN's own attention factor, 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _read_yarn(keys: Mapping[str, Any], factor: float, frame: Frame) -> Rope:
    original = int(number(keys, "scaling.original_context_length", frame.context, above=1))
    rope = {"original_max_position_embeddings": original}
    # llama.cpp multiplies its own 0.1 ln(factor) + 1 by attn_factor; transformers' attention_factor replaces it
    multiplier = number(keys, "scaling.attn_factor", 1.0)
    if multiplier != 1.0:
        rope["attention_factor"] = shortest_float(multiplier * yarn_attention(factor))
    return rope


def _write_yarn(rope: Rope) -> list[Row]:
    factor = float(rope["factor"])
    attention = rope.get("attention_factor")
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and scale and scale_all:
        grown = math.log(factor) if factor > 1.0 else 0.0
        attention = (0.1 * scale * grown + 1.0) / (0.1 * scale_all * grown + 1.0)
    rows = _write_linear(rope)
    rows.append(("rope.scaling.original_context_length", U32, int(rope["original_max_position_embeddings"])))
    if attention is not None:  # llama.cpp multiplies, transformers replaces
        rows.append(("rope.scaling.attn_factor", F32, attention / yarn_attention(factor)))
    return rows


# ---- llama3


def llama3_factors(rope: Rope, dims: int) -> np.ndarray:
    """What llama3 scaling divides each frequency by, (dims / 2,) float64: 1 for short waves, `factor` for long.

    Llama 3.1's formula (transformers modeling_rope_utils.py::_compute_llama3_parameters, llama.cpp
    conversion/llama.py).
    """
    wave = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    turns = rope["original_max_position_embeddings"] / wave  # of a dimension within the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def recover_llama3(factors: np.ndarray, theta: float, dims: int) -> Rope:
    """The rope_parameters whose llama3_factors are `factors` (to 1e-5, the float32 noise of llama.cpp's converter).

    Tries the settings in use (Llama 3.1: 8192, 8, 1, 4; 3.2: factor 32), then solves for others: between the plain
    and the scaled waves 1/factors is linear in the frequency, which gives the ratio of the original context and the two
    frequency factors (only ratios matter, so low_freq_factor is taken as 1).  QmicaError when nothing gives them.
    """
    if np.allclose(factors, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    factor = shortest_float(factors.max())
    for original, high in [(8192, 4.0), *_solve_llama3(factors, factor, theta, dims)]:
        rope = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        if factors.shape == (dims // 2,) and np.allclose(llama3_factors(rope, dims), factors, rtol=1e-5):
            return rope
    raise QmicaError(
        f"the GGUF's {FREQS} (largest factor {factor:g}) is no llama3 rope scaling that qmica can express: "
        "known are original context 8192 with factors 8 and 32; use the Hugging Face folder of this model"
    )


def _solve_llama3(factors: np.ndarray, factor: float, theta: float, dims: int) -> list[tuple[int, float]]:
    wave = 2 * math.pi * theta ** (np.arange(0, dims, 2) / dims)
    between = (factors > 1.0 + 1e-5) & (factors < factor * (1.0 - 1e-5))
    if factors.shape != wave.shape or between.sum() < 2:
        return []
    smooth = (1.0 / factors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
    slope, offset = np.polyfit(1.0 / wave[between], smooth, 1)  # smooth = (original / wave - 1) / (high - 1)
    if offset >= 0.0:
        return []
    return [(round(-slope / offset), float(round(1.0 - 1.0 / offset, 3)))]


# ---- longrope


def longrope_attention(factor: float, original: int) -> float:
    """LongRoPE's attention factor, sqrt(1 + ln(factor) / ln(original context)) (arXiv 2402.13753; transformers
    _compute_longrope_parameters, llama.cpp conversion/phi.py)."""
    return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0


def _write_longrope(rope: Rope) -> list[Row]:
    """Without the original context, which every phi3 GGUF says (a hyper-parameter of its row)."""
    own = longrope_attention(rope["factor"], rope["original_max_position_embeddings"])
    return [("rope.scaling.attn_factor", F32, rope.get("attention_factor") or own)]


def _longrope_tensors(rope: Rope, frame: Frame) -> dict[str, np.ndarray]:
    """One factor a frequency: for contexts beyond the original one, and within it."""
    wrong = [name for name in ("long_factor", "short_factor") if len(rope.get(name) or ()) != frame.dims // 2]
    if wrong:
        raise QmicaError(
            f"config.json's {wrong[0]} has {len(rope.get(wrong[0]) or ())} factors and {frame.dims // 2} frequencies "
            "rotate: it is not complete; download it again"
        )
    return {LONG: rope["long_factor"], SHORT: rope["short_factor"]}


def _read_longrope(keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray], frame: Frame) -> Rope:
    short = tensors.get(SHORT)
    if short is None or {short.shape, tensors[LONG].shape} != {(frame.dims // 2,)}:
        raise QmicaError(
            f"the GGUF's {LONG} and {SHORT} must both hold {frame.dims // 2} numbers: it is broken; download it again"
        )
    original = int(number(keys, "scaling.original_context_length", frame.context, above=1))
    factor = frame.context / original
    rope = {
        "original_max_position_embeddings": original,
        "factor": factor,
        "long_factor": [shortest_float(float(one)) for one in tensors[LONG]],
        "short_factor": [shortest_float(float(one)) for one in short],
    }
    attention = number(keys, "scaling.attn_factor", 1.0)
    own = math.isclose(attention, longrope_attention(factor, original), rel_tol=1e-6)
    return rope if own else rope | {"attention_factor": attention}


SCALINGS = {
    "default": Scaling(),
    "linear": Scaling(rows=_write_linear),
    "yarn": Scaling(rows=_write_yarn),
    "llama3": Scaling(tensors=lambda rope, frame: {FREQS: llama3_factors(rope, frame.dims)}, names=(FREQS,)),
    "longrope": Scaling(rows=_write_longrope, tensors=_longrope_tensors, names=(LONG, SHORT)),
}
