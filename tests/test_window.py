"""The window over a mapped model's layers: what is resident stays at two layers' worth, and nothing is computed otherwise."""

from pathlib import Path

import hollow
import pytest
import torch
from test_mapping import resident
from tiny import save_tiny

from qmica import adapter, checkpointing, loss, model, window
from qmica.config import AdapterConfig
from qmica.errors import QmicaError
from qmica.packing import Batch
from qmica.source import resolve

# 12 layers of 8.4 MB in NF4: four times the 2 MB that a kernel may map at once
WIDE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "cache"))


def batch_of(network, count: int) -> Batch:
    ids = torch.randint(0, network.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(3))
    return Batch(ids, torch.arange(count)[None], ids.clone(), torch.zeros_like(ids, dtype=torch.bool), count, 0, count)


def adapted(path, bits: int, checkpointed: bool):
    network = model.load(resolve(path), bits, "fp32", "cpu")
    adapter.attach(network, AdapterConfig(rank=4, components="random"))
    for _, layer in adapter.layers(network):
        layer.A.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    loss.Head.of(network)  # which runs the network once
    checkpointing.set_modes(network, ["checkpoint" if checkpointed else "plain"] * network.config.num_hidden_layers)
    return network.train()


def gradients(network) -> list[torch.Tensor]:
    loss.summed_loss(network, batch_of(network, 48)).backward()
    found = [layer.A.grad.clone() for _, layer in adapter.layers(network)]
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_gradients_are_equal_bit_by_bit(tmp_path, bits, checkpointed):
    path = save_tiny(tmp_path / "llama", "llama", dtype=torch.bfloat16, num_hidden_layers=4)
    network = adapted(path, bits, checkpointed)
    plain = gradients(network)
    hooks = window.attach(network)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(gradients(network), plain, strict=True))
    assert all(grad.abs().max() > 0 for grad in plain)
    hooks.remove()
    assert all(torch.equal(one, other) for one, other in zip(gradients(network), plain, strict=True))
    assert hooks.at == (0,)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_way_of_the_window(tmp_path, monkeypatch, checkpointed):
    """Up with the forward pass, down with the backward pass; each layer is read once each way."""
    path = save_tiny(tmp_path / "llama", "llama", dtype=torch.bfloat16, num_hidden_layers=4)
    network = adapted(path, 4, checkpointed)
    hooks, seen = window.attach(network), []
    move = window.Window.move

    def watched(self, number, step):
        move(self, number, step)
        seen.append(self.at) if self.at not in seen[-1:] else None

    monkeypatch.setattr(window.Window, "move", watched)
    gradients(network)
    assert seen == [(0, 1), (1, 2), (2, 3), (3,), (3, 2), (2, 1), (1, 0), (0,)]
    seen.clear()
    network.eval()
    with torch.no_grad():
        network(input_ids=torch.arange(8)[None], use_cache=False)
    assert seen == [(0, 1), (1, 2), (2, 3), (3,)] and hooks.at == (3,)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
@pytest.mark.parametrize("checkpointed", [True, False])
def test_two_layers_are_resident(tmp_path, checkpointed):
    path = hollow.write_packed_folder(tmp_path / "wide", WIDE)
    network = adapted(path, 4, checkpointed)
    file, most = path / "model.safetensors", 0

    def look(*_):
        nonlocal most
        most = max(most, resident(file))

    for layer in network.model.layers:  # in the middle and at the end of a layer, on both ways
        layer.self_attn.o_proj.register_forward_hook(look)
        layer.mlp.down_proj.register_forward_hook(look)
        layer.register_forward_hook(lambda layer, given, out: out.register_hook(look) and None)
    batch = batch_of(network, 8)
    loss.summed_loss(network, batch).backward()
    whole, most = most, 0
    window.attach(network)
    for _ in range(2):
        loss.summed_loss(network, batch).backward()
    layer = sum(tensor.nbytes for tensor in window._tensors(network.model.layers[0]))
    said = f"{most / 1e6:.1f} MB with, {whole / 1e6:.1f} MB without a window; a layer is {layer / 1e6:.1f} MB"
    print(said)
    # embedding and head, 4 MB each, were just used where a pass begins; a range has two ends of up to 2 MB
    assert most < 2 * layer + 8e6 + 4e6 < whole, said
    assert most > layer, said


def test_held_weights_are_refused(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "llama", "llama", num_hidden_layers=2)
    (tmp_path / "file").touch()
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "file"))
    for bits in (4, 16):  # no cache; fp32 files, whose bf16 is nowhere
        network = model.load(resolve(path), bits, "fp32", "cpu")
        with pytest.raises(QmicaError, match=r"^--stream disk: the weights of .+ are held in memory, not mapped: use"):
            window.attach(network)
