"""Windows, rows, batches, replay; and on a real model: a packed document's logits are those of the lone document."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmica import packing
from qmica.errors import QmicaError
from qmica.loss import IGNORED, summed_loss
from qmica.packing import Batch, Examples, batches, draw_replay, pack, replay_tokens, split, window_lengths


def examples(lengths, seed: int = 0, share: float = 1.0, first: int = 0) -> Examples:
    """Examples of these lengths, one a document; token ids count up from `first`, so that each is found again."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    supervised = np.random.default_rng(seed).random(starts[-1]) < share
    supervised[starts[:-1]] = False
    ids = np.arange(first, first + starts[-1], dtype=np.int32)
    return Examples(ids, supervised, starts, np.arange(len(lengths), dtype=np.int32))


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


@given(tokens=st.integers(1, 5000), size=st.integers(4, 300))
def test_windows_lose_nothing_and_leave_no_token_alone(tokens, size):
    lengths = window_lengths(tokens, size)
    assert sum(lengths) == tokens
    assert max(lengths) <= size
    assert min(lengths) > 1 or tokens == 1
    assert len(lengths) == -(-tokens // size)
    assert all(length >= size - 1 for length in lengths[:-1])


@given(lengths=LENGTHS, capacity=st.integers(40, 100))
def test_pack_places_each_once_within_capacity(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= capacity
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    # a new row is opened only when no other has room: so at most one row is half empty
    assert sum(sum(lengths[i] for i in row) <= capacity // 2 for row in rows) <= 1


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 1)), max_size=60), st.integers(30, 90))
def test_pack_of_two_kinds_places_each_once_within_capacity(items, capacity):
    lengths = [length for length, _ in items]
    rows = pack(lengths, capacity, [kind for _, kind in items])
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)


def test_pack_brings_two_kinds_together():
    """Where the best fit is a row of its own kind, a row of the other kind with room comes first."""
    assert pack([60, 50, 40], 100) == [[0, 2], [1]]
    assert pack([60, 50, 40], 100, [1, 0, 1]) == [[0], [1, 2]]
    assert pack([60, 50, 40], 100, [0, 1, 0]) == [[0], [1, 2]]
    assert pack([60, 50, 40], 100, [0, 0, 1]) == pack([60, 50, 40], 100)  # both have the other kind: best fit


def test_updates_see_data_and_replay(monkeypatch):
    """Short documents of many lengths, a quarter of the tokens replay: fewer rows lack one than by best fit alone."""
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 2000).clip(8, 1024).astype(int)
    general = examples([256] * 1000, first=10**6)
    options = {"seed": 0, "epoch": 0, "batch_size": 1, "max_seq_length": 1024, "replay_ratio": 0.25}

    def both() -> float:
        made = batches(examples(lengths), replay=general, **options)
        return sum(0 < batch.replays < batch.supervised for batch in made) / len(made)

    mixed = both()
    monkeypatch.setattr(packing, "pack", lambda lengths, capacity, kinds: pack(lengths, capacity))
    fitted = both()
    print(f"rows with both: {mixed:.3f}, by best fit alone {fitted:.3f}")
    assert 1 - mixed < 0.6 * (1 - fitted)


def test_pack_fills_rows():
    """Documents of a log-normal length around 150, rows of 1024. Measured: 99.4 % full."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 5000).clip(5, 1024).astype(int).tolist()
    full = sum(lengths) / (1024 * len(pack(lengths, 1024)))
    assert full > 0.98, f"{full:.3f} of the rows are tokens"


def pieces_of(batch: Batch):
    """(row, start, stop) of each document: from one restart of the positions to the next, without padding (id 0)."""
    for row, (ids, positions) in enumerate(zip(batch.input_ids, batch.position_ids, strict=True)):
        end = int((ids != 0).nonzero().max()) + 1
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), end]
        yield from ((row, a, b) for a, b in pairwise(starts))


def rows_of(batch: Batch):
    for row, a, b in pieces_of(batch):
        yield batch.input_ids[row, a:b], batch.position_ids[row, a:b], batch.labels[row, a:b]


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    share=st.floats(0, 1),
    size=st.integers(1, 5),
    packing=st.booleans(),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 9),
)
def test_every_label_stands_once_and_positions_restart_at_documents(lengths, share, size, packing, seed, epoch):
    data = examples(lengths, seed, share, first=1)
    made = batches(data, seed=seed, epoch=epoch, batch_size=size, max_seq_length=40, packing=packing)
    real = [piece for batch in made for piece in rows_of(batch)]
    starts = dict(zip(data.ids[data.starts[:-1]].tolist(), data.lengths.tolist(), strict=True))
    assert sorted(int(ids[0]) for ids, _, _ in real) == sorted(starts)  # every document, once
    for ids, positions, labels in real:
        length = starts[int(ids[0])]
        assert ids.tolist() == list(range(int(ids[0]), int(ids[0]) + length))
        assert positions.tolist() == list(range(length))
        assert labels[0] == IGNORED
    for batch in made:
        assert (batch.labels[batch.input_ids == 0] == IGNORED).all()
        if not packing:
            assert (batch.position_ids == torch.arange(batch.position_ids.shape[1])).all()
    learnt = sorted(int(label) for batch in made for label in batch.labels.flatten() if label != IGNORED)
    assert learnt == data.ids[data.supervised].tolist()
    assert sum(batch.supervised for batch in made) == len(learnt)
    assert sum(batch.tokens for batch in made) == made.tokens() == len(data.ids)
    for batch in made:
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert len(batch.input_ids) <= size
        longest = 1 + int((batch.input_ids != 0).nonzero()[:, 1].max())
        assert batch.input_ids.shape[1] == min(40, 16 * ((longest + 15) // 16))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("packing_on", [True, False])
def test_documents_are_all_that_has_a_loss(share, packing_on):
    """Up to each document's last label, padding left out; a document without labels has none."""
    learnt = examples([7, 30, 2, 11, 25, 3], share=share, first=1)
    made = batches(learnt, seed=0, epoch=0, batch_size=3, max_seq_length=40, packing=packing_on)
    found = [pair for batch in made for pair in packing.documents(batch)]
    expected = []
    for batch in made:
        for ids, _, labels in rows_of(batch):
            learnt = (labels != IGNORED).tolist()
            if any(learnt):
                end = max(at for at, one in enumerate(learnt) if one) + 1
                expected.append((ids[:end].tolist(), learnt[:end]))
    assert found == expected and len(found) == (0 if share == 0 else 6 if share == 1 else len(found))
    assert sum(sum(learnt) for _, learnt in found) == sum(batch.supervised for batch in made)


