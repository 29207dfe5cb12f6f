"""How much of an adapter's change survives the rounding of the type that a merge is written in.

How: where a merged tensor's rows are made, a few of them are packed with the adapter's change D and without it, and
the packed ones are compared. What is kept is the part of D that the written weights moved by, in D's own direction,
⟨Q(W + D) − Q(W), D⟩ / ⟨D, D⟩: 1 where rounding takes nothing, 0 where every weight rounds back to what it was. Beside
it stands the rounding error |Q(W + D) − (W + D)| / |D|: weights in general position lose nothing on average (rounding
works as dither), yet where the error is many times the change, it is the error that is heard.

Both are needed. Weights that lie on the type's grid already (a bf16 model merged into bf16, a Q4_1 GGUF exported as
Q4_1) do lose a change smaller than half a step; others hide it in noise.

What it gives up: exactness. 16 rows of each block are looked at, and an importance matrix is not.
"""

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from gguf import GGMLQuantizationType

from qmica import ggml
from qmica.errors import QmicaError

ROWS = 16  # of a block of rows: 0.02 s for 4096 columns in Q4_K
LITTLE = 0.9  # of the change kept, below which it is said how to keep more
NOTHING = 0.01, 0.1  # of the change lost, and of rounding error: not worth a line
LOUD = 3.0  # times the change: the error that is said too


@dataclass
class Sums:
    """Of the rows seen in one type."""

    kept: float = 0.0  # ⟨Q(W + D) − Q(W), D⟩
    change: float = 0.0  # |D|²
    error: float = 0.0  # |Q(W + D) − (W + D)|²


@dataclass
class Survival:
    """Adds up what became of an adapter's change, as merged rows are made. types: what each tensor, by its Hugging Face
    name, is written in, one type for each file; one that is not named is not looked at."""

    types: dict[str, list[GGMLQuantizationType]] = field(default_factory=dict)
    sums: dict[GGMLQuantizationType, Sums] = field(default_factory=lambda: defaultdict(Sums))

    def sample(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Some of the rows (n, columns) before the change, to be given back to `add`; None where none are wanted."""
        return rows[:: -(-len(rows) // ROWS)].clone() if name in self.types and len(rows) else None

    def add(self, name: str, before: torch.Tensor | None, rows: torch.Tensor) -> None:
        """The same rows with the change in them. Rows that cannot be written are left to whoever writes them."""
        if before is None:
            return
        after = rows[:: -(-len(rows) // ROWS)]
        if not torch.isfinite(after).all():
            return
        for type_ in set(self.types[name]):
            with suppress(QmicaError):  # too large for the type
                self._add(self.sums[type_], before, after, type_)

    @staticmethod
    def _add(sums: Sums, before: torch.Tensor, after: torch.Tensor, type_: GGMLQuantizationType) -> None:
        written, without = (_rounded(some, type_) for some in (after, before))
        change = (after - before).double()
        sums.kept += float(((written - without).double() * change).sum())
        sums.change += float(change.square().sum())
        sums.error += float((written - after).double().square().sum())

    def lines(self) -> list[str]:
        """What there is to say: nothing of types that lose nothing."""
        shares = {t.name: (s.kept / s.change, (s.error / s.change) ** 0.5) for t, s in self.sums.items() if s.change}
        shares = {
            name: (kept, error) for name, (kept, error) in shares.items() if kept < 1 - NOTHING[0] or error > NOTHING[1]
        }
        if not shares:
            return []
        kept = ", ".join(f"{name} {100 * share:.3g} % ({error:.2g})" for name, (share, error) in shares.items())
        lines = [f"of the adapter's change rounding keeps, beside an error of so many times the change: {kept}"]
        worst = min(share for share, _ in shares.values())
        if worst < LITTLE or max(error for _, error in shares.values()) > LOUD:
            lines.append("  the adapter beside its base is not rounded: qmica export --adapter; finer types lose less")
        return lines


def _rounded(rows: torch.Tensor, type_: GGMLQuantizationType) -> torch.Tensor:
    packed = ggml.quantize(np.ascontiguousarray(rows.numpy()), type_, 1)
    return torch.from_numpy(ggml.dequantize(packed, type_))
