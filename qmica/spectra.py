"""What a model's weights are like at their small end, and what quantization does to it: `qmica inspect`.

How: one linear of the decoder layers after the other is read, never the model. For its weight W (out, in), B (out,
rank) are the left singular vectors of the `rank` smallest singular values, as training takes them. Three questions: how
small those values are (the spectrum), how little of W they carry (‖BᵀW‖_F against what a uniformly random B would),
and whether they are still there once W has been quantized (B_q of the dequantized weight against B).

"Original" is what the source holds: 16-bit weights, or a GGUF's dequantized ones. A checkpoint that bitsandbytes
quantized holds no original, so that only the first two questions have an answer.

What it gives up: the store of subspaces, which it neither reads nor fills, and speed on large models. Each weight costs
an eigendecomposition in float64 for its spectrum and one minor subspace for itself and each format, one tensor (and
some copies of it in float64) at a time.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from qmica import adapter, bases, durable, model, progress, quant, source
from qmica.config import AdapterConfig, InspectConfig
from qmica.errors import QmicaError
from qmica.subspace import minor_subspace
from qmica.weights import Weights, open_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

PACKED = "packed by bitsandbytes"
# Of an overlap. SmolLM2-135M in NF4: the medians of the square kinds are 0.60 and 0.64, of the others 0.87 to 0.97.
LOW = 0.8
DIGITS = 6  # significant ones in JSON: the rest of a float64's is noise of the solver
DPI = 120
READING = (
    "minor σ: the rank smallest, first and last. vs random: ‖BᵀW‖ of their directions B over that of random ones.",
    "overlap: of the minor subspace after quantization with the original one, 1 = the same, rank / out = chance. leak: "
    "how many times as much of the original weight it carries, 1 = no more.",
)

Column = Callable[[dict], str]


@dataclass(frozen=True)
class Moved:
    """What a format did to a minor subspace. overlap: ‖B_qᵀB‖_F² / rank, 1 = the same, rank / out = what chance gives.
    leak: ‖B_qᵀW‖_F / ‖BᵀW‖_F, 1 = none; None where BᵀW is zero.
    """

    bits: int
    overlap: float
    leak: float | None


@dataclass(frozen=True)
class Numbers:
    """One weight's, or the medians of several. largest, median, smallest: singular values; the `rank` smallest
    descending. minor_to_random: ‖BᵀW‖_F over the root mean square of ‖RᵀW‖_F for random R; None where W is zero.
    quantized: empty where the original is not known.
    """

    largest: float
    median: float
    smallest: tuple[float, ...]
    minor_to_random: float | None
    quantized: tuple[Moved, ...]


@dataclass(frozen=True)
class Layer:
    """One linear. spectrum: all its singular values (min(out, in),), float64, descending."""

    name: str
    shape: tuple[int, int]
    numbers: Numbers
    spectrum: torch.Tensor

    @property
    def kind(self) -> str:
        """q_proj, down_proj, ..."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def depth(self) -> int:
        """Which decoder layer, from 0."""
        return int(re.search(r"\blayers\.(\d+)\.", self.name)[1])


# ---- one weight


def singular_values(weight: torch.Tensor) -> torch.Tensor:
    """All singular values (min(out, in),) of a float64 weight (out, in), descending.

    They are square roots of the Gram matrix's eigenvalues, which are off by some 1e-16 of the largest: right at the
    large end and in the middle, but below 1e-8 of the largest there is nothing but noise.
    """
    wide = weight.shape[0] <= weight.shape[1]
    squares = torch.linalg.eigvalsh(weight @ weight.T if wide else weight.T @ weight)
    return squares.clamp_min(0).sqrt().flip(0)


