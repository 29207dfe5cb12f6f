"""An adapter that was trained beside NF4 weights, made for the original ones: against numpy's SVD, and in llama.cpp
against transformers on the weights that training saw.
"""

from pathlib import Path

import numpy as np
import pytest
import small_runs
import torch
from adapted import divergence, largest_difference, llama_log_p, make_peft_adapter, make_run, transformers_log_p
from safetensors.torch import load_file, save_file
from test_exporting import ALLOWED, as_gguf, export, needs_llama, nf4_round_trip
from tiny import save_tiny

from qmica import compensation, merging, source, tokenizer
from qmica.adapter import Factors
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile


@pytest.mark.parametrize("out, columns, tokens", [(24, 40, 100), (40, 24, 100), (40, 40, 12)])
def test_the_stand_in_leaves_what_eckart_and_young_allow(out, columns, tokens):
    """No product of rank 5 comes nearer to what a difference does to the inputs than the rest of its SVD."""
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(out, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.logspace(1, -1, columns)
    A, B = compensation.stand_in(difference, inputs, 5)
    assert (A.shape, B.shape) == ((5, columns), (out, 5))
    left = (difference - B @ A) @ inputs.T
    sigma = np.linalg.svd((difference @ inputs.T).double().numpy(), compute_uv=False)
    assert left.norm().item() == pytest.approx(np.sqrt((sigma[5:] ** 2).sum()), rel=1e-5)


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """A base as F32 GGUF, a run on it in 4 bits with an adapter on q and v alone, and the log p that training saw."""
    folder = tmp_path_factory.mktemp("nf4")
    base = save_tiny(folder / "base", "llama")
    run = make_run(folder / "run", base, bits=4, targets="qv")
    seen = save_tiny(folder / "seen", "llama")
    save_file(nf4_round_trip(load_file(base / "model.safetensors")), seen / "model.safetensors", {"format": "pt"})
    return as_gguf(folder / "base.gguf", base, "llama"), run, transformers_log_p(seen, run)


@needs_llama
def test_with_every_column_the_original_is_what_training_saw(nf4, tmp_path, monkeypatch):
    """As many columns as a linear has outputs hold the difference whole, of linears without an adapter too."""
    file, run, seen = nf4
    plain = export(run, adapter=True, out=tmp_path / "plain.gguf")
    monkeypatch.setattr(compensation, "COLUMNS", 10_000)
    whole = export(run, adapter=True, base="quantized", out=tmp_path / "whole.gguf")
    found = [largest_difference(llama_log_p(file, [(adapter, 1.0)]), seen) for adapter in (plain, whole)]
    print(f"max|Δ log p| from what training saw: {found[0]:.1e}, with every column {found[1]:.1e}")
    assert found[0] > 100 * ALLOWED and found[1] <= ALLOWED


@needs_llama
def test_a_few_columns_bring_the_original_nearer(nf4, tmp_path, capsys):
    file, run, seen = nf4
    plain = export(run, adapter=True, out=tmp_path / "plain.gguf")
    assert "trained beside NF4 weights: --base quantized adds columns for what NF4 changed" in capsys.readouterr().out
    nearer = export(run, adapter=True, base="quantized", out=tmp_path / "nearer.gguf")
    said = capsys.readouterr().out
    assert "14 pairs of A and B, rank 16, 20, for" in said, said  # two layers of seven linears, four of them adapted
    assert "up to 16 columns of each stand for what NF4 changed in the weights" in said
    pairs = GGUFFile.open(nearer, adapter=True).tensors
    ranks = [pairs[f"blk.0.{name}.weight.lora_a"].shape[0] for name in ("attn_q", "ffn_up")]
    assert ranks == [4 + 16, 16]
    found = [divergence(seen, llama_log_p(file, [(adapter, 1.0)])) for adapter in (plain, nearer)]
    print(f"KL from what training saw: {found[0]:.2e}, with 16 columns {found[1]:.2e}")
    assert found[1] < 0.7 * found[0]


def test_a_pair_beside_a_linear_that_was_not_quantized_is_kept(nf4):
    """As PEFT's adapters have for the head, which stays in 16 bits."""
    _, run, _ = nf4
    opened = merging.open_run(str(run))
    own = opened.adapter.factors
    head = Factors(torch.ones(4, 64), torch.ones(400, 4), next(iter(own.values())).scale)
    found = compensation.compensated(opened.run, {**own, "lm_head": head}, opened.weights)
    assert found["lm_head"] is head and own.keys() < found.keys()
    assert {round(part.scale * len(part.A), 4) for part in found.values()} == {8.0}  # alpha, twice the rank of 4


def test_inputs_are_of_what_was_learnt_and_of_general_text(tmp_path, capsys):
    """Half of each; of general text alone, which is said, where the data is gone."""
    flags = small_runs.make(tmp_path)
    run = small_runs.train(flags, steps=1, out=tmp_path / "run")
    tokens = tokenizer.load(source.resolve(flags["model"]))
    row = compensation._sample(run, tokens)
    share = row.replays / row.supervised
    assert row.input_ids.shape[0] == 1 and 0.4 < share < 0.6, share
    said = tokens.decode(row.input_ids[0][~row.replayed[0]], skip_special_tokens=True)
    assert "general text alone" not in capsys.readouterr().out
    for file in flags["data"]:
        assert said.split()[1] in Path(file).read_text()
        Path(file).unlink()
    alone = compensation._sample(run, tokens)
    assert "is not at hand: general text alone says" in capsys.readouterr().out
    assert alone.tokens > 0 and not torch.equal(alone.input_ids, row.input_ids)


def test_what_training_saw_must_be_known(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    folder = make_peft_adapter(tmp_path / "peft", base, {"model.layers.0.self_attn.q_proj": (128, 64)})
    with pytest.raises(QmicaError, match=r"peft does not say in how many bits its base was held in training, leave"):
        export(folder, adapter=True, base="quantized", out=tmp_path / "out.gguf")


def test_the_weights_must_be_those_of_training(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, bits=4)
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(QmicaError, match=r"--base quantized: the weights of .*base changed since training"):
        export(run, adapter=True, base="quantized", out=tmp_path / "out.gguf")
    assert export(run, adapter=True, out=tmp_path / "plain.gguf").exists()


def test_where_nothing_was_quantized_there_is_nothing_to_add(tmp_path):
    run = make_run(tmp_path / "run", save_tiny(tmp_path / "base", "llama"), bits=16)
    written = [export(run, adapter=True, base=base, out=tmp_path / base) for base in ("original", "quantized")]
    assert written[0].read_bytes() == written[1].read_bytes()
