"""Python clients of a moejax server, over gRPC.

    from serving import Client

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The capital of France is", temperature=0, max_tokens=8).text)
        for chunk in client.stream("Once upon a time"):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods for asyncio. Errors are the server's own: every MoejaxError arrives as its
class, and `Unreachable` says that no server answers.
"""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, cast

import grpc
import grpc.aio

from serving import wire
from serving.errors import Internal, MoejaxError, NoCapacity, UnknownRequest
from serving.faults import Action, Instruction
from serving.generation import Chunk, Complete, Prompt, PromptScores
from serving.proto.moejax.v1 import inference_pb2, inference_pb2_grpc, resilience_pb2, resilience_pb2_grpc
from serving.request import SamplingParams, Top
from serving.status import Event, ModelInfo, Prospect, Status
from serving.tls import ClientTls
from serving.tokens import Message
from serving.tools import ToolCall
from serving.wire import Unreachable

__all__ = ["AsyncClient", "AsyncStream", "Client", "Result", "Stream", "Unreachable"]

RESUME_S = 60.0
"""For so long a client tries to go on with a stream whose connection broke."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.5
DEFAULT_ADDRESS = "127.0.0.1:50051"
_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
)


class Addressed(Protocol):
    """A running server, for example `serving.Server`."""

    @property
    def address(self) -> str:
        """host:port of its gRPC surface."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A whole answer. `reason` is stop or length; `epochs` are those of the meshes that made it. `top` and
    `prompt_logprobs` (of the prompt's tokens but the first) are there where they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str
    prompt_tokens: int
    completion_tokens: int
    epochs: tuple[int, ...]
    seed: int
    cached_tokens: int = 0
    top: tuple[Top, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[Top, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    """Of tools, in answers to a `Conversation` with tools."""


class _Start:
    """A call that may break, and how it is taken up again."""

    def __init__(self, stub: Any, message: Any, timeout_s: float | None, metadata: Any, resume_s: float) -> None:
        self._stub = stub
        self._id = message.request_id
        self._metadata = metadata
        self._resume_s = resume_s
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s
        self._after: dict[int, int] = {}
        self._broke: MoejaxError | None = None
        self._broke_at = 0.0
        self.pause_s = _FIRST_PAUSE_S
        self.call = stub.Generate(message, timeout=timeout_s, metadata=metadata)

    def have(self, choice: int, sequence: int) -> None:
        """A response has come."""
        self._broke, self._after[choice] = None, sequence

    def again(self, error: MoejaxError) -> Any:
        """The call to go on with after an error, None when it is the call's own. A server that is not there at first
        is not waited for. Raises the error that broke the call when it has been in vain."""
        now = time.monotonic()
        if self._broke is None:
            accepted = bool(self._after) or "failed to connect" not in str(error)
            if not isinstance(error, Unreachable) or not accepted or self._resume_s <= 0:
                return None
            self._broke, self._broke_at, self.pause_s = error, now, _FIRST_PAUSE_S
        elif not isinstance(error, Unreachable | NoCapacity):
            if isinstance(error, UnknownRequest | Internal):
                raise self._broke
            return None
        elif now - self._broke_at > self._resume_s:
            return None
        else:
            self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
        after = [self._after.get(choice, 0) for choice in range(max(self._after, default=-1) + 1)]
        left = None if self._ends_at is None else max(self._ends_at - now, 0.0)
        message = inference_pb2.ResumeRequest(request_id=self._id, after=after)
        return self._stub.Resume(message, timeout=left, metadata=self._metadata)


class _Ends:
    """What a stream has besides its chunks."""

    def __init__(self, start: "_Start", address: str) -> None:
        self._start = start
        self._call = start.call
        self._address = address
        self.completes: list[Complete] = []
        """The ends of its answers so far, in order of choice once all are there."""
        self.scores: list[PromptScores] = []
        """Log-probabilities of the prompt, where they were asked for."""

    @property
    def complete(self) -> Complete | None:
        """The end of the first answer, None while it runs."""
        return next((each for each in self.completes if each.choice == 0), None)

    def _resumed(self, error: MoejaxError) -> bool:
        """Go on after a connection broke: the server may be there again. False when that is not it, or in vain."""
        call = self._start.again(error)
        if call is not None:
            self._call = call
        return call is not None

    def _chunk(self, message: Any) -> Chunk | None:
        self._start.have(message.choice, message.sequence)
        item = wire.response_value(message)
        if isinstance(item, Chunk):
            return item
        if isinstance(item, PromptScores):
            self.scores.append(item)
        else:
            self.completes = sorted([*self.completes, item], key=lambda each: each.choice)
        return None


class Stream(_Ends):
    """Chunks of an answer, or of all `n` (see `Chunk.choice`), as they come; `complete` is there when they have
    ended. Leaving early cancels."""

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while True:
                try:
                    with _errors(self._address):
                        for message in self._call:
                            if (chunk := self._chunk(message)) is not None:
                                yield chunk
                    return
                except MoejaxError as error:
                    if not self._resumed(error):
                        raise
                    time.sleep(self._start.pause_s)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request on the server; nothing happens when it has ended."""
        self._call.cancel()


class AsyncStream(_Ends):
    """As `Stream`, with `async for`."""

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            while True:
                try:
                    with _errors(self._address):
                        async for message in self._call:
                            if (chunk := self._chunk(message)) is not None:
                                yield chunk
                    return
                except MoejaxError as error:
                    if not self._resumed(error):
                        raise
                    await asyncio.sleep(self._start.pause_s)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End the request on the server; nothing happens when it has ended."""
        self._call.cancel()


class _Calls:
    """What both clients share: the address, the stubs and the messages."""

    _channel: Any

    def __init__(self, target: str | Addressed, module: Any, api_key: str | None, tls: ClientTls | None) -> None:
        self.resume_s = RESUME_S
        self.address = target if isinstance(target, str) else target.address
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        if tls is None:
            self._channel = module.insecure_channel(self.address, options=_OPTIONS)
        else:
            self._channel = module.secure_channel(self.address, tls.grpc(), options=_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._resilience = resilience_pb2_grpc.ResilienceStub(self._channel)

    def _generate(self, prompt: Prompt, timeout_s: float | None, request_id: str, fields: dict[str, Any]) -> _Start:
        message = wire.request_message(prompt, _sampling(fields), request_id or uuid.uuid4().hex)
        return _Start(self._inference, message, timeout_s, self._metadata, self.resume_s)


class Client(_Calls):
    """A blocking client. `target` is host:port or a running server; `api_key` and `tls` as the server asks.

    >>> from serving import Client, Server                                      # doctest: +SKIP
    >>> with Server(model="tiny") as server, Client(server) as client:          # doctest: +SKIP
    ...     client.generate("To be, or not", temperature=0, max_tokens=3).text
    ' to be,'
    """

    def __init__(
        self, target: str | Addressed = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        super().__init__(target, grpc, api_key, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running streams end."""
        self._channel.close()

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> Stream:
        """Start a request and iterate over its chunks.

        `prompt` is text, token ids or a list of `Message`; `sampling` are fields of `SamplingParams`. The
        request ends with DeadlineExceeded after `timeout_s`. Errors are raised while iterating.
        """
        return Stream(self._generate(prompt, timeout_s, request_id, sampling), self.address)

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> Result:
        """The whole answer, the first when `n` are asked for; arguments as for `stream`."""
        return self.generate_all(prompt, timeout_s=timeout_s, request_id=request_id, **sampling)[0]

    def generate_all(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> list[Result]:
        """All `n` answers; arguments as for `stream`."""
        stream = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, **sampling)
        return _results(list(stream), stream)

    def chat(self, messages: Sequence[Message] | str, **arguments: Any) -> Result:
        """The assistant's next turn. A plain text is one turn of the user's; arguments as for `stream`."""
        return self.generate(_turns(messages), **arguments)

    def abort(self, request_id: str) -> bool:
        """Cancel a request of anybody's by its id; False when it is not known."""
        with _errors(self.address):
            return self._inference.Abort(
                inference_pb2.AbortRequest(request_id=request_id), metadata=self._metadata
            ).aborted

    def model(self) -> ModelInfo:
        """The model being served."""
        with _errors(self.address):
            return wire.model_value(
                self._inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), metadata=self._metadata)
            )

    def status(self) -> Status:
        """The whole server now."""
        with _errors(self.address):
            return wire.status_value(
                self._resilience.GetStatus(resilience_pb2.GetStatusRequest(), metadata=self._metadata)
            )

    def watch(self, after: int = 0, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Events with a sequence above `after`: past ones, then as they happen, until left or `timeout_s`."""
        call = self._resilience.Watch(
            resilience_pb2.WatchRequest(after=after), timeout=timeout_s, metadata=self._metadata
        )
        try:
            with _errors(self.address):
                for message in call:
                    yield wire.event_value(message)
        finally:
            call.cancel()

    def kill(self, rank: int, signal: str = "SIGKILL", *, host: str = "") -> None:
        """Kill (SIGKILL) or stop (SIGSTOP) a rank of a server started with --chaos, or spoil an expert of it (NAN,
        BITFLIP). With `host`, all its ranks."""
        with _errors(self.address):
            self._resilience.Kill(
                resilience_pb2.KillRequest(rank=rank, signal=signal, host=host), metadata=self._metadata
            )

    def what_if(self) -> list[Prospect]:
        """What the loss of each rank and host would cost now."""
        with _errors(self.address):
            answer = self._resilience.WhatIf(resilience_pb2.WhatIfRequest(), metadata=self._metadata)
        return [wire.prospect_value(prospect) for prospect in answer.prospects]

    def plan(self) -> str:
        """The plan in force as the JSON of a plan file, which `moejax plan` reads; empty while no rank is alive."""
        with _errors(self.address):
            return self._resilience.WhatIf(resilience_pb2.WhatIfRequest(), metadata=self._metadata).plan

    def apply(self, action: Action, *ranks: int, **fields: Any) -> list[int]:
        """A planned change: pause, retry, drain, scale_down or scale_up, with the fields of `faults.Instruction`.
        Returns the ranks that serve when it is done."""
        instruction = Instruction(action=action, ranks=ranks, **fields)
        with _errors(self.address):
            answer = self._resilience.Apply(wire.instruction_message(instruction), metadata=self._metadata)
            return list(answer.serving)

    def report(self, rank: int, level: int, code: str = "", message: str = "") -> str:
        """Report an error of a rank's device, level 1 to 6. Returns what is done about it."""
        request = resilience_pb2.ReportRequest(rank=rank, level=level, code=code, message=message)
        with _errors(self.address):
            answer = self._resilience.Report(request, metadata=self._metadata)
        return answer.action


class AsyncClient(_Calls):
    """As `Client`, for asyncio.

    async with AsyncClient("127.0.0.1:50051") as client:
        async for chunk in client.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="", flush=True)
    """

    def __init__(
        self, target: str | Addressed = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        super().__init__(target, grpc.aio, api_key, tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running streams end."""
        await self._channel.close()

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> AsyncStream:
        """Start a request and iterate over its chunks; see `Client.stream`."""
        return AsyncStream(self._generate(prompt, timeout_s, request_id, sampling), self.address)

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> Result:
        """The whole answer, the first when `n` are asked for; arguments as for `stream`."""
        return (await self.generate_all(prompt, timeout_s=timeout_s, request_id=request_id, **sampling))[0]

    async def generate_all(
        self, prompt: Prompt, *, timeout_s: float | None = None, request_id: str = "", **sampling: Any
    ) -> list[Result]:
        """All `n` answers; arguments as for `stream`."""
        stream = self.stream(prompt, timeout_s=timeout_s, request_id=request_id, **sampling)
        return _results([chunk async for chunk in stream], stream)

    async def chat(self, messages: Sequence[Message] | str, **arguments: Any) -> Result:
        """The assistant's next turn; see `Client.chat`."""
        return await self.generate(_turns(messages), **arguments)

    async def abort(self, request_id: str) -> bool:
        """Cancel a request of anybody's by its id; False when it is not known."""
        with _errors(self.address):
            return (
                await self._inference.Abort(inference_pb2.AbortRequest(request_id=request_id), metadata=self._metadata)
            ).aborted

    async def model(self) -> ModelInfo:
        """The model being served."""
        with _errors(self.address):
            return wire.model_value(
                await self._inference.GetModelInfo(inference_pb2.GetModelInfoRequest(), metadata=self._metadata)
            )

    async def status(self) -> Status:
        """The whole server now."""
        with _errors(self.address):
            return wire.status_value(
                await self._resilience.GetStatus(resilience_pb2.GetStatusRequest(), metadata=self._metadata)
            )

    async def watch(self, after: int = 0, *, timeout_s: float | None = None) -> AsyncIterator[Event]:
        """Events with a sequence above `after`; see `Client.watch`."""
        call = self._resilience.Watch(
            resilience_pb2.WatchRequest(after=after), timeout=timeout_s, metadata=self._metadata
        )
        try:
            with _errors(self.address):
                async for message in call:
                    yield wire.event_value(message)
        finally:
            call.cancel()

    async def kill(self, rank: int, signal: str = "SIGKILL", *, host: str = "") -> None:
        """Kill (SIGKILL) or stop (SIGSTOP) a rank of a server started with --chaos, or spoil an expert of it (NAN,
        BITFLIP). With `host`, all its ranks."""
        with _errors(self.address):
            await self._resilience.Kill(
                resilience_pb2.KillRequest(rank=rank, signal=signal, host=host), metadata=self._metadata
            )

    async def what_if(self) -> list[Prospect]:
        """What the loss of each rank and host would cost now."""
        with _errors(self.address):
            answer = await self._resilience.WhatIf(resilience_pb2.WhatIfRequest(), metadata=self._metadata)
        return [wire.prospect_value(prospect) for prospect in answer.prospects]

    async def plan(self) -> str:
        """The plan in force as the JSON of a plan file, which `moejax plan` reads; empty while no rank is alive."""
        with _errors(self.address):
            return (await self._resilience.WhatIf(resilience_pb2.WhatIfRequest(), metadata=self._metadata)).plan

    async def apply(self, action: Action, *ranks: int, **fields: Any) -> list[int]:
        """A planned change: pause, retry, drain, scale_down or scale_up, with the fields of `faults.Instruction`.
        Returns the ranks that serve when it is done."""
        instruction = Instruction(action=action, ranks=ranks, **fields)
        with _errors(self.address):
            answer = await self._resilience.Apply(wire.instruction_message(instruction), metadata=self._metadata)
            return list(answer.serving)

    async def report(self, rank: int, level: int, code: str = "", message: str = "") -> str:
        """Report an error of a rank's device, level 1 to 6. Returns what is done about it."""
        request = resilience_pb2.ReportRequest(rank=rank, level=level, code=code, message=message)
        with _errors(self.address):
            answer = await self._resilience.Report(request, metadata=self._metadata)
        return answer.action


def _sampling(fields: dict[str, Any]) -> SamplingParams:
    if isinstance(fields.get("stop"), str):
        fields = fields | {"stop": (fields["stop"],)}
    if isinstance(fields.get("logit_bias"), Mapping):
        fields = fields | {"logit_bias": tuple(fields["logit_bias"].items())}
    return SamplingParams(**fields)


def _turns(messages: Sequence[Message] | str) -> Sequence[Message]:
    return [Message("user", messages)] if isinstance(messages, str) else messages


def _results(chunks: Sequence[Chunk], ends: _Ends) -> list[Result]:
    if not ends.completes:
        raise Internal("the server ended the stream without a reason.")
    return [_result([c for c in chunks if c.choice == end.choice], end, ends.scores) for end in ends.completes]


def _result(chunks: Sequence[Chunk], complete: Complete, scores: Sequence[PromptScores]) -> Result:
    scores = [each for each in scores if each.choice == complete.choice]
    return Result(
        text="".join(c.text for c in chunks),
        token_ids=tuple(t for c in chunks for t in c.token_ids),
        logprobs=tuple(p for c in chunks for p in c.logprobs),
        reason=complete.reason,
        prompt_tokens=complete.prompt_tokens,
        completion_tokens=complete.completion_tokens,
        epochs=complete.epochs,
        seed=complete.seed,
        cached_tokens=complete.cached_tokens,
        top=tuple(t for c in chunks for t in c.top),
        prompt_logprobs=tuple(p for each in scores for p in each.logprobs),
        prompt_top=tuple(t for each in scores for t in each.top),
        calls=tuple(call for c in chunks for call in c.calls),
    )


@contextlib.contextmanager
def _errors(address: str) -> Iterator[None]:
    """Raise what a gRPC status stands for."""
    try:
        yield
    except grpc.RpcError as status:
        call = cast(grpc.Call, status)  # which it always is, but its type does not say so
        error: MoejaxError = wire.error_value(call.code(), call.details() or "", call.trailing_metadata())
        if isinstance(error, Unreachable):
            text = f"no moejax server answers at {address}: {error}. Is `moejax serve` running?"
            error = Unreachable(text)
        raise error from None
