"""What this machine can do: versions, devices, memory, and whether each engine really works.

How: nothing is believed because it imports. bitsandbytes quantizes a small linear and takes its gradient, so does a
linear of a GGUF's own blocks, ggml packs and unpacks Q4_K, and llama.cpp runs a GGUF of one layer that is written for
it, whose logits numpy computes as well.
Each error is compared with the one that the format has on normal noise, each check is timed and stands alone: a
broken one costs its own line and a hint.

What it gives up: speed is not measured, a check on 64 x 256 weights says nothing about memory, and an engine that kills
the process takes this report with it.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gguf
import numpy as np
import torch
from rich.console import Console

from qmica import durable, ggml, llamacpp, quant
from qmica.errors import QmicaError
from qmica.unpacking import Blocks

PACKAGES = (
    *(
        "qmica",
        "torch",
        "bitsandbytes",
        "transformers",
        "accelerate",
        "safetensors",
        "gguf",
        "xllamacpp",
        "sentencepiece",
    ),
    *("datasets", "huggingface_hub", "tokenizers", "numpy", "cyclopts", "rich", "peft", "trl"),
)
# Relative errors (Frobenius) on 64 x 256 normal weights, over 20 seeds: NF4 with double quantization 0.0909 to 0.0927,
# int8 0.0067 to 0.0071, Q4_K 0.0704 to 0.0721, Q8_0 0.0053 to 0.0054. The bounds are some 15 % around.
NF4_ERROR, INT8_ERROR, Q4_K_ERROR, Q8_0_ERROR = (0.08, 0.11), (0.0055, 0.0085), (0.061, 0.085), (0.0045, 0.0062)
OUT, COLUMNS = 64, 256


@dataclass(frozen=True)
class Check:
    """One thing to try. run(): what was seen; raises where it does not work. hint: what to do then."""

    name: str
    run: Callable[[], str]
    hint: str
    needed: bool = True


# ---- the machine


def versions() -> dict[str, str | None]:
    """Python and the packages that matter; None where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict:
    """The processor, memory, disks and GPUs. Sizes in bytes."""
    import psutil
    from huggingface_hub import constants

    memory = psutil.virtual_memory()
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_features": cpu_features(),
        "memory": {"total": memory.total, "free": memory.available},
        "disk_free": {str(place): durable.free_space(place) for place in _places(constants.HF_HUB_CACHE)},
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
    }


def _places(hub_cache: str) -> dict[Path, None]:
    return dict.fromkeys((Path(hub_cache), durable.cache_folder(), Path.cwd()))


def cpu_features() -> dict[str, bool]:
    """Which instructions this CPU has that decide what arithmetic is fast: bf16 needs AVX512-BF16 or AMX."""
    asked = {"AVX2": "avx2", "AVX512": "avx512", "AVX512-BF16": "avx512_bf16", "AMX": "amx_tile"}
    tests = {name: getattr(torch.cpu, f"_is_{feature}_supported", None) for name, feature in asked.items()}
    return {name: bool(test and test()) for name, test in tests.items()}


def _gpu(number: int) -> dict:
    found = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    return {
        "device": f"cuda:{number}",
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory": {"total": total, "free": free},
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "backend": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
    }


# ---- the engines


def checks() -> list[Check]:
    """Everything that is tried here: bitsandbytes and a GGUF's blocks on each device, ggml, llama.cpp."""
    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    reinstall = "pip install --force-reinstall bitsandbytes; training with --bits 16 does without"
    formats = {"NF4": (4, NF4_ERROR), "int8": (8, INT8_ERROR)}
    quantizers = [
        Check(
            f"bitsandbytes {name} on {device}",
            partial(_try_linear, partial(_quantized, bits), error, device),
            reinstall,
        )
        for device in devices
        for name, (bits, error) in formats.items()
    ]
    llama = f"{llamacpp.INSTALL}; without it there is no chat with a GGUF and no K-quant, but --quant Q8_0 works"
    return [
        *quantizers,
        *(
            Check(f"GGUF Q8_0 on {device}", partial(_try_linear, _blocks, Q8_0_ERROR, device), GGUF_HINT)
            for device in devices
        ),
        Check("ggml Q4_K", _try_ggml, llama, needed=llamacpp.available()),
        Check("llama.cpp (xllamacpp)", _try_llamacpp, llama, needed=llamacpp.available()),
    ]


