"""Cross entropy over chunks of tokens, so that the logits of a batch never exist whole; and the mean loss over batches.

How: the output head is frozen, so the gradient of the hidden states is all a backward needs. It is computed chunk by
chunk in the forward, while a chunk's logits exist, and kept (tokens x width) in place of the logits (tokens x
vocabulary: for SmolLM2 85 times as large, for Llama-3 31 times). Tokens without a label are never multiplied with the
head.

What it gives up: the gradient is computed even where only the value is wanted with gradients enabled.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional

CHUNK_LOGITS = 2**25  # logits at once, 134 MB in fp32: for each chunk a 16-bit head is cast to fp32 again
IGNORED = -100  # the label of a token that is not supervised, as in torch and transformers


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies of head(hidden) against targets. hidden: (tokens, width), targets: (tokens,)."""

    @staticmethod
    def forward(ctx, hidden, targets, head, vocabulary):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None
        for rows in _chunks(len(targets), vocabulary):
            with torch.set_grad_enabled(wanted):
                part = hidden[rows].detach().requires_grad_(wanted)
                loss = functional.cross_entropy(head(part).float(), targets[rows], reduction="sum")
            if wanted:
                (grad[rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.grad = grad
        return total.float()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.grad * upstream.to(ctx.grad.dtype), None, None, None


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits fit in CHUNK_LOGITS."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


def output_head(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from last hidden states (tokens, width) to logits (tokens, vocabulary) of a transformers model.

    Exact for the ten families qmica knows of: the output embeddings, divided by Granite's `logits_scaling`,
    soft-capped as Gemma does.
    """
    head = model.get_output_embeddings()
    scaling = getattr(model.config, "logits_scaling", None) or 1.0
    cap = getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        values = head(hidden) / scaling if scaling != 1.0 else head(hidden)
        return values if cap is None else cap * torch.tanh(values / cap)

    return logits


def hidden_states(model: nn.Module, batch) -> torch.Tensor:
    """The last hidden states (rows, length, width) of a packed batch.

    Documents in a row are told apart by their restarting positions alone: any attention mask, or a cache, makes
    transformers attend across them without a word (measured: the second document's logits move by 20.7).
    """
    output = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False
    )
    return output.last_hidden_state


def summed_loss(model: nn.Module, batch) -> torch.Tensor:
    """The cross entropy summed over a batch's supervised tokens (nats). labels[t] is the target of position t - 1."""
    targets = batch.labels[:, 1:]
    supervised = targets != IGNORED
    hidden = hidden_states(model, batch)[:, :-1][supervised]
    return _ChunkedCrossEntropy.apply(hidden, targets[supervised], output_head(model), model.config.vocab_size)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable) -> float:
    """The mean cross entropy a supervised token over batches, in evaluation mode; the mode is put back. exp() of it
    is the perplexity.
    """
    training = model.training
    model.eval()
    try:
        total, count = 0.0, 0
        for batch in batches:
            total += summed_loss(model, batch).item()
            count += batch.supervised
    finally:
        model.train(training)
    return total / count
