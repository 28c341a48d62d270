"""Rank processes as a front sees them, and who starts them: the supervisor's side of `serving.launch`."""

import dataclasses
import functools
import signal
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, cast

import grpc

from serving.executor.executor import RankExecutor
from serving.launch.rank_listener import AttachService, RankListener, RelayMethod
from serving.launch.rank_process import HostPaths, OnExit, RankProcess
from serving.proto.moejax.v1 import link_pb2
from simulation.rank import SimulatedRank
from simulation.world import FrontProcess, World

SIGNAL_S = (0.0001, 0.02)
"""Virtual seconds until a signal has taken effect."""
EXIT_S = (0.0005, 0.02)
"""Virtual seconds until a front knows that a process has ended."""


class SimulatedProcess:
    """A rank's process for one front; see `serving.launch.rank_process.RankProcess`."""

    host_paths: HostPaths | None = None

    def __init__(self, world: World, front: FrontProcess, rank: SimulatedRank, on_exit: OnExit) -> None:
        self.token = rank.token
        self.rank = rank
        self._world = world
        self._front = front
        self._on_exit = on_exit
        self._draw = world.random(f"process/{rank.pid}/{world.loop.time()}")
        self._ending = False
        if not rank.alive:
            self.ended("it had ended before")

    @property
    def pid(self) -> int:
        """See `RankProcess.pid`."""
        return self.rank.pid

    @property
    def state(self) -> str:
        """See `RankProcess.state`."""
        return self.rank.state

    @property
    def exit_code(self) -> int | None:
        """See `RankProcess.exit_code`. Nothing here ends of itself but by being killed."""
        return None if self.rank.alive else -signal.SIGKILL

    def run_delay_s(self) -> float | None:
        """See `RankProcess.run_delay_s`."""
        return self.rank.run_delay_s()

    def ended(self, how: str) -> None:
        """The process has ended: the front is informed."""

        def heard() -> None:
            if not self._front.dead and not self._ending:
                self._on_exit(f"process ended with {how}")

        self._world.loop.call_later(self._draw.uniform(*EXIT_S), heard)

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`."""
        if not self._front.dead:
            if name == "SIGKILL":
                self.rank.doom()
            self._world.loop.call_later(self._draw.uniform(*SIGNAL_S), self.rank.signal, name)

    async def fenced(self) -> None:
        """See `RankProcess.fenced`."""
        await self.rank.exited.wait()

    def last_output(self) -> str:
        """See `RankProcess.last_output`."""
        return "nothing"

    def end(self) -> None:
        """See `RankProcess.end`."""
        self._ending = True
        if not self._front.dead:
            self.rank.doom()
            self.rank.signal("SIGKILL")


class SimulatedStarter:
    """Starts ranks for one front, those of one pool where there are several; see
    `serving.launch.rank_process.RankStarter`."""

    def __init__(
        self, world: World, front: FrontProcess, processes: "Processes", ranks: Collection[int] | None
    ) -> None:
        self._world = world
        self._front = front
        self._processes = processes
        self._ranks = range(world.settings.ranks) if ranks is None else ranks

    def start(self, rank: int, front: str, on_exit: OnExit) -> SimulatedProcess:
        """See `RankStarter.start`."""
        return self._own(self._world.start_rank(rank, self._processes.ended), on_exit)

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """See `RankStarter.orphans`."""
        left = {rank: each for rank, each in self._world.ranks.items() if each.alive and rank in self._ranks}
        return {rank: functools.partial(self._own, each) for rank, each in left.items()}

    def _own(self, rank: SimulatedRank, on_exit: OnExit) -> SimulatedProcess:
        process = SimulatedProcess(self._world, self._front, rank, on_exit)
        self._processes.watching[rank] = process
        return process


class Processes:
    """The processes that run, and who is informed when each ends."""

    def __init__(self) -> None:
        self.watching: dict[SimulatedRank, SimulatedProcess] = {}

    def ended(self, rank: SimulatedRank, how: str) -> None:
        """A process has ended."""
        process = self.watching.pop(rank, None)
        if process is not None:
            process.ended(how)


class AnyHost:
    """Lets every host agent in; it keeps no slots."""

    def Keep(self, reports: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """See `KeepService.Keep`."""
        raise NotImplementedError

    def refusal_of(self, hello: link_pb2.HostHello, peer: str) -> None:
        """See `KeepService.refusal_of`."""


class _NoServer:
    """Stands for the gRPC server that ranks dial."""

    async def stop(self, grace: float | None) -> None:
        """Stop listening."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedListener(RankListener):
    """Where ranks dial a simulated front."""

    listens: Callable[[RankExecutor, RelayMethod | None], None]

    async def open(self, executor: AttachService, relay: RelayMethod | None = None) -> tuple[grpc.aio.Server, str]:
        """See `RankListener.open`."""
        self.listens(cast(RankExecutor, executor), relay)
        return cast(Any, _NoServer()), "front"
