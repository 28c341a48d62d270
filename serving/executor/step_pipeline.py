"""The steps in flight: sent to the ranks, and their results not received yet.

There is one; or there are two, where the second was scheduled while the first runs.
"""

import asyncio
import collections
import dataclasses
from collections.abc import Iterable

from serving.config import SchedulingSettings
from serving.engine.batch import Batch, StepBucket
from serving.engine.logits import MaskFunction
from serving.engine.state import EngineState
from serving.executor.executor import RankExecutor
from serving.executor.host_steps import StepAnswers, host_step
from serving.executor.prefix_index import PrefixUpdates
from serving.executor.step_messages import step_message
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.versions import SKIPS_DRAFTS

LOOP_TURNS = 3
"""Turns of the event loop to yield, so that gRPC sends the step and readers of the step before run."""
HISTORY = 8
"""Durations of the last steps of a bucket, by which the next one is estimated."""
MIN_WAIT_S = 0.001
"""Seconds that are worth waiting for."""


@dataclasses.dataclass(frozen=True)
class StepInFlight:
    """A step that was sent; `began` is when it was scheduled, on the monotonic clock."""

    batch: Batch
    began: float
    answers: "asyncio.Task[StepAnswers]"


class StepPipeline:
    """The steps in flight of one server, and the full pages that were sent to each rank with them."""

    def __init__(self, settings: SchedulingSettings, executor: RankExecutor, masks: MaskFunction) -> None:
        self._settings = settings
        self._executor = executor
        self._masks = masks
        self._updates = PrefixUpdates()
        self._steps: collections.deque[StepInFlight] = collections.deque()
        self._durations: dict[StepBucket, collections.deque[float]] = {}
        """Seconds of the last steps of each bucket."""
        self._previous_done_at = 0.0
        """When the step before the first one in flight was done."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def first(self) -> StepInFlight:
        """The step that was sent first."""
        return self._steps[0]

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The steps in flight."""
        return tuple(step.batch for step in self._steps)

    @property
    def answers(self) -> tuple["asyncio.Task[StepAnswers]", ...]:
        """The tasks that wait for answers."""
        return tuple(step.answers for step in self._steps)

    def forget_sent_pages(self) -> None:
        """A plan has come into force: its ranks know no pages."""
        self._updates.reset()

    def send(self, batch: Batch, began: float, *, epoch: int, ranks: Iterable[int], state: EngineState) -> None:
        """Send a step that was scheduled at `began` to all `ranks`; `state` is that after scheduling it."""
        before = self._steps[-1].batch if self._steps else None
        ranks = list(ranks)
        if batch.skip_drafts and self._executor.link_version(ranks) < SKIPS_DRAFTS:
            batch = dataclasses.replace(batch, skip_drafts=False)  # ranks of both versions must do the same
        own, by_host = self._executor.by_host(ranks)
        parts = {rank: self._part(batch, rank, epoch, before, state) for rank in own}
        hosts = {
            stream: (on_host, self._host_part(batch, on_host, epoch, before, state))
            for stream, on_host in by_host.items()
        }
        self._steps.append(StepInFlight(batch, began, asyncio.create_task(self._executor.step(parts, hosts))))

    async def wait_half(self) -> None:
        """Wait for half of the first step's time, estimated by the quickest of its bucket, so that requests which
        arrive meanwhile are in the next step; at least until it was sent to the ranks."""
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        if self._steps and (took := self._durations.get(self.first.batch.bucket)):
            left = max(self.first.began, self._previous_done_at) + min(took) / 2 - clock.now()
            if left > MIN_WAIT_S:
                await asyncio.wait([self.first.answers], timeout=left)

    async def receive(self) -> StepAnswers:
        """Wait for the answers to the step that was sent first. When it failed, the steps after it are discarded.
        Raises RankLost, CommandFailed or NonFiniteStep."""
        try:
            answers = await self.first.answers
        except Exception:
            self.discard()
            raise
        done, now = self._steps.popleft(), clock.now()
        took = self._durations.setdefault(done.batch.bucket, collections.deque(maxlen=HISTORY))
        took.append(now - max(done.began, self._previous_done_at))
        self._previous_done_at = now
        return answers

    def discard(self) -> None:
        """Drop all steps in flight."""
        for answers in self.answers:
            answers.cancel()
            answers.add_done_callback(lambda answers: answers.cancelled() or answers.exception())
        self._steps.clear()

    def _part(self, batch: Batch, rank: int, epoch: int, before: Batch | None, state: EngineState) -> link_pb2.Step:
        limits = state.limits
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
        if (full := self._full_pages(rank, state)) is not None:
            part.full.CopyFrom(full)
        return part

    def _full_pages(self, rank: int, state: EngineState) -> link_pb2.FullPages | None:
        """The change of a rank's full pages and snapshots since its last step, if there is one."""
        pool = state.pools.get(rank)
        return self._updates.update_for(rank, pool.keys, pool.snapshots.places) if pool is not None else None

    def _host_part(
        self, batch: Batch, ranks: list[int], epoch: int, before: Batch | None, state: EngineState
    ) -> link_pb2.HostStep:
        found = ((rank, self._full_pages(rank, state)) for rank in ranks)
        full = {rank: pages for rank, pages in found if pages is not None}
        return host_step(
            batch,
            ranks,
            epoch=epoch,
            bucket=self._settings.buckets.index(tuple(batch.bucket)),
            limits=state.limits,
            masks=self._masks,
            before=before,
            full=full,
        )
