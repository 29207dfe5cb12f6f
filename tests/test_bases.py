"""B from the store or computed: the same, once, and with several processes a share each."""

import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from qmica import bases, quant, store, subspace
from qmica.errors import QmicaError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weights(count: int = 3, bits: int = 4, side: int = 40) -> dict[str, quant.Stored]:
    found = {}
    for number in range(count):
        weight = torch.randn(side, 64, generator=torch.Generator().manual_seed(number))
        found[f"layers.{number}.q_proj"] = quant.Stored.of(quant.quantize(weight, None, bits, CPU))
    return found


@pytest.fixture
def computed(monkeypatch):
    """The shapes and ranks that were really computed."""
    calls = []
    real = subspace.find_minor

    def find(weight, rank, device):
        calls.append(rank)
        return real(weight, rank, device)

    monkeypatch.setattr(subspace, "find_minor", find)
    return calls


def test_a_second_time_nothing_is_computed(computed):
    counted = []
    first = bases.find(weights(), 8, "minor", CPU, lambda *at: counted.append(at))
    assert computed == [8, 8, 8] and first.stored == 0 and counted == [(1, 3), (2, 3), (3, 3)]
    assert list(first.B) == list(weights())
    again = bases.find(weights(), 8, "minor", CPU, lambda *at: counted.append(at))
    assert computed == [8, 8, 8] and again.stored == 3 and counted[3:] == counted[:3]
    for name, weight in weights().items():
        assert torch.equal(first.B[name], again.B[name])
        assert torch.equal(first.B[name], subspace.minor_subspace(weight, 8))


def test_a_larger_rank_serves_a_smaller_one(computed):
    large = bases.find(weights(1), 16, "minor", CPU).B["layers.0.q_proj"]
    small = bases.find(weights(1), 4, "minor", CPU)
    assert computed == [16] and torch.equal(small.B["layers.0.q_proj"], large[:, -4:])
    exact = subspace.minor_subspace(weights(1)["layers.0.q_proj"], 4).double()
    B = small.B["layers.0.q_proj"].double()
    assert float((B @ B.T - exact @ exact.T).abs().max()) < 1e-6
    bases.find(weights(1), 20, "minor", CPU)
    assert computed == [16, 4, 20], "a smaller rank does not serve a larger one"


def test_major_components_are_the_first_columns():
    large = bases.find(weights(1), 16, "major", CPU).B["layers.0.q_proj"]
    small = bases.find(weights(1), 4, "major", CPU)
    assert small.stored == 1 and torch.equal(small.B["layers.0.q_proj"], large[:, :4])
    assert bases.find(weights(1), 4, "minor", CPU).stored == 0, "nor do the major ones serve as minor"


def test_other_content_is_another_entry(computed):
    bases.find(weights(1, 4), 8, "minor", CPU)
    for bits in (8, 16):
        assert bases.find(weights(1, bits), 8, "minor", CPU).stored == 0
    other = weights(1, 4)
    other["layers.0.q_proj"].linear.weight.data[7] ^= 1  # one code of one weight
    assert bases.find(other, 8, "minor", CPU).stored == 0
    renamed = {"elsewhere.v_proj": weights(1, 4)["layers.0.q_proj"]}
    assert bases.find(renamed, 8, "minor", CPU).stored == 1, "the same weight under another name is the same"


def test_a_damaged_entry_is_computed_again(computed, own_cache, caplog):
    first = bases.find(weights(2), 8, "minor", CPU)
    path = sorted(own_cache.rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again = bases.find(weights(2), 8, "minor", CPU)
    assert computed == [8, 8, 8] and again.stored == 1 and "is damaged" in caplog.text
    assert all(torch.equal(first.B[name], again.B[name]) for name in first.B)
    assert bases.find(weights(2), 8, "minor", CPU).stored == 2


def test_fallbacks_are_counted():
    """Dependent columns: what is proved in neither precision."""
    weight = torch.randn(400, 260) @ torch.diag((torch.arange(260) < 200).float())
    found = bases.find({"layers.0.up_proj": quant.Stored.of(quant.quantize(weight, None, 16, CPU))}, 8, "minor", CPU)
    assert found.fallbacks == 1 and found.stored == 0


@pytest.mark.parametrize("components", ["minor", "major"])
def test_the_layer_is_named(components):
    damaged = weights(2, 16)
    damaged["layers.1.q_proj"].linear.weight.data[3, 4] = float("nan")
    with pytest.raises(QmicaError, match=r"^layers\.1\.q_proj: the weight holds NaN or infinity"):
        bases.find(damaged, 8, components, CPU)


def test_threads_are_given_back(monkeypatch):
    """Small weights have a thread each; B does not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = bases.find(weights(4, side=300), 4, "minor", CPU)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("QMICA_CACHE", f"{store.durable.cache_folder()}-other")
        torch.set_num_threads(1)
        again = bases.find(weights(4, side=300), 4, "minor", CPU)
        assert again.stored == 0 and all(torch.equal(first.B[name], again.B[name]) for name in first.B)
    finally:
        torch.set_num_threads(before)


# ---- several processes


def in_process(rank: int, folder: Path, fail: bool) -> None:
    """One of two: what it computed and what it got go to files."""
    os.environ["QMICA_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls, real = [], subspace.find_minor

    def find(weight, wanted, device):
        calls.append(wanted)
        return real(weight, wanted, device)

    subspace.find_minor = find
    given = weights(5, 16)
    if fail:
        given["layers.1.q_proj"].linear.weight.data[0, 0] = float("nan")
    try:
        found = bases.find(given, 8, "minor", CPU)
        save_file({**found.B, "calls": torch.tensor(len(calls))}, folder / f"{rank}.safetensors")
    except QmicaError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.barrier()  # gloo drops what is still on its way to the other
    distributed.destroy_process_group()


def two_processes(folder: Path, fail: bool) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=in_process, args=(rank, folder, fail)) for rank in (0, 1)]
    for process in running:
        process.start()
    end = time.monotonic() + 120
    for process in running:
        process.join(max(end - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


def test_two_processes_share_the_work(tmp_path):
    two_processes(tmp_path, fail=False)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert (first["calls"], second["calls"]) == (3, 2)
    for name, weight in weights(5, 16).items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], subspace.minor_subspace(weight, 8))


def test_where_one_process_fails_both_do(tmp_path):
    two_processes(tmp_path, fail=True)
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)}
    assert said == {
        "layers.1.q_proj: the weight holds NaN or infinity: the model file is damaged, download or convert it again",
        "another process could not compute its share of the subspaces; its message says why",
    }
