"""Renders messages to a prompt with the Jinja template of a model, in a sandbox.

Templates are written for `transformers` (`apply_chat_template`) and find the same names here. A template of a model
folder is in `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`; further ones, by name, in
`additional_chat_templates/`.
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
from serving.text.messages import MessageText
from serving.text.tokenizer_formats import TOKENIZER_CONFIG, TokenizerSettings

FILE = "chat_template.jinja"
PROCESSOR_FILE = "chat_template.json"
FURTHER = "additional_chat_templates"
_WITH_TOOLS = "tool_use"
"""Name of the template for conversations with tools, where a model has a separate one."""


class ChatTemplate:
    """The templates of a model, by name, and the special tokens they may write."""

    def __init__(self, templates: Mapping[str, str], names: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        environment = _environment()
        self._sources = dict(templates)
        self._templates = {name: environment.from_string(text) for name, text in templates.items()}
        self._names = dict(names)

    @property
    def default(self) -> str:
        """The template for conversations without tools."""
        return self._sources.get("default") or next(iter(self._sources.values()))

    @property
    def text(self) -> str:
        """All templates as one text, in which marks of a model's formats can be looked for."""
        return "\n".join(self._sources.values())

    @classmethod
    def load(
        cls,
        folder: Path,
        settings: TokenizerSettings | None,
        names: Mapping[str, str],
        file: Path | None = None,
    ) -> "ChatTemplate | None":
        """The templates of a model folder, or that of `file` instead of them.

        Raises StartError naming file and line of a syntax error.
        """
        templates, source = _sources(folder, settings) if file is None else ({"default": _read(file)}, file)
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
        given = {**self._names, "tools": list(tools) if tools else None, "documents": None}
        given |= {"add_generation_prompt": True, **(variables or {})}
        try:
            try:
                return template.render(given | {"messages": list(messages)})
            except _REFUSALS:
                if all(message.get("content") is not None for message in messages):
                    raise
                # A template that takes every content for a text cannot write a turn of tool calls without one.
                return template.render(given | {"messages": [_with_content(message) for message in messages]})
        except _REFUSALS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError)
"""Errors of templates: their own refusals, and what Python raises for values that they cannot use."""


def _with_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return message if message.get("content") is not None else {**message, "content": MessageText("")}


def _sources(folder: Path, settings: TokenizerSettings | None) -> tuple[Mapping[str, str], Path]:
    """The templates of a model folder by name, and the file of the usual one."""
    further = {path.stem: _read(path) for path in sorted((folder / FURTHER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        return {"default": _read(folder / FILE), **further}, folder / FILE
    if settings is not None and any(settings.templates.values()):
        return {**settings.templates, **further}, folder / TOKENIZER_CONFIG
    path = folder / PROCESSOR_FILE
    if path.is_file():
        try:
            return {"default": json.loads(_read(path))["chat_template"], **further}, path
        except (ValueError, KeyError, TypeError) as error:
            raise StartError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
    return further, folder / FURTHER


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"the chat template {path} cannot be read: {error}.") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's own words for training; here they are plain text."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own type

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
        finalize=lambda value: "" if value is None else value,  # else the content of a turn of calls reads "None"
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
