"""MicaLinear: a frozen linear with a frozen basis B and trained coefficients A.

    y = W x + scale · B (A dropout(x)),   scale = alpha / rank

How: the base is any frozen linear of `quant`; B is a buffer in bf16, as stored where PEFT made it (for LoRA,
the same place holds a trained parameter in fp32), A a parameter in fp32, both cast to the input's dtype for each use.
A starts at zero, so step 0 is exactly the base model.

What it gives up: nothing is fused; autograd keeps x for dA (MiCA does not save activation memory against LoRA),
halves the trained parameters, their gradients and optimizer states.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from qmica import quant


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
        y = self.base(x)
        if not self.enabled:
            return y
        coefficients = functional.linear(functional.dropout(x, self.dropout, self.training), self.A.to(x.dtype))
        return y + functional.linear(coefficients, self.B.to(x.dtype)) * self.scale  # PEFT's order: bit-equal in fp32

    def delta(self) -> torch.Tensor:
        """scale · B A, (out, in) in fp32: what a merge adds to the base's weight."""
        return (self.B.float() @ self.A.float()) * self.scale

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"
