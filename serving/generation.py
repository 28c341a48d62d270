"""From what a caller asks for to a validated Request, and from the backend's tokens to text.

Every surface goes through `Generation`: `accept` checks and completes a request, `stream` runs it.
"""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, cast

from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, MoejaxError, PromptTooLong
from serving.metrics import Metrics, RequestTimer
from serving.request import Finished, FinishReason, Request, SamplingParams, Token
from serving.status import Backend
from serving.tokens import Detokenizer, Message, StopStrings, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]

ROLES = ("system", "user", "assistant")
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_ID_LENGTH = 128
MAX_TEMPERATURE = 100.0
_LONG_TEXT = 20_000  # characters; encoding more than this would hold up other streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens as they came, and the text that became certain with them. `index` is the first token's."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete:
    """The end of a stream. `matched` is the stop string or stop token that ended it, if one did."""

    request_id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    epochs: tuple[int, ...]
    seed: int
    matched: str | int | None = None


class Generation:
    """Requests of all surfaces, over one backend. `clock` and `draw` (a seed below 2**31) are for tests."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], int] = lambda: secrets.randbits(31),
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._clock = clock
        self._draw = draw

    async def accept(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str = "", timeout_s: float | None = None
    ) -> Request:
        """A complete request. Raises InvalidRequest or PromptTooLong, with `param` naming the field."""
        model = self.backend.model
        check_sampling(params, model.vocab_size)
        check_id(request_id)
        tokens = await self._encode(prompt)
        room = model.max_context - len(tokens)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; this model's context is {model.max_context}, and at "
                f"least one is needed for the answer. Shorten the prompt to {model.max_context - 1} tokens.",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}, but a prompt of {len(tokens)} tokens leaves {room} of "
                f"this model's context of {model.max_context}. Ask for at most {room}, or leave "
                "max_tokens out.",
                param="max_tokens",
            )
        return Request(
            id=request_id or uuid.uuid4().hex,
            prompt=tokens,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            seed=self._draw() if params.seed is None else params.seed & 0x7FFFFFFF,  # fits any 32-bit integer
            temperature=params.temperature,
            top_k=min(params.top_k, model.vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            stop_tokens=frozenset(params.stop_tokens) | frozenset(() if params.ignore_eos else model.stop_tokens),
            deadline=None if timeout_s is None else self._clock() + timeout_s,
        )

    async def stream(self, request: Request, stop: Sequence[str] = ()) -> AsyncGenerator[Chunk | Complete, None]:
        """Chunks, then one Complete, or a MoejaxError. Closing the generator cancels the request."""
        timer = RequestTimer(self.metrics, len(request.prompt), self._clock)
        text = _Text(self.tokenizer, request, stop)
        ended = "abort"
        try:
            # Leaving this block, also because a stop string was found, cancels the request in the backend.
            source = cast(AsyncGenerator[Token | Finished, None], self.backend.stream(request))
            async with contextlib.aclosing(source) as items:
                async for item in items:
                    if isinstance(item, Finished):
                        break
                    timer.token()
                    yield text.push(item)
                    if isinstance(text.matched, str):
                        item = Finished("stop")
                        break
                else:
                    raise Internal(f"request {request.id} ended without a reason.")
            rest, finished = text.rest(), _finish(request, text, item.reason)
            if rest is not None:
                yield rest
            ended = finished.reason
            yield finished
        except MoejaxError as error:
            ended = "abort" if isinstance(error, Cancelled) else "error"
            raise
        finally:
            timer.finished(ended)

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("the prompt is empty. Send at least one character.", param="prompt")
            return await _off_loop(len(prompt), self.tokenizer.encode, prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty. Send at least one token or message.", param="prompt")
        if isinstance(prompt[0], Message):
            messages = cast(Sequence[Message], prompt)
            check_roles(messages)
            return await _off_loop(sum(len(m.content) for m in messages), self.tokenizer.chat, messages)
        ids = tuple(cast(Sequence[int], prompt))
        check_tokens(ids, self.backend.model.vocab_size, "prompt")
        return ids


class _Text:
    """The text side of one stream: whole characters, up to the first stop string or stop token."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stop)
        self._stop_tokens = request.stop_tokens
        self.tokens = 0
        self.epochs: list[int] = []
        self.matched: str | int | None = None

    def push(self, token: Token) -> Chunk:
        self.tokens += 1
        if token.epoch not in self.epochs:
            self.epochs.append(token.epoch)
        if token.id in self._stop_tokens:
            self.matched, text = token.id, ""
        else:
            text = self._stops.push(self._detokenizer.push(token.id))
            self.matched = self._stops.matched
        return Chunk(index=token.index, token_ids=(token.id,), text=text, logprobs=(token.logprob,), epoch=token.epoch)

    def rest(self) -> Chunk | None:
        """Text that was held back and no longer needs to be, as a chunk without tokens."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if not text:
            return None
        return Chunk(index=self.tokens, token_ids=(), text=text, logprobs=(), epoch=self.epochs[-1])


def _finish(request: Request, text: _Text, reason: FinishReason) -> Complete:
    if reason == "deadline":
        raise DeadlineExceeded(f"the deadline passed after {text.tokens} tokens.")
    if reason == "cancelled":
        raise Cancelled(f"request {request.id} was aborted after {text.tokens} tokens.")
    return Complete(
        request_id=request.id,
        reason=reason,
        prompt_tokens=len(request.prompt),
        completion_tokens=text.tokens,
        epochs=tuple(text.epochs),
        seed=request.seed,
        matched=text.matched,
    )


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first field that is out of its range."""
    _within("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _within("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0:
        raise InvalidRequest("top_p is 0, which leaves no token. Use temperature 0 for greedy.", param="top_p")
    _within("min_p", params.min_p, 0.0, 1.0)
    _within("top_k", params.top_k, 0, 2**31 - 1)
    if params.max_tokens is not None:
        _within("max_tokens", params.max_tokens, 1, 2**31 - 1)
    if params.seed is not None:
        _within("seed", params.seed, -(2**63), 2**63 - 1)
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest(f"{len(params.stop)} stop strings; at most {MAX_STOPS} are allowed.", param="stop")
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_LENGTH}.",
                param="stop",
            )
    if len(params.stop_tokens) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"{len(params.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} are allowed.",
            param="stop_token_ids",
        )
    check_tokens(params.stop_tokens, vocab_size, "stop_token_ids")


def check_tokens(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest when a token is not in the vocabulary."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"token {position} is {token}; this model's vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}.",
                param=param,
            )


def check_roles(messages: Sequence[Message]) -> None:
    """Raises InvalidRequest on a role no chat template knows."""
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"message {position} has role {message.role!r}; known roles are {', '.join(ROLES)}.",
                param="messages",
            )


def check_id(request_id: str) -> None:
    """Raises InvalidRequest on an id that does not fit in a header or a log line."""
    if len(request_id) > MAX_ID_LENGTH or not request_id.isascii() or not (request_id + " ").isprintable():
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; it must be at most {MAX_ID_LENGTH} printable ASCII ones.",
            param="request_id",
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be between {low} and {high}.", param=name)


async def _off_loop(length: int, encode: Callable[[Any], tuple[int, ...]], text: Any) -> tuple[int, ...]:
    """Call `encode` here when the text is short, in a thread when other streams would wait for it."""
    if length > _LONG_TEXT:
        return await asyncio.to_thread(encode, text)
    return encode(text)
