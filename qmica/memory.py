"""How much memory a training run will take, before anything is loaded, and how much it takes.

How: `plan` adds up bytes by part from shapes alone (a model on the meta device); `measure` reads what the process
holds now. On a CPU that is anonymous memory (RssAnon): resident size counts mapped file pages that the kernel can
drop at any time. What it gives up: the plan is an estimate from above for activations; measured on a small model it is
1.3 (without activation checkpointing) to 1.8 times what a run took.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from qmica import allocator, loss, quant, targets
from qmica.config import AdapterConfig, TrainingConfig
from qmica.durable import size_text
from qmica.errors import QmicaError

IMPORTS = 0.45e9  # anonymous memory of the process after importing torch, transformers and bitsandbytes (measured)


@dataclass(frozen=True)
class Plan:
    """Bytes by part."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return (
            f"{size_text(self.total)} ({', '.join(f'{name} {size_text(size)}' for name, size in self.parts.items())})"
        )


def plan(
    model: nn.Module,
    bits: int,
    adapter: AdapterConfig,
    training: TrainingConfig,
    length: int,
    compute: torch.dtype,
    streamed: bool = False,
) -> Plan:
    """The bytes that training this model (on the meta device) takes, with rows of `length` tokens. streamed: two
    decoder layers' weights are held at a time.
    """
    linears = {name: module for name, module in model.named_modules() if quant.is_linear(module)}
    adapted = targets.select(linears, adapter.targets)
    size = compute.itemsize
    rows = [(linears[name].out_features, linears[name].in_features) for name in adapted]
    trained = sum(columns + (out if adapter.method == "lora" else 0) for out, columns in rows) * adapter.rank
    tokens = training.batch_size * length
    return Plan(
        {
            "weights": _weights(model, linears, bits, min(1, 2 / model.config.num_hidden_layers) if streamed else 1),
            "adapter": sum(out for out, _ in rows) * adapter.rank * 2 + trained * 4,
            "gradients and optimizer": trained * 4 * 3,  # gradient and AdamW's two moments in fp32
            "activations": _activations(model, linears, tokens, size, training.grad_checkpoint),
            "loss": min(loss.CHUNK_LOGITS, tokens * model.config.vocab_size) * 4 * 3,  # logits, softmax, gradient
            "workspace": 2 * max(module.weight.numel() for module in linears.values()) * size,
            "libraries": IMPORTS,
        }
    )


def _weights(model: nn.Module, linears: dict[str, nn.Module], bits: int, share: float) -> float:
    """The frozen weights: linears of decoder layers in `bits`, a share of them; all else in 16 bits."""
    quantized = {f"{name}.weight" for name in linears if not targets.stays_16bit(name)}
    total = 0
    for name, parameter in model.named_parameters():
        packed = name in quantized
        total += share * quant.FORMATS[bits].count_bytes(*parameter.shape) if packed else 2 * parameter.numel()
    return total


def _activations(model: nn.Module, linears: dict[str, nn.Module], tokens: int, size: int, checkpointed: bool) -> float:
    """What the backward needs: every linear's input and output once a layer, or (checkpointed) a layer's input and
    one whole layer.
    """
    config = model.config
    inside = [module for name, module in linears.items() if not targets.stays_16bit(name)]
    layers = config.num_hidden_layers
    one_layer = tokens * size * sum(module.in_features + module.out_features for module in inside) / layers * 1.5
    if not checkpointed:
        return one_layer * layers
    return tokens * size * config.hidden_size * layers + 2 * one_layer


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
    status = Path("/proc/self/status")
    if status.exists():
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(rows["RssAnon"].split()[0]) * 1024
    import psutil

    return psutil.Process().memory_info().rss


@contextmanager
def peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that gives the most bytes held since here: the allocator's own peak on CUDA; elsewhere `measure`,
    sampled by a thread every 10 ms, as the activations of a step are gone when it ends.
    """
    if device.type == "cuda":
        yield lambda: measure(device)
        return
    most, over = measure(device), threading.Event()

    def sample() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, measure(device))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: most
    finally:
        over.set()
        sampler.join()


def require_fit(plan: Plan, device: torch.device, say: Callable[[str], None]) -> None:
    """Say what a run needs and what there is. Raises QmicaError where the frozen weights alone do not fit."""
    free = available(device)
    say(f"memory: needs about {plan}; {size_text(free)} are free on {device.type}")
    if plan.parts["weights"] > free:
        raise QmicaError(
            f"the model needs {size_text(plan.parts['weights'])} for its weights alone, {size_text(free)} are free on "
            f"{device.type}: choose a smaller --model or fewer --bits, or close other programs"
        )
    if plan.total > free:
        say("this may not fit: a smaller --max-seq-length or --batch-size, or --bits 4, takes less")
