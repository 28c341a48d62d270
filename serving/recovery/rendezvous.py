"""The generations of ranks: each is a process group over one coordination service, with spare process ids for
replacements (docs/decisions/0004)."""

import asyncio
import collections
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.launch.coordinator import Coordinator
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock

PING_TIMEOUT_S = 30.0
"""Seconds that ranks have to end what they do, and to answer that they can enter a generation."""
JOIN_TIMEOUT_S = 30.0
"""Seconds that ranks have to enter a generation once all have answered that they can."""
RETURN_S = 1.0
"""Seconds that ranks have to answer once the coordination service is stopped, where they wait for one another inside of
JAX's client: one that waits does not come back from it, and is lost with the one that it waits for."""
MAX_JOIN_FAILURES = 3
"""Times in a row that a rank may fail to join a generation before it is replaced."""
SPARE_PROCESS_IDS = 32
"""Replacements that can join a generation; the next one needs a new generation, as every replacement does on a GPU."""


def enter_alone() -> bool:
    """Whether each rank enters a generation by itself, in the place of a process that the coordination service stood in
    for, rather than with all others. On a GPU no process can be stood in for (docs/decisions/0004)."""
    return "cuda" not in os.environ.get("JAX_PLATFORMS", "")


class Rendezvous:
    """Forms one generation of ranks after the other. `host` is the address that ranks reach the coordination service
    at; `on_coordinator_exit` is called with how the service ended, unless this object stopped it."""

    def __init__(self, executor: RankExecutor, host: str, on_coordinator_exit: Callable[[str], None]) -> None:
        self.coordinator: Coordinator | None = None
        self._generation = 0
        self._executor = executor
        self._host = host
        self._on_coordinator_exit = on_coordinator_exit
        self._previous: list[Coordinator] = []
        """The services of earlier generations that ranks may still be in."""
        self._enter_alone = enter_alone()
        self._monitoring: asyncio.Task[None] | None = None
        self._process_ids: dict[int, int] = {}
        self._spare_ids: collections.deque[int] = collections.deque()
        self._processes = 0
        self._join_failures: collections.Counter[int] = collections.Counter()

    @property
    def spare_count(self) -> int:
        """Process ids left for replacements."""
        return len(self._spare_ids)

    async def open(self, ranks: tuple[int, ...], generation: int) -> None:
        """Start the coordination service of a generation, which has these ranks; they enter with `join_all`, once
        all have answered (`ping_all`)."""
        if self.coordinator is not None:
            self._previous.append(self.coordinator)
        if self._monitoring is not None:
            self._monitoring.cancel()
        first, spare = (1, SPARE_PROCESS_IDS) if self._enter_alone else (0, 0)  # nobody follows process 0
        self._processes = first + len(ranks) + spare
        at_once = 0 if self._enter_alone else len(ranks)
        self.coordinator = await Coordinator.start(at_once, self._processes, self._host)
        self._monitoring = asyncio.create_task(self._monitor(self.coordinator))
        self._generation = generation
        self._process_ids = {rank: process_id for process_id, rank in enumerate(ranks, first)}
        self._spare_ids = collections.deque(range(first + len(ranks), self._processes))

    async def abandon(self) -> None:
        """Stop the coordination service that was opened, and those before it: no rank enters it."""
        if self.coordinator is not None:
            await self.coordinator.stop()
        await self._stop_previous()

    async def _stop_previous(self) -> None:
        previous, self._previous = self._previous, []
        for service in previous:
            await service.stop()

    async def ping_all(self) -> None:
        """Wait until every rank of the generation has answered that it can enter it. Raises RankLost, CommandFailed or
        TimeoutError; then no rank has begun to enter, and none waits for another."""
        try:
            await self._call_all("ping", dict.fromkeys(self._process_ids, link_pb2.Ping()), PING_TIMEOUT_S)
        except (RankLost, CommandFailed, TimeoutError):
            await self.abandon()
            raise

    async def join_all(self, pages_used: Mapping[int, int]) -> None:
        """Have every rank of the generation enter it; each keeps as many pages of its cache, from the first on, as
        `pages_used` says. Raises RankLost, CommandFailed or TimeoutError. Where each enters alone the others then go on
        to enter, and answer the next Ping; else they may wait in JAX for one that does not come, and the service
        ends."""
        joins = {rank: self._join_message(pages_used.get(rank, 0)) for rank in self._process_ids}
        try:
            await self._call_all("join", joins, JOIN_TIMEOUT_S, return_s=0.0 if self._enter_alone else RETURN_S)
        except (RankLost, CommandFailed, TimeoutError):
            if not self._enter_alone:
                await self._stop_previous()
            raise  # else others may be about to leave the generation before
        self._join_failures.clear()
        await self._stop_previous()

    async def join(self, rank: int) -> int:
        """Have a replacement enter the generation. Returns the process id it has there. Raises RankLost or
        CommandFailed."""
        self._process_ids[rank] = process_id = self._spare_ids.popleft()
        await self._executor.call(rank, "join", self._join_message(0))
        return process_id

    async def announce(self, rank: int, process_id: int, others: Iterable[int]) -> None:
        """Send the process id of a replacement to other ranks; lost ranks are passed over."""
        message = link_pb2.Seat(rank=rank, process=process_id)
        await asyncio.gather(*(self._executor.call(each, "seat", message) for each in others), return_exceptions=True)

    def forget(self, rank: int) -> None:
        """A rank was lost: its process id is not used again."""
        self._process_ids.pop(rank, None)

    async def close(self) -> None:
        """Stop the coordination service."""
        if self._monitoring is not None:
            self._monitoring.cancel()
        await self.abandon()

    async def _call_all(self, what: str, messages: Mapping[int, Any], limit_s: float, *, return_s: float = 0.0) -> None:
        """Call ranks of the generation. If one fails the coordination service ends, unless each enters alone; after
        `limit_s` seconds, and `return_s` more, ranks that have not answered are lost. Raises RankLost, CommandFailed or
        TimeoutError."""
        ranks, why = tuple(messages), f"no answer to {what} within {limit_s:g} s"
        try:
            async with asyncio.timeout(limit_s):
                await self._executor.call_all(what, messages)
        except (RankLost, CommandFailed) as error:
            await self._release_waiting()
            if isinstance(error, CommandFailed):
                self._count_join_failure(error)
            raise
        except TimeoutError:
            await self._release_waiting()
            await asyncio.sleep(return_s)
            self._executor.lose_unanswered(ranks, what, why)
            raise TimeoutError(why) from None

    async def _release_waiting(self) -> None:
        """Stop the coordination service, where ranks may wait in it for one that does not come."""
        if self.coordinator is not None and not self._enter_alone:
            await self.coordinator.stop()

    def _join_message(self, pages_used: int) -> link_pb2.Join:
        assert self.coordinator is not None
        return link_pb2.Join(
            generation=self._generation,
            address=self.coordinator.address,
            members=self._process_ids.keys(),
            seats=self._process_ids.values(),
            processes=self._processes,
            pages_used=pages_used,
        )

    def _count_join_failure(self, error: CommandFailed) -> None:
        """A rank that can never join must not keep the others out: it is replaced in the end."""
        self._join_failures[error.rank] += 1
        if self._join_failures[error.rank] >= MAX_JOIN_FAILURES:
            self._executor.declare(error.rank, Cause("error", f"could not join: {error}"), clock.now())

    async def _monitor(self, coordinator: Coordinator) -> None:
        """A generation whose coordination service ended goes on, but no replacement can join it."""
        code = await coordinator.process.wait()
        self._spare_ids.clear()
        self._on_coordinator_exit(f"the coordinator ended with {f'signal {-code}' if code < 0 else f'code {code}'}")
