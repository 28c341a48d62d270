"""Requests that break ranks: found with as few losses as are allowed, and nobody else is ended."""

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.batch import Batch
from serving.engine.poison import FAILED_STEP, LOSS, Incident, Suspicion, incident_of
from serving.engine.step_results import can_look_ahead
from serving.errors import PoisonRequest
from serving.protocol.request import Finished, Request
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine

PAGES = {0: 24, 1: 24}

Breaks = Callable[[Batch], bool]


class Trial:
    """An engine on fake ranks, two of which fail in steps that `breaks` names."""

    def __init__(self, requests: list[Request], breaks: Breaks, limit: int = 2, weight: int = LOSS) -> None:
        self.server = FakeEngine.start(small_limits(), PAGES)
        self.server.state = self.server.state.with_suspicion(Suspicion(limit))
        self.breaks, self.weight = breaks, weight
        self.incidents: list[tuple[str, ...]] = []
        """The requests of each step in which a rank failed."""
        self.convicted: list[str] = []
        for request in requests:
            self.server.submit(request)

    def run(self, most: int = 2000) -> None:
        """Steps until no request is open."""
        for _ in range(most):
            batch = self.server.begin()
            if batch is None:
                break
            if self.breaks(batch):
                self.fail(batch)
            else:
                self.server.end(batch)
        assert not self.server.state.waiting
        assert not self.server.state.running
        assert not self.server.state.suspicion.incidents

    def fail(self, batch: Batch) -> None:
        rank = next(rank for rank, work in batch.scheduled.items() if work)
        self.incidents.append(members(batch))
        self.server.lose([rank] if self.weight == LOSS else [])
        self.server.adopt(PAGES)
        state = self.server.state
        suspicion, convicted = state.suspicion.accuse(incident_of((batch,), (rank,), self.weight))
        self.server.state = state.with_suspicion(suspicion)
        if convicted is not None:
            self.convicted.append(convicted)
            self.server.cancel(convicted)
            self.server.heard[convicted][-1] = PoisonRequest("x")


def members(batch: Batch) -> tuple[str, ...]:
    return tuple(work.request_id for part in batch.scheduled.values() for work in part)


def requests(count: int, tokens: int = 6) -> list[Request]:
    return [small_request(f"r{i}", range(i, i + 3 + 9 * i), max_tokens=tokens, seed=i) for i in range(count)]


def breaking(name: str, position: int) -> Breaks:
    """A request that breaks the step which computes this position of it."""

    def breaks(batch: Batch) -> bool:
        works = [work for part in batch.scheduled.values() for work in part if work.request_id == name]
        return any(work.start <= position < work.start + len(work.tokens) for work in works)

    return breaks


@given(count=st.integers(1, 6), who=st.integers(0, 5), position=st.integers(0, 60), limit=st.integers(2, 4))
def test_a_request_that_breaks_a_rank_ends_after_as_many_losses_and_nobody_else_does(count, who, position, limit):
    trial = Trial(requests(count), breaking(f"r{who}", position), limit)
    trial.run()
    guilty = trial.incidents != []
    assert trial.convicted == [f"r{who}"] * guilty
    assert len(trial.incidents) == limit * guilty
    if guilty:
        assert trial.incidents[-1] == (f"r{who}",)
        del trial.server.heard[f"r{who}"]
    trial.server.check_streams(all_ended=True)
    assert all(heard[-1] == Finished("length") for heard in trial.server.heard.values())


def test_a_step_that_fails_weighs_half_a_loss():
    trial = Trial(requests(3), breaking("r1", 2), weight=FAILED_STEP)
    trial.run()
    assert trial.convicted == ["r1"]
    assert len(trial.incidents) == 4
    assert trial.incidents[-2:] == [("r1",), ("r1",)]


def test_two_requests_that_break_a_rank_only_together_are_kept_apart_and_not_ended():
    everyone = requests(4)
    trial = Trial(everyone, lambda batch: {"r1", "r2"} <= {*members(batch)})
    trial.run()
    assert not trial.convicted
    assert len(trial.incidents) <= 2
    trial.server.check_streams(all_ended=True)


@pytest.mark.parametrize("limit", [2, 3])
def test_losses_that_no_request_explains_end_nobody(limit):
    broken = iter([True, *[False] * 40, True, *[False] * 40, True])
    trial = Trial(requests(5, tokens=40), lambda batch: next(broken, False), limit)
    trial.run()
    assert not trial.convicted
    assert len(trial.incidents) > 1
    trial.server.check_streams(all_ended=True)


def test_a_suspect_runs_alone_in_turn_with_the_others_until_it_is_cleared():
    trial = Trial(requests(4), lambda batch: False)
    server = trial.server
    batch = server.begin()
    assert batch is not None
    trial.fail(batch)
    suspects = {*server.state.suspicion.suspects}
    assert suspects == {*members(batch)}
    server.submit(small_request("late", range(7), max_tokens=60))
    turns = []
    while left := server.state.suspicion.suspects:
        assert not can_look_ahead(server.state)
        batch = server.begin()
        assert batch is not None
        assert members(batch) in {(key,) for key in left} or not {*members(batch)}.intersection(left)
        turns.append(bool({*members(batch)}.intersection(left)))
        server.end(batch)
    assert turns == [False, True] * (len(turns) // 2)
    assert len(turns) <= 4 * len(suspects)
    trial.run()
    server.check_streams(all_ended=True)


def test_requests_of_the_lost_rank_are_tried_first():
    server = FakeEngine.start(small_limits(), PAGES)
    for request in requests(4):
        server.submit(request)
    batch = server.begin()
    assert batch is not None
    assert all(batch.scheduled.values())
    for rank in PAGES:
        own = [work.request_id for work in batch.scheduled[rank]]
        suspicion, _ = Suspicion().accuse(incident_of((batch,), (rank,), LOSS))
        assert list(suspicion.suspects[: len(own)]) == own
        assert {*suspicion.suspects} == {*members(batch)}


def test_of_two_steps_in_flight_the_farther_place_counts():
    work = FakeEngine.start(small_limits(), PAGES)
    work.submit(small_request("r", range(3), max_tokens=4))
    first = work.begin()
    second = work.begin()
    assert first is not None
    assert second is not None
    assert incident_of((first, second), (0,), LOSS).until == {"r": 4}


def test_a_conviction_explains_the_incidents_of_the_others():
    suspicion, _ = Suspicion().accuse(Incident(LOSS, {"a": 3, "b": 3}, (0,)))
    suspicion, convicted = suspicion.accuse(Incident(LOSS, {"b": 3}, (1,)))
    assert convicted == "b"
    assert suspicion.suspects == ()
    assert dataclasses.replace(suspicion, tried="").weight_of("a") == 0


def test_a_request_that_got_past_the_place_is_cleared_and_one_that_ended_is_forgotten():
    suspicion, _ = Suspicion().accuse(Incident(LOSS, {"a": 3, "b": 9, "c": 1}, (0,)))
    suspicion = suspicion.settle({"a": 3, "b": 8})
    assert suspicion.suspects == ("b",)
    assert suspicion.cleared == {"a": 3}
