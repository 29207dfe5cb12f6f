"""A GGUF's blocks: ggml's C and torch unpack what gguf's numpy code does, bit for bit, wherever the rows stand."""

import gguf
import numpy as np
import pytest
import torch

from qmica import ggml, llamacpp, unpacking
from qmica.errors import QmicaError
from qmica.unpacking import PLAIN, Blocks

T = gguf.GGMLQuantizationType
ROWS, COLUMNS = 24, 512


def packed(type: T, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> torch.Tensor:
    """Noise as blocks: a byte that can be the upper half of an infinite fp16 scale has a bit less."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // block * size), np.uint8)
    return torch.from_numpy(np.where(raw & 0x7C == 0x7C, raw & 0xBF, raw))


def oracle(raw: torch.Tensor, type: T) -> torch.Tensor:
    if type == T.BF16:
        return torch.from_numpy(raw.numpy().view(np.uint16).astype(np.uint32) << 16).view(torch.float32)
    return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), type).astype(np.float32))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def without_ggml(monkeypatch):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    monkeypatch.delenv("QMICA_GGML", raising=False)
    ggml.unpacked_by_ggml.cache_clear()
    yield
    ggml.unpacked_by_ggml.cache_clear()


# ---- values


@pytest.mark.parametrize("type", unpacking.READABLE, ids=lambda type: type.name)
def test_unpacked_as_gguf_does(type):
    """By ggml's C, which is what runs here."""
    assert type in PLAIN or ggml.unpacked_by_ggml(type) is not None
    expected = oracle(packed(type), type)
    assert expected.isfinite().float().mean() > 0.9 and expected.unique().numel() > 100
    same(unpacking.unpack(packed(type), type), expected)


@pytest.mark.parametrize("type", unpacking.BLOCKS, ids=lambda type: type.name)
def test_torch_unpacks_the_same(type):
    """What a GPU runs: transformers' code, and that of the types which it has not."""
    same(unpacking.in_torch(packed(type), type), oracle(packed(type), type))


@pytest.mark.parametrize("type", unpacking.BLOCKS, ids=lambda type: type.name)
def test_without_the_library_it_is_the_same(without_ggml, type):
    assert ggml.unpacked_by_ggml(type) is None
    same(unpacking.unpack(packed(type), type), oracle(packed(type), type))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type", [T.Q4_K, T.Q8_0, T.F32, T.BF16], ids=lambda type: type.name)
def test_another_dtype_is_rounded_once(type, dtype):
    same(unpacking.unpack(packed(type), type, dtype), oracle(packed(type), type).to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 1030])
def test_threads_share_the_rows(threads, rows):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        raw = packed(T.Q6_K, rows)
        same(unpacking.unpack(raw, T.Q6_K), oracle(raw, T.Q6_K))
    finally:
        torch.set_num_threads(before)


def test_plain_types_need_not_be_aligned():
    raw = packed(T.F32, 4, 8).reshape(-1)
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), raw])[1:].view(4, -1)
    assert moved.data_ptr() % 4
    same(unpacking.unpack(moved, T.F32), oracle(raw.view(4, -1), T.F32))


# ---- rows


@pytest.mark.parametrize("type", [T.Q4_K, T.Q5_0, T.F16], ids=lambda type: type.name)
@pytest.mark.parametrize("moved", [True, False])
def test_rows_stand_where_the_order_says(type, moved):
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)) if moved else None
    blocks, whole = Blocks(packed(type), type, order), oracle(packed(type), type)
    expected = whole if order is None else whole[order]
    assert blocks.shape == (ROWS, COLUMNS)
    same(blocks.rows(0, ROWS), expected)
    same(blocks.rows(5, 9), expected[5:9])
    same(blocks.rows(7, 7), expected[7:7])
    ids = torch.tensor([[3, 0, 3], [ROWS - 1, 8, 2]])
    same(blocks.pick(ids), expected[ids])


# ---- what is refused


def test_a_type_that_is_not_known_is_named():
    unpacking.require_readable([("a.weight", "Q4_K"), ("b.weight", "F32")])
    with pytest.raises(QmicaError, match=r"^--bits gguf: b.weight is TQ1_0, and blocks are unpacked of F32, .*: use "):
        unpacking.require_readable([("a.weight", "Q4_K"), ("b.weight", "TQ1_0")])


def test_a_transformers_without_the_code_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.dequant", None)
    same(unpacking.in_torch(packed(T.Q5_1), T.Q5_1), oracle(packed(T.Q5_1), T.Q5_1))
    with pytest.raises(QmicaError, match=r"^--bits gguf: this transformers has no code to unpack Q4_K on a GPU: pip"):
        unpacking.in_torch(packed(T.Q4_K), T.Q4_K)


@pytest.mark.gpu
@pytest.mark.parametrize("type", unpacking.READABLE, ids=lambda type: type.name)
def test_on_a_gpu(monkeypatch, type):
    monkeypatch.setattr(unpacking, "GPU_CHUNK", 5 * COLUMNS)
    same(unpacking.unpack(packed(type).cuda(), type).cpu(), oracle(packed(type), type))
