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
Tell = Callable[[int, str, bool], None]  # how many are done, what to say of it, whether a plain line must say it


@contextmanager
def shown(total: int, done: int = 0, wanted: bool = True) -> Iterator[Show]:
    """A function that shows a row of metrics.jsonl each step. wanted: False in processes that are not the first."""
    if not wanted:
        yield lambda row: None
        return
    with _told(Console(), "step", total, done) as tell:
        yield lambda row: tell(row["step"], numbers(row), "val_loss" in row)


@contextmanager
def counted(total: int, part: str) -> Iterator[Callable[[int, str], None]]:
    """A function that shows on stderr how many of `total` parts ("layer") are done and the last one's name: stdout is
    for what the job finds.
    """
    with _told(Console(stderr=True), part, total, 0) as tell:
        yield lambda done, name: tell(done, name, False)


@contextmanager
def _told(console: Console, part: str, total: int, done: int) -> Iterator[Tell]:
    if not console.is_terminal:
        yield _plain(console, part, total, done)
        return
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}  {task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda at, text, _: bar.update(task, completed=at, description=text)


def _plain(console: Console, part: str, total: int, done: int) -> Tell:
    """Prints about LINES lines, and every one that must be said."""
    every, began = max(1, math.ceil((total - done) / LINES)), time.perf_counter()

    def tell(at: int, text: str, must: bool) -> None:
        if at % every == 0 or at in (done + 1, total) or must:
            left = (time.perf_counter() - began) / (at - done) * (total - at)
            print(f"{part} {at}/{total}  {text}  {duration(left)} left", file=console.file, flush=True)

    return tell


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
