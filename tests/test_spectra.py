"""`qmica inspect`: every number against numpy's float64 SVD and bitsandbytes' own kernels, the pictures, the errors."""

import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_model, write_gguf

from qmica import cli, spectra
from qmica.config import InspectConfig
from qmica.subspace import random_subspace

RANK = 4
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# B is rounded to fp32 and the numbers to 6 digits: over 10 models the worst relative error was 1.4e-5
CLOSE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny llama in bf16: square, tall and wide linears."""
    return save_tiny(tmp_path_factory.mktemp("spectra") / "tiny", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def found(folder):
    return spectra.inspect(str(folder), InspectConfig(rank=RANK), True)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    """The same as bitsandbytes stores it: all of it in NF4 and in int8, and NF4 without the q_proj."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    kinds = {"nf4": four, "int8": {"load_in_8bit": True}, "mixed": {**four, "llm_int8_skip_modules": ["q_proj"]}}
    root = tmp_path_factory.mktemp("packed")
    for name, options in kinds.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
        )
        model.save_pretrained(root / name)
    return root


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".weight"): tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of a model whose tensors `change` has been called with."""
    shutil.copytree(folder, to)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


# ---- the oracle


def svd(weight: torch.Tensor, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """(singular values descending, minor subspace) in numpy."""
    left, values, _ = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return values, left[:, -rank:]


def nf4(weight: torch.Tensor) -> torch.Tensor:
    codes, state = bnb.functional.quantize_4bit(
        weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return oracle.dequantized(codes, state)


def int8(weight: torch.Tensor) -> torch.Tensor:
    codes, largest, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return codes.float() * largest.unsqueeze(1) / 127


def expected(weight: torch.Tensor, rank: int = RANK) -> dict:
    values, B = svd(weight, rank)
    W = weight.double().numpy()
    carried = np.linalg.norm(B.T @ W)
    rows = []
    for bits, rounded in {4: nf4, 8: int8}.items():
        _, Q = svd(rounded(weight), rank)
        overlap = np.linalg.norm(Q.T @ B) ** 2 / rank
        rows.append({"bits": bits, "overlap": overlap, "leak": np.linalg.norm(Q.T @ W) / carried})
    return {
        "out": W.shape[0],
        "in": W.shape[1],
        "largest": values[0],
        "median": np.median(values),
        "smallest": list(values[-rank:]),
        "minor_to_random": carried / math.sqrt(rank / W.shape[0] * np.sum(W**2)),
        "quantized": rows,
    }


def worst(row: dict, oracle: dict) -> float:
    """The largest relative error of a row's numbers."""
    pairs = [(row[key], oracle[key]) for key in ("out", "in", "largest", "median", "minor_to_random")]
    pairs += zip(row["smallest"], oracle["smallest"], strict=True)
    for moved, wanted in zip(row["quantized"], oracle["quantized"], strict=True):
        assert moved["bits"] == wanted["bits"]
        pairs += [(moved[key], wanted[key]) for key in ("overlap", "leak")]
    return max(abs(value / reference - 1) for value, reference in pairs)


# ---- numbers


def test_every_number_of_every_layer(folder, found):
    assert [row["kind"] for row in found["layers"]] == 2 * KINDS
    assert [row["depth"] for row in found["layers"]] == [0] * 7 + [1] * 7
    weights = weights_of(folder)
    errors = {row["name"]: worst(row, expected(weights[row["name"]])) for row in found["layers"]}
    lowest = min(moved["overlap"] for row in found["layers"] for moved in row["quantized"])
    print(f"largest relative error {max(errors.values()):.1e}, lowest overlap {lowest:.2f}")
    assert max(errors.values()) <= CLOSE, errors
    assert lowest < 0.9, "nothing moved: any overlap would be right"


def test_a_row_a_kind_holds_the_medians(tmp_path):
    """Three layers, so that a median is no mean."""
    folder = save_tiny(tmp_path / "m", "llama", dtype=torch.bfloat16, num_hidden_layers=3)
    found = spectra.inspect(str(folder), InspectConfig(rank=RANK, targets="qv"), True)
    assert [(row["kind"], row["layers"]) for row in found["kinds"]] == [("q_proj", 3), ("v_proj", 3)]
    for kind in found["kinds"]:
        rows = [row for row in found["layers"] if row["kind"] == kind["kind"]]
        for key in ("largest", "median", "minor_to_random", "smallest"):
            assert np.allclose(kind[key], np.median([row[key] for row in rows], axis=0), rtol=1e-9), key
        for at, key in ((0, "overlap"), (1, "leak")):
            middle = np.median([row["quantized"][at][key] for row in rows])
            assert kind["quantized"][at][key] == pytest.approx(middle, rel=1e-9)


