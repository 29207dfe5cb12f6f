"""The plan against what runs take: memory and time of two steps on random models, each in a process of its own.

    python scripts/check_plan.py                   # both sets: those that the plan was fitted on, and the others
    python scripts/check_plan.py --only check      # the others alone
    python scripts/check_plan.py --only smollm2 qwen-attn --json

Memory: `memory.plan` before the run, and the most that the run's own `memory.peak` saw (RssAnon on a CPU, the
allocator's peak on CUDA). Time: the last step, as the first one pays for first use, and what two calibrations right
behind it give; on a CPU in CPU-seconds, as other programs share its cores. The factors of qmica/memory.py (IMPORTS,
WORD, HOLES_KEPT, HOLES_PASSING) come from the set FIT; CHECK tells how good they are, and its worst ratio is the
exit status. --no-holes has glibc map every tensor: what is measured then is the plan without its part `holes`, and
slow.

What it gives up: B is drawn at random (--components random), as singular vectors take longer than all the rest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(ROOT))  # run from a checkout, installed or not
sys.path.insert(0, os.fspath(ROOT / "scripts"))

STEPS, WITHIN, TIME_WITHIN = 2, 0.15, 0.30
SMOLLM2 = ("llama", 49152, 576, 1536, 9, 3)
QWEN = ("qwen2", 151936, 896, 4864, 14, 2)


@dataclass(frozen=True)
class Run:
    """shape: family, vocabulary, width, inside the MLP, heads, key heads. flags: of `qmica train`."""

    shape: tuple
    layers: int
    rows: tuple[int, int]
    flags: dict = field(default_factory=dict)


PLAIN, AGAIN = {"grad_checkpoint": False}, {"grad_checkpoint": True}
FIT = {
    "smollm2-8": Run(SMOLLM2, 8, (2, 512), PLAIN),
    "smollm2-8-again": Run(SMOLLM2, 8, (2, 512), AGAIN),
    "qwen-4": Run(QWEN, 4, (1, 512), AGAIN),
    "qwen-4-qv": Run(QWEN, 4, (1, 512), {**PLAIN, "targets": "qv", "bits": 8}),
    "llama-1024": Run(("llama", 49152, 1024, 2816, 16, 8), 10, (4, 256), {**PLAIN, "method": "lora"}),
    "llama-2048": Run(("llama", 49152, 2048, 8192, 32, 8), 4, (1, 1024), {**AGAIN, "bits": 16}),
}
CHECK = {
    "smollm2": Run(SMOLLM2, 30, (2, 512), PLAIN),
    "smollm2-again": Run(SMOLLM2, 30, (4, 512), AGAIN),
    "smollm2-budget": Run(SMOLLM2, 30, (2, 512), {"memory": "1.4GB"}),
    "qwen-attn": Run(QWEN, 8, (1, 512), {**PLAIN, "targets": "attn", "rank": 64}),
    "qwen-1536": Run(("qwen2", 151936, 1536, 8960, 12, 2), 3, (1, 256), {**AGAIN, "bits": 8}),
    "llama-768": Run(("llama", 49152, 768, 2048, 12, 12), 16, (1, 1024), {**PLAIN, "packing": False, "bits": 16}),
    "llama-512": Run(("llama", 49152, 512, 1408, 8, 4), 20, (2, 256), {**PLAIN, "method": "lora", "targets": "mlp"}),
    "llama-1280": Run(("llama", 65536, 1280, 3456, 20, 4), 6, (2, 1024), {**AGAIN, "rank": 64, "bits": 8}),
}


# ---- one run, in a process of its own


def run_one(run: Run, folder: Path) -> dict:
    """Write the model, train two steps, calibrate: planned and measured bytes and seconds."""
    from qmica import allocator, budget, memory, pace, runs, training
    from qmica.config import Job

    write_model(run, folder / "model")
    (folder / "data.txt").write_text(text(run))
    job = Job.from_flags(flags(run, folder))
    choices, times, held = [], [], []
    clock = time.process_time if job.model.device == "cpu" else time.perf_counter

    def chosen(arguments: tuple, choice: budget.Choice, seconds: float) -> None:
        choices.append(choice)
        held.append(memory.measure(training.model.choose_device(job.model.device)))

    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        allocator.keep_freed = lambda: None
    watch(training, "choose", chosen)
    watch(training.Loop, "update", lambda arguments, result, seconds: times.append(seconds), clock)
    done: runs.Run = training.train(job.model, job.adapter, job.data, job.training)
    (choice,) = choices
    rates = [pace.calibrate(choice.case, clock=clock) for _ in range(2)]
    step = pace.Step(choice.case, choice.case.rows.tokens)
    seconds = choice.parts * statistics.mean(sum(pace.seconds(step, rate).values()) for rate in rates)
    end = [row["end"] for row in done.read_metrics() if "end" in row][-1]
    return {
        "parts": {name: round(size) for name, size in choice.plan.parts.items()},
        "planned": round(choice.plan.total),
        "measured": end["peak_bytes"],
        "libraries_measured": held[0],
        "planned_seconds": seconds,
        "seconds": times[-1],
        "how": str(choice),
        "work": pace.seconds(step, rates[0]),
    }


def watch(owner, name: str, seen, clock=time.perf_counter) -> None:
    """Have seen(arguments, result, seconds) called after each call of owner.name."""
    function = getattr(owner, name)

    def watched(*arguments):
        began = clock()
        result = function(*arguments)
        seen(arguments, result, clock() - began)
        return result

    setattr(owner, name, watched)


def flags(run: Run, folder: Path) -> dict:
    import torch

    count, length = run.rows
    common = {
        "model": str(folder / "model"),
        "data": (str(folder / "data.txt"),),
        "out": str(folder / "run"),
        "components": "minor" if run.flags.get("method") == "lora" else "random",
        "max_seq_length": length,
        "batch_size": count,
        "steps": STEPS,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return {**common, **run.flags}


def text(run: Run) -> str:
    """More words than two steps need, in one document (--no-packing), or in many short ones."""
    from qmica import samples

    almanac = "".join(Path(name).read_text(encoding="utf-8") for name in samples.ALMANAC)
    return almanac * 4


def write_model(run: Run, folder: Path) -> None:
    """A random model and a tokenizer that has as many tokens as the model."""
    from random_model import _LLAMA, _QWEN, _sized, write_model

    family, vocabulary, width, inner, heads, keys = run.shape
    common = {"llama": _LLAMA, "qwen2": _QWEN}[family]
    config = _sized(common, vocabulary, width, inner, run.layers, heads, keys, tie_word_embeddings=True)
    write_model(config, folder, tokenizer=grown_tokenizer(vocabulary, folder.parent / "tokenizer"))


def grown_tokenizer(vocabulary: int, folder: Path) -> Path:
    """SmolLM2's tokenizer with more tokens, each of two others, up to `vocabulary`."""
    from qmica import source, tokenizer

    tokenizer.load(source.resolve("smollm2-135m", say=lambda line: None)).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    words, merges = content["model"]["vocab"], content["model"]["merges"]
    parts = [word for word in words if word.isascii() and word.isalpha() and len(word) > 4]
    pairs = ((a, b) for a in parts for b in parts if a + b not in words)
    at = len(words)
    for a, b in pairs:
        if at >= vocabulary:
            break
        words[a + b], at = at, at + 1
        merges.append([a, b] if isinstance(merges[0], list) else f"{a} {b}")
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


