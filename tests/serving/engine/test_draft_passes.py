"""The model drafts after a step while its guesses are worth it, else rarely, and never if none could be taken."""

import dataclasses
from typing import Any

import pytest

from serving.engine.batch import StepBucket
from serving.engine.speculation import FIRST_RATES, MODEL_CLASS, MOST_PROBES, PROBE_SHARE
from serving.engine.step_results import can_look_ahead
from simulation.hand_model import small_request
from tests.support.fake_engine import FakeEngine, small_engine

PROMPT = (7, 3, 9, 1, 5)
BUCKETS = (StepBucket(4, 0), StepBucket(32, 0), StepBucket(4, 2), StepBucket(32, 2))


def guessing(**limits: object) -> FakeEngine:
    """An engine whose model drafts at the cost of a third of a step."""
    values = {"speculate": True, "model_drafts": 2, "draft_cost": 0.3, "buckets": BUCKETS, "max_queue": 64}
    return small_engine((512,), **{**values, "max_context": 512} | limits)


def with_rates(s: FakeEngine, rate: float, **fields: Any) -> None:
    """Every open request has had this rate of right guesses; `fields` are others of its experience with drafts."""

    def changed(sequences):
        return {
            key: dataclasses.replace(
                each,
                drafting=dataclasses.replace(each.drafting, rates=(*FIRST_RATES[:MODEL_CLASS], rate), **fields),
            )
            for key, each in sequences.items()
        }

    s.state = dataclasses.replace(s.state, running=changed(s.state.running), waiting=changed(s.state.waiting))


def passes(s: FakeEngine, steps: int, *, rate: float | None = None) -> list[bool]:
    """Whether the model drafts after each of so many steps; with `rate` this stays the rate of all requests."""
    made = []
    for _ in range(steps):
        if rate is not None:
            with_rates(s, rate)
        batch = s.step()
        assert batch is not None
        made.append(not batch.skip_drafts)
    return made


def test_the_model_drafts_after_every_step_while_its_guesses_are_worth_it() -> None:
    s = guessing()
    s.submit(small_request("a", PROMPT, seed=1, max_tokens=200))
    assert all(passes(s, 30, rate=0.95))
    assert s.state.draft_passes_skipped == 0
    assert s.state.accepted > 0


def test_where_no_guess_could_be_taken_if_all_were_right_none_is_made() -> None:
    s = guessing()
    for n in range(32):
        s.submit(small_request(f"{n}", PROMPT, seed=n, max_tokens=40))
    before = s.state.step
    assert not any(passes(s, 30, rate=1.0))
    assert s.state.draft_passes_skipped == s.state.step - before
    s.finish()


@pytest.mark.parametrize(("requests", "cost"), [(1, 0.05), (5, 0.3), (2, 0.6)])
def test_guesses_that_are_not_worth_it_cost_a_bounded_share_of_the_steps(requests: int, cost: float) -> None:
    s = guessing(draft_cost=cost)
    for n in range(requests):
        s.submit(small_request(f"{n}", PROMPT, seed=2 * n, max_tokens=300))
    steps, made = 250, passes(s, 250, rate=0.05)
    assert sum(made) * cost <= PROBE_SHARE * steps + MOST_PROBES * cost + 1e-9
    assert any(made[steps // 2 :]), "the rate has to stay known"


def test_steps_without_a_pass_are_made_ahead_and_one_with_a_pass_is_waited_for_when_it_promises_enough() -> None:
    s = guessing()
    s.submit(small_request("a", PROMPT, seed=1, max_tokens=200))
    s.step()
    for rate, made, saved in ((0.95, True, 0.0), (0.6, False, 0.0), (0.6, True, 1.0), (0.1, True, 1.0)):
        with_rates(s, rate, guesses=())
        s.state = dataclasses.replace(s.state, draft_passes=dataclasses.replace(s.state.draft_passes, saved=saved))
        batch = s.begin()
        assert batch is not None
        assert batch.skip_drafts is not made
        assert can_look_ahead(s.state) is (not made or rate == 0.1)
        s.end(batch)


def test_rates_recover_when_the_load_sinks() -> None:
    s = guessing(draft_cost=0.1)
    s.submit(small_request("a", PROMPT, seed=1, max_tokens=400))
    for n in range(31):
        s.submit(small_request(f"{n}", PROMPT, seed=n, max_tokens=20))
    passes(s, 4, rate=0.1)
    while len(s.state.running) + len(s.state.waiting) > 1:
        s.step()
    before, accepted = s.state.draft_passes_skipped, s.state.accepted
    made = passes(s, 150)
    assert not all(made)
    assert all(made[-20:]), "the guesses are right, and one request alone has room for them"
    assert s.state.accepted > accepted
    assert s.state.draft_passes_skipped - before == made.count(False)
    s.finish()


def test_a_new_request_begins_with_the_rate_of_those_before_it() -> None:
    s = guessing(draft_cost=0.0)
    s.submit(small_request("a", PROMPT, seed=1, max_tokens=100))
    s.finish()
    s.submit(small_request("b", PROMPT, seed=1, max_tokens=100))
    (waiting,) = s.state.waiting.values()
    assert waiting.drafting.rates == (*FIRST_RATES[:MODEL_CLASS], s.state.draft_passes.rate)
    assert s.state.draft_passes.rate != FIRST_RATES[MODEL_CLASS]
    s.finish()


def test_a_number_that_the_user_chose_means_always_and_a_request_without_drafts_means_never() -> None:
    for fixed, wanted, made in ((2, None, True), (2, False, False), (None, False, False)):
        s = guessing(draft_tokens=fixed)
        for n in range(16):
            s.submit(small_request(f"{n}", tuple(range(90)), seed=n, max_tokens=9, speculate=wanted))
        while s.state.running or s.state.waiting:
            batch = s.step()
            assert batch is not None
            work = [item for part in batch.scheduled.values() for item in part]
            some = any(item.tiles or s.state.find(item.request_id) for item in work)
            assert batch.skip_drafts is not made or not some
        s.check_streams(all_ended=True)


def test_entries_of_prompts_are_made_while_guesses_for_all_open_requests_would_be_worth_it() -> None:
    for requests, made in ((1, True), (16, False)):
        s = guessing()
        for n in range(requests):
            s.submit(small_request(f"{n}", tuple(range(n, n + 90)), seed=n, max_tokens=9))
        with_rates(s, 0.95)
        s.state = dataclasses.replace(s.state, draft_passes=dataclasses.replace(s.state.draft_passes, saved=0.0))
        batch = s.begin()
        assert batch is not None
        assert not any(item.samples for item in batch.scheduled[0]), "it has the middle of prompts alone"
        assert batch.skip_drafts is not made
        s.end(batch)
        s.finish()
