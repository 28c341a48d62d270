"""Ranks that answer the front's messages without processes, and die at the message a test names.

The real loop and the real failover run on them; what they hold and do is `simulation.hand_rank`. A step checks what
a wrong recovery would break: that all ranks of it are in one epoch, and that every route leads to a slot with its
expert.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from serving.engine.batch import StepBucket
from serving.executor.failure_detector import Cause
from serving.executor.host_steps import StepAnswers
from serving.executor.incarnation import Loss
from serving.executor.kv_replica import NotReplicated
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.versions import LINK
from simulation.hand_rank import HandRank, HandStore, check_step


@dataclasses.dataclass
class Process:
    """The part of a rank's process that the loop reads."""

    pid: int
    host_paths: None = None

    def last_output(self) -> str:
        return "nothing"


class FakeProcess(HandRank):
    """One incarnation of a rank."""

    loss: Loss | None = None
    failed_of_itself = False
    compiles = 0
    build = ""
    relay = ""
    process: Process

    def leaves_unanswered(self, what: str) -> bool:
        return False


class FakeCoordinator:
    """A coordination service that never ends by itself."""

    address = "nowhere"

    def __init__(self) -> None:
        self.process = self
        self.pid = 0
        self._ended = asyncio.Event()

    @classmethod
    async def start(cls, ranks: int, seats: int, host: str = "") -> "FakeCoordinator":
        return cls()

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def stop(self) -> None:
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()


