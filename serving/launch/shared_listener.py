"""One port for the ranks of several pools: each rank is handed to the executor that knows its token."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import grpc

from serving.launch.rank_listener import ListeningServer, RankListener, RelayMethod, first_report
from serving.proto.moejax.v1 import link_pb2

TOKENS_POLL_S = 0.02
"""Seconds between two looks whether the executor of a rank's pool knows its token: ranks that an earlier front left
dial before the second pool is started."""


class PoolExecutor(Protocol):
    """The executor of the ranks of one pool (`serving.executor.executor`)."""

    @property
    def knows_tokens(self) -> bool:
        """Whether all tokens of ranks are known, also those of ranks that an earlier front left."""
        ...

    def expects(self, token: str) -> bool:
        """Whether a rank with this token may attach."""
        ...

    def attach(
        self, hello: link_pb2.Hello, reports: AsyncIterator[link_pb2.Report], context: Any
    ) -> AsyncGenerator[link_pb2.Command]:
        """The stream of one rank, after its first message."""
        ...


class SharedListener:
    """Where the front listens for the ranks of `pools` pools. The first executor opens the port, the last closes it."""

    def __init__(self, listener: RankListener, pools: int) -> None:
        self._listener = listener
        self._pools = pools
        self._executors: list[PoolExecutor] = []
        self._stopped = 0
        self._server: ListeningServer | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """See `RankListener.address`."""
        return self._listener.address

    @property
    def stream_metadata(self) -> tuple[tuple[str, str], ...]:
        """See `RankListener.stream_metadata`."""
        return self._listener.stream_metadata

    async def open(self, executor: PoolExecutor, relay: RelayMethod | None = None) -> tuple[ListeningServer, str]:
        """See `RankListener.open`. Ranks of pools have streams of their own, so that `relay` is not served."""
        self._executors.append(executor)
        if self._server is None:
            self._server, self._address = await self._listener.open(self)
        return self, self._address

    async def stop(self, grace: float | None) -> None:
        """Stop when every executor that has opened it has stopped it."""
        self._stopped += 1
        if self._stopped == len(self._executors) and self._server is not None:
            await self._server.stop(grace)

    async def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """The RPC by which a rank attaches."""
        hello = (await first_report(reports, context)).hello
        executor = await self._executor_of(hello.token)
        if executor is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token was not given to a rank")
            return
        async with contextlib.aclosing(executor.attach(hello, reports, context)) as commands:
            async for command in commands:
                yield command

    async def _executor_of(self, token: str) -> PoolExecutor | None:
        """The executor that expects a rank with this token; None once all are sure that they do not."""
        while True:
            found = next((each for each in self._executors if each.expects(token)), None)
            known = len(self._executors) == self._pools and all(each.knows_tokens for each in self._executors)
            if found is not None or known:
                return found
            await asyncio.sleep(TOKENS_POLL_S)
