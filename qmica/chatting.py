"""Talk to a GGUF in llama.cpp, or to a run in transformers: one prompt, or a conversation.

How: both are a stream of pieces of text for a list of messages; the loop around them is the same. Ctrl-C stops an
answer, at the prompt it ends the program. A model without a chat template goes on with the text it is given, and so
does any model with `raw`. torch and transformers (seconds to import) are met only where a run is opened.

What it gives up: several conversations at once, and a cache across turns in transformers (llama.cpp keeps its own).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from qmica.config import ChatConfig
from qmica.errors import QmicaError
from qmica.gguf_file import GGUFFile, is_gguf
from qmica.llamacpp import Llama

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, str]]
Answer = Callable[[Messages], Iterator[str]]
HINT = "Ctrl-D ends the conversation, Ctrl-C an answer."


def chat(target: str | None = None, config: ChatConfig = ChatConfig()) -> None:
    """Answer config.prompt, or hold a conversation on the terminal. target: a GGUF file, or a run (None: the newest).

    Raises QmicaError where the target is neither.
    """
    with ExitStack() as stack:
        answer = _open(target, config, stack)
        messages: Messages = [{"role": "system", "content": config.system}] if config.system else []
        if config.prompt is not None:
            _say(answer([*messages, {"role": "user", "content": config.prompt}]))
            return
        print(HINT)
        _converse(answer, messages)


def _open(target: str | None, config: ChatConfig, stack: ExitStack) -> Answer:
    """The way to answer for a target."""
    path = Path(target) if target else None
    if path is not None and path.is_file():
        if not is_gguf(path):
            raise QmicaError(f"{path} is not a GGUF file: give a .gguf, a run folder, or nothing for the newest run")
        GGUFFile.open(path)  # a projector or an adapter is said to be one before llama.cpp meets it
        if config.adapter and config.adapter.is_file():
            GGUFFile.open(config.adapter, adapter=True)
        if config.scale != 1 and not config.adapter:
            raise QmicaError(
                f"--scale {config.scale:g} is for a run, or for --adapter: what is merged into {path} stays as it is; "
                "export the run again with --scale"
            )
        adapters = [(config.adapter, config.scale)] if config.adapter else []
        llama = Llama(path, adapters, context=config.ctx, threads=config.threads, exact=False)
        return _llama_answers(stack.enter_context(llama), config)
    if path is not None and path.suffix.lower() == ".gguf" and not path.exists():
        raise QmicaError(f"{path} does not exist: give a .gguf, a run folder, or nothing for the newest run")
    if config.adapter:
        raise QmicaError("--adapter is for a GGUF file: a run brings its own adapter")
    import torch

    from qmica import adapter, runs

    if config.threads:
        torch.set_num_threads(config.threads)
    return _transformers_answers(*adapter.open_run(runs.find(target), scale=config.scale), config)


def _llama_answers(llama: Llama, config: ChatConfig) -> Answer:
    def answer(messages: Messages) -> Iterator[str]:
        if config.raw or not llama.has_chat_template:
            prompt = llama.tokenize(_plain_text(messages), add_bos=True)
        else:
            prompt = llama.chat_tokens(messages)
        ids = llama.generate(prompt, max_tokens=config.max_tokens, temperature=config.temp, seed=config.seed)
        return llama.pieces(ids)

    return answer


def _transformers_answers(network: torch.nn.Module, tokens, config: ChatConfig) -> Answer:
    """Generation in a thread beside the one that prints, as transformers' streamer wants it."""
    import torch
    from transformers import TextIteratorStreamer

    from qmica import tokenizer

    ends = sorted(tokenizer.end_of_turn_ids(tokens, network.generation_config))
    sampling = {"do_sample": True, "temperature": config.temp} if config.temp > 0 else {"do_sample": False}

    def answer(messages: Messages) -> Iterator[str]:
        torch.manual_seed(config.seed)
        ids = _prompt_ids(tokens, messages, config.raw).to(network.device)
        if ids.shape[1] > config.ctx:
            raise QmicaError(
                f"{ids.shape[1]} tokens do not fit into the context of {config.ctx}: shorten the text or raise --ctx"
            )
        streamer = TextIteratorStreamer(tokens, skip_prompt=True, skip_special_tokens=True)
        room = max(1, min(config.max_tokens, config.ctx - ids.shape[1]))
        stopped = threading.Event()
        arguments = {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": room,
            "eos_token_id": ends,
            "pad_token_id": 0,
            "streamer": streamer,
            "stopping_criteria": [lambda ids, scores: torch.full((len(ids),), stopped.is_set(), device=ids.device)],
        }
        return _streamed(network, arguments | sampling, streamer, stopped)

    return answer


def _streamed(network, arguments: dict, streamer, stopped: threading.Event) -> Iterator[str]:
    """The streamer's pieces; what the generating thread raises is raised here; closing the iterator stops it."""
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            network.generate(**arguments)
        except BaseException as error:
            failures.append(error)
            streamer.end()

    worker = threading.Thread(target=generate, daemon=True)
    worker.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        worker.join()
    if failures:
        raise failures[0]


def _plain_text(messages: Messages) -> str:
    """What is gone on with where no chat template is used: the last turn, behind the system message if there is one."""
    system = [message["content"] for message in messages[:1] if message["role"] == "system"]
    return "\n\n".join([*system, messages[-1]["content"]])


def _prompt_ids(tokens, messages: Messages, raw: bool = False) -> torch.Tensor:
    if raw or not tokens.chat_template:
        return tokens(_plain_text(messages), return_tensors="pt")["input_ids"]
    return tokens.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def _say(pieces: Iterator[str]) -> str:
    """Print pieces as they come; Ctrl-C ends them. The whole text."""
    said = []
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]", end="")
    print()
    return "".join(said)


def _converse(answer: Answer, messages: Messages) -> None:
    """Turns until the end of input."""
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": _say(answer(messages))})
        except QmicaError as error:  # too long a question must not cost the conversation
            messages.pop()
            print(error)
