"""Streams of chunks that a client reads. A stream whose connection broke is resumed where it stopped."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import grpc

from serving.api.grpc.errors import DETAILS_KEY, error_from_status
from serving.api.grpc.inference_messages import response_from_proto
from serving.core.answers import Chunk, Complete, PromptScores
from serving.errors import Cancelled, Internal, MoejaxError, NoCapacity, UnknownRequest, Unreachable
from serving.proto.moejax.v1 import inference_pb2

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.5
"""Seconds between two attempts to resume: the first pause, doubled up to the longest."""


@contextlib.contextmanager
def raise_moejax_errors(address: str) -> Iterator[None]:
    """Raise the MoejaxError that a gRPC status stands for."""
    try:
        yield
    except grpc.RpcError as status:
        call = cast(grpc.Call, status)  # every RpcError of a call is one, but its type does not say so
        error: MoejaxError = error_from_status(call.code(), call.details() or "", call.trailing_metadata())
        if type(error) is Unreachable and not _is_of_a_server(call):
            error = Unreachable(f"no moejax server answers at {address}: {error}. Is `moejax serve` running?")
        elif type(error) is Cancelled and _is_of_grpc(call):
            error = Unreachable(f"the process at {address} ended before it took the call.")
        raise error from None


def _is_of_grpc(call: grpc.Call) -> bool:
    """Whether the gRPC of a server that stops has cancelled the call, and neither its client nor a moejax server."""
    return not _is_of_a_server(call) and not (call.details() or "").startswith("Locally cancelled")


def _is_of_a_server(call: grpc.Call) -> bool:
    """Whether a moejax server gave this status, and not gRPC itself."""
    return any(key == DETAILS_KEY for key, _ in call.trailing_metadata() or ())


class ResumableCall:
    """A call of Generate, and the calls of Resume that continue it for up to `resume_s` seconds after it broke."""

    def __init__(self, stub: Any, message: Any, timeout_s: float | None, metadata: Any, resume_s: float) -> None:
        self._stub = stub
        self._message = message
        self._metadata = metadata
        self._resume_s = resume_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._received: dict[int, int] = {}
        """The last sequence received of each choice."""
        self._error: MoejaxError | None = None
        """The error that broke the call, until a response comes again."""
        self._broke_at = 0.0
        self.pause_s = _FIRST_PAUSE_S
        self.call = stub.Generate(message, timeout=timeout_s, metadata=metadata)

    def received(self, choice: int, sequence: int) -> None:
        """Note that a response has come."""
        self._error, self._received[choice] = None, sequence

    def resume(self, error: MoejaxError) -> bool:
        """Replace `call` by one that continues after `error`; False when the error is the result of the request.

        A server that could not be reached at all is not waited for. A call of which nothing came, and which the server
        does not know, is made again. Raises the error that broke the call when the server has forgotten the request.
        """
        now = time.monotonic()
        if self._error is None:
            accepted = bool(self._received) or "failed to connect" not in str(error)
            if not isinstance(error, Unreachable) or not accepted or self._resume_s <= 0:
                return False
            self._error, self._broke_at, self.pause_s = error, now, _FIRST_PAUSE_S
        elif isinstance(error, UnknownRequest) and not self._received:
            left_s = None if self._deadline is None else max(self._deadline - now, 0.0)
            self.call = self._stub.Generate(self._message, timeout=left_s, metadata=self._metadata)
            return True
        elif not isinstance(error, Unreachable | NoCapacity):
            if isinstance(error, UnknownRequest | Internal):
                raise self._error
            return False
        elif now - self._broke_at > self._resume_s:
            return False
        else:
            self.pause_s = min(2 * self.pause_s, _LONGEST_PAUSE_S)
        after = [self._received.get(choice, 0) for choice in range(max(self._received, default=-1) + 1)]
        left_s = None if self._deadline is None else max(self._deadline - now, 0.0)
        message = inference_pb2.ResumeRequest(request_id=self._message.request_id, after=after)
        self.call = self._stub.Resume(message, timeout=left_s, metadata=self._metadata)
        return True


class _StreamBase:
    """The items of a stream that are not chunks."""

    def __init__(self, call: ResumableCall, address: str) -> None:
        self._call = call
        self._address = address
        self.completes: list[Complete] = []
        """The ends of the choices so far, in order of choice once all have ended."""
        self.scores: list[PromptScores] = []
        """Log-probabilities of the prompt, if they were requested."""

    @property
    def complete(self) -> Complete | None:
        """The end of the first choice, None while it runs."""
        return next((each for each in self.completes if each.choice == 0), None)

    def cancel(self) -> None:
        """End the request on the server. Does nothing when it has ended."""
        self._call.call.cancel()

    def _receive(self, message: Any) -> Chunk | None:
        """Take in a response; returns its chunk, if it is one."""
        self._call.received(message.choice, message.sequence)
        item = response_from_proto(message)
        if isinstance(item, Chunk):
            return item
        if isinstance(item, PromptScores):
            self.scores.append(item)
        else:
            self.completes = sorted([*self.completes, item], key=lambda each: each.choice)
        return None


class Stream(_StreamBase):
    """Iterates over the chunks of a request, of all `n` choices (`Chunk.choice`), as they come. `complete` is set when
    they have ended. Leaving the loop early cancels the request."""

    def __iter__(self) -> Iterator[Chunk]:
        try:
            while True:
                try:
                    with raise_moejax_errors(self._address):
                        for message in self._call.call:
                            if (chunk := self._receive(message)) is not None:
                                yield chunk
                    return
                except MoejaxError as error:
                    if not self._call.resume(error):
                        raise
                    time.sleep(self._call.pause_s)
        finally:
            self.cancel()


class AsyncStream(_StreamBase):
    """The same as `Stream`, for `async for`."""

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        try:
            while True:
                try:
                    with raise_moejax_errors(self._address):
                        async for message in self._call.call:
                            if (chunk := self._receive(message)) is not None:
                                yield chunk
                    return
                except MoejaxError as error:
                    if not self._call.resume(error):
                        raise
                    await asyncio.sleep(self._call.pause_s)
        finally:
            self.cancel()
