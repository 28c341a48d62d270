"""The generation of ranks: those in one coordination service, each in its seat, and the seats left for others."""

import asyncio
import collections
import os
import time
from collections.abc import Callable, Iterable, Mapping

from serving.coordination import Coordinator
from serving.health import Cause
from serving.links import RankLinks, RankLost, RankRefused
from serving.proto.moejax.v1 import link_pb2

JOIN_TIMEOUT_S = 30.0
REFUSALS = 3
"""So often in a row a rank may fail to enter a generation before it is replaced."""
SPARE_SEATS = 32
"""Replacements that a generation can take in; the next one after them costs a new generation, as every one does on
a GPU (docs/decisions/0004)."""


class Rendezvous:
    """Where the ranks of a server meet, one generation after the other. The service is reached at `host`; `ended` hears
    how it ended by itself."""

    def __init__(self, links: RankLinks, host: str, ended: Callable[[str], None]) -> None:
        self.generation = 0
        self.coordinator: Coordinator | None = None
        self._links = links
        self._host = host
        self._ended = ended
        self._before: Coordinator | None = None
        self._minding: asyncio.Task[None] | None = None
        self._seats: dict[int, int] = {}
        self._free: collections.deque[int] = collections.deque()
        self._processes = 0
        self._refusals: collections.Counter[int] = collections.Counter()
        """How often in a row each rank could not enter a generation."""

    @property
    def free(self) -> int:
        """Seats that are left."""
        return len(self._free)

    async def open(self, ranks: tuple[int, ...]) -> None:
        """Start the next generation, of these ranks; `gather` has them enter it."""
        self._before = self.coordinator
        if self._minding is not None:
            self._minding.cancel()
        self._processes = len(ranks) + (0 if "cuda" in os.environ.get("JAX_PLATFORMS", "") else SPARE_SEATS)
        self.coordinator = await Coordinator.start(len(ranks), self._processes, self._host)
        self._minding = asyncio.create_task(self._mind(self.coordinator))
        self.generation += 1
        self._seats = {rank: process for process, rank in enumerate(ranks)}
        self._free = collections.deque(range(len(ranks), self._processes))

    async def gather(self, pages_used: Mapping[int, int]) -> None:
        """All that the generation was started for enter it, and keep so many pages of their caches. Raises RankLost,
        RankRefused or TimeoutError."""
        assert self.coordinator is not None
        ranks = tuple(self._seats)
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                joins = {rank: self._join(pages_used.get(rank, 0)) for rank in ranks}
                await self._links.call_all("join", joins)
            self._refusals.clear()
        except (RankLost, RankRefused, TimeoutError) as error:
            # Whoever waits for the others in there is let go by the end of the service.
            await self.coordinator.stop()
            if isinstance(error, RankRefused):
                self._refuse(error)
            if isinstance(error, TimeoutError):
                self._links.give_up(ranks, f"no answer to join within {JOIN_TIMEOUT_S:.0f} s")
            raise
        finally:
            if self._before is not None:
                await self._before.stop()

    async def admit(self, rank: int) -> int:
        """A rank enters the generation; returns the seat it has taken. Raises RankLost or RankRefused."""
        self._seats[rank] = seat = self._free.popleft()
        await self._links.call(rank, "join", self._join(0))
        return seat

    async def introduce(self, rank: int, seat: int, others: Iterable[int]) -> None:
        """Tell the others where a rank sits."""
        message = link_pb2.Seat(rank=rank, process=seat)
        await asyncio.gather(*(self._links.call(each, "seat", message) for each in others), return_exceptions=True)

    def forget(self, rank: int) -> None:
        """A rank is gone."""
        self._seats.pop(rank, None)

    async def close(self) -> None:
        """Stop the service."""
        if self._minding is not None:
            self._minding.cancel()
        if self.coordinator is not None:
            await self.coordinator.stop()

    def _join(self, pages_used: int) -> link_pb2.Join:
        assert self.coordinator is not None
        return link_pb2.Join(
            generation=self.generation,
            address=self.coordinator.address,
            members=self._seats.keys(),
            seats=self._seats.values(),
            processes=self._processes,
            pages_used=pages_used,
        )

    def _refuse(self, error: RankRefused) -> None:
        """A rank could not enter. One that never can must not keep the others out."""
        self._refusals[error.rank] += 1
        if self._refusals[error.rank] >= REFUSALS:
            self._links.declare(error.rank, Cause("error", f"could not join: {error}"), time.monotonic())

    async def _mind(self, coordinator: Coordinator) -> None:
        """Without its coordinator a generation goes on, but takes nobody in."""
        code = await coordinator.process.wait()
        self._free.clear()
        self._ended(f"the coordinator ended with {f'signal {-code}' if code < 0 else f'code {code}'}")
