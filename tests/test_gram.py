"""Products by blocks of rows against numpy's of the whole weight in float64."""

import numpy as np
import pytest
import torch

from qmica import gram
from qmica.errors import QmicaError

SHAPES = [(40, 40), (30, 70), (70, 30), (1, 9), (9, 1)]


class Recorded:
    """A weight that can only be read by rows, and says which were read."""

    def __init__(self, weight: torch.Tensor):
        self.weight, self.shape, self.reads = weight, tuple(weight.shape), []

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self.reads.append(stop - start)
        return self.weight[start:stop]


def weight(out: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(out * columns).standard_normal((out, columns)))


@pytest.mark.parametrize("block", [1 << 23, 300, 1])
@pytest.mark.parametrize(("out", "columns"), SHAPES)
def test_every_product(monkeypatch, out, columns, block):
    monkeypatch.setattr(gram, "BLOCK", block)
    monkeypatch.setattr(gram, "PANEL", 16)
    monkeypatch.setattr(gram, "TILE", (8, 16))
    W = weight(out, columns)
    read = Recorded(W.float())
    G = gram.Gram(read)
    scaled = W.float().double().numpy() * G.scale
    assert G.scale == 1 and np.isclose(G.norm, np.linalg.norm(scaled), rtol=1e-6)
    whole = scaled @ scaled.T if out <= columns else scaled.T @ scaled
    assert (G.side, G.length, G.wide) == (min(out, columns), max(out, columns), out <= columns)
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        lower = np.tril(G.matrix(dtype).double().numpy())
        assert np.abs(lower - np.tril(whole)).max() < tolerance * np.abs(whole).max()
    X, T = weight(G.side, 3), weight(G.length, 3)
    there = scaled.T if G.wide else scaled
    assert np.allclose(G.image(X).numpy(), there @ X.numpy(), rtol=0, atol=1e-12)
    assert np.allclose(G.back(T).numpy(), there.T @ T.numpy(), rtol=0, atol=1e-12)
    B = weight(out, 2)
    assert np.allclose(G.coefficients(B).numpy(), scaled.T @ B.numpy(), rtol=0, atol=1e-12)
    assert np.array_equal(G.whole().numpy(), scaled)
    assert max(read.reads) <= max(block // columns, 1), "a block is no larger than it may be"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_stay_in_fp32(scale):
    W = weight(20, 30)
    G = gram.Gram(W * scale)
    assert 0.5 <= float((W * scale).abs().max()) * G.scale < 1
    lower = G.matrix(torch.float32)
    assert torch.isfinite(lower).all() and (lower.diagonal() > 0.1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite(bad):
    W = weight(20, 30)
    W[7, 3] = bad
    with pytest.raises(QmicaError, match="holds NaN or infinity: the model file is damaged"):
        gram.Gram(W)


def test_tiles_of_an_upper_triangle(monkeypatch):
    """Every entry on and above the diagonal once, and tiles that lie wholly below it never."""
    monkeypatch.setattr(gram, "TILE", (8, 16))
    square = weight(50, 50).triu()
    seen, count = torch.zeros_like(square), torch.zeros(50, 50)
    for rows, columns, tile in gram.tiles(square, upper=True):
        seen[rows, columns] = tile
        count[rows, columns] += 1
    assert torch.equal(seen, square) and count.max() == 1 and count[16:, :16].sum() == 0


def test_add_lower(monkeypatch):
    monkeypatch.setattr(gram, "PANEL", 16)
    left, right, lower = weight(50, 4), weight(50, 4), weight(50, 50)
    expected = np.tril(lower.numpy() - 0.5 * left.numpy() @ right.numpy().T)
    gram.add_lower(lower, left, right, -0.5)
    assert np.allclose(np.tril(lower.numpy()), expected, rtol=0, atol=1e-14)
