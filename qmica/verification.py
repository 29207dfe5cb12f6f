"""`--verify`: whether what was written answers as what was trained, by the logits of each on the same tokens.

How: up to four texts, what the run learnt from where it is at hand and else the bundled novel, 32 tokens of each. The
base with its adapter as it was trained, the merged model in bf16 and the file's own weights (transformers), and the
file in llama.cpp are loaded one after the other; all that stays of each are its log-probabilities after every token.
Pairs are compared by the mean KL divergence and by how often the likeliest next token is the same, and each model by
how much of what training changed in the log-probabilities is there.

A file is broken where llama.cpp cuts an ASCII text into other tokens (of others some families' regexes are known to
differ, tokenizer.py) or reads other weights out of it than transformers does, where what was learnt is not in it, or
where it is further from the merged model than any rounding explains.

What it gives up: long contexts, and time: each model is loaded for it, in 16 bits.
"""

import gc
import itertools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qmica import adapter, allocator, data, llamacpp, model, quant, runs, samples
from qmica.config import UNWEIGHABLE, DataConfig
from qmica.errors import QmicaError
from qmica.source import Source
from qmica.weights import LazyTensor

TEXTS, TOKENS = 4, 32  # 128 positions: log-probabilities of 152,000 tokens at each take 78 MB

# Mean KL in nats above which something is broken. Measured on a trained SmolLM2-135M, which is hurt more by rounding
# than larger models, and on tiny ones; broken by rows of q and k in the wrong order, or by leaving the adapter out.
READ = 0.05  # the same weights in transformers and llama.cpp: 5e-6 to 0.011 (Q2_K, whose inputs llama.cpp rounds); 0.13
ROUNDED = 0.05  # bf16, Q8_0 and finer: 1e-4 to 0.005
QUANTIZED = 1.5  # four bits and more: 0.013 to 0.27; the adapter on other weights than it was trained on: 0.30
COARSE = 2.0  # two and three bits: 0.43 to 0.67; without the signs of the weights 2.6
KEPT = 0.25  # of what was learnt: 0.52 to 1 in sound files; without it less than 0.04
FAINT = 1e-3  # of the rounding's KL: the least change by training of which KEPT was measured; below it is noise
TRAINED, BASE, MERGED, REREAD = "as trained", "the base without it", "merged, bf16", "the file, transformers"


@dataclass(frozen=True)
class Said:
    """What one model said: log-probabilities (positions, vocabulary), fp32, of all texts one behind the other."""

    name: str
    log_p: np.ndarray


