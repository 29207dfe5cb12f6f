"""How much memory a training run takes, by part and before anything is loaded; and how much it holds.

How: `plan` adds up parts (PARTS: one small function each) from shapes alone, a model on the meta device. What a
decoder layer keeps for its backward is a list of its tensors, `layer_tensors`, which a test compares with what autograd
says that it saved. `measure` reads what the process holds now. On a CPU that is anonymous memory (RssAnon): resident
size counts mapped file pages too, which the kernel can drop at any time.

A step has two peaks: the loss, with one chunk's logits, and the backward of the last layer, both on top of what the
layers keep. On a CPU glibc holds more than that. torch asks for memory aligned to 64 bytes, and glibc (to 2.41 at
least) fills such a request only from a hole that is 96 bytes larger: a tensor does not fit where one of its size has
been. How large the holes grow is measured (scripts/check_plan.py), by two factors: for what layers keep, and for what
comes and goes within a layer. They are planned with, and `held_below` returns to the kernel what grows more than a
tenth above the plan. Left alone, SmolLM2's checkpointed step of 4 x 512 tokens held 1.6 to 1.8 GB where 1.0 were
planned, and took 43 to 44 CPU-seconds; 48 to 53 where they were returned at the plan itself, as the kernel clears every
page that it gives.

What it gives up: tensors of 32 MB and more are taken to leave no holes, as `allocator.keep_freed` has them mapped; and
what loading and subspaces take for a moment.
"""

import functools
import gc
import mmap
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from qmica import allocator, loss, quant, targets
from qmica.checkpointing import CHECKPOINT, PLAIN, PRODUCTS
from qmica.config import AdapterConfig, Job, TrainingConfig
from qmica.durable import size_text
from qmica.errors import QmicaError
from qmica.source import Headers
from qmica.weights import packed_bytes

# fitted by scripts/check_plan.py on a CPU
IMPORTS = 0.30e9  # bytes of the process with torch, transformers and bitsandbytes imported
WORD = 1010  # bytes of the tokenizer a token of the vocabulary
HOLES_KEPT, HOLES_PASSING = 1.3, 2.8  # what glibc holds for each byte that layers keep, and that comes and goes


# ---- what is planned


@dataclass(frozen=True)
class Rows:
    """A batch: `count` rows of `length` tokens. packed: several documents in a row, kept apart by a mask."""

    count: int
    length: int
    packed: bool = True

    @property
    def tokens(self) -> int:
        return self.count * self.length

    @classmethod
    def of(cls, batch) -> "Rows":
        """Those of a packing.Batch."""
        packed = bool((batch.position_ids.diff(dim=1) != 1).any())
        return cls(*batch.input_ids.shape, packed)


