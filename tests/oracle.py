"""bitsandbytes as an oracle: what its 4-bit weights are, on any CPU."""

import copy

import torch
from bitsandbytes import functional


def dequantized(codes: torch.Tensor, state: functional.QuantState) -> torch.Tensor:
    """The weight as one row: of rows that are no multiple of 64 columns its AVX512 kernel takes wrong scales (`quant`)."""
    flat = copy.copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return functional.dequantize_4bit(codes, flat).view(state.shape)
