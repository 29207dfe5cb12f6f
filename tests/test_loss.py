"""The chunked losses against transformers' and torch's own: values, gradients, packed documents, heads that scale or cap."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qmica import loss
from qmica.loss import IGNORED
from qmica.packing import Batch

VOCABULARY = 448
DOCUMENTS = [[30, 17, 9], [40, 12]]  # lengths, by row: one is padded


def batch_of(documents=DOCUMENTS, seed=0, share=0.7):
    """Rows of random documents as `packing` makes them; and the documents alone, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    length = max(map(sum, documents))
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    labels, positions, alone = torch.full_like(ids, IGNORED), torch.empty_like(ids), []
    for row, lengths in enumerate(documents):
        at = 0
        for count in lengths:
            tokens = torch.randint(0, VOCABULARY, (count,), generator=generator)
            wanted = torch.where(torch.rand(count, generator=generator) < share, tokens, IGNORED)
            wanted[0] = IGNORED
            place = slice(at, at + count)
            ids[row, place], labels[row, place], positions[row, place] = tokens, wanted, torch.arange(count)
            alone.append((tokens[None], wanted[None]))
            at += count
        positions[row, at:] = torch.arange(length - at)
    supervised = int((labels != IGNORED).sum())
    replayed = torch.zeros_like(ids, dtype=torch.bool)
    return Batch(ids, positions, labels, replayed, supervised, 0, sum(map(sum, documents))), alone


def theirs_of(model, alone):
    """transformers' summed loss, document by document."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in alone:
        count = int((labels[:, 1:] != IGNORED).sum())
        if count:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss.double() * count
    return total


def loud(kind):
    """A tiny model whose head does something of its own; logits of standard deviation about 5."""
    if kind in ("llama", "qwen2"):
        return tiny_model(kind)
    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "tie_word_embeddings": False}
    special = {
        "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
        "gemma2": {"final_logit_softcapping": 4.0, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8},
    }[kind]
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **small, **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.lm_head.weight.data = torch.randn(VOCABULARY, 64) * (2.0 if kind == "granite" else 0.7)
    return model


def gradients(model, value):
    """Of all weights but the head's, which is frozen."""
    model.zero_grad()
    value.backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite", "gemma2"])
