"""Faster kernels for what stands between the frozen linears, each kept only where it pays on the machine at hand.

How: an `Exchange` puts other functions in the place of some of the model's and takes them out again. Before training a
batch is timed with and without it, in turns; what is not faster is left out, and the figures are said.

- `--compile`: torch.compile of each decoder layer in training. One graph serves all layers. The linears stay outside:
  traced, their two dequantizations (forward and backward) become one, whose result is kept in between (8.5 MB more for
  a layer of SmolLM2 that holds 41), and `--stream` would find another layer's weights in it.
- Liger (arXiv 2410.10989; the extra `liger`, on CUDA): Triton kernels for RMSNorm, RoPE and SwiGLU.

What it gives up: with another kernel the last bits differ, so a run is bit-identical to another one only where both
kept the same. Evaluation and answers are never compiled: each of their shapes would be compiled anew.
"""

import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

from qmica import progress, quant
from qmica.checkpointing import PRODUCTS, decoder_layers
from qmica.linear import MicaLinear

PAIRS = 2  # timings with and without, in turns; each is the better of two batches
GAIN = 1.02  # less than this is the noise of the clock


@dataclass(frozen=True)
class Replacement:
    """`owner.name` is to be `new`: a method of one module, or a function of a Python module."""

    owner: object
    name: str
    new: Callable


class Exchange:
    """Replacements that go in and out together."""

    def __init__(self, name: str, replacements: Sequence[Replacement]):
        self.name, self.replacements = name, replacements
        self._before: list[Callable | None] | None = None

    def put(self) -> None:
        if self._before is None:
            self._before = [vars(part.owner).get(part.name) for part in self.replacements]
            for part in self.replacements:
                setattr(part.owner, part.name, part.new)

    def take(self) -> None:
        """Everything as it was before."""
        for part, before in zip(self.replacements, self._before or [], strict=False):
            if before is None:  # a module finds the method of its class again
                delattr(part.owner, part.name)
            else:
                setattr(part.owner, part.name, before)
        self._before = None


def settle(
    network: nn.Module, compiled: bool, seconds: Callable[[], float], say: Callable[[str], None]
) -> tuple[float, list[Exchange]]:
    """Keep of the kernels asked for (`compiled`) and installed what pays. seconds: runs a training batch, gives seconds
    a token. Returns those with what was kept, and that, for the caller to `take` out when training is over: Liger's
    RoPE is in the place of a function that all models of a family call.
    """
    found, kept = seconds(), []
    if compiled:
        exchange = compiling(network)
        faster = kept_if_faster(exchange, seconds, say)
        if faster is not None:
            return faster, [exchange]  # what Liger would do is fused with the rest already
    for exchange in liger(network):
        faster = kept_if_faster(exchange, seconds, say)
        found, kept = (found, kept) if faster is None else (faster, [*kept, exchange])
    return found, kept


def kept_if_faster(exchange: Exchange, seconds: Callable[[], float], say: Callable[[str], None]) -> float | None:
    """Seconds a token with it, where it is faster and was kept; None where it was left out again."""
    began = time.perf_counter()
    exchange.put()
    try:
        seconds()
    except Exception as error:  # whatever a compiler, or the lack of one, makes of it
        exchange.take()
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        say(f"{exchange.name} does not work here and is left out: {reason}")
        return None
    first = progress.duration(time.perf_counter() - began)
    without, with_it = [], []
    for _ in range(PAIRS):
        exchange.take()
        without.append(seconds())
        exchange.put()
        with_it.append(seconds())
    one, other = statistics.median(with_it), statistics.median(without)
    faster = other > GAIN * one
    verdict = "kept" if faster else "left out"
    say(f"{exchange.name}: {1 / one:,.0f} tokens/s, {1 / other:,.0f} without (first batch {first}): {verdict}")
    if not faster:
        exchange.take()
    return one if faster else None


# ---- torch.compile


def compiling(network: nn.Module, backend: str = "inductor") -> Exchange:
    """The decoder layers compiled in training mode, their linears as they are. backend: torch.compile's."""
    layers = decoder_layers(network)
    replacements = [Replacement(layer, "forward", _compiled(layer, backend)) for layer in layers]
    for linear in (linear for layer in layers for linear in _outermost_linears(layer)):
        replacements.append(Replacement(linear, "forward", torch.compiler.disable(linear.forward)))
    return Exchange("--compile", replacements)


