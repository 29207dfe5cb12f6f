"""The training loss over chunks of tokens, so that the logits of a batch never exist whole; and the mean over batches.

How: the output head is frozen, so the gradient of the hidden states is all a backward needs. It is computed chunk by
chunk in the forward, while a chunk's logits exist, and kept (tokens x width) in place of the logits (tokens x
vocabulary: for SmolLM2 85 times as large, for Llama-3 31 times). Tokens without a label are never multiplied with the
head.

Two losses share this: cross entropy against labels, and, for replayed text, the divergence from what the base itself
says there. The base is the same network with its adapter off; it is kept as its last hidden states, and its logits too
exist for one chunk at a time.

What it gives up: the gradient is computed even where only the value is wanted with gradients enabled.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

CHUNK_LOGITS = 2**25  # logits at once, 134 MB in fp32: for each chunk a 16-bit head is cast to fp32 again
IGNORED = -100  # the label of a token that is not supervised, as in torch and transformers


def chunks(tokens: int, vocabulary: int, sets: int = 1) -> Iterator[slice]:
    """Slices of tokens for which `sets` sets of logits fit in CHUNK_LOGITS."""
    size = max(1, CHUNK_LOGITS // sets // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


class _ChunkedLoss(torch.autograd.Function):
    """Sum of `chunk_loss(logits, rows)` over slices `rows`, logits = head(hidden[rows]). hidden: (tokens, width)."""

    @staticmethod
    def forward(ctx, hidden, head, chunk_loss, slices):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wanted else None
        for rows in slices:
            with torch.set_grad_enabled(wanted):
                part = hidden[rows].detach().requires_grad_(wanted)
                loss = chunk_loss(head(part).float(), rows)
            if wanted:
                (grad[rows],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.grad = grad
        return total.float()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.grad * upstream.to(ctx.grad.dtype), None, None, None


def cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, head: Callable, vocabulary: int) -> torch.Tensor:
    """The cross entropies of head(hidden) against targets, summed (nats). hidden: (tokens, width); targets: (tokens,)
    ids.
    """

    def of_chunk(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return functional.cross_entropy(logits, targets[rows], reduction="sum")

    return _ChunkedLoss.apply(hidden, head, of_chunk, chunks(len(hidden), vocabulary))


def divergence(hidden: torch.Tensor, base: torch.Tensor, head: Callable, vocabulary: int) -> torch.Tensor:
    """KL(base ‖ tuned) of the next-token distributions, summed (nats). hidden, base: the last hidden states of both,
    (tokens, width).

    Up to a constant this is the cross entropy on text drawn from the base itself, without the noise of drawing
    (Learning without Forgetting, arXiv 1606.09282, at temperature 1).
    """

    def of_chunk(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(head(base[rows]).float(), dim=-1)
        said = functional.log_softmax(logits, dim=-1)
        return functional.kl_div(said, wanted, reduction="sum", log_target=True)

    return _ChunkedLoss.apply(hidden, head, of_chunk, chunks(len(hidden), vocabulary, sets=2))


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


def hidden_states(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states (rows, length, width) of packed rows.

    Documents in a row are told apart by their restarting positions alone: any attention mask, or a cache, makes
    transformers attend across them without a word (measured: the second document's logits move by 20.7).
    """
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, use_cache=False)
    return output.last_hidden_state


def summed_loss(model: nn.Module, batch) -> torch.Tensor:
    """The cross entropy summed over a batch's supervised tokens (nats). labels[t] is the target of position t - 1."""
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)[:, :-1]
    return cross_entropy(hidden[labelled], targets[labelled], output_head(model), model.config.vocab_size)


def held_losses(model: nn.Module, batch, base_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy summed over what is learnt, and the divergence from the base summed over what is replayed.

    base_states: what `replayed_states` gave for this batch with the adapter off.
    """
    targets = batch.labels[:, 1:]
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)[:, :-1]
    head, vocabulary = output_head(model), model.config.vocab_size
    replayed = _replayed(batch)
    learnt = (targets != IGNORED) & ~replayed
    entropy = cross_entropy(hidden[learnt], targets[learnt], head, vocabulary)
    return entropy, divergence(hidden[replayed], base_states, head, vocabulary)


def _replayed(batch) -> torch.Tensor:
    """Which positions (rows, length - 1) predict a supervised token of replayed text."""
    return batch.replayed[:, 1:] & (batch.labels[:, 1:] != IGNORED)


@torch.no_grad()
def replayed_states(model: nn.Module, batch) -> torch.Tensor:
    """The last hidden states (tokens, width) in evaluation mode where a batch's replayed tokens are predicted; only the
    replayed tokens of each row are computed (documents see nothing of their neighbours).
    """
    rows = batch.replayed.any(dim=1).nonzero().flatten().tolist()
    kept = [[part[row][batch.replayed[row]] for row in rows] for part in (batch.input_ids, batch.position_ids)]
    ids, positions = (pad_sequence(parts, batch_first=True) for parts in kept)
    labels = pad_sequence([batch.labels[row][batch.replayed[row]] for row in rows], True, IGNORED)
    for row, part in zip(positions, kept[1], strict=True):  # padding counts on, as packing.Epoch has it
        row[len(part) :] = part[-1] + 1 + torch.arange(len(row) - len(part), device=row.device)
    with evaluating(model):
        return hidden_states(model, ids, positions)[:, :-1][labels[:, 1:] != IGNORED]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; put back as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable) -> float:
    """The mean cross entropy a supervised token over batches, in evaluation mode; the mode is put back. exp() of it
    is the perplexity.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            total += summed_loss(model, batch).item()
            count += batch.supervised
    return total / count
