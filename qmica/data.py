"""Files -> documents -> tokens and which of them are learnt: the Examples that packing.py makes batches of.

Text: a document is `[BOS] tokens EOS` (BOS where the tokenizer adds one), cut into windows of max_seq_length; nothing
is lost. A chat is rendered with the model's own template and tokenized as transformers does (the template brings its
own BOS), cut at the right if it is too long, and counted if so. A base model without a template gets PLAIN_TEMPLATE.

Which tokens of a chat are the assistant's is found by experiment, whatever the template does to earlier turns, white
space or system prompts: render the chat twice, once with a turn's content replaced by a mark that occurs in no text.
What differs is that turn. Before it the span reaches back to the header that add_generation_prompt writes, behind it
over the text that ends a turn, up to the first special token: so what is learnt is exactly what the model has to say
by itself.

What it gives up: time, as each assistant turn is a render of the whole chat (a question and an answer take
0.4 ms in all).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from qmica import samples, templates
from qmica.config import DataConfig, TrainingConfig
from qmica.errors import QmicaError
from qmica.packing import REPLAY_DRAWS, Epoch, Examples, batches, draw_replay, replay_tokens, split, window_lengths
from qmica.records import Document, read

CHUNK = 1 << 18  # characters tokenized at once: 30 MB of text take 0.2 GB; in one piece 6.1 GB, in the same time
CONTEXT = 64  # characters around a chunk, so that its first and last words are split as they are in the whole text
LINE_START = re.compile(r"(?<=\n)(?=\S)")  # every pre-tokenizer in use splits here; _encode_chunk checks that it did
WORD_START = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
MARK = "\ue0a7\ue0b8\ue0c9"  # private use characters: in no text, kept by trim and escape filters
# For models without a chat template. {bos} is "{{ bos_token }}" where the tokenizer begins a text with BOS, else "".
PLAIN_TEMPLATE = (
    "{bos}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### User:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Summary:
    """What the data was understood as."""

    formats: tuple[str, ...]
    documents: int  # for training and validation
    tokens: int
    supervised: int
    examples: int  # windows of texts and chats
    truncated: int  # chats cut at max_seq_length
    dropped: int  # documents left out: no supervised token (left)
    validation_documents: int
    validation_tokens: int
    replay_tokens: int  # an epoch
    replay_share: float  # of an epoch's tokens
    replay_available: int  # tokens the replay text has

    def lines(self) -> list[str]:
        """The summary as sentences for people."""
        lines = [
            f"{self.documents:,} document(s) of format {', '.join(self.formats)}: {self.tokens:,} tokens, "
            f"{self.supervised:,} of them learnt, in {self.examples:,} example(s)"
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} chat(s) were longer than --max-seq-length: their ends are cut off")
        if self.dropped:
            lines.append(f"{self.dropped:,} document(s) left out: no token to learn within --max-seq-length")
        if self.validation_documents:
            kept = f"{self.validation_documents:,} document(s), {self.validation_tokens:,} tokens"
            lines.append(f"validation: {kept}, kept from training")
        if self.replay_tokens:
            lines.append(
                f"replay: {self.replay_tokens:,} tokens an epoch, {self.replay_share:.1%} of all, "
                f"from {self.replay_available:,}"
            )
        return lines


@dataclass(frozen=True)
class Prepared:
    train: Examples
    validation: Examples | None
    replay: Examples | None
    summary: Summary


# --- chats


def _special_tokens(tokenizer) -> list[str]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    begins = {tokenizer.bos_token} - {tokenizer.eos_token}  # Granite and OLMo 2 end with what they begin with
    return [token for token in {*tokenizer.all_special_tokens, *added} - begins if token]


def beginning(tokenizer) -> list[int]:
    """The ids this tokenizer puts before a text: [BOS], or nothing."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(alone)] == alone), [])


def chat_template(tokenizer) -> str:
    """The tokenizer's own chat template, or PLAIN_TEMPLATE."""
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    bos, eos = ("{{ bos_token }}" if beginning(tokenizer) else ""), ("eos_token" if tokenizer.eos_token else "''")
    return PLAIN_TEMPLATE.replace("{bos}", bos).replace("eos_token", eos)


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning, by halving (a loop over characters is 50 times slower)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


