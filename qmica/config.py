"""Every option of every verb: one frozen dataclass a concern, whose fields are the flags, the keys of `-c file.yaml`
and the arguments of the Python API.

A default stands here and nowhere else, the docstring under a field is its --help, and what can be checked without a
model is checked in `__post_init__`, all problems at once. Literals only: nothing here imports torch.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from qmica.errors import QmicaError

Flag = Parameter  # Annotated[int, Flag(name=…)]: a flag's further names
_FreeText = Parameter(allow_leading_hyphen=True)  # --prompt "- a list" is a text, not a flag


def _require(*checks: tuple[bool, str]) -> None:
    """Raise one QmicaError naming every check (holds, text) that does not hold."""
    problems = [text for holds, text in checks if not holds]
    if problems:
        raise QmicaError("; ".join(problems))


def _as_tuple(value: str | Path | Sequence) -> tuple[str, ...]:
    """One path or several, as the Python API takes them."""
    return (str(value),) if isinstance(value, str | Path) else tuple(str(part) for part in value)


_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
MOST_GB = 10_000  # a plain number above is bytes, meant or mistaken: refused


def _nbytes(text: str) -> float:
    """Bytes of a size as people write it: 8GB, 7.5G, 8GiB, 900MB; a plain number is GB. 0 for nonsense."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        return 0
    number, unit, binary, byte = found.groups()
    if not unit:
        return float(number) if byte else float(number) * 1e9 * (float(number) < MOST_GB)
    return float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower())


SHARD = "5GB"  # of a merged folder's file, as transformers writes


def shard_bytes(text: str) -> int:
    """--max-shard-size in bytes. Raises QmicaError for what is no size, or below a megabyte."""
    nbytes = int(_nbytes(str(text)))
    _require((nbytes >= 1_000_000, f"--max-shard-size {text}: give a size such as 5GB or 900MB, 1MB or more"))
    return nbytes


@Parameter(name="*", group=Group("Model", sort_key=1))
@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held in memory."""

    model: Annotated[str, Flag(name=("--model", "-m"))] = "smollm2-135m"
    """An alias (see `qmica models`), a hub id, a folder of safetensors, or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    bits: Literal[4, 8, 16, "gguf"] = 4
    """How the frozen weights are held: 4 = NF4, 8 = int8, 16 = bf16, gguf = the GGUF's own blocks, as they are."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the arithmetic is done in; auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto: CUDA where there is one."""
    stream: Literal["none", "host", "disk"] = "none"
    """Keep two decoder layers' weights on the device, the rest in host memory (for a GPU) or in a file on the disk."""
    threads: int | None = None
    """CPU threads; left out: all cores."""

    def __post_init__(self):
        _require((self.threads is None or self.threads > 0, f"--threads {self.threads}: give 1 or more"))


