"""Exchanged kernels against the model's own: the same gradients, nothing left behind, and kept only where they pay."""

import shutil

import pytest
import small_runs
import torch

from qmica import kernels, streaming

COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("small"), num_hidden_layers=3)


def trained_loop(flags, folder, **changes):
    """A loop whose adapter does something."""
    loop = small_runs.loop(flags, folder, **changes)
    generator = torch.Generator().manual_seed(5)
    for part in loop.trained.values():
        part.data.copy_(torch.randn(part.shape, generator=generator) * 0.02)
    loop.network.train()
    return loop


def gradients(loop) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of a window, and what each coefficient gets of it."""
    torch.manual_seed(3)
    loss = loop._backward(*loop._own(0))[0]
    found = {name: part.grad.clone() for name, part in loop.trained.items()}
    loop.optimizer.zero_grad(set_to_none=True)
    return loss, found


def apart(one, other) -> float:
    """The largest relative distance of two sets of gradients, by tensor; of the losses too."""
    losses = abs(one[0] - other[0]) / abs(other[0])
    return max(losses, *(float((one[1][name] - g).norm() / g.norm()) for name, g in other[1].items()))


def same(one, other) -> bool:
    return one[0] == other[0] and all(torch.equal(one[1][name], g) for name, g in other[1].items())


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        pytest.param("inductor", {"bits": 4, "grad_checkpoint": True}, marks=COMPILER),
        ("aot_eager", {"bits": 8, "grad_checkpoint": False, "method": "lora"}),
    ],
)
def test_compiled_layers_compute_the_same(flags, tmp_path, backend, changes):
    loop = trained_loop(flags, tmp_path, **changes)
    expected, validation = gradients(loop), loop.validation_loss()
    exchange = kernels.compiling(loop.network, backend)
    exchange.put()
    found = gradients(loop)
    distance = apart(found, expected)
    print(f"{distance:.1e} apart")  # measured: 4.9e-7
    assert not same(found, expected), "nothing was compiled"
    assert distance < 5e-6, f"{distance:.1e}"
    assert loop.validation_loss() == validation, "an evaluation is not compiled"
    exchange.take()
    assert same(gradients(loop), expected)
    assert not any("forward" in vars(module) for module in loop.network.modules())


def test_compiled_layers_stream(flags, tmp_path):
    """The weights stay outside what is compiled, so a slot may hold another layer by the time of the backward."""
    found = []
    for mover in (None, streaming.InMemory()):
        loop = trained_loop(flags, tmp_path, grad_checkpoint=False)
        if mover is not None:
            streaming.stream_layers(loop.network.base_model.layers, mover)
        kernels.compiling(loop.network, "aot_eager").put()
        found.append(gradients(loop))
    assert same(*found)


def test_one_compilation_serves_all_layers_and_lengths(flags, tmp_path):
    from torch._dynamo.utils import counters

    def row(length):
        positions = torch.arange(length)[None]
        loop.network.base_model(input_ids=positions + 7, position_ids=positions, use_cache=False)
        return counters["stats"]["unique_graphs"]

    torch._dynamo.reset()
    loop = trained_loop(flags, tmp_path)
    kernels.compiling(loop.network, "aot_eager").put()
    counters.clear()
    first = row(61)
    assert 0 < first < 16, first  # 8 pieces between a layer's linears, and three layers
    assert [row(length) for length in (40, 50, 63)] == [first] * 3


class Scripted(kernels.Exchange):
    """An exchange of nothing that remembers whether it is in."""

    def __init__(self):
        super().__init__("--compile", [])
        self.on = False

    def put(self):
        self.on = True

    def take(self):
        self.on = False


@pytest.mark.parametrize(
    ("with_it", "kept", "verdict"),
    [
        (0.0005, 0.0005, "2,000 tokens/s, 1,000 without"),
        (0.00099, None, "1,010 tokens/s, 1,000 without"),
        (0.002, None, "500 tokens/s, 1,000 without"),
    ],
)
def test_kept_only_where_it_pays(with_it, kept, verdict):
    said, runs, exchange = [], [], Scripted()

    def seconds():
        runs.append(exchange.on)
        return with_it if exchange.on else 0.001

    assert kernels.kept_if_faster(exchange, seconds, said.append) == kept
    assert exchange.on == (kept is not None)
    assert runs == [True, False, True, False, True]
    (line,) = said
    assert verdict in line and line.endswith("kept" if kept else "left out")


def test_what_does_not_work_is_said_and_leaves_nothing(flags, tmp_path):
    """A backend that fails, as inductor does without a C++ compiler."""

    def broken(graph, inputs):
        raise RuntimeError("no compiler here\nand a second line")

    loop, said = trained_loop(flags, tmp_path), []
    expected, tokens = gradients(loop), loop.tokens
    assert kernels.kept_if_faster(kernels.compiling(loop.network, broken), loop.rehearse, said.append) is None
    (line,) = said
    assert line.startswith("--compile does not work here and is left out: ") and "no compiler here" in line
    assert loop.tokens == tokens and all(part.grad is None for part in loop.trained.values())
    loop.network.train()
    assert same(gradients(loop), expected)


def test_replacements_go_in_once_and_come_out(monkeypatch):
    import types

    module, part = types.ModuleType("somewhere"), torch.nn.Linear(2, 2)
    module.rotate = original = lambda x: x
    new = [lambda x: x + 1, lambda x: x + 2]
    exchange = kernels.Exchange(
        "both", [kernels.Replacement(module, "rotate", new[0]), kernels.Replacement(part, "forward", new[1])]
    )
    for _ in range(2):
        exchange.put()
        exchange.put()
        assert module.rotate is new[0] and part.forward is new[1]
        exchange.take()
        exchange.take()
        assert module.rotate is original and "forward" not in vars(part)


def test_a_run_says_what_was_measured(flags, tmp_path, monkeypatch, capsys):
    """`--compile` from the flag to the line, with a backend that needs no compiler."""
    made = kernels.compiling
    monkeypatch.setattr(kernels, "compiling", lambda network: made(network, "aot_eager"))
    small_runs.train(flags, out=tmp_path / "run", compile=True, steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--compile: ")]
    assert len(lines) == 1 and "tokens/s" in lines[0] and lines[0].endswith(("kept", "left out"))
