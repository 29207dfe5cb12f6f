"""How much of a change survives rounding, against the whole tensors rounded in float64 arithmetic."""

import re

import numpy as np
import pytest
import torch
from adapted import make_run
from gguf import GGMLQuantizationType as T
from gguf import quants
from tiny import WIDE, save_tiny

from qmica import exporting, merging
from qmica.config import ExportConfig
from qmica.survival import ROWS, Survival


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(weights: torch.Tensor, change: torch.Tensor, type_: T) -> tuple[float, float]:
    """(share kept, rounding error over the change), as Survival has them."""
    survival, rows = Survival({"w": [type_]}), weights.clone()
    before = survival.sample("w", rows)
    survival.add("w", before, rows.add_(change))
    sums = survival.sums[type_]
    return sums.kept / sums.change, (sums.error / sums.change) ** 0.5


def rounded(rows: torch.Tensor, type_: T) -> np.ndarray:
    """The oracle's: torch for bf16, gguf's numpy code for the rest."""
    if type_ == T.BF16:
        return rows.bfloat16().double().numpy()
    return quants.dequantize(quants.quantize(rows.numpy(), type_), type_).astype(np.float64)


@pytest.mark.parametrize("type_", [T.BF16, T.Q8_0, T.Q4_1, T.Q5_0])
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_the_numbers_are_those_of_the_definition(type_, size):
    weights, change = normal(1, ROWS, 256), size * normal(2, ROWS, 256)
    after = weights + change
    moved = rounded(after, type_) - rounded(weights, type_)
    D = after.double().numpy() - weights.double().numpy()
    share = (moved * D).sum() / (D * D).sum()
    error = (((rounded(after, type_) - after.double().numpy()) ** 2).sum() / (D * D).sum()) ** 0.5
    assert found(weights, change, type_) == pytest.approx((share, error), rel=1e-6)


def test_a_small_change_of_weights_on_the_grid_drowns():
    """bf16 has 8 bits: a thousandth of a weight is less than half a step, a fifth is 50 steps."""
    weights = normal(1, 64, 256).bfloat16().float()
    kept = {size: found(weights, size * weights.abs() * normal(2, 64, 256).sign(), T.BF16)[0] for size in (1e-3, 0.2)}
    assert kept[1e-3] < 0.01 and kept[0.2] == pytest.approx(1, abs=0.02), kept
    on_grid = torch.from_numpy(rounded(weights, T.Q8_0)).float()
    assert found(on_grid, 1e-4 * normal(3, 64, 256), T.Q8_0)[0] < 0.2


def test_a_small_change_of_other_weights_is_kept_on_average_and_hidden_in_noise():
    weights, change = normal(1, 4096, 256), 1e-2 * normal(2, 4096, 256)
    survival, rows = Survival({"w": [T.Q4_0]}), weights.clone()
    for start in range(0, 4096, 64):  # as blocks come
        block = rows[start : start + 64]
        before = survival.sample("w", block)
        survival.add("w", before, block.add_(change[start : start + 64]))
    kept, error = survival.sums[T.Q4_0].kept / survival.sums[T.Q4_0].change, survival.sums[T.Q4_0].error
    assert kept == pytest.approx(1, abs=0.1) and error > 9 * survival.sums[T.Q4_0].change
    assert "Q4_0" in survival.lines()[0] and "qmica export --adapter" in survival.lines()[1]


def test_nothing_is_said_where_nothing_is_lost():
    survival = Survival({"w": [T.F32]})
    rows = normal(1, 4, 64)
    survival.add("w", survival.sample("w", rows), rows.add(1e-2))
    assert survival.lines() == [] and Survival().lines() == []
    assert survival.sample("other", rows) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival")
    base = save_tiny(folder / "base", "llama", dtype=torch.bfloat16, **WIDE)
    return make_run(folder / "run", base, rank=8, size=0.005)


def test_a_merge_and_an_export_say_what_was_kept(run, tmp_path, capsys):
    """A change of 0.1 % of the weights: lost in bf16, where the base lies on the grid, and noise in Q4_0."""
    merging.merge(str(run), tmp_path / "merged")
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("of the adapter's change"))
    share = float(line.split("BF16 ")[1].split(" %")[0])
    assert share < 90 and "qmica export --adapter" in said, line
    exporting.export(str(run), ExportConfig(quant="Q4_0", out=tmp_path / "x.gguf"))
    said = capsys.readouterr().out
    assert re.search(
        r"^of the adapter's change rounding keeps, .* times the change: .*Q4_0 -?[\d.]+ % \([\d.]+\)", said, re.M
    )
    exporting.export(str(run), ExportConfig(quant="F32", out=tmp_path / "y.gguf"))
    assert "rounding keeps" not in capsys.readouterr().out
