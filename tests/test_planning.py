"""`qmica plan`: its bytes against those of the files and tensors that the other verbs really make, its requests against
the log of a hub on loopback, its FLOPs against torch's own counter.
"""

import json
import re
import time
from dataclasses import replace

import hollow
import pytest
import small_runs
import torch
from loopback_hub import LoopbackHub
from safetensors import safe_open
from tiny import WIDE, save_tiny, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import qmica
from qmica import adapter, checkpointing, durable, llamacpp, loss, memory, merging, model, pace, planning, quant, source
from qmica.config import AdapterConfig, DataConfig, ExportConfig, ModelConfig, TrainingConfig
from qmica.errors import QmicaError

SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
LARGE = {"model_type": "llama", "vocab_size": 2000, "num_hidden_layers": 2, "max_position_embeddings": 4096, **SMALL}
QUICK = {"max_seq_length": 64, "device": "cpu", "dtype": "fp32"}


@pytest.fixture(autouse=True)
def calibrated(monkeypatch):
    """Two seconds a plan are too many for its tests."""
    monkeypatch.setattr(pace, "SECONDS", 0.01)
    monkeypatch.setattr(pace.calibrate, "__defaults__", (0.01, time.perf_counter))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with LoopbackHub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return small_runs.make(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def run(flags):
    return small_runs.train(flags, out=tmp_path_of(flags) / "run", steps=1)


def tmp_path_of(flags):
    from pathlib import Path

    return Path(flags["model"]).parent


# ---- disk, against what is written


def test_the_adapter_is_as_large_as_planned(flags, run):
    planned = qmica.plan(**flags)["disk"]["adapter"]
    with safe_open(run.adapter / "adapter_model.safetensors", "pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert planned == held


def test_the_merged_folder_is_as_large_as_planned(flags, run, tmp_path):
    planned = qmica.plan(**flags)["disk"]["merged"]
    folder = merging.merge(str(run.folder), tmp_path / "merged")
    with safe_open(folder / "model.safetensors", "pt") as file:
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert planned == held


@pytest.mark.parametrize("kind", planning.EXPORTS)
def test_an_export_is_as_large_as_planned(tmp_path, kind):
    """Width 512: K-quants apply. What is left beside the tensors is a tiny tokenizer's metadata."""
    from qmica import exporting

    if kind == "Q4_K_M" and not llamacpp.available():
        pytest.skip("K-quants need xllamacpp")
    made = small_runs.make(tmp_path, **WIDE)
    done = small_runs.train(made, out=tmp_path / "run", steps=1)
    planned = qmica.plan(**made)["disk"][f"export {kind}"]
    written = exporting.export(str(done.folder), ExportConfig(quant=kind)).stat().st_size
    print(f"{kind}: planned {planned:,}, written {written:,}")
    assert abs(written - planned) < 40_000


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_weights_are_as_large_as_the_tensors_that_are_held(flags, bits):
    planned = qmica.plan(**{**flags, "bits": bits})
    held = model.load(source.resolve(flags["model"]), bits, "fp32", "cpu")
    linears = [module for module in held.modules() if quant.is_linear(module)]
    inside = {id(module.weight) for module in linears}
    tensors = {id(part): part for part in held.parameters() if id(part) not in inside}
    packed = sum(
        sum(part.nbytes for part in module.stored()) for module in linears if module.weight.dtype != torch.bfloat16
    )
    half = {id(module.weight): module.weight for module in linears if module.weight.dtype == torch.bfloat16}
    expected = packed + sum(part.nbytes for part in {**tensors, **half}.values())
    weights = planned["memory"]["parts"]["weights"] + planned["memory"]["mapped"]
    print(f"{bits} bits: planned {weights:,}, held {expected:,}")
    # NF4's code tables, 16 and 256 numbers of each linear, are shared by all of them in a plan
    assert weights == pytest.approx(expected, abs=len(linears) * 1100 if bits == 4 else 0)
    assert planned["disk"]["quantized cache"] == (0 if bits == 16 else weights), "16 bits need none"


# ---- memory


def test_the_longest_rows_are_the_longest_that_fit(flags):
    """Where each row is computed alone and every layer again."""
    case = bare_case(flags)
    alone = replace(case, rows=memory.Rows(1, 64), modes=("checkpoint",) * case.config.num_hidden_layers)
    count = case.config.max_position_embeddings
    nbytes = int(memory.plan(alone.over(count // 2)).total)
    held = qmica.plan(**flags, memory=f"{nbytes}B")["memory"]
    assert held["budget"] == nbytes and held["budget_is"] == "--memory" and held["context"] == count
    fitting = [length for length in range(1, count + 1) if memory.plan(alone.over(length)).total <= nbytes]
    assert 0 < held["longest"] < count and fitting == list(range(1, held["longest"] + 1))


def bare_case(flags) -> memory.Case:
    job = small_runs.job(flags)
    headers, empty = planning._opened(job.model, torch.float32)
    return memory.Case.of(job, headers, empty, memory.Rows(2, 64), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("most", [0, 1, 100, 199, 200])
def test_longest_is_found_by_halving(most):
    asked = []
    assert memory.longest(lambda length: asked.append(length) or length <= most, 200) == most
    assert len(asked) <= 8


def test_weights_that_are_mapped_are_not_counted(flags):
    """In 4 bits all matrices come from the cache; in 16 they are mapped where the file has them in bf16: not here."""
    four, half = (qmica.plan(**{**flags, "bits": bits}) for bits in (4, 16))
    vectors = 4 * 64 * 5  # two norms a layer and the last
    assert four["memory"]["parts"]["weights"] == vectors
    assert four["memory"]["mapped"] + vectors == four["disk"]["quantized cache"]
    assert half["memory"]["mapped"] == 0 and half["disk"]["quantized cache"] == 0, "nothing is quantized"
    assert half["memory"]["parts"]["weights"] > four["memory"]["mapped"] > 0


def test_bf16_is_mapped_as_it_is(tmp_path):
    folder = hollow.write_folder(tmp_path / "model", LARGE)
    found = qmica.plan(model=folder, bits=16, **{**QUICK, "data": "org/data"})["memory"]
    assert found["parts"]["weights"] == 4 * 256 * 5 and found["mapped"] > 2e6


@pytest.mark.parametrize(
    "given, fits, text",
    [("1MB", False, "not even with the shortest rows"), ("64GB", True, "all that the model was made for")],
)
def test_the_verdict(flags, given, fits, text, capsys):
    found = qmica.plan(**flags, memory=given)
    said = capsys.readouterr().out
    assert found["memory"]["fits"] is fits and text in said
    assert ("does not fit into" in said) is not fits


@pytest.mark.parametrize("packing", [True, False])
def test_the_rows_are_those_of_the_longest_batch(flags, tmp_path, packing):
    held = qmica.plan(**flags, packing=packing)["memory"]
    epoch = small_runs.loop(flags, tmp_path, packing=packing).stream.first_epoch
    sizes = [tuple(epoch[i].input_ids.shape) for i in range(len(epoch))]
    assert (held["rows"], held["length"]) == max(sizes, key=lambda size: size[0] * size[1])


def test_training_says_what_the_plan_was_worth(flags, tmp_path, capsys):
    small_runs.train(flags, out=tmp_path / "run", steps=2)
    said = capsys.readouterr().out
    found = re.search(r"^memory: planned ([\d.]+ .B), measured ([\d.]+ .B) \(([\d.]+)\)$", said, re.MULTILINE)
    assert found, said
    planned = qmica.plan(**flags)["memory"]["total"]
    assert found[1] == durable.size_text(planned), "the plan of `plan` is the plan of `train`"


# ---- time


def test_the_time_of_a_run_is_that_of_its_batches(flags):
    times = qmica.plan(**{**flags, "steps": 10})["time"]
    assert times["batches"] == 20  # two batches an update
    assert times["step"] == pytest.approx(2 * times["batch"])
    assert times["run"] == pytest.approx(20 * times["batch"])
    assert times["batch"] == pytest.approx(sum(times["work"].values()))
    assert all(rate > 0 for rate in times["rates"].values())


@pytest.mark.parametrize("steps", [None, 3])
def test_as_many_batches_as_training_computes(flags, tmp_path, steps):
    loop = small_runs.loop(flags, tmp_path, steps=steps, epochs=2.5)
    assert qmica.plan(**{**flags, "steps": steps, "epochs": 2.5})["time"]["batches"] == loop.batches


@pytest.mark.parametrize("mode", checkpointing.MODES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flops_are_those_that_torch_counts(family, mode):
    """Of one decoder layer: a model with three less one with two. Attention has a unit of its own."""
    counted, work = {}, {}
    for layers in (2, 3):
        network = tiny_model(family, num_hidden_layers=layers).requires_grad_(False)
        options = AdapterConfig(rank=4, targets="qv", components="random")
        adapter.attach(network, options).train()
        checkpointing.set_modes(network, [mode] * layers)
        rows = memory.Rows(2, 48, False)
        case = memory.Case(network, 16, options, TrainingConfig(), rows, torch.float32, modes=(mode,) * layers)
        case = case_of_bare(case, family, layers)
        work[layers] = pace.WORK["linears"](pace.Step(case, rows.tokens)) + thin(case)
        ids = torch.randint(0, 400, (2, 48))
        positions = torch.arange(48).expand(2, 48)
        with FlopCounterMode(display=False) as counter:
            loss.hidden_states(network, ids, positions).sum().backward()
        by_kind = counter.get_flop_counts()["Global"]
        counted[layers] = sum(count for kind, count in by_kind.items() if "mm" in str(kind))
    found, expected = work[3] - work[2], counted[3] - counted[2]
    print(f"{family} {mode}: {found:,} planned, {expected:,} counted")
    assert found == pytest.approx(expected, rel=0.02)


def case_of_bare(case, family, layers):
    """The same case on a model without an adapter, as a plan has it."""
    return replace(case, model=tiny_model(family, num_hidden_layers=layers))


def thin(case) -> float:
    """The adapters' own: z = A x and B z forward; G, dA and G A backward. z again where the layer is run again."""
    tokens, rank = case.rows.tokens, case.adapter.rank
    again = 0 if case.layer_modes[0] == "plain" else 1
    flops = sum(
        2 * tokens * rank * ((2 + (case.layer_modes[0] == "checkpoint")) * out + (3 + again) * columns)
        for out, columns in case.adapted
    )
    return flops


# ---- a model on the hub


@pytest.fixture
def served(hub, tmp_path):
    """A repository whose weights are far larger than their header, and a tokenizer beside it."""
    folder = hollow.write_folder(tmp_path / "model", LARGE)
    small = save_tiny(tmp_path / "tiny", "llama")
    for name in source.SMALL[1:]:
        if (small / name).is_file():
            (folder / name).write_bytes((small / name).read_bytes())
    hub.add("org/model", folder)
    return folder


def test_only_headers_are_asked_of_the_hub(hub, served, tmp_path):
    found = qmica.plan(model="org/model", **QUICK)
    weights = (served / "model.safetensors").stat().st_size
    print(hub.requests, hub.sent)
    assert hub.sent["model.safetensors"] <= 100_001 < weights / 20
    assert set(hub.sent) == {"config.json", "model.safetensors"}
    wanted = {*source.SMALL, "model.safetensors"}
    assert found["disk"]["download"] == sum(file.stat().st_size for file in served.iterdir() if file.name in wanted)
    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert cached == [] and not found["model"]["on_disk"]


def test_a_hub_id_is_planned_as_its_folder(hub, served):
    """With data that are nowhere on this disk, so that both count full rows."""
    options = {**QUICK, "data": "org/data", "steps": 1}
    distant, local = (qmica.plan(model=name, **options) for name in ("org/model", served))
    assert distant["memory"]["parts"] == local["memory"]["parts"]
    assert {**distant["disk"], "download": 0} == local["disk"]


def test_what_the_hub_holds_packed_counts_as_packed(hub, tmp_path):
    options = {**QUICK, "bits": 16, "data": "org/data"}
    folder = hollow.write_packed_folder(tmp_path / "packed", LARGE)
    plain = hollow.write_folder(tmp_path / "plain", LARGE)
    hub.add("org/packed", folder)
    found = [qmica.plan(model=name, **options) for name in ("org/packed", folder, plain)]
    packed, local, half = (one["memory"]["parts"] for one in found)
    sizes = [one["memory"]["mapped"] for one in found]
    assert packed == local
    linears = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 1024)  # numbers
    tables = 14 * (16 * 4 + 256 * 4 + 200)
    assert packed["weights"] == half["weights"], "what is not mapped: the norms"
    saved = sizes[2] - sizes[0]
    assert linears * (2 - 0.517) - tables < saved < linears * (2 - 0.5), saved


def test_shards_are_each_asked_for_their_header(hub, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "model", "qwen2")
    (folder / "model.safetensors").rename(tmp_path / "whole.safetensors")
    tiny_model("qwen2").save_pretrained(folder, max_shard_size="200KB")
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    hub.add("org/sharded", folder)
    found = qmica.plan(model="org/sharded", **QUICK)
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert len(shards) > 2 and shards < set(hub.sent)
    assert found["model"]["parameters"] == tiny_model("qwen2").num_parameters()


def test_the_time_of_a_run_needs_the_data_or_steps(hub, served, capsys):
    found = qmica.plan(model="org/model", **QUICK)
    assert found["time"]["run"] is None and found["time"]["step"] > 0
    assert "for the whole run give --steps, as its tokenizer is not on this disk" in capsys.readouterr().out
    assert qmica.plan(model="org/model", steps=4, **QUICK)["time"]["batches"] == 4


def test_a_model_on_this_disk_needs_no_network(hub, flags):
    qmica.plan(**flags)
    assert hub.requests == []


def test_offline_is_one_line(hub, served, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(QmicaError, match=r"^model org/model is not on this disk .* HF_HUB_OFFLINE is set") as caught:
        qmica.plan(model="org/model")
    assert "\n" not in str(caught.value) and hub.requests == []


def test_a_damaged_header_is_one_line(hub, tmp_path):
    folder = hollow.write_folder(tmp_path / "model", LARGE)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:20] = b"not a header"
    (folder / "model.safetensors").write_bytes(data)
    hub.add("org/broken", folder)
    with pytest.raises(QmicaError, match=r"^org/broken has a safetensors file with a damaged header: use another$"):
        qmica.plan(model="org/broken")


def test_a_gguf_on_the_hub_is_refused_with_what_to_do(hub, tmp_path):
    import gguf

    folder = tmp_path / "ggufs"
    folder.mkdir()
    hollow.write_gguf(folder / "m.Q8_0.gguf", LARGE, gguf.GGMLQuantizationType.Q8_0)
    hub.add("org/gguf", folder)
    with pytest.raises(QmicaError, match=r"^org/gguf/m.Q8_0.gguf is not on this disk, .* download it, or give"):
        qmica.plan(model="org/gguf")


def test_a_gguf_on_this_disk(tmp_path):
    """Without a tokenizer: it is not the plan that needs one, but the data."""
    import gguf

    file = hollow.write_gguf(tmp_path / "m.Q8_0.gguf", LARGE, gguf.GGMLQuantizationType.Q8_0)
    folder = hollow.write_folder(tmp_path / "model", LARGE)
    headers = [planning._opened(ModelConfig(str(path)), torch.float32) for path in (file, folder)]
    assert [network.num_parameters() for _, network in headers] == [headers[0][1].num_parameters()] * 2
    sizes = [sum(size for _, size in found.tensors.values()) for found, _ in headers]
    assert sizes[0] < 0.6 * sizes[1]
    assert {kind for kind, _ in headers[0][0].tensors.values()} == {"Q8_0", "F32"}


# ---- errors, and what is printed


def test_a_folder_that_is_no_whole_model_is_refused_as_by_train(tmp_path):
    folder = hollow.write_folder(tmp_path / "model", LARGE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    for verb in (qmica.plan, qmica.load):
        with pytest.raises(QmicaError, match=r"is not a whole model: .* config\.json says"):
            verb(model=str(folder))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"rank": 500}, "rank"),
        ({"targets": "nothing_proj"}, "^targets: no linear of this model is called nothing_proj"),
        ({"model": "./nowhere"}, "^model ./nowhere not found"),
        ({"device": "abacus"}, "^--device abacus cannot be used here"),
    ],
)
def test_errors_are_those_of_train(flags, options, text):
    with pytest.raises(QmicaError, match=text):
        qmica.plan(**{**flags, **options})


def test_json_is_what_is_returned(flags, capsys):
    data, training = DataConfig(data=flags["data"], max_seq_length=64), TrainingConfig(memory="1GB")
    found = planning.plan(ModelConfig(flags["model"], device="cpu"), AdapterConfig(), data, training, True)
    assert json.loads(capsys.readouterr().out) == found


def test_the_table_adds_up(flags, capsys):
    found = qmica.plan(**flags)
    assert sum(found["memory"]["parts"].values()) == pytest.approx(found["memory"]["total"], abs=10)
    said = capsys.readouterr().out
    for name in ("weights", "B", "A", "gradients", "optimizer", "activations", "loss", "libraries", "total"):
        assert re.search(rf"^{name} +\d", said, re.MULTILINE), said
    assert "Next: the same flags after `qmica train`." in said
