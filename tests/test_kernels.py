"""Exchanged kernels against the model's own: the same gradients, nothing left behind, and kept only where they pay."""

import importlib
import shutil
import sys
import types

import pytest
import small_runs
import torch
from tiny import tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, Gemma2Config

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


# ---- Liger


GEMMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 448,
}


def network_of(family, dtype=torch.float32, device="cpu"):
    """A loud model of transformers' own, its norms' weights random."""
    torch.manual_seed(2)
    if family == "gemma2":
        config = Gemma2Config(num_key_value_heads=2, head_dim=32, attn_implementation="eager", **GEMMA)
        network = AutoModelForCausalLM.from_config(config)
        for name, part in network.named_parameters():
            part.data.add_(torch.randn_like(part) * (0.3 if "norm" in name else 0.05))
    else:
        network = tiny_model(family)
    return network.to(device, dtype).requires_grad_(False)


def states_and_gradient(network, dtype=torch.float32, device="cpu"):
    """Last hidden states of 2 x 33 tokens, and the gradient of what goes in."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 33, network.config.hidden_size, generator=generator).to(device, dtype).requires_grad_()
    hidden = network.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
    hidden.backward(torch.randn(hidden.shape, generator=generator).to(device, dtype))
    return hidden.detach(), x.grad


def relative(found, expected) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True))


class NormStandIn:
    """What Liger's documentation says of `LigerRMSNormFunction.apply`, by torch."""

    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode == ("gemma" if offset else "llama") and not in_place
        return X * torch.rsqrt(X.square().mean(-1, keepdim=True) + eps) * (W + offset)


class RopeStandIn:
    @staticmethod
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        def turned(x):  # (rows, heads, tokens, head_dim), by complex numbers
            half = x.shape[-1] // 2
            angle = torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(1)
            whole = torch.complex(x[..., :half], x[..., half:]) * angle
            return torch.cat([whole.real, whole.imag], dim=-1)

        return turned(q), turned(k)


class SwiGLUStandIn:
    @staticmethod
    def apply(a, b, gate_multiplier=1.0, down_multiplier=1.0):
        return functional.silu(a) * b


@pytest.fixture
def stand_ins(monkeypatch):
    """A `liger_kernel` that runs on a CPU, to see that each kernel gets what it asks for, and that it was asked."""
    asked = []
    parts = {"rms_norm": ("LigerRMSNormFunction", NormStandIn), "rope": ("LigerRopeFunction", RopeStandIn)}
    parts["swiglu"] = ("LigerSiLUMulFunction", SwiGLUStandIn)
    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for name, (function, kind) in parts.items():
        module = types.ModuleType(f"liger_kernel.ops.{name}")

        def apply(*arguments, name=name, kind=kind):
            asked.append(name)
            return kind.apply(*arguments)

        setattr(module, function, types.SimpleNamespace(apply=apply))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


COUNTS = {"RMSNorm": {"llama": 5, "qwen2": 5, "gemma2": 9}, "RoPE": 2, "SwiGLU": 2}  # of models of two layers


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_each_kernel_is_asked_for_what_the_family_computes(family, stand_ins):
    network = network_of(family)
    expected = states_and_gradient(network)
    exchanges = kernels._liger_exchanges(network, kernels.FAMILIES[family], torch.device("cpu"))
    assert [exchange.name for exchange in exchanges] == [
        f"Liger's {name}" for name in ("RMSNorm", "RoPE", "SwiGLU")[: 2 if family == "gemma2" else 3]
    ]
    for exchange in exchanges:
        stand_ins.clear()
        exchange.put()
        found = states_and_gradient(network)
        exchange.take()
        count = COUNTS[exchange.name.removeprefix("Liger's ")]
        assert len(stand_ins) == (count[family] if isinstance(count, dict) else count)
        assert relative(found, expected) < 1e-5, (exchange.name, relative(found, expected))
    stand_ins.clear()
    assert relative(states_and_gradient(network), expected) == 0 and not stand_ins


@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_the_table_names_classes_that_exist(family):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    row = kernels.FAMILIES[family]
    assert hasattr(modeling, row.norm) and hasattr(modeling, "apply_rotary_pos_emb")
    assert row.gated is None or hasattr(modeling, row.gated)


def test_a_cpu_keeps_its_own(stand_ins, monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: True)
    assert kernels.liger(network_of("llama")) == []


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", kernels.FAMILIES)
def test_liger_is_exact_on_a_gpu(family, dtype, allowed):
    """Each kernel against the model's own, in the hidden states and the gradient of the input."""
    pytest.importorskip("liger_kernel")
    network = network_of(family, dtype, "cuda")
    expected = states_and_gradient(network, dtype, "cuda")
    exchanges = kernels.liger(network)
    assert len(exchanges) == (2 if family == "gemma2" else 3)
    for exchange in exchanges:
        exchange.put()
        distance = relative(states_and_gradient(network, dtype, "cuda"), expected)
        exchange.take()
        print(f"{exchange.name}, {family}, {dtype}: {distance:.1e}")
        assert distance < allowed, f"{exchange.name}: {distance:.1e}"


@pytest.mark.gpu
def test_liger_trains_a_quantized_model_on_a_gpu(flags, tmp_path):
    """Beside frozen linears and activation checkpointing, every coefficient's gradient."""
    pytest.importorskip("liger_kernel")
    from test_streaming import on_gpu

    loop = on_gpu(flags, tmp_path, "none")
    loop.network.train()
    expected = gradients(loop)
    for exchange in kernels.liger(loop.network):
        exchange.put()
        distance = apart(gradients(loop), expected)
        exchange.take()
        assert distance < 1e-4, f"{exchange.name}: {distance:.1e}"


@pytest.mark.gpu
def test_compiled_on_a_gpu(flags, tmp_path):
    from test_streaming import on_gpu

    loop = on_gpu(flags, tmp_path, "host")
    loop.network.train()
    expected = gradients(loop)
    kernels.compiling(loop.network).put()
    distance = apart(gradients(loop), expected)
    assert distance < 1e-4, f"{distance:.1e}"