@dataclass
class Verification:
    """The models that were asked the same texts, TRAINED and BASE first, and how far two may be from each other."""

    texts: list[list[int]]  # token ids
    said: list[Said] = field(default_factory=list)
    limits: dict[tuple[str, str], float] = field(default_factory=dict)  # (one, other) -> KL in nats
    problems: list[str] = field(default_factory=list)  # what makes the file a broken one
    notes: list[str] = field(default_factory=list)

    def copy(self) -> "Verification":
        """Another one with the same models, to which those of one more file can be added."""
        return Verification(self.texts, [*self.said], {**self.limits}, [*self.problems], [*self.notes])

    def add(self, name: str, log_p: np.ndarray, limits: Mapping[str, float] = MappingProxyType({})) -> None:
        """Another model's answers. limits: how far it may be from models that were added before it."""
        self.said.append(Said(name, log_p))
        self.limits |= {(one, name): limit for one, limit in limits.items()}

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.said]

    def pairs(self) -> Iterator[tuple[str, str, float, float, float | None]]:
        """(one, other, mean KL(one || other) in nats, share of positions with the same likeliest token, how much of
        what was learnt the other has) of the first with its base, then of every two others; the last for the trained
        one's pairs only."""
        trained, base, *others = self.said
        yield trained.name, base.name, *compare(trained.log_p, base.log_p), 0.0
        for other in others:
            kept = effect_kept(trained.log_p, base.log_p, other.log_p)
            yield trained.name, other.name, *compare(trained.log_p, other.log_p), kept
        for one, other in itertools.combinations(others, 2):
            yield one.name, other.name, *compare(one.log_p, other.log_p), None

    def cut(self, text: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
        """The tokens that training and llama.cpp cut a text into."""
        if list(ours) != list(theirs):
            counts = f"{len(theirs)} and {len(ours)}"
            said = f"llama.cpp cuts {text[:40]!r} into other tokens than training did ({counts})"
            (self.problems if text.isascii() else self.notes).append(said)

    def report(self, file: Path) -> None:
        """Print every pair. Raises QmicaError for the first problem, as where two are further apart than may be."""
        titles = (f"{len(self.texts)} texts", "", "KL, nats", "same next token", "of what was learnt")
        table, effect = Table(*titles, box=None, pad_edge=False), 0.0
        for one, other, kl, same, kept in self.pairs():
            shown = "" if kept is None else f"{100 * kept:.0f} %"
            table.add_row(one, other, f"{kl:.2g}", f"{100 * same:.0f} %", shown)
            effect = kl if other == BASE else effect
            self.problems += self._too_far(one, other, kl)
            if kept is not None and other != BASE and effect > FAINT * kl and not kept >= KEPT:
                self.problems.append(f"only {100 * kept:.0f} % of what was learnt is in {other}")
        Console(width=max(Console().width, 120)).print(table)
        print(*self.notes, sep="\n", end="\n" if self.notes else "")
        if self.problems:
            raise QmicaError(f"{file} came out broken: {self.problems[0]}; it was not written; please report it")

    def _too_far(self, one: str, other: str, kl: float) -> list[str]:
        limit = self.limits.get((one, other), math.inf)
        if kl <= limit:
            return []
        return [f"{other} is {kl:.2g} nats from {one}, and {limit:g} is the most that its type explains"]


def limit_of(quant: str) -> float:
    """How far a GGUF of this type may be from the same weights in bf16."""
    if quant in UNWEIGHABLE:
        return ROUNDED
    return COARSE if quant.startswith(("Q2", "Q3")) else QUANTIZED


def compare(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean KL(one || other) over positions in nats, and the share of positions whose likeliest token is the same."""
    kl = sum(float((np.exp(a, dtype=np.float64) * (a - b)).sum()) for a, b in zip(one, other, strict=True))
    return kl / len(one), float((one.argmax(-1) == other.argmax(-1)).mean())


def effect_kept(trained: np.ndarray, base: np.ndarray, other: np.ndarray) -> float:
    """How much of what training changed in the log-probabilities is there in another model's: its change projected on
    training's, weighted by probability; 1 for the trained model, 0 for the base."""
    along = across = 0.0
    for t, b, o in zip(trained, base, other, strict=True):
        weight = np.exp(t) + np.exp(b)
        along += float((weight * (o - b) * (t - b)).sum())
        across += float((weight * (t - b) ** 2).sum())
    return along / across if across else 1.0


# ---- texts


def texts(run: runs.Run, tokens) -> list[list[int]]:
    """The beginnings of up to TEXTS examples of what the run learnt from, spread over it; of the bundled novel where
    that is not known or not there."""
    found = run.learnt_from() or DataConfig(data=samples.REPLAY, format="text")
    options = {"max_seq_length": found.max_seq_length, "format": found.format}
    made = data.prepare(found.data, tokens, **options, say=lambda text: None).train
    chosen = np.unique(np.linspace(0, len(made) - 1, TEXTS).astype(int))
    return [made.ids[made.starts[i] : min(made.starts[i] + TOKENS, made.starts[i + 1])].tolist() for i in chosen]


# ---- models


@torch.no_grad()
def log_probabilities(network: nn.Module, asked: Sequence[Sequence[int]]) -> np.ndarray:
    """fp32 (positions, vocabulary), a text at a time."""
    rows = [torch.tensor([ids], device=network.device) for ids in asked]
    logits = (network(input_ids=row, use_cache=False).logits[0].float() for row in rows)
    return np.concatenate([one.log_softmax(-1).cpu().numpy() for one in logits])


def in_training(run: runs.Run, scale: float = 1.0) -> Verification:
    """What the run's model says with its adapter as it was trained, computed in fp32; and its base, without."""
    network, tokens = adapter.open_run(run, scale=scale, dtype="fp32")
    asked = texts(run, tokens)
    found = Verification(asked)
    found.add(TRAINED, log_probabilities(network, asked))
    with adapter.switched(network, False):
        found.add(BASE, log_probabilities(network, asked))
    del network
    _free()
    return found


def of_source(source: Source, asked: Sequence[Sequence[int]]) -> np.ndarray:
    """What the model in 16 bits of a folder or GGUF says, computed in fp32."""
    return _once(model.load(source, 16, "fp32"), asked)


def of_run(run: runs.Run, scale: float, asked: Sequence[Sequence[int]]) -> np.ndarray:
    """The same of a run's base in 16 bits with the adapter beside it."""
    return _once(adapter.open_run(run, scale=scale, bits=16, dtype="fp32")[0], asked)


def of_weights(base: Source, changed: Mapping[str, LazyTensor], asked: Sequence[Sequence[int]]) -> np.ndarray:
    """The same of a base whose tensors of these names are others (all linears): a merge, without its
    files."""
    network = model.load(base, 16, "fp32")
    for name, tensor in changed.items():
        path = name.removesuffix(".weight")
        before = network.get_submodule(path)
        bias = None if before.bias is None else before.bias.data
        network.set_submodule(path, quant.quantize(tensor.load(), bias, 16, before.weight.device))
    return _once(network, asked)


def _once(network: nn.Module, asked: Sequence[Sequence[int]]) -> np.ndarray:
    found = log_probabilities(network, asked)
    del network
    _free()
    return found


def of_gguf(
    file: Path,
    check: Verification,
    tokens,
    adapters: Sequence[tuple[Path, float]] = (),
    threads: int | None = None,
) -> np.ndarray:
    """The same of a GGUF in llama.cpp, and whether it cuts the texts as training did. tokens: the tokenizer of
    training."""
    with llamacpp.Llama(file, adapters, context=256, threads=threads) as llama:
        for ids in check.texts:
            text = unicodedata.normalize("NFC", tokens.decode(ids))  # which llama.cpp does without
            check.cut(text, tokens(text)["input_ids"], llama.tokenize(text, add_bos=True))
        return np.concatenate([_log_softmax(llama.logits(ids)) for ids in check.texts])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def _free() -> None:
    """One whole model is in memory at a time."""
    gc.collect()
    allocator.give_back()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
