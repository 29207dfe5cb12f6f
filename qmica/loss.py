"""The training loss over chunks of tokens, so that the logits of a batch never exist whole; and the mean over batches.

How: the output head is frozen, so the gradient of the hidden states is all a backward needs. It is computed chunk by
chunk in the forward, while a chunk's logits exist, and kept (tokens x width) in place of the logits (tokens x
vocabulary: for SmolLM2 85 times as large, for Llama-3 31 times). The gradient of a chunk's logits is written over
them, so that one set exists (two under a soft cap, three for a divergence); a 16-bit head is cast in pieces. Tokens
without a label are never multiplied with the head.

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
from transformers.modeling_outputs import BaseModelOutputWithPast

CHUNK_LOGITS = 2**24  # logits at once, 67 MB in fp32
CHUNK_TOKENS = 256  # at least, whatever the vocabulary: the head is cast to fp32 for each chunk, an eighth of its time
IGNORED = -100  # the label of a token that is not supervised, as in torch and transformers
# Rows are padded to a multiple of so many tokens: oneDNN, which multiplies bf16 on CPUs, keeps compiled code for each
# shape that it meets. Rows of up to 128 tokens: 148 for 131 tokens/s; after 100 steps 0.69 for 0.79 GB, and no growth
WIDTH = 16


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens have their logits at once."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits exist at once."""
    size = chunk_tokens(vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))


class Head:
    """Last hidden states (tokens, width) -> logits (tokens, vocabulary), and back.

    The output embeddings, divided by Granite's `logits_scaling`, soft-capped as Gemma does: cap · tanh(logits / cap).
    Exact for the ten families qmica knows of; where a model does something else, `of` finds that out.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.scaling = getattr(model.config, "logits_scaling", None) or 1.0
        self.cap = getattr(model.config, "final_logit_softcapping", None)

    @property
    def linear(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        return self.linear.out_features

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a transformers model, checked on a few tokens against the model's own logits when it is first
        asked for; a model that disagrees gets its own.
        """
        if not hasattr(model, "qmica_head"):
            ours = cls(model)
            model.qmica_head = ours if _agrees(ours, model) else OwnHead(model)
        return model.qmica_head

    def run(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The logits in fp32, in memory of their own, and the function from their gradient, which it uses up, to that
        of hidden. No graph.
        """
        with torch.no_grad():
            logits = self.linear(hidden).float()
            if self.scaling != 1.0:
                logits.div_(self.scaling)
            capped = None
            if self.cap is not None:
                capped = logits.div_(self.cap).tanh_()
                logits = capped * self.cap
        return logits, lambda grad: self._back(grad, capped, hidden.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.run(hidden)[0]

    def _back(self, grad: torch.Tensor, capped: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if capped is not None:  # d cap · tanh(u / cap) / du = 1 - tanh²
            grad.mul_(capped.square_().neg_().add_(1))
        if self.scaling != 1.0:
            grad.div_(self.scaling)
        back = getattr(self.linear, "back", None)  # a frozen linear's; a plain one is multiplied whole
        return back(grad.to(dtype)) if back else grad.to(dtype) @ self.linear.weight.to(dtype)


class OwnHead(Head):
    """Whatever the model itself does behind its last hidden states: its forward is run with those put in."""

    def run(self, hidden: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        with torch.enable_grad():
            part = hidden.detach().requires_grad_()
            logits = self._forward(part).float()
        return logits.detach().clone(), lambda grad: torch.autograd.grad(logits, part, grad)[0]

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        given = BaseModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))
        inner = self.model.base_model
        inner.forward = lambda *_, **__: given
        try:
            return self.model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits[0]
        finally:
            del inner.forward


def _agrees(head: Head, model: nn.Module) -> bool:
    """Whether the head gives the model's own logits on a few tokens, to what rounding allows in the compute dtype."""
    ids = torch.arange(min(8, head.vocabulary), device=head.linear.weight.device).unsqueeze(0)
    seen = []
    hook = model.base_model.register_forward_hook(lambda module, given, output: seen.append(output.last_hidden_state))
    with evaluating(model), torch.no_grad():
        try:
            own = model(input_ids=ids, use_cache=False).logits[0].float()
        finally:
            hook.remove()
        error = (head.logits(seen[0][0]) - own).abs().max() / own.abs().max()
    return error.item() <= 8 * torch.finfo(seen[0].dtype).eps


# The loss of a chunk from its logits: the sum (nats), and its gradient, written over the logits.
ChunkLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]


class _ChunkedLoss(torch.autograd.Function):
    """Sum of `chunk_loss(logits, rows)` over chunks `rows` of hidden: (tokens, width)."""

    @staticmethod
    def forward(ctx, hidden, head, chunk_loss):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        ctx.grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in chunks(len(hidden), head.vocabulary):
            logits, back = head.run(hidden[rows])
            value, grad = chunk_loss(logits, rows)
            total += value
            if ctx.grad is not None:
                ctx.grad[rows] = back(grad)
            del logits, back, grad  # before the next chunk's
        return total.float()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.grad * upstream.to(ctx.grad.dtype), None, None


def cross_entropy(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """The cross entropies of head(hidden) against targets, summed (nats). hidden: (tokens, width); targets: (tokens,)
    ids. Its gradient is the chances less one at the target.
    """

    def of_chunk(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = targets[rows].unsqueeze(1)
        said, highest = logits.gather(1, wanted), logits.amax(1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(1, keepdim=True)
        chances = logits.div_(total).scatter_add_(1, wanted, torch.full_like(said, -1.0))
        return (highest + total.log() - said).sum(), chances

    return _ChunkedLoss.apply(hidden, head, of_chunk)


def divergence(hidden: torch.Tensor, base: torch.Tensor, head: Head) -> torch.Tensor:
    """KL(base ‖ tuned) of the next-token distributions, summed (nats). hidden, base: the last hidden states of both,
    (tokens, width). Its gradient is the difference of their chances.

    Up to a constant this is the cross entropy on text drawn from the base itself, without the noise of drawing
    (Learning without Forgetting, arXiv 1606.09282, at temperature 1).
    """

    def of_chunk(logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = _log_chances_(head.logits(base[rows]))
        said = _log_chances_(logits)
        chances = wanted.exp()
        value = torch.linalg.vecdot(chances, wanted.sub_(said)).sum().clamp_min(0)  # rounding: none is below
        return value, said.exp_().sub_(chances)

    return _ChunkedLoss.apply(hidden, head, of_chunk)


def _log_chances_(logits: torch.Tensor) -> torch.Tensor:
    """log softmax, written over the logits."""
    return logits.sub_(logits.logsumexp(1, keepdim=True))


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
    return cross_entropy(hidden[labelled], targets[labelled], Head.of(model))


def held_losses(model: nn.Module, batch, base_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy summed over what is learnt, and the divergence from the base summed over what is replayed.

    base_states: what `replayed_states` gave for this batch with the adapter off.
    """
    targets = batch.labels[:, 1:]
    hidden = hidden_states(model, batch.input_ids, batch.position_ids)[:, :-1]
    head = Head.of(model)
    replayed = _replayed(batch)
    learnt = (targets != IGNORED) & ~replayed
    entropy = cross_entropy(hidden[learnt], targets[learnt], head)
    return entropy, divergence(hidden[replayed], base_states, head)


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
    more = min(-ids.shape[1] % WIDTH, batch.input_ids.shape[1] - ids.shape[1])
    ids, positions = (functional.pad(part, (0, more)) for part in (ids, positions))
    labels = functional.pad(labels, (0, more), value=IGNORED)
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
