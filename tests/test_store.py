"""Entries of the keyed store: whole, found again, or computed again."""

import logging
import multiprocessing

import pytest
import torch
from safetensors import SafetensorError

from qmica import store


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"B": torch.full((5, 3), value), "half": torch.arange(4).to(torch.bfloat16), "scalar": torch.tensor(2.0)}


def test_what_is_written_is_read(own_cache):
    place = store.folder("things", "a", "b")
    assert own_cache in place.parents and store.read(place, "r4") is None and store.names(place) == []
    store.write(place, "r4", tensors())
    found = store.read(place, "r4")
    assert found.keys() == tensors().keys() and all(torch.equal(found[key], tensors()[key]) for key in found)
    assert store.names(place) == ["r4"]
    store.write(place, "r4", tensors(2.0))
    assert torch.equal(store.read(place, "r4")["B"], torch.full((5, 3), 2.0))


def test_a_folder_is_a_function_of_the_content():
    assert store.folder("things", "a", "b") == store.folder("things", "a", "b")
    others = [("things", "a", "c"), ("things", "ab"), ("things", "a", "b", ""), ("others", "a", "b")]
    assert len({store.folder("things", "a", "b"), *(store.folder(*parts) for parts in others)}) == 5


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_damage_is_said_and_removed(damage, caplog):
    place = store.folder("things", "a")
    store.write(place, "r4", tensors())
    path = place / "r4.safetensors"
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert store.read(place, "r4") is None
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"{path} is damaged (")
    assert caplog.messages[0].endswith("): it is computed again") and "\n" not in caplog.messages[0]
    assert not path.exists() and store.read(place, "r4") is None and len(caplog.messages) == 1


def test_a_store_that_cannot_be_written_is_no_failure(own_cache, caplog):
    own_cache.write_text("a file")
    with caplog.at_level(logging.WARNING):
        store.write(store.folder("things", "a"), "r4", tensors())
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("not kept for the next time: cannot write ")
    assert store.read(store.folder("things", "a"), "r4") is None


def test_entries_in_a_folder_that_may_not_be_written(own_cache, caplog, monkeypatch):
    """A damaged one that cannot be removed is said each time, and what cannot be kept is no failure."""
    place = store.folder("things", "a")
    store.write(place, "r4", tensors())
    cut(place / "r4.safetensors")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    assert store.read(place, "r4") is None and store.read(place, "r4") is None
    assert len(caplog.messages) == 2

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.undo()
    monkeypatch.setenv("QMICA_CACHE", str(own_cache))
    monkeypatch.setattr(store, "save_file", full)
    store.write(place, "r8", tensors())
    assert caplog.messages[2] == "not kept for the next time: I/O error: No space left on device"
    assert store.names(place) == ["r4"]


def test_the_order_of_names_does_not_count():
    place = store.folder("things", "a")
    store.write(place, "r4", {"b": torch.ones(2), "a": torch.zeros(3)})
    assert store.read(place, "r4")["a"].shape == (3,)


def write_often(number: int) -> None:
    for _ in range(20):
        store.write(store.folder("things", "shared"), "r4", tensors(float(number)))


def test_two_processes_write_one_entry(caplog):
    """Whoever reads meanwhile sees one of the two, whole: a mixture would be said to be damaged."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_often, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        found = store.read(store.folder("things", "shared"), "r4")
        if found is not None:
            values = found["B"].unique().tolist()
            assert len(values) == 1, "a mixture"
            seen.update(values)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert caplog.messages == [] and seen and seen <= {1.0, 2.0}
    assert store.names(store.folder("things", "shared")) == ["r4"]


def test_a_digest_is_of_shape_type_and_every_byte():
    one = torch.arange(6, dtype=torch.float32)
    others = [one.view(2, 3), one.to(torch.float64), one + torch.eye(6)[5], one[:5]]
    digests = {store.digest([one]), *(store.digest([other]) for other in others), store.digest([one, one])}
    assert len(digests) == 6 and store.digest([one]) == store.digest([one.clone()])
