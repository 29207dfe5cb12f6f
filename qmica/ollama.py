"""A Modelfile for Ollama: FROM, ADAPTER, TEMPLATE in Go's template language, SYSTEM, every stop token, parameters.

How: Ollama does not run a model's Jinja chat template. So the template is asked: conversations of marked contents are
rendered with it, what stands between the contents becomes a `Turns` (what is written before and after a system, user
and assistant message, and where a system message goes), and the same conversations in that form must give the very
text that the Jinja template gives, else the template counts as unknown. A `Turns` is written as a Go template. So a
family is known by what its template does, whatever it is called: chatml, Llama 2 and 3, Mistral, Zephyr, Gemma, Phi-3,
Granite, Qwen3, SmolLM3 and OLMo 2 are of this form (and 64 of the 68 templates that llama.cpp keeps for its tests).

What it gives up: tools, and what a template computes from the clock: today's date is written as the date of the export.

Sources: Ollama's parser/parser.go (the grammar: a value goes to the end of its line, or from three quotes to three),
docs/modelfile.md and template/template.go (what a template is given, and that the runner puts BOS before it).
"""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from jinja2 import TemplateError

from qmica import data, source, templates, tokenizer
from qmica.errors import QmicaError

MOST_CONTEXT = 8192  # tokens: the cache of a 7B model with 32 key-value heads takes 0.5 MB each
PLAIN = "{{ .Prompt }}"  # a base model: the text is gone on with
# generation_config.json's names -> Ollama's
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
THOUGHT = "<think>\n{}\n</think>\n\n"

# contents that no template changes (trimmed, they are the same) and that occur nowhere else
_SYSTEM, _USER, _ANSWER, _NEXT = "Sixpence", "Umbrella", "Albatross", "Nightjar"
Message = Mapping[str, str]
Render = Callable[[Sequence[Message]], str]  # a conversation as the Jinja template writes it, open for an answer


def _talk(*contents: str) -> list[dict[str, str]]:
    """Messages: a system one first if it is _SYSTEM, then user and assistant by turns."""
    roles = ["user", "assistant"] * len(contents)
    if contents[0] == _SYSTEM:
        roles.insert(0, "system")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


PROBES = (_talk(_USER), _talk(_USER, _ANSWER, _NEXT), _talk(_USER, _ANSWER, _NEXT, "Osprey", "Kite"))
WITH_SYSTEM = (
    _talk(_SYSTEM, _USER),
    _talk(_SYSTEM, _USER, _ANSWER, _NEXT),
    _talk(_SYSTEM, _USER, _ANSWER, _NEXT, "Osprey", "Kite"),
)


# ---- a chat format


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the contents of messages: (before, after) each.

    start: before everything. opening: before the first turn where there is no system message. answer: what opens the
    answer to come. place: of a system message, its own "turn", or the "first" or "last" user's. default: the system
    message where none is given. hides_thoughts: earlier answers lose their <think> block.
    """

    start: str
    opening: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    place: str = "turn"
    default: str = ""
    hides_thoughts: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as the model is to see it, open for an answer: what `template` renders in Ollama."""
        system = next((m["content"] for m in messages if m["role"] == "system"), "")
        if not system and self.default:
            return self.render([{"role": "system", "content": self.default}, *messages])
        out = self.start + ("" if system else self.opening)
        for i, message in enumerate(messages):
            before, after = getattr(self, message["role"])
            last = i == len(messages) - 1
            if message["role"] == "system" and self.place == "last":
                continue
            if message["role"] == "user" and self.place == "first" and i == 1 and system:
                before = ""
            if message["role"] == "user" and self.place == "last" and last and system:
                before += self.system[0] + system + self.system[1]
            out += before + message["content"]
            if message["role"] == "assistant" and last:
                return out
            out += after
        return out + self.answer

    def template(self) -> str:
        """The same in Go's template language, for Ollama's TEMPLATE."""
        user = self.user[0]
        if self.place == "first":
            user = _when("not (and (eq $i 1) $.System)", user)
        if self.place == "last":
            user += _when("and $last $.System", "{{ $.System }}".join(self.system))
        system = "" if self.place == "last" else "{{ .Content }}".join(self.system)
        before, after = self.assistant
        if self.hides_thoughts:  # so Ollama knows the tags, and takes thoughts out of what it keeps of an answer
            before += _when("and $last .Thinking", THOUGHT.format("{{ .Thinking }}"))
        lines = (
            self.start + _when("not .System", self.opening) + "{{ range $i, $_ := .Messages }}",
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{- if eq .Role "system" }}' + system,
            '{{- else if eq .Role "user" }}' + user + "{{ .Content }}" + self.user[1],
            '{{- else if eq .Role "assistant" }}' + before + "{{ .Content }}" + _when("not $last", after),
            "{{- end }}" + _when('and $last (ne .Role "assistant")', self.answer),
            "{{- end }}",
        )
        return _joined(lines)

    @property
    def writable(self) -> bool:
        """Whether a Modelfile and a Go template can hold all its pieces."""
        if any(mark in piece for piece in _texts(astuple(self)) for mark in ('"""', "{{")):
            return False
        whole = self.template()  # where two pieces meet, or a piece and an action
        return '"""' not in whole and "{{{" not in whole


