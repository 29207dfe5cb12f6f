"""How long a training step takes: the work in it, from shapes alone, over rates that two seconds on this machine give.

How: work is counted by kind (WORK: one function each), and each kind has a rate that is measured on tensors of the
model's own shapes, as the speed of a small multiplication says little of a large one. A token costs 2N FLOPs forward
and 2N backward, N being the numbers in the layers' linears: frozen weights have no dW. Layers that are computed again
cost 2N more, without the last linear. Beside that, every pass over the weights dequantizes them, norms, rotations,
activations and adapters are bound by memory, and the head and attention have their own shapes.

What it gives up: replayed text is computed twice where it is held to the base, and counted once; streaming's transfers.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from qmica import loss, quant, unpacking
from qmica.checkpointing import CHECKPOINT, PLAIN
from qmica.memory import Case

SECONDS = 2.0  # of calibration, shared by all kinds
COLD = 1 << 27  # bytes: more than a processor's cache
MOST_TOKENS = 512  # in a calibration's tensors: a multiplication is as fast as it gets with these


@dataclass(frozen=True)
class Step:
    """What one batch is: its case, and how many of its tokens have a label."""

    case: Case
    supervised: int


# ---- the work of a batch, forward and backward


def _last(case: Case) -> int:
    """Numbers in the linear that a checkpointed layer does not multiply again."""
    out, columns = case.layer.get("down_proj", (0, 0))
    return out * columns


def _numbers(case: Case) -> int:
    return sum(out * columns for out, columns in case.layer.values())


def _passes(case: Case) -> float:
    """How many times all numbers of the layers' linears are gone through: forward, backward, and again."""
    again = case.layer_modes.count(CHECKPOINT) * (_numbers(case) - _last(case))
    return 2 * len(case.layer_modes) * _numbers(case) + again


def _linear_flops(step: Step) -> float:
    return 2 * _passes(step.case) * step.case.rows.tokens


def _dequantized(step: Step) -> float:
    """The head's numbers too, where it is packed."""
    return _passes(step.case) + (_head_casts(step) if step.case.types else 0)


