"""Importance matrices in both of llama-imatrix's formats, and files that are none."""

import struct

import gguf
import mix_models
import numpy as np
import pytest

from qmica import imatrix
from qmica.errors import QmicaError

COLUMNS = {
    "blk.0.attn_q.weight": np.linspace(0.1, 2, 64, dtype=np.float32),
    "blk.0.ffn_down.weight": np.linspace(3, 0, 96, dtype=np.float32),
}
SHAPES = {"blk.0.attn_q.weight": (32, 64), "blk.0.ffn_down.weight": (64, 96), "token_embd.weight": (100, 64)}


TRAILER = struct.pack("<ii", 3, 8) + b"wiki.txt"  # chunks, the text's name


def legacy(columns, calls=5, trailer=TRAILER) -> bytes:
    """The .dat of llama-imatrix: sums that `calls` divide (tools/imatrix/imatrix.cpp, save_imatrix_legacy)."""
    data = struct.pack("<i", len(columns))
    for name, values in columns.items():
        sums = (values * np.float32(max(calls, 1))).tobytes()
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values)) + sums
    return data + trailer


@pytest.fixture(params=["gguf", "dat"])
def file(request, tmp_path):
    path = tmp_path / f"model.imatrix.{request.param}"
    if request.param == "gguf":
        return mix_models.write_imatrix(path, COLUMNS)
    path.write_bytes(legacy(COLUMNS))
    return path


def test_both_formats_say_the_same(file):
    found = imatrix.read(file)
    assert list(found.columns) == list(COLUMNS)
    for name, values in COLUMNS.items():
        assert found.columns[name].dtype == np.float32
        np.testing.assert_allclose(found.columns[name], values, rtol=2e-7)
    assert (found.datasets, found.chunks, found.path) == (("wiki.txt",), 3, file)


def test_counts_of_nothing_weigh_every_column_the_same(tmp_path):
    file = mix_models.write_imatrix(tmp_path / "none.gguf", COLUMNS, count=0)
    assert all((values == 1).all() for values in imatrix.read(file).columns.values())
    (tmp_path / "none.dat").write_bytes(legacy(COLUMNS, calls=0, trailer=b""))
    found = imatrix.read(tmp_path / "none.dat")
    assert (found.datasets, found.chunks) == ((), 0)
    np.testing.assert_array_equal(found.columns["blk.0.ffn_down.weight"], COLUMNS["blk.0.ffn_down.weight"])


def test_what_it_covers(file):
    found = imatrix.read(file).fitted(SHAPES)
    name = file.name
    assert found.describe(list(COLUMNS)) == (
        f"--imatrix {name}: 2 of 2 tensors are weighed by it, measured on wiki.txt (3 chunks)"
    )
    more = [*COLUMNS, "output.weight", "a", "b", "c"]
    assert found.describe(more).endswith("2 of 6 tensors are weighed by it, measured on wiki.txt (3 chunks); "
                                         "output.weight, a, b and 1 more without")  # fmt: skip


def test_another_models_is_refused_by_name(file):
    with pytest.raises(QmicaError) as error:
        imatrix.read(file).fitted({**SHAPES, "blk.0.attn_q.weight": (32, 128)})
    assert str(error.value) == (
        f"--imatrix {file} is for another model: blk.0.attn_q.weight has 64 columns in it and 128 in the model; "
        "make one of this model with llama-imatrix"
    )
    with pytest.raises(QmicaError, match=r"another model: blk\.0\.ffn_down\.weight is no tensor of the model; make"):
        imatrix.read(file).fitted({"blk.0.attn_q.weight": (32, 64)})
    with pytest.raises(QmicaError, match=r"blk\.0\.attn_q\.weight is no .* blk\.0\.ffn_down\.weight is no tensor"):
        imatrix.read(file).fitted({})


def test_an_embedding_of_other_columns_is_left_out(tmp_path):
    file = mix_models.write_imatrix(tmp_path / "e.gguf", {**COLUMNS, "token_embd.weight": np.ones(100)})
    assert list(imatrix.read(file).fitted(SHAPES).columns) == list(COLUMNS)
    file = mix_models.write_imatrix(tmp_path / "f.gguf", {**COLUMNS, "token_embd.weight": np.ones(64)})
    assert "token_embd.weight" in imatrix.read(file).fitted(SHAPES).columns


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_numbers_that_no_mean_of_squares_is(tmp_path, value):
    wrong = COLUMNS["blk.0.attn_q.weight"].copy()
    wrong[7] = value
    for values in (wrong, np.zeros(64, np.float32)):
        file = mix_models.write_imatrix(tmp_path / "x.gguf", {"blk.0.attn_q.weight": values})
        with pytest.raises(QmicaError, match=r"blk\.0\.attn_q\.weight is no mean of squares"):
            imatrix.read(file)


