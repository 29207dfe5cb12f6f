"""Write a Hugging Face folder with random weights of a given config, for memory tests and benchmarks without a
download.

    python scripts/random_model.py qwen2.5-7b /tmp/seven
    python scripts/random_model.py my/config.json /tmp/mine --dtype fp32 --layers 4 --tokenizer my

Tensor names and shapes are those of transformers' own model, made on the meta device; the weights are normal with a
standard deviation of 0.02, the norms one. They are streamed in blocks, so that memory does not grow with the model.
What it gives up: such a model says nothing sensible, and there is no tokenizer unless one is copied (--tokenizer).
"""

import argparse
import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import torch

sys.path.insert(0, os.fspath(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from qmica.durable import replacing_folder, size_text, write_json
from qmica.source import SMALL
from qmica.weights import LazyTensor, Weights, write_sharded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 131072}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_TIED = {"tie_word_embeddings": True}


def _sized(family: dict, vocabulary: int, *sizes: int, factor: float | None = None, **more) -> dict:
    """A config.json from a family's common values; `factor` is llama3's rope scaling."""
    rope = {"rope_type": "default"} if factor is None else {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    values = {"tie_word_embeddings": False, **family, **dict(zip(_FIELDS, sizes, strict=True)), **more}
    rope["rope_theta"] = values.pop("rope_theta")
    return {**values, "vocab_size": vocabulary, "rope_parameters": rope}


# hyper-parameters as in each model's config.json on the hub
PRESETS = {
    "tiny": _sized(_LLAMA, 512, 64, 128, 2, 4, 2),
    "smollm2-135m": _sized(_LLAMA, 49152, 576, 1536, 30, 9, 3, rope_theta=1e5, max_position_embeddings=8192, **_TIED),
    "qwen2.5-0.5b": _sized(_QWEN, 151936, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2.5-1.5b": _sized(_QWEN, 151936, 1536, 8960, 28, 12, 2, max_position_embeddings=131072, **_TIED),
    "qwen2.5-7b": _sized(_QWEN, 152064, 3584, 18944, 28, 28, 4, max_position_embeddings=131072),
    "llama2-7b": _sized(_LLAMA, 32000, 4096, 11008, 32, 32, 32, rope_theta=1e4, max_position_embeddings=4096),
    "llama3.1-8b": _sized(_LLAMA, 128256, 4096, 14336, 32, 32, 8, factor=8.0),
    "llama3.2-1b": _sized(_LLAMA, 128256, 2048, 8192, 16, 32, 8, factor=32.0, head_dim=64, **_TIED),
}


def model_shapes(config: dict) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """transformers' full config.json content, and the name and shape of every tensor that a checkpoint holds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    tied = set(model.all_tied_weights_keys) if made.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return {**made.to_dict(), "architectures": [type(model).__name__]}, shapes


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> LazyTensor:
    """Normal rows, a function of name, seed and first row; ones for a norm."""

    def read(start: int, stop: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(stop - start)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {start}".encode()))
        return torch.empty(stop - start, *shape[1:]).normal_(0.0, 0.02, generator=generator)

    return LazyTensor(shape, torch.float32, read)


def write_model(config: dict, folder: Path, dtype: str = "bf16", seed: int = 0, tokenizer: Path | None = None) -> int:
    """Write the whole folder, or nothing; the bytes of its weights. Raises QmicaError if it is not empty or there is
    no space.
    """
    content, shapes = model_shapes(config)
    weights = Weights({name: random_tensor(name, shape, seed) for name, shape in shapes.items()}, content)
    with replacing_folder(folder) as part:
        files = write_sharded(weights, part, DTYPES[dtype])
        write_json(part / "config.json", {**content, "dtype": str(DTYPES[dtype]).removeprefix("torch.")})
        for name in SMALL[1:] if tokenizer else ():
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, part / name)
        return sum((part / file).stat().st_size for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help=f"a config.json, or one of {', '.join(PRESETS)}")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, help="instead of the config's number of layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied")
    flags = parser.parse_args()
    config = PRESETS.get(flags.config) or json.loads(Path(flags.config).read_text())
    if flags.layers:
        config = {**config, "num_hidden_layers": flags.layers}
    nbytes = write_model(config, flags.folder, flags.dtype, flags.seed, flags.tokenizer)
    print(f"{flags.folder}: {size_text(nbytes)} of random weights")


if __name__ == "__main__":
    main()
