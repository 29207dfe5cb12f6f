"""Load a transformers model whose linears are quantized as their tensors arrive.

How: the model is built on the meta device from its config, then one walk over its `Weights` fills it: a linear inside
a decoder layer becomes a frozen 4-, 8- or 16-bit linear the moment its tensor is read, everything else is kept in 16
bits (norms and biases in the compute dtype). So a folder, a hub snapshot, a GGUF and a checkpoint quantized by
bitsandbytes take one path, and no more than one tensor exists unquantized. With `bits="gguf"` nothing is quantized: the
matrices of a GGUF, embedding and head too, stay its own blocks. What is quantized here is quantized into the
cache (`quantized`) and loaded from there; what a file has in the right type already is mapped on a CPU, not copied.

What it gives up: transformers' parallel loading, and weights that several modules share in other ways than tied
embeddings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from qmica import allocator, architectures, quant, quantized, targets, unpacking
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.source import Headers, Source, read_json
from qmica.unpacking import Blocks
from qmica.weights import Weights, fingerprint, gguf_config, headers_of, open_weights, own_blocks, shapes_fingerprint


@dataclass(frozen=True)
class Base:
    """What a model was loaded from. bits: what its linears are in, whatever was asked for; fingerprint: of the source's
    bytes; shapes: of its tensors' names and shapes alone.
    """

    id: str
    revision: str | None = None
    bits: quant.Bits | None = None
    fingerprint: str | None = None
    shapes: str | None = None


GIVE_BACK_EVERY = 8_000_000  # bytes read

# of a folder's config.json: what is for this machine to choose (an attention of a name that transformers does not know
# is looked for on the hub, and run), and heads of other tasks, of any size
NOT_OURS = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "dtype", "torch_dtype"),
    *("auto_map", "num_labels", "id2label", "label2id"),
    "quantization_config",  # what bitsandbytes quantized is loaded by our walk, not by transformers
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises QmicaError for a device that torch cannot use."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise QmicaError(f"--device {name} cannot be used here ({reason}): choose cpu, or leave it at auto") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU (bf16 there: 3 x
    slower).
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def require_stream(stream: str, device: torch.device) -> None:
    """Raises QmicaError where the weights cannot be streamed that way to this device."""
    if (stream, device.type) == ("host", "cpu"):
        raise QmicaError("--stream host is for a GPU: a CPU's weights are in host memory already, use --stream disk")


def require_dtype(compute: torch.dtype, device: torch.device) -> None:
    """Raises QmicaError where training in this dtype does not work on this device."""
    if (compute, device.type) == (torch.float16, "cpu"):
        raise QmicaError("--dtype fp16 needs a GPU, whose gradient scaler it trains with: choose bf16, fp32 or auto")


def require_blocks(bits: quant.Bits, headers: Headers) -> None:
    """Raises QmicaError where `--bits gguf` was asked for, and the files hold no blocks, or such as cannot be read."""
    if bits != quant.GGUF:
        return
    if headers.source.kind != "gguf":
        raise QmicaError(
            f"--bits gguf: {headers.source.name} is no GGUF, and has no blocks of its own: give --model FILE.gguf, or "
            "--bits 4, 8 or 16"
        )
    unpacking.require_readable((name, type) for name, (type, _) in headers.tensors.items())


def read_config(source: Source) -> PretrainedConfig:
    """The transformers config of a source; a GGUF's is built from its own metadata. Raises QmicaError for an
    unsupported family.
    """
    if source.kind == "gguf":
        file, said = source.files[0], gguf_config(GGUFFile.open(source.files[0]))
    elif not (file := source.folder / "config.json").exists():
        raise QmicaError(
            f"{source.folder} has no config.json: a model folder holds config.json, *.safetensors and a tokenizer"
        )
    else:
        said = architectures.text_config(read_json(file))
        architectures.for_config(said)
    try:
        config = AutoConfig.for_model(**{name: value for name, value in said.items() if name not in NOT_OURS})
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise QmicaError(f"{file} cannot be used: {' '.join(str(error).split())}") from error
    architectures.for_config(config)
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        config.pad_token_id = None  # an embedding would take it for a row
    return config


def load(
    source: Source,
    bits: quant.Bits = 4,
    dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    stream: str = "none",
) -> nn.Module:
    """The source's model with frozen weights: linears of decoder layers in `bits`, the rest in 16 bits, computing in
    `dtype`. bits "gguf": every matrix as the GGUF has it.

    stream: where not none, the linears of decoder layers are left in host memory, for `streaming.start` to bring to the
    device. progress(done, total) is called after each weight. Raises QmicaError for files that do not make up the
    model.
    """
    chosen = choose_device(device)
    require_stream(stream, chosen)
    compute = choose_dtype(dtype, chosen)
    config = read_config(source)
    model = on_meta(config, compute)
    weights = open_weights(source)
    require_blocks(bits, headers_of(source, weights))
    require_whole(model, weights, source)
    mark, generation = fingerprint(weights), _generation_config(source, config)
    held, kept = _held(model, bits), None
    if quantized.needed(weights, held):
        kept = quantized.find(source, weights, held, mark, generation.to_diff_dict(), chosen, progress)
    stored, digests = kept or (weights, {})
    blocks, maps = own_blocks(weights) if bits == quant.GGUF else ({}, stored.maps)
    told = progress if kept is None else lambda done, total: None
    _fill(model, stored, blocks, bits, compute, chosen, told, on_host=stream != "none")
    for path, digest in digests.items():
        model.get_submodule(path).known_digest = digest
    _tie(model)
    for module in model.modules():
        if quant.is_linear(module):
            quant.freeze(module)  # a tied head has no tensor of its own
    model.generation_config = generation
    model.name_or_path = source.id
    model.qmica_source = source  # where the weights are before they were quantized
    model.qmica_maps = maps if chosen.type == "cpu" else ()  # the files whose pages are the model's
    model.qmica_base = Base(source.id, source.revision, quant.stored_bits(model), mark, shapes_fingerprint(weights))
    return model.requires_grad_(False).eval()


def on_meta(config: PretrainedConfig, compute: torch.dtype) -> nn.Module:
    """The model without storage, but for its buffers (rotary frequencies), which are real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=compute)
    for module in model.modules():
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            model._init_weights(module)  # transformers' own hook fills them
    return model