# ---- all of them


def child(name: str, holes: bool) -> dict:
    """What `run_one` finds, in a process of its own."""
    words = [sys.executable, __file__, "--child", name]
    quiet = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **quiet, "QMICA_CACHE": cache}
        if not holes:
            environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}: {done.stderr}")
    found = json.loads(done.stdout.rsplit("FOUND", 1)[1])
    return found if holes else {**found, "planned": found["planned"] - found["parts"]["holes"]}


def line(name: str, found: dict) -> str:
    bytes_, times = found["planned"] / found["measured"], found["planned_seconds"] / found["seconds"]
    memory = f"{found['planned'] / 1e6:8.0f} MB planned {found['measured'] / 1e6:8.0f} measured {bytes_:5.2f}"
    return f"{name:16} {memory}   {found['planned_seconds']:7.2f} s planned {found['seconds']:7.2f} taken {times:5.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["fit", "check"], help="fit, check, or names of runs")
    parser.add_argument("--no-holes", action="store_true", help="every tensor mapped: the plan without its holes")
    parser.add_argument("--json", action="store_true", help="all numbers, one line a run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        with tempfile.TemporaryDirectory() as folder:
            found = run_one({**FIT, **CHECK}[options.child], Path(folder))
        print("FOUND" + json.dumps(found))
        return
    sets = {"fit": FIT, "check": CHECK}
    worst = 0.0
    for name in [one for word in options.only for one in sets.get(word, [word])]:
        found = child(name, not options.no_holes)
        print(json.dumps({"name": name, **found}) if options.json else line(name, found), flush=True)
        if name in CHECK:
            worst = max(worst, abs(found["planned"] / found["measured"] - 1))
    raise SystemExit(worst > WITHIN)


if __name__ == "__main__":
    main()
