"""What was learnt and what was forgotten: multiple choice and perplexity, base against tuned, in transformers and in
llama.cpp.

How: a question is put as text (`Question: … Answer:`), and each choice is scored by the mean log-probability of its
tokens after that prompt; the likeliest is the answer. In transformers a question is one row: the prompt once, then its
choices as branches that see the prompt and themselves (a 4-D mask, positions restarting after the prompt), which reads
a prompt of 17 tokens once in place of four times. In llama.cpp the same ids share the prompt's cache. Base and tuned
are one model with the adapter switched off and on.

What it gives up: chat templates, which at this size answer worse from what was learnt as text (measured: accuracy 0.28
against 0.41), and few-shot prompts.
"""

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qmica import adapter, allocator, data, loss, model, packing, quant, runs, samples, source, streaming, tokenizer
from qmica.config import EvalConfig, ModelConfig
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile
from qmica.llamacpp import Llama
from qmica.records import Question, read_questions

ROWS = 8  # questions at once in transformers
WINDOWS = 4  # windows of text at once: 2048 tokens share one dequantization of the weights
WORDS = 24  # tokens of a free answer


@dataclass(frozen=True)
class Scores:
    """What one model got. loss in nats a token; the shares are of the questions asked."""

    name: str
    loss: float | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    free: str | None = None  # right free answers, "9/20"