def _when(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{text}{{{{ end }}}}" if text else ""


def _joined(lines: Iterable[str]) -> str:
    """Lines of a Go template whose ends are no text: a dash takes all white space before it, so it stands only where
    what is before it ends in none."""
    out = ""
    for line in lines:
        plain = line.replace("{{- ", "{{ ", 1)
        out += line if not out else plain if out[-1].isspace() else "\n" + line
    return out


def _texts(parts: Iterable) -> Iterator[str]:
    for part in parts:
        if isinstance(part, tuple):
            yield from part
        elif isinstance(part, str):
            yield part


# ---- recognizing it


def recognize(tokens, stops: Iterable[str] = (), template: str | None = None) -> Turns | None:
    """What a tokenizer's chat template does, as `Turns`; None where that form does not give the same text. stops: the
    texts that end a turn. template: one to use in place of its own. BOS is left out where Ollama puts it before every
    text itself.
    """
    bos = tokens.bos_token or ""
    adds_bos = bool(data.beginning(tokens))

    def rendered(messages: Sequence[Message]) -> str:
        text = tokens.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(bos) if adds_bos else text

    try:
        return _checked(rendered, bos, [stop for stop in stops if stop])
    except templates.ERRORS:
        return None  # a template is a program: Cohere's for tools cannot be rendered without tools, a TypeError


def _checked(rendered: Render, bos: str, stops: Sequence[str]) -> Turns | None:
    text = rendered(PROBES[1])
    found = _turns(rendered, bos if text.startswith(bos) and text.count(bos) == 1 else "", stops)
    given = [*PROBES, *(WITH_SYSTEM if _takes_system(rendered) else ())]
    same = found is not None and all(found.render(messages) == rendered(messages) for messages in given)
    return found if same and found.writable else None


def _takes_system(rendered: Render) -> bool:
    """Whether the template has a place for a system message: some raise an error, some leave it out."""
    try:
        return _SYSTEM in rendered(WITH_SYSTEM[0])
    except TemplateError:
        return False


def _turns(rendered: Render, start: str, stops: Sequence[str]) -> Turns | None:
    """The pieces of a chat format, read off what stands between the contents of two conversations."""
    plain = _gaps(rendered(PROBES[1]), (_USER, _ANSWER, _NEXT))
    if plain is None:
        return None
    first, asked, answered, end = plain
    first = first.removeprefix(start)
    user = _after_stop(_common_end(first, answered), stops)
    closing = answered.removesuffix(user)
    close = _common_start(asked, end)  # Llama 2 answers behind a space that the prompt has not
    if closing and close.startswith(closing):  # both roles end their turns alike
        close = closing
    opening, answer = first.removesuffix(user), end.removeprefix(close)
    turns = Turns(start, opening, ("", ""), (user, close), (asked.removeprefix(close), closing), answer)
    turns = _with_system(turns, rendered)
    return turns and replace(turns, hides_thoughts=_hides_thoughts(rendered))


def _with_system(turns: Turns, rendered: Render) -> Turns | None:
    """The format with the place of a system message; one that the template does not take stands before the first
    user's text, as Google's own template for Gemma has it."""
    if not _takes_system(rendered):
        return replace(turns, system=(turns.user[0], "\n\n"), place="first")
    text, user = rendered(WITH_SYSTEM[1]), turns.user[0]
    gaps = _gaps(text, (_SYSTEM, _USER, _ANSWER, _NEXT))
    if gaps is None:
        gaps = _gaps(text, (_USER, _ANSWER, _SYSTEM, _NEXT))
        if gaps is None:
            return None
        before = gaps[2].removeprefix(turns.assistant[1]).removeprefix(user)
        return replace(turns, system=(before, gaps[3]), place="last")
    head, between = gaps[0].removeprefix(turns.start), gaps[1]
    own = between.endswith(user)
    system = (head, between.removesuffix(user) if own else between)
    turns = replace(turns, system=system, place="turn" if own else "first")
    default = turns.opening.removeprefix(system[0]).removesuffix(system[1])
    if own and default and turns.opening == default.join(system):
        return replace(turns, opening="", default=default)
    return turns


def _gaps(text: str, contents: Sequence[str]) -> list[str] | None:
    """What stands before, between and after the contents; None unless each is there once, in this order."""
    parts = re.split("|".join(map(re.escape, contents)), text)
    found = re.findall("|".join(map(re.escape, contents)), text)
    return parts if found == list(contents) else None


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _after_stop(text: str, stops: Sequence[str]) -> str:
    """The text behind the last end of a turn in it: that and the spaces after it belong to the turn before."""
    ends = [match.end() for stop in stops for match in re.finditer(re.escape(stop) + r"\s*", text)]
    return text[max(ends, default=0) :]


def _hides_thoughts(rendered: Render) -> bool:
    """Whether an earlier answer is shown without what it thought."""
    thought = THOUGHT.format("Wagtail") + _ANSWER
    text = rendered(_talk(_USER, thought, _NEXT))
    return "Wagtail" not in text and text == rendered(PROBES[1])


# ---- the file


def modelfile(
    model: str,
    tokens,
    context: int,
    generation: Mapping | None = None,
    adapter: str | None = None,
    chats: bool = False,
    notes: Sequence[str] = (),
) -> tuple[str, list[str]]:
    """The text of a Modelfile, and what there is to say about it, a line each.

    model, adapter: paths as FROM and ADAPTER take them, relative to the Modelfile or absolute; QmicaError for one that
    a line cannot hold. tokens: the model's tokenizer. context: the tokens that the model was made for. generation:
    generation_config.json. chats: whether a model without a chat template was taught chats, in the form that `data`
    gives them. notes: comments.
    """
    generation = dict(generation or {})
    stops = stop_texts(tokens, generation)
    held = [stop for stop in stops if _quotable(stop)]
    turns, said = None, []
    if chat := bool(tokens.chat_template) or chats:
        jinja = data.chat_template(tokens)
        turns = recognize(tokens, stops, jinja)
        said = _remarks(jinja, turns)
    template = turns and turns.template() if chat else PLAIN
    odd = [stop for stop in stops if stop not in held]
    said += [f"the stop text {repr(stop)[:80]} cannot stand in a Modelfile: it is left out" for stop in odd]
    lines = [*(f"# {' '.join(note.split())}" for note in notes), f"FROM {_path(model)}"]
    lines += [f"ADAPTER {_path(adapter)}"] if adapter else []
    lines += [f'TEMPLATE """{template}"""'] if template else []
    lines += [f'SYSTEM """{turns.default}"""'] if turns and turns.default else []
    lines += [f'PARAMETER stop "{stop}"' for stop in held]
    lines += [f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}"]
    sampled = generation.get("do_sample", False)
    chosen = {SAMPLING[key]: value for key, value in generation.items() if key in SAMPLING and _is_number(value)}
    lines += [f"PARAMETER {key} {value:g}" for key, value in chosen.items()] if sampled else []
    return "\n".join(lines) + "\n", said


def _quotable(text: str) -> bool:
    """Whether a text between quotes is one value for Ollama, and stops anything.

    A quote at a line's end would close it, and what follows would be commands; two at its start would open a text of
    three quotes; an empty text is in every answer, and half a character of UTF-8 in none.
    """
    closes = '"' in text and re.search(r"[\r\n]", text)
    return not (closes or text in ("", '"') or text.startswith('""') or "\ufffd" in text)


def _path(path: str) -> str:
    if re.search(r"[\r\n]", path) or path.startswith('"'):
        raise QmicaError(f"{path!r} cannot stand in a Modelfile (quotes, or more than a line): rename it")
    return path


def _is_number(value: object) -> bool:
    """Whether it is a finite number that needs no exponent, which Ollama's whole numbers do not take."""
    return type(value) in (int, float) and abs(value) < 1e6


def generation_settings(base: source.Source) -> dict:
    """generation_config.json of a source's folder; a GGUF has none."""
    path = Path(base.folder) / "generation_config.json"
    return source.read_json(path) if base.kind != "gguf" and path.is_file() else {}


def stop_texts(tokens, generation: Mapping | None = None) -> list[str]:
    """The text of every token that ends a turn or a text, by id."""
    ids = tokenizer.end_of_turn_ids(tokens) | {*tokenizer.known_ids((generation or {}).get("eos_token_id"))}
    return [text for id in sorted(ids) if (text := _written(tokens, id)) is not None]


def _written(tokens, id: int) -> str | None:
    """What stands in an answer where a token was generated; None where there is no such token."""
    text = tokens.convert_ids_to_tokens(id)
    if text is None or id in tokens.added_tokens_decoder:
        return text
    return tokens.decode([id])  # Ċ is how a byte-level vocabulary writes a newline


def _remarks(jinja: str, turns: Turns | None) -> list[str]:
    if turns is None:
        return [
            "the chat template is of a form that qmica cannot write for Ollama: the Modelfile has no TEMPLATE, and "
            "Ollama takes its own for this model, if it has one"
        ]
    if "strftime_now" in jinja:
        return ["the chat template writes today's date, which Ollama's cannot: the Modelfile has that of this export"]
    return []


def create_line(name: str, file: Path, tag: str | None = None) -> str:
    """The command that makes the model in Ollama, whose names have no spaces. file: the Modelfile."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "model"
    return f"ollama create {word}{f':{tag}' if tag else ''} -f {shlex.quote(str(file))}"
