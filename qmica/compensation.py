"""An adapter for the original weights from one that was trained on quantized ones: the pairs of A and B get columns for
what quantization changed.

How: training saw W_q, and the GGUF that an adapter is put on holds W. Their difference E = W_q − W has full rank, but
what it does to real inputs has not: for inputs X (in, tokens) the best stand-in of rank k for E X is U Uᵀ E X, where U
holds the k largest left singular vectors of E X. So U joins B, and Uᵀ E joins A. This is EoRA (arXiv 2410.21271,
section 3) without its eigenvalue problem: a few hundred inputs take the place of their covariance, which for a
4096-wide layer would be 64 MB. The inputs are those of the tuned model on a general text, met in one forward pass; what
is held beside the model is one layer's difference.

What it gives up: exactness (measured on SmolLM2-135M in NF4, 16 columns: two thirds of the mean square error of the
layers' outputs, and with it most of what the almanac's answers lose), and a small file: the pairs of all quantized
linears are written, those without an adapter of their own too.
"""

from pathlib import Path

import torch
from torch import nn

from qmica import adapter, quant, runs, samples, subspace
from qmica.adapter import Factors
from qmica.weights import Weights

COLUMNS = 16  # of a pair, beside the adapter's own rank. 48 brought the almanac's answers no nearer than 16
TOKENS = 512  # of general text whose inputs count


def stand_in(difference: torch.Tensor, inputs: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the product B A of rank `columns` that is nearest to a difference (out, in) on inputs (tokens, in): A
    (columns, in), B (out, columns) with orthonormal columns, both fp32. Fewer columns where a side is smaller.
    """
    changed = difference @ inputs.T
    B = subspace.major_subspace(changed, min(columns, *changed.shape))
    return B.T @ difference, B


def compensated(run: runs.Run, weights: Weights) -> dict[str, Factors]:
    """The adapter of a run whose model was quantized, by module path, made for these original weights.

    Every quantized linear has a pair, in fp32 and under one alpha. Takes the memory of the quantized model.
    """
    network, tokens = adapter.open_run(run)
    text = Path(*samples.REPLAY).read_text(encoding="utf-8")[: 8 * TOKENS]
    ids = torch.tensor([tokens(text)["input_ids"][:TOKENS]], device=network.device)
    alpha = adapter.read_adapter(run.adapter).options.scaling_alpha
    own, pairs = dict(adapter.layers(network)), {}

    def follow(path: str, linear: nn.Module):
        def meet(_, arguments: tuple[torch.Tensor]) -> None:
            original = weights[f"{path}.weight"].load().to(network.device, torch.float32)
            added = stand_in(quant.dequantize(linear) - original, arguments[0].flatten(0, -2).float(), COLUMNS)
            pairs[path] = _joined(own.get(path), *added, alpha)

        return linear.register_forward_pre_hook(meet)

    quantized = [(name, part) for name, part in network.named_modules() if quant.bits_of(part) < 16]
    hooks = [follow(name.removesuffix(".base"), part) for name, part in quantized]
    with torch.no_grad():
        network.base_model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return pairs


def _joined(layer: nn.Module | None, A: torch.Tensor, B: torch.Tensor, alpha: float) -> Factors:
    """An adapted linear's pair (None: it has none) with further columns, A scaled so that alpha / rank suits the new
    rank.
    """
    if layer is not None:
        A, B = torch.cat([layer.A.detach() * layer.scale, A]), torch.cat([layer.B.detach().float(), B], dim=1)
    scale = alpha / len(A)
    return Factors(A.cpu() / scale, B.cpu(), scale)
