"""How long the next step waits for requests that are still to come."""

import asyncio
from collections.abc import Iterable
from typing import Any

from serving.config import Settings
from serving.engine.batch import Batch, StepBucket
from serving.engine.state import EngineState
from serving.executor.host_steps import StepAnswers
from serving.executor.step_pipeline import StepPipeline
from serving.proto.moejax.v1 import link_pb2
from simulation.hand_model import small_limits

BUCKET = StepBucket(2, 0)


class Links:
    """One rank, which answers a step when it is let."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.skipped: list[bool] = []
        self.version = 2
        self.answer = asyncio.Event()

    def by_host(self, ranks: Iterable[int]) -> tuple[list[int], dict[Any, list[int]]]:
        return list(ranks), {}

    def link_version(self, ranks: Iterable[int]) -> int:
        assert list(ranks) == [0]
        return self.version

    async def step(self, parts: dict[int, link_pb2.Step], hosts: dict[Any, Any]) -> StepAnswers:
        assert not hosts
        self.sent.append(parts[0].step)
        self.skipped.append(parts[0].skip_drafts)
        await self.answer.wait()
        return StepAnswers({rank: link_pb2.StepDone(step=part.step) for rank, part in parts.items()})


def flown(executor: Links, loop: asyncio.AbstractEventLoop) -> tuple[StepPipeline, Any]:
    settings = Settings(buckets=((2, 0), (2, 1)), ranks=1)
    flights: Any = StepPipeline(settings, executor, lambda guide, generated: None)  # type: ignore[arg-type]
    state = EngineState.start(small_limits(), {0: 8})

    def send(step: int, *, skip_drafts: bool = False) -> None:
        batch = Batch(step, 0, BUCKET, {0: ()}, skip_drafts=skip_drafts)
        flights.send(batch, loop.time(), epoch=0, ranks=(0,), state=state)

    return flights, send


def test_a_step_is_on_its_way_before_the_next_is_made() -> None:
    async def run() -> None:
        executor = Links()
        flights, send = flown(executor, asyncio.get_running_loop())
        send(1)
        assert executor.sent == []
        await flights.wait_half()
        assert executor.sent == [1]
        flights.discard()

    asyncio.run(run())


def test_all_ranks_draft_after_a_step_while_one_does_not_know_that_it_can_be_skipped() -> None:
    async def run() -> None:
        executor = Links()
        flights, send = flown(executor, asyncio.get_running_loop())
        for step, executor.version in enumerate((2, 1), 1):
            send(step, skip_drafts=True)
            await flights.wait_half()
            flights.discard()
        assert executor.skipped == [True, False]

    asyncio.run(run())


def test_half_of_a_step_ends_with_the_step_however_long_those_before_it_took() -> None:
    async def run() -> None:
        executor = Links()
        flights, send = flown(executor, asyncio.get_running_loop())
        flights._durations[BUCKET] = [1e9]
        send(1)
        half = asyncio.create_task(flights.wait_half())
        await asyncio.sleep(0.01)
        assert not half.done()
        executor.answer.set()
        await half
        assert set((await flights.receive()).ranks) == {0}
        assert len(flights) == 0

    asyncio.run(run())


def test_nothing_is_waited_for_without_a_step_in_flight() -> None:
    async def run() -> None:
        flights, _ = flown(Links(), asyncio.get_running_loop())
        await flights.wait_half()
        assert len(flights) == 0

    asyncio.run(run())
