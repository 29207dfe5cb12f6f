"""The loop against a hand-written one, and a run's promises: exact resume, clean interruption, no silent nonsense."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import pytest
import small_runs
import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from qmica import (
    adapter,
    budget,
    checkpointing,
    cli,
    loss,
    memory,
    model,
    packing,
    progress,
    quant,
    runs,
    source,
    training,
)
from qmica.errors import QmicaError
from qmica.linear import MicaLinear

BITS = (4, 8, 16)
PLAIN = {"dropout": 0.0, "val_split": 0.0}  # what a hand-written loop has not


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", params=BITS)
def straight(request, flags, tmp_path_factory):
    """A run of 6 steps with dropout, packing, replay, accumulation, a validation every 2 steps and a checkpoint after 3."""
    out = tmp_path_factory.mktemp(f"straight{request.param}") / "run"
    return small_runs.train(small_runs.with_replay(flags), out=out, bits=request.param, eval_every=2, save_every=3)


@pytest.fixture(scope="module")
def run4(flags, tmp_path_factory):
    """A finished run at 4 bits with checkpoints after steps 2 and 4, and what it printed."""
    out = tmp_path_factory.mktemp("run4") / "run"
    return small_runs.train(flags, out=out, eval_every=2, save_every=2)


def copied(run, folder) -> runs.Run:
    """A run as an interruption would have left it: checkpoints and metrics, no result."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(folder / "adapter")
    return runs.Run(folder)


def weights(loop) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in loop.trained.items()}


def gradients(loop) -> dict[str, torch.Tensor]:
    """The gradients of the loop's next window."""
    torch.manual_seed(99)
    loop._backward(*loop._own(loop.step))
    found = {name: part.grad.clone() for name, part in loop.trained.items()}
    loop.optimizer.zero_grad(set_to_none=True)
    return found


def distance(found: dict, wanted: dict) -> float:
    """The largest relative distance of two sets of tensors, by tensor."""
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def equal(found: dict, wanted: dict) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- one update


@pytest.mark.parametrize(("bits", "packed"), [(4, True), (8, True), (16, True), (16, False)])
def test_one_batch_of_eight_is_eight_of_one(flags, tmp_path, bits, packed):
    """Gradients of a window, and the weights after an epoch whose last window is shorter.

    Measured over the four cases: gradients 4e-7 relative, weights 3e-5 (AdamW divides small gradients by their own
    size). The mean of the batches' means, the usual mistake, is 0.05 away and more.
    """
    both = {"dropout": 0.0, "bits": bits, "packing": packed, "steps": None, "epochs": 1.0, "val_split": 0.0}
    whole = small_runs.loop(flags, tmp_path, **both, batch_size=8, grad_accum=1)
    parts = small_runs.loop(flags, tmp_path, **both, batch_size=1, grad_accum=8)
    assert parts.batches % 8, f"{parts.batches} rows: the last window must be a partial one"
    assert whole.total == parts.total > 1
    wanted = gradients(whole)
    apart = distance(gradients(parts), wanted)
    assert apart < 4e-6, f"the gradients are {apart:.1e} apart"

    means = {name: torch.zeros_like(part) for name, part in parts.trained.items()}
    for batch in parts._own(0)[0]:
        parts._backward([batch], 8 * batch.supervised)
    for name, part in parts.trained.items():
        means[name] = part.grad.clone()
    parts.optimizer.zero_grad(set_to_none=True)
    assert distance(means, wanted) > 1e-2, "the documents are too equal to tell the right normalisation from the wrong"

    for loop in (whole, parts):
        losses = [loop.update()["loss"] for _ in range(loop.total)]
        print(losses)
    apart = distance(weights(parts), weights(whole))
    assert apart < 3e-4, f"the weights are {apart:.1e} apart after {whole.total} steps"


def merged_logits(plain, network, trained, batch):
    """Logits of transformers' own model, each adapted weight replaced by W + scale · B A. trained: A by module path."""
    changed = {
        f"{path}.weight": plain.get_parameter(f"{path}.weight") + layer.scale * layer.B.float() @ trained[path]
        for path, layer in adapter.layers(network)
    }
    arguments = {"position_ids": batch.position_ids, "attention_mask": None, "use_cache": False}
    return torch.func.functional_call(plain, changed, (batch.input_ids,), arguments).logits


