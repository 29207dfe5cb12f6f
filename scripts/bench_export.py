"""An export of a random model against the time that ggml needs for the quantization alone, and the memory it takes.

    python scripts/bench_export.py                                     # 0.4 billion weights, made for it
    python scripts/bench_export.py --model /tmp/seven --every 16       # a folder of random_model.py's
    python scripts/bench_export.py --quant Q4_K_M,Q8_0 --pairs 3

An adapter of random coefficients on every linear is exported by `qmica.export` in a process of its own: wall and
CPU-seconds from the call to the renamed file, and the peak of its anonymous memory (RssAnon, every 5 ms) above what the
imports take. Before and after each export the same blocks of rows are packed by ggml's C alone, on as many threads:
reading and merging them is not counted there, nor writing. With `--every N` only each N-th block is, and the time
scaled by the weights of each type. On a machine shared with others the ratio of CPU-seconds says more than that of the
clock. A small model's ratio also holds the start: imports and the tokenizer, 3 to 5 s.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import numpy as np
import torch
from random_model import PRESETS, write_model
from safetensors.torch import save_file

from qmica import architectures, exporting, ggml, merging, source, tokenizer
from qmica.config import ExportConfig
from qmica.durable import size_text
from qmica.source import CONFIG, SMALL
from qmica.survival import Survival

LIMIT, MEMORY = 1.2, 2.5e9  # of the time of the quantization alone; bytes of anonymous memory above the imports
CHUNK = 1 << 20  # weights a call of ggml's C
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16}
SMALL_MODEL = {**PRESETS["llama2-7b"], **SIZES, "num_key_value_heads": 4, "vocab_size": 49152}


# ---- what is exported


def make_base(model: Path | None, folder: Path) -> Path:
    """A folder with weights, config and a tokenizer: SmolLM2's, where the model has none."""
    words = folder / "tokenizer"
    tokenizer.load(source.resolve("smollm2-135m", say=lambda line: None)).save_pretrained(words)
    base = folder / "base"
    if model is None:
        write_model(SMALL_MODEL, base, tokenizer=words)
        return base
    base.mkdir()
    for file in [*model.iterdir(), *(words / name for name in SMALL if name != CONFIG)]:
        if file.is_file() and not (base / file.name).exists():
            (base / file.name).symlink_to(file.resolve())
    return base


def make_run(base: Path, folder: Path, rank: int = 16) -> Path:
    """PEFT's pair of files with random A and B for every linear of the layers; nothing was trained."""
    folder.mkdir()
    config = json.loads((base / CONFIG).read_text())
    family = architectures.for_config(config)
    weights = merging.open_weights(source.resolve(str(base)))
    linears = [name for name in family.tensor_names(config) if ".layers." in name and len(weights[name].shape) == 2]
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name in linears:
        rows, columns = weights[name].shape
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.randn(shape, generator=generator) * 0.01
            tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    named = sorted({name.split(".")[-2] for name in linears})
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "target_modules": named,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**said, "r": rank, "lora_alpha": 2 * rank}))
    return folder


# ---- the two sides


def quantized_alone(run: Path, config: ExportConfig, every: int) -> tuple[float, float]:
    """Seconds and CPU-seconds of ggml's C for all blocks of every file."""
    opened = merging.open_run(str(run))
    seconds, used = defaultdict(float), defaultdict(float)
    seen, whole, blocks = defaultdict(int), defaultdict(int), 0
    with ThreadPoolExecutor(config.threads) as pool:
        for plan in exporting._plan_models(opened, config, merging.Rounding(), Survival()):
            for tensor in plan.tensors:
                if tensor.copied or tensor.type == ggml.T.F32:
                    continue
                whole[tensor.type] += int(np.prod(tensor.shape))
                for block in tensor.blocks():
                    blocks += 1
                    if blocks % every == 0 or tensor.type not in seen:
                        began, cpu = time.perf_counter(), time.process_time()
                        _pack(pool, block, tensor.type)
                        seconds[tensor.type] += time.perf_counter() - began
                        used[tensor.type] += time.process_time() - cpu
                        seen[tensor.type] += block.size
    for kind in sorted(seen, key=lambda kind: kind.name):
        print(
            f"  {kind.name}: {seen[kind] / seconds[kind] / 1e6:.1f} million weights/s, {whole[kind] / 1e6:.0f} million"
        )
    return tuple(sum(times[kind] * whole[kind] / seen[kind] for kind in seen) for times in (seconds, used))


