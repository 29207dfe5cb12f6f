"""model.load against transformers' own from_pretrained: logits, every source, every bits, broken sources, memory of a load."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import hollow
import pytest
import torch
from adapted import make_peft_adapter
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LLAMA3_ROPE, LONGROPE, save_tiny, tiny_config, tiny_model, write_gguf
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Gemma3Config, Gemma3ForConditionalGeneration

from qmica import exporting, model, quant, targets
from qmica.config import ExportConfig
from qmica.errors import QmicaError
from qmica.source import resolve

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
KINDS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    **{family: (family, {}) for family in FAMILIES if family not in ("llama", "qwen2")},
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models saved in bf16: every weight is representable at 16 bits."""
    root = tmp_path_factory.mktemp("models")
    return {
        name: save_tiny(root / name, family, dtype=torch.bfloat16, **options)
        for name, (family, options) in KINDS.items()
    }


@pytest.fixture(scope="module")
def packed(folders, tmp_path_factory):
    """qwen2, with its biases, as transformers saves it in 4 and in 8 bits."""
    root = tmp_path_factory.mktemp("packed")
    for bits, config in ((4, NF4), (8, INT8)):
        theirs(folders["qwen2"], quantization_config=config).save_pretrained(root / str(bits))
    return {bits: root / str(bits) for bits in (4, 8)}


def theirs(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **options).eval()


def ours(path, bits=16, dtype="fp32"):
    return model.load(resolve(path), bits, dtype, "cpu")


def tokens(network, count=48):
    return torch.randint(0, network.config.vocab_size, (2, count), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(network):
    return network(input_ids=tokens(network), use_cache=False).logits.float()


def apart(one, other):
    """Largest difference of two logits, as a share of the largest."""
    a, b = logits(one), logits(other)
    return ((a - b).abs().max() / b.abs().max()).item()


def error_of(path, bits=16):
    with pytest.raises(QmicaError) as error:
        ours(path, bits)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- logits


@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_is_exactly_transformers(folders, kind):
    one, other = ours(folders[kind]), theirs(folders[kind])
    assert apart(one, other) == 0.0, f"{apart(one, other):.1e}"
    assert not one.training and not any(part.requires_grad for part in one.parameters())
    assert not any(part.is_meta for part in (*one.parameters(), *one.buffers()))


def dequantized(network):
    """transformers' quantized model with plain fp32 linears of the same values, by bitsandbytes' own dequantization."""
    for name, module in list(network.named_modules()):
        if quant.bits_of(module) < 16:
            plain = torch.nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = quant.dequantize(module)
            if module.bias is not None:
                plain.bias.data = module.bias.data.float()
            network.set_submodule(name, plain)
    return network


@pytest.mark.parametrize("kind", ["llama", "llama-biased", "qwen2-tied"])
def test_4_bits_is_transformers_with_bitsandbytes(tmp_path, kind, exact_bitsandbytes):
    """With columns that are a multiple of 64: of others it takes the wrong scales on a CPU with AVX512."""
    family, options = KINDS[kind]
    folder = save_tiny(tmp_path, family, dtype=torch.bfloat16, intermediate_size=128, **options)
    one, other = ours(folder, 4), theirs(folder, quantization_config=NF4)
    difference = apart(one, other)
    assert difference < 5e-6, f"{difference:.1e}"  # measured: 0 to 1e-6, from other orders of summation
    assert apart(one, dequantized(other)) == 0.0
    assert apart(one, theirs(folder)) > 0.01, "NF4 changes nothing: the comparison says nothing"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_8_bits_are_the_dequantized_weights(folders, kind):
    """bitsandbytes rounds activations to int8 as well where it has a kernel for it; the weights are the same."""
    one, other = ours(folders[kind], 8), theirs(folders[kind], quantization_config=INT8)
    assert apart(one, dequantized(other)) < 1e-6, f"{apart(one, other):.1e}"
    assert apart(one, theirs(folders[kind])) > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asked", [4, 16])
def test_packed_checkpoints_are_taken_as_they_are(packed, bits, asked):
    """Whatever is asked for, what is recorded is what there is."""
    one, other = ours(packed[bits], asked), theirs(packed[bits])
    assert quant.stored_bits(one) == bits == one.qmica_base.bits
    assert apart(one, dequantized(other)) < 1e-6, f"{apart(one, other):.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 16])
def test_gguf_is_the_folder(folders, tmp_path, kind, bits):
    """Rows permuted for llama, rope factors as a tensor, config from metadata."""
    original = theirs(folders[kind])
    path = write_gguf(tmp_path / "m.gguf", original)
    one = ours(path, bits)
    if bits == 16:
        assert apart(one, original) == 0.0, f"{apart(one, original):.1e}"
    else:
        assert apart(one, ours(folders[kind], 4)) == 0.0


def test_sharded_folders(folders, tmp_path):
    network = theirs(folders["llama"]).bfloat16()
    network.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert apart(ours(tmp_path), ours(folders["llama"])) == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_other_compute_dtypes(folders, dtype, bits):
    one, whole = ours(folders["qwen2"], bits, dtype), ours(folders["qwen2"], bits)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with torch.no_grad():
        hidden = one.model(input_ids=tokens(one), use_cache=False).last_hidden_state
    assert hidden.dtype == kind and one.model.norm.weight.dtype == kind
    assert apart(one, whole) < {"bf16": 0.06, "fp16": 0.008}[dtype], f"{apart(one, whole):.1e}"  # 0.03 and 0.003


def test_what_is_held_in_which_bits(folders):
    for bits in (4, 8, 16):
        network = ours(folders["qwen2"], bits)
        for name, module in network.named_modules():
            if quant.is_linear(module):
                assert quant.bits_of(module) == (16 if targets.stays_16bit(name) else bits), name
                assert isinstance(module, quant.FrozenLinear)
        assert network.model.embed_tokens.weight.dtype == network.lm_head.weight.dtype == torch.bfloat16
        assert network.qmica_base.bits == bits


def test_a_tied_head_is_the_embedding(folders):
    network = ours(folders["llama-tied"], 4)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    assert isinstance(network.lm_head, quant.FrozenLinear)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_generate_is_transformers_greedy(folders, bits):
    """With a cache, and special ids from generation_config.json."""
    config = {4: NF4, 8: INT8, 16: None}[bits]
    one, other = ours(folders["llama"], bits), dequantized(theirs(folders["llama"], quantization_config=config))
    ids = tokens(one, 7)[:1]
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(ids, **given), other.generate(ids, **given))
    assert one.generation_config.eos_token_id == other.generation_config.eos_token_id is not None


