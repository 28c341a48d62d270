"""A call of several answers ends once: the error of one of them is that of the others, also in every replay."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.errors import Internal, MoejaxError, QueueFull
from serving.observability.metrics import Metrics
from serving.protocol.sampling import SamplingParams
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.recovery_machine import GRAMMAR, SETTINGS, Machine

pytestmark = pytest.mark.usefixtures("no_processes")

PARAMS = SamplingParams(n=3, seed=1, max_tokens=24, ignore_eos=True)


async def error_of(items) -> MoejaxError:
    """The error that ends a call."""
    try:
        async for _ in items:
            pass
    except MoejaxError as error:
        return error
    raise AssertionError("the call ended without an error")


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_the_error_of_one_answer_ends_the_call_the_same_way_at_every_reading(tmp_path: Path, failed: int) -> None:
    async def scenario() -> None:
        m = Machine(SETTINGS, request_log=RequestLog(*Journal.open(tmp_path)))
        await m.failover.start()
        m.loop.start()
        processor = RequestProcessor(m.loop, byte_tokenizer(), Metrics(m.loop), GRAMMAR)
        requests = await processor.accept_all([(1, 2, 3)], PARAMS, request_id="call")
        reading = processor.stream_call(requests)
        for _ in range(6):
            await anext(reading)
        m.loop.engine.fail_request(requests[failed].id, Internal("of one answer"))
        assert str(await error_of(reading)) == "of one answer"
        for _ in range(2):
            assert str(await error_of(processor.replay(await processor.find_call("call")))) == "of one answer"
        ends = [m.loop.engine.request_log.items(request.id)[-1] for request in requests]
        assert [str(end) for end in ends] == ["of one answer"] * 3
        m.loop.engine.request_log.close()
        _, records = Journal.open(tmp_path)
        kept = RequestLog(None, records)
        assert [str(kept.items(request.id)[-1]) for request in requests] == ["of one answer"] * 3
        await m.loop.drain(0.0)
        await m.failover.close()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))


def test_a_call_of_which_one_answer_finds_no_place_in_the_queue_is_refused_as_a_whole(tmp_path: Path) -> None:
    async def scenario() -> None:
        m = Machine(dataclasses.replace(SETTINGS, max_queue=2), request_log=RequestLog(*Journal.open(tmp_path)))
        await m.failover.start()
        m.loop.engine.apply_plan(())
        processor = RequestProcessor(m.loop, byte_tokenizer(), Metrics(m.loop), GRAMMAR)
        requests = await processor.accept_all([(1, 2, 3)], PARAMS, request_id="call")
        assert isinstance(await error_of(processor.stream_call(requests)), QueueFull)
        assert isinstance(await error_of(processor.replay(await processor.find_call("call"))), QueueFull)
        await m.failover.close()

    asyncio.run(asyncio.wait_for(scenario(), 60.0))
