"""Turns the items of a request into Anthropic's message, and into the events of its stream."""

import json
from typing import Any

from msgspec.structs import replace

from serving.api.http.anthropic_objects import (
    AnthropicMessage,
    AnthropicUsage,
    Block,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    MessageDelta,
    MessageEvent,
    MessageStart,
    MessageStop,
    StopDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from serving.api.http.chat_turn import ChatTurn, TurnCall, TurnEnd, TurnPart, TurnReasoning, TurnText
from serving.api.http.errors import anthropic_error
from serving.core.answers import AnswerItem
from serving.errors import Internal, MoejaxError

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """The events of one message. `message` is the message as it is after the events so far."""

    def __init__(self, turn: ChatTurn, message_id: str, model: str, prompt_tokens: int) -> None:
        self._turn = turn
        self._started = False
        self._open: Block | None = None
        usage = AnthropicUsage(input_tokens=prompt_tokens, output_tokens=0)
        self.message = AnthropicMessage(id=message_id, model=model, content=[], usage=usage)

    def push(self, item: AnswerItem) -> list[MessageEvent]:
        """The events of one more item; often none. Raises Internal at an end that Anthropic has no word for."""
        events: list[MessageEvent] = []
        if not self._started:
            self._started = True
            events.append(MessageStart(message=replace(self.message, content=[])))
        for part in self._turn.parts(item):
            events += self._part(part)
        return events

    def fail(self, error: MoejaxError) -> list[MessageEvent]:
        """The events of an error."""
        return [anthropic_error(error, self.message.id)]

    def _part(self, part: TurnPart) -> list[MessageEvent]:
        match part:
            case TurnText(text):
                return self._text(text)
            case TurnReasoning(text):
                events, block = self._block(ThinkingBlock(thinking=""))
                block.thinking += text
                return [*events, self._delta(ThinkingDelta(thinking=text))]
            case TurnCall():
                return self._call(part)
            case TurnEnd():
                return self._end(part)

    def _text(self, text: str) -> list[MessageEvent]:
        if not text:
            return []
        events, block = self._block(TextBlock(text=""))
        block.text += text
        return [*events, self._delta(TextDelta(text=text))]

    def _call(self, call: TurnCall) -> list[MessageEvent]:
        arguments = _object(call.arguments)
        if arguments is None:  # a client could not carry it out; the reader sees what the model wrote
            return self._text(json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False))
        events = self._close()
        events += self._begin(ToolUseBlock(id=call.id, name=call.name, input={}))
        events.append(self._delta(InputJsonDelta(partial_json=call.arguments)))
        self.message.content[-1] = ToolUseBlock(id=call.id, name=call.name, input=arguments)
        return events + self._close()

    def _end(self, end: TurnEnd) -> list[MessageEvent]:
        reason = "stop_sequence" if end.stop_text is not None else _STOP_REASONS.get(end.reason)
        if reason is None:
            raise Internal(f"the answer ended with the reason {end.reason!r}.")
        message = self.message
        message.stop_reason, message.stop_sequence = reason, end.stop_text
        message.usage = AnthropicUsage(
            input_tokens=end.prompt_tokens - end.cached_tokens,
            output_tokens=end.completion_tokens,
            cache_read_input_tokens=end.cached_tokens,
        )
        stop = StopDelta(stop_reason=message.stop_reason, stop_sequence=message.stop_sequence)
        return [*self._close(), MessageDelta(delta=stop, usage=message.usage), MessageStop()]

    def _block(self, empty: Any) -> tuple[list[MessageEvent], Any]:
        """The open block if it has the type of `empty`, else `empty` as the next one; and the events of the change."""
        if isinstance(self._open, type(empty)):
            return [], self._open
        return [*self._close(), *self._begin(empty)], empty

    def _begin(self, block: Block) -> list[MessageEvent]:
        self._open = block
        self.message.content.append(block)
        return [ContentBlockStart(index=self._index, content_block=replace(block))]

    def _close(self) -> list[MessageEvent]:
        if self._open is None:
            return []
        self._open = None
        return [ContentBlockStop(index=self._index)]

    def _delta(self, delta: TextDelta | ThinkingDelta | InputJsonDelta) -> MessageEvent:
        return ContentBlockDelta(index=self._index, delta=delta)

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