GGUF_HINT = "pip install -U gguf transformers xllamacpp; training with other --bits than gguf does without"


def _quantized(bits: int, weight: torch.Tensor, device: torch.device) -> torch.nn.Module:
    return quant.quantize(weight.clone(), None, bits, device)


def _blocks(weight: torch.Tensor, device: torch.device) -> torch.nn.Module:
    kind = gguf.GGMLQuantizationType.Q8_0
    return quant.from_blocks(Blocks(torch.from_numpy(ggml.quantize(weight.numpy(), kind)), kind), None, device)


def _try_linear(make: Callable, bounds: tuple[float, float], device: str) -> str:
    """Quantize, dequantize, and one forward and backward, whose oracle is the dequantized weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, COLUMNS, generator=generator)
    layer = make(weight, torch.device(device))
    held = quant.dequantize(layer).cpu()
    error = _within("the weights are off by", _distance(held, weight), bounds)
    x = torch.randn(8, COLUMNS, generator=generator)
    dy = torch.randn(8, OUT, generator=generator)
    moved = x.clone().to(device).requires_grad_(True)
    y = layer(moved)
    y.backward(dy.to(device))
    _within(
        "the forward is off by", _distance(y.detach().cpu(), x @ held.T), (0, 1e-2)
    )  # measured: 2e-7 fp32, 4e-4 TF32
    _within("the gradient is off by", _distance(moved.grad.cpu(), dy @ held), (0, 1e-2))
    return f"weights within {error:.2%}, forward and gradient as computed by hand"


def _try_ggml() -> str:
    weight = np.random.default_rng(0).standard_normal((OUT, COLUMNS), np.float32)
    kind = gguf.GGMLQuantizationType.Q4_K
    held = ggml.dequantize(ggml.quantize(weight, kind), kind)
    error = _within("the weights are off by", _distance(torch.from_numpy(held), torch.from_numpy(weight)), Q4_K_ERROR)
    return f"weights within {error:.2%}"


def _try_llamacpp() -> str:
    tensors = _one_layer(np.random.default_rng(0))
    with tempfile.TemporaryDirectory(prefix="qmica-doctor-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "one-layer.gguf"
        _write_gguf(path, tensors)
        with llamacpp.Llama(path, context=CONTEXT, threads=1) as model:
            seen = model.logits([3])
    expected = _first_logits(tensors, 3)
    if seen.shape != (1, VOCABULARY):
        raise RuntimeError(f"the logits have the shape {seen.shape}, not {(1, VOCABULARY)}")
    error = _within("the logits are off by", float(np.abs(seen[0] - expected).max()), (0, 1e-4))  # measured: 1e-6
    return f"a model of one layer answers as numpy does (logits to {error:.0e})"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius distance, relative to b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def _within(what: str, value: float, bounds: tuple[float, float]) -> float:
    if not bounds[0] <= value <= bounds[1]:  # NaN too
        raise RuntimeError(f"{what} {value:.2g}, where {bounds[0]:.2g} to {bounds[1]:.2g} is right")
    return value


# ---- a llama of one layer, for llama.cpp and for numpy

CONTEXT, WIDTH, HIDDEN, HEADS, VOCABULARY, EPSILON = 512, 32, 64, 2, 32, 1e-5
_SHAPES = {
    "token_embd": (VOCABULARY, WIDTH),
    "output_norm": (WIDTH,),
    "output": (VOCABULARY, WIDTH),
    "blk.0.attn_norm": (WIDTH,),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH, WIDTH),
    "blk.0.attn_v": (WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_norm": (WIDTH,),
    "blk.0.ffn_gate": (HIDDEN, WIDTH),
    "blk.0.ffn_up": (HIDDEN, WIDTH),
    "blk.0.ffn_down": (WIDTH, HIDDEN),
}


def _one_layer(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights with outputs of size 1: a matrix is divided by the root of its columns."""
    return {
        name: (generator.standard_normal(shape) / shape[-1] ** (0.5 * (len(shape) - 1))).astype(np.float32)
        for name, shape in _SHAPES.items()
    }


