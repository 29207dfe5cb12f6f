"""Plain lines where nobody watches, a bar on a terminal."""

import io
import re

import pytest
from rich.console import Console

from qmica import progress


def row(step: int, **more) -> dict:
    return {"step": step, "loss": 2.5, "tokens_per_s": 190.4, "peak_bytes": 1_190_000_000, **more}


def lines(capsys, total: int, done: int = 0, validated: tuple[int, ...] = ()) -> list[str]:
    with progress.shown(total, done) as show:
        for step in range(done + 1, total + 1):
            show(row(step, **({"val_loss": 1.25} if step in validated else {})))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("total", [1, 5, 20, 39, 200, 1999])
def test_about_twenty_lines_not_on_a_terminal(capsys, total):
    said = lines(capsys, total)
    assert min(total, 10) <= len(said) <= progress.LINES + 2, f"{len(said)} lines for {total} steps"
    assert said[0].startswith(f"step 1/{total}  loss 2.500  190 tokens/s  1.2 GB  ")
    assert said[-1].startswith(f"step {total}/{total}  ") and said[-1].endswith("0 s left")
    assert not any("\x1b" in line or "\r" in line for line in said)


def test_a_resumed_run_begins_with_a_line_and_every_validation_has_one(capsys):
    said = lines(capsys, 200, done=100, validated=(103, 104))
    steps = [int(re.match(r"step (\d+)/200", line)[1]) for line in said]
    assert steps[0] == 101 and {103, 104, 200} <= set(steps) and len(steps) <= progress.LINES + 4
    assert [step for step, line in zip(steps, said, strict=True) if "  val 1.250  " in line] == [103, 104]


def test_time_left_is_from_the_steps_of_this_process(capsys, monkeypatch):
    """At step 110 of 200, ten steps after going on, 20 s later: 180 s are left."""
    clock = iter([1000.0, 1020.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with progress.shown(200, 100) as show:
        show(row(110))
    assert capsys.readouterr().out.endswith("3 min left\n")


def test_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda: terminal)
    with progress.shown(8, 2) as show:
        for step in range(3, 9):
            show(row(step))
    assert "8/8  loss 2.500  190 tokens/s  1.2 GB" in screen.getvalue()
    assert "━━━━" in screen.getvalue() and "step 8/8" not in screen.getvalue()


def test_other_processes_are_silent(capsys):
    with progress.shown(3, wanted=False) as show:
        show(row(1))
    assert capsys.readouterr() == ("", "")


def test_parts_are_counted_on_stderr(capsys):
    with progress.counted(60, "layer") as done:
        for at in range(1, 61):
            done(at, f"part {at}")
    out, err = capsys.readouterr()
    said = err.splitlines()
    assert out == "" and len(said) <= progress.LINES + 2
    assert said[0].startswith("layer 1/60  part 1  ") and said[-1] == "layer 60/60  part 60  0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (90_000, "25.0 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
