"""An adapter for the original weights from one that was trained beside quantized ones: the pairs of A and B get columns
for what quantization changed.

How: training saw W_q, and the adapter is put on W, the weights of the source it was trained from. Their difference
E = W_q − W has full rank, but what it does to real inputs hardly: for inputs X (in, tokens) the best stand-in of rank k
for E X is U Uᵀ E X, U the k leading left singular vectors of E X. So U joins B, and Uᵀ E joins A. This is EoRA
(arXiv 2410.21271) with a thousand inputs in place of their covariance, which for a 4096-wide layer is 64 MB. The
inputs are those of the tuned model, met in one forward pass, one layer's difference at a time.

Which inputs decides: half are of what the run learnt from, half of the bundled novel. SmolLM2-135M from its Q4_1 GGUF,
an almanac learnt beside NF4, 96 questions and 24 free answers: beside NF4 0.729 and 15; beside the original weights
the plain adapter 0.625 and 8, with 16 columns for the novel alone 0.604 and 12, for the almanac alone 0.688 and 16.

What it gives up: memory (the quantized model, three fp32 copies of a layer, all pairs) and a small file: the pairs of
all quantized linears are written, those without an adapter of their own too. A GGUF in another type than the source has
an error of its own, which stays.
"""

from collections.abc import Mapping

import torch
from torch import nn

from qmica import adapter, data, loss, packing, quant, runs, samples, subspace
from qmica.adapter import Factors
from qmica.config import DataConfig
from qmica.weights import Weights

COLUMNS = 16  # of a pair, beside the adapter's own rank; with 48 the almanac's answers came no nearer
TOKENS = 1024  # of text whose inputs count


def stand_in(difference: torch.Tensor, inputs: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) of the product B A of rank `columns` that is nearest to a difference (out, in) on inputs (tokens, in): A
    (columns, in), B (out, columns) with orthonormal columns, both fp32. Fewer columns where a side is smaller.
    """
    changed = difference @ inputs.T
    B = subspace.major_subspace(changed, min(columns, *changed.shape))
    return B.T @ difference, B


def compensated(
    run: runs.Run, factors: Mapping[str, Factors], weights: Weights, scale: float = 1.0
) -> dict[str, Factors]:
    """A run's factors by module path, made for these weights, which it was trained from: every linear that loading
    quantized has a pair, in fp32 and under the alpha that all have. scale: how much of the run's adapter they are.

    Raises QmicaError as `adapter.open_run` does.
    """
    # in fp32: 16 bits would round a small difference
    network, tokens = adapter.open_run(run, scale=scale, device="auto", dtype="fp32")
    row = packing.to(_sample(run, tokens), network.device)
    alpha = next(part.scale * len(part.A) for part in factors.values())
    pairs = dict(factors)

    def follow(path: str, linear: nn.Module):
        def meet(_, arguments: tuple[torch.Tensor]) -> None:
            original = weights[f"{path}.weight"].load().to(network.device, torch.float32)
            added = stand_in(quant.dequantize(linear) - original, arguments[0][0, : row.tokens], COLUMNS)
            pairs[path] = _joined(factors.get(path), *(half.cpu() for half in added), alpha)

        # of the whole linear: one with an adapter does not call its base, it multiplies with its weight
        return network.get_submodule(path).register_forward_pre_hook(meet)

    quantized = {
        name.removesuffix(".base"): part
        for name, part in network.named_modules()
        if quant.FORMATS[quant.bits_of(part)].quantizes
    }
    hooks = [follow(path, part) for path, part in quantized.items() if f"{path}.weight" not in weights.packed]
    with torch.no_grad():
        loss.hidden_states(network, row.input_ids, row.position_ids)
    for hook in hooks:
        hook.remove()
    return pairs


def _sample(run: runs.Run, tokens) -> packing.Batch:
    """A row of about TOKENS tokens, half of what the run learnt from and half general text; the latter alone where the
    data is not known, or not where it was.
    """
    options = run.learnt_from()
    if options is None:
        print("what the adapter learnt from is not at hand: general text alone says what matters of the weights")
        options = DataConfig(data=samples.REPLAY, format="text")
    made = data.prepare(
        options.data,
        tokens,
        max_seq_length=options.max_seq_length,
        format=options.format,
        replay=samples.REPLAY,
        replay_ratio=0.5,
        say=lambda text: None,
    )
    size = max(TOKENS, options.max_seq_length)
    rows = packing.batches(
        made.train, seed=0, epoch=0, batch_size=1, max_seq_length=size, replay=made.replay, replay_ratio=0.5
    )
    return rows[0]


def _joined(own: Factors | None, A: torch.Tensor, B: torch.Tensor, alpha: float) -> Factors:
    """A linear's pair (None: it has no adapter) with further columns, A scaled so that alpha / rank suits the new
    rank.
    """
    if own is not None:
        A, B = torch.cat([own.A.float() * own.scale, A]), torch.cat([own.B.float(), B], dim=1)
    scale = alpha / len(A)
    return Factors(A / scale, B, scale)
