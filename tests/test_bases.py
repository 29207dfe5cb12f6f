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


def stored(given: dict[str, quant.Stored], rank: int) -> int:
    """How many minor subspaces the store had."""
    return bases.find(given, rank, "minor", CPU)[1].stored


def test_a_second_time_nothing_is_computed(computed):
    counted = []
    first, tally = bases.find(weights(), 8, "minor", CPU, lambda *at: counted.append(at))
    assert computed == [8, 8, 8] and tally == bases.Tally(3, 0, 0) and counted == [(1, 3), (2, 3), (3, 3)]
    assert list(first) == list(weights())
    again, tally = bases.find(weights(), 8, "minor", CPU, lambda *at: counted.append(at))
    assert computed == [8, 8, 8] and tally == bases.Tally(3, 3, 0) and counted[3:] == counted[:3]
    for name, weight in weights().items():
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], subspace.minor_subspace(weight, 8))


def test_a_larger_rank_serves_a_smaller_one(computed):
    large = bases.find(weights(1), 16, "minor", CPU)[0]["layers.0.q_proj"]
    small = bases.find(weights(1), 4, "minor", CPU)[0]["layers.0.q_proj"]
    assert computed == [16] and torch.equal(small, large[:, -4:])
    exact = subspace.minor_subspace(weights(1)["layers.0.q_proj"], 4).double()
    B = small.double()
    assert float((B @ B.T - exact @ exact.T).abs().max()) < 1e-6
    bases.find(weights(1), 20, "minor", CPU)
    assert computed == [16, 4, 20], "a smaller rank does not serve a larger one"


def test_major_components_are_the_first_columns():
    large, _ = bases.find(weights(1), 16, "major", CPU)
    small, tally = bases.find(weights(1), 4, "major", CPU)
    assert tally.stored == 1 and torch.equal(small["layers.0.q_proj"], large["layers.0.q_proj"][:, :4])
    assert stored(weights(1), 4) == 0, "nor do the major ones serve as minor"


def test_other_content_is_another_entry(computed):
    bases.find(weights(1, 4), 8, "minor", CPU)
    for bits in (8, 16):
        assert stored(weights(1, bits), 8) == 0
    other = weights(1, 4)
    other["layers.0.q_proj"].linear.weight.data[7] ^= 1  # one code of one weight
    assert stored(other, 8) == 0
    renamed = {"elsewhere.v_proj": weights(1, 4)["layers.0.q_proj"]}
    assert stored(renamed, 8) == 1, "the same weight under another name is the same"


def test_a_damaged_entry_is_computed_again(computed, own_cache, caplog):
    first, _ = bases.find(weights(2), 8, "minor", CPU)
    path = sorted(own_cache.rglob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again, tally = bases.find(weights(2), 8, "minor", CPU)
    assert computed == [8, 8, 8] and tally.stored == 1 and "is damaged" in caplog.text
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert stored(weights(2), 8) == 2


def test_the_shape_is_part_of_the_content():
    """Zeros of 64 x 128 and 128 x 64 have the same codes."""
    for shape in ((64, 128), (128, 64)):
        zero = quant.Stored.of(quant.quantize(torch.zeros(shape), None, 4, CPU))
        found, tally = bases.find({"layers.0.up_proj": zero}, 4, "minor", CPU)
        assert found["layers.0.up_proj"].shape == (shape[0], 4) and tally.stored == 0


def test_fallbacks_are_counted_and_said(caplog):
    """Dependent columns: what is proved in neither precision."""
    weight = torch.randn(400, 260) @ torch.diag((torch.arange(260) < 200).float())
    given = {"layers.0.up_proj": quant.Stored.of(quant.quantize(weight, None, 16, CPU))}
    with caplog.at_level(logging.WARNING):
        assert bases.find(given, 8, "minor", CPU)[1] == bases.Tally(1, 0, 1)
    said = "layers.0.up_proj: its subspace was proved in no precision, so a float64 SVD was taken"
    assert caplog.messages == [said]


@pytest.mark.parametrize("components", ["minor", "major"])
def test_the_layer_is_named(components):
    damaged = weights(2, 16)
    damaged["layers.1.q_proj"].linear.weight.data[3, 4] = float("nan")
    with pytest.raises(QmicaError, match=r"^layers\.1\.q_proj: the weight holds NaN or infinity"):
        bases.find(damaged, 8, components, CPU)


def test_what_has_not_begun_is_not_waited_for(monkeypatch):
    """Ctrl-C in the first of many small weights."""
    calls = []

    def find(*_):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(subspace, "find_minor", find)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        bases.find(weights(40), 4, "minor", CPU)
    assert len(calls) < 40 and torch.get_num_threads() == before


def test_threads_are_given_back(monkeypatch):
    """Small weights have a thread each; B does not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, _ = bases.find(weights(4, side=300), 4, "minor", CPU)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("QMICA_CACHE", f"{store.durable.cache_folder()}-other")
        torch.set_num_threads(1)
        again, tally = bases.find(weights(4, side=300), 4, "minor", CPU)
        assert tally.stored == 0 and all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.set_num_threads(before)


# ---- several processes


def in_process(rank: int, folder: Path, fail: bool, late: float) -> None:
    """One of two: what it computed and what it got go to files. late: seconds that the second one's lookup takes more;
    by then the first may have written.
    """
    os.environ["QMICA_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    calls, real = [], subspace.find_minor

    def find(weight, wanted, device):
        calls.append(wanted)
        return real(weight, wanted, device)

    subspace.find_minor = find
    given = weights(5, 16)
    if rank == 1:
        looked_up = bases._stored
        bases._stored = lambda *rest: [time.sleep(late), looked_up(*rest)][1]
    if fail:
        given["layers.1.q_proj"].linear.weight.data[0, 0] = float("nan")
    try:
        found = bases.find(given, 8, "minor", CPU)
        save_file({**found[0], "calls": torch.tensor(len(calls))}, folder / f"{rank}.safetensors")
    except QmicaError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    distributed.barrier()  # gloo drops what is still on its way to the other
    distributed.destroy_process_group()


def two_processes(folder: Path, fail: bool = False, late: float = 0.0) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=in_process, args=(rank, folder, fail, late)) for rank in (0, 1)]
    for process in running:
        process.start()
    end = time.monotonic() + 120
    for process in running:
        process.join(max(end - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


@pytest.mark.parametrize("late", [0.0, 0.5])
def test_two_processes_share_the_work(tmp_path, late):
    two_processes(tmp_path, late=late)
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