class InTransformers:
    """A transformers model that answers questions."""

    def __init__(self, network: nn.Module, tokens):
        self.network, self.tokens = network, tokens

    def prompt(self, question: str) -> list[int]:
        return self.tokens(plain_prompt(question))["input_ids"]

    def answer_ids(self, text: str) -> list[int]:
        return self.tokens(f" {text}", add_special_tokens=False)["input_ids"]

    def means(self, asked: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[list[float]]:
        for start in range(0, len(asked), ROWS):
            yield from branch_scores(self.network, asked[start : start + ROWS])

    @torch.no_grad()
    def words(self, prompts: Sequence[list[int]]) -> Iterator[str]:
        """All at once, padded on the left: a step dequantizes every weight once, however many rows it has."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.network.device)
        seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ends = sorted(tokenizer.end_of_turn_ids(self.tokens, self.network.generation_config))
        out = self.network.generate(
            ids,
            attention_mask=seen.to(ids.device),
            max_new_tokens=WORDS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        return (self.tokens.decode(row[longest:], skip_special_tokens=True) for row in out)


class InLlamaCpp:
    """A GGUF that answers questions in llama.cpp."""

    def __init__(self, llama: Llama):
        self.llama = llama

    def prompt(self, question: str) -> list[int]:
        return self.llama.tokenize(plain_prompt(question), special=False, add_bos=True)

    def answer_ids(self, text: str) -> list[int]:
        """Cut out of a text that ends as a prompt does: SentencePiece puts a second space before one that begins so."""
        before, whole = (self.llama.tokenize(part, special=False) for part in (":", f": {text}"))
        return whole[len(before) :]

    def means(self, asked: Sequence[tuple[list[int], list[list[int]]]]) -> Iterator[list[float]]:
        for prompt, answers in asked:
            yield [float(part.mean()) for part in self.llama.log_probabilities(prompt, answers)]

    def words(self, prompts: Sequence[list[int]]) -> Iterator[str]:
        for prompt in prompts:
            yield "".join(self.llama.pieces(self.llama.generate(prompt, max_tokens=WORDS)))


def plain_prompt(question: str) -> str:
    """How a question is put: as text to go on with, base and chat models alike (as lm-evaluation-harness does)."""
    return f"Question: {question}\nAnswer:"


@torch.no_grad()
def branch_scores(network: nn.Module, asked: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """The mean log-probability a token of each answer after its prompt, [question][answer]."""
    length = max(len(prompt) + sum(map(len, answers)) for prompt, answers in asked)
    ids = torch.zeros(len(asked), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(length, dtype=torch.bool).repeat(len(asked), 1, 1)  # (rows, query, key)
    spans = [_lay_out(row, prompt, answers, ids, positions, seen) for row, (prompt, answers) in enumerate(asked)]
    dtype = network.get_input_embeddings()(ids[:1, :1].to(network.device)).dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
    hidden = network.base_model(
        input_ids=ids.to(network.device),
        position_ids=positions.to(network.device),
        attention_mask=mask.to(network.device),
        use_cache=False,
    ).last_hidden_state
    chances = _log_probabilities(loss.Head.of(network), hidden, ids, spans)
    return [[next(chances).mean().item() for _ in row_spans] for row_spans in spans]


def _lay_out(row: int, prompt: list[int], answers: list[list[int]], ids, positions, seen) -> list[tuple[int, int, int]]:
    """Write one question into its row: the prompt, then each answer as a branch. (prompt length, start, stop) of
    each.
    """
    count = len(prompt)
    ids[row, :count] = torch.tensor(prompt)
    positions[row, :count] = torch.arange(count)
    seen[row, :count, :count] = torch.ones(count, count, dtype=torch.bool).tril()
    spans, at = [], count
    for answer in answers:
        stop = at + len(answer)
        ids[row, at:stop] = torch.tensor(answer)
        positions[row, at:stop] = torch.arange(count, count + len(answer))
        seen[row, at:stop, :count] = True
        seen[row, at:stop, at:stop] = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
        spans.append((count, at, stop))
        at = stop
    return spans


def _log_probabilities(head: loss.Head, hidden: torch.Tensor, ids: torch.Tensor, spans) -> Iterator[torch.Tensor]:
    """The log-probabilities of each branch's tokens, the first of them read off the prompt's last position. Branches
    share the calls of the head (asked for one each, it took 0.4 of an evaluation), a chunk of logits at a time.
    """
    flat = [(row, span) for row, row_spans in enumerate(spans) for span in row_spans]
    rows = [row for row, (_, start, stop) in flat for _ in range(start, stop)]
    sources = [at for _, (count, start, stop) in flat for at in (count - 1, *range(start, stop - 1))]
    targets = torch.cat([ids[row, start:stop] for row, (_, start, stop) in flat])
    states, chances = hidden[rows, sources], []
    for part in loss.chunks(len(states), head.vocabulary):
        said = head.logits(states[part]).log_softmax(-1)
        chances.append(said.gather(1, targets[part].to(said.device).unsqueeze(1)).squeeze(1).cpu())
    return iter(torch.cat(chances).split([stop - start for _, (_, start, stop) in flat]))


def accuracy(reader: InTransformers | InLlamaCpp, questions: Sequence[Question]) -> float:
    """The share of questions whose right choice scores highest (by mean log-probability a token)."""
    asked = [(reader.prompt(q.question), [reader.answer_ids(choice) for choice in q.choices]) for q in questions]
    right = 0
    for question, means in zip(questions, reader.means(asked), strict=True):
        right += max(range(len(means)), key=means.__getitem__) == question.answer
    return right / len(questions)


def free_answers(reader: InTransformers | InLlamaCpp, questions: Sequence[Question]) -> str:
    """How many questions are answered greedily with the exact value somewhere in the answer, as "9/20"."""
    said = reader.words([reader.prompt(question.question) for question in questions])
    right = sum(q.choices[q.answer].lower() in text.lower() for q, text in zip(questions, said, strict=True))
    return f"{right}/{len(questions)}"


# ---- the verb


def evaluate(
    run: str | None = None,
    config: EvalConfig = EvalConfig(),
    model_config: ModelConfig | None = None,
    as_json: bool = False,
) -> dict:
    """Measure a run's base and tuned model (model_config: a model alone), and GGUF files; print a table or JSON,
    return it.

    Raises QmicaError for a missing run, unusable data or questions.
    """
    say = (lambda text: None) if as_json else print
    allocator.keep_freed()
    if model_config is not None and config.scale != 1:
        raise QmicaError(f"--scale {config.scale:g} is for a run: a --model alone has no adapter")
    opened = runs.find(run) if model_config is None else None
    questions = _questions(config, opened)
    if config.gguf and not questions and not config.data:
        raise QmicaError(
            "--gguf asks a file questions, and there are none: give --questions FILE, or a text with --data"
        )
    files = [_gguf(spec) for spec in config.gguf]  # what is missing is said before a model is loaded
    network, tokens = _open(opened, model_config, config.scale, say)
    batches = _text(config, tokens, say)
    kinds = {"base": False, "tuned": True} if opened else {"base": False}
    rows = [_score_network(name, network, tuned, tokens, questions, batches, config) for name, tuned in kinds.items()]
    rows += [_score_gguf(file, extra, questions, batches if config.data else [], config) for file, extra in files]
    result = {
        "scores": [asdict(row) for row in rows],
        "questions": len(questions),
        "tokens": sum(b.supervised for b in batches),
        "scale": config.scale,
    }
    print(json.dumps(result, indent=2)) if as_json else _show(rows, result, opened)
    return result


def _open(
    opened: runs.Run | None, alone: ModelConfig | None, scale: float, say: Callable[[str], None]
) -> tuple[nn.Module, object]:
    """A run's model with its adapter (so much of it), or a model alone; and the tokenizer."""
    if opened is not None:
        network, tokens = adapter.open_run(opened, scale=scale)
        base = adapter.base_of(network)
        part = "" if scale == 1 else f", {scale:g} of the adapter"
        say(f"{opened.folder}: {base.id} {quant.FORMATS[base.bits].held}{part}")
        return network, tokens
    if alone.threads:
        torch.set_num_threads(alone.threads)
    found = source.resolve(alone.model, alone.revision, say)
    network = model.load(found, alone.bits, alone.dtype, alone.device, stream=alone.stream)
    return streaming.start(network, alone.stream), tokenizer.load(found)


def _questions(config: EvalConfig, opened: runs.Run | None) -> list[Question]:
    """The questions asked for; of a run that learnt the almanac, the almanac's."""
    learnt_sample = opened is not None and opened.config().get("train", {}).get("data") == []
    path = config.questions or (samples.QUESTIONS if learnt_sample else None)
    return read_questions(path)[: config.limit] if path else []


def _gguf(spec: Path) -> tuple[Path, Path | None]:
    """FILE or FILE+ADAPTER, both sound GGUFs of their sort."""
    file, _, extra = (str(spec), "", "") if spec.exists() else str(spec).partition("+")  # a name may have a + in it
    GGUFFile.open(file)
    if extra:
        GGUFFile.open(extra, adapter=True)
    return Path(file), Path(extra) if extra else None


def _text(config: EvalConfig, tokens, say: Callable[[str], None]) -> list[packing.Batch]:
    """Windows of the text whose perplexity is measured."""
    prepared = data.prepare(config.data or samples.GENERAL, tokens, max_seq_length=config.max_seq_length, say=say)
    windows = prepared.train
    if config.limit is not None:
        windows = windows.select(np.arange(len(windows)) < config.limit)
    return list(packing.batches(windows, seed=0, epoch=0, batch_size=WINDOWS, max_seq_length=config.max_seq_length))


def _score_network(name: str, network, tuned: bool, tokens, questions, batches, config: EvalConfig) -> Scores:
    with adapter.switched(network, tuned):
        mean = loss.mean_loss(network, (packing.to(batch, network.device) for batch in batches))
        reader = InTransformers(network, tokens)
        return Scores(name, mean, math.exp(mean), *_answers(reader, questions, config))


def _score_gguf(file: Path, extra: Path | None, questions, batches, config: EvalConfig) -> Scores:
    """A GGUF, or one with an adapter on it, asked in llama.cpp; of the text the very tokens that transformers read."""
    with Llama(file, [(extra, 1.0)] if extra else []) as llama:
        name = file.name + (f" + {extra.name}" if extra else "")
        mean = llama_loss(llama, batches) if batches else None
        return Scores(name, mean, mean and math.exp(mean), *_answers(InLlamaCpp(llama), questions, config))


def llama_loss(llama: Llama, batches: Sequence[packing.Batch]) -> float:
    """The mean cross entropy a supervised token over batches in llama.cpp, each document on its own."""
    total = count = 0
    for ids, learnt in itertools.chain.from_iterable(map(packing.documents, batches)):
        (chances,) = llama.log_probabilities(ids[:1], [ids[1:]])
        total -= chances[learnt[1:]].sum()
        count += sum(learnt)
    return float(total) / count


def _answers(reader, questions: list[Question], config: EvalConfig) -> tuple[float | None, str | None]:
    if not questions:
        return None, None
    return accuracy(reader, questions), free_answers(reader, questions[: config.free]) if config.free else None


def _show(rows: list[Scores], result: dict, opened: runs.Run | None) -> None:
    table = Table(box=None, pad_edge=False)
    titles = {"": "name", f"loss ({result['tokens']:,} tokens)": "loss", "perplexity": "perplexity"}
    if result["questions"]:
        titles |= {f"accuracy ({result['questions']} questions)": "accuracy"}
    if any(row.free for row in rows):
        titles |= {"free answers": "free"}
    for title in titles:
        table.add_column(title, justify="right" if title else "left")
    for row in rows:
        table.add_row(*(_cell(getattr(row, name)) for name in titles.values()))
    Console().print(table)
    if opened is not None:
        worse = rows[1].perplexity / rows[0].perplexity
        flags = f"{shlex.quote(str(opened.folder))}" + ("" if result["scale"] == 1 else f" --scale {result['scale']:g}")
        print(f"perplexity x {worse:.2f}; next: `qmica export {flags} --quant Q4_K_M`, `qmica chat {flags}`")


def _cell(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3f}"
