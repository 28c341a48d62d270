"""The client for asyncio."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc.aio

from serving.api.client.base import DEFAULT_ADDRESS, ClientBase, HasAddress, UnaryCall
from serving.api.client.completion import CompletionOutput, completion_outputs
from serving.api.client.options import GenerateOptions
from serving.api.client.prompts import ChatTurn, PromptLike, read_chat
from serving.api.client.streams import AsyncStream, raise_moejax_errors
from serving.api.client.tensors import TensorParts
from serving.api.grpc.resilience_messages import event_from_proto
from serving.auth.tls import ClientTls
from serving.errors import MoejaxError
from serving.protocol.events import Event
from serving.protocol.instructions import Action, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.status import LossForecast, Status
from serving.protocol.tensors import TensorUpdate
from serving.protocol.weights import Running

T = TypeVar("T")


class AsyncClient(ClientBase):
    """The same as `Client`, for asyncio.

    async with AsyncClient("127.0.0.1:50051") as client:
        async for chunk in client.stream("Once upon a time", max_tokens=64):
            print(chunk.text, end="", flush=True)
    """

    def __init__(
        self, target: str | HasAddress = DEFAULT_ADDRESS, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        super().__init__(target, grpc.aio, api_key, tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Running streams end."""
        if (channel := self._take_channel()) is not None:
            await channel.close()

    def stream(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Start a request and iterate over its chunks; see `Client.stream`."""
        return AsyncStream(self._generate_call(prompt, options), self.address)

    async def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> CompletionOutput:
        """The complete output, or the first of `n` outputs. Options as for `stream`."""
        return (await self.generate_all(prompt, **options))[0]

    async def generate_all(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> list[CompletionOutput]:
        """All `n` complete outputs. Options as for `stream`."""
        stream = self.stream(prompt, **options)
        return completion_outputs([chunk async for chunk in stream], stream.completes, stream.scores)

    async def chat(self, messages: Iterable[ChatTurn] | str, **options: Unpack[GenerateOptions]) -> CompletionOutput:
        """The assistant's next message; see `Client.chat`."""
        return await self.generate(read_chat(messages), **options)

    async def abort(self, request_id: str) -> bool:
        """Cancel a request by its id, whichever client sent it. False when no such request runs."""
        return await self._call(self._abort_call(request_id))

    async def tokenize(self, prompt: PromptLike) -> tuple[int, ...]:
        """The tokens that `generate` would have for a prompt; see `Client.tokenize`."""
        return await self._call(self._tokenize_call(prompt))

    async def detokenize(self, token_ids: Iterable[int]) -> str:
        """The text of token ids; special tokens have none."""
        return await self._call(self._detokenize_call(token_ids))

    async def model(self) -> ModelInfo:
        """The model being served."""
        return await self._call(self._model_call())

    async def status(self) -> Status:
        """The status of the server now."""
        return await self._call(self._status_call())

    async def watch(self, after: int = 0, *, timeout_s: float | None = None) -> AsyncIterator[Event]:
        """Events with a sequence above `after`; see `Client.watch`."""
        call = self._watch_call(after, timeout_s)
        try:
            with raise_moejax_errors(self.address):
                async for message in call:
                    yield event_from_proto(message)
        finally:
            call.cancel()

    async def kill(self, rank: int, signal: str = "SIGKILL", *, host: str = "") -> None:
        """Kill or stop a rank, or corrupt an expert of it; see `Client.kill`."""
        await self._call(self._kill_call(rank, signal, host))

    async def what_if(self) -> list[LossForecast]:
        """The predicted cost of losing each rank and each host now."""
        return await self._call(self._what_if_call())

    async def plan(self) -> str:
        """The plan in force as JSON; see `Client.plan`."""
        return await self._call(self._plan_call())

    async def apply(
        self,
        action: Action,
        *ranks: int,
        host: str = "",
        to: int | None = None,
        replace: bool = False,
        timeout_s: float = 30.0,
        model: str = "",
        version: str = "",
        running: Running = "switch",
        path: str = "",
        python: str = "",
    ) -> list[int]:
        """Make a planned change; see `Client.apply`."""
        instruction = Instruction(
            action=action,
            ranks=ranks,
            host=host,
            to=to,
            replace=replace,
            timeout_s=timeout_s,
            model=model,
            version=version,
            running=running,
            path=path,
            python=python,
        )
        return await self._call(self._apply_call(instruction))

    async def apply_tensors(
        self,
        tensors: Iterable[tuple[str, Any]],
        *,
        version: str = "",
        base_version: str = "",
        running: Running = "switch",
        timeout_s: float = 30.0,
    ) -> list[int]:
        """Change tensors of the weights in force; see `Client.apply_tensors`. The iterable is read in its loop."""
        update = TensorUpdate(version=version, base_version=base_version, running=running, timeout_s=timeout_s)
        parts = TensorParts(update, tensors)
        try:
            return await self._call(self._tensors_call(parts))
        except (MoejaxError, asyncio.CancelledError):  # gRPC cancels a call whose iterable raises
            if parts.error is not None:
                raise parts.error from None
            raise

    async def report(self, rank: int, level: int, code: str = "", message: str = "") -> str:
        """Report an error of a rank's device; see `Client.report`."""
        return await self._call(self._report_call(rank, level, code, message))

    async def _call(self, call: UnaryCall[T]) -> T:
        with raise_moejax_errors(self.address):
            return call.read(await call.method(call.request, metadata=self._metadata))
