"""Messages of a conversation as chat templates take them.

Templates are written for values as `transformers` passes them, and no two agree on their form: one prints the content
of a message and another goes through its parts; one writes `arguments` into a text and another through `tojson`. The
values made here can be used in each of these ways.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.errors import InvalidRequest
from serving.text.json_fields import describe_value

_ROLE_ALIASES = {"developer": "system"}  # the newer name in OpenAI's API
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which clients send the reasoning of an earlier turn, and under which templates look for it."""


class MessageText(str):
    """The content of a message: a text for templates that print it, whose items are its parts for templates that
    go through them. The parts are the ones that the caller sent, or one with the whole text."""

    __slots__ = ("parts",)
    parts: list[Mapping[str, Any]]

    def __new__(cls, value: str | Sequence[Mapping[str, Any]]) -> "MessageText":
        """`value` is a text, or a list of parts with a `text` each."""
        parts: list[Mapping[str, Any]] = [] if isinstance(value, str) else list(value)
        if isinstance(value, str):
            parts.append({"type": "text", "text": value})
        made = super().__new__(cls, "".join(part["text"] for part in parts))
        made.parts = parts
        return made

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)


class CallArguments(dict[str, Any]):
    """The arguments of an earlier tool call: a mapping for templates that write its items, the JSON text of the caller
    for templates that write it as it is."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def read_messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The messages of a request, ready for a chat template. Raises InvalidRequest naming the part at fault."""
    if not isinstance(value, list):
        raise InvalidRequest(f"messages is {describe_value(value)}; it must be a list.", param="messages")
    return tuple(read_message(message, f"messages[{i}]") for i, message in enumerate(value))


def read_message(value: Any, where: str) -> Mapping[str, Any]:
    """One message. Its content may be null or absent beside tool calls, and is None then. Other keys stay as they are,
    for templates that know them. Raises InvalidRequest; `where` names the message."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} is {describe_value(value)}; it must be an object.", param=where)
    role = value.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role is {describe_value(role)}; it must be text.", param=f"{where}.role")
    known = ("role", "content", "tool_calls", *_REASONING)
    message = {key: each for key, each in value.items() if key not in known and each is not None}
    message["role"] = _ROLE_ALIASES.get(role, role)
    calls, content = value.get("tool_calls"), value.get("content")
    if calls is not None and not isinstance(calls, list):
        raise InvalidRequest(
            f"{where}.tool_calls is {describe_value(calls)}; it must be a list.", param=f"{where}.tool_calls"
        )
    if calls:
        message["tool_calls"] = [
            previous_call(call, f"{where}.tool_calls[{position}]") for position, call in enumerate(calls)
        ]
    reasoning = next((value[name] for name in _REASONING if isinstance(value.get(name), str)), None)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
        if not (calls and content):  # gpt-oss refuses all three
            message["thinking"] = reasoning
    without_text = content is None and (calls is not None or reasoning is not None)
    message["content"] = None if without_text else read_content(content, f"{where}.content")
    return message


def previous_call(value: Any, where: str) -> Mapping[str, Any]:
    """A tool call of an earlier message. Arguments that are no JSON object, which a model may have written, reach the
    template as text. Raises InvalidRequest; `where` names the call."""
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}.', param=where)
    arguments = function.get("arguments")
    text = "{}" if arguments in (None, "") else arguments
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    given = CallArguments(parsed, text) if isinstance(parsed, dict) else text
    return {**value, "type": "function", "function": {**function, "arguments": given}}


def read_content(value: Any, where: str) -> MessageText:
    """The content of a message: text, or a list of parts of text. Raises InvalidRequest; `where` names the field."""
    if isinstance(value, str):
        return MessageText(value)
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} is {describe_value(value)}; it must be text or a list.", param=where)
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where} has a part other than {{"type": "text", "text": ...}}; this model reads text only.',
                param=where,
            )
    return MessageText(value)
