"""Checks a call and turns it into requests, runs them on the backend, and turns their tokens into answers.

HTTP, gRPC and vLLM's gRPC service all use `RequestProcessor`: `accept_all` makes the requests, `stream_call` runs them.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from typing import Any, cast

from serving.auth.api_keys import CALLER, SHARE
from serving.core.answers import AnswerItem, AnswerText, Complete, complete, prompt_scores
from serving.core.merging import merged
from serving.core.prompts import BareText, Conversation, Prompt, PromptEncoder
from serving.errors import Cancelled, Internal, InvalidRequest, MoejaxError, PromptTooLong
from serving.observability.metrics import Metrics, RequestTimer
from serving.protocol.backend import Backend, answered
from serving.protocol.clock import now
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import AnswerParsing, Call, Finished, Request, Scored, Token
from serving.protocol.sampling import MAX_SEED, SamplingDefaults, SamplingParams
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Message, Tokenizer
from serving.text.validation import MAX_CHOICES, SAME_NAMES, FieldNames, check_id, check_sampling


class RequestProcessor:
    """Processes the requests of all surfaces on one backend. `clock` (seconds) and `draw_seed` (a seed below 2**31) are
    arguments for tests."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        metrics: Metrics,
        grammar_matcher: GrammarMatcher | None = None,
        *,
        max_prompt_tokens: int | None = None,
        sampling_defaults: SamplingDefaults | None = None,
        clock: Callable[[], float] = now,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(31),
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.sampling_defaults = sampling_defaults or SamplingDefaults()
        self._max_prompt_tokens = max_prompt_tokens
        self._grammar_matcher = grammar_matcher or GrammarMatcher(
            tokenizer, backend.model.vocab_size, backend.model.stop_tokens
        )
        self._open_answers: dict[str, set[str]] = {}
        self._clock = clock
        self._draw_seed = draw_seed

    @property
    def model(self) -> ModelInfo:
        """The model as clients may know it."""
        return dataclasses.replace(
            self.backend.model,
            has_chat_template=self.tokenizer.has_chat_template,
            sampling_defaults=self.sampling_defaults,
        )

    async def accept_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        names: FieldNames = SAME_NAMES,
    ) -> list[Request]:
        """The requests of a call: `n` for each prompt, with consecutive seeds. Raises InvalidRequest or PromptTooLong
        when one of them cannot be served; the error has the `names` of the caller's API, and `param` names the field.
        """
        try:
            return await self._accept_all(prompts, params, request_id, timeout_s, names)
        except InvalidRequest as error:
            error.param = names.path(error.param)
            raise

    async def _accept_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str,
        timeout_s: float | None,
        names: FieldNames,
    ) -> list[Request]:
        check_sampling(params, self.backend.model.vocab_size, names)
        if len(prompts) * params.n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n {params.n} are {len(prompts) * params.n} answers; a call has at most "
                f"{MAX_CHOICES}. Send several calls.",
                param="n" if params.n > 1 else "prompt",
            )
        name, requests = request_id or uuid.uuid4().hex, []
        for prompt in prompts:
            first = await self.accept(prompt, params, request_id=request_id, timeout_s=timeout_s, names=names)
            for number in range(params.n):
                own = name if not requests else f"{name}-{len(requests)}"
                group = requests[-number].id if number else own
                sampling = dataclasses.replace(first.sampling, seed=(first.sampling.seed + number) & MAX_SEED)
                requests.append(dataclasses.replace(first, id=own, sampling=sampling, prompt_group=group))
        return requests

    async def accept(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str = "",
        timeout_s: float | None = None,
        names: FieldNames = SAME_NAMES,
    ) -> Request:
        """One request, with every open value decided. Raises InvalidRequest or PromptTooLong; the text has the `names`
        of the caller's API, `param` the name here."""
        model = self.backend.model
        check_sampling(params, model.vocab_size, names)
        check_id(request_id)
        tokens = await self.encode(prompt)
        parsing = self._answer_parsing(prompt, tokens)
        reasoning = self.tokenizer.chat_format.reasoning
        constraint = params.structured_outputs
        if constraint is not None:
            constraint = dataclasses.replace(constraint, param=names.path(constraint.param) or "")
            params = dataclasses.replace(params, structured_outputs=constraint)
            if reasoning is not None and parsing is not None and parsing.inside_reasoning:
                constraint = dataclasses.replace(constraint, after=reasoning.end)
                params = dataclasses.replace(params, structured_outputs=constraint)
            await asyncio.to_thread(self._grammar_matcher.check, constraint)
        room = model.max_context - len(tokens)
        if room < (params.max_tokens != 0):
            raise PromptTooLong(
                f"This model's maximum context length is {model.max_context} tokens; the prompt has {len(tokens)} "
                f"tokens, and at least one is needed for the answer. Shorten the prompt to {model.max_context - 1} "
                "tokens.",
                param="prompt",
            )
        if self._max_prompt_tokens is not None and len(tokens) > self._max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; this server takes at most {self._max_prompt_tokens}.",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise PromptTooLong(
                f"This model's maximum context length is {model.max_context} tokens; {names['max_tokens']} is "
                f"{params.max_tokens}, and a prompt of {len(tokens)} tokens leaves {room}. Ask for at most {room}, or "
                f"leave {names['max_tokens']} out.",
                param="max_tokens",
            )
        return Request(
            id=request_id or uuid.uuid4().hex,
            prompt=tokens,
            sampling=params.resolve(
                seed=self._draw_seed(),
                room=room,
                vocab_size=model.vocab_size,
                model_stop_tokens=model.stop_tokens,
                defaults=self.sampling_defaults,
            ),
            deadline=None if timeout_s is None else self._clock() + timeout_s,
            owner=CALLER.get(),
            share=SHARE.get(),
            parsing=parsing,
        )

    def _answer_parsing(self, prompt: Prompt, tokens: Sequence[int]) -> AnswerParsing | None:
        """How the answer to a prompt is read: that to a conversation in parts, others as plain text."""
        if isinstance(prompt, Conversation):
            return self.tokenizer.answer_parsing(tokens, prompt.tools, prompt.parallel_tool_calls)
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Message):
            return self.tokenizer.answer_parsing(tokens, (), True)
        return None

    async def stream_call(
        self,
        requests: Sequence[Request],
        stop: Sequence[str] = (),
        *,
        form: Mapping[str, Any] | None = None,
        created: int = 0,
    ) -> AsyncGenerator[AnswerItem, None]:
        """Run the requests of a call; yields the items of all answers as they come, each with its `choice`. The first
        error ends the call. Closing the generator, or an error, cancels all requests. `form` and `created` are kept for
        a replay of the call."""
        call = Call(
            id=requests[0].id,
            requests=tuple(requests),
            stop=tuple(stop),
            owner=CALLER.get(),
            form=form,
            created=created,
        )
        self.backend.register_call(call)
        longest = 0
        try:
            async with contextlib.aclosing(self._answer_items(call, replay=False)) as items:
                async for item in items:
                    if isinstance(item, Complete):
                        longest = max(longest, item.completion_tokens)
                    yield item
        finally:
            self.metrics.max_tokens.observe(requests[0].sampling.max_tokens)
            self.metrics.max_output_length.observe(longest)
            self.backend.close_call(call.id)

    async def find_call(self, call_id: str) -> Call:
        """A call of the current caller that can be replayed. Raises UnknownRequest."""
        return await answered(self.backend.find_call(call_id, CALLER.get()))

    def replay(self, call: Call, *, follow: bool = True) -> AsyncGenerator[AnswerItem, None]:
        """The items of a call from the first one on, and then, with `follow`, as they come. Every replay yields the
        same items."""
        return self._answer_items(call, replay=True, follow=follow)

    async def read_unattended(self, calls: Sequence[Call]) -> None:
        """Read calls that no client has resumed yet, so that they run to their end."""
        await asyncio.gather(*(self._read_to_end(call) for call in calls))

    async def _read_to_end(self, call: Call) -> None:
        with contextlib.suppress(MoejaxError):
            async for _ in self.replay(call):
                pass

    async def _answer_items(self, call: Call, *, replay: bool, follow: bool = True) -> AsyncGenerator[AnswerItem, None]:
        """The items of all answers of a call, merged."""
        requests, stop = call.requests, call.stop
        if len(requests) == 1:
            async with contextlib.aclosing(self.stream(requests[0], stop, replay=replay, follow=follow)) as items:
                async for item in items:
                    yield item
            return
        open_ids = self._open_answers[requests[0].id] = {request.id for request in requests}
        streams = [self.stream(request, stop, replay=replay, follow=follow) for request in requests]
        sources = [self._ending_together(items, open_ids) for items in streams]
        try:
            async with contextlib.aclosing(merged(sources)) as items:
                async for choice, item in items:
                    if isinstance(item, Complete):
                        open_ids.discard(item.request_id)
                    yield dataclasses.replace(item, choice=choice)
        finally:
            self._open_answers.pop(requests[0].id, None)

    async def _ending_together(
        self, items: AsyncGenerator[AnswerItem, None], open_ids: Collection[str]
    ) -> AsyncGenerator[AnswerItem, None]:
        """The items of one answer of a call. Its error is that of the other answers that are open, too."""
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    yield item
        except MoejaxError as error:
            self.backend.fail_requests(tuple(open_ids), error)
            raise

    async def abort(self, request_id: str) -> bool:
        """Cancel a call by the id of its first answer; False when none of its answers is waiting or running."""
        open_ids = sorted(self._open_answers.get(request_id, {request_id}))
        return any([await answered(self.backend.abort(each)) for each in open_ids])  # all of them, not the first alone

    async def stream(
        self, request: Request, stop: Sequence[str] = (), *, replay: bool = False, follow: bool = True
    ) -> AsyncGenerator[AnswerItem, None]:
        """Run one request: yields scores of the prompt if the call asked for them, then chunks, then one Complete.
        Raises MoejaxError. Closing the generator cancels the request. With `replay`, yields all items of a request that
        runs or has ended; metrics do not count it."""
        left_queue = self.backend.first_step_at
        timer = None if replay else RequestTimer(self.metrics, request, self._clock, left_queue)
        text, ended = AnswerText(self.tokenizer, request, stop), "abort"
        try:
            # Leaving this block, also because a stop string was found, cancels the request in the backend.
            opened = self.backend.replay(request.id, follow=follow) if replay else self.backend.stream(request)
            source = cast(AsyncGenerator[Scored | Token | Finished, None], opened)
            async with contextlib.aclosing(source) as items:
                async for item in items:
                    if isinstance(item, Finished):
                        break
                    if isinstance(item, Scored):
                        yield prompt_scores(request, item)
                        continue
                    if timer is not None:
                        timer.token(item.epoch)
                    yield text.push(item)
                    if isinstance(text.matched, str):
                        item = Finished("stop", item.cached_tokens)
                        break
                else:
                    if not follow:
                        return
                    raise Internal(f"request {request.id} ended without a reason.")
            rest, finished = text.rest(item.reason), complete(request, text, item)
            if rest is not None:
                yield rest
            ended = item.reason
            yield finished
        except MoejaxError as error:
            ended = "abort" if isinstance(error, Cancelled) else "error"
            raise
        finally:
            if timer is not None:
                timer.finished(ended)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        """As `encode`; an empty text, to which there is no answer, has its tokens too."""
        if isinstance(prompt, str) and not prompt:
            return self.tokenizer.encode(prompt, special=not isinstance(prompt, BareText))
        return await self.encode(prompt)

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt. Raises InvalidRequest, with `param` naming the field."""
        encoder = PromptEncoder(self.tokenizer, self.backend.model.vocab_size)
        return await encoder.encode(prompt)