def test_batches_are_a_function_of_seed_and_epoch():
    data = examples([5, 9, 14, 20, 3, 8] * 20)
    options = {"batch_size": 2, "max_seq_length": 32}

    def ids(made, start=0):
        return [batch.input_ids.tolist() for batch in made.since(start)]

    once = batches(data, seed=1, epoch=3, **options)
    assert ids(once) == ids(batches(data, seed=1, epoch=3, **options))
    assert ids(once, 7) == ids(once)[7:]
    assert len(ids(once)) == len(once)
    assert ids(once) != ids(batches(data, seed=1, epoch=4, **options))
    assert ids(once) != ids(batches(data, seed=2, epoch=3, **options))
    with pytest.raises(IndexError):
        once[len(once)]


# --- replay


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("packing", [True, False])
def test_replay_has_its_share_evenly_spread(ratio, packing):
    rng = np.random.default_rng(0)
    data = examples(rng.integers(10, 120, 400))
    general = examples([64] * 300, first=10**6)
    options = {"batch_size": 4, "max_seq_length": 128, "packing": packing, "replay": general, "replay_ratio": ratio}
    for epoch in range(3):
        made = batches(data, seed=5, epoch=epoch, **options)
        share = made.tokens(1) / made.tokens()
        assert abs(share - ratio) < 0.004, f"the share of replay is {share:.4f}, asked for {ratio}"
        assert made.tokens(0) == len(data.ids)
        assert all(torch.equal(b.replayed, b.input_ids >= 10**6) for b in made)
        assert all(b.replays == (b.labels >= 10**6).sum() for b in made)
        parts = np.array_split(np.array([[(b.input_ids >= 10**6).sum(), b.tokens] for b in made]), 4)
        quarters = [part[:, 0].sum() / part[:, 1].sum() for part in parts]
        assert max(abs(q - ratio) for q in quarters) < 0.05, f"by quarters of the epoch: {quarters}"


@settings(deadline=None, max_examples=50)
@given(lengths=LENGTHS, target=st.floats(1, 500), seed=st.integers(0, 1000))
def test_replay_epochs_are_consecutive_pieces_of_one_stream(lengths, target, seed):
    """No example comes again before all have come, and epochs together hold what they should to half an example."""
    general = examples(lengths)
    drawn = [draw_replay(general, target, seed, epoch) for epoch in range(6)]
    stream = np.concatenate(drawn)
    for start in range(0, len(stream) - len(lengths) + 1, len(lengths)):
        assert sorted(stream[start : start + len(lengths)]) == list(range(len(lengths)))
    tokens = np.cumsum([general.lengths[part].sum() for part in drawn])
    assert np.abs(tokens - target * np.arange(1, 7)).max() <= max(lengths) / 2 + 1e-6
    assert draw_replay(general, target, seed, 2).tolist() == drawn[2].tolist()


def test_replay_tokens():
    data = examples([30, 70])
    assert replay_tokens(data, 0.25) == pytest.approx(100 / 3)  # 33.3 of 133.3


# --- validation