def test_gguf_generation_config(folders, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", theirs(folders["llama"]))
    assert ours(path).generation_config.eos_token_id == theirs(folders["llama"]).generation_config.eos_token_id


def test_progress_ends_at_the_total(folders):
    seen = []
    model.load(resolve(folders["qwen2"]), 16, "fp32", "cpu", lambda *step: seen.append(step))
    total = len(load_file(folders["qwen2"] / "model.safetensors"))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_each_tensor_is_read_once(folders, monkeypatch, tmp_path):
    """When it is quantized; from then on no data of the source is read."""
    monkeypatch.setenv("QMICA_CACHE", str(tmp_path))
    read = []
    opened = model.open_weights

    def counting(source):
        weights = opened(source)
        for name, tensor in weights.items():
            object.__setattr__(
                tensor, "read", lambda a, b, read_=tensor.read, name=name: read.append(name) or read_(a, b)
            )
        return weights

    monkeypatch.setattr(model, "open_weights", counting)
    monkeypatch.setattr(model, "fingerprint", lambda weights: "")
    ours(folders["qwen2"], 4)
    names = list(load_file(folders["qwen2"] / "model.safetensors"))
    read += [name for name in names if name.endswith("_proj.weight")]  # views of the file
    assert sorted(read) == sorted(names)
    read.clear()
    ours(folders["qwen2"], 4)
    assert read == []


def test_the_base_is_remembered(folders, packed, tmp_path):
    """Shapes agree between a folder, its GGUF and its packed checkpoint; the bytes do not."""
    folder = ours(folders["qwen2"], 4).qmica_base
    gguf = ours(write_gguf(tmp_path / "m.gguf", theirs(folders["qwen2"]))).qmica_base
    bnb = ours(packed[4]).qmica_base
    other = ours(folders["llama"]).qmica_base
    assert folder.id == str(folders["qwen2"]) and folder.revision is None
    assert folder.shapes == gguf.shapes == bnb.shapes != other.shapes
    assert len({folder.fingerprint, gguf.fingerprint, bnb.fingerprint, other.fingerprint}) == 4


# ---- sources that are no whole model


def changed(folder, path, change):
    """A copy of a folder whose tensors went through `change`."""
    shutil.copytree(folder, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_missing_tensors(folders, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "up_proj" in name or name == "model.norm.weight"]:
            del tensors[name]

    path = changed(folders["llama"], tmp_path / "m", change)
    assert error_of(path) == (
        f"{path} is not a whole model: 3 tensors are missing (model.layers.0.mlp.up_proj.weight, "
        "model.layers.1.mlp.up_proj.weight, model.norm.weight)"
    )


def test_wrong_shapes(folders, tmp_path):
    def change(tensors):
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors[name] = tensors[name][:-1].clone()

    path = changed(folders["llama"], tmp_path / "m", change)
    assert error_of(path) == (
        f"{path} is not a whole model: model.layers.1.self_attn.k_proj.weight is (63, 64), config.json says (64, 64)"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_checkpoint_of_another_size(packed, tmp_path, bits):
    path = tmp_path / "m"
    shutil.copytree(packed[bits], path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    said = error_of(path)
    assert said.startswith(
        f"{path} is not a whole model: model.layers.0.mlp.down_proj.weight is (64, 96), config.json says (64, 128); "
    )


def test_what_says_nothing_of_the_model_is_left_out(folders, tmp_path):
    """A head beside tied embeddings, rotary buffers of old checkpoints."""

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
        tensors["lm_head.weight"] = torch.ones(448, 64, dtype=torch.bfloat16)

    path = changed(folders["llama-tied"], tmp_path / "m", change)
    assert apart(ours(path), ours(folders["llama-tied"])) == 0.0


@pytest.mark.parametrize(
    "config, added, text",
    [
        ({}, "model.layers.0.self_attn.q_proj.bias", "has 1 tensors that its config.json says nothing of"),
        ({}, "model.layers.0.self_attn.q_proj.weight_scale_inv", "has 1 tensors .*weight_scale_inv"),
        ({"num_hidden_layers": 1}, None, "has 9 tensors .*it is another model; download it again"),
    ],
)
def test_tensors_of_another_model_are_refused(folders, tmp_path, config, added, text):
    """transformers leaves them out, and what is trained and exported is not the model of these weights."""
    extra = {} if added is None else {added: torch.ones(128, dtype=torch.bfloat16)}
    path = changed(folders["llama"], tmp_path / "m", lambda tensors: tensors.update(extra))
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert re.search(text, error_of(path))
    run = make_peft_adapter(tmp_path / "run", path, {"model.layers.0.self_attn.v_proj": (64, 64)})
    with pytest.raises(QmicaError, match=text):
        exporting.export(str(run), ExportConfig(quant="F16"))


def test_an_attention_of_the_files_choice_is_not_taken(folders, tmp_path):
    """transformers would look for the kernel of that name on the hub."""
    path = changed(folders["llama"], tmp_path / "m", lambda tensors: None)
    file = path / "config.json"
    said = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "num_labels": 10**9}
    said |= {"pad_token_id": 448, "dtype": "evil"}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    network = ours(path)
    assert network.config._attn_implementation in ("sdpa", "eager") and network.config.pad_token_id is None
    assert apart(network, ours(folders["llama"])) == 0.0


@pytest.mark.parametrize("content", ["{", "[]", "5", '{"max_new_tokens": -5}', 10**5 * "["])
def test_a_broken_generation_config_is_one_line(folders, tmp_path, content):
    path = changed(folders["llama"], tmp_path / "m", lambda tensors: None)
    (path / "generation_config.json").write_text(content)
    assert "generation_config.json" in error_of(path)


def test_configs_that_cannot_be_used(folders, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(folders["llama"], path)
    source = resolve(path)
    config = json.loads((path / "config.json").read_text())

    def said(content):
        (path / "config.json").write_text(content)
        with pytest.raises(QmicaError) as error:
            model.read_config(source)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "architecture 'gpt_neox' is not supported; supported are llama, mistral, qwen2" in said(
        json.dumps({**config, "model_type": "gpt_neox"})
    )
    moe = said(json.dumps({"model_type": "mixtral", "num_local_experts": 8}))
    assert "'mixtral' is a mixture of experts, which qmica does not train" in moe
    assert "config.json has hidden_size = 'wide'" in said(json.dumps({**config, "hidden_size": "wide"}))
    assert str(path / "config.json") in said(json.dumps({**config, "use_cache": "wide"}))
    (path / "config.json").unlink()
    with pytest.raises(QmicaError, match=r"has no config.json: a model folder holds config.json, \*.safetensors and"):
        model.read_config(source)


# ---- devices and dtypes


def test_devices():
    assert model.choose_device("cpu") == torch.device("cpu")
    assert model.choose_device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "gpu", ""):
        with pytest.raises(
            QmicaError, match=rf"^--device {name} cannot be used here \(.+\): choose cpu, or leave it at auto$"
        ):
            model.choose_device(name)


def test_dtypes(monkeypatch):
    cpu = torch.device("cpu")
    assert [model.choose_dtype(name, cpu) for name in ("bf16", "fp16", "fp32")] == [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    for has in (True, False):
        monkeypatch.setattr(model, "cpu_multiplies_bf16", lambda has=has: has)
        assert model.choose_dtype("auto", cpu) == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 7777.0}, LLAMA3_ROPE])
def test_buffers_are_real_on_the_meta_device(rope):
    config = tiny_config("llama", rope_parameters=rope)
    empty, real = model.on_meta(config, torch.bfloat16), tiny_model("llama", rope_parameters=rope)
    assert all(part.is_meta for part in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys() and buffers
    for name, buffer in real.named_buffers():
        assert torch.equal(buffers[name], buffer), name


# ---- memory

# The design allows 0.3 GB beside the model and two of its largest tensors; here it is 0.07, so that a model of 1.4 GB is
# three times the bound (NF4 takes 25 s for it on one core). Measured: 0.03 from a folder and from a GGUF. bitsandbytes'
# five fp32 copies of the largest tensor would be 0.17, and what glibc keeps as much as the model. What is mapped, from the
# cache or from a packed checkpoint, takes nothing but one tensor while it is quantized.
LARGE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
BESIDE = 70_000_000
CHILD = """
import sys
import torch, transformers.models.llama.modeling_llama
from qmica import model, source
model.load(source.resolve(sys.argv[1]), 4, "fp32", "cpu")  # what a first load imports and allocates
print("ready", flush=True)
sys.stdin.readline()
network = model.load(source.resolve(sys.argv[2]), 4, "fp32", "cpu")
print("done", flush=True)
sys.stdin.readline()
"""


def memory_of_load(small: Path, path: Path, cache: Path) -> tuple[int, int, int]:
    """(peak, end, VmHWM) of anonymous memory in a child that loads `path`, sampled from outside every 2 ms; bytes."""
    environment = {**os.environ, "QMICA_CACHE": str(cache)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, small, path], stdin=-1, stdout=-1, text=True, env=environment
    )
    status = Path(f"/proc/{child.pid}/status")

    def held(field="RssAnon"):
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))

    try:
        assert child.stdout.readline() == "ready\n"
        before, peak, loading = held(), 0, True

        def watch():
            nonlocal peak
            while loading:
                peak = max(peak, held())
                time.sleep(0.002)

        watcher = threading.Thread(target=watch)
        watcher.start()
        child.stdin.write("\n")
        child.stdin.flush()
        finished = child.stdout.readline()
        loading = False
        watcher.join()
        assert finished == "done\n"
        return peak - before, held() - before, held("VmHWM")
    finally:
        child.stdin.close()
        child.wait()


