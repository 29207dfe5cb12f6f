"""Small real runs for the tests: a tiny model on disk, thirty short documents, and `train` on them in this process.

flags = small_runs.make(folder)  # of `qmica train`: 6 steps, accumulation, dropout, packing
run = small_runs.train(flags, out=tmp_path / "run", bits=8)
"""

import json
from pathlib import Path

import tiny
from accelerate import Accelerator

from qmica import adapter, checkpointing, data, loss, model, runs, source, tokenizer, training
from qmica.config import Job

TIMING = ("tokens_per_s", "peak_bytes")  # what may differ between two equal runs
DOCUMENTS = [
    f"Keeper {i} of bay {i * 7 % 23} counted {i * 31 % 97} lamps; {'the weaver had warm bread. ' * (i % 4)}"
    for i in range(30)
]
GENERAL = "The ferry was late, and the people on the quay talked of the weather and of the price of rope. " * 12


def make(folder, **config) -> dict:
    """A llama and its documents in `folder`; the flags that train on them."""
    folder = Path(folder)
    tiny.save_tiny(folder / "model", "llama", **config)
    texts = folder / "documents.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (folder / "general.txt").write_text(GENERAL)
    return {
        "model": str(folder / "model"),
        "data": (str(texts),),
        "dtype": "fp32",
        "device": "cpu",
        "rank": 4,
        "dropout": 0.1,
        "max_seq_length": 64,
        "val_split": 0.1,
        "steps": 6,
        "batch_size": 2,
        "grad_accum": 2,
        "lr": 5e-3,
        "probe": "The keeper counted",
    }


def with_replay(flags: dict, target: str = "base") -> dict:
    """The same run with general text mixed in, held to the base or learnt."""
    general = Path(flags["data"][0]).parent / "general.txt"
    return {**flags, "replay": (str(general),), "replay_ratio": 0.3, "replay_target": target}


def job(flags: dict, **changes) -> Job:
    return Job.from_flags({**flags, **changes})


def train(flags: dict, resume=None, **changes) -> runs.Run:
    parts = job(flags, **changes)
    return training.train(parts.model, parts.adapter, parts.data, parts.training, resume)


def loop(flags: dict, folder, **changes) -> training.Loop:
    """The loop of a run that has not begun, without the run around it."""
    parts = job(flags, **changes)
    found = source.resolve(parts.model.model)
    prepared = data.prepare(
        parts.data.data,
        tokenizer.load(found),
        max_seq_length=parts.data.max_seq_length,
        packing=parts.data.packing,
        val_split=parts.data.val_split,
        replay=parts.data.replay,
        replay_ratio=parts.data.replay_ratio,
        say=lambda text: None,
    )
    network = model.load(found, parts.model.bits, parts.model.dtype, "cpu")
    adapter.attach(network, parts.adapter, parts.training.seed)
    mode = "checkpoint" if parts.training.grad_checkpoint else "plain"
    checkpointing.set_modes(network, [mode] * network.config.num_hidden_layers)
    loss.Head.of(network)  # which runs the network once, whatever watches it later
    return training.Loop(parts, runs.Run(Path(folder)), network, prepared, Accelerator(cpu=True))


def starve(nbytes: float) -> None:
    """Let this process have so much more memory of its own (RLIMIT_DATA counts what is private and written)."""
    import resource

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    limit = int(status["VmData"].split()[0]) * 1024 + int(nbytes)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def result(run: runs.Run) -> bytes:
    """The trained tensors, as they lie on the disk."""
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def rows(run: runs.Run) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    kept = [{key: value for key, value in row.items() if key not in TIMING} for row in run.read_metrics()]
    for row in kept:
        row.get("end", {}).pop("peak_bytes", None)
    return kept
