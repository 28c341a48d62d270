"""From what a caller asks for to a validated Request, and from the backend's tokens to text.

Every surface goes through `Generation`: `accept` checks and completes a request, `stream` runs it.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, cast

from serving.bounds import MAX_CHOICES, check_id, check_roles, check_sampling, check_tokens
from serving.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, MoejaxError, PromptTooLong
from serving.guided import Guides
from serving.keys import CALLER, SHARE
from serving.ledger import Call
from serving.merging import merged
from serving.metrics import Metrics, RequestTimer
from serving.request import Finished, Request, SamplingParams, Scored, Token, Top
from serving.status import Backend
from serving.tokens import Detokenizer, Message, StopStrings, Tokenizer
from serving.tools import ToolCall


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as a chat template takes them, functions the model may call, and the template's own switches."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Prompt = str | Sequence[int] | Sequence[Message] | Conversation

MAX_SEED = 0x7FFFFFFF  # fits any 32-bit integer
SHAPING = (
    *("min_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
    *("top_logprobs", "prompt_logprobs", "guide", "priority"),
)
"""Fields that a request has from its sampling parameters as they are."""
_LONG_TEXT = 20_000  # characters; encoding more than this would hold up other streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptScores:
    """Log-probabilities of prompt tokens, each given all before it, from `position` on, and the likeliest instead. The
    prompt's first token has none."""

    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[Top, ...]
    choice: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens as they came, and the text that became certain with them. `index` is the first token's; `top` has the
    likeliest instead of each where they were asked for. `choice` counts the answers of one call."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    epoch: int
    top: tuple[Top, ...] = ()
    choice: int = 0
    calls: tuple[ToolCall, ...] = ()
    """Of tools, on surfaces that take them out of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Complete:
    """The end of an answer. `matched` is the stop string or stop token that ended it, if one did. `cached_tokens` of
    the prompt were in a rank's cache already."""

    request_id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    epochs: tuple[int, ...]
    seed: int
    matched: str | int | None = None
    degraded: bool = False
    """Some tokens were made while experts were masked."""
    cached_tokens: int = 0
    choice: int = 0


Item = PromptScores | Chunk | Complete
"""A part of a stream of answers."""


