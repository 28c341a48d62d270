"""Simulated host agents: the real relay of a host, between its simulated ranks and the front.

The agent's process dies with its ranks, which the kernel ends with it, and is started again. Between the agent and the
front messages keep their order, and may take any time; the stream breaks as a whole.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol, cast

import grpc

from serving.executor.executor import RankExecutor
from serving.executor.host_relay import HostRelay
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import RelayMethod
from serving.proto.moejax.v1 import link_pb2
from simulation.link import NOTICE_S, FrontEnd, LinkQuality, Origin, Refused
from simulation.virtual_time import VirtualTimeLoop, context_of

RESTART_S = (0.05, 0.5)
"""Virtual seconds until an agent that has died runs again."""
REAP_TURNS = 200
"""Most turns of the event loop that the tasks of a killed agent take to be gone."""


class RelayingFront(FrontEnd, Protocol):
    """The front as host agents know it."""

    relay: RelayMethod | None
    """Serves the streams of host agents; None before the front listens."""

    def executor_of(self, rank: int) -> RankExecutor | None:
        """The executor that a rank dials; None before the front listens to it."""
        ...


class AgentWorld(Protocol):
    """The surroundings of a host agent."""

    loop: asyncio.AbstractEventLoop
    closing: bool
    """The run ends: what has died is not started again."""

    @property
    def relaying_front(self) -> RelayingFront | None:
        """The front that agents can dial now."""
        ...

    def random(self, purpose: str) -> random.Random:
        """A source of randomness that is the same in every run."""
        ...

    def note(self, text: str) -> None:
        """A line of the trace."""
        ...

    def violated(self, law: str) -> None:
        """Something happened that must not."""
        ...

    def peer_died(self, peer: object) -> None:
        """A process that served streams of ranks has ended."""
        ...


class SimulatedHostAgent:
    """The agent of one host, which runs again after it has died."""

    def __init__(self, world: AgentWorld, host: str) -> None:
        self.host = host
        self.quality = LinkQuality()
        """The faults of the stream to the front."""
        self.process: AgentProcess | None = None
        self._world = world
        self._draw = world.random(f"agent/{host}")
        self._tokens: set[str] = set()
        self._start()

    def expect(self, token: str) -> None:
        """A rank with this token runs on the host."""
        self._tokens.add(token)
        if self.process is not None:
            self.process.relay.expect(token)

    def forget(self, token: str) -> None:
        """That rank has ended."""
        self._tokens.discard(token)
        if self.process is not None:
            self.process.relay.forget(token)

    def front_died(self, front: object) -> None:
        """The process of a front has ended."""
        if self.process is not None and self.process.link is not None and self.process.link.front is front:
            self.process.link.front_died()

    def cut(self) -> bool:
        """The connection to the front is reset; False if there is none."""
        link = self.process.link if self.process is not None else None
        if link is not None:
            link.cut()
        return link is not None

    async def die(self) -> None:
        """The process ends; another one follows."""
        if self.process is not None:
            self._world.note(f"the host agent of {self.host} ends")
            await self.end()
            self._world.loop.call_later(self._draw.uniform(*RESTART_S), self._start)

    async def end(self) -> None:
        """The process ends."""
        process, self.process = self.process, None
        if process is not None:
            await process.kill()
            self._world.peer_died(process)

    def _start(self) -> None:
        if self._world.closing:
            return
        self.process = AgentProcess(self._world, self.host, self.quality, self._draw)
        for token in sorted(self._tokens):
            self.process.relay.expect(token)


class AgentProcess:
    """One process of a host agent; to its ranks it is what the front is to others."""

    def __init__(self, world: AgentWorld, host: str, quality: LinkQuality, draw: random.Random) -> None:
        self.dead = False
        self.link: HostLink | None = None
        """The stream to the front, if there is one."""
        self._last_link: HostLink | None = None
        self._world = world
        self._quality = quality
        self._draw = draw
        channel = cast(RankChannel, self)
        self.relay = HostRelay(channel, Path(), secret="", host=host, log=lambda text: world.note(f"{host}: {text}"))
        self._task = world.loop.create_task(self.relay.pass_on(), context=context_of(self))
        self._task.add_done_callback(self._ended)

    front = "front"
    """See `RankChannel.front`."""

    @contextlib.asynccontextmanager
    async def open_aio(self) -> AsyncIterator["AgentProcess"]:
        """See `RankChannel.open_aio`."""
        try:
            yield self
        finally:
            if self.link is not None:
                self.link.close()
            self.link = None

    def stream_stream(self, path: str, **_: Any) -> Any:
        """See `grpc.aio.Channel.stream_stream`."""
        return self._dial

    def _dial(self, reports: AsyncIterator[link_pb2.HostReport]) -> "HostLink":
        front = self._world.relaying_front
        self.link = self._last_link = HostLink(self, front, reports, self._quality, self._draw)
        return self.link

    def attach_service(self, rank: int) -> HostRelay:
        """See `simulation.link.Peer`."""
        return self.relay

    def origin(self, rank: int) -> Origin:
        """See `simulation.link.Peer`."""
        link = self._last_link
        assert link is not None
        assert link.front is not None
        assert link.executor is not None
        return Origin(link.front, link.executor, link.adopt_sent_at)

    async def kill(self) -> None:
        """Nothing of the process runs any more, and nobody receives anything of it but what was on its way."""
        self.dead = True
        if self.link is not None:
            self.link.close()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        for _ in range(REAP_TURNS):
            left = loop.tasks_of(self)
            if not left:
                return
            for task in left:
                task.cancel()
            await asyncio.sleep(0)
        self._world.violated(f"a host agent cannot be ended: {loop.tasks_of(self)}")

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and not self.dead:
            error = task.exception()
            self._world.violated(f"a host agent died of {type(error).__name__}: {error}")


class HostLink:
    """The stream of an agent to the front: the call on the agent's side, the gRPC context on the front's."""

    def __init__(
        self,
        agent: AgentProcess,
        front: RelayingFront | None,
        reports: AsyncIterator[link_pb2.HostReport],
        quality: LinkQuality,
        draw: random.Random,
    ) -> None:
        self.front = front
        self.executor = None if front is None else front.executor_of(0)
        """The one executor of the front: ranks of pools have streams of their own."""
        self.adopt_sent_at: dict[int, float] = {}
        """When the front sent the plan of each epoch."""
        self._agent = agent
        self._quality = quality
        self._draw = draw
        self._loop = asyncio.get_running_loop()
        self._up: asyncio.Queue[link_pb2.HostReport | None] = asyncio.Queue()
        self._down: asyncio.Queue[link_pb2.HostCommands | None] = asyncio.Queue()
        self._metadata: asyncio.Future[Any] = self._loop.create_future()
        self._up_at = self._down_at = 0.0
        self._broken = self._closed = False
        self._refusal = ""
        self._tasks: list[asyncio.Task[None]] = []
        relay = front.relay if front is not None and not front.dead else None
        if relay is None:
            self._refusal = "no front listens"
            self._end()
            return
        self._tasks = [
            self._loop.create_task(self._send_up(reports), context=context_of(agent)),
            self._loop.create_task(self._serve(relay), context=context_of(front)),
        ]

    # -- The agent's end ----------------------------------------------------------------------------------------

    async def initial_metadata(self) -> Any:
        """See `grpc.aio.StreamStreamCall.initial_metadata`."""
        return await self._metadata

    async def __aiter__(self) -> AsyncIterator[link_pb2.HostCommands]:
        while (commands := await self._down.get()) is not None:
            yield commands
        if self._refusal:
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, self._refusal)

    def close(self) -> None:
        """The agent has no more use for it, or has ended: what it sent still arrives."""
        if not self._closed:
            self._closed = True
            self._up_at = self._arrival(self._up_at)
            self._loop.call_at(self._up_at, self._arrived, None)

    async def _send_up(self, reports: AsyncIterator[link_pb2.HostReport]) -> None:
        async for report in reports:
            if self._closed or self._broken:
                return
            self._up_at = self._arrival(self._up_at)
            self._loop.call_at(self._up_at, self._arrived, report)

    # -- The front's end ----------------------------------------------------------------------------------------

    def peer(self) -> str:
        """See `grpc.aio.ServicerContext.peer`."""
        return "simulated"

    async def abort(self, code: Any, text: str) -> None:
        """The front refuses the agent."""
        raise Refused(text)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """The front accepts the agent."""
        self._down_at = self._arrival(self._down_at)
        self._loop.call_at(self._down_at, self._accepted, metadata)

    def front_died(self) -> None:
        """The front's process has ended: what it sent still arrives."""
        self._end()

    async def _serve(self, relay: RelayMethod) -> None:
        assert self.front is not None
        try:
            async with contextlib.aclosing(relay(self._read(), self)) as messages:  # type: ignore[type-var]
                async for commands in messages:
                    if self.front.dead:
                        break
                    self._send_down(commands)
        except Refused as refused:
            self._refusal = str(refused)
        finally:
            self._end()

    async def _read(self) -> AsyncIterator[link_pb2.HostReport]:
        while (report := await self._up.get()) is not None:
            yield report

    def _send_down(self, commands: link_pb2.HostCommands) -> None:
        for item in commands.items:
            if item.command.WhichOneof("what") == "adopt":
                self.adopt_sent_at.setdefault(item.command.adopt.epoch, self._loop.time())
        self._down_at = self._arrival(self._down_at)
        self._loop.call_at(self._down_at, self._delivered, commands)

    # -- Between them -------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """The connection is reset: what is on its way is lost, and both ends notice soon."""
        if self._broken:
            return
        self._broken, self._refusal = True, "reset"
        notice = self._draw.uniform(*NOTICE_S)
        self._loop.call_later(notice, self._up.put_nowait, None)
        for task in self._tasks:
            self._loop.call_later(notice, task.cancel)
        self._loop.call_later(self._draw.uniform(*NOTICE_S), self._delivered_end)

    def _arrived(self, report: link_pb2.HostReport | None) -> None:
        if report is None or not self._broken:
            self._up.put_nowait(report)

    def _delivered(self, commands: link_pb2.HostCommands) -> None:
        if not self._broken:
            self._down.put_nowait(commands)

    def _accepted(self, metadata: Any) -> None:
        if not self._metadata.done():
            self._metadata.set_result(metadata)

    def _end(self) -> None:
        self._down_at = self._arrival(self._down_at)
        self._loop.call_at(self._down_at, self._delivered_end)

    def _delivered_end(self) -> None:
        self._accepted(())
        self._down.put_nowait(None)

    def _arrival(self, after: float) -> float:
        return self._quality.arrival(self._draw, self._loop.time(), after)