def _compiled(layer: nn.Module, backend: str) -> Callable:
    """A decoder layer's forward, compiled inside its activation checkpoint: a checkpoint that is traced may hold no
    graph break, and its recomputation, which begins in the backward, would not run what the forward ran.
    """
    plain = layer.forward
    inner = getattr(type(layer).forward, "__wrapped__", type(layer).forward)  # transformers wraps the checkpoint around
    fast = torch.compile(inner, backend=backend, dynamic=True)  # rows of any length by one compilation

    def forward(*arguments, **named):
        if not layer.training:
            return plain(*arguments, **named)
        if layer.gradient_checkpointing:
            return layer._gradient_checkpointing_func(partial(fast, layer, **named), *arguments)
        return fast(layer, *arguments, **named)

    return forward


def _outermost_linears(layer: nn.Module) -> Iterator[nn.Module]:
    """The adapted linears, and the frozen ones that are not inside one of those."""
    inside = {module.base for module in layer.modules() if isinstance(module, MicaLinear)}
    for module in layer.modules():
        if isinstance(module, MicaLinear) or (isinstance(module, quant.FrozenLinear) and module not in inside):
            yield module


# ---- Liger


@dataclass(frozen=True)
class Family:
    """A family's modules, as Liger's kernels see them. offset: what is added to a norm's weight; casting: what of the
    norm is computed in fp32 (llama: the mean square; gemma: all of it); gated: the class whose `down(silu(gate) · up)`
    is to be replaced, none where the activation is another.
    """

    norm: str
    gated: str | None
    offset: float = 0.0
    casting: str = "llama"


FAMILIES = {
    "llama": Family("LlamaRMSNorm", "LlamaMLP"),
    "qwen2": Family("Qwen2RMSNorm", "Qwen2MLP"),
    "gemma2": Family("Gemma2RMSNorm", None, offset=1.0, casting="gemma"),
}


def liger(network: nn.Module) -> list[Exchange]:
    """Liger's kernels for a model on CUDA; none where they are not installed, or the family is not known to fit.

    Nor beside layers that keep the products of their linears: Liger writes over such products, which nothing notices.
    """
    family = FAMILIES.get(network.config.model_type)
    kept = any(getattr(layer, "qmica_mode", None) == PRODUCTS for layer in decoder_layers(network))
    if family is None or kept or find_spec("liger_kernel") is None:
        return []
    device = next(_of_class(network, family.norm)).weight.device
    return _liger_exchanges(network, family, device) if device.type == "cuda" else []


def _of_class(network: nn.Module, name: str | None) -> Iterator[nn.Module]:
    return (module for module in network.modules() if type(module).__name__ == name)


def _liger_exchanges(network: nn.Module, family: Family, device: torch.device) -> list[Exchange]:
    norms = [Replacement(norm, "forward", _rms_norm(norm, family)) for norm in _of_class(network, family.norm)]
    modeling = sys.modules[type(network.base_model).__module__]
    rope = Replacement(modeling, "apply_rotary_pos_emb", _rope(modeling.apply_rotary_pos_emb, device))
    swiglu = [Replacement(mlp, "forward", _swiglu(mlp)) for mlp in _of_class(network, family.gated) if _is_silu(mlp)]
    found = {"RMSNorm": norms, "RoPE": [rope], "SwiGLU": swiglu}
    return [Exchange(f"Liger's {name}", parts) for name, parts in found.items() if parts]


def _rms_norm(norm: nn.Module, family: Family) -> Callable:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        in_place = False  # in place it would write over a gradient that the residual needs too
        return LigerRMSNormFunction.apply(hidden_states, norm.weight, epsilon, family.offset, family.casting, in_place)

    return forward


def _rope(plain: Callable, device: torch.device) -> Callable:
    """For queries and keys (rows, heads, tokens, head_dim). It turns them in their place, which is what the projections
    gave: nothing else may read that later. The function is the family's: models elsewhere keep the plain one.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    def rotate(q, k, cos, sin, unsqueeze_dim: int = 1):
        if q.device.type != device.type or unsqueeze_dim != 1:
            return plain(q, k, cos, sin, unsqueeze_dim)
        return LigerRopeFunction.apply(q, k, cos, sin)

    return rotate


def _is_silu(mlp: nn.Module) -> bool:
    return mlp.config.hidden_act in ("silu", "swish")


def _swiglu(mlp: nn.Module) -> Callable:
    """Its backward writes the gradients over gate's and up's outputs, which nothing else reads."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def forward(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward
