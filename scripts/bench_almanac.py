"""Measure what the demo's training learns and forgets: several seeds, a control, other methods, in one table.

    python scripts/bench_almanac.py --seeds 0 1 2 [--control] [--gguf] [--development] [--scale PART] [-- TRAIN-FLAGS]

Each row is a `qmica train` with the flags of scripts/demo.sh (those after `--` come last and win), then `qmica eval` of
the part of its adapter that the demo uses, or --scale.
The control learns the almanac with its values shuffled between entries (scripts/make_almanac.py --shuffled) and is
asked the true questions: what it scores above the base does not come from knowing the facts. --gguf also asks each
run's Q4_K_M file, and the original GGUF with its adapter (both exported with --base quantized), in llama.cpp.

--development asks other questions and measures forgetting on another text (the reference pages inside the Python
installation): what the demo's settings were chosen by, so that the bundled questions and text are met by a finished
choice.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
QUESTIONS = HERE.parent / "qmica" / "samples" / "almanac-questions.jsonl"
FREE = 20  # questions answered greedily
DEVELOPMENT_TEXT = 26_000  # characters of the other general text: some 6,000 tokens


def demo_text() -> str:
    """scripts/demo.sh, a command a line."""
    return (HERE / "demo.sh").read_text().replace("\\\n", " ")


def demo_flags() -> list[str]:
    """The flags of the demo's `qmica train`, but for its seed and run folder."""
    command = re.search(r"^run qmica train (.*)$", demo_text(), re.MULTILINE).group(1)
    return shlex.split(re.sub(r"--(seed|out) \S+", "", command))


def demo_scale() -> str:
    """How much of the adapter the demo uses."""
    return re.search(r"--scale (\S+)", demo_text()).group(1)


def overridden(flags: list[str], more: list[str]) -> list[str]:
    """The flags (`--name value` or `--name`) without those that `more` names, then `more`: a flag may stand once."""
    named, kept, keep = {word.partition("=")[0] for word in more}, [], True
    for word in flags:
        keep = word not in named if word.startswith("--") else keep
        kept += [word] if keep else []
    return [*kept, *more]


def qmica(*arguments: object) -> str:
    """Run a verb, its progress on stderr; what it printed."""
    command = [sys.executable, "-m", "qmica", *map(str, arguments)]
    print("$", shlex.join(command[2:]), file=sys.stderr, flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def make_almanac(home: Path, which: str) -> Path:
    """Have scripts/make_almanac.py write `--which`; the file."""
    subprocess.run([sys.executable, HERE / "make_almanac.py", home, f"--{which}"], check=True, stdout=sys.stderr)
    return home / f"almanac-{which}.jsonl"


def development_set(home: Path) -> list[object]:
    """The flags of `qmica eval` that ask the development questions, and read Python's own reference pages."""
    from pydoc_data.topics import topics  # the trials in the README read those of Python 3.11

    text = home / "reference.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics))[:DEVELOPMENT_TEXT], encoding="utf-8")
    return ["--questions", make_almanac(home, "development"), "--data", text]


def measure(folder: Path, flags: list[str], scale: str, gguf: bool, asked: list[object]) -> dict[str, dict]:
    """Train into a folder and evaluate it, so much of its adapter: scores by name."""
    qmica("train", *flags, "--out", folder)
    files = []
    if gguf:
        for what, file in ((["--quant", "Q4_K_M"], "merged.gguf"), (["--adapter"], "adapter.gguf")):
            qmica("export", folder, *what, "--scale", scale, "--base", "quantized", "--out", folder / file)
        known = json.loads(qmica("models", "--json"))["aliases"]
        original = next(row["on_disk"]["path"] for row in known if row["name"] == "smollm2-135m")
        files = ["--gguf", folder / "merged.gguf", "--gguf", f"{original}+{folder / 'adapter.gguf'}"]
    said = json.loads(qmica("eval", folder, "--scale", scale, *asked, "--free", FREE, "--json", *files))
    return {row["name"]: row for row in said["scores"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: the control alone")
    parser.add_argument("--control", action="store_true", help="also learn the shuffled almanac, with seed 0")
    parser.add_argument("--gguf", action="store_true", help="also ask the exported files in llama.cpp")
    parser.add_argument("--development", action="store_true", help="ask what settings are chosen by")
    parser.add_argument("--scale", default=demo_scale(), help="how much of each adapter is used (the demo's)")
    parser.add_argument("flags", nargs="*", help="more flags of qmica train, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        asked = development_set(home) if options.development else ["--questions", QUESTIONS]
        jobs = {f"seed {seed}": ["--seed", str(seed)] for seed in options.seeds}
        if options.control:
            jobs["control"] = ["--seed", "0", "--data", str(make_almanac(home, "shuffled"))]
        gains, ratios = [], []
        for name, extra in jobs.items():
            flags = overridden([*demo_flags(), *extra], options.flags)
            scores = measure(home / name.replace(" ", "-"), flags, options.scale, options.gguf, asked)
            base, tuned = scores.pop("base"), scores.pop("tuned")
            gain, ratio = tuned["accuracy"] - base["accuracy"], tuned["perplexity"] / base["perplexity"]
            print(
                f"{name}: accuracy {base['accuracy']:.3f} -> {tuned['accuracy']:.3f} ({gain:+.3f}), perplexity "
                f"{base['perplexity']:.2f} -> {tuned['perplexity']:.2f} (x {ratio:.3f}), "
                f"free {base['free']} -> {tuned['free']}"
            )
            for file, row in scores.items():
                print(f"  {file}: accuracy {row['accuracy']:.3f}, free {row['free']}")
            sys.stdout.flush()
            if name != "control":
                gains.append(gain)
                ratios.append(ratio)
    for what, values in (("gain", gains), ("perplexity ratio", ratios)) if gains else ():
        print(
            f"{what}: mean {statistics.mean(values):.3f}, {min(values):.3f} to {max(values):.3f}, {len(values)} seeds"
        )


if __name__ == "__main__":
    main()