def test_a_model_or_experts_in_place_of_an_importance_matrix(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("a.in_sum2", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QmicaError, match=r"model.gguf is not an importance matrix \(general.type is 'model'\)"):
        imatrix.read(tmp_path / "model.gguf")
    experts = mix_models.write_imatrix(tmp_path / "experts.gguf", {"blk.0.ffn_down.weight": np.ones(4)}, [1, 2])
    with pytest.raises(QmicaError, match=r"blk\.0\.ffn_down\.weight is not one row of F32 numbers with one count"):
        imatrix.read(experts)


def with_value(path, key, kind, value):
    """An importance matrix whose `key` has another value."""
    reader = gguf.GGUFReader(mix_models.write_imatrix(path.with_suffix(".whole"), COLUMNS))
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_string("general.type", "imatrix")
    writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "value"),
    [("INT32", -1), ("UINT64", 1 << 40), ("UINT32", 1 << 31), ("FLOAT32", 3.0), ("BOOL", True), ("STRING", "3")],
)
def test_a_number_of_chunks_that_none_is(tmp_path, kind, value):
    """It is written into the GGUF as a uint32."""
    file = with_value(tmp_path / "x.gguf", "imatrix.chunk_count", gguf.GGUFValueType[kind], value)
    with pytest.raises(QmicaError, match=f"x.gguf says it was measured on {value!r} chunks: a number from 0 to 2147"):
        imatrix.read(file)


def test_chunks_in_any_type_of_integer(tmp_path):
    for kind in (gguf.GGUFValueType.INT32, gguf.GGUFValueType.UINT64):
        file = with_value(tmp_path / f"{kind}.gguf", "imatrix.chunk_count", kind, (1 << 31) - 1)
        assert imatrix.read(file).chunks == (1 << 31) - 1


def test_a_dat_of_minus_one_chunks_or_calls(tmp_path):
    path = tmp_path / "x.dat"
    path.write_bytes(legacy(COLUMNS, trailer=struct.pack("<ii", -1, 0)))
    with pytest.raises(QmicaError, match="says it was measured on -1 chunks"):
        imatrix.read(path)
    path.write_bytes(legacy(COLUMNS, calls=-1))
    with pytest.raises(QmicaError, match="is no importance matrix"):
        imatrix.read(path)


@pytest.mark.parametrize("count", [np.nan, np.inf, -5.0])
def test_counts_that_none_is(tmp_path, count):
    columns = {"blk.0.attn_q.weight": COLUMNS["blk.0.attn_q.weight"]}
    file = mix_models.write_imatrix(tmp_path / "x.gguf", columns, count=count)
    with pytest.raises(QmicaError, match=rf"blk\.0\.attn_q\.weight was counted {count:g} times: make it again"):
        imatrix.read(file)


def test_broken_files_are_refused_in_one_line(tmp_path):
    """Every truncation of both formats, and counts that claim more than the file has."""
    whole = legacy(COLUMNS, trailer=b"")
    other = mix_models.write_imatrix(tmp_path / "whole.gguf", COLUMNS).read_bytes()
    broken = [whole[:at] for at in range(0, len(whole), 7)] + [other[:at] for at in range(4, len(other) - 384, 31)]
    for at, number in ((0, 3), (0, 0), (0, -1), (4, 1 << 30), (4, -5), (4 + 4 + 19 + 4, 1 << 30), (4 + 4 + 19 + 4, -1)):
        broken.append(whole[:at] + struct.pack("<i", number) + whole[at + 4 :])
    broken.append(whole.replace(b"blk.0.attn_q", b"blk.0.\xff\xfettn_q"[:12]))
    path = tmp_path / "broken"
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(QmicaError) as error:
            imatrix.read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), data[:40]
    with pytest.raises(QmicaError, match="is not a file: give the file that llama-imatrix wrote"):
        imatrix.read(tmp_path)
