"""Chat templates: what they may use, how they are rendered without transformers, and what they can end in.

A chat template is a program in Jinja that comes with a model. It runs in jinja2's sandbox, which keeps it from files
and from Python's insides.

What it gives up: bounds on memory. jinja2 has none, and a template that doubles a string for long ends in Python's
MemoryError.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qmica.errors import QmicaError

MOST_CHARACTERS = 1 << 17  # jinja2 compiles so many in 1 s, and 1 MB in over a minute; the longest in use have 20,000
# What rendering can end in: any mistake of a template is raised as Python's own error; jinja2 makes Python of it, which
# may be a SyntaxError (loops within loops)
ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
ERRORS += (MemoryError, RecursionError, SyntaxError)


def reason(error: Exception) -> str:
    """What a template ended in, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def require_short(template: str) -> str:
    """The template; QmicaError for one that would take long to compile."""
    if len(template) > MOST_CHARACTERS:
        raise QmicaError(
            f"this model's chat template has {len(template):,} characters, and qmica takes up to {MOST_CHARACTERS:,}: "
            "no real one is so long; download the model again"
        )
    return template


def render(template: str, messages: Sequence[Mapping[str, str]], **special: str) -> str:
    """The messages in a template, open for the assistant's answer. special: `bos_token` and the like, as texts.

    Raises QmicaError for a template that is too long, and one of ERRORS where it does not take these messages.
    """
    compiled = _environment().from_string(require_short(template))
    return compiled.render(messages=messages, add_generation_prompt=True, **special)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is only its content."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates may use, as transformers has it (transformers/utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