def _write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {number}" for number in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _first_logits(tensors: Mapping[str, np.ndarray], token: int) -> np.ndarray:
    """The logits (vocabulary,) after one token: at position 0 the rotation is none, and attention looks at itself
    alone.
    """
    layer = {name.removeprefix("blk.0."): tensor.astype(np.float64) for name, tensor in tensors.items()}
    h = layer["token_embd"][token]
    h = h + layer["attn_output"] @ layer["attn_v"] @ _norm(h, layer["attn_norm"])
    x = _norm(h, layer["ffn_norm"])
    gate = layer["ffn_gate"] @ x
    h = h + layer["ffn_down"] @ (gate / (1 + np.exp(-gate)) * (layer["ffn_up"] @ x))
    return layer["output"] @ _norm(h, layer["output_norm"])


def _norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + EPSILON) * weight


# ---- the report


def examine() -> dict:
    """Everything found, in JSON values: `versions`, `machine`, and `checks` of {name, works, needed, seen, seconds,
    hint}.
    """
    return {"versions": versions(), "machine": machine(), "checks": [_tried(check) for check in checks()]}


def _tried(check: Check) -> dict:
    start = time.perf_counter()
    try:
        works, seen = True, check.run()
    except Exception as error:  # whatever an engine can raise is the finding
        works, seen = False, f"{type(error).__name__}: {error}" if not isinstance(error, QmicaError) else str(error)
    return {
        "name": check.name,
        "works": works,
        "needed": check.needed,
        "seen": " ".join(seen.split()),
        "seconds": round(time.perf_counter() - start, 3),
        "hint": None if works else check.hint,
    }


def require_working(found: Mapping) -> None:
    """Raise QmicaError naming every check that failed and is needed."""
    broken = [check["name"] for check in found["checks"] if check["needed"] and not check["works"]]
    if broken:
        count = f"{len(broken)} of {len(found['checks'])} checks failed"
        raise QmicaError(f"{count}: {', '.join(broken)}; the hints say what to do")


def show(found: Mapping) -> None:
    """Print what `examine` found, for people."""
    say = partial(Console().print, soft_wrap=True, highlight=False, markup=False)
    say(", ".join(f"{name} {number or '(missing)'}" for name, number in found["versions"].items()))
    for name, text in _machine_lines(found["machine"]):
        say(f"{name}: {text}")
    for check in found["checks"]:
        mark = "ok     " if check["works"] else "BROKEN " if check["needed"] else "missing"
        say(f"{mark} {check['name']}: {check['seen']} ({check['seconds']:.2f} s)")
        if check["hint"]:
            say(f"        {check['hint']}")
    if all(check["works"] for check in found["checks"]):
        say("Everything works. Next: qmica train --model ALIAS --data FILE (qmica models lists the aliases).")
    sys.stdout.flush()  # before the error line, which goes to stderr


def _machine_lines(machine: Mapping) -> list[tuple[str, str]]:
    features = [name for name, there in machine["cpu_features"].items() if there]
    memory = machine["memory"]
    lines = [
        ("system", machine["system"]),
        ("CPU", f"{machine['cpu_threads']} threads, {', '.join(features) or 'no AVX2'}"),
        ("memory", f"{durable.size_text(memory['free'])} free of {durable.size_text(memory['total'])}"),
        *((f"disk at {place}", f"{durable.size_text(free)} free") for place, free in machine["disk_free"].items()),
    ]
    for gpu in machine["gpus"]:
        size = f"{durable.size_text(gpu['memory']['free'])} free of {durable.size_text(gpu['memory']['total'])}"
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        lines.append(
            (gpu["device"], f"{gpu['name']}, {size}, capability {gpu['compute_capability']}, {bf16}, {gpu['backend']}")
        )
    return lines if machine["gpus"] else [*lines, ("GPU", "none that torch can use: everything runs on the CPU")]