class Generation:
    """Requests of all surfaces, over one backend. `clock` and `draw` (a seed below 2**31) are for tests."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        metrics: Metrics,
        guides: Guides | None = None,
        *,
        max_prompt_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], int] = lambda: secrets.randbits(31),
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._max_prompt_tokens = max_prompt_tokens
        self._guides = guides or Guides(tokenizer, backend.model.vocab_size, backend.model.stop_tokens)
        self._families: dict[str, set[str]] = {}
        self._clock = clock
        self._draw = draw

    async def accept_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> list[Request]:
        """Complete requests, `n` for each prompt, with seeds that follow one another. Raises InvalidRequest or
        PromptTooLong, with `param` naming the field, when any of them cannot be served."""
        check_sampling(params, self.backend.model.vocab_size)
        if len(prompts) * params.n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n {params.n} are {len(prompts) * params.n} answers; a call has at most "
                f"{MAX_CHOICES}. Send several calls.",
                param="n" if params.n > 1 else "prompt",
            )
        name, requests = request_id or uuid.uuid4().hex, []
        for prompt in prompts:
            first = await self.accept(prompt, params, request_id=request_id, timeout_s=timeout_s)
            for number in range(params.n):
                own = name if not requests else f"{name}-{len(requests)}"
                seed = (first.seed + number) & MAX_SEED
                family = requests[-number].id if number else own
                requests.append(dataclasses.replace(first, id=own, seed=seed, family=family))
        return requests

    async def accept(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str = "", timeout_s: float | None = None
    ) -> Request:
        """A complete request. Raises InvalidRequest or PromptTooLong, with `param` naming the field."""
        model = self.backend.model
        check_sampling(params, model.vocab_size)
        check_id(request_id)
        if params.guide is not None:
            await asyncio.to_thread(self._guides.check, params.guide)
        tokens = await self.encode(prompt)
        room = model.max_context - len(tokens)
        if room < (params.max_tokens != 0):
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; this model's context is {model.max_context}, and at "
                f"least one is needed for the answer. Shorten the prompt to {model.max_context - 1} tokens.",
                param="prompt",
            )
        if self._max_prompt_tokens is not None and len(tokens) > self._max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; this server takes at most {self._max_prompt_tokens}.",
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
            seed=self._draw() if params.seed is None else params.seed & MAX_SEED,
            temperature=params.temperature,
            top_k=min(params.top_k, model.vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            stop_tokens=frozenset(params.stop_tokens) | frozenset(() if params.ignore_eos else model.stop_tokens),
            deadline=None if timeout_s is None else self._clock() + timeout_s,
            owner=CALLER.get(),
            share=SHARE.get(),
            **{name: getattr(params, name) for name in SHAPING},
        )

    async def streams(
        self,
        requests: Sequence[Request],
        stop: Sequence[str] = (),
        *,
        form: Mapping[str, Any] | None = None,
        created: int = 0,
    ) -> AsyncGenerator[Item, None]:
        """The items of all answers of a call as they come, each with its `choice`. The first error is the call's.
        Closing the generator, or an error, cancels all of them. `form` and `created` are kept with the call."""
        call = Call(
            id=requests[0].id,
            requests=tuple(requests),
            stop=tuple(stop),
            owner=CALLER.get(),
            form=form,
            created=created,
        )
        self.backend.remember(call)
        try:
            async with contextlib.aclosing(self._answers(call, again=False)) as items:
                async for item in items:
                    yield item
        finally:
            self.backend.left(call.id)

    def recall(self, call_id: str) -> Call:
        """A call of this caller's that can be told again. Raises UnknownRequest."""
        return self.backend.recall(call_id, CALLER.get())

    def again(self, call: Call) -> AsyncGenerator[Item, None]:
        """The items of a call from its first, and then as they come; each answer's are the same each time."""
        return self._answers(call, again=True)

    async def keep(self, calls: Sequence[Call]) -> None:
        """Be the reader of calls that nobody reads yet, so that they end as they should."""
        await asyncio.gather(*(self._read_to_the_end(call) for call in calls))

    async def _read_to_the_end(self, call: Call) -> None:
        with contextlib.suppress(MoejaxError):
            async for _ in self.again(call):
                pass

    async def _answers(self, call: Call, *, again: bool) -> AsyncGenerator[Item, None]:
        requests, stop = call.requests, call.stop
        if len(requests) == 1:
            async with contextlib.aclosing(self.stream(requests[0], stop, again=again)) as items:
                async for item in items:
                    yield item
            return
        family = self._families[requests[0].id] = {request.id for request in requests}
        sources = [self.stream(request, stop, again=again) for request in requests]
        try:
            async with contextlib.aclosing(merged(sources)) as items:
                async for choice, item in items:
                    if isinstance(item, Complete):
                        family.discard(item.request_id)
                    yield dataclasses.replace(item, choice=choice)
        finally:
            self._families.pop(requests[0].id, None)

    def abort(self, request_id: str) -> bool:
        """Cancel a call by the id of its first answer; False when none of its answers is waiting or running."""
        family = self._families.get(request_id, {request_id})
        return sum(self.backend.abort(each) for each in family) > 0  # all of them, not the first alone

    async def stream(
        self, request: Request, stop: Sequence[str] = (), *, again: bool = False
    ) -> AsyncGenerator[Item, None]:
        """Scores of the prompt where they were asked for, chunks, then one Complete, or a MoejaxError. Closing the
        generator cancels the request. `again`: all of one that runs or has ended; it counts in no metric."""
        timer = None if again else RequestTimer(self.metrics, request, self._clock)
        text, ended = _Text(self.tokenizer, request, stop), "abort"
        try:
            # Leaving this block, also because a stop string was found, cancels the request in the backend.
            opened = self.backend.replay(request.id) if again else self.backend.stream(request)
            source = cast(AsyncGenerator[Scored | Token | Finished, None], opened)
            async with contextlib.aclosing(source) as items:
                async for item in items:
                    if isinstance(item, Finished):
                        break
                    if isinstance(item, Scored):
                        yield _prompt_scores(request, item)
                        continue
                    if timer is not None:
                        timer.token(item.epoch)
                    yield text.push(item)
                    if isinstance(text.matched, str):
                        item = Finished("stop", item.reused)
                        break
                else:
                    raise Internal(f"request {request.id} ended without a reason.")
            rest, finished = text.rest(), _finish(request, text, item)
            if rest is not None:
                yield rest
            ended = finished.reason
            yield finished
        except MoejaxError as error:
            ended = "abort" if isinstance(error, Cancelled) else "error"
            raise
        finally:
            if timer is not None:
                timer.finished(ended)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt. Raises InvalidRequest."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("the prompt is empty. Send at least one character.", param="prompt")
            return await _off_loop(len(prompt), self.tokenizer.encode, prompt)
        if isinstance(prompt, Conversation):
            return await self._encode_conversation(prompt)
        if not prompt:
            raise InvalidRequest("the prompt is empty. Send at least one token or message.", param="prompt")
        if isinstance(prompt[0], Message):
            messages = cast(Sequence[Message], prompt)
            check_roles([message.role for message in messages])
            return await _off_loop(sum(len(m.content) for m in messages), self.tokenizer.chat, messages)
        ids = tuple(cast(Sequence[int], prompt))
        check_tokens(ids, self.backend.model.vocab_size, "prompt")
        return ids

    async def _encode_conversation(self, prompt: Conversation) -> tuple[int, ...]:
        if not prompt.messages:
            raise InvalidRequest("there are no messages. Send at least one.", param="messages")
        check_roles([str(message["role"]) for message in prompt.messages])

        def encode(tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
            return self.tokenizer.chat(prompt.messages, tools=tools or None, variables=prompt.variables)

        length = sum(len(str(message["content"])) for message in prompt.messages)
        tokens = await _off_loop(length, encode, prompt.tools)
        if prompt.tools and tokens == await _off_loop(length, encode, ()):
            raise InvalidRequest("the chat template of this model has no place for tools.", param="tools")
        return tokens


class _Text:
    """The text side of one stream: whole characters, up to the first stop string or stop token. Stop strings are
    looked for after `min_tokens`."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stop: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(stop)
        self._stop_tokens = request.stop_tokens
        self._min_tokens = request.min_tokens
        self.tokens = 0
        self.epochs: list[int] = []
        self.matched: str | int | None = None
        self.degraded = False

    def push(self, token: Token) -> Chunk:
        self.tokens += 1
        self.degraded |= token.degraded
        if token.epoch not in self.epochs:
            self.epochs.append(token.epoch)
        if token.id in self._stop_tokens:
            self.matched, text = token.id, ""
        else:
            text = self._detokenizer.push(token.id)
            if self.tokens > self._min_tokens:
                text = self._stops.push(text)
                self.matched = self._stops.matched
        return Chunk(
            index=token.index,
            token_ids=(token.id,),
            text=text,
            logprobs=(token.logprob,),
            epoch=token.epoch,
            top=(token.top,) if token.top else (),
        )

    def rest(self) -> Chunk | None:
        """Text that was held back and no longer needs to be, as a chunk without tokens."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if not text:
            return None
        return Chunk(index=self.tokens, token_ids=(), text=text, logprobs=(), epoch=self.epochs[-1])


def _prompt_scores(request: Request, scored: Scored) -> PromptScores:
    end = scored.position + len(scored.logprobs)
    ids = request.prompt[scored.position : end]
    return PromptScores(position=scored.position, token_ids=ids, logprobs=scored.logprobs, top=scored.top)


def _finish(request: Request, text: _Text, finished: Finished) -> Complete:
    reason = finished.reason
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
        degraded=text.degraded,
        cached_tokens=finished.reused,
    )


async def _off_loop(length: int, encode: Callable[[Any], tuple[int, ...]], text: Any) -> tuple[int, ...]:
    """Call `encode` here when the text is short, in a thread when other streams would wait for it."""
    if length > _LONG_TEXT:
        return await asyncio.to_thread(encode, text)
    return encode(text)
