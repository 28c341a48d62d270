"""The objects of OpenAI's Responses API, as msgspec models: the response, its items, the events of its stream."""

from typing import Any

import msgspec

from serving.api.http.openai_objects import TokenLogprob


class OutputText(msgspec.Struct, kw_only=True, tag="output_text", tag_field="type"):
    """Text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag="reasoning_text", tag_field="type"):
    """Text in which the model reasons before it answers."""

    text: str


class MessageItem(msgspec.Struct, kw_only=True, tag="message", tag_field="type"):
    """A message of the output."""

    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True, tag="reasoning", tag_field="type"):
    """Reasoning in the output."""

    id: str
    status: str
    summary: list[Any] = []
    content: list[ReasoningText]


class FunctionCallItem(msgspec.Struct, kw_only=True, tag="function_call", tag_field="type"):
    """A function call in the output; `arguments` is JSON."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


Item = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Details of the prompt's tokens; `cached_tokens` of them were in a prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Details of the answer's tokens; those of reasoning are not counted apart."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Numbers of tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """The response of /v1/responses."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    background: bool
    error: ResponseError | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None


class DeletedResponse(msgspec.Struct, kw_only=True):
    """The response of DELETE /v1/responses/ID."""

    id: str
    object: str = "response"
    deleted: bool = True


class ResponseEvent(msgspec.Struct, kw_only=True, tag_field="type"):
    """Base of the events. Sequence numbers begin at 0 and are the same whenever the stream is sent."""

    sequence_number: int


class ResponseCreated(ResponseEvent, kw_only=True, tag="response.created"):
    """The first event."""

    response: ResponseObject


class ResponseInProgress(ResponseEvent, kw_only=True, tag="response.in_progress"):
    """The model has begun."""

    response: ResponseObject


class ResponseCompleted(ResponseEvent, kw_only=True, tag="response.completed"):
    """The last event of a response that ended by itself."""

    response: ResponseObject


class ResponseIncomplete(ResponseEvent, kw_only=True, tag="response.incomplete"):
    """The last event of a response that was cut or cancelled."""

    response: ResponseObject


class ResponseFailed(ResponseEvent, kw_only=True, tag="response.failed"):
    """The last event of a response that failed."""

    response: ResponseObject


class OutputItemAdded(ResponseEvent, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    output_index: int
    item: Item


class OutputItemDone(ResponseEvent, kw_only=True, tag="response.output_item.done"):
    """An item is complete."""

    output_index: int
    item: Item


class PartEvent(ResponseEvent, kw_only=True):
    """Base of the events of an item. `content_index` is the place of the part in its item."""

    item_id: str
    output_index: int
    content_index: int


class ContentPartAdded(PartEvent, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins."""

    part: OutputText | ReasoningText


class ContentPartDone(PartEvent, kw_only=True, tag="response.content_part.done"):
    """A part of an item is complete."""

    part: OutputText | ReasoningText


class OutputTextDelta(PartEvent, kw_only=True, tag="response.output_text.delta"):
    """More text of a message."""

    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(PartEvent, kw_only=True, tag="response.output_text.done"):
    """The text of a message is complete."""

    text: str
    logprobs: list[TokenLogprob]


class ReasoningTextDelta(PartEvent, kw_only=True, tag="response.reasoning_text.delta"):
    """More reasoning."""

    delta: str


class ReasoningTextDone(PartEvent, kw_only=True, tag="response.reasoning_text.done"):
    """The reasoning is complete."""

    text: str


class ArgumentsDelta(ResponseEvent, kw_only=True, tag="response.function_call_arguments.delta"):
    """More arguments of a function call."""

    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(ResponseEvent, kw_only=True, tag="response.function_call_arguments.done"):
    """The arguments of a function call are complete."""

    item_id: str
    output_index: int
    name: str
    arguments: str


EVENTS = (
    ResponseCreated, ResponseInProgress, ResponseCompleted, ResponseIncomplete, ResponseFailed, OutputItemAdded,
    OutputItemDone, ContentPartAdded, ContentPartDone, OutputTextDelta, OutputTextDone, ReasoningTextDelta,
    ReasoningTextDone, ArgumentsDelta, ArgumentsDone,
)  # fmt: skip
