"""Views of a file: equal to what it holds, private, and taken out of the process on demand."""

from pathlib import Path

import pytest
import torch

from qmica.mapping import Map, merged


@pytest.fixture
def path(tmp_path):
    data = torch.arange(1 << 20, dtype=torch.int32)
    (tmp_path / "data").write_bytes(data.numpy().tobytes())
    return tmp_path / "data"


def test_a_tensor_is_a_view_of_the_file(path):
    mapped = Map(path)
    found = mapped.tensor(torch.int32, (10, 100), 4 * 5000)
    assert torch.equal(found, torch.arange(5000, 6000, dtype=torch.int32).view(10, 100))
    assert mapped.place(found) == (20000, 24000) and mapped.place(found[2:4]) == (20800, 21600)
    assert mapped.place(found.clone()) is None


def test_what_is_changed_in_place_does_not_reach_the_file(path):
    before = path.read_bytes()
    mapped = Map(path)
    mapped.tensor(torch.int32, (100,), 0).zero_()
    assert path.read_bytes() == before and Map(path).tensor(torch.int32, (), 4).item() == 1


def test_tensors_that_cannot_be_views(path):
    mapped = Map(path)
    assert mapped.tensor(torch.int32, (4,), 2) is None  # not aligned
    assert mapped.tensor(torch.int32, (0, 4), 0) is None
    assert mapped.tensor(torch.uint8, (4,), 3).tolist() == [0, 1, 0, 0]


def test_a_view_outlives_its_map(path):
    found = Map(path).tensor(torch.int32, (1 << 20,), 0)
    path.unlink()
    assert found.sum().item() == (1 << 19) * ((1 << 20) - 1)


def test_an_empty_file_and_none_at_all(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError):
        Map(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        Map(tmp_path / "missing")


def resident(path) -> int:
    """Bytes of a mapped file that are in this process."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_pages_are_dropped_and_read_again(tmp_path):
    """To the 2 MB that a kernel may map at once."""
    mega, path = 1 << 20, tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (16 * mega // 256))
    mapped = Map(path)
    whole = mapped.tensor(torch.uint8, (16 * mega,), 0)
    assert resident(path) == 0
    total = whole.sum().item()
    assert resident(path) == mapped.size
    mapped.drop(4 * mega, 12 * mega)
    assert resident(path) == pytest.approx(8 * mega, abs=4 * mega)
    mapped.will_need(4 * mega, 12 * mega)
    assert whole.sum().item() == total and resident(path) == mapped.size
    mapped.drop(5, mapped.size + 10_000)  # whole pages, and no further than the file
    assert resident(path) == 0 and whole[-1].item() == 255


def test_merged_ranges():
    assert merged([(50, 60), (0, 10), (10, 20), (58, 59)], gap=0) == [(0, 20), (50, 60)]
    assert merged([(0, 10), (15, 20), (26, 30)], gap=5) == [(0, 20), (26, 30)]
    assert merged([]) == []
