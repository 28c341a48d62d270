"""Guesses of a layer of multi-token prediction change no token, and are waited for while they are worth it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.speculation import FIRST_RATES, MODEL_CLASS, NOTHING_DRAFTED, worth_waiting
from serving.engine.step_results import can_look_ahead
from serving.protocol.request import Token
from serving.protocol.sampling import StructuredOutputs
from simulation.hand_model import small_request
from tests.support.fake_engine import FakeEngine, small_engine

PROMPT = (7, 3, 9, 1, 5)
"""A prompt in which nothing is found by look-up."""


def guessing(pages=(16, 16), **limits) -> FakeEngine:
    return small_engine(pages, **{"speculate": True, "model_drafts": 2} | limits)


@pytest.mark.parametrize("fixed", [None, 1, 2])
def test_guesses_that_are_right_save_steps_and_change_no_token(fixed):
    steps = {}
    for speculate in (False, True):
        s = guessing(speculate=speculate, draft_tokens=fixed)
        s.submit(small_request("a", PROMPT, max_tokens=40))
        s.finish()
        steps[speculate] = s.state.step
        drafted = [item.drafted for item in s.heard["a"] if isinstance(item, Token)]
        assert sum(drafted) == s.state.accepted
        assert (s.state.accepted > 0) is speculate
    assert steps[True] < 0.75 * steps[False]


def test_a_request_may_choose_for_itself():
    for server, request, drafts in ((True, False, False), (False, True, True), (True, None, True)):
        s = guessing(speculate=server)
        s.submit(small_request("a", PROMPT, max_tokens=20, speculate=request))
        s.finish()
        assert (s.state.drafted > 0) is drafts


@settings(deadline=None, max_examples=40)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    length=st.integers(1, 40),
    extras=st.sampled_from(
        (
            {},
            {"repetition_penalty": 1.5, "min_tokens": 5, "stop_tokens": frozenset(range(0, 97, 5))},
            {"structured_outputs": StructuredOutputs("regex", "any"), "top_logprobs": 1},
            {"logit_bias": ((3, 40.0), (4, 41.0)), "frequency_penalty": 2.0},
        )
    ),
    fixed=st.sampled_from((None, 1, 5)),
    cost=st.sampled_from((0.0, 0.6)),
    lost=st.integers(0, 20),
    ahead=st.booleans(),
)
def test_streams_are_those_without_guesses_through_a_loss(seeds, length, extras, fixed, cost, lost, ahead):
    s = guessing((12, 12), draft_tokens=fixed, draft_cost=cost)
    for number, seed in enumerate(seeds):
        s.submit(
            small_request(f"{number}", tuple((seed + i) % 5 for i in range(length)), seed=seed, max_tokens=30, **extras)
        )
    for _ in range(lost):
        batch = s.begin()
        if batch is None:
            break
        following = s.begin() if ahead and can_look_ahead(s.state) else None
        s.end(batch)
        if following is not None:
            s.end(following)
    s.begin()
    s.lose([0])
    s.adopt({0: 12, 1: 12})
    s.finish()


def test_the_next_step_waits_for_guesses_while_they_are_often_right():
    s = guessing()
    s.submit(small_request("a", PROMPT, max_tokens=40))
    batch = s.begin()
    assert not can_look_ahead(s.state)
    s.end(batch)
    (sequence,) = s.state.running.values()
    assert sequence.drafting.guesses
    rates = (*FIRST_RATES[:MODEL_CLASS], 0.1)
    poor = dataclasses.replace(sequence, drafting=dataclasses.replace(sequence.drafting, rates=rates))
    s.state = dataclasses.replace(s.state, running={"a": poor})
    batch = s.begin()
    assert not any(item.drafts for part in batch.scheduled.values() for item in part)
    assert can_look_ahead(s.state)
    ahead = s.begin()
    assert not any(item.drafts for part in ahead.scheduled.values() for item in part)
    s.end(batch)
    s.end(ahead)
    # What was not taken is compared all the same, so that the rate is known.
    (sequence,) = s.state.running.values()
    assert sequence.drafting.rates[MODEL_CLASS] != 0.1
    s.finish()


def test_guesses_are_judged_whether_a_step_takes_them_or_not():
    drafting = dataclasses.replace(NOTHING_DRAFTED, guesses=(4, 5))
    for sampled, rises in (((4,), True), ((6,), False)):
        after = drafting.guessed(None, sampled, (8,))
        assert (after.rates[MODEL_CLASS] > FIRST_RATES[MODEL_CLASS]) is rises
        assert after.rates[:MODEL_CLASS] == FIRST_RATES[:MODEL_CLASS]
        assert (after.guesses, after.wait) == ((8,), 0)


def test_a_full_server_makes_steps_ahead_instead():
    few, many = ({"rates": [0.7] * n, "most": 2, "rows": n, "requests": n} for n in (1, 32))
    assert worth_waiting(**few, fixed=None)
    assert not worth_waiting(**many, fixed=None)
    assert worth_waiting(**many, fixed=2)
    assert not worth_waiting(rates=[], most=2, rows=4, requests=4, fixed=2)