@Parameter(name="*", group=Group("Adapter", sort_key=2))
@dataclass(frozen=True)
class AdapterConfig:
    """What is trained beside the frozen weights."""

    rank: Annotated[int, Flag(name=("--rank", "-r", "--lora-r"))] = 16
    """Columns of B: how many directions each adapted linear gets."""
    alpha: float | None = None
    """The adapter is scaled by alpha / rank; left out: 2 x rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    targets: Annotated[str, Flag(name=("--targets", "--target-modules"))] = "all"
    """Which linears: qv, attn, mlp, all, or names (q_proj,down_proj)."""
    method: Literal["mica", "lora"] = "mica"
    """mica trains A beside a frozen B of singular vectors; lora trains both, for comparison."""
    components: Literal["minor", "major", "random"] = "minor"
    """Which left singular vectors B holds; major and random are for comparison."""
    subspace_from: Literal["quantized", "original"] = "quantized"
    """The weights that B is computed from: as they are held (--bits), or the model's own before that."""

    def __post_init__(self):
        _require(
            (self.rank > 0, f"--rank {self.rank}: give 1 or more"),
            (self.alpha is None or 0 < self.alpha < inf, f"--alpha {self.alpha}: give more than 0"),
            (0 <= self.dropout < 1, f"--dropout {self.dropout}: give 0 or more and less than 1"),
            (
                self.method == "mica" or self.components == "minor",
                f"--components {self.components}: --method lora has no singular vectors, leave one of the two out",
            ),
            (
                self.subspace_from == "quantized" or (self.method == "mica" and self.components != "random"),
                f"--subspace-from {self.subspace_from}: there is no subspace to compute with --method {self.method} "
                f"--components {self.components}, leave it out",
            ),
        )

    @property
    def scaling_alpha(self) -> float:
        """alpha, with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@Parameter(name="*", group=Group("Data", sort_key=3))
@dataclass(frozen=True)
class DataConfig:
    """What is learnt from, and how it is cut into rows."""

    data: Annotated[tuple[str, ...], Flag(name=("--data", "-d", "--dataset"), consume_multiple=True)] = ()
    """Files (.txt .md .jsonl .json .csv .parquet), folders of them, or a hub dataset; left out: the bundled almanac."""
    format: Literal["auto", "text", "messages", "prompt", "alpaca", "sharegpt"] = "auto"
    """What a record is; auto: found by looking."""
    max_seq_length: Annotated[int, Flag(name=("--max-seq-length", "--cutoff-len"))] = 1024
    """Tokens a row; longer text is split into windows."""
    packing: bool = True
    """Fill a row with several documents, none of which sees another."""
    mask_prompt: bool = True
    """In chats, learn the assistant's turns only."""
    val_split: float = 0.0
    """Share of the documents kept from training, whose loss is reported."""
    replay: Annotated[tuple[str, ...], Flag(consume_multiple=True)] = ()
    """General text mixed in against forgetting: a file, a folder, a hub dataset, or `sample` for the bundled one."""
    replay_ratio: float = 0.25
    """Share of all tokens that is replay, where --replay is given."""
    replay_target: Literal["base", "text"] = "base"
    """What replay holds to: base = what the untuned model says there; text = the text, learnt like the data."""
    replay_weight: float = 1.0
    """How much a replayed token counts against one of the data, where --replay-target is base."""

    def __post_init__(self):
        object.__setattr__(self, "data", _as_tuple(self.data))
        object.__setattr__(self, "replay", _as_tuple(self.replay))
        _require(
            (self.max_seq_length >= 8, f"--max-seq-length {self.max_seq_length}: give 8 or more"),
            (0 <= self.val_split < 1, f"--val-split {self.val_split}: give 0 or more and less than 1"),
            (0 < self.replay_ratio < 1, f"--replay-ratio {self.replay_ratio}: give more than 0 and less than 1"),
            (0 < self.replay_weight < inf, f"--replay-weight {self.replay_weight}: give more than 0"),
            (
                self.replay_target == "base" or self.replay_weight == 1,
                f"--replay-weight {self.replay_weight}: --replay-target text learns it like the data, leave one out",
            ),
            (
                bool(self.replay) or (self.replay_target, self.replay_weight) == ("base", 1),
                "--replay-target and --replay-weight are for --replay: name a text, or `--replay sample`",
            ),
        )


