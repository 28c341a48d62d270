"""Tools of a request, and which of them its answer may or must call."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import InvalidRequest
from serving.protocol.sampling import StructuredOutputs

MAX_TOOLS = 128
PARAMETERS = "tools[].function.parameters"
"""The field of a tool's parameters; `[]` stands for the number of the tool."""
_FORMS = (
    '"none", "auto", "required" (with tools), {"type": "function", "function": {"name": ...}}, or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
)


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The checked tools of a request. Raises InvalidRequest naming the invalid one."""
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


def read_tool_choice(
    value: Any, tools: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], StructuredOutputs | None]:
    """The tools to render in the prompt, and the form of the answer that `tool_choice` asks for. A required call is
    exactly one. Raises InvalidRequest."""
    if value in (None, "auto") or (value == "none" and not tools):
        return tools, None
    if value == "none":
        return (), None
    if value in ("required", "any") and tools:  # the latter is Mistral's word
        return tools, required_call(tools)
    if isinstance(value, dict):
        if value.get("type") == "allowed_tools":
            return _allowed_tools(value, tools)
        if value.get("type", "function") == "function" and (name := _name(value)) is not None:
            return tools, required_call(*_named(tools, [name]))
    raise InvalidRequest(f"tool_choice must be {_FORMS}.", param="tool_choice")


def required_call(tools: Sequence[Mapping[str, Any]], positions: Sequence[int] | None = None) -> StructuredOutputs:
    """The structured output of exactly one call of one of these tools, in the model's own format. `positions` are their
    numbers among the tools of the request; all of them in order if it is left out."""
    allowed = [
        {"function": {key: tool["function"].get(key) for key in ("name", "parameters")}, "position": position}
        for tool, position in zip(tools, range(len(tools)) if positions is None else positions, strict=True)
    ]
    return StructuredOutputs("tools", json.dumps(allowed), param=PARAMETERS)


def _allowed_tools(
    choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], StructuredOutputs | None]:
    """A choice of some of the tools: the model sees these alone. The Responses API has its fields one level up."""
    given = choice.get("allowed_tools", choice)
    mode = given.get("mode", "auto") if isinstance(given, dict) else None
    listed = given.get("tools") if isinstance(given, dict) else None
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise InvalidRequest(f"tool_choice must be {_FORMS}.", param="tool_choice")
    names = [_name(each) if isinstance(each, dict) else None for each in listed]
    chosen, positions = _named(tools, names)
    return chosen, required_call(chosen, positions) if mode == "required" else None


def _name(value: Mapping[str, Any]) -> Any:
    """The name of a function, in a choice as chat completions or as the Responses API write it."""
    function = value.get("function")
    return function.get("name") if isinstance(function, dict) else value.get("name")


def _named(tools: Sequence[Mapping[str, Any]], names: Sequence[Any]) -> tuple[list[Mapping[str, Any]], list[int]]:
    """The tools of these names, in the order of the tools, and their positions. Raises InvalidRequest for a name that
    no tool has."""
    known = [tool["function"]["name"] for tool in tools]
    for name in names:
        if name not in known:
            raise InvalidRequest(f"tool_choice names {name!r}; the tools are {known}.", param="tool_choice")
    positions = [position for position, name in enumerate(known) if name in names]
    return [tools[position] for position in positions], positions
