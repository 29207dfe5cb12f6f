"""Models whose tensors have names and shapes only, of every family, and what llama-quantize chose for each of them.

`mix_types.json` beside this file holds, for each model and each type, without an importance matrix and with one, the
number of a line of its tables: llama-quantize's own choice for every matrix of the model. It was written by

    python tests/mix_models.py path/to/llama-quantize

which writes each model as a GGUF without data (a sparse file) and reads what `llama-quantize --dry-run` prints, with an
importance matrix and without. llama-quantize is built from llama.cpp's source, at the version that the file names:
`cmake -DLLAMA_CURL=OFF -DGGML_NATIVE=OFF … && ninja llama-quantize`.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

VERSION = "llama-quantize --dry-run of llama.cpp at 0c1e57098bba (in the source package of llama-cpp-python 0.3.36)"
RECORDED = Path(__file__).with_name("mix_types.json")
QUANTS = (
    *("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M"),
    *("Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


class Model(NamedTuple):
    architecture: str
    layers: int
    queries: int  # per key-value head
    tied: bool
    width: int = 512
    inner: int = 768

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        return f"{self.architecture}, {self.layers} layers, {self.queries} q, {head}, {self.width} x {self.inner}"


# tensors of a layer beside the linears, and what stands in their place
NORMS = {
    "llama": ("attn_norm", "ffn_norm"),
    "qwen2": ("attn_norm", "ffn_norm"),
    "qwen3": ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
    "gemma2": ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"),
    "gemma3": ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
    "phi3": ("attn_norm", "ffn_norm"),
    "granite": ("attn_norm", "ffn_norm"),
    "olmo2": ("post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"),
    "smollm3": ("attn_norm", "ffn_norm"),
}
TIED = ("gemma2", "gemma3")  # always
LAYERS = (2, 8, 26, 32, 80)

# every family, tied and not, grouped and not; odd widths; numbers of layers around the eighths and sixteenths
_ALL = [
    *(
        Model(architecture, layers, queries, tied)
        for architecture in NORMS
        for layers, (queries, tied) in zip(
            LAYERS, itertools.cycle([(1, False), (4, True), (8, False), (2, True), (4, False)]), strict=False
        )
        if tied or architecture not in TIED
    ),
    *(Model(name, layers, 4, True) for name in TIED for layers in LAYERS),
    *(Model("llama", layers, 1, False) for layers in (1, 7, 9, 15, 16, 17, 24, 80)),
    *(Model("llama", 80, 8, tied) for tied in (False, True)),
    *(Model("qwen2", 80, queries, False) for queries in (1, 8)),
    *(Model("phi3", layers, 1, False) for layers in (32, 40, 80)),
    *(Model(name, 30, 3, True, 576, 1536) for name in ("llama", "phi3")),  # fallbacks; blocks of 32 only in some
    Model("qwen2", 24, 7, True, 896, 4864),
    Model("llama", 16, 2, False, 320, 1000),  # rows of no whole block of 32 either
    Model("gemma3", 26, 4, True, 1152, 6912),
]
MODELS = list(dict.fromkeys(_ALL))
VOCABULARY, HEAD = 1024, 64


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """GGUF tensor name -> shape in torch's order."""
    width, inner, keys = model.width, model.inner, model.width // model.queries
    if model.architecture == "phi3":
        linears = {"attn_qkv": (width + 2 * keys, width), "ffn_up": (2 * inner, width)}
    else:
        linears = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width)}
        linears |= {"ffn_gate": (inner, width), "ffn_up": (inner, width)}
    linears |= {"attn_output": (width, width), "ffn_down": (width, inner)}
    found = {"token_embd.weight": (VOCABULARY, width), "output_norm.weight": (width,)}
    found |= {} if model.tied else {"output.weight": (VOCABULARY, width)}
    found |= {"rope_freqs.weight": (HEAD // 2,)} if model.architecture == "llama" else {}
    for layer in range(model.layers):
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in linears.items()}
        found |= {f"blk.{layer}.{name}.weight": (width,) for name in NORMS[model.architecture]}
        if model.architecture == "qwen2":
            found |= {f"blk.{layer}.attn_{one}.bias": linears[f"attn_{one}"][:1] for one in "qkv"}
    return found


def spelled(types: dict[str, str]) -> str:
    """Types by tensor name as one line: those of matrices, each role's over the layers as `type*layers`."""
    roles: dict[str, list[str]] = {}
    numbered = sorted(types.items(), key=lambda item: int((re.findall(r"\d+", item[0]) or [0])[0]))
    for name, kind in numbered:
        roles.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", name), []).append(kind)
    runs = {role: [(kind, len(list(group))) for kind, group in itertools.groupby(k)] for role, k in roles.items()}
    return "; ".join(
        f"{role} {' '.join(f'{kind}*{count}' for kind, count in found)}" for role, found in sorted(runs.items())
    )


# ---- recording


def _write(model: Model, path: Path) -> None:
    """The model as a GGUF of F32 zeros that take no place on the disk."""
    writer = gguf.GGUFWriter(path, model.architecture)
    numbers = {
        "context_length": 512,
        "embedding_length": model.width,
        "block_count": model.layers,
        "feed_forward_length": model.inner,
        "attention.head_count": 2 * model.queries,
        "attention.head_count_kv": 2,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.sliding_window": 64,
        "rope.dimension_count": HEAD,
        "vocab_size": VOCABULARY,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{model.architecture}.{key}", value)
    for key in ("attention.layer_norm_rms_epsilon", "logit_scale"):
        writer.add_float32(f"{model.architecture}.{key}", 1e-5)
    for name, shape in shapes(model).items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    size = writer.fout[0].tell() + sum(-(-4 * int(np.prod(shape)) // 32) * 32 for shape in shapes(model).values())
    writer.close()
    os.truncate(path, size)


def write_imatrix(path: Path, columns: dict[str, np.ndarray], count: int | list[int] = 7) -> Path:
    """An importance matrix as llama-imatrix writes it: sums and counts of each tensor's means (tools/imatrix)."""
    counts = np.array(count, np.float32).reshape(-1)
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()  # it has no architecture
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in columns.items():
        sums = np.asarray(values, np.float32) * max(counts[0], np.float32(1))
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +\w+, size = .*? -> .*?\((\w+)\)\s*$", re.MULTILINE)


def _asked(program: str, file: Path, quant: str, importance: Path | None) -> str:
    """What llama-quantize would do."""
    flags = ["--imatrix", importance] if importance else []
    done = subprocess.run([program, *flags, "--dry-run", file, quant], capture_output=True, text=True, check=True)
    return spelled({name: kind.upper() for name, kind in _LINE.findall(done.stdout + done.stderr)})


def _record(program: str) -> None:
    tables: dict[str, int] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file, importance = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
        write_imatrix(importance, {"blk.0.ffn_down.weight": np.ones(256)})
        for model in MODELS:
            _write(model, file)
            chosen = [[_asked(program, file, quant, one) for quant in QUANTS] for one in (None, importance)]
            numbers = [[tables.setdefault(table, len(tables)) for table in side] for side in chosen]
            rows.append(f"{json.dumps(str(model))}: {json.dumps(numbers, separators=(',', ':'))}")
            print(model, len(tables), flush=True)
    lines = ",\n".join(map(json.dumps, tables)), ",\n".join(rows)
    head = f'{{"by": {json.dumps(VERSION)},\n"types": {json.dumps(QUANTS)}'
    RECORDED.write_text(f'{head},\n"tables": [\n{lines[0]}\n],\n"models": {{\n{lines[1]}\n}}}}\n')


if __name__ == "__main__":
    _record(sys.argv[1])
