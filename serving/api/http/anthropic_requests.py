"""Requests of Anthropic's messages, written as those chat completions that give the same answer.

The fields of a body, and what happens to each, stand in `serving/api/http/bodies/anthropic.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from serving.api.http.bodies.anthropic import (
    AnthropicTool,
    AnthropicToolChoice,
    AnthropicTurn,
    ContentBlock,
    CountTokensBody,
    MessagesBody,
)
from serving.api.http.body import required
from serving.errors import InvalidRequest
from serving.text.tool_calls import PARAMETERS
from serving.text.validation import FieldNames

_NAMES = FieldNames({PARAMETERS: "tools[].input_schema"}, prompt="messages", stop="stop_sequences")
_UNREAD = ("redacted_thinking",)
"""Blocks that a client sends back and that no template can read."""


def chat_body(body: CountTokensBody) -> dict[str, Any]:
    """The body of the chat completion. Raises InvalidRequest naming the field."""
    if body.messages and body.messages[-1].role == "assistant":
        where = f"messages[{len(body.messages) - 1}]"
        raise InvalidRequest(
            f"{where} is the assistant's; the last message must be the user's, because an answer is not continued.",
            param=where,
        )
    made: dict[str, Any] = {
        "model": body.model,
        "messages": [
            *([{"role": "system", "content": _text(body.system, "system")}] if body.system else []),
            *(message for i, turn in enumerate(body.messages) for message in _turn(turn, f"messages[{i}]")),
        ],
        "stream": True,
    }
    if body.tools:
        made |= {"tools": list(map(_tool, body.tools)), **_tool_choice(body.tool_choice)}
    elif body.tool_choice is not None and body.tool_choice.type in ("any", "tool"):
        raise InvalidRequest(f"tool_choice is {body.tool_choice.type}, and there are no tools.", param="tool_choice")
    made |= _thinking(body) | _output(body)
    return made | (_sampling(body) if isinstance(body, MessagesBody) else {})


def field_names(body: CountTokensBody) -> FieldNames:
    """The names of Anthropic's API for the fields of the chat completion of a body."""
    config = body.output_config
    older = config is None or config.format is None
    return FieldNames(_NAMES, response_format="output_format" if older else "output_config.format")


def _sampling(body: MessagesBody) -> dict[str, Any]:
    if body.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {body.max_tokens}; it must be at least 1.", param="max_tokens")
    given = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences or None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "speculate": body.speculate,
    }
    return {name: value for name, value in given.items() if value is not None}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _tool_choice(choice: AnthropicToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    parallel = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    if choice.type != "tool":
        return {"tool_choice": {"auto": "auto", "any": "required", "none": "none"}[choice.type], **parallel}
    if not choice.name:
        raise InvalidRequest("tool_choice.name is missing.", param="tool_choice.name")
    return {"tool_choice": {"type": "function", "function": {"name": choice.name}}, **parallel}


def _thinking(body: CountTokensBody) -> dict[str, Any]:
    if body.thinking is None or body.thinking.type == "adaptive":
        return {}
    enabled = body.thinking.type == "enabled"
    return {"chat_template_kwargs": {"enable_thinking": enabled, "thinking": enabled}}


def _output(body: CountTokensBody) -> dict[str, Any]:
    made: dict[str, Any] = {}
    config = body.output_config
    form = body.output_format if config is None or config.format is None else config.format
    if form is not None:
        schema = {"name": "answer", "schema": form.schema, "strict": True}
        made["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config is not None and config.effort is not None:
        made["reasoning_effort"] = config.effort
    return made


def _turn(turn: AnthropicTurn, where: str) -> Iterator[Mapping[str, Any]]:
    """The messages of a turn: results of tools are messages of their own, calls belong to the assistant's."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    blocks = [(block, f"{where}.content[{i}]") for i, block in enumerate(turn.content)]
    if turn.role == "assistant":
        yield _assistant(blocks)
        return
    texts: list[str] = []
    for block, path in blocks:
        if block.type != "tool_result":
            texts.append(_block_text(block, path))
            continue
        if texts:
            yield {"role": turn.role, "content": "".join(texts)}
            texts = []
        yield {
            "role": "tool",
            "tool_call_id": required(block.tool_use_id, f"{path}.tool_use_id"),
            "content": _text(block.content or "", f"{path}.content"),
        }
    if texts or not blocks:
        yield {"role": turn.role, "content": "".join(texts)}


def _assistant(blocks: Sequence[tuple[ContentBlock, str]]) -> Mapping[str, Any]:
    texts, thoughts, calls = [], [], []
    for block, where in blocks:
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            function = {"name": required(block.name, f"{where}.name"), "arguments": block.input or {}}
            calls.append({"type": "function", "id": required(block.id, f"{where}.id"), "function": function})
        elif block.type not in _UNREAD:
            texts.append(_block_text(block, where))
    made: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or (None if calls else "")}
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    return made | ({"tool_calls": calls} if calls else {})


def _text(content: str | Sequence[ContentBlock], where: str) -> str:
    if isinstance(content, str):
        return content
    return "".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block_text(block: ContentBlock, where: str) -> str:
    if block.type != "text":
        raise InvalidRequest(f"{where} has the type {block.type!r}; this model reads text only.", param=where)
    return required(block.text, f"{where}.text")
