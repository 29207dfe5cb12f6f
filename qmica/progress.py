"""How a run shows where it is: a bar on a terminal, plain lines elsewhere.

What it gives up: a bar in notebooks, which get the plain lines.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qmica.durable import size_text

LINES = 20  # plain lines a run

Show = Callable[[dict], None]


@contextmanager
def shown(total: int, done: int = 0, wanted: bool = True) -> Iterator[Show]:
    """A function that shows a row of metrics.jsonl each step. wanted: False in processes that are not the first."""
    console = Console()
    if not wanted:
        yield lambda row: None
    elif console.is_terminal:
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total}  {task.description}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("", total=total, completed=done)
            yield lambda row: bar.update(task, completed=row["step"], description=numbers(row))
    else:
        yield _plain(total, done)


def _plain(total: int, done: int) -> Show:
    """Prints about LINES lines, and every validation."""
    every, began = max(1, math.ceil((total - done) / LINES)), time.perf_counter()

    def show(row: dict) -> None:
        step = row["step"]
        if step % every == 0 or step in (done + 1, total) or "val_loss" in row:
            left = (time.perf_counter() - began) / (step - done) * (total - step)
            print(f"step {step}/{total}  {numbers(row)}  {duration(left)} left", flush=True)

    return show


def numbers(row: dict) -> str:
    """Losses (nats a token), speed and memory of a row."""
    names = {"loss": "loss", "replay_kl": "replay", "val_loss": "val"}
    losses = "  ".join(f"{shown} {row[name]:.3f}" for name, shown in names.items() if name in row)
    return f"{losses}  {row['tokens_per_s']:.0f} tokens/s  {size_text(row['peak_bytes'])}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 7 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
