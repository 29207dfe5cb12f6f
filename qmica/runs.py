"""The run folder: its config, metrics, checkpoints and result. The only place that knows its file names.

    runs/<name>/
      config.json               the resolved flags under "train" (a valid -c file), versions, what base and data were
      metrics.jsonl             one line a logged step
      adapter/                  the result
      checkpoints/step-000100/  adapter.safetensors, optimizer.safetensors, state.json, manifest.json

A checkpoint is written to a sibling folder, synced and renamed, and its manifest names the size and SHA-256 of each
file, so that it exists whole or is refused. What it gives up: history. The last two checkpoints are kept, older ones
removed.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qmica import durable, samples
from qmica.config import DataConfig, Job, ModelConfig
from qmica.errors import QmicaError

HOME = Path("runs")
KEPT = 2  # the newest, and one more in case the newest is damaged
_CONFIG, _METRICS, _ADAPTER, _CHECKPOINTS = "config.json", "metrics.jsonl", "adapter", "checkpoints"
_STATE, _MANIFEST = "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, found whole."""

    folder: Path
    step: int

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `adapter` or `optimizer`."""
        return load_file(self.folder / f"{name}.safetensors")

    def state(self) -> dict:
        """Everything that is not a tensor."""
        return json.loads((self.folder / _STATE).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Run:
    """A run folder, or an adapter folder that is read like one."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def adapter(self) -> Path:
        """The folder of the adapter's files."""
        return self.folder if is_adapter(self.folder) else self.folder / _ADAPTER

    @property
    def metrics(self) -> Path:
        return self.folder / _METRICS

    def config(self) -> dict:
        """config.json; empty for a bare adapter folder."""
        path = self.folder / _CONFIG
        if not path.exists() or is_adapter(self.folder):
            return {}
        return _read(path)

    def model_config(self, base) -> dict:
        """The fields of ModelConfig that load this run's base: the run's own flags, else what the adapter says of its
        base.
        """
        names = {field.name for field in fields(ModelConfig)}
        flags = {name: value for name, value in (self.config().get("train") or {}).items() if name in names}
        own = {} if base is None else {"model": base.id, "revision": base.revision, "bits": base.bits or 4}
        return own | flags

    def write_config(self, config: Mapping) -> None:
        durable.write_json(self.folder / _CONFIG, config)

    def log(self, row: Mapping) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict]:
        """The rows of metrics.jsonl, without a last line that is torn: the machine stopped in the middle of it."""
        if not self.metrics.exists():
            return []
        rows, lines = [], self.metrics.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(_object(line))
            except ValueError as error:
                if number < len(lines):
                    raise QmicaError(f"{self.metrics} is damaged in line {number}: {error}") from error
        return rows

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: a resumed run writes them again."""
        kept = [row for row in self.read_metrics() if row.get("step", 0) <= step and "end" not in row]
        durable.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def save_checkpoint(self, step: int, tensors: Mapping[str, Mapping[str, torch.Tensor]], state: Mapping) -> Path:
        """Write a checkpoint of named tensor sets and a JSON state; then drop all but the newest two. Returns its
        folder.
        """
        folder = self.folder / _CHECKPOINTS / f"step-{step:06d}"
        if folder.exists():
            shutil.rmtree(folder)
        with durable.replacing_folder(folder) as part:
            for name, values in tensors.items():
                save_file({key: value.contiguous() for key, value in values.items()}, part / f"{name}.safetensors")
            (part / _STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {path.name: _seal(path) for path in sorted(part.iterdir())}
            (part / _MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
        for old in self._checkpoints()[:-KEPT]:
            shutil.rmtree(old)
        return folder

    def learnt_from(self) -> DataConfig | None:
        """The flags of what it learnt from, the bundled almanac named where no file was; None where that is not known,
        or not where it was.
        """
        flags = self.config().get("train")
        options = None if flags is None else Job.from_flags(flags).data
        files = options and (options.data or samples.ALMANAC)
        return replace(options, data=files) if files and all(Path(file).exists() for file in files) else None

    def last_checkpoint(self) -> Checkpoint:
        """The newest checkpoint that is whole. Raises QmicaError where there is none, saying what is wrong with those
        there are.
        """
        problems = []
        for folder in reversed(self._checkpoints()):
            problem = _damage(folder)
            if problem is None:
                return Checkpoint(folder, _step(folder))
            problems.append(problem)
        reason = "; ".join(problems) or "it has no checkpoints (see --save-every)"
        raise QmicaError(f"{self.folder} cannot be resumed: {reason}")

    def _checkpoints(self) -> list[Path]:
        """The checkpoints' folders, oldest first; not the `.part` of one whose writer was killed."""
        folders = (self.folder / _CHECKPOINTS).glob("step-*")
        return sorted((folder for folder in folders if re.fullmatch(r"step-\d+", folder.name)), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(path: Path) -> dict:
    """A JSON object. Raises QmicaError for a damaged file."""
    try:
        return _object(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise QmicaError(f"{path} is damaged: {error}") from error


def _object(content: bytes) -> dict:
    """A JSON object. Raises ValueError for anything else, and for what is not UTF-8."""
    found = json.loads(content.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def _seal(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": durable.sha256(path)}


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest = folder / _MANIFEST
    if not manifest.exists():
        return f"{folder.name} has no {_MANIFEST}"
    try:
        seals = _read(manifest)
    except QmicaError:
        return f"{folder.name}/{_MANIFEST} is damaged"
    for name, seal in {_STATE: None, **seals}.items():
        path = folder / name
        if not path.exists() or _seal(path) != seal:
            return f"{folder.name}/{name} is missing or damaged"
    return None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's files."""
    return (folder / "adapter_config.json").exists()


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json: a model's has no "train". A damaged one counts: `config` names it."""
    path = folder / _CONFIG
    if not path.exists():
        return False
    try:
        return isinstance(_read(path).get("train"), dict)
    except QmicaError:
        return True


def require_result(adapter: Path) -> None:
    """Raise QmicaError, saying how to go on, where `adapter` is a run's folder for its result and the result is not
    there yet.
    """
    run = Run(adapter.parent)
    if adapter.name != _ADAPTER or is_adapter(adapter) or not is_run(run.folder):
        return
    advice = f"go on with `qmica train --resume {run.folder}`"
    if not run._checkpoints():
        advice = "it left no checkpoint to go on from: train again (see --save-every)"
    raise QmicaError(f"{run.folder} has no adapter yet, its training has not finished: {advice}")


def create(out: Path | None, model: str, data: str) -> Run:
    """A new run folder: `out`, which must be missing or empty, else runs/<model>-<data>-<n>."""
    folder = Path(out) if out is not None else _next(f"{_word(model)}-{_word(data)}")
    durable.require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder)


def _word(text: str) -> str:
    """The last part of a path or id, fit for a folder's name."""
    stem = Path(text).name.split(".")[0] or "model"
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-").lower()[:40] or "run"


def _next(stem: str) -> Path:
    number = 1
    while (HOME / f"{stem}-{number}").exists():
        number += 1
    return HOME / f"{stem}-{number}"


def _all() -> Iterator[Path]:
    return (folder for folder in HOME.glob("*") if is_run(folder) or is_adapter(folder))


def find(name: str | Path | None = None) -> Run:
    """A run by its folder, its name under runs/, or (None) the newest. Raises QmicaError naming what was looked for
    and where.
    """
    if name is None:
        newest = max(_all(), key=lambda folder: folder.stat().st_mtime, default=None)
        if newest is None:
            raise QmicaError(f"there is no run in {HOME.resolve()}: name a run folder, or make one with `qmica train`")
        return Run(newest)
    places = (Path(name), HOME / name)
    for folder in places:
        if is_run(folder) or is_adapter(folder):
            return Run(folder)
    for folder in places:
        if (folder / _CONFIG).exists():
            raise QmicaError(
                f"{folder} is a model, neither a run nor an adapter: name what was trained on it, or train with "
                f"`qmica train --model {folder}`"
            )
    known = ", ".join(sorted(folder.name for folder in _all())[:8]) or "none"
    raise QmicaError(
        f"{name} is no run: neither {Path(name)} nor {HOME / name} holds a run or an adapter; runs here: {known}"
    )
