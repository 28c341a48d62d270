"""Requests of OpenAI's Responses API, written as those chat completions that give the same answer.

The fields of a body, and what happens to each, stand in `serving/api/http/bodies/responses.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.api.http.bodies.messages import ContentPart, part_text
from serving.api.http.bodies.responses import LOGPROBS, FunctionTool, InputItem, ResponsesBody, TextFormat
from serving.api.http.body import required
from serving.errors import InvalidRequest
from serving.text.tool_calls import PARAMETERS
from serving.text.validation import FieldNames

NAMES = FieldNames(
    {PARAMETERS: "tools[].parameters"},
    prompt="input",
    messages="input",
    max_tokens="max_output_tokens",
    response_format="text.format",
)
"""The names of the Responses API for the fields of chat completions."""
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")
_PASSED_ON = (
    "model", "temperature", "top_p", "tool_choice", "parallel_tool_calls", "seed", "stop", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "priority", "speculate", "chat_template_kwargs",
)  # fmt: skip
"""Fields that a chat completion has under the same names."""
_FORMATS = ("text", "json_object", "json_schema")


def chat_body(body: ResponsesBody, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body of the chat completion that goes on from `messages`. Raises InvalidRequest naming the field."""
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    made: dict[str, Any] = {"messages": [*instructions, *messages], "stream": True}
    made |= {name: value for name in _PASSED_ON if (value := getattr(body, name)) is not None}
    if body.max_output_tokens is not None:
        if body.max_output_tokens < 1:
            raise InvalidRequest(
                f"max_output_tokens is {body.max_output_tokens}; it must be at least 1.", param="max_output_tokens"
            )
        made["max_tokens"] = body.max_output_tokens
    if body.tools:
        made["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    if body.text is not None and body.text.format is not None:
        made["response_format"] = _format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        made["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs is not None or LOGPROBS in (body.include or ()):
        made |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    return made


def input_messages(items: str | Sequence[InputItem]) -> list[dict[str, Any]]:
    """The messages of an input. Reasoning and calls belong to the assistant's message that they stand beside. Raises
    InvalidRequest naming the field."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for position, item in enumerate(items):
        where = f"input[{position}]"
        match item.type:
            case "message" | None:
                role, text = required(item.role, f"{where}.role"), _text(item.content, f"{where}.content")
                if role != "assistant":
                    messages.append({"role": role, "content": text})
                else:
                    _add_to_turn(messages, "content", text)
            case "reasoning":
                _add_to_turn(messages, "reasoning_content", _text(item.content or "", f"{where}.content"))
            case "function_call":
                _add_to_turn(messages, "tool_calls", [_call(item, where)])
            case "function_call_output":
                call_id = required(item.call_id, f"{where}.call_id")
                output = _text(item.output, f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case other:
                raise InvalidRequest(
                    f"{where} has the type {other!r}; it must be message, function_call, function_call_output or "
                    "reasoning.",
                    param=f"{where}.type",
                )
    return messages


_ORDER = ("reasoning_content", "content", "tool_calls")
"""The order in which an assistant's turn has its parts: an earlier part begins another turn."""


def _add_to_turn(messages: list[dict[str, Any]], name: str, value: Any) -> None:
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    later = _ORDER[_ORDER.index(name) + (name == "tool_calls") :]
    if last is None or any(last.get(each) for each in later):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    last[name] = [*last.get(name, ()), *value] if name == "tool_calls" else value
    if last["content"] is None and "tool_calls" not in last:
        last["content"] = ""


def _call(item: InputItem, where: str) -> dict[str, Any]:
    function = {"name": required(item.name, f"{where}.name"), "arguments": item.arguments or "{}"}
    return {"type": "function", "id": required(item.call_id, f"{where}.call_id"), "function": function}


def _tool(tool: FunctionTool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise InvalidRequest(
            f"{where} has the type {tool.type!r}; the server runs no tools of its own. Send functions.",
            param=f"{where}.type",
        )
    given = {"description": tool.description, "parameters": tool.parameters}
    function = {"name": required(tool.name, f"{where}.name")}
    return {"type": "function", "function": function | {k: v for k, v in given.items() if v is not None}}


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type not in _FORMATS:
        raise InvalidRequest(
            f"text.format.type is {form.type!r}; it must be {' or '.join(_FORMATS)}.", param="text.format.type"
        )
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema}}


def _text(content: str | Sequence[str | ContentPart] | None, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise InvalidRequest(f"{where} is missing.", param=where)
    return "".join(part_text(part, f"{where}[{i}]", _TEXT_PARTS) for i, part in enumerate(content))