class FakeExecutor:
    """As `serving.executor.executor.RankExecutor`. `fails(number, rank, what)` is asked at every message: the rank it
    names dies before the message is answered, in the middle of copying its cache. `log` has all messages."""

    def __init__(self, buckets: tuple[StepBucket, ...], *, max_pages: int, layers: int = 2) -> None:
        self.fails: Callable[[int, int, str], int | None] = lambda number, rank, what: None
        self.log: list[tuple[int, str]] = []
        self.monitored: set[int] = set()
        self.unmonitored_calls: list[tuple[int, str]] = []
        """As `log`, of the messages to ranks that are not monitored."""
        self.damaged: set[tuple[int, int, int]] = set()
        """Slots, (rank, layer, slot), that the next inspection of their rank finds damaged."""
        self.on_loss: Callable[[Loss], object] = lambda loss: None
        self.store = HandStore()
        self.masked_in_steps: set[tuple[int, int]] = set()
        self.masked_in_plans: set[tuple[int, int]] = set()
        """Experts, (layer, expert), that some step, or some plan, had to do without."""
        self._buckets = buckets
        self._max_pages = max_pages
        self._layers = layers
        self._ranks: dict[int, FakeProcess] = {}
        self._pids = 100
        self.shares_memory = False
        self.breaks: Callable[[dict[str, np.ndarray]], bool] = lambda arrays: False
        """Whether a rank raises an exception in a step with these inputs of its own."""
        self.refuses: Callable[[dict[str, np.ndarray]], bool] = lambda arrays: False
        """Whether a step with such inputs fails on a rank, which lives on."""
        self.exchange_fails: Callable[[], bool] = lambda: False
        """Whether the exchange of the next step fails, and no rank dies."""
        self._turn = asyncio.Lock()
        self.looked_ahead = 0
        """Steps that were sent while another was in flight."""
        self.on_copied: Callable[[int, link_pb2.Copied], None] = lambda rank, copied: None

    def spawn(self, rank: int) -> FakeProcess:
        before = self._ranks.get(rank)
        assert before is None or before.loss is not None, f"rank {rank} is started again while its process runs"
        self._pids += 1
        self.monitored.discard(rank)
        each = FakeProcess(rank, self.store, self._buckets, max_pages=self._max_pages, layers=self._layers)
        each.process = Process(self._pids)
        self._ranks[rank] = each
        return each

    def adopt_left_ranks(self) -> tuple[int, ...]:
        self.monitored.clear()
        return tuple(rank for rank, each in self._ranks.items() if each.loss is None)

    async def wait_attached(self, rank: int) -> link_pb2.Hello:
        await asyncio.sleep(0)
        return self._ranks[rank].hello()

    def get(self, rank: int) -> FakeProcess | None:
        return self._ranks.get(rank)

    def host_paths(self, rank: int) -> None:
        return self._ranks[rank].process.host_paths if rank in self._ranks else None

    async def call_all(self, what: str, messages) -> list[link_pb2.Done]:
        ranks = [self._alive(rank) for rank in messages]
        answers = await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))
        for each in ranks:
            if each.loss is not None:
                raise RankLost(each.rank, str(each.loss.cause))
        return answers

    def monitor(self, rank: int) -> None:
        self.monitored.add(rank)

    def stop_monitoring(self, rank: int) -> None:
        self.monitored.discard(rank)

    def abort(self, ranks, epoch: int, *, connecting: int = 0) -> None:
        self.log += [(rank, "abort") for rank in ranks]

    async def fenced(self, rank: int) -> None:
        assert self._ranks[rank].loss is not None, f"rank {rank} is waited for and lives"

    def lose_unanswered(self, ranks, what: str, why: str, *, unless_all: bool = False) -> None:
        for rank in ranks:
            self.declare(rank, Cause("error", why), 0.0)

    def declare(self, rank: int, cause: Cause, evidence_at: float) -> None:
        each = self._ranks[rank]
        if each.loss is None:
            each.loss = Loss(rank, cause, evidence_at, evidence_at)
            self.on_loss(each.loss)

    def kill(self, rank: int) -> None:
        """The process of a rank ends."""
        self.declare(rank, Cause("exited", "process ended with signal 9"), 0.0)

    def crash(self, rank: int) -> None:
        """A rank raises an exception, and ends."""
        self._ranks[rank].failed_of_itself = True
        self.declare(rank, Cause("raised", "IndexError: out of bounds | File steps.py"), 0.0)

    async def call(self, rank: int, what: str, message) -> link_pb2.Done:
        each = self._alive(rank)
        await self._heard(rank, what)
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        if what == "inspect":
            each.damaged |= {(layer, slot): "flip" for on, layer, slot in self.damaged if on == rank}
            self.damaged = {slot for slot in self.damaged if slot[0] != rank}
            message = link_pb2.Inspect()  # whichever slot is asked for
        try:
            fields = getattr(each, what, lambda _: {})(message)
        except (NotReplicated, LookupError) as error:
            raise CommandFailed(rank, what, str(error)) from None
        if what == "configure":
            fields["shares_memory"] = self.shares_memory
        if what == "adopt" and each.routes is not None:
            self.masked_in_plans |= {(int(layer), int(e)) for layer, e in np.argwhere(each.routes < 0)}
        self._send(rank, each.take_messages())
        return link_pb2.Done(**fields)

    def link_version(self, ranks: Iterable[int]) -> int:
        return LINK.newest

    def by_host(self, ranks: Iterable[int]) -> tuple[list[int], dict[Any, Any]]:
        return list(ranks), {}

    async def step(self, parts: dict[int, link_pb2.Step], hosts: Mapping[Any, Any]) -> StepAnswers:
        self.looked_ahead += any(part.after for part in parts.values())
        async with self._turn:  # ranks do one step after the other
            return StepAnswers(await self._step(parts))

    async def _step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        for rank in parts:
            await self._heard(rank, "step")
        ranks = {rank: self._alive(rank) for rank in parts}
        for rank, each in ranks.items():
            if why := each.why_stale(parts[rank]):
                assert each.epoch != parts[rank].epoch, why
                raise CommandFailed(rank, "step", why)
        check_step(ranks, parts)
        if self.exchange_fails():
            raise CommandFailed(min(parts), "step", "a connection was reset", exchange=True)
        answers = {}
        for rank, each in ranks.items():
            if self.breaks(each.inputs(parts[rank])):
                self.crash(rank)
                raise RankLost(rank, "raised: IndexError: out of bounds")
            if self.refuses(each.inputs(parts[rank])):
                raise CommandFailed(rank, "step", "ValueError: of another shape")
        for rank, each in ranks.items():
            if each.routes is not None:
                self.masked_in_steps |= {(int(layer), int(e)) for layer, e in np.argwhere(each.routes < 0)}
            fields = each.run(parts[rank], each.inputs(parts[rank]))
            answers[rank] = link_pb2.StepDone(**fields, own_ms=1.0)
        return answers

    # -- Behind it ----------------------------------------------------------------------------------------------

    async def _heard(self, rank: int, what: str) -> None:
        victim = self.fails(len(self.log), rank, what)
        self.log.append((rank, what))
        if rank not in self.monitored:
            self.unmonitored_calls.append((rank, what))
        if victim is not None and self._ranks[victim].loss is None:
            self._send(victim, self._ranks[victim].copy_last(part=True))
            self.kill(victim)
        each = self._ranks[rank]
        if each.loss is None:
            self._send(rank, each.copy_last())
        await asyncio.sleep(0)

    def _send(self, rank: int, messages: list[link_pb2.Copied]) -> None:
        for message in messages:
            self.on_copied(rank, message)

    def _alive(self, rank: int) -> FakeProcess:
        each = self._ranks[rank]
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return each