@Parameter(name="*", group=Group("Training", sort_key=4))
@dataclass(frozen=True)
class TrainingConfig:
    """How the coefficients are trained."""

    lr: Annotated[float, Flag(name=("--lr", "--learning-rate"))] = 1e-3
    """Learning rate at its peak."""
    epochs: Annotated[float, Flag(name=("--epochs", "--num-epochs"))] = 4.0
    """Passes over the data, where --steps is not given."""
    steps: Annotated[int | None, Flag(name=("--steps", "--iters", "--max-steps"))] = None
    """Updates of the weights; overrides --epochs."""
    batch_size: Annotated[int, Flag(name=("--batch-size", "--micro-batch-size"))] = 1
    """Rows computed at once."""
    grad_accum: Annotated[int, Flag(name=("--grad-accum", "--gradient-accumulation-steps"))] = 1
    """Batches whose gradients are added up for one update."""
    optimizer: Literal["auto", "paged_adamw_8bit", "adamw_8bit", "adamw"] = "auto"
    """auto: paged_adamw_8bit on CUDA, adamw on a CPU."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip: float = 1.0
    """Largest norm of a gradient; 0: not clipped."""
    memory: str | None = None
    """Bytes the run may hold: 8GB, 8GiB, 900MB, or a number of GB; left out: four fifths of what is free."""
    grad_checkpoint: bool | None = None
    """Compute every layer again in the backward: least memory, a quarter more time; left out: as --memory has it."""
    compile: Annotated[bool, Flag(negative=())] = False
    """Compile the decoder layers (torch.compile, a minute or so at the start), if a timed batch is then faster."""
    eval_every: int = 0
    """Steps between validation losses (needs --val-split); 0: at the end only."""
    save_every: int = 100
    """Steps between checkpoints; 0: at an interruption only."""
    out: Annotated[Path | None, Flag(name=("--out", "-o"))] = None
    """The run folder; left out: runs/<model>-<data>-<n>."""
    seed: int = 0
    """Order of the data, dropout, and random components."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """A tracker that is sent the metrics beside metrics.jsonl."""
    probe: Annotated[str | None, _FreeText] = None
    """A prompt answered before and after training; left out: the start of the first document."""

    def __post_init__(self):
        object.__setattr__(self, "memory", None if self.memory is None else str(self.memory))
        _require(
            (0 < self.lr < inf, f"--lr {self.lr}: give more than 0"),
            (0 < self.epochs < inf, f"--epochs {self.epochs}: give more than 0"),
            (self.steps is None or self.steps > 0, f"--steps {self.steps}: give 1 or more"),
            (self.batch_size > 0, f"--batch-size {self.batch_size}: give 1 or more"),
            (self.grad_accum > 0, f"--grad-accum {self.grad_accum}: give 1 or more"),
            (
                self.memory is None or _nbytes(self.memory) > 0,
                f"--memory {self.memory}: give a size such as 8GB, 7.5G, 8GiB or 900MB, or a number of GB",
            ),
            (0 <= self.warmup < 1, f"--warmup {self.warmup}: give 0 or more and less than 1"),
            (0 <= self.weight_decay < inf, f"--weight-decay {self.weight_decay}: give 0 or more"),
            (self.clip >= 0, f"--clip {self.clip}: give 0 or more"),
            (self.eval_every >= 0, f"--eval-every {self.eval_every}: give 0 or more"),
            (self.save_every >= 0, f"--save-every {self.save_every}: give 0 or more"),
            (self.seed >= 0, f"--seed {self.seed}: give 0 or more"),
        )

    @property
    def memory_bytes(self) -> int | None:
        """--memory in bytes; None for what is free."""
        return None if self.memory is None else int(_nbytes(self.memory))


@dataclass(frozen=True)
class Job:
    """All options of a run."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    def flags(self) -> dict:
        """The options as one flat mapping of flag names to JSON values: a valid -c file."""
        flat = {}
        for part in (self.model, self.adapter, self.data, self.training):
            flat |= asdict(part)
        return {name: str(value) if isinstance(value, Path) else value for name, value in flat.items()}

    @classmethod
    def from_flags(cls, flags: dict) -> "Job":
        """The inverse of `flags`."""
        kinds = {"model": ModelConfig, "adapter": AdapterConfig, "data": DataConfig, "training": TrainingConfig}
        typed = {**flags, "out": Path(flags["out"]) if flags.get("out") else None}
        return cls(
            **{
                part: kind(**{f.name: typed[f.name] for f in fields(kind) if f.name in typed})
                for part, kind in kinds.items()
            }
        )


QUANTS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
UNWEIGHABLE = {"F32", "F16", "BF16", "Q8_0"}  # ggml rounds them the same way with an importance matrix and without


