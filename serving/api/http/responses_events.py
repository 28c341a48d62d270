"""Turns the items of a request into OpenAI's response, and into the events of its stream."""

from typing import Any

from msgspec.structs import replace

from serving.api.http.chat_turn import ChatTurn, TurnCall, TurnEnd, TurnPart, TurnReasoning, TurnText
from serving.api.http.errors import error_body
from serving.api.http.responses_objects import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartAdded,
    ContentPartDone,
    FunctionCallItem,
    InputTokensDetails,
    MessageItem,
    OutputItemAdded,
    OutputItemDone,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseError,
    ResponseEvent,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
    ResponseObject,
    ResponseUsage,
)
from serving.core.answers import AnswerItem
from serving.errors import Cancelled, MoejaxError, QueueFull

_COMPLETED = ("stop", "tool_calls")


class ResponseEvents:
    """The events of one response. `response` is the response as it is after the events so far. The same items give the
    same events, whoever replays them."""

    def __init__(self, turn: ChatTurn, response: ResponseObject) -> None:
        self._turn = turn
        self._sequence = 0
        self._open: MessageItem | ReasoningItem | None = None
        self.response = response

    def push(self, item: AnswerItem) -> list[ResponseEvent]:
        """The events of one more item; often none."""
        events = self._start()
        for part in self._turn.parts(item):
            events += self._part(part)
        return events

    def fail(self, error: MoejaxError) -> list[ResponseEvent]:
        """The last events of a response that fails or was cancelled."""
        events = self._start() + self._close("incomplete")
        if isinstance(error, Cancelled):
            self.response.status = "cancelled"
            return [*events, self._event(ResponseIncomplete, response=self._snapshot())]
        code = "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"
        self.response.status = "failed"
        self.response.error = ResponseError(code=code, message=error_body(error).error.message)
        return [*events, self._event(ResponseFailed, response=self._snapshot())]

    def _start(self) -> list[ResponseEvent]:
        if self._sequence:
            return []
        self.response.status = "in_progress"
        created = self._event(ResponseCreated, response=self._snapshot())
        return [created, self._event(ResponseInProgress, response=self._snapshot())]

    def _part(self, part: TurnPart) -> list[ResponseEvent]:
        match part:
            case TurnText():
                return self._text(part)
            case TurnReasoning(text):
                return self._reasoning(text)
            case TurnCall():
                return self._call(part)
            case TurnEnd():
                return self._end(part)

    def _text(self, part: TurnText) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not isinstance(self._open, MessageItem):
            item = MessageItem(id=self._item_id("msg"), status="in_progress", content=[OutputText(text="")])
            events = self._begin(item, OutputText(text=""))
        assert isinstance(self._open, MessageItem)
        content = self._open.content[0]
        content.text += part.text
        content.logprobs = [*content.logprobs, *part.logprobs]
        return [*events, self._event(OutputTextDelta, **self._place(), delta=part.text, logprobs=list(part.logprobs))]

    def _reasoning(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not isinstance(self._open, ReasoningItem):
            item = ReasoningItem(id=self._item_id("rs"), status="in_progress", content=[ReasoningText(text="")])
            events = self._begin(item, ReasoningText(text=""))
        assert isinstance(self._open, ReasoningItem)
        self._open.content[0].text += text
        return [*events, self._event(ReasoningTextDelta, **self._place(), delta=text)]

    def _call(self, call: TurnCall) -> list[ResponseEvent]:
        events, item_id = self._close("completed"), self._item_id("fc")
        item = FunctionCallItem(id=item_id, status="in_progress", call_id=call.id, name=call.name, arguments="")
        done = replace(item, status="completed", arguments=call.arguments)
        self.response.output.append(done)
        place: dict[str, Any] = {"output_index": self._index}
        text = {"item_id": item_id, **place}
        return [
            *events,
            self._event(OutputItemAdded, **place, item=item),
            self._event(ArgumentsDelta, **text, delta=call.arguments),
            self._event(ArgumentsDone, **text, name=call.name, arguments=call.arguments),
            self._event(OutputItemDone, **place, item=done),
        ]

    def _end(self, end: TurnEnd) -> list[ResponseEvent]:
        completed = end.reason in _COMPLETED
        events, response = self._close("completed" if completed else "incomplete"), self.response
        response.usage = ResponseUsage(
            input_tokens=end.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=end.cached_tokens),
            output_tokens=end.completion_tokens,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=end.prompt_tokens + end.completion_tokens,
        )
        if completed:
            response.status = "completed"
            return [*events, self._event(ResponseCompleted, response=self._snapshot())]
        if end.reason == "length":
            response.status, response.incomplete_details = "incomplete", {"reason": "max_output_tokens"}
            return [*events, self._event(ResponseIncomplete, response=self._snapshot())]
        response.status = "failed"
        response.error = ResponseError(code="server_error", message=f"the answer ended with the reason {end.reason!r}.")
        return [*events, self._event(ResponseFailed, response=self._snapshot())]

    def _begin(self, item: MessageItem | ReasoningItem, part: OutputText | ReasoningText) -> list[ResponseEvent]:
        events = self._close("completed")
        self._open = item
        self.response.output.append(item)
        added = self._event(OutputItemAdded, output_index=self._index, item=replace(item, content=[]))
        return [*events, added, self._event(ContentPartAdded, **self._place(), part=part)]

    def _close(self, status: str) -> list[ResponseEvent]:
        """The events that complete the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        item.status = status
        part, place = item.content[0], self._place()
        if isinstance(part, OutputText):
            done = self._event(OutputTextDone, **place, text=part.text, logprobs=part.logprobs)
        else:
            done = self._event(ReasoningTextDone, **place, text=part.text)
        self._open = None
        part_done = self._event(ContentPartDone, **place, part=part)
        return [done, part_done, self._event(OutputItemDone, output_index=self._index, item=item)]

    def _event(self, kind: type[ResponseEvent], **fields: Any) -> ResponseEvent:
        self._sequence += 1
        return kind(sequence_number=self._sequence - 1, **fields)

    def _snapshot(self) -> ResponseObject:
        return replace(self.response, output=list(self.response.output))

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": self._index, "content_index": 0}

    def _item_id(self, prefix: str) -> str:
        """The id of the next item."""
        return f"{prefix}_{self.response.id.removeprefix('resp_')}_{len(self.response.output)}"

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1
