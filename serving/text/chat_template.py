"""How messages become a prompt: the Jinja template that comes with a model, in a sandbox.

Templates are written for `transformers` (`apply_chat_template`), so they find here what they find there.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from serving.errors import InvalidRequest, StartError
from serving.vocabulary import SETTINGS, TokenizerSettings

FILE = "chat_template.jinja"
_WITH_TOOLS = "tool_use"
"""The name of the template for conversations with tools, where a model has one of its own for them."""


class ChatTemplate:
    """The templates of a model, by name, and the special tokens they may write."""

    def __init__(self, templates: Mapping[str, str], names: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        environment = _environment()
        self._templates = {name: environment.from_string(text) for name, text in templates.items()}
        self._names = dict(names)

    @classmethod
    def load(cls, folder: Path, settings: TokenizerSettings | None, names: Mapping[str, str]) -> "ChatTemplate | None":
        """The templates of a model folder: `chat_template.jinja`, else those of `tokenizer_config.json`.

        Raises StartError naming file and line of a syntax error.
        """
        path = folder / FILE
        if path.is_file():
            templates, source = {"default": path.read_text()}, path
        else:
            templates, source = settings.templates if settings else {}, folder / SETTINGS
        if not templates or not any(templates.values()):
            return None
        try:
            return cls(templates, names)
        except jinja2.TemplateSyntaxError as error:
            raise StartError(f"{source}, line {error.lineno}: {error.message}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, ending where the assistant's next turn begins.

        `tools` are JSON schemas of functions; `variables` are the model's own switches, such as
        `enable_thinking`. Raises InvalidRequest when the template refuses, with its words.
        """
        name = _WITH_TOOLS if tools and _WITH_TOOLS in self._templates else "default"
        template = self._templates.get(name) or next(iter(self._templates.values()))
        given = {"messages": list(messages), "tools": list(tools) if tools else None, "documents": None}
        try:
            return template.render({**self._names, **given, "add_generation_prompt": True, **(variables or {})})
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's own words for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own type

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals["raise_exception"] = _refuse
    now: Callable[[str], str] = lambda form: datetime.datetime.now().strftime(form)  # noqa: E731
    environment.globals["strftime_now"] = now
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as the template's author meant it; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
