"""What Ollama does with a Modelfile, for the tests: its grammar, and the part of Go's template language that is used.

Strict: whatever is not known here is a ValueError, so that a test that passes has not skipped anything. `render` was
compared with Go's own text/template (1.27) on every template and conversation of test_ollama.py; where a `go` is on the
PATH, a test there does it again. Sources: text/template's documentation; Ollama's parser/parser.go (a value goes to the
end of its line, in quotes or three quotes further) and template/template.go (`Execute`, `collate`).
"""

import re
from collections.abc import Mapping, Sequence

COMMANDS = {"from", "parameter", "template", "system", "adapter", "license", "message"}
PARAMETERS = {
    "num_ctx": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repeat_penalty": float,
    "stop": str,
}


# ---- a Modelfile


def parse_modelfile(text: str) -> dict:
    """{"from": path, "template": text, "stop": [texts], "num_ctx": n, ...}. ValueError for what Ollama would refuse."""
    found: dict = {"stop": []}
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest[0] == "#":
            rest = rest.partition("\n")[2]
            continue
        word, rest = re.match(r"([A-Za-z]*)(.*)", rest, re.DOTALL).groups()
        name = word.lower()
        if name not in COMMANDS or not rest[:1].isspace():
            raise ValueError(f"no command: {word!r} before {rest[:20]!r}")
        if name == "parameter":
            name, rest = re.match(r"\s([a-z_0-9]+)(.*)", rest, re.DOTALL).groups()
            if name not in PARAMETERS:
                raise ValueError(f"no parameter: {name}")
        value, rest = _value(rest[1:])
        if name == "stop":
            found["stop"].append(value)
        elif name in found:
            raise ValueError(f"{name} stands twice")
        else:
            found[name] = PARAMETERS.get(name, str)(value)
    if "from" not in found:
        raise ValueError("no FROM line")
    return found


def _value(rest: str) -> tuple[str, str]:
    """A value and what follows it: it ends at the first line's end at which its quotes are closed."""
    for end in (*(match.start() for match in re.finditer("\n", rest)), len(rest)):
        said = rest[:end].strip(" \t\r\n")
        for quote in ('"""', '"'):
            if said.startswith(quote):
                if len(said) >= 2 * len(quote) and said.endswith(quote):
                    return said[len(quote) : -len(quote)], rest[end:]
                break
        else:
            return said, rest[end:]
    raise ValueError(f"quotes are not closed: {rest[:40]!r}")


# ---- a template


def tokens(template: str) -> list[tuple[str, str]]:
    """("text", …) and ("action", …) in order, trimmed as the dashes say."""
    parts, at, trim = [], 0, False
    for match in re.finditer(r"\{\{(- )?(.*?)( -)?\}\}", template, re.DOTALL):
        text = template[at : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if match[1] else text
        parts += [("text", text)] if text else []
        parts.append(("action", match[2].strip()))
        at, trim = match.end(), bool(match[3])
    rest = template[at:].lstrip(" \t\r\n") if trim else template[at:]
    if any("{{" in text or "}}" in text for kind, text in [*parts, ("text", rest)] if kind == "text"):
        raise ValueError(f"an action is not closed: {template!r}")
    return parts + ([("text", rest)] if rest else [])


_WORD = re.compile(r'\s*(?:(\()|(\))|("[^"\\]*")|(\d+)|(\$\w*(?:\.\w+)*)|(\.\w+(?:\.\w+)*)|([a-z]+))')


def expression(text: str):
    """A pipeline as nested lists: [function, argument, …], or a leaf (kind, value)."""
    words, at = [], 0
    while text[at:].strip():
        match = _WORD.match(text, at)
        if not match:
            raise ValueError(f"what is this: {text[at:]!r}")
        words.append((match.lastindex, match[match.lastindex]))
        at = match.end()
    made = _operands(words)
    if words:
        raise ValueError(f"too many brackets: {text!r}")
    return made[0] if len(made) == 1 else made


def _operands(words: list) -> list:
    out = []
    while words:
        kind, word = words.pop(0)
        if kind == 2:
            words.insert(0, (2, word))
            break
        if kind == 1:
            inner = _operands(words)
            if not words or words.pop(0)[0] != 2:
                raise ValueError("a bracket is not closed")
            out.append(inner[0] if len(inner) == 1 and isinstance(inner[0], list) else inner)
        else:
            out.append((kind, word))
    if not out:
        raise ValueError("nothing to evaluate")
    return out


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
    "and": lambda a, b: b if a else a,
    "or": lambda a, b: a if a else b,
    "len": len,
    "slice": lambda a, i: a[i:],
}


