"""The messages of a conversation, and what a chat template gets of them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.rules import accepted, ignored, used
from serving.errors import InvalidRequest
from serving.text.messages import read_message

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_OPTIONAL_CONTENT = ("assistant", "tool")
"""Roles whose messages may have no content."""


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message's content."""

    type: Annotated[
        str | None, used("`text`, also when it is left out; input_text, output_text and refusal, which are text.")
    ] = None
    text: Annotated[str | None, used("The text.")] = None
    thinking: Annotated[
        "str | list[ContentPart] | None", used("Reasoning, of a part of the type thinking of an assistant's message.")
    ] = None
    refusal: Annotated[str | None, used("The text of a part of the type refusal.")] = None
    annotations: Annotated[Any, ignored("they are about the text and not part of it", [])] = None
    cache_control: Annotated[Any, ignored("prefixes are cached by their content")] = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """The function of an earlier tool call."""

    name: Annotated[str, used("The name.")]
    arguments: Annotated[str | dict[str, Any] | None, used("JSON as text, or the object itself.")] = None


class PreviousToolCall(msgspec.Struct, kw_only=True):
    """A tool call of an earlier message."""

    function: Annotated[CalledFunction, used("The function that was called.")]
    id: Annotated[str | None, used("The id of the call.")] = None
    type: Annotated[str | None, used("`function`.")] = None
    index: Annotated[Any, ignored("the calls are in order")] = None


class RequestMessage(msgspec.Struct, kw_only=True):
    """A message of a conversation."""

    role: Annotated[str, used("system, developer, user, assistant or tool.")]
    content: Annotated[str | list[str | ContentPart] | None, used("Text, or parts of text.")] = None
    name: Annotated[str | None, used("Reaches the chat template.")] = None
    tool_calls: Annotated[list[PreviousToolCall] | None, used("Calls that the model made in this turn.")] = None
    tool_call_id: Annotated[str | None, used("The call that this message answers.")] = None
    reasoning_content: Annotated[str | None, used("Reaches the chat template.")] = None
    reasoning: Annotated[str | None, used("Another name of reasoning_content.")] = None
    refusal: Annotated[str | None, used("The content of an assistant that refused.")] = None
    annotations: Annotated[Any, ignored("they are about the text and not part of it", [])] = None
    cache_control: Annotated[Any, ignored("prefixes are cached by their content")] = None
    audio: Annotated[Any, accepted("the model reads text only")] = None
    function_call: Annotated[Any, accepted("send tool_calls")] = None


def template_message(message: RequestMessage, where: str) -> Mapping[str, Any]:
    """A message as a chat template takes it. Raises InvalidRequest; `where` is the path of the message."""
    content = message.refusal if message.content is None else message.content
    reasoning = message.reasoning_content or message.reasoning
    if content is None and message.role in _OPTIONAL_CONTENT and message.tool_calls is None and reasoning is None:
        content = ""
    if isinstance(content, list):
        placed = [(part, f"{where}.content[{position}]") for position, part in enumerate(content)]
        thoughts = [each for each in placed if message.role == "assistant" and _is_thought(each[0])]
        if thoughts and reasoning is not None:
            raise InvalidRequest(
                f"{where} has its reasoning twice: {thoughts[0][1]} is some, too.", param=thoughts[0][1]
            )
        reasoning = "".join(_thought(*each) for each in thoughts) if thoughts else reasoning
        content = [_text_part(*each) for each in placed if each not in thoughts]
    made = {
        "role": message.role,
        "content": content,
        "name": message.name,
        "tool_calls": None if message.tool_calls is None else list(map(_call, message.tool_calls)),
        "tool_call_id": message.tool_call_id,
        "reasoning_content": reasoning,
    }
    return read_message(made, where)


def _is_thought(part: str | ContentPart) -> bool:
    return isinstance(part, ContentPart) and part.type == "thinking"


def _thought(part: str | ContentPart, where: str) -> str:
    """The reasoning in a part, which Mistral's models write in parts of its own."""
    assert isinstance(part, ContentPart)
    if isinstance(part.thinking, list):
        return "".join(part_text(each, f"{where}.thinking[{i}]") for i, each in enumerate(part.thinking))
    if part.thinking is None:
        raise InvalidRequest(f"{where}.thinking is missing.", param=f"{where}.thinking")
    return part.thinking


def _text_part(part: str | ContentPart, where: str) -> Mapping[str, Any]:
    return {"type": "text", "text": part_text(part, where)}


def part_text(part: str | ContentPart, where: str, types: Sequence[str] = _TEXT_PARTS) -> str:
    """The text of a part of content, which may be a text itself. Raises InvalidRequest for other types than `types`
    and no type."""
    if isinstance(part, str):
        return part
    if part.type not in (None, *types):
        raise InvalidRequest(f"{where} has the type {part.type!r}; this model reads text only.", param=where)
    name = "refusal" if part.type == "refusal" else "text"
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise InvalidRequest(f"{where}.{name} is missing.", param=f"{where}.{name}")
    return text


def _call(call: PreviousToolCall) -> Mapping[str, Any]:
    made = {"function": {"name": call.function.name, "arguments": call.function.arguments}}
    return made if call.id is None else {"id": call.id, **made}
