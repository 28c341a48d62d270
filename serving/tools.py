"""Functions that a model may call: what a caller says of them, and calls found in the model's text.

The text is that of Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of times.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import InvalidRequest
from serving.request import Guide

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call the model asks for; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCalls:
    """Splits a growing text into what is said and what is called. What is no proper call is said as it stands; white
    space around calls is not said."""

    def __init__(self) -> None:
        self._held = ""
        self._space = ""
        self._inside = False
        self._called = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What became certain with this text."""
        self._held += text
        found: list[str | ToolCall] = []
        while True:
            before, seen, after = self._held.partition(END if self._inside else BEGIN)
            if not seen:
                break
            if self._inside:
                found.append(self._judged(before, END))
            else:
                said = before.rstrip()
                self._space = before[len(said) :]
                found += self._said(said)
            self._held, self._inside = after, not self._inside
        if not self._inside:
            longest = min(len(self._held), len(BEGIN) - 1)
            keep = next((n for n in range(longest, 0, -1) if self._held.endswith(BEGIN[:n])), 0)
            said = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(said) :]
            found += self._said(said)
        return found

    def flush(self) -> list[str | ToolCall]:
        """What is left when no text will follow. A call whose end mark did not come is a call all the same."""
        held, self._held = self._held, ""
        if self._inside:
            return [self._judged(held, "")]
        return [] if self._called and not held.strip() else self._said(held)

    def _judged(self, text: str, end: str) -> str | ToolCall:
        call = _call(text)
        self._called = call is not None
        return self._space + BEGIN + text + end if call is None else call

    def _said(self, text: str) -> list[str | ToolCall]:
        self._called = self._called and not text
        return [text] if text else []


def _call(text: str) -> ToolCall | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return ToolCall(value["name"], arguments)
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The functions of a request, checked. Raises InvalidRequest naming the one at fault."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise InvalidRequest(f"tools must be a list of at most {MAX_TOOLS}.", param="tools")
    for position, tool in enumerate(value):
        where = f"tools[{position}]"
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}.', param=where)
        if not isinstance(function.get("parameters", {}), dict | None):
            raise InvalidRequest(f"{where}.function.parameters must be a JSON schema.", param=where)
    return tuple(value)


def read_choice(value: Any, tools: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], Guide | None]:
    """The tools the model is told of, and what its answer must look like, by `tool_choice`."""
    names = [tool["function"]["name"] for tool in tools]
    if value in (None, "auto") or (value == "none" and not tools):
        return tools, None
    if value == "none":
        return (), None
    if value == "required" and tools:
        return tools, calling(tools)
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        name = value["function"].get("name")
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        if chosen:
            return tools, calling(chosen)
        raise InvalidRequest(f"tool_choice names {name!r}; the tools are {names}.", param="tool_choice")
    raise InvalidRequest(
        'tool_choice must be "none", "auto", "required" (with tools), or '
        '{"type": "function", "function": {"name": ...}}.',
        param="tool_choice",
    )


def calling(tools: Sequence[Mapping[str, Any]]) -> Guide:
    """One call of one of these tools, and nothing else."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
    return Guide("lark", f'start: "{BEGIN}\\n" call "\\n{END}"\ncall: %json {schema}\n')