class ChatEncoder:
    """Chats -> token ids and which of them are the assistant's.

    header: what add_generation_prompt writes ("<|im_start|>assistant\\n"; "" for Llama 2); ending: what ends an answer,
    up to and with its special token ("<|im_end|>", Llama 2: " </s>"). Both are read off the template once.
    """

    def __init__(self, tokenizer, mask_prompt: bool = True):
        self.tokenizer, self.mask_prompt, self.template = tokenizer, mask_prompt, chat_template(tokenizer)
        asked = ({"role": "user", "content": "x"},)
        probe = "the chat template of this model, on a question and an answer"
        bare, prompt = self.render(asked, probe), self.render(asked, probe, add_generation_prompt=True)
        self.header = prompt[len(bare) :] if prompt.startswith(bare) and prompt[len(bare) :].strip() else ""
        tail = self.render((*asked, {"role": "assistant", "content": MARK}), probe).partition(MARK)[2]
        ends = [tail.index(token) + len(token) for token in _special_tokens(tokenizer) if token in tail]
        self.ending = tail[: min(ends, default=len(tail))]

    def render(self, messages: Sequence[dict], where: str, **options) -> str:
        """The chat as text. QmicaError: the template refuses it (roles that do not alternate, a system prompt)."""
        try:  # date_string: Llama 3's templates would otherwise write today's date into the data
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, date_string="26 Jul 2024", **options
            )
        except templates.ERRORS as error:
            why = templates.reason(error)
            raise QmicaError(f"{where}: the model's chat template refuses it ({why}): correct the record") from error

    def spans(self, document: Document, text: str) -> list[tuple[int, int]]:
        """(start, stop) characters of `text` (the rendered chat) that the assistant says, turn by turn."""
        spans: list[tuple[int, int]] = []
        for turn in (i for i, wanted in enumerate(document.learn) if wanted):
            region = self._region(document, text, turn)
            if region is not None:  # else the template leaves this turn out
                start = self._start(document, text, turn, region[0], spans[-1][1] if spans else 0)
                ending = len(self.ending) if text.startswith(self.ending, region[1]) else 0
                spans.append((start, region[1] + ending))
        return spans

    def _region(self, document: Document, text: str, turn: int) -> tuple[int, int] | None:
        """Where `text` changes with the content of message `turn`; None if it does not."""
        messages = list(document.messages)
        messages[turn] = {**messages[turn], "content": MARK}
        marked = self.render(messages, document.where)
        if marked.count(MARK) > 1:
            raise QmicaError(f"{document.where}: the chat template writes a turn twice: use --no-mask-prompt")
        if MARK not in marked:
            return None
        start = _common(text, marked)
        return start, len(text) - min(_common(text[::-1], marked[::-1]), len(text) - start)

    def _start(self, document: Document, text: str, turn: int, start: int, floor: int) -> int:
        """Where the model takes over: behind the header, if it is this turn's; else at the content with its space."""
        if not self.header:  # "[/INST] answer": the model has to say the space
            return max(floor, len(text[:start].rstrip(" ")))
        header = text.rfind(self.header, floor, start)
        after = header + len(self.header)
        if header < 0 or after == start:
            return start
        # Qwen3 writes an empty <think> block between header and content; DeepSeek another header, seen in earlier turns
        previous = self._region(document, text, turn - 1) if turn else (0, 0)
        return after if previous is not None and previous[1] <= header else start

    def encode(self, documents: Sequence[Document]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each chat its ids (tokens,) int32 and which to learn (tokens,) bool: all, without mask_prompt."""
        texts = [self.render(document.messages, document.where) for document in documents]
        out = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(out["input_ids"], out["offset_mapping"], strict=True)
        results = []
        for document, text, (ids, offsets) in zip(documents, texts, pairs, strict=True):
            mask = np.full(len(ids), not self.mask_prompt)
            first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
            for start, stop in self.spans(document, text) if self.mask_prompt else ():
                mask |= (first < stop) & (np.maximum(last, first + 1) > start)
            results.append((np.array(ids, dtype=np.int32), mask))
        return results


# --- texts


def _cuts(text: str) -> list[int]:
    """0, then places about CHUNK characters apart where any tokenizer starts a new word, then len(text)."""
    cuts = [0]
    while len(text) - cuts[-1] > 2 * CHUNK:
        at = cuts[-1] + CHUNK
        found = LINE_START.search(text, at, at + CHUNK) or WORD_START.search(text, at)
        if found is None:
            break
        cuts.append(found.start())
    return [*cuts, len(text)]


def _encode_chunk(tokenizer, text: str, start: int, stop: int) -> np.ndarray | None:
    """The ids of text[start:stop] as they are within `text`, or None where a token reaches over a border."""
    left, right = max(0, start - CONTEXT), min(len(text), stop + CONTEXT)
    encoding = tokenizer(text[left:right], add_special_tokens=False, verbose=False).encodings[0]
    begin = 0 if start == 0 else _token_at(encoding, start - left)
    end = len(encoding.ids) if stop == len(text) else _token_at(encoding, stop - left)
    return None if begin is None or end is None else np.array(encoding.ids[begin:end], dtype=np.int32)


def _token_at(encoding, char: int) -> int | None:
    """The index of the token that begins at `char`, or None where one reaches over it."""
    token = encoding.char_to_token(char)
    if token is None:  # byte-level tokenizers with trim_offsets count a word's space as nothing
        token = encoding.char_to_token(char + 1)
    return None if token is None or encoding.token_to_chars(token)[0] < char else token


def encode_text(tokenizer, text: str) -> np.ndarray:
    """Ids (tokens,) int32 of a text of any size, no special tokens added; those of the text in one piece."""
    cuts = _cuts(text)
    chunks = [_encode_chunk(tokenizer, text, *border) for border in pairwise(cuts)] if len(cuts) > 2 else [None]
    if any(chunk is None for chunk in chunks):
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
    return np.concatenate(chunks)


# --- documents -> examples


@dataclass
class _Builder:
    """Collects examples; counts what happens on the way."""

    max_seq_length: int
    window: int  # of a text
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    formats: dict[str, None] = field(default_factory=dict)
    count: int = 0
    truncated: int = 0
    dropped: int = 0
    masked_tokens: int = 0

    def add(self, document: Document, ids: np.ndarray, mask: np.ndarray) -> None:
        self.formats[document.format] = None
        if document.text is None:
            self.truncated += len(ids) > self.max_seq_length
            ids, mask = ids[: self.max_seq_length], mask[: self.max_seq_length]
        lengths = window_lengths(len(ids), self.window if document.text is not None else self.max_seq_length)
        mask[np.cumsum([0, *lengths[:-1]])[: len(lengths)]] = False
        if not mask.any():
            self.dropped += 1
            self.masked_tokens += len(ids)
            return
        self.ids.append(ids)
        self.masks.append(mask)
        self.lengths += lengths
        self.documents += [self.count] * len(lengths)
        self.count += 1

    def examples(self) -> Examples:
        if not self.ids:
            raise QmicaError(
                f"all tokens are masked: none of the {self.masked_tokens:,} tokens of {self.dropped} document(s) "
                f"is to be learnt within --max-seq-length {self.max_seq_length}: raise it, or use --no-mask-prompt"
            )
        starts = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        documents = np.array(self.documents, dtype=np.int32)
        return Examples(np.concatenate(self.ids), np.concatenate(self.masks), starts, documents)


def _groups(documents: Iterable[Document], count: int = 256) -> Iterator[list[Document]]:
    """Neighbours of one kind, up to `count` documents or CHUNK characters: `tokenizers` encodes them in parallel."""
    group: list[Document] = []
    size = 0
    for document in documents:
        chars = len(document.text or "") + sum(len(m["content"]) for m in document.messages)
        other_kind = group and (group[0].text is None) != (document.text is None)
        if group and (other_kind or len(group) == count or size + chars > CHUNK):
            yield group
            group, size = [], 0
        group.append(document)
        size += chars
    if group:
        yield group


def _encode_texts(tokenizer, group: list[Document], begin: list[int], end: list[int]) -> Iterator[np.ndarray]:
    if len(group) == 1:
        encoded: Iterable = [encode_text(tokenizer, group[0].text)]
    else:
        encoded = tokenizer([d.text for d in group], add_special_tokens=False, verbose=False)["input_ids"]
    for ids in encoded:
        before = [] if list(ids[: len(begin)]) == begin else begin  # the text may bring its own BOS or EOS
        after = [] if list(ids[-1:]) == end else end
        yield np.concatenate([np.array(part, dtype=np.int32) for part in (before, ids, after)])


def _build(documents: Iterable[Document], tokenizer, builder: _Builder, mask_prompt: bool, say: Callable) -> Examples:
    begin, end = beginning(tokenizer), [i for i in (tokenizer.eos_token_id,) if i is not None]
    chats: ChatEncoder | None = None
    for group in _groups(documents):
        if group[0].text is not None:
            encoded = ((ids, np.ones(len(ids), bool)) for ids in _encode_texts(tokenizer, group, begin, end))
        else:
            chats = chats or _chat_encoder(tokenizer, mask_prompt, say)
            encoded = chats.encode(group)
        for document, (ids, mask) in zip(group, encoded, strict=True):
            builder.add(document, ids, mask)
    return builder.examples()


def _chat_encoder(tokenizer, mask_prompt: bool, say: Callable) -> ChatEncoder:
    if not tokenizer.chat_template:
        say("this model has no chat template: chats are written as '### User:' and '### Assistant:', ended by EOS")
    return ChatEncoder(tokenizer, mask_prompt)


def _replay_window(train: Examples, ratio: float, max_seq_length: int, packing: bool) -> int:
    """Tokens of a window of replay: a row, or the share of one that a row's data leaves free, so that updates see both.

    No more than gives an epoch REPLAY_DRAWS windows, and no fewer than 32, below which a context says little.
    """
    share = round(ratio * max_seq_length)
    beside = packing and np.median(train.lengths) <= max_seq_length - share
    most = round(replay_tokens(train, ratio) / REPLAY_DRAWS)
    return min(max_seq_length, max(32, min(share if beside else max_seq_length, most)))


def prepare(
    data,
    tokenizer,
    *,
    max_seq_length: int,
    format: str = "auto",
    packing: bool = True,
    mask_prompt: bool = True,
    val_split: float = 0.0,
    replay: Sequence[str] | str = (),
    replay_ratio: float = 0.0,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Prepared:
    """Read, tokenize, cut and split everything a run learns from.

    data, replay: files, folders, hub datasets (see records.read); replay_ratio: replay's share of all tokens, below 1.
    QmicaError: a record cannot be used, all tokens are masked, or there is no second document for --val-split.
    """
    builder = _Builder(max_seq_length, max_seq_length)
    train = _build(read(data, format), tokenizer, builder, mask_prompt, say)
    everything, validation, general, drawn = train, None, None, 0
    if val_split:
        train, validation = split(train, val_split, seed)
    if replay and replay_ratio:
        target = replay_tokens(train, replay_ratio)
        window = _replay_window(train, replay_ratio, max_seq_length, packing)
        general = _build(read(replay), tokenizer, _Builder(max_seq_length, window), mask_prompt, say)
        drawn = int(general.lengths[draw_replay(general, target, seed, 0)].sum())
    summary = Summary(
        formats=tuple(builder.formats),
        documents=builder.count,
        tokens=len(everything.ids),
        supervised=int(everything.supervised.sum()),
        examples=len(everything),
        truncated=builder.truncated,
        dropped=builder.dropped,
        validation_documents=len(np.unique(validation.documents)) if validation else 0,
        validation_tokens=len(validation.ids) if validation else 0,
        replay_tokens=drawn,
        replay_share=drawn / (drawn + len(train.ids)),
        replay_available=len(general.ids) if general else 0,
    )
    return Prepared(train, validation, general, summary)


def prepare_for(options: DataConfig, tokenizer, seed: int, say: Callable[[str], None] = print) -> Prepared:
    """What a run's options name, the bundled almanac where they name nothing. Raises QmicaError as `prepare`."""
    return prepare(
        options.data or samples.ALMANAC,
        tokenizer,
        max_seq_length=options.max_seq_length,
        format=options.format,
        packing=options.packing,
        mask_prompt=options.mask_prompt,
        val_split=options.val_split,
        replay=samples.REPLAY if options.replay == ("sample",) else options.replay,
        replay_ratio=options.replay_ratio,
        seed=seed,
        say=say,
    )


def epoch(prepared: Prepared, options: DataConfig, training: TrainingConfig, number: int = 0) -> Epoch:
    """The batches of one epoch, a function of the seed and its number."""
    return batches(
        prepared.train,
        seed=training.seed,
        epoch=number,
        batch_size=training.batch_size,
        max_seq_length=options.max_seq_length,
        packing=options.packing,
        replay=prepared.replay,
        replay_ratio=options.replay_ratio if prepared.replay else 0.0,
    )