@given(
    groups=st.lists(st.integers(1, 4), min_size=2, max_size=40), share=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
def test_split_keeps_documents_whole_and_apart(groups, share, seed):
    """Documents of several windows: none is on both sides, none is lost, and both sides have one."""
    data = examples([6] * sum(groups))
    documents = np.repeat(np.arange(len(groups), dtype=np.int32), groups)
    data = Examples(data.ids, data.supervised, data.starts, documents)
    train, held = split(data, share, seed)
    assert not set(train.documents) & set(held.documents)
    assert sorted([*train.ids, *held.ids]) == data.ids.tolist()
    count = len(set(held.documents))
    assert count == min(max(1, round(share * len(groups))), len(groups) - 1)
    order = np.random.default_rng(seed).permutation(len(groups))
    moved = np.concatenate([np.flatnonzero(documents == d) for d in order])
    ids = np.concatenate([data.ids[data.starts[i] : data.starts[i + 1]] for i in moved])
    again = Examples(
        ids, data.supervised, data.starts, np.repeat(np.arange(len(groups), dtype=np.int32), np.array(groups)[order])
    )
    assert sorted(split(again, share, seed)[1].ids) == sorted(held.ids)  # whatever the order of the files


def test_split_keeps_equal_documents_together():
    data = examples([6] * 40)
    ids = (np.arange(240) % 6 + 6 * (np.arange(240) // 6 % 20)).astype(np.int32)  # 20 documents, each twice
    train, held = split(Examples(ids, data.supervised, data.starts, data.documents), 0.3, seed=3)
    assert not set(train.ids) & set(held.ids)
    assert len(held) == 12


def test_split_of_one_document():
    with pytest.raises(QmicaError) as caught:
        split(
            Examples(*[getattr(examples([6, 6]), n) for n in ("ids", "supervised", "starts")], np.zeros(2, int)), 0.1, 0
        )
    assert str(caught.value) == (
        "--val-split 0.1 keeps whole documents from training, but the data is one document: "
        "give more files or set --val-split 0"
    )


def test_fingerprint_sees_tokens_labels_and_borders():
    data = examples([6, 8, 10], share=0.5)
    other = data.ids.copy()
    other[3] += 1
    flipped = data.supervised.copy()
    flipped[3] ^= True
    variants = [
        data,
        Examples(other, data.supervised, data.starts, data.documents),
        Examples(data.ids, flipped, data.starts, data.documents),
        Examples(data.ids, data.supervised, np.array([0, 7, 14, 24]), data.documents),
    ]
    assert len({v.fingerprint() for v in variants}) == 4
    assert data.fingerprint() == examples([6, 8, 10], share=0.5).fingerprint()


# --- on a real model


@pytest.fixture(scope="module")
def packed():
    """A batch of three rows, packed and padded, of random tokens, with its documents."""
    data = examples([30, 41, 17, 50, 23, 8, 60, 12])
    ids = np.random.default_rng(7).integers(1, 400, len(data.ids)).astype(np.int32)
    data = Examples(ids, data.supervised, data.starts, data.documents)
    made = batches(data, seed=0, epoch=0, batch_size=9, max_seq_length=90)
    assert len(made) == 1
    assert len(made[0].input_ids) == 3
    return data, made[0]


def worst(model, batch: Batch, **options) -> float:
    """max |difference| of the logits of each packed document and of the same document alone."""
    whole = model(input_ids=batch.input_ids, position_ids=batch.position_ids, **options).logits
    packed = [whole[row, a:b] for row, a, b in pieces_of(batch)]
    lone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _, _ in rows_of(batch)]
    return float((torch.cat(packed) - torch.cat(lone)).detach().abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_document_has_the_logits_of_the_lone_one(packed, family, checkpointing):
    """In float64, logits of size ~10. Measured: 0.0. A cache, or a mask of ones, leaks: 5.9 and 7.9."""
    model = tiny.tiny_model(family).double().train()
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    _, batch = packed
    right = worst(model, batch, attention_mask=None, use_cache=False)
    assert right < 1e-11, f"packed and lone logits differ by {right:.1e}"
    ones = worst(model, batch, attention_mask=torch.ones_like(batch.input_ids), use_cache=False)
    assert ones > 0.1, f"a mask of ones was expected to leak, but the logits differ by {ones:.1e} only"
    if not checkpointing:  # with checkpointing transformers turns the cache off by itself
        cached = worst(model, batch, attention_mask=None, use_cache=True)
        assert cached > 0.1, f"a cache was expected to leak, but the logits differ by {cached:.1e} only"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_batch_has_the_loss_and_the_gradients_of_lone_documents(packed, checkpointing):
    """Whatever stands in a row beside a document, and however rows are padded. Measured, float64: 6e-16 of the norm."""
    data, batch = packed
    model = tiny.tiny_model("llama").double().train()
    model.get_output_embeddings().requires_grad_(False)  # as in every run: loss.py has no gradient for it
    if checkpointing:
        model.activation_checkpointing_enable()
    alone = list(batches(data, seed=0, epoch=0, batch_size=1, max_seq_length=90, packing=False))
    padded = list(batches(data, seed=0, epoch=0, batch_size=3, max_seq_length=90, packing=False))
    results = []
    for several in ([batch], alone, padded):
        model.zero_grad()
        losses = [summed_loss(model, one) for one in several]
        sum(losses).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((float(sum(losses).detach()), grads))
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        off = float((grads - results[0][1]).norm() / grads.norm())
        assert off < 1e-12, f"gradients differ by {off:.1e} of their norm"
