"""A chat completion for the APIs that call it something else: its answer as text, reasoning and tool calls."""

import dataclasses
from collections.abc import Iterator, Sequence

from msgspec import UNSET

from serving.api.http.openai_objects import ChatCompletionChunk, Delta, TokenLogprob
from serving.api.http.openai_requests import CompletionRequest
from serving.api.http.openai_responses import CompletionResponse
from serving.core.answers import AnswerItem, Complete
from serving.protocol.request import Request
from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TurnText:
    """Text of the answer, with the log-probabilities of its tokens if the call asked for them."""

    text: str
    logprobs: Sequence[TokenLogprob] = ()


@dataclasses.dataclass(frozen=True)
class TurnReasoning:
    """Text in which the model reasons before it answers."""

    text: str


@dataclasses.dataclass(frozen=True)
class TurnCall:
    """A tool call; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """The end. `reason` is the finish reason of a chat completion; `stop_text` is the stop string that matched."""

    reason: str
    stop_text: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


TurnPart = TurnText | TurnReasoning | TurnCall | TurnEnd


class ChatTurn:
    """The parts of the answer to a call of one conversation, the same as in the stream of a chat completion."""

    def __init__(self, call: CompletionRequest, request: Request, tokenizer: Tokenizer) -> None:
        self._response = CompletionResponse(call, [request], request.id, "", tokenizer, 0)

    def parts(self, item: AnswerItem) -> list[TurnPart]:
        """The parts that an item adds; often none."""
        found: list[TurnPart] = []
        for part in self._response.stream_parts(item):
            assert isinstance(part, ChatCompletionChunk)
            for choice in part.choices:
                logprobs = choice.logprobs.content if choice.logprobs is not None else ()
                found += _delta_parts(choice.delta, logprobs)
                if choice.finish_reason is not None:
                    assert isinstance(item, Complete)
                    found.append(_end(item, choice.finish_reason))
        return found


def _delta_parts(delta: Delta, logprobs: Sequence[TokenLogprob]) -> Iterator[TurnPart]:
    if delta.reasoning_content:
        yield TurnReasoning(delta.reasoning_content)
    if delta.content is not UNSET and (delta.content or logprobs):
        yield TurnText(delta.content, logprobs)
    for call in delta.invalid_tool_calls or ():
        yield TurnText(call.text)  # these APIs have no place for it; the reader sees what the model wrote
    for call in delta.tool_calls or ():
        yield TurnCall(call.id, call.function.name, call.function.arguments)


def _end(item: Complete, reason: str) -> TurnEnd:
    stop_text = item.matched if isinstance(item.matched, str) else None
    return TurnEnd(reason, stop_text, item.prompt_tokens, item.completion_tokens, item.cached_tokens)
