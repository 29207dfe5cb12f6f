"""Block formats against ggml's C, and type mixes against what llama-quantize's own files hold."""

import ctypes
import ctypes.util
import json
import re
from collections import Counter

import gguf
import mix_models
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from qmica import ggml, llamacpp
from qmica.errors import QmicaError

needs_ggml = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")
WRITABLE = sorted(ggml.PACKED_BY_NUMPY | ggml.PACKED_BY_GGML)
RELATIVE_ERROR = {  # of a round trip of normal weights, measured: mean over 5 seeds, rounded up by a tenth
    "F32": 0, "F16": 2.6e-4, "BF16": 2e-3, "Q8_0": 6e-3, "Q4_0": 0.1, "Q4_1": 0.09, "Q5_0": 0.05, "Q5_1": 0.045,
    "Q2_K": 0.33, "Q3_K": 0.19, "Q4_K": 0.085, "Q5_K": 0.043, "Q6_K": 0.022, "IQ4_NL": 0.084, "IQ4_XS": 0.084,
}  # fmt: skip


def weights(rows=24, columns=512, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def packed_by_c(rows: np.ndarray, type: T, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml_quantize_chunk in one call."""
    out = np.zeros((len(rows), rows.shape[1] // GGML_QUANT_SIZES[type][0] * GGML_QUANT_SIZES[type][1]), np.uint8)
    function = ctypes.CDLL(llamacpp._extension()).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weights = None if importance is None else importance.ctypes.data
    assert function(type, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights) == out.nbytes
    return out


class Traits(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def unpacked_by_c(raw: np.ndarray, type: T, columns: int) -> np.ndarray:
    traits = ctypes.CDLL(llamacpp._extension()).ggml_get_type_traits
    traits.restype = ctypes.POINTER(Traits)
    out = np.empty((len(raw), columns), np.float32)
    traits(int(type)).contents.to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out


@needs_ggml
@pytest.mark.parametrize("type", WRITABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("chunk", [ggml._CHUNK, 3 * 512], ids=["whole", "chunks"])
def test_bytes_are_those_of_ggml(type, chunk, monkeypatch):
    monkeypatch.setattr(ggml, "_CHUNK", chunk)
    rows = weights()
    rows[3] = 0  # an all-zero row, and an outlier
    rows[4, 7] = 300
    ours = ggml.quantize(rows, type, threads=3)
    assert ours.dtype == np.uint8 and ours.shape == (24, ggml.row_bytes(512, type))
    theirs = rows.view(np.uint8) if type == T.F32 else packed_by_c(rows, type)
    assert np.array_equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.size} bytes differ"


@needs_ggml
@pytest.mark.parametrize("type", [t for t in WRITABLE if t != T.F32], ids=lambda t: t.name)
def test_bytes_with_an_importance_matrix_are_those_of_ggml(type, monkeypatch):
    monkeypatch.setattr(ggml, "_CHUNK", 3 * 512)
    rows, importance = weights(), np.random.default_rng(1).random(512).astype(np.float32) ** 4
    ours = ggml.quantize(rows, type, threads=3, importance=importance)
    theirs = packed_by_c(rows, type, importance)
    assert np.array_equal(ours, theirs), f"{(ours != theirs).sum()} of {ours.size} bytes differ"
    plain = ggml.quantize(rows, type)
    if type not in ggml.WEIGHABLE:
        assert np.array_equal(ours, plain)
        return

    def error(packed: np.ndarray) -> float:
        return float(np.sqrt((importance * (ggml.dequantize(packed, type) - rows) ** 2).sum()))

    gain = error(ours) / error(plain)  # measured: 0.72 (Q2_K) to 0.89 (IQ4_NL)
    assert gain < 0.95, f"{type.name}: {gain:.3f} of the weighted error"


@needs_ggml
def test_an_importance_of_other_columns_is_never_read_by_c():
    for type in ggml.WEIGHABLE:
        with pytest.raises(ValueError, match=r"an importance of \(256,\) for rows of 512"):
            ggml.quantize(weights(), type, importance=np.ones(256, np.float32))


@needs_ggml
@pytest.mark.parametrize("type", [t for t in WRITABLE if t != T.F32], ids=lambda t: t.name)
def test_numbers_are_those_of_ggml(type, monkeypatch):
    monkeypatch.setattr(ggml, "_CHUNK", 5 * 512)
    raw = packed_by_c(weights(), type)
    np.testing.assert_array_equal(ggml.dequantize(raw, type), unpacked_by_c(raw, type, 512))


@pytest.mark.parametrize("type", WRITABLE, ids=lambda t: t.name)
def test_round_trip(type):
    if type in ggml.PACKED_BY_GGML and not llamacpp.available():
        pytest.skip("xllamacpp is not installed")
    errors = []
    for seed in range(5):
        rows = weights(seed=seed)
        back = ggml.dequantize(ggml.quantize(rows, type), type)
        errors.append(float(np.linalg.norm(back - rows) / np.linalg.norm(rows)))
    limit = RELATIVE_ERROR[type.name]
    assert 0.6 * limit <= np.mean(errors) <= limit, f"{type.name}: {np.mean(errors):.2e} against {limit}"


def test_every_type_that_gguf_dequantizes_is_read():
    for type in gguf.quants._type_traits:
        _, block_bytes = GGML_QUANT_SIZES[type]
        raw = np.random.default_rng(0).integers(0, 60, (3, block_bytes), np.uint8)
        assert np.array_equal(ggml.dequantize(raw, type), gguf.quants.dequantize(raw, type), equal_nan=True), type.name


def test_a_row_of_no_whole_blocks():
    assert ggml.row_bytes(576, T.Q5_0) == 18 * 22 and ggml.row_bytes(7, T.F16) == 14
    with pytest.raises(QmicaError, match="a row of 576 weights is no multiple of Q4_K's block of 256"):
        ggml.row_bytes(576, T.Q4_K)
    with pytest.raises(QmicaError, match="no multiple of Q8_0's block of 32"):
        ggml.quantize(weights(2, 33), T.Q8_0)


def test_weights_that_are_no_numbers_are_refused():
    rows = weights(2, 32)
    rows[1, 1] = 70000
    with pytest.raises(QmicaError, match="above 65504, the largest F16 number"):
        ggml.quantize(rows, T.F16)
    assert ggml.dequantize(ggml.quantize(rows, T.BF16), T.BF16)[1, 1] == pytest.approx(70000, rel=4e-3)
    for type in (T.F32, T.BF16, T.Q8_0, T.Q4_0):
        rows[1, 1] = np.nan
        with pytest.raises(QmicaError, match=f"written as {type.name} is NaN or infinite"):
            ggml.quantize(rows, type)


@needs_ggml
@pytest.mark.parametrize("type", [t for t in WRITABLE if t not in (T.F32, T.BF16)], ids=lambda t: t.name)
def test_weights_too_large_for_a_types_scales_are_refused_as_by_ggml(type):
    """ggml_validate_row_data, by which llama-quantize refuses, on the same bytes."""
    validate = ctypes.CDLL(llamacpp._extension()).ggml_validate_row_data
    validate.restype, validate.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    for size, importance in ((1, None), (100, None), (1e9, None), (1, np.full(512, 1e36, np.float32))):
        rows = weights() * np.float32(size)
        with np.errstate(over="ignore"):
            packed = packed_by_c(rows, type, importance)
        said = True
        try:
            ours = ggml.quantize(rows, type, importance=importance)
            assert np.array_equal(ours, packed)
        except QmicaError as error:
            assert re.fullmatch(rf"a weight to be written as {type.name} .* above 65504.*: use BF16", str(error))
            said = False
        assert said == validate(int(type), packed.ctypes.data, packed.nbytes), size
        assert said or size > 100 or importance is not None


@needs_ggml
def test_k_quants_refuse_what_is_no_number():
    rows = weights(2, 256)
    rows[0, 0] = np.inf
    with pytest.raises(QmicaError, match="written as Q4_K is NaN or infinite"):
        ggml.quantize(rows, T.Q4_K)


def test_types_that_cannot_be_written_or_read():
    with pytest.raises(QmicaError, match="IQ3_S cannot be written: choose one of BF16, F16, F32, IQ4_NL, IQ4_XS, Q2_K"):
        ggml.require_writable([T.F16, T.IQ3_S])
    with pytest.raises(QmicaError, match="I32 weights cannot be read"):
        ggml.dequantize(np.zeros((1, 4), np.uint8), T.I32)


def test_k_quants_without_the_library_name_the_extra(monkeypatch):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    monkeypatch.delenv("QMICA_GGML", raising=False)
    with pytest.raises(QmicaError, match=r"pip install 'qmica\[llamacpp\]'.*QMICA_GGML"):
        ggml.quantize(weights(1, 256), T.Q4_K)
    ggml.require_writable(ggml.PACKED_BY_NUMPY)
    ggml.require_writable([T.Q8_0, T.F16], weighted=True)
    with pytest.raises(QmicaError, match="xllamacpp is not installed"):
        ggml.require_writable([T.Q4_0], weighted=True)
    with pytest.raises(QmicaError, match="xllamacpp is not installed"):
        ggml.require_writable([T.F16, T.Q6_K])


@needs_ggml
def test_another_library_can_be_named(monkeypatch, tmp_path):
    path = llamacpp._extension()
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    monkeypatch.setenv("QMICA_GGML", path)
    assert ggml.quantize(weights(1, 256), T.Q6_K).shape == (1, 210)
    monkeypatch.setenv("QMICA_GGML", str(tmp_path / "libnone.so"))
    with pytest.raises(QmicaError, match=r"libnone.so cannot be loaded .*: correct or unset QMICA_GGML"):
        ggml.quantize(weights(1, 256), T.Q6_K)
    monkeypatch.setenv("QMICA_GGML", ctypes.util.find_library("m") or "libm.so.6")
    with pytest.raises(QmicaError, match="does not export ggml_quantize_chunk"):
        ggml.quantize(weights(1, 256), T.Q6_K)


# ---- mixes


def shapes(layers, width, inner, queries=1, vocabulary=1024, tied=False, biases=False):
    """The tensors of a dense llama or qwen2 model, shapes in torch's order."""
    block = {
        "attn_norm": (width,),
        "ffn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width // queries, width),
        "attn_v": (width // queries, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    found = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    found |= {} if tied else {"output.weight": (vocabulary, width)}
    for i in range(layers):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        if biases:
            found |= {f"blk.{i}.attn_{p}.bias": block[f"attn_{p}"][:1] for p in "qkv"}
    return found


LLAMA_7B = {"layers": 32, "width": 4096, "inner": 11008}
QWEN_7B = {"layers": 28, "width": 3584, "inner": 18944, "queries": 7, "biases": True}
QWEN_05B = {"layers": 24, "width": 896, "inner": 4864, "queries": 7, "biases": True, "tied": True}
SMOLLM = {"layers": 30, "width": 576, "inner": 1536, "queries": 3, "tied": True}

# What llama.cpp printed ("- type q4_K: 193 tensors") of files that llama-quantize had made; Qwen2.5-0.5B: ollama #9031
CENSUS = [
    ("Q4_K_M", LLAMA_7B, {"F32": 65, "Q4_K": 193, "Q6_K": 33}),
    ("Q5_K_M", LLAMA_7B, {"F32": 65, "Q5_K": 193, "Q6_K": 33}),
    ("Q3_K_M", LLAMA_7B, {"F32": 65, "Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1}),
    ("Q3_K_L", LLAMA_7B, {"F32": 65, "Q3_K": 129, "Q5_K": 96, "Q6_K": 1}),
    ("Q6_K", LLAMA_7B, {"F32": 65, "Q6_K": 226}),
    ("Q4_K_M", QWEN_7B, {"F32": 141, "Q4_K": 169, "Q6_K": 29}),
    ("Q4_K_M", QWEN_05B, {"F32": 121, "Q5_0": 132, "Q8_0": 13, "Q4_K": 12, "Q6_K": 12}),
]


@pytest.mark.parametrize(("quant", "model", "expected"), CENSUS, ids=lambda v: v if isinstance(v, str) else "")
def test_mixes_are_those_of_files_in_the_field(quant, model, expected):
    assert Counter(t.name for t in ggml.mix(quant, shapes(**model)).values()) == expected


def chosen(quant, name, architecture="llama", **model):
    types = ggml.mix(quant, shapes(**model), architecture)
    return [types[f"blk.{i}.{name}.weight"].name for i in range(model["layers"])]


def test_mixes_read_from_the_source():
    """The rules no census covers, layer by layer, worked out by hand from llama-quant.cpp."""
    small = {"layers": 16, "width": 512, "inner": 1024}
    assert chosen("Q4_K_S", "attn_v", **small) == ["Q5_K"] * 4 + ["Q4_K"] * 12
    assert chosen("Q4_K_S", "ffn_down", **small) == ["Q5_K"] * 2 + ["Q4_K"] * 14
    assert chosen("Q4_K_S", "attn_output", **small) == ["Q4_K"] * 16
    assert chosen("Q3_K_M", "ffn_down", **small) == ["Q5_K"] + ["Q4_K"] * 15
    more = [i for i, name in enumerate(chosen("Q4_K_M", "attn_v", **small)) if name == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]
    for queries, name in ((1, "Q3_K"), (2, "Q3_K"), (4, "Q4_K"), (8, "Q4_K")):
        assert set(chosen("Q2_K", "attn_v", queries=queries, **small)) == {name}
    assert {n: set(chosen("Q2_K", n, **small)) for n in ("attn_q", "ffn_down", "attn_output")} == {
        "attn_q": {"Q2_K"}, "ffn_down": {"Q3_K"}, "attn_output": {"Q3_K"},
    }  # fmt: skip
    for quant, name in (("Q3_K_S", "Q3_K"), ("Q5_K_S", "Q5_K"), ("Q4_0", "Q4_0"), ("Q5_1", "Q5_1"), ("Q8_0", "Q8_0")):
        assert {n for r in ("attn_v", "ffn_down", "attn_output") for n in chosen(quant, r, **small)} == {name}


def differing(ours: str, theirs: str) -> str:
    """The roles whose types differ, both spelled out."""
    mine, recorded = (dict(role.split(" ", 1) for role in spelled.split("; ")) for spelled in (ours, theirs))
    roles = sorted(role for role in mine.keys() | recorded.keys() if mine.get(role) != recorded.get(role))
    return "; ".join(f"{role}: {mine.get(role)}, llama-quantize {recorded.get(role)}" for role in roles)


RECORDED = json.loads(mix_models.RECORDED.read_text())


def test_the_record_is_of_these_models_and_types():
    assert list(RECORDED["models"]) == [str(model) for model in mix_models.MODELS]
    assert {*RECORDED["types"], "F32"} == set(ggml.QUANTS)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("model", mix_models.MODELS, ids=str)
def test_mixes_are_those_of_llama_quantize(model, weighted):
    """Every tensor of every family, layer by layer, in every type."""
    shapes, wrong = mix_models.shapes(model), []
    for quant, table in zip(RECORDED["types"], RECORDED["models"][str(model)][weighted], strict=True):
        types = {name: type.name for name, type in ggml.mix(quant, shapes, model.architecture, weighted).items()}
        packed = {name: type for name, type in types.items() if type != "F32"}
        assert {name for name in shapes if len(shapes[name]) == 2} == packed.keys(), "norms and biases alone stay F32"
        ours, theirs = mix_models.spelled(packed), RECORDED["tables"][table]
        wrong += [f"{quant}: {differing(ours, theirs)}"] if ours != theirs else []
    assert not wrong, "\n".join(wrong)


def test_70b_models_keep_attn_v_finer():
    big = {"layers": 80, "width": 8192, "inner": 28672, "queries": 8}
    assert Counter(chosen("Q4_K_M", "attn_v", **big)) == {"Q5_K": 40, "Q6_K": 40}
    assert set(chosen("Q3_K_S", "attn_v", **big)) == {"Q5_K"}
    no_groups = {**big, "queries": 1}
    assert set(chosen("Q3_K_S", "attn_v", **no_groups)) == {"Q3_K"}  # Llama-1 65B
    assert set(chosen("Q3_K_S", "attn_v", "qwen2", **no_groups)) == {"Q5_K"}
    assert set(chosen("Q3_K_S", "attn_v", "qwen3", **big)) == {"Q3_K"}  # which llama.cpp has no 70B of


@pytest.mark.parametrize(
    ("quant", "tied", "untied", "embedding"),
    [
        ("Q4_K_M", "Q6_K", "Q6_K", "Q4_K"),
        ("Q2_K", "Q6_K", "Q6_K", "Q2_K"),
        ("Q6_K", "Q6_K", "Q6_K", "Q6_K"),
        ("Q4_0", "Q6_K", "Q6_K", "Q4_0"),
        ("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
        ("F16", "F16", "F16", "F16"),
        ("F32", "F32", "F32", "F32"),
    ],
)
def test_the_head_is_kept_finer_and_a_tied_embedding_is_a_head(quant, tied, untied, embedding):
    model = {"layers": 2, "width": 512, "inner": 512}
    assert ggml.mix(quant, shapes(tied=True, **model))["token_embd.weight"].name == tied
    both = ggml.mix(quant, shapes(**model))
    assert (both["output.weight"].name, both["token_embd.weight"].name) == (untied, embedding)


FALLBACKS = {
    "Q2_K": "Q4_0", "Q3_K_S": "Q4_0", "Q4_K_S": "Q5_0", "Q5_K_S": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"
}  # fmt: skip


@pytest.mark.parametrize("quant", FALLBACKS)
def test_rows_that_are_no_multiple_of_256(quant):
    types = ggml.mix(quant, shapes(**SMOLLM))
    assert types["blk.20.attn_q.weight"].name == FALLBACKS[quant]
    assert types["blk.20.ffn_down.weight"] in (ggml.QUANTS[quant].type, T.Q3_K)  # 1536 = 6 * 256
    assert types["token_embd.weight"] == T.Q8_0
    odd = ggml.mix(quant, {"blk.0.attn_q.weight": (40, 40), "output.weight": (64, 40)})
    assert set(odd.values()) == {T.F16}


@pytest.mark.parametrize("quant", ggml.QUANTS)
def test_every_mix_fits_its_rows_and_spares_norms(quant):
    for model in (SMOLLM, QWEN_05B, {"layers": 3, "width": 512, "inner": 1024, "tied": True}):
        found = shapes(biases=model is SMOLLM, **{k: v for k, v in model.items() if k != "biases"})
        types = ggml.mix(quant, {**found, "rope_freqs.weight": (32,)})
        assert list(types) == [*found, "rope_freqs.weight"]
        ggml_types = {name: type for name, type in types.items() if type != T.F32}
        for name, type in ggml_types.items():
            assert ggml.row_bytes(found[name][-1], type) > 0 and type in WRITABLE
        assert all(len(found[name]) == 2 and "norm" not in name for name in ggml_types)
        assert len(ggml_types) == (0 if quant == "F32" else 7 * model["layers"] + 1)


def test_names_of_quants():
    assert ggml.named("q4_k_m") is ggml.QUANTS["Q4_K_M"] and ggml.named("Q4_K_M").file_type == 15
    with pytest.raises(QmicaError, match=r"--quant Q4_K_XL is not known: choose one of Q2_K, Q3_K_S, .*, F32"):
        ggml.mix("Q4_K_XL", {})