def bytes_of(shapes: dict) -> tuple[int, int]:
    """Of the model in NF4, and of its largest tensor in 16 bits."""
    packed = {name for name, shape in shapes.items() if len(shape) == 2 and not targets.stays_16bit(name)}
    quantized = sum(
        quant.FORMATS[4 if name in packed else 16].count_bytes(*shape) if len(shape) == 2 else 4 * shape[0]
        for name, shape in shapes.items()
    )
    return quantized, max(2 * math.prod(shape) for shape in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_memory_of_a_held_load(folders, tmp_path, kind):
    """Without a cache: anonymous memory <= the quantized model + 2 x its largest 16-bit tensor + 0.07 GB."""
    shapes = hollow.shapes(LARGE)
    whole, (quantized, largest) = sum(2 * math.prod(shape) for shape in shapes.values()), bytes_of(shapes)
    bound = quantized + 2 * largest + BESIDE
    assert whole >= 3 * bound, f"{whole / bound:.2f}: make LARGE larger"
    path, no_cache = WRITE[kind](tmp_path / "large.gguf", LARGE), tmp_path / "file"
    no_cache.touch()
    peak, end, resident = memory_of_load(folders["llama"], path, no_cache)
    numbers = {"peak": peak, "end": end, "model": quantized, "bound": bound, "VmHWM": resident, "16 bits": whole}
    said = ", ".join(f"{name} {number / 1e6:.0f} MB" for name, number in numbers.items())
    print(said)
    assert peak <= bound and end <= quantized + BESIDE and peak > 0.9 * quantized, said


WRITE = {
    "folder": hollow.write_folder,
    "packed": hollow.write_packed_folder,
    "gguf": lambda path, config: hollow.write_gguf(path, config, GGMLQuantizationType.Q4_K),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["folder", "gguf", "packed"])
def test_memory_of_a_mapped_load(folders, tmp_path, kind):
    """Making it in the cache takes 2.5 times its largest tensor in fp32 and 0.07 GB; finding it there, next to nothing."""
    config = {**LARGE, "num_hidden_layers": 6}
    quantized, largest = bytes_of(hollow.shapes(config))
    path = WRITE[kind](tmp_path / "large.gguf", config)
    made, found = (memory_of_load(folders["llama"], path, tmp_path / "cache") for _ in range(2))
    said = f"{quantized / 1e6:.0f} MB; peak and end: made {made[0] / 1e6:.0f}, {made[1] / 1e6:.0f} MB, found "
    said += f"{found[0] / 1e6:.0f}, {found[1] / 1e6:.0f} MB"
    print(said)
    entries = len(list((tmp_path / "cache" / "quantized").glob("*/*")))
    assert entries == (1 if kind == "packed" else 2)  # the small model's is the other
    assert made[0] <= 5 * largest + BESIDE and max(found[0], found[1], made[1]) < 0.15 * quantized, said


# ---- models that also see


def with_eyes(folder, rename) -> tuple[Path, torch.nn.Module]:
    """A folder of a Gemma 3 that also sees, its tensors named by `rename(transformers' name)`; and its text part."""
    text = tiny_model("gemma3")
    for parameter in text.parameters():
        parameter.data = parameter.data.bfloat16().float()
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config={**sight, "image_size": 28, "patch_size": 14}
    )
    config.text_config.rope_parameters = text.config.rope_parameters
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder, text


def on_the_hub(name: str) -> str:
    """As google/gemma-3-4b-it's files have them."""
    return name.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision")


@pytest.mark.parametrize("rename", [str, on_the_hub])
def test_the_text_part_of_a_model_that_also_sees(tmp_path, rename):
    folder, text = with_eyes(tmp_path / "gemma", rename)
    network = ours(folder)
    assert type(network).__name__ == "Gemma3ForCausalLM"
    assert torch.equal(logits(network), logits(text))
    assert not [name for name in network.state_dict() if "vision" in name]
