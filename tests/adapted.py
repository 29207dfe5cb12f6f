"""Adapters whose effect is seen: tiny bases with a loud adapter on them, and what an oracle says of their logits.

An adapter is made by qmica's own `attach` and `save_adapter`, with random coefficients in place of trained ones, so
that its log-probabilities are more than 1e-3 away from the base's: 100 times what is allowed against llama.cpp.  PEFT,
which knows nothing of qmica, is the oracle for what such an adapter does to a model.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qmica import adapter, model, source
from qmica.config import AdapterConfig

TOKENS = [int(token) for token in np.random.default_rng(5).integers(0, 380, 48)]  # below every tiny vocabulary's size


def make_run(folder, base, bits: int = 16, targets: str = "all", rank: int = 4, size: float = 0.5, **options) -> Path:
    """Attach an adapter with random A to the model at `base` and save it: an adapter folder, which a run may be."""
    network = model.load(source.resolve(str(base)), bits, "fp32", "cpu")
    adapter.attach(network, AdapterConfig(rank=rank, targets=targets, **options))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, layer in adapter.layers(network):
            layer.A.copy_(torch.randn(layer.A.shape, generator=generator) * size / layer.A.shape[1] ** 0.5)
            if isinstance(layer.B, torch.nn.Parameter):
                layer.B.copy_(torch.randn(layer.B.shape, generator=generator) / layer.B.shape[0] ** 0.5)
    return adapter.save_adapter(network, folder)


def make_peft_adapter(folder, base, shapes, rank: int = 4, seed: int = 0) -> Path:
    """PEFT's pair of files for these module paths {path: (out, in)}, random, without loading anything or qmica.json."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (rows, columns) in shapes.items():
        for half, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            tensors[f"base_model.model.{path}.lora_{half}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank}
    names = sorted({path.rsplit(".", 1)[-1] for path in shapes})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * rank, "target_modules": names}))
    return folder


def log_softmax(logits) -> np.ndarray:
    """float64 (tokens, vocabulary)."""
    return torch.as_tensor(np.asarray(logits)).double().log_softmax(-1).numpy()


def transformers_log_p(folder, adapter_folder=None, dtype=torch.float32) -> np.ndarray:
    """log p of each next token after TOKENS, by transformers on CPU, and PEFT where an adapter is given."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if adapter_folder is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter_folder).eval()
    with torch.no_grad():
        return log_softmax(network(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0].float())


def llama_log_p(path, adapters=(), tokens=TOKENS) -> np.ndarray:
    """The same by llama.cpp in exact mode."""
    from qmica.llamacpp import Llama

    with Llama(path, adapters, threads=1) as llama:
        return log_softmax(llama.logits(tokens))


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(reference || other) over positions, in nats."""
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())