@dataclass(frozen=True)
class Case:
    """All that the bytes of a run follow from.

    model: on the meta device. modes: one of checkpointing.MODES a decoder layer; None: as --grad-checkpoint says.
    mapped: names of the weights that are pages of a file and not counted. streamed: two decoder layers' weights
    are held at a time. packed: bytes of the weights that stay as the model's files hold them, by name. types: a
    GGUF's, of those.
    """

    model: nn.Module
    bits: quant.Bits
    adapter: AdapterConfig
    training: TrainingConfig
    rows: Rows
    compute: torch.dtype
    device: str = "cpu"
    modes: tuple[str, ...] | None = None
    mapped: Collection[str] = ()
    streamed: bool = False
    packed: Mapping[str, int] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, job: Job, headers: Headers, model: nn.Module, rows: Rows, compute: torch.dtype, device: torch.device
    ) -> "Case":
        """A job's, on the model that these headers are of."""
        types = _types(model, headers) if job.model.bits == quant.GGUF else {}
        packed = {name: headers.tensors[name][1] for name in types} or packed_bytes(headers)
        mapped = _mapped(model, headers, packed, job.model.bits) if device.type == "cpu" else ()
        options = job.model.bits, job.adapter, job.training, rows, compute, device.type
        return cls(model, *options, mapped=mapped, streamed=job.model.stream != "none", packed=packed, types=types)

    @property
    def config(self):
        return self.model.config

    @property
    def layer_modes(self) -> tuple[str, ...]:
        mode = CHECKPOINT if self.training.grad_checkpoint else PLAIN
        return self.modes or (mode,) * self.config.num_hidden_layers

    @functools.cached_property
    def linears(self) -> dict[str, nn.Module]:
        """Every linear of the model, by module path."""
        return {name: module for name, module in self.model.named_modules() if quant.is_linear(module)}

    @functools.cached_property
    def adapted(self) -> list[tuple[int, int]]:
        """(out, in) of every linear with an adapter."""
        chosen = targets.select(self.linears, self.adapter.targets)
        return [(self.linears[name].out_features, self.linears[name].in_features) for name in chosen]

    @functools.cached_property
    def layer(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears of one decoder layer, by their own names."""
        inside = [name for name in self.linears if not targets.stays_16bit(name)]
        return {
            name.rsplit(".", 1)[-1]: (self.linears[name].out_features, self.linears[name].in_features)
            for name in inside[: len(inside) // self.config.num_hidden_layers]
        }

    @functools.cached_property
    def norms(self) -> dict[str, int]:
        """The norms of one decoder layer by their own names, and how many numbers each divides at a time."""
        layer = next(module for name, module in self.model.named_modules() if name.endswith(".layers.0"))
        found = {name.rsplit(".", 1)[-1]: part for name, part in layer.named_modules() if name.endswith("norm")}
        return {name: part.weight.numel() for name, part in found.items()}

    @functools.cached_property
    def layer_adapted(self) -> set[str]:
        """The own names of the linears with an adapter."""
        return {name.rsplit(".", 1)[-1] for name in targets.select(self.linears, self.adapter.targets)}

    @property
    def trained(self) -> int:
        """How many coefficients are trained."""
        return self.adapter.rank * sum(
            columns + (out if self.adapter.method == "lora" else 0) for out, columns in self.adapted
        )

    def over(self, length: int) -> "Case":
        """The same run with rows of another length."""
        return replace(self, rows=replace(self.rows, length=length))


def _types(model: nn.Module, headers: Headers) -> dict[str, str]:
    """The types in which a GGUF stores the matrices."""
    matrices = (name for name, parameter in model.named_parameters() if len(parameter.shape) == 2)
    return {name: headers.tensors[name][0] for name in matrices if name in headers.tensors}


def cached(bits: quant.Bits, packed: Collection[str]) -> bool:
    """Whether the weights come from the cache of quantized models. packed: those that stay as the files hold them."""
    return quant.FORMATS[bits].quantizes and not packed


def _mapped(model: nn.Module, headers: Headers, packed: Collection[str], bits: quant.Bits) -> frozenset[str]:
    """The matrices that `model.load` maps: all that come from the cache of quantized models; of others those that their
    file has in the type they are held in.
    """
    bf16 = {name for name, (stored, _) in headers.tensors.items() if stored == "BF16"}
    in_place = {*packed, *(bf16 if headers.source.kind == "safetensors" else ())}
    matrices = [name for name, parameter in model.named_parameters() if len(parameter.shape) == 2]
    return frozenset(name for name in matrices if cached(bits, packed) or name in in_place)


@dataclass(frozen=True)
class Plan:
    """Bytes by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        shown = {name: size for name, size in self.parts.items() if size}
        return f"{size_text(self.total)} ({', '.join(f'{name} {size_text(size)}' for name, size in shown.items())})"


def plan(case: Case) -> Plan:
    """The most bytes that a run holds at a time, by part: what `measure` reads at the peak of its steps."""
    return Plan({name: part(case) for name, part in PARTS.items()})


def longest(fits: Callable[[int], bool], limit: int) -> int:
    """The most tokens a row, up to `limit`, of which fits(tokens) is true; 0 where it never is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


# ---- what stays for the whole run


def weights_bytes(case: Case) -> float:
    """The frozen weights as they are held, wherever that is: linears of decoder layers in --bits or as the files have
    them, embeddings and head in 16 bits (or as the GGUF has them), norms and biases in the compute dtype.
    """
    return sum(size for _, size in _held_weights(case))


def _held_weights(case: Case) -> Iterator[tuple[str, float]]:
    count_bytes = quant.FORMATS[case.bits].count_bytes
    for name, parameter in case.model.named_parameters():
        if name in case.packed:
            yield name, case.packed[name]
        elif len(parameter.shape) == 1:
            yield name, parameter.numel() * case.compute.itemsize
        else:
            yield name, 2 * parameter.numel() if targets.stays_16bit(name) else count_bytes(*parameter.shape)


def mapped_bytes(case: Case) -> float:
    """Those of the frozen weights that are pages of a file."""
    return sum(size for name, size in _held_weights(case) if name in case.mapped)


def _weights(case: Case) -> float:
    share = min(1, 2 / case.config.num_hidden_layers) if case.streamed else 1
    held = ((name, size) for name, size in _held_weights(case) if name not in case.mapped)
    return sum(size * (share if ".layers." in name else 1) for name, size in held)


def _B(case: Case) -> float:
    """bf16, or fp32 where it is trained."""
    return case.adapter.rank * sum(out for out, _ in case.adapted) * (4 if case.adapter.method == "lora" else 2)


def _A(case: Case) -> float:
    return case.adapter.rank * sum(columns for _, columns in case.adapted) * 4


def _gradients(case: Case) -> float:
    return 4 * case.trained


def _optimizer(case: Case) -> float:
    """AdamW's two moments in fp32; 8-bit ones only where there is CUDA, with an fp32 scale for each 256."""
    eight_bit = case.device != "cpu" and case.training.optimizer != "adamw"
    return case.trained * 2 * (1 + 4 / 256 if eight_bit else 4)


def _libraries(case: Case) -> float:
    """The process before a model is loaded. CUDA's libraries are not in what its allocator holds."""
    return IMPORTS + WORD * case.config.vocab_size if case.device == "cpu" else 0


# ---- what a decoder layer keeps for its backward


def layer_tensors(case: Case, mode: str) -> dict[str, float]:
    """Every tensor that one decoder layer keeps from the forward for the backward, by name: bytes."""
    return _KEPT[mode](case)


def layer_bytes(case: Case, mode: str) -> float:
    """Bytes that one decoder layer in this mode keeps from the forward for the backward."""
    return sum(layer_tensors(case, mode).values())


def _plain(case: Case) -> dict[str, float]:
    """Each operation's own: silu keeps its input, a product both factors. A linear keeps its input for dA, once for
    those that share it, and nothing where it has no adapter.
    """
    size, tokens = case.compute.itemsize, case.rows.tokens
    width, _, _, inner = _widths(case)
    inputs = {"q_proj": ("x of q, k, v", width), "gate_proj": ("x of gate, up", width), "down_proj": ("product", inner)}
    groups = {"k_proj": "q_proj", "v_proj": "q_proj", "qkv_proj": "q_proj", "up_proj": "gate_proj"}
    groups["gate_up_proj"] = "gate_proj"
    needed = {groups.get(name, name) for name in case.layer_adapted} & inputs.keys()
    if case.adapter.dropout:  # each has an input of its own
        needed = set()
    return {
        **_norms(case),
        **_attention(case),
        "gate": tokens * inner * size,
        "silu": tokens * inner * size,
        "up": tokens * inner * size,
        **{inputs[name][0]: tokens * inputs[name][1] * size for name in sorted(needed)},
        **_adapter_tensors(case),
    }


def _norms(case: Case) -> dict[str, float]:
    """RMSNorm keeps its input in fp32 and one number for each that it divides: a token, or a head of one."""
    width, queries, keys, _ = _widths(case)
    of = {"q_norm": queries, "k_norm": keys}
    return {
        name: case.rows.tokens * (of.get(name, width) + of.get(name, width) // size) * 4
        for name, size in case.norms.items()
    }


def _attention(case: Case) -> dict[str, float]:
    """sdpa keeps its inputs, its output and one number a head. Beside a mask transformers repeats keys and values for
    every query head; scores that are capped are computed one by one: tanh's, and softmax's in fp32 and as they go on.
    """
    size, rows, config = case.compute.itemsize, case.rows, case.config
    _, queries, keys, _ = _widths(case)
    heads, capped = queries // _head_dim(case), _capped(case)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    masked = rows.packed or (slides and config.sliding_window < rows.length)
    shared = queries if masked or capped else keys
    scores = rows.count * heads * rows.length**2
    whole = queries + 2 * keys if "qkv_proj" in case.layer and shared == keys else shared  # v is a part of one product
    kept = {"q": queries, "k": shared, "v": whole, "attention": queries}
    kept = {name: rows.tokens * numbers * size for name, numbers in kept.items()}
    if capped:
        return {**kept, "scores": scores * (size + 4 + (size if size != 4 else 0))}
    mask = rows.count * rows.length**2 * size if masked else 0
    return {**kept, "sums of attention": rows.tokens * heads * 4, "mask": mask}


def _capped(case: Case) -> bool:
    """Whether attention is computed without sdpa, which knows no soft cap (Gemma 2)."""
    return bool(getattr(case.config, "attn_logit_softcapping", None))


def _adapter_tensors(case: Case) -> dict[str, float]:
    """What the adapters of a layer keep beside the inputs they share: LoRA z = A x for dB; with dropout each its own
    input and the noise it was multiplied with (a CPU's in the compute dtype), and A as it was cast.
    """
    size, tokens, rank = case.compute.itemsize, case.rows.tokens, case.adapter.rank
    columns = [case.layer[name][1] for name in case.layer_adapted]
    kept = {}
    if case.adapter.method == "lora":
        kept["A x"] = len(columns) * tokens * rank * size
    if case.adapter.dropout:
        kept["dropped x"] = tokens * sum(columns) * size
        kept["noise"] = tokens * sum(columns) * (size if case.device == "cpu" else 1)
        kept["A"] = rank * sum(columns) * size if size != 4 else 0
    return kept


def _products(case: Case) -> dict[str, float]:
    """The layer's input, what attention gives, and its linears' outputs; the last one's is not needed."""
    tokens, size, plain = case.rows.tokens, case.compute.itemsize, _plain(case)
    outputs = {f"y of {name}": tokens * out * size for name, (out, _) in case.layer.items() if name != "down_proj"}
    attention = () if _capped(case) else _OF_ATTENTION  # what sdpa gave
    return _checkpoint(case) | {name: plain[name] for name in attention} | outputs


def _checkpoint(case: Case) -> dict[str, float]:
    return {"input": case.rows.tokens * case.config.hidden_size * case.compute.itemsize}


_OF_ATTENTION = ("attention", "sums of attention")
_KEPT = {PLAIN: _plain, PRODUCTS: _products, CHECKPOINT: _checkpoint}


def _widths(case: Case) -> tuple[int, int, int, int]:
    """Numbers a token: of the hidden states, the queries, the keys, and inside the MLP."""
    config, size = case.config, _head_dim(case)
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * size
    return config.hidden_size, config.num_attention_heads * size, keys, config.intermediate_size


def _head_dim(case: Case) -> int:
    return getattr(case.config, "head_dim", None) or case.config.hidden_size // case.config.num_attention_heads


def _activations(case: Case) -> float:
    return sum(layer_bytes(case, mode) for mode in case.layer_modes) + sum(_ends(case).values())


def _ends(case: Case) -> dict[str, float]:
    """What is kept outside the layers: rotations, the last norm, and the hidden states' gradient that the loss has
    computed.
    """
    tokens, size, width = case.rows.tokens, case.compute.itemsize, case.config.hidden_size
    return {
        "rotations": 2 * case.rows.length * _head_dim(case) * size * (case.rows.count if case.rows.packed else 1),
        "last norm": tokens * (width + 1) * 4,
        "gradient of the hidden states": tokens * width * size,
        "mask of documents": case.rows.count * case.rows.length**2 if case.rows.packed else 0,
    }


# ---- what comes and goes: the loss, then the backward of one layer


def _loss_tensors(case: Case) -> dict[str, float]:
    """One chunk's logits in fp32 (a compute dtype below that has them in it too), a piece of the head."""
    vocabulary, tokens, size = case.config.vocab_size, case.rows.tokens, case.compute.itemsize
    logits = min(loss.chunk_tokens(vocabulary), tokens) * vocabulary
    return {
        "logits": 4 * logits,
        "logits before their cap": 4 * logits if getattr(case.config, "final_logit_softcapping", None) else 0,
        "logits in the compute dtype": size * logits if size < 4 else 0,
        "labelled hidden states": tokens * case.config.hidden_size * size,
        "piece of the head": _piece(case, vocabulary, case.config.hidden_size),
    }


def _backward_tensors(case: Case) -> dict[str, float]:
    """What the most demanding layer computes again, the gradients inside its MLP, and a piece of a weight."""
    tokens, size = case.rows.tokens, case.compute.itemsize
    width, _, _, inner = _widths(case)
    again = {"plain": 0.0}
    for mode in {*case.layer_modes} - {PLAIN}:
        tape = {f"again: {name}": value for name, value in _plain(case).items() if name not in _ON_TAPE[mode]}
        again = max(again, tape, key=lambda tensors: sum(tensors.values()))
    return {
        **again,
        "gradients of the hidden states": 3 * tokens * width * size,
        "gradients of product, silu, up": 3 * tokens * inner * size,
        "piece of a weight": max(_piece(case, *shape) for shape in case.layer.values()),
    }


_ON_TAPE = {PRODUCTS: ("gate", "up", "v", *_OF_ATTENTION), CHECKPOINT: ()}


def _piece(case: Case, out: int, columns: int) -> float:
    """As much of a weight as is multiplied with at once."""
    rows = quant.piece_rows(out, columns) if case.device == "cpu" else out
    return rows * columns * case.compute.itemsize


def _loss(case: Case) -> float:
    return sum(_loss_tensors(case).values())


def _workspace(case: Case) -> float:
    """What the backward of a layer takes above what the loss took, which is gone by then."""
    return max(0.0, sum(_backward_tensors(case).values()) - _loss(case))


def _holes(case: Case) -> float:
    """What glibc holds beside the tensors; see the top of this file. Mapped tensors have no holes, but are not there
    for the other peak either.
    """
    if case.device != "cpu":
        return 0.0
    layers = [(size, mode) for mode in case.layer_modes for size in layer_tensors(case, mode).values()]
    kept = _small([size for size, _ in layers]) + _small(_ends(case).values())
    passing = max(_small(tensors(case).values()) for tensors in _PASSING)
    return (HOLES_KEPT - 1) * kept + (HOLES_PASSING - 1) * passing


_PASSING = (_loss_tensors, _backward_tensors)


def _small(sizes) -> float:
    return sum(size for size in sizes if size < allocator.MAPPED_FROM)


# In the order in which they are shown. Others may be exchanged one by one: each depends on the case alone.
PARTS: dict[str, Callable[[Case], float]] = {
    "weights": _weights,
    "B": _B,
    "A": _A,
    "gradients": _gradients,
    "optimizer": _optimizer,
    "activations": _activations,
    "loss": _loss,
    "workspace": _workspace,
    "holes": _holes,
    "libraries": _libraries,
}


# ---- what is held


def available(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    import psutil  # comes with accelerate; only where /proc is missing (macOS, Windows)

    return psutil.virtual_memory().available


def ran_out(error: RuntimeError) -> bool:
    """Whether an allocation failed: CUDA has an error of its own for that, torch's CPU allocator a text."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def give_back(device: torch.device) -> None:
    """Return what was freed to the driver or the kernel, so that it can be cut anew."""
    gc.collect()  # an error's traceback may hold tensors in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        allocator.give_back()


def measure(device: torch.device) -> int:
    """Bytes held now: anonymous memory on a CPU, the allocator's peak on CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATM.exists():
        _, resident, shared, *_ = _STATM.read_text().split()  # in pages; shared: those of files
        return (int(resident) - int(shared)) * mmap.PAGESIZE
    import psutil

    return psutil.Process().memory_info().rss


_STATM = Path("/proc/self/statm")  # RssAnon is in /proc/self/status too, which takes the kernel five times as long


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that gives the most bytes held since here: the allocator's own peak on CUDA; elsewhere `measure`,
    sampled by a thread every 5 ms, as the activations of a step are gone when it ends.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: measure(device)
        return
    most, over = measure(device), threading.Event()

    def sample() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, measure(device))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: most
    finally:
        over.set()
        sampler.join()


@contextmanager
def held_below(limit: float, device: torch.device) -> Iterator[None]:
    """Return to the kernel what malloc keeps of freed tensors whenever the process holds more than `limit` bytes. A
    thread looks every 5 ms, in which 10 MB can be taken. Elsewhere than on a CPU and glibc nothing is done.
    """
    if device.type != "cpu" or not allocator.gives_back():
        yield
        return
    over = threading.Event()

    def watch() -> None:
        left = 0  # after holes were returned last; where tensors are above the limit, returning again has to pay
        while not over.wait(0.005):
            now = measure(device)
            left = min(left, now)
            if now > max(limit, left + 0.04 * limit):
                allocator.give_back()
                left = measure(device)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def require_fit(plan: Plan, budget: int, device: torch.device, say: Callable[[str], None]) -> None:
    """Say what a run needs and what it may take. Raises QmicaError where the frozen weights alone do not fit."""
    free = available(device)
    say(f"memory: needs about {plan}; {size_text(free)} are free on {device.type}")
    if plan.parts["weights"] > min(free, budget):
        raise QmicaError(
            f"the model needs {size_text(plan.parts['weights'])} for its weights alone, "
            f"{size_text(min(free, budget))} may be taken on {device.type}: choose a smaller --model or fewer --bits, "
            "or close other programs"
        )
    if plan.total > budget:
        say("this may not fit: a smaller --max-seq-length, --rank or --bits takes less")
