"""A drain under load moves each request once, whatever comes and ends while its entries are copied."""

import asyncio
import dataclasses

import pytest

import serving.recovery.rendezvous
from serving.config import Settings
from serving.protocol.instructions import Instruction
from tests.support.fake_executor import FakeCoordinator
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine


def test_requests_that_come_during_a_copy_do_not_stop_the_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)

    async def play() -> tuple[int, int]:
        m = Machine(Settings(**{**vars(SETTINGS), "restart": False}))
        await m.failover.start()
        m.loop.start()
        clients = [asyncio.create_task(m.read(request)) for request in m.requests]
        engine, copies = m.loop.engine, 0

        def during(number: int, rank: int, what: str) -> None:
            nonlocal copies
            if what == "read_cache":
                copies += 1
                engine.state = dataclasses.replace(engine.state, arrivals=engine.state.arrivals + 1)

        try:
            async with asyncio.timeout(LIMIT_S):
                await m.begun()
                m.executor.fails = during
                here = sum(sequence.rank == 1 for sequence in engine.state.running.values())
                await m.loop.apply(Instruction(action="drain", ranks=(1,)))
                await asyncio.gather(*clients)
            for request in m.requests:
                m.check_tokens(request)
            return copies, here
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    copies, here = asyncio.run(play())
    assert here > 0
    assert copies == here