def _pack(pool: ThreadPoolExecutor, rows: np.ndarray, kind: ggml.T) -> None:
    out = np.empty((len(rows), ggml.row_bytes(rows.shape[1], kind)), np.uint8)
    step, function = max(CHUNK // rows.shape[1], 1), ggml._quantize_chunk()

    def one(start: int) -> None:
        part, place = rows[start : start + step], out[start : start + step]
        function(kind, part.ctypes.data, place.ctypes.data, 0, *part.shape, None)

    list(pool.map(one, range(0, len(rows), step)))


def exported(run: Path, out: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Seconds, CPU-seconds, bytes of anonymous memory, bytes written: of an export in a process of its own."""
    command = [sys.executable, __file__, "--child", run, out, "--quant", flags.quant, "--threads", str(flags.threads)]
    environment = {**os.environ, "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(run: Path, out: Path, config: ExportConfig) -> None:
    """Export and print one line of JSON."""
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, cpu = time.perf_counter(), _cpu()
    files = exporting.export(str(run), config)
    found = {"seconds": time.perf_counter() - began, "cpu": _cpu() - cpu}
    done.set()
    watcher.join()
    written = sum(file.stat().st_size for file in (files if isinstance(files, list) else [files]))
    print(json.dumps({**found, "memory": peak - before, "written": written}))


def _anonymous() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of random_model.py's, in place of a small one")
    parser.add_argument("--quant", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="each so many blocks are quantized alone")
    parser.add_argument("--work", type=Path, help="where the files go for a while (the system's temporary folder)")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        run, out = flags.child
        config = ExportConfig(quant=flags.quant, threads=flags.threads, out=out)
        return child(run, out, config)
    with tempfile.TemporaryDirectory(dir=flags.work) as place:
        base = make_base(flags.model, Path(place))
        compare(make_run(base, Path(place) / "run"), Path(place), flags)


def compare(run: Path, place: Path, flags: argparse.Namespace) -> None:
    """Each export between two quantizations alone, whose mean it is compared with; the medians of the ratios."""
    config = ExportConfig(quant=flags.quant, threads=flags.threads)
    out = place / ("out" if len(config.quants) > 1 else "out.gguf")
    before, pairs = quantized_alone(run, config, flags.every), []
    for _ in range(flags.pairs):
        found, after = exported(run, out, flags), quantized_alone(run, config, flags.every)
        alone = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
        sizes = f"{size_text(found['memory'])} of memory, {size_text(found['written'])} written"
        print(f"quantization alone {before[0]:.1f} and {after[0]:.1f} s, {before[1]:.1f} and {after[1]:.1f} CPU-s; "
              f"export {found['seconds']:.1f} s, {found['cpu']:.1f} CPU-s, {sizes}", flush=True)  # fmt: skip
        pairs.append((*alone, found))
        before = after
    wall = statistics.median(found["seconds"] / seconds for seconds, _, found in pairs)
    cpu = statistics.median(found["cpu"] / used for _, used, found in pairs)
    memory = max(found["memory"] for _, _, found in pairs)
    ratios = f"x {wall:.2f} by the clock, x {cpu:.2f} in CPU-seconds (aim {LIMIT})"
    print(f"{flags.quant}, {flags.threads} threads: {ratios}; {size_text(memory)} of memory (aim {size_text(MEMORY)})")


if __name__ == "__main__":
    main()