def norms(B: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """‖Wᵀb‖ (rank,) of each column of B (out, rank), in float64: of a left singular vector its singular value."""
    return (weight.double().T @ B.double()).norm(dim=0)


def random_norm(weight: torch.Tensor, rank: int) -> float:
    """The root mean square of ‖RᵀW‖_F over uniformly random R (out, rank) with orthonormal columns.

    R Rᵀ is rank / out times the identity on average, whatever W (out, in) is.
    """
    return math.sqrt(rank / weight.shape[0]) * weight.double().norm().item()


def overlap(B: torch.Tensor, other: torch.Tensor) -> float:
    """‖BᵀC‖_F² / rank of two orthonormal bases (out, rank): the mean squared cosine of their principal angles."""
    return (B.double().T @ other.double()).square().sum().item() / B.shape[1]


def measure(weight: torch.Tensor, rank: int, bits: Sequence[int]) -> tuple[Numbers, torch.Tensor]:
    """The numbers of a weight (out, in), and its spectrum (float64, on the CPU). bits: formats to compare with.

    Raises QmicaError for a rank that does not fit and for NaN or infinity, without the layer's name.
    """
    B = minor_subspace(weight.float(), rank)  # first: it refuses NaN, where eigvalsh fails with a traceback
    exact = weight.double()
    smallest = norms(B, exact)  # from B: square roots of a Gram matrix are not accurate at the small end
    spectrum = torch.cat([singular_values(exact)[:-rank], smallest])
    numbers = Numbers(
        largest=spectrum.max().item(),
        median=spectrum.quantile(0.5).item(),
        smallest=tuple(smallest.tolist()),
        minor_to_random=_ratio(smallest.norm().item(), random_norm(exact, rank)),
        quantized=tuple(_moved(weight, exact, B, width) for width in bits),
    )
    return numbers, spectrum.cpu()


def _moved(weight: torch.Tensor, exact: torch.Tensor, B: torch.Tensor, bits: int) -> Moved:
    """The weight quantized as training would, and where its minor subspace is then. exact: the weight in float64."""
    held = quant.dequantize(quant.quantize(weight, None, bits, weight.device))
    Q = minor_subspace(held, B.shape[1])
    return Moved(bits, overlap(Q, B), _ratio(norms(Q, exact).norm().item(), norms(B, exact).norm().item()))


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


def medians(numbers: Sequence[Numbers]) -> Numbers:
    """The medians of several weights of one rank; of the smallest singular values place by place."""
    widths = dict.fromkeys(moved.bits for one in numbers for moved in one.quantized)
    moved = {bits: [part for one in numbers for part in one.quantized if part.bits == bits] for bits in widths}
    return Numbers(
        largest=statistics.median(one.largest for one in numbers),
        median=statistics.median(one.median for one in numbers),
        smallest=tuple(map(statistics.median, zip(*(one.smallest for one in numbers), strict=True))),
        minor_to_random=_median(one.minor_to_random for one in numbers),
        quantized=tuple(
            Moved(bits, statistics.median(part.overlap for part in parts), _median(part.leak for part in parts))
            for bits, parts in moved.items()
        ),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# ---- the verb


def inspect(name: str, config: InspectConfig = InspectConfig(), as_json: bool = False) -> dict:
    """Measure the linears that `config.targets` selects; print tables or JSON, return what the JSON says.

    name: as for --model. Raises QmicaError for a model that is not found or not whole, targets and ranks that do not
    fit it, a damaged weight (named), and, before any work, for pictures that cannot be made.
    """
    if config.plot is not None:
        _require_pictures(config.plot)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = model.choose_device(config.device)
    found = source.resolve(name, config.revision, lambda text: print(text, file=sys.stderr))
    weights = open_weights(found)
    layers = list(_walk(weights, _chosen(found, weights, config), config, device))
    pictures = {} if config.plot is None else draw(layers, config.rank)
    files = {config.plot / file: figure for file, figure in pictures.items()}
    result = {**_result(found, weights, layers, config), "pictures": [str(file) for file in files]}
    print(json.dumps(result, indent=2, allow_nan=False)) if as_json else _show(result)
    for file, figure in files.items():  # after the numbers, which a full disk must not cost
        with durable.replacing(file) as part:
            figure.savefig(part, format="png", dpi=DPI)
    if not as_json:
        print(_advice(result, name))
    return result


def _chosen(found: source.Source, weights: Weights, config: InspectConfig) -> list[str]:
    """The linears that training with these targets and this rank would adapt, by depth."""
    empty = model.on_meta(model.read_config(found), torch.float32)
    names = adapter.choose(empty, AdapterConfig(rank=config.rank, targets=config.targets))
    shapes = weights.shapes
    wrong = [name for name in names if shapes.get(f"{name}.weight") != tuple(empty.get_submodule(name).weight.shape)]
    if wrong:
        raise QmicaError(
            f"{found.name} is not a whole model: {len(wrong)} of {len(names)} linears are missing or of another shape "
            f"than its config says ({', '.join(wrong[:3])}); copy or download it again"
        )
    return names


def _walk(weights: Weights, names: Sequence[str], config: InspectConfig, device: torch.device) -> Iterator[Layer]:
    """Read each weight once, measure it, forget it."""
    shapes = weights.shapes
    with progress.counted(len(names), "layer") as done:
        for at, name in enumerate(names, start=1):
            stored = f"{name}.weight"
            weight = _read(weights, stored, shapes[stored], device)
            with bases.named(name):
                numbers, spectrum = measure(weight, config.rank, () if stored in weights.packed else config.bits)
            yield Layer(name, shapes[stored], numbers, spectrum)
            done(at, name)


def _read(weights: Weights, name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """A weight (out, in) on the device, as the source has it; one that bitsandbytes packed comes dequantized."""
    if name not in weights.packed:
        return weights[name].load().to(device)
    path = name.removesuffix(".weight")
    parts = {part: weights[f"{path}.{part}"].load() for part in weights.packed[name]}
    return quant.dequantize(quant.from_packed(shape, parts, None, device))


def _by_kind(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


# ---- what is said


def _result(found: source.Source, weights: Weights, layers: Sequence[Layer], config: InspectConfig) -> dict:
    """Everything found, as JSON values."""
    stored = [_stored(weights, f"{layer.name}.weight") for layer in layers]
    kinds = _by_kind(layers).values()
    return {
        "model": found.id,
        "revision": found.revision,
        "stored": ", ".join(sorted(set(stored))),
        "note": _no_original(stored.count(PACKED), len(stored)),
        "rank": config.rank,
        "layers": [_row(one, one.numbers, name=one.name, depth=one.depth) for one in layers],
        "kinds": [_row(ones[0], medians([one.numbers for one in ones]), layers=len(ones)) for ones in kinds],
    }


def _row(layer: Layer, numbers: Numbers, **about: object) -> dict:
    out, columns = layer.shape
    return {**about, "kind": layer.kind, "out": out, "in": columns, **_rounded(asdict(numbers))}


def _rounded(value: object) -> object:
    """The floats in dicts and sequences to DIGITS significant ones; tuples become lists."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _stored(weights: Weights, name: str) -> str:
    """How the source holds a weight: bfloat16, GGUF Q4_1, or packed by bitsandbytes."""
    if name in weights.packed:
        return PACKED
    tensor = weights[name]
    return f"GGUF {tensor.quantized.type.name}" if tensor.quantized else str(tensor.dtype).removeprefix("torch.")


def _no_original(packed: int, count: int) -> str | None:
    if not packed:
        return None
    those = "these weights" if packed == count else f"{packed} of these {count} weights"
    return f"bitsandbytes has quantized {those} and their original is not here: what that moved cannot be said"


def _show(result: dict) -> None:
    """The tables and how to read them, for people."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width, and 80 columns would fold the rows
    rank, rows = result["rank"], result["layers"]
    columns = _columns(sorted({moved["bits"] for row in rows for moved in row["quantized"]}))
    console.print(
        f"{result['model']}: {len(rows)} linears, {result['stored']}; rank {rank}", soft_wrap=True, markup=False
    )
    console.print(_table({"depth": lambda row: str(row["depth"]), **columns}, rows))
    console.print("\nmedians over depth")
    console.print(_table({"layers": lambda row: str(row["layers"]), **columns}, result["kinds"]))
    reading = READING if any(row["quantized"] for row in rows) else READING[:1]
    for line in filter(None, (*reading, result["note"], ", ".join(result["pictures"]))):
        console.print(line, soft_wrap=True, markup=False)


def _columns(widths: Sequence[int]) -> dict[str, Column]:
    """Title -> cell of a row. widths: the bits that some row has been compared at."""
    columns: dict[str, Column] = {
        "kind": lambda row: row["kind"],
        "shape": lambda row: f"{row['out']} x {row['in']}",
        "largest σ": lambda row: _number(row["largest"]),
        "median σ": lambda row: _number(row["median"]),
        "minor σ": lambda row: " … ".join(dict.fromkeys(_number(row["smallest"][end]) for end in (0, -1))),
        "vs random": lambda row: _number(row["minor_to_random"]),
    }
    for bits in widths:
        columns[f"overlap {bits}"] = lambda row, bits=bits: _number(_moved_by(row, bits, "overlap"))
        columns[f"leak {bits}"] = lambda row, bits=bits: _number(_moved_by(row, bits, "leak"))
    return columns


def _moved_by(row: dict, bits: int, key: str) -> float | None:
    return next((moved[key] for moved in row["quantized"] if moved["bits"] == bits), None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(columns: dict[str, Column], rows: Sequence[dict]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, justify="left" if title == "kind" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def _advice(result: dict, name: str) -> str:
    """What it means and what to do next, in one sentence."""
    train = f"qmica train --model {shlex.quote(name)}"
    compared = [moved["bits"] for row in result["kinds"] for moved in row["quantized"]]
    if not compared:
        return f"Next: qmica inspect of the 16-bit original shows what quantization moves; `{train}` trains on these."
    bits = min(compared)
    overlaps = {row["kind"]: _moved_by(row, bits, "overlap") for row in result["kinds"]}
    low = {kind: value for kind, value in overlaps.items() if value is not None and value < LOW}
    if not low:
        return f"At {bits} bits the minor subspaces stay where they are (overlap above {LOW:g}). Next: {train}"
    return (
        f"At {bits} bits the minor subspaces of {', '.join(low)} move (overlap {_number(min(low.values()))} at the "
        f"lowest): `{train} --bits {bits} --subspace-from original` takes them from the original weights."
    )


# ---- pictures


def _require_pictures(folder: Path) -> None:
    """QmicaError where matplotlib or the folder is not to be had: known before the minutes of work."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise QmicaError('--plot needs matplotlib: pip install "qmica[report]", or leave --plot out') from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        trouble = durable.disk_trouble(error) or f"it cannot be made ({error.strerror}): choose another folder"
        raise QmicaError(f"--plot {folder}: {trouble}") from error


def draw(layers: Sequence[Layer], rank: int) -> dict[str, Figure]:
    """File name -> picture. overlap.png is left out where no layer was compared with its quantized self."""
    pictures = {"spectra.png": _draw_spectra(_by_kind(layers), rank)}
    compared = [layer for layer in layers if layer.numbers.quantized]
    return pictures | ({"overlap.png": _draw_overlaps(_by_kind(compared))} if compared else {})


def _draw_spectra(kinds: dict[str, list[Layer]], rank: int) -> Figure:
    """A panel a kind: every depth's singular values as a line, the minor ones on a red ground."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    across = min(len(kinds), 4)
    down = math.ceil(len(kinds) / across)
    figure = Figure(figsize=(3.6 * across + 1.2, 3.2 * down + 0.8), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    deepest = max(layer.depth for ones in kinds.values() for layer in ones)
    shades = ScalarMappable(Normalize(0, max(deepest, 1)), "viridis")
    for axis, (kind, ones) in zip(axes, kinds.items(), strict=False):
        _draw_kind(axis, kind, ones, rank, shades)
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    figure.suptitle(f"Singular values by kind of linear\n(on red: the minor ones, the {rank} smallest)")
    figure.supxlabel("place, from the largest")
    figure.supylabel("singular value σ")
    figure.colorbar(shades, ax=list(axes), label="depth (decoder layer)")
    return figure


def _draw_kind(axis: Axes, kind: str, layers: Sequence[Layer], rank: int, shades: ScalarMappable) -> None:
    for layer in layers:
        spectrum = layer.spectrum.where(layer.spectrum > 0, math.nan)  # zero has no logarithm
        axis.semilogy(range(1, len(spectrum) + 1), spectrum, color=shades.to_rgba(layer.depth), linewidth=0.9)
    count = len(layers[0].spectrum)
    axis.axvspan(count - rank + 0.5, count + 0.5, color="tab:red", alpha=0.2, linewidth=0)
    out, columns = layers[0].shape
    axis.set(title=f"{kind} ({out} x {columns})")


def _draw_overlaps(kinds: dict[str, list[Layer]]) -> Figure:
    """A panel a format: kinds down, depth across, the overlap as colour."""
    from matplotlib.figure import Figure

    deepest = max(layer.depth for ones in kinds.values() for layer in ones)
    widths = sorted({moved.bits for ones in kinds.values() for layer in ones for moved in layer.numbers.quantized})
    height = len(widths) * (0.32 * len(kinds) + 1.0) + 0.8
    figure = Figure(figsize=(max(6.5, 0.25 * deepest + 4.5), max(3.0, height)), layout="constrained")
    axes = figure.subplots(len(widths), 1, squeeze=False, sharex=True).flatten()
    for axis, bits in zip(axes, widths, strict=True):
        overlaps = _overlap_grid(kinds, deepest, bits)
        image = axis.imshow(overlaps, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        middles = overlaps.nanquantile(0.5, dim=1).tolist()
        axis.set_yticks(range(len(kinds)), [f"{kind}  {value:.2f}" for kind, value in zip(kinds, middles, strict=True)])
        axis.set(title=f"{bits} bits ({quant.FORMATS[bits].name})", ylabel="kind, median", facecolor="lightgrey")
    axes[-1].set(xlabel="depth (decoder layer)")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("How much of the minor subspace quantization leaves in place")
    figure.colorbar(image, ax=list(axes), label="overlap (1: all, 0: none)")
    return figure


def _overlap_grid(kinds: dict[str, list[Layer]], deepest: int, bits: int) -> torch.Tensor:
    """The overlaps at these bits, (kinds, depths); NaN where there is no such layer."""
    grid = torch.full((len(kinds), deepest + 1), math.nan, dtype=torch.float64)
    for row, layers in enumerate(kinds.values()):
        for layer in layers:
            grid[row, layer.depth] = next(moved.overlap for moved in layer.numbers.quantized if moved.bits == bits)
    return grid
