"""How long the next step waits for requests that are still to come."""

import asyncio
from typing import Any

from serving.batch import Batch, Bucket
from serving.config import Settings
from serving.engine import EngineState
from serving.flights import Flights
from serving.proto.moejax.v1 import link_pb2
from tests.fakes import small_limits

BUCKET = Bucket(2, 0)


class Links:
    """One rank, which answers a step when it is let."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.answer = asyncio.Event()

    async def step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        self.sent.append(parts[0].step)
        await self.answer.wait()
        return {rank: link_pb2.StepDone(step=part.step) for rank, part in parts.items()}


def flown(links: Links, loop: asyncio.AbstractEventLoop) -> tuple[Flights, Any]:
    settings = Settings(buckets=((2, 0), (2, 1)), ranks=1)
    flights: Any = Flights(settings, links, lambda guide, generated: None)  # type: ignore[arg-type]
    state = EngineState.start(small_limits(), {0: 8})

    def send(step: int) -> None:
        batch = Batch(step, 0, BUCKET, {0: ()})
        flights.send(batch, loop.time(), epoch=0, ranks=(0,), state=state)

    return flights, send


def test_a_step_is_on_its_way_before_the_next_is_made() -> None:
    async def run() -> None:
        links = Links()
        flights, send = flown(links, asyncio.get_running_loop())
        send(1)
        assert links.sent == []
        await flights.half()
        assert links.sent == [1]
        flights.ground()

    asyncio.run(run())


def test_half_of_a_step_ends_with_the_step_however_long_those_before_it_took() -> None:
    async def run() -> None:
        links = Links()
        flights, send = flown(links, asyncio.get_running_loop())
        flights._took[BUCKET] = [1e9]
        send(1)
        half = asyncio.create_task(flights.half())
        await asyncio.sleep(0.01)
        assert not half.done()
        links.answer.set()
        await half
        assert set(await flights.land()) == {0}
        assert len(flights) == 0

    asyncio.run(run())


def test_nothing_is_waited_for_without_a_step_in_flight() -> None:
    async def run() -> None:
        flights, _ = flown(Links(), asyncio.get_running_loop())
        await flights.half()
        assert len(flights) == 0

    asyncio.run(run())