def _tie(model: nn.Module) -> None:
    """What is tied has the same weight; a tied head of a GGUF multiplies with the embedding's blocks."""
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, quant.GGUFEmbedding) and head.weight is embedding.weight:
        quant.tie_blocks(head, embedding)


def _expected(model: nn.Module) -> set[str]:
    """The parameter names that the files must hold: all but those tied to another one."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - tied


def _held(model: nn.Module, bits: quant.Bits) -> dict[str, quant.Bits]:
    """What every tensor is held in: `bits`, 16, or 0 for what is kept in the compute dtype, norms and biases."""
    held = {}
    for name in sorted(_expected(model)):
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if kind == "weight" and quant.is_linear(module):
            held[name] = 16 if targets.stays_16bit(name) else bits
        else:
            held[name] = 16 if isinstance(module, nn.Embedding) else 0
    return held


def require_whole(model: nn.Module, weights: Weights, source: Source) -> None:
    """Every expected tensor is there with the shape that the config implies, and no other one, which would mean a model
    of another config. Raises QmicaError naming up to three that are not.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    expected = sorted(_expected(model))
    missing = [name for name in expected if name not in weights]
    found = weights.shapes
    wrong = [
        f"{name} is {tuple(found[name])}, config.json says {shapes[name]}"
        for name in expected
        if name in found and tuple(found[name]) != shapes[name]
    ]
    extra = [name for name in found if name not in shapes and not name.endswith(".rotary_emb.inv_freq")]
    if extra and not missing and not wrong:
        raise QmicaError(
            f"{source.name} has {len(extra)} tensors that its config.json says nothing of ({', '.join(extra[:3])}): "
            "it is another model; download it again"
        )
    if missing or wrong:
        problems = [f"{len(missing)} tensors are missing ({', '.join(missing[:3])})"] if missing else []
        raise QmicaError(f"{source.name} is not a whole model: {'; '.join(problems + wrong[:3])}")


def _fill(
    model: nn.Module,
    weights: Weights,
    blocks: Mapping[str, Blocks],
    bits: quant.Bits,
    compute: torch.dtype,
    device: torch.device,
    progress,
    on_host: bool = False,
) -> None:
    """Read each tensor once, put it where it belongs, forget it. blocks: of matrices that stay as the GGUF has them."""
    expected = sorted(_expected(model))
    read = 0
    for done, name in enumerate(expected, start=1):
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        if quant.is_linear(module):
            if kind == "weight":  # the bias comes with it
                stays = on_host and not targets.stays_16bit(name)
                place = torch.device("cpu") if stays else device
                linear = _linear(module, weights, blocks, name, bits, compute, place)
                if stays:
                    quant.compute_on(linear, device)
                model.set_submodule(path, linear)
        elif isinstance(module, nn.Embedding) and name in blocks:
            quant.embed_blocks(module, blocks[name], compute, device)
        elif isinstance(module, nn.Embedding):
            _fill_embedding(module, weights[name].frozen(), compute, device)
        else:
            value = weights[name].load().to(device=device, dtype=compute)
            module.register_parameter(kind, nn.Parameter(value, requires_grad=False))
        read += weights[name].nbytes
        if read > GIVE_BACK_EVERY or done == len(expected):
            allocator.give_back()
            read = 0
        progress(done, len(expected))
    for buffer_owner in model.modules():
        for name, buffer in buffer_owner.named_buffers(recurse=False):
            buffer_owner._buffers[name] = buffer.to(device)


def _linear(
    module: nn.Module,
    weights: Weights,
    blocks: Mapping[str, Blocks],
    name: str,
    bits: quant.Bits,
    compute: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The frozen linear in place of an empty one: packed as the file has it, or quantized to `bits` now."""
    path = name.removesuffix(".weight")
    bias = None if module.bias is None else weights[f"{path}.bias"].load().to(compute)
    if name in blocks:
        return quant.from_blocks(blocks[name], bias, device)
    if name in weights.packed:
        parts = {part: weights[f"{path}.{part}"].frozen() for part in weights.packed[name]}
        return quant.from_packed(tuple(module.weight.shape), parts, bias, device)
    return quant.quantize(weights[name].frozen(), bias, 16 if targets.stays_16bit(name) else bits, device)


def _fill_embedding(module: nn.Embedding, weight: torch.Tensor, compute: torch.dtype, device: torch.device) -> None:
    module.__class__ = quant.HalfScaledEmbedding if hasattr(module, "embed_scale") else quant.HalfEmbedding
    module.compute_dtype = compute
    module.weight = nn.Parameter(weight.to(device=device, dtype=torch.bfloat16), requires_grad=False)


def _generation_config(source: Source, config: PretrainedConfig) -> GenerationConfig:
    """The folder's generation_config.json, else what the config says of its special tokens."""
    if source.kind != "gguf" and (source.folder / "generation_config.json").exists():
        file = source.folder / "generation_config.json"
        try:
            return GenerationConfig.from_dict(read_json(file))
        except (ValueError, TypeError) as error:
            raise QmicaError(f"{file} cannot be used: {' '.join(str(error).split())}; correct or remove it") from error
    return GenerationConfig.from_model_config(config)