@Parameter(name="*", group=Group("Export", sort_key=0))
@dataclass(frozen=True)
class ExportConfig:
    """What is written as GGUF."""

    out: Annotated[Path | None, Flag(name=("--out", "-o"))] = None
    """The file, or the folder of several (--quant Q4_K_M,Q8_0); left out: RUN/<name>.<quant|adapter>.gguf."""
    quant: str | None = None
    """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S/M/L Q4_K_S/M Q5_K_S/M Q6_K IQ4_NL/XS; left out: Q4_K_M"""
    imatrix: Path | None = None
    """An importance matrix of llama-imatrix: quantization errors weigh by how much each input is used."""
    adapter: Annotated[bool, Flag(negative=())] = False
    """The adapter alone (F32, F16 or BF16), to be used beside the GGUF you already have."""
    base: Literal["original", "quantized"] = "original"
    """Which weights it stays near: the source's own, or those that training saw (--adapter gets columns for it)."""
    scale: float = 1.0
    """How much of the run's adapter is used: below 1 less is forgotten, and less is known."""
    max_shard_size: str | None = None
    """Largest part, 5GB or 900MB: what is larger becomes a folder of parts, in place of the file."""
    ollama: Annotated[bool, Flag(negative=())] = False
    """Write a Modelfile beside it, with the template in Ollama's language and every stop token."""
    verify: Annotated[bool, Flag(negative=())] = False
    """Compare what the model as trained, the merged one and the file in llama.cpp answer."""
    threads: int | None = None
    """CPU threads; left out: all cores."""

    def __post_init__(self):
        chosen = self.quant if self.quant is not None else "F32" if self.adapter else "Q4_K_M"
        object.__setattr__(self, "quant", chosen.upper().replace(" ", ""))
        unknown = [quant or "''" for quant in self.quants if quant not in QUANTS]
        several, weighable = len(self.quants) > 1, set(self.quants) - UNWEIGHABLE
        _require(
            (not unknown, f"--quant {', '.join(unknown)}: choose one of {', '.join(QUANTS)}"),
            (len(set(self.quants)) == len(self.quants), f"--quant {self.quant}: name each type once"),
            (
                not several or self.out is None or self.out.suffix.lower() != ".gguf",
                f"--out {self.out} is one file, and --quant {self.quant} makes {len(self.quants)}: name a folder",
            ),
            (
                self.imatrix is None or (bool(weighable) and not self.adapter),
                f"--imatrix changes nothing in {'an adapter' if self.adapter else self.quant}: leave it out",
            ),
            (
                not (self.ollama and self.max_shard_size),
                "--ollama takes one file, and --max-shard-size makes parts: leave one of them out",
            ),
            (
                not (self.adapter and self.max_shard_size),
                "--max-shard-size is for merged models, and llama.cpp reads an adapter from one file: leave it out",
            ),
            (
                not (several and self.max_shard_size),
                f"--max-shard-size takes one type, and --quant {self.quant} names {len(self.quants)}: name one",
            ),
            (0 < self.scale < inf, f"--scale {self.scale}: give more than 0"),
            (self.threads is None or self.threads > 0, f"--threads {self.threads}: give 1 or more"),
        )
        if self.max_shard_size is not None:
            shard_bytes(self.max_shard_size)

    @property
    def shard_bytes(self) -> int | None:
        """--max-shard-size in bytes; None for one file."""
        return None if self.max_shard_size is None else shard_bytes(self.max_shard_size)

    @property
    def quants(self) -> tuple[str, ...]:
        """The types of `quant`, in its order."""
        return tuple(self.quant.split(","))