def test_steps_are_those_of_a_hand_written_loop(flags, tmp_path):
    """Four updates against transformers' model, full logits, merged weights and torch's AdamW.

    Rates, clipping and decay are written out. Measured: losses 2e-7, gradient norms 6e-7, A 5e-6 relative.
    """
    options = {**PLAIN, "bits": 16, "steps": 4, "warmup": 0.5, "clip": 0.5, "weight_decay": 0.1, "lr": 2e-3}
    loop = small_runs.loop(flags, tmp_path, **options)
    network = loop.network
    plain = AutoModelForCausalLM.from_pretrained(flags["model"], dtype=torch.float32).requires_grad_(False)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.weight.data = module.weight.data.bfloat16().float()  # as qmica holds them
    trained = {path: torch.zeros_like(layer.A).requires_grad_() for path, layer in adapter.layers(network)}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step, share in enumerate((0.5, 1.0, 1.0, 0.5)):  # up in two steps, then cos(0) and cos(pi / 2) by half
        window = [loop.stream[2 * step], loop.stream[2 * step + 1]]
        total, count = 0.0, 0
        for batch in window:
            logits = merged_logits(plain, network, trained, batch)[:, :-1]
            labels = batch.labels[:, 1:].flatten()
            total = total + functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
            count += int((batch.labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        assert norm > 0.6, f"a gradient of norm {norm:.2f} is not clipped to 0.5"
        optimizer.param_groups[0]["lr"] = share * 2e-3
        optimizer.step()
        row = loop.update()
        assert row["lr"] == pytest.approx(share * 2e-3, rel=1e-12)
        apart = abs(row["loss"] - (total / count).item())
        assert apart < 1e-5, f"step {step + 1}: the losses are {apart:.1e} apart"
        apart = abs(row["grad_norm"] - norm.item()) / norm.item()
        assert apart < 1e-5, f"step {step + 1}: the gradient norms are {apart:.1e} apart"
    found = {path: layer.A.detach() for path, layer in adapter.layers(network)}
    apart = distance(found, {path: part.detach() for path, part in trained.items()})
    assert apart < 1e-4, f"A is {apart:.1e} apart after 4 steps"


@pytest.mark.parametrize(
    ("schedule", "shares"), [("cosine", (1, 0.75, 0.25)), ("linear", (1, 2 / 3, 1 / 3)), ("constant", (1, 1, 1))]
)
def test_schedules(flags, tmp_path, schedule, shares):
    loop = small_runs.loop(flags, tmp_path, schedule=schedule, steps=5, warmup=0.4, lr=1.0)
    assert [loop.lr(step) for step in range(5)] == pytest.approx([0.5, 1, *shares], abs=1e-12)


def test_order_is_a_function_of_seed_and_epoch(flags, tmp_path):
    """Batches far into the third epoch are the same whether all before them were asked for or none."""
    loop = small_runs.loop(flags, tmp_path)

    def order(seed, positions):
        parts = small_runs.job(flags, seed=seed)
        stream = training.Stream(loop.prepared, parts.data, parts.training)
        return [stream[position].input_ids.tolist() for position in positions]

    count = len(loop.stream.first_epoch)
    walked = order(0, range(3 * count))
    assert order(0, [3 * count - 1, 1, 2 * count]) == [walked[3 * count - 1], walked[1], walked[2 * count]]
    assert walked[:count] != walked[count : 2 * count]
    assert walked[:count] != order(1, range(count))


# ---- a run


def test_metrics_and_config(run4):
    """One line a step with the same keys, validation where it is due, the end; config.json names what was used."""
    *steps, end = run4.read_metrics()
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    common = {"step", "tokens", "loss", "lr", "grad_norm", *small_runs.TIMING}
    assert [set(row) - common for row in steps] == [set(), {"val_loss"}] * 3
    assert all(math.isfinite(value) and value > 0 for row in steps for value in row.values())
    assert steps[-1]["val_loss"] < steps[1]["val_loss"]
    assert set(end["end"]) == {"prompt", "before", "after", "peak_bytes"}
    config = run4.config()
    assert config["optimizer"] == "adamw" and config["train"]["optimizer"] == "auto"
    assert set(config) == {"train", "optimizer", "base", "data", "versions"}
    assert config["base"]["bits"] == 4 and len(config["data"]["fingerprint"]) == 32


def test_config_is_a_config_file_that_repeats_the_run(run4, tmp_path, capsys):
    """config.json, given to the command line with -c, trains the same adapter byte for byte; another seed does not."""
    status = cli.main(["train", "-c", str(run4.folder / "config.json"), "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out
    assert status == 0, said
    again = runs.Run(tmp_path / "again")
    assert small_runs.result(again) == small_runs.result(run4)
    assert small_runs.rows(again) == small_runs.rows(run4)
    assert "val " in said and f"qmica export {again.folder} --quant Q4_K_M" in said
    assert f"before: {run4.read_metrics()[-1]['end']['before']}" in said
    assert f"after: {run4.read_metrics()[-1]['end']['after']}" in said


def test_another_seed_is_another_run(flags, run4, tmp_path):
    other = small_runs.train(flags, out=tmp_path / "other", seed=1, eval_every=2, save_every=2)
    assert small_runs.result(other) != small_runs.result(run4)


def test_the_answer_before_is_the_bases_and_after_the_adapters(flags, run4):
    end = run4.read_metrics()[-1]["end"]
    network, tokens = adapter.open_run(run4)
    ids = tokens(flags["probe"], return_tensors="pt")["input_ids"]
    for name, tuned in (("before", False), ("after", True)):
        with adapter.switched(network, tuned):
            out = network.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
            )
        words = " ".join(tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split())
        assert end[name] == words, name
    assert end["prompt"] == flags["probe"] and end["before"] != end["after"]


@pytest.mark.parametrize("options", [{"method": "lora"}, {"components": "major"}, {"components": "random"}, {}])
def test_every_kind_of_adapter_learns(flags, tmp_path, options):
    """Thirty steps on six documents take the loss from 8.3 to below 5 (measured: 2.4 to 4.4)."""
    learning = {"lr": 2e-2, "steps": 30, "batch_size": 4, "grad_accum": 1, "rank": 8, "warmup": 0.0, **PLAIN}
    loop = small_runs.loop(flags, tmp_path, **learning, **options)
    bases = {path: layer.B.detach().clone() for path, layer in adapter.layers(loop.network)}
    losses = [loop.update()["loss"] for _ in range(30)]
    assert losses[-1] < 0.75 * losses[0], f"loss {losses[0]:.2f} -> {losses[-1]:.2f}"
    moved = [not torch.equal(layer.B, bases[path]) for path, layer in adapter.layers(loop.network)]
    assert all(moved) if options.get("method") == "lora" else not any(moved)


# ---- nothing between two steps leaves a trace


def test_validating_changes_nothing(straight, flags, tmp_path):
    """A run with a validation every other step ends with the bytes of one that validates at its end only."""
    bits = straight.config()["train"]["bits"]
    same = small_runs.with_replay(flags)
    quiet = small_runs.train(same, out=tmp_path / "quiet", bits=bits, eval_every=0, save_every=0)
    assert small_runs.result(quiet) == small_runs.result(straight)
    seen = [row["val_loss"] for row in small_runs.rows(straight) if "val_loss" in row]
    assert len(seen) == 3 and seen[-1] == small_runs.rows(quiet)[-2]["val_loss"]


@pytest.mark.parametrize("bits", BITS)
def test_an_evaluation_or_an_answer_between_steps_changes_nothing(flags, tmp_path, bits):
    """The next loss, gradients and weights are those of a loop that was left alone."""
    alone, disturbed = (small_runs.loop(flags, tmp_path, bits=bits) for _ in range(2))
    assert alone.update() == disturbed.update()
    disturbed.validation_loss()
    disturbed.network.eval()
    ids = torch.tensor([[5, 9, 17, 40]])
    disturbed.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=True)
    with torch.no_grad():
        disturbed.network(input_ids=ids)
    disturbed.network.train()
    alone.network.train()
    assert equal(gradients(disturbed), gradients(alone))
    assert disturbed.update() == alone.update()
    assert equal(weights(disturbed), weights(alone))


def test_rehearsing_changes_nothing(flags, tmp_path, monkeypatch):
    """Weights, gradients, counters and the next steps are those of a loop that did not rehearse; and it rehearses what
    training does: in training mode, where activations are checkpointed."""
    alone, rehearsed = (small_runs.loop(flags, tmp_path) for _ in range(2))
    alone.update()
    rehearsed.update()
    before, tokens, modes = weights(rehearsed), rehearsed.tokens, []
    real = loss.summed_loss

    def watched(network, batch):
        modes.append(network.training)
        return real(network, batch)

    monkeypatch.setattr(loss, "summed_loss", watched)
    assert 0 < rehearsed.rehearse() < 10
    monkeypatch.undo()
    assert modes == [True, True, False], "twice the longest batch, and one of the validation"
    assert equal(weights(rehearsed), before)
    assert all(part.grad is None for part in rehearsed.trained.values())
    assert rehearsed.tokens == tokens
    alone.network.train()
    rehearsed.network.train()
    assert rehearsed.update() == alone.update()
    assert equal(weights(rehearsed), weights(alone))


def test_a_step_as_long_as_any_needs_no_rehearsal(flags, tmp_path, monkeypatch):
    """Nor is one held for it: what the first step takes is known when it is done."""
    monkeypatch.setattr(packing, "WIDTH", 1)  # padding would make three lengths of many
    loop = small_runs.loop(flags, tmp_path, packing=False, batch_size=1, grad_accum=1, epochs=1, steps=None)
    lengths = [batch.input_ids.numel() for batch in loop.stream.first_epoch]
    assert len(set(lengths)) > 3
    for loop.step, length in enumerate(lengths):
        assert loop.opens_with_the_longest() == (length >= 0.95 * max(lengths)), (length, max(lengths))


def test_the_first_step_that_is_a_rehearsal_is_said(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training.Loop, "rehearse", lambda loop: pytest.fail("rehearsed"))
    monkeypatch.setattr(training.Loop, "opens_with_the_longest", lambda loop: True)
    small_runs.train(flags, out=tmp_path / "run", steps=1)
    assert "1 steps of 2 batches, optimizer adamw: the first one will tell how long\n" in capsys.readouterr().out


# ---- memory that runs out


def small_device(loop, rows, modes=("plain", "products", "checkpoint")):
    """A device that has room for so many rows at once, with layers in these modes: else its allocator fails."""

    def allocate(module, given, named):
        mode = checkpointing.decoder_layers(loop.network)[0].qmica_mode
        if len(named["input_ids"]) > rows or mode not in modes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loop.network.base_model.register_forward_pre_hook(allocate, with_kwargs=True)


def test_a_batch_that_does_not_fit_is_computed_in_parts(flags, tmp_path, capsys):
    """From 4 rows to one, in the middle of a run: the same step, the same gradients to rounding, one line each time."""
    flags = {**flags, "dropout": 0.0, "batch_size": 4}
    alone, limited = (small_runs.loop(flags, tmp_path) for _ in range(2))
    alone.update()
    limited.update()
    small_device(limited, rows=1)
    one, other = alone.update(), limited.update()
    assert limited.parts == 4 and other["step"] == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "memory ran out" in line]
    assert said == [
        f"memory ran out at step 2: from here on a batch is computed in {n} parts, with the same result" for n in (2, 4)
    ]
    assert one["tokens"] == other["tokens"] and one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    error = max(
        ((mine - theirs).norm() / theirs.norm()).item()
        for mine, theirs in zip(weights(limited).values(), weights(alone).values(), strict=True)
    )
    assert error < 1e-4, f"{error:.1e}"  # measured: 3e-6; AdamW's square root magnifies rounding
    assert limited.validation_loss() == pytest.approx(alone.validation_loss(), rel=1e-5)


def test_then_every_layer_is_computed_again(flags, tmp_path, capsys):
    flags = {**flags, **PLAIN, "batch_size": 1, "grad_checkpoint": False}
    alone, limited = (small_runs.loop(flags, tmp_path) for _ in range(2))
    small_device(limited, rows=1, modes=("checkpoint",))
    assert alone.update() == limited.update() and equal(weights(alone), weights(limited))
    assert "the backward computes every layer again" in capsys.readouterr().out


def test_what_does_not_fit_at_all_is_said_before_the_first_step(flags, tmp_path):
    loop = small_runs.loop(flags, tmp_path)
    small_device(loop, rows=0)
    with pytest.raises(QmicaError, match=r"one row of 64 tokens does not fit .*: a smaller --max-seq-length"):
        loop.rehearse()


def test_a_validation_batch_is_rehearsed(flags, tmp_path, capsys):
    """In parts where it is what does not fit."""
    loop = small_runs.loop({**flags, "val_split": 0.5}, tmp_path)

    def allocate(module, given, named):
        if len(named["input_ids"]) > 1 and not module.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    loop.network.base_model.register_forward_pre_hook(allocate, with_kwargs=True)
    loop.rehearse()
    assert loop.parts == 2 and "step 1" in capsys.readouterr().out


STARVED = """
import resource, sys
import small_runs, torch
from qmica import memory
flags = eval(sys.argv[1])
loop = small_runs.loop(flags, sys.argv[2])
loop.network.train()
torch.set_num_threads(1)
small_runs.starve(60e6)
print("stepped", loop.update()["step"], "in", loop.parts)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_torchs_own_failure_to_allocate_is_survived(tmp_path):
    """A process whose kernel refuses it more memory: 64 rows at once do not fit, parts of them do."""
    flags = small_runs.make(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    flags |= {**PLAIN, "batch_size": 64, "packing": False, "grad_accum": 1, "val_split": 0.0, "max_seq_length": 256}
    command = [sys.executable, "-c", STARVED, repr(flags), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = int(done.stdout.split()[-1])
    assert "memory ran out at step 1" in done.stdout and parts > 1, done.stdout


# ---- ways to take less memory


def test_stream_disk_changes_nothing_but_the_pages(flags, tmp_path, capsys):
    """The whole job, as typed: the adapter is equal bit by bit, and what was done is said."""
    plain = small_runs.train(flags, out=tmp_path / "plain", steps=2)
    capsys.readouterr()
    streamed = small_runs.train(flags, out=tmp_path / "streamed", steps=2, stream="disk")
    assert "decoder layers on the disk, two layers at a time in memory" in capsys.readouterr().out
    assert small_runs.result(streamed) == small_runs.result(plain)


def test_a_resumed_run_is_computed_in_the_parts_it_began_with(flags, tmp_path, monkeypatch):
    """Whatever is free now: sums of other parts differ in their last bits."""
    flags = {**flags, "batch_size": 4, "save_every": 2, "steps": 4}
    straight = small_runs.train(flags, out=tmp_path / "run")
    again = copied(straight, tmp_path / "again")
    checkpoint = again.last_checkpoint()
    (small,) = {json.loads((checkpoint.folder / "state.json").read_text())["parts"]}
    seen = []
    choose = budget.choose
    monkeypatch.setattr(budget, "choose", lambda *given: seen.append(given[-1]) or choose(*given))
    small_runs.train(flags, resume=again.folder)
    assert seen == [small] == [1] and small_runs.result(again) == small_runs.result(straight)


# ---- replay


def forgotten(loop) -> float:
    """KL(base ‖ tuned) a token on the replay text, after six updates (nats)."""
    for _ in range(6):
        loop.update()
    batch = next(batch for batch in loop.stream.first_epoch if batch.replayed.any())
    batch.labels[~batch.replayed] = loss.IGNORED
    with adapter.switched(loop.network, False):
        states = loss.replayed_states(loop.network, batch)
    with torch.no_grad():
        return loss.held_losses(loop.network.eval(), batch, states)[1].item() / len(states)


def test_what_is_logged_of_replay(flags, tmp_path):
    """The loss is a learnt token's, whatever the share of replay; the divergence a replayed token's, 0 at the start."""
    held = small_runs.with_replay({**flags, **PLAIN, "batch_size": 64, "grad_accum": 1})
    loop = small_runs.loop(held, tmp_path)
    batch = loop.stream[0]
    assert 0 < batch.replays < batch.supervised
    batch.labels[batch.replayed] = loss.IGNORED
    with torch.no_grad():
        wanted = loss.summed_loss(loop.network, batch).item() / (batch.supervised - batch.replays)
    first, second = loop.update(), loop.update()
    assert first["loss"] == pytest.approx(wanted, rel=1e-5) and abs(first["replay_kl"]) < 1e-6 < second["replay_kl"]
    text = small_runs.loop({**held, "replay_target": "text"}, tmp_path).update()
    assert "replay_kl" not in text and text["loss"] != pytest.approx(wanted, rel=1e-3)


def test_a_step_of_replay_alone_has_no_loss(flags, tmp_path):
    alone = {**PLAIN, "packing": False, "batch_size": 1, "grad_accum": 1, "replay_ratio": 0.9}
    loop = small_runs.loop(small_runs.with_replay(flags) | alone, tmp_path)
    rows = [loop.update() for _ in range(6)]
    assert any("loss" in row and "replay_kl" not in row for row in rows)
    row = next(row for row in rows if "loss" not in row) | {"tokens_per_s": 9.0, "peak_bytes": 10**9}
    assert progress.numbers(row) == f"replay {row['replay_kl']:.3f}  9 tokens/s  1.0 GB"


def test_replay_is_rehearsed(flags, tmp_path, monkeypatch):
    """The base's pass over replay is part of the time and the memory that are tried before the first step."""
    loop = small_runs.loop(small_runs.with_replay(flags), tmp_path)
    rows = []
    real = loss.replayed_states
    monkeypatch.setattr(
        loss, "replayed_states", lambda network, batch: rows.append(len(batch.labels)) or real(network, batch)
    )
    loop.rehearse()
    assert len(rows) == 2


def test_replay_held_to_the_base_forgets_least(flags, tmp_path):
    """Against replay learnt as text, and against none; and weight counts."""
    held = small_runs.with_replay({**flags, **PLAIN, "lr": 2e-2})
    kinds = {"base": {}, "base, weight 4": {"replay_weight": 4.0}, "text": {"replay_target": "text"}}
    found = {kind: forgotten(small_runs.loop(held, tmp_path, **options)) for kind, options in kinds.items()}
    print(found)
    assert found["base, weight 4"] < 0.8 * found["base"] and found["base"] < 0.8 * found["text"], found


# ---- resuming


def test_resuming_is_exact(straight, tmp_path):
    """From the checkpoint after step 3 of 6: the same adapter byte for byte, the same metrics."""
    resumed = small_runs.train({}, resume=copied(straight, tmp_path / "run").folder)
    assert small_runs.result(resumed) == small_runs.result(straight)
    assert small_runs.rows(resumed) == small_runs.rows(straight)


def test_B_is_frozen_and_unchanged_after_resuming(run4, flags, tmp_path):
    saved = run4.last_checkpoint().tensors("adapter")
    loop = small_runs.loop(flags, tmp_path)
    fresh = model.load(source.resolve(flags["model"]), 4, "fp32", "cpu")
    loop.network = adapter.restore(fresh, saved, loop.job.adapter)
    trained = {name for name, part in loop.network.named_parameters() if part.requires_grad}
    assert trained == {f"{path}.A" for path, _ in adapter.layers(loop.network)}
    final = load_file(run4.adapter / "adapter_model.safetensors")
    for path, layer in adapter.layers(loop.network):
        name = f"base_model.model.{path}.lora_B.weight"
        assert not layer.B.requires_grad and layer.B.dtype == torch.bfloat16
        assert torch.equal(layer.B, saved[name]) and torch.equal(final[name], saved[name])
        assert not torch.equal(final[name.replace("lora_B", "lora_A")], saved[name.replace("lora_B", "lora_A")])


def test_a_damaged_checkpoint_is_passed_over(run4, tmp_path, capsys):
    """The one before is used, and the line that says where the run goes on names it."""
    run = copied(run4, tmp_path / "run")
    damaged = run.folder / "checkpoints" / "step-000004" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    resumed = small_runs.train({}, resume=run.folder)
    assert f"going on after step 2, from {run.folder / 'checkpoints' / 'step-000002'}" in capsys.readouterr().out
    assert small_runs.result(resumed) == small_runs.result(run4)


def test_resuming_without_a_checkpoint(run4, tmp_path):
    run = copied(run4, tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(QmicaError, match=r"cannot be resumed: it has no checkpoints \(see --save-every\)"):
        small_runs.train({}, resume=run.folder)


def test_resuming_with_another_optimizer_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(quant.OPTIMIZERS, "adamw_8bit", quant.OPTIMIZERS["adamw"])  # a machine that has it
    run = small_runs.train(flags, out=tmp_path / "run", optimizer="adamw_8bit", steps=2, save_every=1)
    assert run.config()["optimizer"] == "adamw_8bit"
    monkeypatch.undo()
    with pytest.raises(QmicaError, match=r"was written with adamw_8bit, this machine runs adamw: resume it where"):
        small_runs.train({}, resume=run.folder)


def test_resuming_with_other_data_or_another_model_is_refused(run4, flags, tmp_path):
    """A changed file would silently be another run."""
    for part, what in (("data", "the data"), ("base", "the model")):
        run = copied(run4, tmp_path / part)
        config = run.config()
        config[part]["fingerprint"] = "0" * 32
        run.write_config(config)
        with pytest.raises(QmicaError, match=rf"cannot be resumed: {what} changed since it began \(fingerprint 0000"):
            small_runs.train({}, resume=run.folder)


# ---- interruption


def sent(child, metrics: Path, number: int) -> tuple[str, str]:
    """What the child said and how it ended after a signal at its second step."""
    until = time.time() + 120
    while child.poll() is None and time.time() < until:
        with contextlib.suppress(FileNotFoundError):
            if metrics.read_text().count("\n") >= 2:
                child.send_signal(number)
                break
        time.sleep(0.01)
    return child.communicate(timeout=120)


def test_ctrl_c_leaves_a_checkpoint_from_which_another_process_goes_on(flags, tmp_path):
    """A real SIGINT to `python -m qmica train`: status 130, the way on is said, and it leads to the same bytes."""
    small = {"batch_size": 1, "grad_accum": 1, "targets": "qv", "steps": 24, "eval_every": 1}
    parts = small_runs.job(flags, **small, out=tmp_path / "run").flags()
    (tmp_path / "flags.json").write_text(json.dumps(parts))
    child = subprocess.Popen(
        [sys.executable, "-m", "qmica", "train", "-c", str(tmp_path / "flags.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    said, complained = sent(child, tmp_path / "run" / "metrics.jsonl", signal.SIGINT)
    assert child.returncode == 130, (child.returncode, said, complained)
    run = runs.Run(tmp_path / "run")
    step = run.last_checkpoint().step
    assert 2 <= step < 24 and not run.adapter.exists()
    assert "stopping after this step; once more to stop at once and lose what is not saved" in said
    assert complained.strip().splitlines()[-1] == (
        f"qmica: interrupted: stopped at step {step}: go on with `qmica train --resume {run.folder}`"
    )
    assert [row["step"] for row in run.read_metrics()] == list(range(1, step + 1))
    resumed = small_runs.train({}, resume=run.folder)
    straight = small_runs.train(flags, **small, out=tmp_path / "straight")
    assert small_runs.rows(resumed) == small_runs.rows(straight)
    # B was computed in the child, where LAPACK may turn a vector's sign (seen: that of three columns, with the rows of
    # A beside them): the bits of scale · B A are the same all the same
    found, wanted = (adapter.read_adapter(run.adapter).factors for run in (resumed, straight))
    assert equal({path: part.delta() for path, part in found.items()}, {p: part.delta() for p, part in wanted.items()})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_ends_at_once(flags, tmp_path, monkeypatch, number):
    """The first lets the step go on, the second ends it; afterwards the signals are the program's own again."""
    seen = []
    real = loss.summed_loss

    def interrupted(network, batch):
        if network.training:
            seen.append("a batch")
            os.kill(os.getpid(), number)
            seen.append("after the signal")
        return real(network, batch)

    loop = small_runs.loop(flags, tmp_path)
    before = signal.getsignal(number)
    monkeypatch.setattr(loss, "summed_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert seen == ["a batch", "after the signal", "a batch"]
    assert loop.step == 0 and not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(number) is before


# ---- what must not go on


def test_a_loss_that_is_no_number_stops_before_the_update(flags, tmp_path):
    loop = small_runs.loop(flags, tmp_path, steps=4)
    loop.update()
    layer = next(module for module in loop.network.modules() if isinstance(module, MicaLinear))
    with torch.no_grad():
        layer.A[0, 0] = math.nan
    before, state = weights(loop), loop.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    with pytest.raises(QmicaError, match=r"the loss is nan at step 2, which was not applied; --lr was 0\.005: `qmica"):
        loop.update()
    assert all(torch.equal(part.nan_to_num(7), before[name].nan_to_num(7)) for name, part in weights(loop).items())
    assert torch.equal(loop.optimizer.state_dict()["state"][0]["exp_avg"], state)
    assert loop.step == 1


def test_a_gradient_that_is_no_number_stops_before_the_update(flags, tmp_path, monkeypatch):
    """The loss may be a number where its gradient is not: here the root of zero, whose slope is infinite."""
    loop = small_runs.loop(flags, tmp_path)
    first = next(iter(loop.trained.values()))
    real = loss.summed_loss
    monkeypatch.setattr(loss, "summed_loss", lambda network, batch: real(network, batch) + first.abs().sum().sqrt())
    with pytest.raises(QmicaError, match=r"the gradient is nan at step 1.*the model's own: use --dtype fp32"):
        loop.update()
    assert all(not part.any() for part in loop.trained.values())


def test_resuming_with_other_replay_is_refused(flags, tmp_path):
    general = tmp_path / "general.txt"
    general.write_text(small_runs.GENERAL)
    run = small_runs.train(
        {**small_runs.with_replay(flags), "replay": (str(general),)}, out=tmp_path / "run", save_every=3
    )
    general.write_text(small_runs.GENERAL + "Another end.")
    with pytest.raises(QmicaError, match="cannot be resumed: the replay text changed since it began"):
        small_runs.train({}, resume=copied(run, tmp_path / "again").folder)


def test_an_absurd_learning_rate_is_named(flags, tmp_path):
    text = r"at step \d, which was not applied; --lr was 1e\+30: `qmica train -c .* --lr"
    with pytest.raises(QmicaError, match=text):
        small_runs.train(flags, out=tmp_path / "run", lr=1e30, clip=0.0, warmup=0.0)
    assert runs.Run(tmp_path / "run").read_metrics()[-1]["step"] >= 1
    assert not (tmp_path / "run" / "adapter").exists()


def test_fallback_of_the_optimizer_is_said_and_recorded(flags, tmp_path, capsys):
    run = small_runs.train(flags, out=tmp_path / "run", optimizer="paged_adamw_8bit", steps=1, batch_size=1)
    said = capsys.readouterr().out
    assert "optimizer paged_adamw_8bit does not work here (managed memory needs CUDA): using the next one" in said
    assert "optimizer adamw_8bit does not work here (bitsandbytes' 8-bit optimizers need CUDA)" in said
    assert "1 steps of 2 batches, optimizer adamw:" in said
    assert run.config()["optimizer"] == "adamw" and run.config()["train"]["optimizer"] == "paged_adamw_8bit"


@pytest.mark.parametrize(
    ("options", "text"), [({"rank": 65}, "rank 65 does not fit"), ({"targets": "qq"}, "called qq")]
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_loaded(flags, tmp_path, monkeypatch, options, text):
    monkeypatch.setattr(model, "load", lambda *given: pytest.fail("the model was loaded first"))
    with pytest.raises(QmicaError, match=text):
        small_runs.train(flags, out=tmp_path / "run", **options)


def test_fit_is_checked_before_anything_is_made(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(QmicaError, match=r"for its weights alone, 1 kB may be taken on cpu: choose a smaller --model"):
        small_runs.train(flags, out=tmp_path / "run", bits=16)  # in 4 and 8 bits they are mapped from the disk
    assert not (tmp_path / "run").exists()
    assert "memory: needs about" in capsys.readouterr().out


def test_fp16_on_a_cpu_is_refused(flags, tmp_path):
    with pytest.raises(QmicaError, match="--dtype fp16 needs a GPU"):
        small_runs.train(flags, out=tmp_path / "run", dtype="fp16")


# ---- trackers


class Tracker(GeneralTracker):
    """Accelerate's interface for trackers, remembering what it is told."""

    name = "tensorboard"
    requires_logging_directory = True
    made: list["Tracker"] = []  # noqa: RUF012

    def __init__(self, run_name, logging_dir, **options):
        super().__init__()
        self.folder, self.rows, self.config, self.finished = Path(logging_dir), [], None, False
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_row_of_the_metrics(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: name)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    run = small_runs.train(flags, out=tmp_path / "run", report_to="tensorboard", steps=2)
    (tracker,) = Tracker.made
    assert tracker.rows == run.read_metrics()[:-1]
    assert tracker.folder == run.folder and tracker.config["lr"] == flags["lr"] and tracker.finished


def test_a_tracker_that_is_not_installed(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(QmicaError, match=r"--report-to wandb needs its package: pip install 'qmica\[wandb\]'"):
        small_runs.train(flags, out=tmp_path / "run", report_to="wandb")
