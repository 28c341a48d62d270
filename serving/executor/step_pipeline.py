"""Steps on their way: sent to the ranks, and their results not taken in yet.

There is one, or two where the second was made while the first runs.
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Iterable

from serving.batch import Batch, Bucket
from serving.config import Settings
from serving.engine import EngineState
from serving.links import RankLinks
from serving.page_index import PageNews
from serving.proto.moejax.v1 import link_pb2
from serving.shaping import Masks
from serving.step_wire import step_message

TURNS = 3
"""Of the event loop, until what was sent is with gRPC, and those told of the step before have heard."""
KEPT = 8
"""Steps of a bucket by which the next one is judged."""
LEAST_S = 0.001
"""What it is worth to wait for."""


@dataclasses.dataclass(frozen=True)
class Flight:
    """A step that was sent, made at a moment of the monotonic clock."""

    batch: Batch
    began: float
    answers: "asyncio.Task[dict[int, link_pb2.StepDone]]"


class Flights:
    """The steps in flight of one server, and what each rank has been told with them of its pages."""

    def __init__(self, settings: Settings, links: RankLinks, masks: Masks) -> None:
        self._settings = settings
        self._links = links
        self._masks = masks
        self._news = PageNews()
        self._flights: collections.deque[Flight] = collections.deque()
        self._took: dict[Bucket, collections.deque[float]] = {}
        """Seconds that the last steps of each bucket took."""
        self._free_at = 0.0
        """When the step before the first one in flight was over."""

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def first(self) -> Flight:
        """The step that was sent first."""
        return self._flights[0]

    @property
    def answers(self) -> tuple["asyncio.Task[dict[int, link_pb2.StepDone]]", ...]:
        """What is waited for."""
        return tuple(flight.answers for flight in self._flights)

    def take_plan(self) -> None:
        """A plan has come into force: its ranks know nothing of their pages."""
        self._news.again()

    def send(self, batch: Batch, began: float, *, epoch: int, ranks: Iterable[int], state: EngineState) -> None:
        """Send a step, made at `began`, to all `ranks`; `state` has its pages taken."""
        before = self._flights[-1].batch if self._flights else None
        parts = {rank: self._part(batch, rank, epoch, before, state) for rank in ranks}
        self._flights.append(Flight(batch, began, asyncio.create_task(self._links.step(parts))))

    async def half(self) -> None:
        """Wait for half of the first step, by the quickest of those like it, so that requests which come meanwhile are
        in the next one; at least until it is on its way to the ranks."""
        for _ in range(TURNS):
            await asyncio.sleep(0)
        if self._flights and (took := self._took.get(self.first.batch.bucket)):
            left = max(self.first.began, self._free_at) + min(took) / 2 - time.monotonic()
            if left > LEAST_S:
                await asyncio.wait([self.first.answers], timeout=left)

    async def land(self) -> dict[int, link_pb2.StepDone]:
        """The answers to the step that was sent first. When it failed, those after it have too. Raises RankLost,
        RankRefused or Poisoned."""
        try:
            answers = await self.first.answers
        except Exception:
            self.ground()
            raise
        landed, now = self._flights.popleft(), time.monotonic()
        took = self._took.setdefault(landed.batch.bucket, collections.deque(maxlen=KEPT))
        took.append(now - max(landed.began, self._free_at))
        self._free_at = now
        return answers

    def ground(self) -> None:
        """Wait for no step any more."""
        for answers in self.answers:
            answers.cancel()
            answers.add_done_callback(lambda answers: answers.cancelled() or answers.exception())
        self._flights.clear()

    def _part(self, batch: Batch, rank: int, epoch: int, before: Batch | None, state: EngineState) -> link_pb2.Step:
        limits, pool = state.limits, state.pools.get(rank)
        part = step_message(
            batch,
            rank,
            epoch=epoch,
            bucket=self._settings.buckets.index(tuple(batch.bucket)),
            page_size=limits.page_size,
            max_pages=limits.max_pages,
            masks=self._masks,
            before=before,
        )
        full = self._news.of(rank, pool.keys) if pool is not None else None
        if full is not None:
            part.full.CopyFrom(full)
        return part
