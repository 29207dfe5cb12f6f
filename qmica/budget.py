"""What a run keeps and what it computes again, chosen for the memory that it may take.

How: two levers, which give the same sums (but for dropout, whose noise is drawn part by part). A decoder layer may keep
all that its backward needs, its products, or its input alone (`checkpointing`); a batch may be computed
in parts, whose gradients are added; and all of it is counted by `memory.plan`. For each number of parts the layers give
up as little as fits, products before inputs, as computing norms and activations again costs a tenth of multiplying
again; of those ways to fit, the one that takes least time is chosen (`pace`, measured for two seconds on this machine,
where there is a choice at all).

What it gives up: all layers are alike here, so which of them give up more is not asked: the first ones do. A GPU's
levers (checkpoints and embedding on the host, an int8 head) are not here; --stream is the user's to ask for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from qmica import memory, pace
from qmica.checkpointing import CHECKPOINT, MODES, PLAIN, PRODUCTS
from qmica.durable import size_text
from qmica.memory import Case, Plan

SLACK = 1.1  # of the plan, before malloc's holes are returned
OF_WHAT_IS_FREE = 0.8  # other programs, and what the plan does not see, keep a fifth


@dataclass(frozen=True)
class Choice:
    """A way to compute a batch. parts: how many it is cut into; case: that of one part; budget: bytes it may hold."""

    case: Case
    parts: int
    plan: Plan
    budget: float

    @property
    def fits(self) -> bool:
        """Whether it is within the budget, or only the least there is."""
        return self.plan.total <= self.budget

    @property
    def limit(self) -> float:
        """Bytes above which malloc's holes go back to the kernel: a tenth above the plan, never above a budget that it
        is within.
        """
        return min(max(self.budget, self.plan.total), SLACK * self.plan.total)

    @property
    def modes(self) -> tuple[str, ...]:
        return self.case.layer_modes

    def __str__(self) -> str:
        """In words: how many layers keep what, and in how many parts a batch is computed."""
        counts = {mode: self.modes.count(mode) for mode in MODES}
        shown = [f"{'all' if n == len(self.modes) else n} layers {_WORDS[mode]}" for mode, n in counts.items() if n]
        parts = f"; a batch is computed in {self.parts} parts" if self.parts > 1 else ""
        return f"{', '.join(shown)}{parts}"


_WORDS = {
    PLAIN: "keep their activations",
    PRODUCTS: "keep the products of their linears and attention",
    CHECKPOINT: "are computed again in the backward",
}


def choose(case: Case, budget: float, forced: bool | None = None, parts: int | None = None) -> Choice:
    """The fastest way to compute batches of case.rows within `budget` bytes; the one that takes least memory where none
    fits.

    forced: --grad-checkpoint: True: every layer is computed again; False: none is; None: as the budget has it. parts:
    those that a resumed run was computed in.
    """
    numbers = [parts] if parts else _halvings(case.rows.count)
    ways = [_fitting(case, number, budget, forced) for number in numbers]
    within = [way for way in ways if way.fits]
    if not within:
        return min(ways, key=lambda way: way.plan.total)
    if len(within) == 1 or (within[0].parts == 1 and within[0].modes == _ladder(case, forced)[0]):
        return within[0]  # no choice, or nothing is given up
    rates = pace.calibrate(case)
    return min(within, key=lambda way: way.parts * _seconds(way.case, rates))


def least(case: Case, forced: bool | None = None) -> Case:
    """The way to compute a batch that takes least memory: a row at a time, all that may be given up."""
    return replace(case, rows=replace(case.rows, count=1), modes=_ladder(case, forced)[-1])


def _halvings(rows: int) -> Iterator[int]:
    """Numbers of parts: 1, 2, 4, ... up to a row each."""
    parts = 1
    while parts < rows:
        yield parts
        parts *= 2
    yield rows


def _fitting(case: Case, parts: int, budget: float, forced: bool | None) -> Choice:
    """The least that the layers must give up for a batch in so many parts to fit; all there is, if nothing does."""
    part = replace(case, rows=replace(case.rows, count=-(-case.rows.count // parts)))
    for modes in _ladder(case, forced):
        way = replace(part, modes=modes)
        plan = memory.plan(way)
        if plan.total <= budget:
            break
    return Choice(way, parts, plan, budget)


def _ladder(case: Case, forced: bool | None) -> list[tuple[str, ...]]:
    """The modes of the layers, from all kept to all computed again, one layer at a time."""
    count = case.config.num_hidden_layers
    if forced is not None:
        return [(CHECKPOINT if forced else PLAIN,) * count]
    first = [(PRODUCTS,) * n + (PLAIN,) * (count - n) for n in range(count + 1)]
    return first + [(CHECKPOINT,) * n + (PRODUCTS,) * (count - n) for n in range(1, count + 1)]


def _seconds(case: Case, rates: dict[str, float]) -> float:
    return sum(pace.seconds(pace.Step(case, case.rows.tokens), rates).values())


def allowed(named: int | None, device: torch.device) -> int:
    """Bytes that a run may hold: those that --memory names, or most of what is free. What this process holds already
    is a part of the plan on a CPU.
    """
    held = memory.measure(device) if device.type == "cpu" else 0
    free = memory.available(device)
    return int(OF_WHAT_IS_FREE * free) + held if named is None else min(named, free + held)


def described(choice: Choice, nbytes: int, named: bool) -> str:
    """The line that says what was chosen, and for what. named: by --memory."""
    asked = f"--memory {size_text(nbytes)}" if named else f"{size_text(nbytes)}, most of what is free"
    return f"for {asked}: {choice}"
