"""Minor subspaces against `torch.linalg.svd(full_matrices=False)` in fp32, which is what PEFT's MiCA calls: time,
memory, and how far both are from what float64 says.

    python scripts/bench_subspace.py                       # the linears of a 4096/11008 layer, on two spectra
    python scripts/bench_subspace.py --memory              # the extra memory, also of an lm_head of 128256 x 4096
    python scripts/bench_subspace.py --model smollm2-135m  # every linear of a model at 4, 8 and 16 bits: the proofs
    python scripts/bench_subspace.py --device cuda --layers 32   # all linears of an 8B model

Both sides have the same threads and alternate in one process, each first on every other weight; times are wall / CPU.
The reference is float64 `eigh` of the Gram matrix, right to a condition of 1e7 (`--exact svd`: numpy's float64 SVD,
minutes a weight). Set
GOMP_SPINCOUNT=0 OMP_WAIT_POLICY=passive on a machine that does other work. Real spectra: the singular values of a
SmolLM2 linear of the same kind, stretched to the side, with random singular vectors.
"""

import argparse
import collections
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qmica import gram, quant, source, subspace, targets, weights

LAYER = {  # Llama-2-7B's: kind -> (out, in), and how many of that shape and role a layer has
    "q_proj": (4096, 4096),
    "k_proj": (4096, 4096),
    "v_proj": (4096, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}
LAYER_8B = {**LAYER, "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
LAYER_8B |= {"gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336)}
MEMORY = {"square": (4096, 4096), "wide": (4096, 11008), "tall": (11008, 4096), "lm_head": (128256, 4096)}
TALL = Console(width=200)


def main() -> None:
    options = _options()
    if options.rows:
        _print_memory_of_one(*options.rows, options.rank)
    elif options.memory:
        measure_memory(options.rank)
    elif options.model:
        prove_model(options.model, options.rank)
    else:
        compare(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=0, help="time ours alone over this many 8B layers as well")
    parser.add_argument("--kinds", nargs="*", default=list(LAYER))
    parser.add_argument("--spectra", nargs="*", default=["random", "real"])
    parser.add_argument("--exact", choices=["eigh", "svd", "none"], default="eigh", help="what both are compared with")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- time


def compare(options: argparse.Namespace) -> None:
    """The table of a layer on each spectrum, with the sums of both sides."""
    device = torch.device(options.device)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {_device_name(device)}, rank {options.rank}")
    titles = (
        "spectrum",
        "linear",
        "shape",
        "ours",
        "SVD fp32",
        "ratio",
        "path",
        "proved ≤ 1 +",
        *_EXACT[options.exact],
    )
    for spectrum in options.spectra:
        table, sums, paths = Table(*titles), np.zeros((2, 2)), collections.Counter()
        for number, kind in enumerate(options.kinds):
            weight = _weight(kind, spectrum, number).to(device)
            ours, found, theirs, U = _both(weight, options.rank, device, ours_first=number % 2 == 0)
            sums += [ours, theirs]
            paths[found.path] += 1
            table.add_row(
                spectrum, kind, " x ".join(str(side) for side in weight.shape), _pair(ours), _pair(theirs),
                _ratio(theirs, ours), found.path, f"{found.ratio - 1:.0e}",
                *_distances(weight, found, U, options),
            )  # fmt: skip
        fallbacks = f"fallbacks: {paths['fallback']}"
        table.add_row(spectrum, "all", "", _pair(sums[0]), _pair(sums[1]), _ratio(sums[1], sums[0]), fallbacks)
        TALL.print(table)
    if options.layers:
        _time_8b(options, device)


def _both(weight: torch.Tensor, rank: int, device: torch.device, ours_first: bool) -> tuple:
    """Times and results of our search and of the SVD."""
    subspace.minor_subspace(weight[:512, :512], rank)  # threads and libraries are awake
    calls = [lambda: subspace.find_minor(weight, rank), lambda: torch.linalg.svd(weight, full_matrices=False).U]
    done = {at: _timed(calls[at], device) for at in ((0, 1) if ours_first else (1, 0))}
    return *done[0], *done[1]


def _time_8b(options: argparse.Namespace, device: torch.device) -> None:
    began = time.perf_counter()
    for layer in range(options.layers):
        for number, (out, columns) in enumerate(LAYER_8B.values()):
            torch.manual_seed(100 * layer + number)
            subspace.minor_subspace(torch.randn(out, columns, device=device), options.rank)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"all linears of {options.layers} layers of 8B's shapes: {time.perf_counter() - began:.1f} s")


_EXACT = {
    "none": (),
    "eigh": ("eigh fp64", "energy / least", "σ gap", "projector: ours", "SVD fp32"),
    "svd": ("numpy SVD fp64", "energy / least", "σ gap", "projector: ours", "SVD fp32"),
}


def _distances(weight: torch.Tensor, found: subspace.Found, U: torch.Tensor, options: argparse.Namespace) -> tuple:
    """The reference's time; our energy over the least, and how far both projectors are from the reference's."""
    if options.exact == "none":
        return ()
    rank, matrix = options.rank, weight.double()
    took, (minor, sigma) = _timed(lambda: _REFERENCES[options.exact](matrix, rank + 1), weight.device)
    energy = float((matrix.T @ found.B.double()).norm() / sigma[1:].norm())
    distances = (f"{_apart(B.double(), minor[:, 1:]):.0e}" for B in (found.B, U[:, -rank:]))
    return _pair(took), f"{energy:.6f}", f"{float(sigma[0] / sigma[1]):.3f}", *distances


def _by_eigh(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    wide = matrix.shape[0] <= matrix.shape[1]
    vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix).eigenvectors[:, :rank].flip(1)
    left = vectors if wide else torch.linalg.qr(matrix @ vectors).Q
    return left, (matrix.T @ left).norm(dim=0)


def _by_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, sigma, _ = np.linalg.svd(matrix.cpu().numpy(), full_matrices=False)
    return torch.from_numpy(U[:, -rank:].copy()).to(matrix.device), torch.from_numpy(sigma[-rank:]).to(matrix.device)


_REFERENCES = {"eigh": _by_eigh, "svd": _by_svd}


def _apart(B: torch.Tensor, U: torch.Tensor) -> float:
    """The sine of the largest angle between two subspaces: the norm of the difference of their projectors."""
    return float(torch.linalg.matrix_norm(B - U @ (U.T @ B), 2))


def _timed(run, device: torch.device) -> tuple[tuple[float, float], object]:
    """Wall and CPU seconds of a call, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def _weight(kind: str, spectrum: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    out, columns = LAYER[kind]
    weight = torch.randn(out, columns)
    if spectrum == "random":
        return weight
    side = min(out, columns)
    real = _open("smollm2-135m")[
        f"model.layers.12.{'mlp' if kind in targets.FEED_FORWARD else 'self_attn'}.{kind}.weight"
    ]
    known = torch.linalg.svdvals(real.load(torch.float64)).numpy()
    sigma = np.interp(np.linspace(0, 1, side), np.linspace(0, 1, len(known)), known)
    Q = torch.linalg.qr(torch.randn(max(out, columns), side)).Q
    P = torch.linalg.qr(torch.randn(side, side)).Q * torch.from_numpy(sigma).float()
    return (Q @ P.T) if out >= columns else (P @ Q.T)


def _open(model: str) -> weights.Weights:
    return weights.open_weights(source.resolve(model))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _pair(seconds) -> str:
    return f"{seconds[0]:.2f} / {seconds[1]:.2f} s"


def _ratio(theirs, ours) -> str:
    return f"{theirs[0] / ours[0]:.1f} / {theirs[1] / ours[1]:.1f}"


# ---- memory


def measure_memory(rank: int) -> None:
    """Peak anonymous memory beside the weight, each shape in a process of its own, against the bound."""
    table = Table("shape", "extra memory", "bound: Gram + 2 row blocks + 0.2 GB")
    for name, (out, columns) in MEMORY.items():
        command = [sys.executable, __file__, "--rows", str(out), str(columns), "--rank", str(rank)]
        extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        bound = 4 * min(out, columns) ** 2 + 2 * 4 * gram.BLOCK + 200_000_000
        table.add_row(f"{name} {out} x {columns}", f"{extra / 1e6:.0f} MB", f"{bound / 1e6:.0f} MB")
    TALL.print(table)


class _Codes:
    """A weight as a quantized one is held: int8 codes, of which rows are made when they are asked for."""

    def __init__(self, out: int, columns: int):
        self.shape = out, columns
        self.codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.codes[start:stop].float()


def _print_memory_of_one(out: int, columns: int, rank: int) -> None:
    weight = _Codes(out, columns)
    subspace.minor_subspace(torch.randn(300, 300), rank)  # the libraries' own buffers
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    subspace.minor_subspace(weight, rank)
    done.set()
    watcher.join()
    print(peak - before)


def _anonymous() -> int:
    """RssAnon of this process, in bytes."""
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


# ---- proofs


def prove_model(model: str, rank: int) -> None:
    """Every linear of the decoder layers, at 4, 8 and 16 bits: how it was proved, against numpy's float64 SVD."""
    opened = _open(model)
    names = [name for name in opened if name.endswith(".weight") and not targets.stays_16bit(name)]
    table = Table(
        "bits", "linears", "paths", "energy / least", "skew", "told apart by 1 %", "farthest projector", "seconds"
    )
    for bits in (4, 8, 16):
        paths, energy, skew, farthest, apart, took = collections.Counter(), 0.0, 0.0, 0.0, 0, 0.0
        for name in names:
            stored = quant.Stored.of(quant.quantize(opened[name].load(), None, bits, torch.device("cpu")))
            began = time.perf_counter()
            found = subspace.find_minor(stored, rank)
            took += time.perf_counter() - began
            matrix, B = stored.rows(0, stored.shape[0]).double(), found.B.double()
            U, sigma, _ = np.linalg.svd(matrix.numpy(), full_matrices=False)
            paths[found.path] += 1
            energy = max(energy, float((matrix.T @ B).norm()) / np.linalg.norm(sigma[-rank:]))
            skew = max(skew, float((B.T @ B - torch.eye(rank, dtype=B.dtype)).abs().max()))
            if sigma[-rank - 1] >= 1.01 * sigma[-rank]:
                apart += 1
                farthest = max(farthest, _apart(B, torch.from_numpy(U[:, -rank:].copy())))
        shown = ", ".join(f"{path} {count}" for path, count in sorted(paths.items()))
        table.add_row(
            str(bits),
            str(len(names)),
            shown,
            f"{energy:.8f}",
            f"{skew:.0e}",
            str(apart),
            f"{farthest:.0e}",
            f"{took:.1f}",
        )
    TALL.print(table)


if __name__ == "__main__":
    main()