def _head_casts(step: Step) -> float:
    """Numbers of the head that are cast or unpacked: all of them for each chunk of logits, twice."""
    vocabulary = step.case.config.vocab_size
    chunks = -(-step.supervised // loss.chunk_tokens(vocabulary))
    return 2 * chunks * vocabulary * step.case.config.hidden_size


def _elementwise_bytes(step: Step) -> float:
    """Bytes read and written by what is no multiplication: norms 16 numbers of the width a token forward, residuals 6,
    rotations 10 of each query and key, activations 5 of the MLP; three times that backward (torch's profiler); adapters
    read x and y again, in products too thin to be fast.
    """
    case, size = step.case, step.case.compute.itemsize
    width, inner = case.config.hidden_size, case.config.intermediate_size
    rotated = sum(out for name, (out, _) in case.layer.items() if name in ("q_proj", "k_proj"))
    forward = 22 * width + 10 * rotated + 5 * inner
    adapters = sum(3 * columns + 4 * out for name, (out, columns) in case.layer.items() if name in case.layer_adapted)
    again = len(case.layer_modes) - case.layer_modes.count(PLAIN)
    layers = len(case.layer_modes)
    return case.rows.tokens * size * ((4 * layers + again) * forward + 2 * layers * adapters)


def _attention_units(step: Step) -> float:
    """Passes (forward, backward as 2) times rows x length² x numbers of all heads."""
    case = step.case
    again = case.layer_modes.count(CHECKPOINT)
    queries = case.layer["o_proj"][1] if "o_proj" in case.layer else case.config.hidden_size
    return (3 * len(case.layer_modes) + again) * case.rows.count * case.rows.length**2 * queries


def _head_flops(step: Step) -> float:
    return 4 * step.supervised * step.case.config.hidden_size * step.case.config.vocab_size


def _logit_bytes(step: Step) -> float:
    """The softmax goes over the logits nine times in fp32; a head in 16 bits is cast to it."""
    casts = 0 if step.case.types else 6 * _head_casts(step)
    return 9 * 4 * step.supervised * step.case.config.vocab_size + casts


WORK: dict[str, Callable[[Step], float]] = {
    "linears": _linear_flops,
    "dequantizing": _dequantized,
    "elementwise": _elementwise_bytes,
    "attention": _attention_units,
    "head": _head_flops,
    "logits": _logit_bytes,
}


# ---- the rates of this machine

Clock = Callable[[], float]  # seconds


@dataclass
class _Bench:
    """Tensors of a case's shapes, on its device, no more of them than MOST_TOKENS tokens need."""

    case: Case

    @property
    def tokens(self) -> int:
        return min(self.case.rows.tokens, MOST_TOKENS)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.rand(*shape, dtype=dtype or self.case.compute, device=self.case.device)

    def linears(self) -> tuple[float, Callable]:
        shapes = list(self.case.layer.values())
        weights = [self.tensor(quant.piece_rows(out, columns), columns) for out, columns in shapes]
        inputs = {columns: self.tensor(self.tokens, columns) for _, columns in shapes}
        outputs = {len(weight): self.tensor(self.tokens, len(weight)) for weight in weights}

        def once() -> None:
            for weight in weights:
                torch.mm(inputs[weight.shape[1]], weight.T)
                torch.mm(outputs[len(weight)], weight)

        return 4 * self.tokens * sum(weight.numel() for weight in weights), once

    def dequantizing(self) -> tuple[float, Callable]:
        name, (out, columns) = max(self.case.layer.items(), key=lambda item: item[1][0] * item[1][1])
        rows, device = min(out, max(64, (1 << 20) // columns)), torch.device(self.case.device)
        stored = next((type for path, type in self.case.types.items() if path.endswith(f".{name}.weight")), None)
        if stored is None:
            linear = quant.quantize(self.tensor(rows, columns, dtype=torch.float32), None, self.case.bits, device)
        else:
            linear = quant.from_blocks(unpacking.random_blocks(stored, rows, columns), None, device)
        return rows * columns, lambda: linear.dequantize(self.case.compute)

    def elementwise(self) -> tuple[float, Callable]:
        """On tensors that have left the cache, as those of a step have when they are needed again."""
        shape = self.case.rows.tokens, self.case.config.intermediate_size
        first = self.tensor(*shape)
        ring = itertools.cycle([first, *(self.tensor(*shape) for _ in range(min(15, COLD // first.nbytes)))])
        return 3 * first.nbytes, lambda: next(ring) * next(ring)

    def attention(self) -> tuple[float, Callable]:
        length, config = min(self.case.rows.length, 1024), self.case.config
        queries = self.case.layer["o_proj"][1] if "o_proj" in self.case.layer else config.hidden_size
        heads = config.num_attention_heads
        q, k, v = (self.tensor(1, heads, length, queries // heads).requires_grad_() for _ in range(3))
        packed = self.case.rows.packed
        mask = torch.ones(length, length, dtype=torch.bool, device=self.case.device).tril() if packed else None

        def once() -> None:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            torch.autograd.grad(y, (q, k, v), y.detach())

        return 3 * length**2 * queries, once

    def head(self) -> tuple[float, Callable]:
        config = self.case.config
        rows = quant.piece_rows(config.vocab_size, config.hidden_size)
        count = min(self.tokens, loss.chunk_tokens(config.vocab_size))
        weight, hidden = self.tensor(rows, config.hidden_size), self.tensor(count, config.hidden_size)
        logits = self.tensor(count, rows)

        def once() -> None:
            torch.mm(hidden, weight.T)
            torch.mm(logits, weight)

        return 4 * count * weight.numel(), once

    def logits(self) -> tuple[float, Callable]:
        logits = self.tensor(min(loss.CHUNK_LOGITS, 1 << 22), dtype=torch.float32)
        return 2 * logits.nbytes, logits.sqrt_


def calibrate(case: Case, seconds: float = SECONDS, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Units of work a second, by kind, on this machine now: the median over some `seconds` of `clock` in all."""
    bench = _Bench(case)
    return {kind: _rate(*getattr(bench, kind)(), seconds / len(WORK), case.device, clock) for kind in WORK}


def _rate(units: float, once: Callable, seconds: float, device: str, clock: Clock) -> float:
    """Units a second: the median of at least three calls after one for first use."""
    waited = torch.cuda.synchronize if device == "cuda" else lambda: None
    once()
    waited()
    taken, end = [], clock() + seconds
    while len(taken) < 3 or clock() < end:
        began = clock()
        once()
        waited()
        taken.append(clock() - began)
    return units / statistics.median(taken)


def seconds(step: Step, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of one batch, forward and backward, by kind of work."""
    return {kind: work(step) / rates[kind] for kind, work in WORK.items()}
