"""A step that cannot be made as a request asked ends that request, and no other; one whose exchange fails is done once
more over new connections, and ends nobody."""

import asyncio
import collections

import pytest

import serving.recovery.rendezvous
from serving.core import step_runner
from serving.errors import InvalidRequest
from serving.protocol.events import EventKind
from serving.protocol.sampling import StructuredOutputs
from serving.text.structured_output import GrammarMatcher
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED, alone, small_request
from tests.support import recovery_machine
from tests.support.fake_executor import FakeCoordinator
from tests.support.recovery_machine import LIMIT_S, SETTINGS, Machine


async def play_failures(*, failures: int, shares_memory: bool) -> tuple[Machine, list[str], collections.Counter[str]]:
    """A server in which the exchange of a step fails so many times in a row. Also the messages to rank 0 from the first
    failure on, and the number of events of each kind."""
    m = Machine(SETTINGS)
    m.executor.shares_memory = shares_memory
    await m.failover.start()
    m.loop.start()
    left, began = failures, 0

    def fails() -> bool:
        nonlocal left, began
        if left and min(map(len, m.tokens.values())) >= 3:
            began = began or len(m.executor.log)
            left -= 1
            return True
        return False

    m.executor.exchange_fails = fails
    try:
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(m.read(request) for request in m.requests))
        assert left == 0
        messages = [what for rank, what in m.executor.log[began:] if rank == 0]
        return m, messages, collections.Counter(str(event.kind) for event in m.loop.events.retained())
    finally:
        await m.loop.drain(0.0)
        await m.failover.close()


@pytest.mark.parametrize("shares_memory", [True, False])
def test_after_an_exchange_that_failed_once_the_same_work_is_done_over_new_connections(monkeypatch, shares_memory):
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(step_runner, "SETTLE_S", 0.01)
    m, messages, kinds = asyncio.run(play_failures(failures=1, shares_memory=shares_memory))
    for request in m.requests:
        assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
    assert (kinds[EventKind.STEP_FAILED], kinds[EventKind.RECOVERED]) == (1, 1)
    assert {EventKind.RANK_LOST, EventKind.SUSPECTED}.isdisjoint(kinds)
    again = messages[: messages.index("adopt") + 1]
    assert again.count("abort") == 2, "at once, as the others wait for a rank that does not come, and by the recovery"
    assert ("join" in again) == (not shares_memory), "memory that ranks share is replaced without a new generation"
    assert "connect" in again or not shares_memory  # a new generation connects after it has adopted


def test_an_exchange_that_fails_again_makes_a_new_generation_and_accuses_its_requests(monkeypatch):
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(step_runner, "SETTLE_S", 0.01)
    m, messages, kinds = asyncio.run(play_failures(failures=3, shares_memory=True))
    for request in m.requests:
        assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
    assert kinds[EventKind.STEP_FAILED] == 3
    assert kinds[EventKind.SUSPECTED] == 1, "two of them count: the first one is free"
    assert EventKind.RANK_LOST not in kinds
    assert "join" in messages


def test_a_grammar_that_fails_ends_its_request_with_an_error(monkeypatch):
    monkeypatch.setattr(serving.recovery.rendezvous, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(recovery_machine, "GRAMMAR", GrammarMatcher(byte_tokenizer(), PREPARED.vocab_size, (257,)))

    async def run() -> None:
        m = Machine(SETTINGS)
        await m.failover.start()
        m.loop.start()
        # Fake ranks know no masks, so that their tokens do not follow the grammar.
        guide = StructuredOutputs("choice", '["a"]')
        m.tokens["constrained"] = []
        constrained = small_request("constrained", max_tokens=24, structured_outputs=guide)
        try:
            clients = [asyncio.create_task(m.read(request)) for request in m.requests]
            with pytest.raises(InvalidRequest, match="the constraint failed after 1 tokens") as caught:
                await asyncio.wait_for(m.read(constrained), LIMIT_S)
            assert caught.value.param == "choice"
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*clients)
            for request in m.requests:
                assert m.tokens[request.id] == alone(request, PREPARED.max_context)[0]
        finally:
            await m.loop.drain(0.0)
            await m.failover.close()

    asyncio.run(run())
