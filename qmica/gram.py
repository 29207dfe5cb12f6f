"""Products of a weight that is read by blocks of rows: its Gram matrix, and thin products in float64.

How: G = W Wᵀ of a wide weight, Wᵀ W of a tall one, is what the singular vectors of the smaller side belong to. A block
of rows is dequantized, used and forgotten, so that the whole weight need not exist in 16 or 32 bits. Of G only the
lower triangle is computed, which is all that Cholesky and `eigh` read.

What it gives up: a wide weight above `BLOCK` elements is read several times for G, each block against those before it.
"""

import functools
import math
from collections.abc import Iterator
from typing import Protocol

import torch

from qmica.errors import QmicaError

BLOCK = 1 << 22  # weights: 16 MB of fp32 rows
PANEL = (
    256  # rows of G at once; 4096 wide: 1.02 CPU-s for half of G, 1.25 with 1024, where more of the other half is done
)
TILE = 512, 1024  # of the weight, in float64: 4 MB, which a cache holds while it is multiplied


class RowBlocks(Protocol):
    """A weight (out, in) that can be read by rows: a lazy tensor of a file, or a quantized linear's."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop, (stop - start, in), in any float dtype."""


class Gram:
    """G (side, side) of a weight's smaller side. Where the weight's largest entry is beyond 1e±6 it is scaled to [0.5,
    1), as squares of 1e-30 or 1e30 would leave fp32. X below is (side, n), T is (length, n), both float64; length is
    the larger side.

    Raises QmicaError where the weight holds NaN or infinity.
    """

    def __init__(self, weight: torch.Tensor | RowBlocks, device: torch.device | None = None):
        self._whole = isinstance(weight, torch.Tensor)
        self._weight = weight.detach() if self._whole else weight
        self.device = device or (weight.device if self._whole else torch.device("cpu"))
        self.shape = out, columns = tuple(weight.shape)
        self.wide = out <= columns
        self.side, self.length = min(self.shape), max(self.shape)
        top = self._largest()
        self.scale = 1.0 if 1e-6 < top < 1e6 else 2.0 ** -math.frexp(top)[1]

    def _largest(self) -> float:
        """The largest entry's size."""
        top = 0.0
        for _, rows in self._blocks():
            least, most = (float(bound) for bound in torch.aminmax(rows))
            if not (math.isfinite(least) and math.isfinite(most)):
                raise QmicaError(
                    "the weight holds NaN or infinity: the model file is damaged, download or convert it again"
                )
            top = max(top, -least, most)
        return top

    @functools.cached_property
    def norm(self) -> float:
        """‖W‖_F, scaled, to fp32's digits."""
        return math.hypot(*(float(rows.norm()) for _, rows in self._blocks(torch.float32)))

    def _blocks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Where each block of rows begins, and its rows; scaled where a dtype is asked for."""
        for start, stop in self._bounds():
            yield start, self._rows(start, stop, dtype)

    def _bounds(self) -> list[tuple[int, int]]:
        out, columns = self.shape
        step = max(BLOCK // columns, 1)
        return [(start, min(start + step, out)) for start in range(0, out, step)]

    def _rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        rows = self._weight[start:stop] if self._whole else self._weight.rows(start, stop)
        rows = rows.to(self.device)
        if dtype is None:
            return rows
        if self.scale == 1:
            return rows.to(dtype)
        rows = rows if rows.dtype.itemsize >= 4 else rows.float()  # scaled before a cast: 1e39 is infinite in fp32
        return (rows * self.scale).to(dtype)

    def whole(self) -> torch.Tensor:
        """The scaled weight in float64, (out, in)."""
        return torch.cat([rows for _, rows in self._blocks(torch.float64)])

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """The lower triangle of G in `dtype`; what stands above it is not meant."""
        lower = torch.zeros(self.side, self.side, dtype=dtype, device=self.device)
        (self._fill_wide if self.wide else self._fill_tall)(lower, dtype)
        return lower

    def _fill_wide(self, lower: torch.Tensor, dtype: torch.dtype) -> None:
        bounds = self._bounds()
        for place, (start, stop) in enumerate(bounds):
            rows = self._rows(start, stop, dtype)
            for before, end in bounds[:place]:
                torch.mm(rows, self._rows(before, end, dtype).T, out=lower[start:stop, before:end])
            add_lower(lower[start:stop, start:stop], rows, rows)

    def _fill_tall(self, lower: torch.Tensor, dtype: torch.dtype) -> None:
        for _, rows in self._blocks(dtype):
            add_lower(lower, rows.T, rows.T)

    def image(self, X: torch.Tensor) -> torch.Tensor:
        """Wᵀ X of a wide weight, W X of a tall one: from the smaller side to the larger, T."""
        return self._transposed(X) if self.wide else self._times(X)

    def back(self, T: torch.Tensor) -> torch.Tensor:
        """From the larger side to the smaller, X; `back(image(X))` is G X."""
        return self._times(T) if self.wide else self._transposed(T)

    def coefficients(self, B: torch.Tensor) -> torch.Tensor:
        """Wᵀ B (in, n) in float64 for B (out, n): how much of the weight lies in B's columns."""
        return self._transposed(B.double())

    # Both sums are kept transposed: of the four ways to ask BLAS for a product with 8 to 48 columns this one is fast
    # for every number of columns and both directions (32 columns, a tile: 1.3 ms; the plain way 2.5 and 4.6).

    def _times(self, X: torch.Tensor) -> torch.Tensor:
        given, sums = X.T.contiguous(), X.new_zeros(X.shape[1], self.shape[0])
        for rows, columns, tile in self._tiles():
            sums[:, rows].addmm_(given[:, columns], tile.T)
        return sums.mul_(self.scale).T

    def _transposed(self, X: torch.Tensor) -> torch.Tensor:
        given, sums = X.T.contiguous(), X.new_zeros(X.shape[1], self.shape[1])
        for rows, columns, tile in self._tiles():
            sums[:, columns].addmm_(given[:, rows], tile)
        return sums.mul_(self.scale).T

    def _tiles(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """The weight, not scaled, in float64 tiles that share one buffer."""
        for start, block in self._blocks():
            for rows, columns, tile in tiles(block):
                yield slice(start + rows.start, start + rows.stop), columns, tile


def tiles(block: torch.Tensor, upper: bool = False) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Rows, columns and float64 values of a matrix, tile by tile in one buffer: a new one for each costs more in page
    faults than the product (0.029 CPU-s for 4 million values, 0.002 this way). upper: of an upper triangle, whose other
    tiles are left out.
    """
    height, width = TILE
    buffer = torch.empty(height * width, dtype=torch.float64, device=block.device)
    for top in range(0, block.shape[0], height):
        for left in range(top // width * width if upper else 0, block.shape[1], width):
            values = block[top : top + height, left : left + width]
            tile = buffer[: values.numel()].view(values.shape).copy_(values)
            yield slice(top, top + values.shape[0]), slice(left, left + values.shape[1]), tile


def add_lower(lower: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add scale · left rightᵀ to the lower triangle of a square matrix, in place; the diagonal's blocks are whole."""
    for top in range(0, len(lower), PANEL):
        bottom = min(top + PANEL, len(lower))
        lower[top:bottom, :bottom].addmm_(left[top:bottom], right[:bottom].T, alpha=scale)
