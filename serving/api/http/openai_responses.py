"""Turns the items of a request into the objects of OpenAI's completions and chat completions."""

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import UNSET, UnsetType

from serving.api.http.logprobs import LogprobFormat, ScoredToken, TextOffsets, scored_tokens
from serving.api.http.openai_objects import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatMessage,
    Choice,
    Completion,
    CompletionTokensDetails,
    Degradation,
    Delta,
    DeltaToolCall,
    FunctionCall,
    MessageToolCall,
    PromptTokensDetails,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    Usage,
)
from serving.api.http.openai_requests import CompletionRequest
from serving.core.answers import AnswerItem, Chunk, Complete, PromptScores
from serving.protocol.request import Request
from serving.text.answer_parts import ToolCall
from serving.text.tokenizer import Tokenizer


class CompletionResponse:
    """The objects of one call: `stream_parts` of each item and `final_parts` for a stream, `whole` without one.

    `requests` has one entry for each choice in order, `n` for each prompt.
    """

    def __init__(
        self,
        call: CompletionRequest,
        requests: Sequence[Request],
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        created: int,
    ) -> None:
        self._call = call
        self._choices = [_Choice(call, request, index, tokenizer) for index, request in enumerate(requests)]
        suffix = ".chunk" if call.stream and call.chat else ""
        self._head: dict[str, Any] = {
            "id": request_id,
            "object": ("chat.completion" if call.chat else "text_completion") + suffix,
            "created": created,
            "model": model,
        }

    def stream_parts(self, item: AnswerItem) -> list[Completion]:
        """The objects that a stream sends for an item; often none."""
        choice = self._choices[item.choice]
        if isinstance(item, PromptScores):
            choice.add_scores(item)
            return []
        parts = [] if choice.started else choice.first_parts()
        parts += choice.chunk(item) if isinstance(item, Chunk) else choice.end(item)
        return [self._part([each], self._usage_so_far(), version=choice.weights_version) for each in parts]

    def final_parts(self) -> list[Completion]:
        """The objects that a stream sends after all choices have ended: the usage, if requested."""
        usage, degradation = self._usage() if self._call.include_usage else UNSET, self._degradation()
        if usage is UNSET and degradation is UNSET:
            return []
        return [self._part([], usage, degradation, version=self._weights_version)]

    def whole(self, items: Iterable[AnswerItem]) -> Completion:
        """The response without streaming."""
        for item in items:
            self._choices[item.choice].add(item)
        choices: Any = [choice.whole() for choice in self._choices]
        kind = ChatCompletion if self._call.chat else TextCompletion
        return kind(
            **self._head,
            choices=choices,
            usage=self._usage(),
            weights_version=self._weights_version or UNSET,
            moejax=self._degradation(),
        )

    def _part(
        self,
        choices: Any,
        usage: Usage | UnsetType | None,
        degradation: Degradation | UnsetType = UNSET,
        *,
        version: str,
    ) -> Completion:
        kind = ChatCompletionChunk if self._call.chat else TextCompletion
        return kind(**self._head, choices=choices, usage=usage, weights_version=version or UNSET, moejax=degradation)

    @property
    def _weights_version(self) -> str:
        """The last version that computed a token of this call; empty before the first token."""
        return next((label for choice in reversed(self._choices) if (label := choice.weights_version)), "")

    def _degradation(self) -> Degradation | UnsetType:
        """Present only if experts were masked."""
        done = [choice.complete for choice in self._choices if choice.complete is not None]
        epochs = sorted({epoch for complete in done for epoch in complete.epochs})
        return Degradation(degraded=True, epochs=epochs) if any(c.degraded for c in done) else UNSET

    def _usage_so_far(self) -> Usage | UnsetType | None:
        if self._call.usage_so_far:
            return self._usage()
        return None if self._call.include_usage else UNSET

    def _usage(self) -> Usage:
        """The usage up to now."""
        prompt_tokens = sum(choice.prompt_tokens for choice in self._choices[:: self._call.params.n])
        completion_tokens = sum(choice.completion_tokens for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in self._choices[:: self._call.params.n])
        drafted = sum(choice.accepted_drafts for choice in self._choices)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(accepted_prediction_tokens=drafted) if drafted else UNSET,
            weights_versions=dict(sum((choice.weights for choice in self._choices), collections.Counter[str]())),
        )


