"""MicaLinear: a frozen linear with a frozen basis B and trained coefficients A.

    y = W x + scale · B (A dropout(x)),   scale = alpha / rank

How: the base is any frozen linear of `quant`; B is a buffer in bf16, as stored where PEFT made it (for LoRA,
the same place holds a trained parameter in fp32), A a parameter in fp32, both cast to the input's dtype for each use.
A starts at zero, so step 0 is exactly the base model.

Two autograd functions share the work. `_Coefficients` is z = A x; it keeps x, and gives dA. `_Adapted` is all the
rest: it adds (scale · B) z into the base's product, and in the backward G = dY (scale · B), once for dA and dX, with
dX = dY W + G A in one buffer. Forward and backward of SmolLM2's up_proj beside NF4 at 1024 tokens take 0.18 CPU-s, by
plain autograd 0.21, the frozen linear alone 0.11. One thin product for all linears that share an input was measured
too: it saves 0.5 % of a step on a CPU, and is not worth its code there.

What it gives up: autograd keeps x for dA (MiCA does not save activation memory against LoRA, it halves the trained
parameters, their gradients and optimizer states); and a second derivative.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qmica import checkpointing, quant


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (tokens, n), of a contiguous tensor the same memory."""
    return x.reshape(-1, x.shape[-1])


class _Coefficients(torch.autograd.Function):
    """z = A x: (..., in), (rank, in) -> (..., rank). Gives dA = Gᵀ X alone: `_Adapted` gives x the whole of dX.

    It comes before the base's product, so that a checkpointed layer, which is run again up to the last tensor that is
    kept, does not multiply its last weight again.
    """

    @staticmethod
    def forward(ctx, x, A):
        ctx.save_for_backward(x)
        ctx.dtype = A.dtype
        return functional.linear(x, A.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        (x,) = ctx.saved_tensors
        return None, (_rows(G).T @ _rows(x)).to(ctx.dtype)


class _Adapted(torch.autograd.Function):
    """y = W x + b + scale · B z. A: the coefficients by which x moves z too, or None where autograd knows of that."""

    @staticmethod
    def forward(ctx, x, z, B, A, base, scale):
        if B.requires_grad:
            ctx.save_for_backward(z)
        ctx.B, ctx.A, ctx.base, ctx.scale = B, A, base, scale

        def product() -> torch.Tensor:
            y = base.matmul(x)
            _rows(y).addmm_(_rows(z), (scale * B.to(x.dtype)).T)
            return y

        return checkpointing.product(product)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dB, rows = None, _rows(dy)
        G = rows @ (ctx.scale * ctx.B.to(dy.dtype))  # (tokens, rank)
        if ctx.needs_input_grad[2]:
            (z,) = ctx.saved_tensors
            dB = (ctx.scale * (rows.T @ _rows(z))).to(ctx.B.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.base.back(dy)
            if ctx.A is not None:
                _rows(dx).addmm_(G, ctx.A.to(dy.dtype))
        return dx, G.view(*dy.shape[:-1], G.shape[-1]), dB, None, None, None


class MicaLinear(nn.Module):
    """A frozen linear (out, in) plus scale · B A, with B (out, rank) and A (rank, in)."""

    def __init__(self, base: nn.Module, B: torch.Tensor, scale: float, dropout: float = 0.0, train_B: bool = False):
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        columns = base.in_features
        self.A = nn.Parameter(torch.zeros(B.shape[1], columns, dtype=torch.float32, device=B.device))
        if train_B:
            self.B = nn.Parameter(B.float())
        else:
            self.register_buffer("B", B)
        self.train(base.training)  # a model in evaluation mode stays so: its dropout is off

    @classmethod
    def from_base(cls, base: nn.Module, B: torch.Tensor, alpha: float, dropout: float = 0.0) -> "MicaLinear":
        """MiCA on an existing linear, sharing its weight. B: (out, rank), orthonormal columns; kept in bf16."""
        return cls(quant.freeze(base), B.to(torch.bfloat16), alpha / B.shape[1], dropout)

    @classmethod
    def lora(cls, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> "MicaLinear":
        """LoRA (arXiv 2106.09685) on the same code: B starts at zero and is trained, A starts as Kaiming-uniform
        noise.
        """
        base = quant.freeze(base)
        B = torch.zeros(base.out_features, rank, device=base.device)
        layer = cls(base, B, alpha / rank, dropout, train_B=True)
        nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))  # PEFT's reset_lora_parameters
        return layer

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """The frozen base's weight as it is stored: code that asks a linear for its device or dtype finds it here."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
        x = quant.in_autocast(x)
        if self.dropout and self.training:
            z = functional.linear(functional.dropout(x, self.dropout), self.A.to(x.dtype))
            return _Adapted.apply(x, z, self.B, None, self.base, self.scale)
        z = _Coefficients.apply(x, self.A)
        return _Adapted.apply(x, z, self.B, self.A.detach(), self.base, self.scale)

    def delta(self) -> torch.Tensor:
        """scale · B A, (out, in) in fp32: what a merge adds to the base's weight."""
        return (self.B.float() @ self.A.float()) * self.scale

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
