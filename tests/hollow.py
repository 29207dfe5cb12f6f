"""Model files of any size whose weights are holes: headers are real, the data is zeros that take no disk and no time
to write.

For tests of memory, which does not depend on what the weights are. A folder of safetensors in bf16, one as
bitsandbytes saves 4-bit models, a GGUF of any block type.
"""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qmica import architectures, targets

BYTES = {"BF16": 2, "F32": 4, "U8": 1}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model that a config.json describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], contents: dict[str, bytes]) -> None:
    """tensors: name -> (dtype, shape); contents: the bytes of those that are not holes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        for name, data in contents.items():
            file.seek(start + header[name]["data_offsets"][0])
            file.write(data)


def write_folder(folder: Path, config: dict) -> Path:
    """config.json and model.safetensors in bf16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "model.safetensors", {name: ("BF16", shape) for name, shape in shapes(config).items()}, {}
    )
    return folder


def write_packed_folder(folder: Path, config: dict) -> Path:
    """The same as bitsandbytes saves it in NF4 with double quantization (functional.py, QuantState.as_dict)."""
    folder.mkdir()
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors, contents = {}, {}
    for name, shape in shapes(config).items():
        if len(shape) < 2 or targets.stays_16bit(name):
            tensors[name] = ("BF16", shape)
            continue
        count = math.prod(shape)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0}
        text = json.dumps(state).encode()
        tensors[name] = ("U8", (count // 2, 1))
        tensors[f"{name}.absmax"] = ("U8", (-(-count // 64),))
        tensors[f"{name}.quant_map"] = ("F32", (16,))
        tensors[f"{name}.nested_absmax"] = ("F32", (-(-count // 64 // 256),))
        tensors[f"{name}.nested_quant_map"] = ("F32", (256,))
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", (len(text),))
        contents[f"{name}.quant_state.bitsandbytes__nf4"] = text
    write_safetensors(folder / "model.safetensors", tensors, contents)
    return folder


def write_gguf(path: Path, config: dict, type: gguf.GGMLQuantizationType) -> Path:
    """A GGUF without a tokenizer, its matrices in `type`, its vectors in F32."""
    hf = AutoConfig.for_model(**config)
    family = architectures.for_config(hf)
    writer = gguf.GGUFWriter(path, family.name)
    for key, kind, value in family.metadata(hf):
        writer.add_key_value(key, value, kind)
    end = 0
    for name, shape in shapes(config).items():
        stored = type if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[stored]
        nbytes = math.prod(shape) // block * size
        packed = (*shape[:-1], shape[-1] // block * size)
        writer.add_tensor_info(family.gguf_name(name), packed, np.dtype(np.uint8), nbytes, raw_dtype=stored)
        end = gguf.GGUFWriter.ggml_pad(end, writer.data_alignment) + nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.fout[0].truncate(writer.fout[0].tell() + end)
    writer.close()
    return path
