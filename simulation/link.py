"""Simulated streams between a front and its ranks: messages keep their order within a stream, as in TCP, and may take
any time; a stream breaks as a whole.

A lost message is therefore a broken stream. Messages are doubled where the receiver must bear it: reports, and commands
that say what shall be rather than what to do next.
"""

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

from serving.executor.executor import RankExecutor
from serving.launch.rank_listener import HEARTBEAT_METADATA, AttachService
from serving.proto.moejax.v1 import link_pb2
from simulation.virtual_time import context_of

LATENCY_S = (0.0001, 0.001)
"""The least and the most virtual seconds that a message takes when nothing is wrong."""
NOTICE_S = (0.001, 0.02)
"""Virtual seconds until an end notices that the stream is broken."""
SPACING_S = 1e-6
"""Least virtual seconds between two messages of a stream, which keeps their order."""
GIVE_UP_S = 4.0
"""Virtual seconds after which a silent stream is given up: the keepalive of `serving.launch.rank_listener`."""
DOUBLED_COMMANDS = frozenset({"adopt", "hold", "inspect", "seat", "keep_parity", "read_cache", "read_weights", "abort"})


@dataclasses.dataclass
class LinkQuality:
    """The faults of the link to one rank, as shares of messages."""

    late: float = 0.0
    late_s: float = 0.0
    doubled: float = 0.0
    lost: float = 0.0
    blocked_until: float = 0.0

    def arrival(self, draw: random.Random, now: float, after: float) -> float:
        """When a message arrives that is sent now, after the one before it."""
        at = now + draw.uniform(*LATENCY_S)
        if self.late and draw.random() < self.late:
            at += draw.expovariate(1.0 / self.late_s)
        return max(at, after + SPACING_S, self.blocked_until)


class FrontEnd(Protocol):
    """The front as its streams know it."""

    dead: bool

    def executor_of(self, rank: int) -> RankExecutor | None:
        """The executor that a rank dials; None before the front listens to it."""
        ...


class RankEnd(Protocol):
    """The rank as its streams know it."""

    rank: int

    def receive(self, stream: "Stream", command: link_pb2.Command) -> None:
        """A command has arrived."""
        ...

    def stream_ended(self, stream: "Stream", *, refused: bool) -> None:
        """The stream has ended."""
        ...


class Origin(NamedTuple):
    """The front whose commands come in a stream, its executor, and when it sent the plan of each epoch."""

    front: FrontEnd
    executor: RankExecutor
    adopt_sent_at: dict[int, float]


class Peer(Protocol):
    """The process that serves the streams of ranks: their front, or the agent of their host."""

    dead: bool

    def attach_service(self, rank: int) -> AttachService | None:
        """The service that a rank dials; None while nothing listens."""
        ...

    def origin(self, rank: int) -> Origin:
        """The front that has let a rank in."""
        ...


class Refused(Exception):
    """The front does not know the caller."""


class Stream:
    """One stream from its Hello to its end; it is the gRPC context of the front's handler, too."""

    def __init__(self, peer: Peer, rank: RankEnd, quality: LinkQuality, draw: random.Random) -> None:
        self.peer_process = peer
        self.closed = False
        """The rank knows that it has ended."""
        self.heartbeat_s = 0.2
        self.origin: Origin
        """The front that the commands are of, once it has let the rank in."""
        self._rank = rank
        self._quality = quality
        self._draw = draw
        self._loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[link_pb2.Report | None] = asyncio.Queue()
        self._up_at = self._down_at = 0.0
        self._broken = False
        service = peer.attach_service(rank.rank)
        assert service is not None
        self._task = self._loop.create_task(self._serve(service), context=context_of(peer))

    def is_of(self, rank: object) -> bool:
        """Whether it is the stream of this process."""
        return self._rank is rank

    # -- The rank's end -----------------------------------------------------------------------------------------

    def report(self, report: link_pb2.Report) -> None:
        """Send a report to the front."""
        if self.closed or self._broken:
            return
        times = self._copies(report.WhichOneof("what") not in ("hello", "copied"))
        for _ in range(times):
            self._up_at = self._arrival(self._up_at)
            self._loop.call_at(self._up_at, self._arrived, report)

    def close(self, why: str) -> None:
        """The rank's process has ended: what it sent still arrives."""
        if not self.closed:
            self.closed = True
            self._up_at = self._arrival(self._up_at)
            self._loop.call_at(self._up_at, self._arrived, None)

    # -- The front's end ----------------------------------------------------------------------------------------

    async def abort(self, code: Any, text: str) -> None:
        """The front refuses the caller."""
        raise Refused(text)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """The front accepts the caller."""
        self.origin = self.peer_process.origin(self._rank.rank)
        self.heartbeat_s = float(dict(metadata).get(HEARTBEAT_METADATA, self.heartbeat_s))

    def peer_died(self) -> None:
        """The process that serves the stream has ended: what it sent still arrives."""
        self._end(refused=False)

    def _arrived(self, report: link_pb2.Report | None) -> None:
        if not self.peer_process.dead and (report is None or not self._broken):
            self._reports.put_nowait(report)

    async def _read(self) -> AsyncIterator[link_pb2.Report]:
        while (report := await self._reports.get()) is not None:
            yield report

    async def _serve(self, service: AttachService) -> None:
        refused = False
        try:
            async with contextlib.aclosing(service.Attach(self._read(), self)) as commands:  # type: ignore[type-var]
                async for command in commands:
                    if self.peer_process.dead:
                        break
                    self._send(command)
        except Refused:
            refused = True
        finally:
            self._end(refused=refused)

    def _send(self, command: link_pb2.Command) -> None:
        if self.closed or self._broken:
            return
        if command.WhichOneof("what") == "adopt":
            self.origin.adopt_sent_at.setdefault(command.adopt.epoch, self._loop.time())
        for _ in range(self._copies(command.WhichOneof("what") in DOUBLED_COMMANDS)):
            self._down_at = self._arrival(self._down_at)
            self._loop.call_at(self._down_at, self._delivered, command)

    def _delivered(self, command: link_pb2.Command) -> None:
        if not self._broken:
            self._rank.receive(self, command)

    # -- Between them -------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """The connection is reset: what is on its way is lost, and both ends notice soon."""
        if self._broken:
            return
        self._broken = True
        notice = self._draw.uniform(*NOTICE_S)
        self._loop.call_later(notice, self._reports.put_nowait, None)
        self._loop.call_later(notice, self._task.cancel)
        self._loop.call_later(self._draw.uniform(*NOTICE_S), self._end_now, False)

    def _end(self, *, refused: bool) -> None:
        self._down_at = self._arrival(self._down_at)
        self._loop.call_at(self._down_at, self._end_now, refused)

    def _end_now(self, refused: bool) -> None:
        if not self.closed:
            self.closed = True
            self._rank.stream_ended(self, refused=refused)

    def _arrival(self, after: float) -> float:
        return self._quality.arrival(self._draw, self._loop.time(), after)

    def _copies(self, may_be_doubled: bool) -> int:
        """How often a message arrives. A lost one breaks the stream."""
        quality = self._quality
        if quality.lost and self._draw.random() < quality.lost:
            self.cut()
            return 0
        return 2 if may_be_doubled and quality.doubled and self._draw.random() < quality.doubled else 1
