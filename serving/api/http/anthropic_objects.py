"""The objects of Anthropic's messages, as msgspec models: the message, the events of its stream, errors."""

from typing import Any

import msgspec


class AnthropicUsage(msgspec.Struct, kw_only=True):
    """Numbers of tokens. Those of the prompt that were in a prefix cache are `cache_read_input_tokens` and not among
    the `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0


class TextBlock(msgspec.Struct, kw_only=True, tag="text", tag_field="type"):
    """Text of the answer."""

    text: str


class ThinkingBlock(msgspec.Struct, kw_only=True, tag="thinking", tag_field="type"):
    """Text in which the model reasons before it answers. It is not signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag="tool_use", tag_field="type"):
    """A tool call."""

    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class AnthropicMessage(msgspec.Struct, kw_only=True, tag="message", tag_field="type"):
    """The response of /v1/messages."""

    id: str
    role: str = "assistant"
    model: str
    content: list[Block]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: AnthropicUsage


class TokenCount(msgspec.Struct, kw_only=True):
    """The response of /v1/messages/count_tokens."""

    input_tokens: int


class MessageStart(msgspec.Struct, kw_only=True, tag="message_start", tag_field="type"):
    """The first event: the message without content."""

    message: AnthropicMessage


class ContentBlockStart(msgspec.Struct, kw_only=True, tag="content_block_start", tag_field="type"):
    """A block begins."""

    index: int
    content_block: Block


class TextDelta(msgspec.Struct, kw_only=True, tag="text_delta", tag_field="type"):
    """More text of a block."""

    text: str


class ThinkingDelta(msgspec.Struct, kw_only=True, tag="thinking_delta", tag_field="type"):
    """More text of a thinking block."""

    thinking: str


class InputJsonDelta(msgspec.Struct, kw_only=True, tag="input_json_delta", tag_field="type"):
    """JSON of the arguments of a tool call."""

    partial_json: str


class ContentBlockDelta(msgspec.Struct, kw_only=True, tag="content_block_delta", tag_field="type"):
    """A block grows."""

    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class ContentBlockStop(msgspec.Struct, kw_only=True, tag="content_block_stop", tag_field="type"):
    """A block is complete."""

    index: int


class StopDelta(msgspec.Struct, kw_only=True):
    """Why the message ended."""

    stop_reason: str | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, kw_only=True, tag="message_delta", tag_field="type"):
    """The message has ended."""

    delta: StopDelta
    usage: AnthropicUsage


class MessageStop(msgspec.Struct, kw_only=True, tag="message_stop", tag_field="type"):
    """The last event."""


class AnthropicErrorDetail(msgspec.Struct, kw_only=True):
    """The kind of an error, and its text."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, kw_only=True, tag="error", tag_field="type"):
    """The body of a response that is an error, and the event of a stream that fails."""

    error: AnthropicErrorDetail
    request_id: str | None = None


BlockEvent = ContentBlockStart | ContentBlockDelta | ContentBlockStop
MessageEvent = MessageStart | BlockEvent | MessageDelta | MessageStop | AnthropicError