class _Choice:
    """One choice of a call."""

    def __init__(self, call: CompletionRequest, request: Request, index: int, tokenizer: Tokenizer) -> None:
        self._call = call
        self._request = request
        self._index = index
        self._tokenizer = tokenizer
        self._scores: list[ScoredToken] = []
        self._chunks: list[Chunk] = []
        self._tool_call_count = 0
        self._logprob_format = LogprobFormat(tokenizer, call.logprobs or 0)
        self.started = False
        self.complete: Complete | None = None
        self.completion_tokens = 0
        self.weights: collections.Counter[str] = collections.Counter()
        """Its tokens by the version of the weights that computed them."""
        self.weights_version = ""
        """The version of the last token; empty before the first one."""
        self.prompt_tokens = len(request.prompt)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were in a prefix cache; known at the end."""
        return 0 if self.complete is None else self.complete.cached_tokens

    @property
    def accepted_drafts(self) -> int:
        """Tokens that a draft had guessed; known at the end."""
        return 0 if self.complete is None else self.complete.accepted_drafts

    def add_scores(self, item: PromptScores) -> None:
        """Keep log-probabilities of the prompt."""
        self._scores += map(ScoredToken, item.token_ids, item.logprobs, item.top)

    def first_parts(self) -> list[Choice]:
        """The choices that a stream sends before any text."""
        self.started = True
        if self._call.chat:
            return [self._delta_part(Delta(role="assistant", content=""))]
        if self._call.echo:
            return [self._text_part(self._prompt(), self._text_logprobs(self._prompt_logprobs()))]
        return []

    def chunk(self, item: Chunk) -> list[Choice]:
        """The choices that a stream sends for a chunk; none when its tokens have no text yet."""
        self.completion_tokens += len(item.token_ids)
        self._note_weights(item)
        tokens = scored_tokens([item])
        if not self._call.chat:
            logprobs = self._text_logprobs(tokens)
            return [self._text_part(item.text, logprobs)] if item.text or logprobs else []
        logprobs = self._chat_logprobs(tokens)
        deltas = self._deltas(item)
        if logprobs and not deltas:
            deltas = [Delta(content="")]
        return [self._delta_part(delta, None if i else logprobs) for i, delta in enumerate(deltas)]

    def end(self, complete: Complete) -> list[Choice]:
        """The last choice, with the finish reason."""
        self._complete(complete)
        if self._call.chat:
            return [self._delta_part(Delta(), reason=complete.reason)]
        return [self._text_part("", reason=complete.reason)]

    def add(self, item: AnswerItem) -> None:
        """Keep an item of a choice that is not streamed."""
        if isinstance(item, PromptScores):
            self.add_scores(item)
        elif isinstance(item, Chunk):
            self._chunks.append(item)
            self._note_weights(item)
        else:
            self._complete(item)

    def _note_weights(self, item: Chunk) -> None:
        if item.token_ids:
            self.weights[item.weights_version] += len(item.token_ids)
            self.weights_version = item.weights_version

    def whole(self) -> Choice:
        """The complete choice."""
        assert self.complete is not None
        reason = self.complete.reason
        text, tokens = "".join(chunk.text for chunk in self._chunks), scored_tokens(self._chunks)
        if self._call.chat:
            message, logprobs = self._message(text), self._chat_logprobs(tokens)
            return ChatChoice(index=self._index, message=message, logprobs=logprobs, finish_reason=reason)
        if self._call.echo:
            text, tokens = self._prompt() + text, self._prompt_logprobs() + tokens
        part = self._text_part(text, self._text_logprobs(tokens), reason)
        if self._request.sampling.prompt_logprobs is not None and not self._call.echo:
            part.prompt_logprobs = [None, *map(self._logprob_format.by_id, self._scores)]
        return part

    def _complete(self, complete: Complete) -> None:
        self.complete = complete
        self.prompt_tokens, self.completion_tokens = complete.prompt_tokens, complete.completion_tokens

    def _message(self, text: str) -> ChatMessage:
        reasoning = "".join(chunk.reasoning for chunk in self._chunks)
        calls = [MessageToolCall(**self._call_fields(call)) for chunk in self._chunks for call in chunk.calls]
        invalid = [call for chunk in self._chunks for call in chunk.invalid_calls]
        return ChatMessage(
            role="assistant",
            content=text or (None if calls or invalid else ""),
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
            invalid_tool_calls=invalid or UNSET,
        )

    def _deltas(self, item: Chunk) -> list[Delta]:
        """The deltas of a chunk: reasoning, text, then each call."""
        deltas = [Delta(reasoning_content=item.reasoning)] if item.reasoning else []
        deltas += [Delta(content=item.text)] if item.text else []
        for call in item.calls:
            deltas.append(Delta(tool_calls=[DeltaToolCall(index=self._tool_call_count, **self._call_fields(call))]))
        return deltas + [Delta(invalid_tool_calls=[call]) for call in item.invalid_calls]

    def _call_fields(self, call: ToolCall) -> dict[str, Any]:
        self._tool_call_count += 1
        function = FunctionCall(name=call.name, arguments=call.arguments)
        return {"id": call.id, "type": "function", "function": function}

    def _delta_part(
        self, delta: Delta, logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> ChatChunkChoice:
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=logprobs, finish_reason=reason)

    def _text_part(self, text: str, logprobs: TextLogprobs | None = None, reason: str | None = None) -> TextChoice:
        return TextChoice(index=self._index, text=text, logprobs=logprobs, finish_reason=reason)

    def _chat_logprobs(self, tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
        return None if self._call.logprobs is None or not tokens else self._logprob_format.of_chat(tokens)

    def _text_logprobs(self, tokens: Sequence[ScoredToken]) -> TextLogprobs | None:
        return None if self._call.logprobs is None or not tokens else self._logprob_format.of_text(tokens)

    def _prompt(self) -> str:
        given = self._call.prompts[self._index // self._call.params.n]
        return given if isinstance(given, str) else self._tokenizer.decode(self._request.prompt)

    def _prompt_logprobs(self) -> list[ScoredToken]:
        """The tokens of the prompt, which the text begins with."""
        written = b"".join(map(self._tokenizer.token_bytes, self._request.prompt)).decode(errors="replace")
        # A tokenizer may put a space before the first word, which the text does not have.
        self._logprob_format.offsets = TextOffsets(-1 if written[:1] == " " != self._prompt()[:1] else 0)
        return [ScoredToken(self._request.prompt[0], None, ()), *self._scores]