@pytest.mark.parametrize("chunk", [7, 2**17])
def test_values_and_gradients_are_transformers(kind, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    model = loud(kind)
    model.lm_head.requires_grad_(False)
    batch, alone = batch_of()
    ours, theirs = loss.summed_loss(model, batch), theirs_of(model, alone)
    error = abs(ours.item() - theirs.item()) / theirs.item()
    assert error < 1e-6, f"{error:.1e} of {theirs.item():.1f} nats"  # measured: at most 1e-7
    mine, other = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == other.keys() and len(mine) > 15
    worst = max(((mine[name] - other[name]).norm() / other[name].norm()).item() for name in mine)
    assert worst < 2e-5, f"{worst:.1e}"  # measured: at most 3e-6


@pytest.mark.parametrize("kind", ["granite", "gemma2"])
def test_a_head_that_forgets_its_property_is_seen(kind):
    """Without the scaling, or the cap, the loss is another one: the models above are loud enough."""
    model = loud(kind)
    batch, alone = batch_of()
    theirs = theirs_of(model, alone).item()
    model.qmica_head = loss.Head(model)
    setattr(model.qmica_head, *{"granite": ("scaling", 1.0), "gemma2": ("cap", None)}[kind])
    moved = abs(loss.summed_loss(model, batch).item() - theirs) / theirs
    assert moved > 0.02, f"{moved:.1e}"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite", "gemma2"])
def test_the_heads_of_the_families_agree_with_their_models(kind):
    model = loud(kind)
    batch, _ = batch_of()
    loss.summed_loss(model, batch)
    assert type(model.qmica_head) is loss.Head


@pytest.mark.parametrize("chunk", [7, 2**17])
def test_a_model_with_a_head_of_its_own_keeps_it(chunk, monkeypatch):
    """One that doubles its logits, and says so nowhere: found at the first loss, values and gradients are its own."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    model = loud("llama")
    model.lm_head.requires_grad_(False)
    plain = type(model).forward

    class Doubled(type(model)):
        def forward(self, *args, labels=None, **named):
            output = plain(self, *args, **named)
            output.logits = 2 * output.logits
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, VOCABULARY)
            return output

    model.__class__ = Doubled
    batch, alone = batch_of()
    ours, theirs = loss.summed_loss(model, batch), theirs_of(model, alone)
    assert type(model.qmica_head) is loss.OwnHead
    assert abs(ours.item() - theirs.item()) < 1e-6 * theirs.item()
    mine, other = gradients(model, ours), gradients(model, theirs)
    worst = max(((mine[name] - other[name]).norm() / other[name].norm()).item() for name in mine)
    assert worst < 2e-5, f"{worst:.1e}"


def test_documents_of_a_row_do_not_see_each_other():
    """Another first document leaves the second one's share of the loss as it is; with a mask it would not (FACTS)."""
    model = tiny_model("llama")
    batch, _ = batch_of([[30, 17]])
    batch.labels[:, :30] = IGNORED
    with torch.no_grad():
        before = loss.summed_loss(model, batch).item()
        batch.input_ids[:, :30] = torch.flip(batch.input_ids[:, :30], (1,))
        after = loss.summed_loss(model, batch).item()
        batch.position_ids[:] = torch.arange(47)
        leaked = loss.summed_loss(model, batch).item()
    assert abs(after - before) < 1e-4 * before, abs(after - before)
    assert abs(leaked - before) > 0.01 * before, "the test sees no leak"


@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129, 256, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_borders_of_chunks(tokens, dtype, monkeypatch):
    """Against one whole cross entropy, and no more logits at once than a chunk's."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 128 * 50)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 16, generator=generator).to(dtype)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    seen, linear = [], torch.nn.Linear(16, 50, bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    ours = loss.cross_entropy(
        hidden, targets, loss.Head(SimpleNamespace(get_output_embeddings=lambda: linear, config=None))
    )
    (ours / 7).backward()
    assert sum(seen) == tokens and max(seen, default=0) <= 128 and ours.dtype == torch.float32
    twin = hidden.detach().clone().requires_grad_()
    theirs = functional.cross_entropy(functional.linear(twin, weight).float(), targets, reduction="sum")
    (theirs / 7).backward()
    assert abs(ours.item() - theirs.item()) <= 1e-5 * max(theirs.item(), 1)
    error = (hidden.grad - twin.grad).abs().max().item() if tokens else 0.0
    assert hidden.grad.dtype == dtype and error <= {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype], f"{error:.1e}"


# ---- replayed text: the divergence from the base


def with_replay(batch, *documents):
    """The batch with some of its documents (row, start, stop) replayed ones."""
    for row, start, stop in documents:
        batch.replayed[row, start:stop] = True
    return batch


def moved(kind):
    """A base, and the same model after its last layer was pushed: their distributions differ."""
    base, tuned = loud(kind), loud(kind)
    with torch.no_grad():
        for part in tuned.model.layers[-1].parameters():
            part += 0.05 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel()))
    tuned.lm_head.requires_grad_(False)
    return base, tuned


def naive(base, tuned, batch):
    """Cross entropy on what is learnt, and KL(base ‖ tuned) on what is replayed, from whole logits."""
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    said = torch.log_softmax(tuned(**given).logits.float()[:, :-1], -1)
    with torch.no_grad():
        wanted = torch.log_softmax(base(**given).logits.float()[:, :-1], -1)
    targets, replayed = batch.labels[:, 1:], batch.replayed[:, 1:]
    learnt = (targets != IGNORED) & ~replayed
    entropy = -said[learnt].gather(1, targets[learnt].unsqueeze(1)).sum()
    held = (targets != IGNORED) & replayed
    return entropy, (wanted[held].exp() * (wanted[held] - said[held])).sum()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite", "gemma2"])
@pytest.mark.parametrize("chunk", [7, 2**17])
@pytest.mark.parametrize("replayed", [[(0, 30, 47)], [(0, 0, 30), (0, 30, 47), (1, 0, 40)]], ids=["one", "uneven rows"])
def test_replayed_tokens_are_held_to_the_base(kind, chunk, replayed, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 0)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    base, tuned = moved(kind)
    batch = with_replay(batch_of()[0], *replayed)
    ours, theirs = loss.held_losses(tuned, batch, loss.replayed_states(base, batch)), naive(base, tuned, batch)
    for mine, other in zip(ours, theirs, strict=True):
        error = abs(mine.item() - other.item()) / other.item()
        assert other > 1 and error < 1e-5, f"{error:.1e} of {other.item():.1f} nats"
    mine, other = gradients(tuned, ours[0] + 1.7 * ours[1]), gradients(tuned, theirs[0] + 1.7 * theirs[1])
    worst = max(((mine[name] - other[name]).norm() / other[name].norm()).item() for name in mine)
    assert worst < 5e-5, f"{worst:.1e}"


def test_a_model_that_has_not_moved_has_nothing_to_hold():
    """Replay alone, base against itself: no loss, and no gradient but rounding's."""
    model = loud("llama")
    model.lm_head.requires_grad_(False)
    batch = with_replay(batch_of([[40]])[0], (0, 0, 40))
    learnt, held = loss.held_losses(model, batch, loss.replayed_states(model, batch))
    text = gradients(model, loss.summed_loss(model, batch))
    still = gradients(model, held)
    share = max((still[name].norm() / text[name].norm()).item() for name in still)
    assert learnt == 0 and abs(held.item()) < 1e-4 and share < 1e-4, (learnt.item(), held.item(), share)


def test_the_base_is_asked_about_replayed_tokens_alone():
    """In evaluation mode, without a graph; what stands beside them in their rows is not computed, but padding is."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    batch = with_replay(batch_of()[0], (1, 0, 40))
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append((*named["input_ids"].shape, module.training)), with_kwargs=True
    )
    states = loss.replayed_states(model, batch)
    assert seen == [(1, 48, False)] and model.training and not states.requires_grad
    assert len(states) == int((batch.labels[1, 1:40] != IGNORED).sum())


def test_a_row_without_labels_costs_no_head():
    model, calls = tiny_model("llama"), []
    loss.Head.of(model)  # which runs the model once
    model.lm_head.register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    batch, _ = batch_of(share=0.0)
    assert loss.summed_loss(model, batch).item() == 0.0 and calls == []


def test_the_mean_is_over_tokens_and_the_mode_is_put_back():
    """A batch of 12 tokens counts less than one of 90; dropout is off meanwhile."""
    model = tiny_model("llama", attention_dropout=0.5).train()
    parts = [batch_of([[50, 60]], seed=1), batch_of([[14]], seed=2)]
    mean = loss.mean_loss(model, (batch for batch, _ in parts))
    assert model.training and all(module.training for module in model.modules())
    with torch.no_grad():
        model.eval()
        total = sum(theirs_of(model, alone).item() for _, alone in parts)
    expected = total / sum(batch.supervised for batch, _ in parts)
    assert abs(mean - expected) < 1e-6 * expected, (mean, expected)
    assert loss.mean_loss(model, [parts[0][0]]) != mean and not model.training


def test_a_failure_puts_the_mode_back():
    model = tiny_model("llama").train()

    def broken():
        raise ValueError("no more")
        yield

    with pytest.raises(ValueError, match="no more"):
        loss.mean_loss(model, broken())
    assert model.training
