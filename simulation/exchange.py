"""The joint work of simulated ranks: they connect meshes, and exchange step after step, in generations that they enter
one by one.

Each of the two ends on a rank when all of its members have come, or with an error; a member that has died or hangs
holds up the others until they get an Abort, or time out.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Protocol

from serving.proto.moejax.v1 import link_pb2
from simulation.hand_rank import HandRank, check_step

TIMEOUT_S = 30.0
"""Seconds after which a rank gives up to wait for the others."""
ENTER_S = 1.0
"""As `moejax.runtime.distributed.ENTER_S`."""
POLL_S = 0.005
"""Seconds between two looks whether a member that is held goes on."""

Ended = Callable[[str], None]
"""Called once with why something failed; "" when it did not."""


class Member(Protocol):
    """A rank as the others see it."""

    rank: int
    alive: bool
    doomed_at: float | None
    slowness: float
    hand: HandRank

    @property
    def held(self) -> bool:
        """It runs nothing for now."""
        ...


class Gathering:
    """Something that a number of ranks come to, each once; it ends for all of them when the last one has come."""

    def __init__(self, needed: int, ready: Callable[[], None], timeout_s: float = TIMEOUT_S) -> None:
        self.needed = needed
        self._timeout_s = timeout_s
        self.came: dict[int, Member] = {}
        self._waiting: dict[int, tuple[Ended, asyncio.TimerHandle]] = {}
        self._ready = ready
        self.failed = ""

    def come(self, member: Member, ended: Ended) -> None:
        """A rank has come; `ended` is called when it need not wait any more."""
        if self.failed:
            ended(self.failed)
            return
        self.came[member.rank] = member
        loop = asyncio.get_running_loop()
        timeout = loop.call_later(self._timeout_s, self.leave, member.rank, "the others did not come in time")
        self._waiting[member.rank] = ended, timeout
        if len(self.came) == self.needed:
            self._ready()

    def leave(self, rank: int, why: str) -> None:
        """A rank waits no longer."""
        waiting = self._waiting.pop(rank, None)
        if waiting is not None:
            ended, timeout = waiting
            timeout.cancel()
            ended(why)

    def fail(self, why: str) -> None:
        """Nobody waits any longer, and nobody need come."""
        self.failed = why
        for rank in list(self._waiting):
            self.leave(rank, why)

    def end(self) -> None:
        """All have come: nobody waits any longer."""
        for rank in list(self._waiting):
            self.leave(rank, "")


class Communicator:
    """The ranks of a connected mesh. The n-th step of one of them is the n-th step of all. A step takes `step_s()`
    seconds on the fastest rank; `quick_failure` says whether ranks notice by themselves that one of them has died."""

    def __init__(
        self,
        members: Mapping[int, Member],
        step_s: Callable[[], float],
        violated: Callable[[str], None],
        *,
        quick_failure: Callable[[], bool],
    ) -> None:
        self.members = dict(members)
        self.broken = ""
        self.used_at = 0.0
        """When a step in it began last."""
        self._step_s = step_s
        self._violated = violated
        self._quick_failure = quick_failure
        self._turns: dict[int, int] = dict.fromkeys(members, 0)
        self._exchanges: dict[int, Gathering] = {}
        self._parts: dict[int, dict[int, link_pb2.Step]] = {}

    def exchange(self, member: Member, part: link_pb2.Step, ended: Ended) -> None:
        """A rank takes part in its next step."""
        if self.broken:
            ended(self.broken)
            return
        self.used_at = asyncio.get_running_loop().time()
        turn = self._turns[member.rank]
        self._turns[member.rank] += 1
        parts = self._parts.setdefault(turn, {})
        parts[member.rank] = part
        if turn not in self._exchanges:
            self._exchanges[turn] = Gathering(len(self.members), lambda: self._begin(turn))
        self._exchanges[turn].come(member, ended)

    def abort(self, rank: int, why: str) -> None:
        """A rank leaves the exchange that it waits in; it cannot exchange with these ranks any more."""
        for gathering in self._exchanges.values():
            gathering.leave(rank, why)
        self.broken = self.broken or why

    def break_off(self, why: str) -> None:
        """The exchange fails on all ranks, although none has died."""
        self.broken = self.broken or why
        for gathering in list(self._exchanges.values()):
            gathering.fail(why)

    def _begin(self, turn: int) -> None:
        gathering = self._exchanges[turn]
        try:
            check_step({rank: member.hand for rank, member in gathering.came.items()}, self._parts[turn])
        except AssertionError as error:
            self._violated(f"a step on ranks {tuple(gathering.came)}: {error}")
        slowest = max(member.slowness for member in gathering.came.values())
        asyncio.get_running_loop().call_later(self._step_s() * slowest, self._finish, turn)

    def _finish(self, turn: int) -> None:
        gathering = self._exchanges.get(turn)
        if gathering is None or gathering.failed:
            return
        if any(not member.alive for member in gathering.came.values()):
            if self._quick_failure():
                self.break_off("a connection was closed by another rank")
            return  # else the others hang in it
        if any(member.held for member in gathering.came.values()):
            asyncio.get_running_loop().call_later(POLL_S, self._finish, turn)
            return
        del self._exchanges[turn], self._parts[turn]
        gathering.end()


class SimulatedCoordinator:
    """The coordination service of one generation; as `serving.launch.coordinator.Coordinator`. Each rank enters by
    itself."""

    def __init__(self, number: int) -> None:
        self.process = self
        self.pid = number
        self.address = f"coordinator:{number}"
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    def die(self, code: int = -9) -> None:
        """The service ends."""
        if self.returncode is None:
            self.returncode = code
            self._ended.set()

    async def wait(self) -> int:
        """Wait until it has ended."""
        await self._ended.wait()
        return self.returncode or 0

    async def stop(self) -> None:
        """Kill it."""
        self.die()


class Coordinators:
    """Starts coordination services; takes the place of the class `Coordinator`."""

    def __init__(self, draw: random.Random) -> None:
        self.services: dict[str, SimulatedCoordinator] = {}
        self._draw = draw

    async def start(self, ranks: int, process_ids: int, host: str = "") -> SimulatedCoordinator:
        """See `Coordinator.start`."""
        await asyncio.sleep(self._draw.uniform(0.01, 0.1))
        service = SimulatedCoordinator(len(self.services) + 1)
        self.services[service.address] = service
        return service

    @property
    def last(self) -> SimulatedCoordinator | None:
        """The service that was started last."""
        return next(reversed(self.services.values()), None)