def evaluate(tree, dot, variables: Mapping):
    if isinstance(tree, list):
        (kind, name), *arguments = tree
        if kind != 7 or name not in FUNCTIONS:
            raise ValueError(f"no function: {name}")
        return FUNCTIONS[name](*(evaluate(argument, dot, variables) for argument in arguments))
    kind, word = tree
    if kind == 3:
        return word[1:-1]
    if kind == 4:
        return int(word)
    if kind == 7:
        raise ValueError(f"a function without arguments, or no word of the language: {word}")
    base, *path = word.split(".")
    value = variables[base] if base else dot
    for field in path:
        if isinstance(value, list):
            raise ValueError(f"{word}: a list has no fields")
        value = value[field]  # KeyError for a field that Ollama does not give
    return value


def render(template: str, values: Mapping) -> str:
    """The template's text for these values. ValueError or KeyError for anything that is not known here."""
    parts = tokens(template)
    out = _render(parts, values, {"$": values})
    if parts:
        raise ValueError(f"{parts[0][1]}: an end too many")
    return out


def _block(parts: list) -> tuple[list, str]:
    """The parts up to the next else or end of this level, and which of them it is."""
    inside, depth = [], 0
    while parts:
        kind, text = parts.pop(0)
        if kind == "action" and depth == 0 and (text == "end" or text.split()[0] == "else"):
            return inside, text
        if kind == "action":
            depth += text.split()[0] in ("if", "range")
            depth -= text == "end"
        inside.append((kind, text))
    raise ValueError("an end is missing")


def _render(parts: list, dot, variables: dict) -> str:
    out, variables = "", dict(variables)
    while parts:
        kind, text = parts.pop(0)
        if kind == "text":
            out += text
            continue
        word, _, rest = text.partition(" ")
        if word == "if":
            out += _render_if(rest, parts, dot, variables)
        elif word == "range":
            out += _render_range(rest, parts, dot, variables)
        elif match := re.fullmatch(r"(\$\w+) := (.+)", text):
            variables[match[1]] = evaluate(expression(match[2]), dot, variables)
        elif word in ("else", "end", "with", "template", "define", "block", "break", "continue"):
            raise ValueError(f"not here, or not known: {text}")
        else:
            value = evaluate(expression(text), dot, variables)
            if not isinstance(value, str):
                raise ValueError(f"{text} is no text: {value!r}")
            out += value
    return out


def _render_if(condition: str, parts: list, dot, variables: Mapping) -> str:
    out, taken = "", False
    while True:
        inside, border = _block(parts)
        if not taken and (condition is None or evaluate(expression(condition), dot, variables)):
            out, taken = _render(inside, dot, variables), True
        if border == "end":
            return out
        if condition is None:
            raise ValueError("an else after the else")
        condition = border.removeprefix("else").strip().removeprefix("if ").strip() or None


def _render_range(head: str, parts: list, dot, variables: Mapping) -> str:
    match = re.fullmatch(r"(\$\w+), (\$\w+) := (.+)", head)
    if not match:
        raise ValueError(f"range is known with two variables only: {head}")
    inside, border = _block(parts)
    if border != "end":
        raise ValueError("range with else")
    items = evaluate(expression(match[3]), dot, variables)
    return "".join(
        _render(list(inside), item, {**variables, match[1]: i, match[2]: item}) for i, item in enumerate(items)
    )


# ---- as Ollama calls it


def values(messages: Sequence[Mapping[str, str]], system: str = "") -> dict:
    """What a template is given for a chat: Ollama puts the Modelfile's SYSTEM before messages that begin with none, and
    joins messages of one role that follow each other."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    joined: list[dict] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"], "Thinking": ""})
    systems = [message["content"] for message in messages if message["role"] == "system"]
    return {"System": "\n\n".join(systems), "Messages": joined, "Response": "", "Think": False}


def prompt(modelfile: Mapping, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that Ollama gives the model for a chat, BOS not counted."""
    return render(modelfile["template"], values(messages, modelfile.get("system", "")))