@Parameter(name="*", group=Group("Evaluation", sort_key=0))
@dataclass(frozen=True)
class EvalConfig:
    """What is measured, base against tuned."""

    data: Annotated[tuple[str, ...], Flag(name=("--data", "-d"))] = ()
    """Text whose perplexity is measured; left out: the bundled general text."""
    questions: Path | None = None
    """JSONL of {question, choices, answer}, answer counted from 0; left out: the almanac's, if the run learnt it."""
    max_seq_length: int = 512
    """Tokens a window of text."""
    free: int = 0
    """So many of the questions are also answered in words, right where the exact choice stands in the answer."""
    limit: int | None = None
    """Only the first so many questions, and the first so many windows of text."""
    scale: float = 1.0
    """How much of the run's adapter is used: below 1 less is forgotten, and less is known."""
    gguf: tuple[Path, ...] = ()
    """GGUF files asked the same in llama.cpp (the text where --data is given); FILE+ADAPTER.gguf puts an adapter on."""

    def __post_init__(self):
        object.__setattr__(self, "data", _as_tuple(self.data))
        _require(
            (self.max_seq_length >= 8, f"--max-seq-length {self.max_seq_length}: give 8 or more"),
            (0 < self.scale < inf, f"--scale {self.scale}: give more than 0"),
            (self.limit is None or self.limit > 0, f"--limit {self.limit}: give 1 or more"),
            (self.free >= 0, f"--free {self.free}: give 0 or more"),
        )


@Parameter(name="*", group=Group("Chat", sort_key=0))
@dataclass(frozen=True)
class ChatConfig:
    """How a model answers."""

    prompt: Annotated[str | None, _FreeText] = None
    """Answer this and stop; left out: a conversation."""
    raw: Annotated[bool, Flag(negative=())] = False
    """Go on with the text of the last turn (behind --system), without a chat template, as text was learnt."""
    system: Annotated[str | None, _FreeText] = None
    """The system message."""
    adapter: Path | None = None
    """An adapter GGUF on top of a GGUF."""
    scale: float = 1.0
    """How much of the adapter is used (a run's, or --adapter's): below 1 less is forgotten, and less is known."""
    temp: float = 0.0
    """Temperature; 0 takes the likeliest token each time."""
    ctx: int = 4096
    """Tokens of context."""
    max_tokens: int = 256
    """Longest answer."""
    seed: int = 0
    """Of the sampling, where --temp is above 0."""
    threads: int | None = None
    """CPU threads; left out: all cores."""

    def __post_init__(self):
        _require(
            (0 < self.scale < inf, f"--scale {self.scale}: give more than 0"),
            (0 <= self.temp < inf, f"--temp {self.temp}: give 0 or more"),
            (self.ctx > 0, f"--ctx {self.ctx}: give 1 or more"),
            (self.max_tokens > 0, f"--max-tokens {self.max_tokens}: give 1 or more"),
            (self.threads is None or self.threads > 0, f"--threads {self.threads}: give 1 or more"),
        )


@Parameter(name="*", group=Group("Inspection", sort_key=0))
@dataclass(frozen=True)
class InspectConfig:
    """What is asked of a model's weights."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    rank: Annotated[int, Flag(name=("--rank", "-r"))] = 16
    """How many of the smallest singular values count as minor."""
    targets: str = "all"
    """Which linears: qv, attn, mlp, all, or names (q_proj,down_proj)."""
    bits: Annotated[tuple[Literal[4, 8], ...], Flag(consume_multiple=True)] = (4, 8)
    """Formats whose minor subspaces are compared with the original's: 4 = NF4, 8 = int8."""
    plot: Path | None = None
    """A folder for spectra.png and overlap.png; left out: no pictures."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto: CUDA where there is one."""
    threads: int | None = None
    """CPU threads; left out: all cores."""

    def __post_init__(self):
        bits = (self.bits,) if isinstance(self.bits, int) else dict.fromkeys(self.bits)
        object.__setattr__(self, "bits", tuple(bits))
        _require(
            (self.rank > 0, f"--rank {self.rank}: give 1 or more"),
            (
                bool(self.bits) and set(self.bits) <= {4, 8},
                f"--bits {' '.join(map(str, self.bits))}: choose 4, 8 or both",
            ),
            (self.threads is None or self.threads > 0, f"--threads {self.threads}: give 1 or more"),
        )
