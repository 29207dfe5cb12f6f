"""How long `qmica train` takes from the command to its first step, with an empty cache and with a full one.

    python scripts/bench_start.py [--threads 2] [--runs 3] [-- TRAIN-FLAGS]

Each run is `python -m qmica train --steps 2 TRAIN-FLAGS` in a process of its own; all share one new cache folder
(QMICA_CACHE), so that the first quantizes the model and computes the subspaces and the others find both. Two moments
are taken by the clock of this process, from before the child is started: when training said the last line before its
loop, from where the first update is being computed, and when the first step was printed. CPU-seconds (user and system)
to the first of them tell a machine that is shared from a program that is slow.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 8.0  # seconds from the command until a cached SmolLM2 is stepping, on 2 cores
LAST_LINE = re.compile(r"^\d+ steps? of ")
STEP = re.compile(r"^step 1/")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far; 0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(flags: list[str], cache: Path, out: Path) -> tuple[float, float, float]:
    """Seconds until it is stepping, CPU-seconds until then, seconds until the first step is done."""
    command = [sys.executable, "-m", "qmica", "train", "--steps", "2", "--out", str(out), *flags]
    environment = {
        **os.environ,
        "QMICA_CACHE": str(cache),
        "PYTHONUNBUFFERED": "1",
        "GOMP_SPINCOUNT": "0",
        "OMP_WAIT_POLICY": "passive",
    }
    began, stepping, used = time.perf_counter(), None, 0.0
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        for line in child.stdout:
            if LAST_LINE.match(line) and stepping is None:
                stepping, used = time.perf_counter() - began, cpu_seconds(child.pid)
            if STEP.match(line):
                return stepping, used, time.perf_counter() - began
        raise SystemExit(f"{' '.join(command[1:])} ended with status {child.wait()} before its first step")
    finally:
        child.kill()
        child.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3, help="with a full cache")
    parser.add_argument("flags", nargs="*", help="of qmica train, after --")
    options = parser.parse_args()
    flags = ["--threads", str(options.threads), *options.flags]
    found = []
    with tempfile.TemporaryDirectory(prefix="qmica-start-") as folder:
        for number in range(options.runs + 1):
            stepping, used, done = start(flags, Path(folder) / "cache", Path(folder) / f"run-{number}")
            kind = "cached" if number else "empty cache"
            print(
                f"{kind:>12}: stepping after {stepping:5.2f} s ({used:5.2f} CPU-s), first step done after {done:5.2f} s"
            )
            found += [stepping] if number else []
    middle = statistics.median(found)
    spread = f"{min(found):.2f} to {max(found):.2f}"
    verdict = "within" if middle <= LIMIT else "above"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"cached: stepping after {middle:.2f} s (median of {len(found)}, {spread}), {verdict} {LIMIT:g} s{load}")


if __name__ == "__main__":
    main()
