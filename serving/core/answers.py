"""Answers as clients receive them: scores of the prompt, chunks of text, and the end."""

import dataclasses
from collections.abc import Sequence

from serving.errors import Cancelled, DeadlineExceeded
from serving.protocol.request import Finished, Request, Scored, Token
from serving.protocol.sampling import TopLogprobs
from serving.text.answer_parts import AnswerPart, InvalidToolCall, Reasoning, ToolCall
from serving.text.tokenizer import Detokenizer, StopStrings, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Log-probabilities of the prompt tokens from `position` on, each given all tokens before it, and the likeliest
    tokens at each place. The first token of the prompt has none. `choice` is the number of the answer in its call."""

    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]
    choice: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens, and the text that became certain with them. `index` is that of the first token in the answer; `top` has
    the likeliest tokens at each place, if the call asked for them. `choice` is the number of the answer in its call."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    epoch: int
    top: tuple[TopLogprobs, ...] = ()
    choice: int = 0
    weights_version: str = ""
    """The label of the weights that computed the tokens."""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    invalid_calls: tuple[InvalidToolCall, ...] = ()
    """Reasoning and tool calls are not part of the text of an answer to a conversation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete:
    """The end of an answer. `reason` is stop, length, or tool_calls (an answer that has one and ended by itself).
    `matched` is the stop string or stop token that ended it, if one did. `cached_tokens` is
    the number of prompt tokens that a rank had in its KV cache already, `accepted_drafts` that of tokens that a draft
    had guessed."""

    request_id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    epochs: tuple[int, ...]
    seed: int
    matched: str | int | None = None
    degraded: bool = False
    """True when some tokens were computed while experts were masked."""
    cached_tokens: int = 0
    choice: int = 0
    accepted_drafts: int = 0
    weights_versions: tuple[tuple[str, int], ...] = ()
    """The weights that computed the tokens: the label, and how many tokens in a row, in order."""


AnswerItem = PromptScores | Chunk | Complete
"""One item in the stream of a call."""


class AnswerText:
    """Turns the tokens of one answer into text: whole characters, up to the first stop string or stop token. Stop
    strings count after `min_tokens`. The reasoning and the tool calls of a conversation are split off."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stop: Sequence[str]) -> None:
        parsing = request.parsing
        self._detokenizer = Detokenizer(tokenizer, request.prompt, marks=parsing is not None)
        self._parser = None if parsing is None else tokenizer.chat_format.parser(parsing)
        self._stops = StopStrings(stop)
        self._stop_tokens = request.sampling.stop_tokens
        self._min_tokens = request.sampling.min_tokens
        self.tokens = 0
        self.accepted_drafts = 0
        self.epochs: list[int] = []
        self.weights_versions: list[tuple[str, int]] = []
        """As `Complete` has them."""
        self.matched: str | int | None = None
        self.degraded = False
        self._calls = 0
        self._tools = tokenizer.chat_format.tools
        self._request_id = request.id

    def push(self, token: Token) -> Chunk:
        """The chunk of one more token."""
        self.tokens += 1
        self.accepted_drafts += token.drafted
        self.degraded |= token.degraded
        if token.epoch not in self.epochs:
            self.epochs.append(token.epoch)
        version, count = self.weights_versions.pop() if self.weights_versions else (token.weights_version, 0)
        if version == token.weights_version:
            self.weights_versions.append((version, count + 1))
        else:
            self.weights_versions += [(version, count), (token.weights_version, 1)]
        if token.id in self._stop_tokens:
            self.matched, text = token.id, ""
        else:
            text = self._detokenizer.push(token.id)
            if self.tokens > self._min_tokens:
                text = self._stops.push(text)
                self.matched = self._stops.matched
        return self._with_parts(
            [text] if self._parser is None else self._parser.push(text),
            Chunk(
                index=token.index,
                token_ids=(token.id,),
                text="",
                logprobs=(token.logprob,),
                epoch=token.epoch,
                weights_version=token.weights_version,
                top=(token.top,) if token.top else (),
            ),
        )

    def rest(self, reason: str) -> Chunk | None:
        """At the end: the text that was held back for a stop string, an unfinished character or a tool call, as a chunk
        without tokens."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        parts: list[AnswerPart] = [text] if text else []
        if self._parser is not None:
            parts = [*self._parser.push(text), *self._parser.flush(cut=reason == "length")]
        if not parts or not self.epochs:
            return None
        chunk = Chunk(
            index=self.tokens,
            token_ids=(),
            text="",
            logprobs=(),
            epoch=self.epochs[-1],
            weights_version=self.weights_versions[-1][0],
        )
        return self._with_parts(parts, chunk)

    def _with_parts(self, parts: Sequence[AnswerPart], chunk: Chunk) -> Chunk:
        calls = tuple(self._with_id(part) for part in parts if isinstance(part, ToolCall))
        return dataclasses.replace(
            chunk,
            text="".join(part for part in parts if isinstance(part, str)),
            reasoning="".join(part.text for part in parts if isinstance(part, Reasoning)),
            calls=calls,
            invalid_calls=tuple(part for part in parts if isinstance(part, InvalidToolCall)),
        )

    @property
    def called(self) -> bool:
        """Whether the answer has a tool call."""
        return self._calls > 0

    def _with_id(self, call: ToolCall) -> ToolCall:
        position, self._calls = self._calls, self._calls + 1
        if call.id or self._tools is None:
            return call
        return dataclasses.replace(call, id=self._tools.call_id(self._request_id, position))


def prompt_scores(request: Request, scored: Scored) -> PromptScores:
    """Scores of a part of a request's prompt, with the tokens that they are of."""
    end = scored.position + len(scored.logprobs)
    ids = request.prompt[scored.position : end]
    return PromptScores(position=scored.position, token_ids=ids, logprobs=scored.logprobs, top=scored.top)


def complete(request: Request, text: AnswerText, finished: Finished) -> Complete:
    """The end of an answer. Raises DeadlineExceeded or Cancelled when the request did not end by itself."""
    reason = finished.reason
    if reason == "deadline":
        raise DeadlineExceeded(f"the deadline passed after {text.tokens} tokens.")
    if reason == "cancelled":
        raise Cancelled(f"request {request.id} was aborted after {text.tokens} tokens.")
    return Complete(
        request_id=request.id,
        reason="tool_calls" if reason == "stop" and text.called else reason,
        prompt_tokens=len(request.prompt),
        completion_tokens=text.tokens,
        epochs=tuple(text.epochs),
        seed=request.sampling.seed,
        matched=text.matched,
        degraded=text.degraded,
        cached_tokens=finished.cached_tokens,
        accepted_drafts=text.accepted_drafts,
        weights_versions=tuple(text.weights_versions),
    )