def test_depth_is_in_order_of_the_model(tmp_path):
    """safetensors sorts layer 10 before layer 2."""
    folder = save_tiny(tmp_path / "deep", "llama", num_hidden_layers=11)
    found = spectra.inspect(str(folder), InspectConfig(rank=2, targets="k_proj", bits=(8,)), True)
    assert [row["depth"] for row in found["layers"]] == list(range(11))


def test_random_norm_is_what_random_subspaces_carry():
    """On a weight whose singular values span 1000, over 2000 draws: the mean of squares is met within 4 standard
    errors, which are 2 % of it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator) @ torch.diag(torch.logspace(-3, 0, 40))
    rank = 3
    draws = [random_subspace(weight, rank, generator).double() for _ in range(2000)]
    squares = np.array([(R.T @ weight.double()).square().sum().item() for R in draws])
    error = squares.std() / math.sqrt(len(squares))
    predicted = spectra.random_norm(weight, rank) ** 2
    print(f"drawn {squares.mean():.4f} +- {error:.4f}, predicted {predicted:.4f}")
    assert error < 0.02 * predicted
    assert abs(squares.mean() - predicted) <= 4 * error


def test_overlap_of_random_subspaces_is_chance():
    generator = torch.Generator().manual_seed(1)
    shape = torch.ones(32, 64)
    draws = [spectra.overlap(*(random_subspace(shape, 4, generator) for _ in range(2))) for _ in range(400)]
    assert np.mean(draws) == pytest.approx(4 / 32, abs=4 * np.std(draws) / 20)
    B = random_subspace(shape, 4, generator)
    turned = B @ random_subspace(torch.ones(4, 4), 4, generator)  # another basis of the same subspace
    assert spectra.overlap(B, turned) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("shape", [(30, 30), (50, 20), (20, 50), (1, 9)])
def test_all_singular_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert np.allclose(spectra.singular_values(weight).numpy(), values, rtol=1e-9)
    assert np.allclose(spectra.norms(torch.from_numpy(svd(weight, 1)[1]), weight), values[-1:], rtol=1e-9)


def test_the_smallest_values_do_not_come_from_the_gram_matrix():
    """W = H D, H a Hadamard matrix: σ = 2 d exactly, the smallest 2e-9 of the largest, where square roots of a Gram
    matrix in float64 are noise of 1e-8."""
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    weight = hadamard * torch.tensor([1, 0.5, 0.25, 2**-30])
    gram = spectra.singular_values(weight)[-1].item()
    assert abs(gram / 2**-29 - 1) > 0.5, f"the Gram matrix says {gram:.2e}, this weight proves nothing"
    numbers, spectrum = spectra.measure(weight.float(), 1, ())
    assert numbers.smallest == pytest.approx((2**-29,), rel=1e-6)
    assert spectrum.tolist() == pytest.approx([2, 1, 0.5, 2**-29], rel=1e-6)


@pytest.mark.parametrize("rank", [1, 64])
def test_the_least_and_the_largest_rank(folder, rank):
    found = spectra.inspect(str(folder), InspectConfig(rank=rank, targets="k_proj", bits=(4,)), True)
    row = found["layers"][0]
    oracle = expected(weights_of(folder)[row["name"]], rank)
    assert worst(row, {**oracle, "quantized": oracle["quantized"][:1]}) <= CLOSE
    if rank == 64:  # all of the output space: nothing can leave it
        assert (row["minor_to_random"], row["quantized"][0]) == (1, {"bits": 4, "overlap": 1, "leak": 1})


def test_a_weight_of_zeros_has_no_ratios(folder, tmp_path, capsys):
    name = "model.layers.0.self_attn.k_proj.weight"
    zero = changed(folder, tmp_path / "zero", lambda tensors: tensors[name].zero_())
    assert cli.main(["inspect", str(zero), "-r", "2", "--targets", "k_proj", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["layers"]
    assert (rows[0]["largest"], rows[0]["smallest"], rows[0]["minor_to_random"]) == (0, [0, 0], None)
    assert [moved["leak"] for moved in rows[0]["quantized"]] == [None, None]
    assert rows[1]["minor_to_random"] > 0
    assert cli.main(["inspect", str(zero), "-r", "2", "--targets", "k_proj", "--plot", str(tmp_path / "p")]) == 0
    assert re.search(r"k_proj +64 x 64 +0 +0 +0 +-  ", capsys.readouterr().out)


# ---- other sources


def test_a_gguf_holds_the_same(tmp_path):
    """F32, so that nothing is lost; q and k rows are permuted in the file, which changes no number."""
    folder = save_tiny(tmp_path / "m", "llama", seed=3)
    file = write_gguf(tmp_path / "m.gguf", tiny_model("llama", seed=3), "llama")
    plan = InspectConfig(rank=RANK)
    theirs, ours = (spectra.inspect(str(path), plan, True) for path in (folder, file))
    assert (theirs["stored"], ours["stored"]) == ("float32", "GGUF F32")
    assert [row["name"] for row in ours["layers"]] == [row["name"] for row in theirs["layers"]]
    differences = [worst(one, other) for one, other in zip(ours["layers"], theirs["layers"], strict=True)]
    assert max(differences) <= CLOSE


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_checkpoint_has_no_original(packed, tmp_path, capsys, kind):
    folder, weights = packed / kind, held_by(packed / kind)
    assert cli.main(["inspect", str(folder), "-r", str(RANK), "--json", "--plot", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["quantized"] for row in found["layers"]] == 14 * [[]]
    for row in found["layers"]:
        assert worst(row, {**expected(weights[row["name"]]), "quantized": []}) <= CLOSE
    assert found["note"].startswith("bitsandbytes has quantized these weights") and "\n" not in found["note"]
    assert found["stored"] == "packed by bitsandbytes"
    assert [path.name for path in tmp_path.iterdir()] == ["spectra.png"]
    assert found["pictures"] == [str(tmp_path / "spectra.png")]


def test_what_is_said_of_a_packed_checkpoint(packed, capsys):
    assert cli.main(["inspect", str(packed / "nf4"), "-r", str(RANK), "--targets", "qv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "overlap" in line or "leak" in line]
    assert len([line for line in lines if line.startswith("bitsandbytes has quantized these weights")]) == 1
    assert lines[-1].startswith("Next: qmica inspect of the 16-bit original shows")


def test_where_some_weights_are_packed_the_others_are_compared(folder, packed, tmp_path, capsys):
    assert cli.main(["inspect", str(packed / "mixed"), "-r", str(RANK), "--plot", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bitsandbytes has quantized 12 of these 14 weights" in out
    assert (tmp_path / "overlap.png").is_file()
    found = spectra.inspect(str(packed / "mixed"), InspectConfig(rank=RANK), True)
    assert {row["kind"]: len(row["quantized"]) for row in found["layers"]} == {**dict.fromkeys(KINDS, 0), "q_proj": 2}
    weights = weights_of(folder)
    rows = [row for row in found["layers"] if row["kind"] == "q_proj"]
    assert max(worst(row, expected(weights[row["name"]])) for row in rows) <= CLOSE
    assert re.search(r"k_proj +64 x 64 .* - +- +- +-\n", out)


def held_by(folder: Path) -> dict[str, torch.Tensor]:
    """What a packed checkpoint's linears hold, by transformers and bitsandbytes alone."""
    from transformers import AutoModelForCausalLM

    model, held = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}), {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.dtype = torch.float32  # bf16 would round what it holds
            held[name] = oracle.dequantized(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            held[name] = module.weight.data.float() * module.weight.SCB.unsqueeze(1) / 127
    return held


# ---- what is printed


def test_json_is_the_result_and_nothing_else(folder, found, capsys):
    assert cli.main(["inspect", str(folder), "--rank", str(RANK), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out, parse_constant=pytest.fail) == found
    assert err.splitlines()[-1] == "layer 14/14  model.layers.1.mlp.down_proj  0 s left"


def test_the_tables_show_the_numbers(folder, found, capsys):
    assert cli.main(["inspect", str(folder), "--rank", str(RANK)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == f"{folder}: 14 linears, bfloat16; rank 4"
    tables = [
        [re.split(r"  +", line.strip()) for line in lines if re.search(title, line)]
        for title in (r"^ +[01]  ", r"^ +2  ")
    ]
    for table, rows, first in zip(tables, (found["layers"], found["kinds"]), ("depth", "layers"), strict=True):
        assert table == [cells_of(row, first) for row in rows]
    assert max(map(len, lines[1:24])) <= 120


def cells_of(row: dict, first: str) -> list[str]:
    values = [row["largest"], row["median"], None, row["minor_to_random"]]
    values += [moved[key] for moved in row["quantized"] for key in ("overlap", "leak")]
    cells = [
        f"{value:.3g}" if value is not None else f"{row['smallest'][0]:.3g} … {row['smallest'][-1]:.3g}"
        for value in values
    ]
    return [str(row[first]), row["kind"], f"{row['out']} x {row['in']}", *cells]


@pytest.mark.parametrize(
    "low, bits, text",
    [
        (2.0, "8", "At 8 bits the minor subspaces of q_proj, v_proj move (overlap 0.9"),
        (0.0, "8", "At 8 bits the minor subspaces stay where they are (overlap above 0). Next: qmica train --model "),
        (2.0, "4", "At 4 bits the minor subspaces of q_proj, v_proj move (overlap 0."),
    ],
)
def test_the_last_line_says_what_to_do(folder, capsys, monkeypatch, low, bits, text):
    monkeypatch.setattr(spectra, "LOW", low)
    assert cli.main(["inspect", str(folder), "-r", "4", "--targets", "qv", "--bits", bits]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(text)
    assert (f"`qmica train --model {folder} --bits {bits} --subspace-from original`" in last) == (low > 0)


# ---- pictures


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height from the header (PNG specification, 5.2 and 11.2.2)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png[12:16] == b"IHDR"
    return struct.unpack(">II", png[16:24])


def test_pictures_are_written_whole_and_not_blank(folder, tmp_path, capsys):
    from matplotlib import image

    place = tmp_path / "a[red]" / "pictures"  # no markup of rich's
    place.mkdir(parents=True)
    (place / "spectra.png").write_text("old")
    (place / "mine.txt").write_text("kept")
    assert cli.main(["inspect", str(folder), "-r", "4", "--plot", str(place)]) == 0
    assert f"{place / 'spectra.png'}, {place / 'overlap.png'}" in capsys.readouterr().out.splitlines()
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "overlap.png", "spectra.png"]
    for name in ("spectra.png", "overlap.png"):
        png = (place / name).read_bytes()
        width, height = size_of(png)
        pixels = image.imread(io.BytesIO(png))
        colours = len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))
        assert pixels.shape[:2] == (height, width) and 500 < width < 4000 and 300 < height < 4000
        assert colours > 200 and pixels[..., :3].std() > 0.05, f"{name} is blank: {colours} colours"


@pytest.fixture(scope="module")
def layers(folder):
    """What the pictures are drawn from."""
    made = []
    for name, weight in weights_of(folder).items():
        if name.rsplit(".", 1)[-1] in KINDS:
            made.append(spectra.Layer(name, tuple(weight.shape), *spectra.measure(weight, RANK, (4, 8))))
    return sorted(made, key=lambda layer: (layer.depth, KINDS.index(layer.kind)))


def test_the_picture_of_the_spectra(folder, layers):
    figure = spectra.draw(layers, RANK)["spectra.png"]
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(panels) == [f"{layer.kind} ({layer.shape[0]} x {layer.shape[1]})" for layer in layers[:7]]
    weights = weights_of(folder)
    for axis, layer in zip(panels.values(), layers, strict=False):
        assert axis.get_yscale() == "log" and len(axis.lines) == 2
        oracle = [svd(weights[name])[0] for name in (layer.name, layer.name.replace("layers.0", "layers.1"))]
        for line, values in zip(axis.lines, oracle, strict=True):
            assert np.allclose(line.get_ydata(), values, rtol=1e-5)
        assert axis.lines[0].get_color() != axis.lines[1].get_color()
        (ground,) = axis.patches
        assert (ground.get_x(), ground.get_width()) == (min(layer.shape) - RANK + 0.5, RANK)
    assert "on red: the minor ones, the 4 smallest" in figure.get_suptitle()
    assert figure.get_supylabel() == "singular value σ" and figure.axes[-1].get_ylabel() == "depth (decoder layer)"


def test_the_picture_of_the_overlaps(layers):
    """Without one v_proj, whose place stays empty."""
    some = [layer for layer in layers if layer.name != "model.layers.1.self_attn.v_proj"]
    figure = spectra.draw(some, RANK)["overlap.png"]
    for axis, bits in zip(figure.axes, (4, 8), strict=False):
        assert axis.get_title().startswith(f"{bits} bits")
        (shown,) = axis.images
        assert shown.get_clim() == (0, 1) and shown.get_array().shape == (7, 2)
        for layer in some:
            value = next(moved.overlap for moved in layer.numbers.quantized if moved.bits == bits)
            assert shown.get_array()[KINDS.index(layer.kind), layer.depth] == value
        values = np.ma.filled(shown.get_array(), np.nan)
        assert math.isnan(values[2, 1])
        labels = [text.get_text().split() for text in axis.get_yticklabels()]
        assert labels == [[kind, f"{np.nanmedian(row):.2f}"] for kind, row in zip(KINDS, values, strict=True)]
    assert figure.axes[-1].get_ylabel().startswith("overlap")


# ---- what the user can fix


def error_of(capsys, *words: str) -> str:
    assert cli.main(["inspect", *words]) == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("qmica: ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_named(folder, tmp_path, capsys, value):
    name = "model.layers.1.mlp.up_proj"
    bad = changed(folder, tmp_path / "bad", lambda tensors: tensors[f"{name}.weight"][3, 5:6].fill_(value))
    assert error_of(capsys, str(bad), "-r", "4").startswith(f"{name}: the weight holds NaN or infinity: ")


def test_a_rank_that_does_not_fit(folder, capsys):
    said = error_of(capsys, str(folder), "--rank", "65")
    assert said == "model.layers.0.self_attn.q_proj: rank 65 does not fit a 128 x 64 weight: choose 1 to 64"


def test_unknown_targets(folder, capsys):
    said = error_of(capsys, str(folder), "--targets", "q_prj")
    assert said.startswith("targets: no linear of this model is called q_prj; there are down_proj, gate_proj, k_proj")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
        lambda w: w["model.layers.1.mlp.up_proj.weight"].resize_(96, 60),
    ],
)
def test_a_model_that_is_not_whole(folder, tmp_path, capsys, change):
    said = error_of(capsys, str(changed(folder, tmp_path / "part", change)), "-r", "4")
    assert said.startswith(f"{tmp_path / 'part'} is not a whole model: 1 of 14 linears are missing or of another shape")
    assert "(model.layers.1.mlp.up_proj); " in said


def test_matplotlib_is_missed_before_any_work(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    said = error_of(capsys, str(tmp_path / "no-such-model"), "--plot", str(tmp_path / "x"))
    assert said == '--plot needs matplotlib: pip install "qmica[report]", or leave --plot out'
    assert not (tmp_path / "x").exists()


def test_without_matplotlib_all_but_pictures_works(folder):
    code = (
        "import sys; sys.modules['matplotlib'] = None; import qmica; "
        f"qmica.inspect({str(folder)!r}, rank=2, targets='k_proj')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "medians over depth" in done.stdout, done.stderr


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "x").write_text("a file")
    said = error_of(capsys, str(tmp_path / "no-such-model"), "--plot", str(tmp_path / "x"))
    assert said == f"--plot {tmp_path / 'x'}: a part of the path is a file, not a folder: choose another path"


def test_numbers_are_printed_even_if_the_pictures_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "overlap.png").mkdir()
    assert cli.main(["inspect", str(folder), "-r", "2", "--targets", "k_proj", "--plot", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["layers"]) == 2
    assert err.splitlines()[-1].startswith(f"qmica: cannot write {tmp_path / 'overlap.png'}: it is a folder")


@pytest.mark.gpu
def test_a_gpu_finds_the_same(folder, found):
    plan = InspectConfig(rank=RANK, device="cuda")
    rows = spectra.inspect(str(folder), plan, True)["layers"]
    assert max(worst(one, other) for one, other in zip(rows, found["layers"], strict=True)) <= CLOSE
