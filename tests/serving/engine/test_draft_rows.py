"""Rows of drafts change no token and take nothing that another request needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.inputs.workload import MAX_DRAFTS
from serving.engine.draft_rows import stop_drafting
from serving.engine.poison import LOSS, Incident
from serving.engine.step_results import can_look_ahead
from serving.protocol.request import Token
from serving.protocol.sampling import StructuredOutputs
from simulation.hand_model import small_request
from tests.support.fake_engine import FakeEngine, small_engine

PERIODIC = (1, 2, 3, 4) * 4
"""A prompt with which the fake model, under an odd seed, goes on for a while."""


def speculating(pages=(16, 16), **limits) -> FakeEngine:
    return small_engine(pages, **{"speculate": True, "draft_tokens": 3} | limits)


def until_drafts(s: FakeEngine, most: int = 40):
    """Run steps until one has drafts; it is in flight."""
    for _ in range(most):
        batch = s.begin()
        assert batch is not None, "no step had drafts"
        if any(item.drafts for part in batch.scheduled.values() for item in part):
            return batch
        s.end(batch)
    raise AssertionError("no step had drafts")


def test_drafts_that_are_right_save_steps_and_change_no_token():
    steps = {}
    for speculate in (False, True):
        s = speculating(speculate=speculate)
        s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
        s.finish()
        steps[speculate] = s.state.step
        drafted = [item.drafted for item in s.heard["a"] if isinstance(item, Token)]
        assert sum(drafted) == s.state.accepted
        assert (s.state.accepted > 0) is speculate
    assert steps[True] < 0.7 * steps[False]


def test_a_request_may_choose_for_itself():
    for server, request, drafts in (
        (True, False, False),
        (False, True, True),
        (True, None, True),
        (False, None, False),
    ):
        s = speculating(speculate=server)
        s.submit(small_request("a", PERIODIC, seed=1, max_tokens=30, speculate=request))
        s.finish()
        assert (s.state.drafted > 0) is drafts


@settings(deadline=None, max_examples=60)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    length=st.integers(1, 40),
    extras=st.sampled_from(
        (
            {},
            {"frequency_penalty": 0.5, "presence_penalty": -1.0},
            {"repetition_penalty": 1.5, "min_tokens": 5, "stop_tokens": frozenset(range(0, 97, 5))},
            {"structured_outputs": StructuredOutputs("regex", "any"), "top_logprobs": 1},
            {"stop_tokens": frozenset({2, 3})},
            {"logit_bias": ((3, 40.0),)},
            {"logit_bias": ((3, 40.0), (4, 41.0)), "frequency_penalty": 2.0},
            {"logit_bias": ((3, 90.0),), "min_tokens": 9, "stop_tokens": frozenset({3})},
        )
    ),
    fixed=st.sampled_from((None, 1, 5)),
    lost=st.integers(0, 30),
)
def test_streams_are_those_without_drafts_through_a_loss(seeds, length, extras, fixed, lost):
    s = speculating((12, 12), draft_tokens=fixed)
    for number, seed in enumerate(seeds):
        prompt = tuple((seed + i) % 5 for i in range(length))
        s.submit(small_request(f"{number}", prompt, seed=seed, max_tokens=30, **extras))
    for _ in range(lost):
        s.step()
    s.begin()
    s.lose([0])
    s.adopt({0: 12, 1: 12})
    s.finish()


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_no_draft_escapes_the_first_penalty(penalty):
    tokens = []
    for speculate in (False, True):
        s = speculating((40,), speculate=speculate)
        s.submit(small_request("cached", (5,) * 32, seed=1, max_tokens=2))
        s.finish()
        s.submit(small_request("a", (5,) * 33, seed=1, max_tokens=8, **{penalty: 2.0}))
        first = s.begin()
        assert first is not None
        (item,) = first.scheduled[0]
        assert (item.start, item.rows) == (32, 1)  # the first token comes from a decode row, without drafts
        s.end(first)
        s.finish()
        tokens.append(s.tokens("a"))
    assert tokens[0] == tokens[1]


def test_no_step_is_made_ahead_of_one_whose_number_of_tokens_is_not_known():
    s = speculating()
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
    batch = until_drafts(s)
    assert not can_look_ahead(s.state)
    s.end(batch)
    assert can_look_ahead(s.state)


def test_a_step_made_ahead_may_have_drafts_after_a_token_that_is_not_known():
    s = speculating()
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
    s.step()
    first = s.begin()
    while any(item.drafts for part in first.scheduled.values() for item in part):
        s.end(first)
        first = s.begin()
    ahead = s.begin()
    s.end(first)
    s.end(ahead)
    s.finish()


def test_entries_of_wrong_drafts_are_in_no_page_that_others_can_share():
    s = speculating((40,), draft_tokens=5)
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=60))
    while s.step() is not None:
        (pool,) = s.state.pools.values()
        for sequence in s.state.running.values():
            sealed = [page for page in sequence.pages if page in pool.keys]
            assert len(sealed) * s.state.limits.page_size <= sequence.committed
    s.submit(small_request("b", (*PERIODIC, *s.tokens("a")[:30]), seed=1, max_tokens=9))
    s.finish()


def test_drafts_take_only_rows_that_are_left_and_no_larger_bucket_beside_a_prompt():
    s = speculating((40,), draft_tokens=5)
    for number in range(3):
        s.submit(small_request(f"{number}", PERIODIC, seed=2 * number + 1, max_tokens=30))
    for number in range(60):
        if number == 20:
            s.submit(small_request("late", range(50), max_tokens=3))
        batch = s.begin()
        if batch is None:
            break
        assert batch.required_bucket.decode <= s.state.limits.max_decode_rows
        for part in batch.scheduled.values():
            if any(item.tiles for item in part):
                decode = sum(not item.tiles for item in part)
                tiles = sum(item.tiles for item in part)
                fits = [b for b in s.state.limits.buckets if b.decode >= decode and b.tiles >= tiles]
                assert batch.bucket == min(fits, key=lambda b: b.rows)
        s.end(batch)
    s.finish()


def test_drafts_take_no_bucket_with_tiles_beside_no_prompt():
    s = speculating((40,), buckets=((2, 0), (4, 2)))
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
    while (batch := s.begin()) is not None:
        assert batch.required_bucket.tiles or batch.bucket.tiles == 0
        s.end(batch)
    assert s.state.accepted > 0


def test_drafts_never_make_a_rank_preempt():
    preemptions = []
    for speculate in (False, True):
        s = speculating((9,), draft_tokens=5, speculate=speculate)
        for number in range(3):
            s.submit(small_request(f"{number}", PERIODIC[:8], seed=2 * number + 1, max_tokens=14))
        s.finish()
        preemptions.append(s.state.preemptions)
    assert preemptions == [0, 0]


def test_a_draft_never_goes_past_the_end_of_its_request():
    for max_tokens in range(1, 12):
        s = speculating((16,), draft_tokens=MAX_DRAFTS, max_context=24)
        s.submit(small_request("a", PERIODIC, seed=1, max_tokens=max_tokens))
        while (batch := s.begin()) is not None:
            for item in batch.scheduled[0]:
                assert item.start + item.rows < 24
                assert len(s.tokens("a")) + 1 + len(item.drafts) <= max_tokens
            s.end(batch)
        s.check_streams(all_ended=True)


def test_whoever_is_accused_of_breaking_ranks_has_no_drafts():
    s = speculating()
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
    until_drafts(s)
    s.lose([])
    accused, _ = s.state.suspicion.accuse(Incident(LOSS - 1, {"a": 60}, since={"a": 20}))
    s.state = s.state.with_suspicion(accused)
    for _ in range(5):
        batch = s.begin()
        assert not any(item.drafts for item in batch.scheduled[0])
        s.end(batch)


def test_a_request_whose_drafts_gave_no_numbers_has_none_any_more():
    s = speculating()
    s.submit(small_request("a", PERIODIC, seed=1, max_tokens=40))
    batch = until_drafts(s)
    (rank,) = (rank for rank, part in batch.scheduled.items() if part)
    s.lose([])
    s.state = stop_drafting(s.state, batch, [rank])
    drafted = s.state.drafted
    s.finish()
    assert s.state.drafted == drafted


@pytest.mark.parametrize("fixed", [None, 3])
def test_the_same_history_gives_the_same_steps(fixed):
    def steps() -> list[object]:
        s, made = speculating(draft_tokens=fixed), []
        for number in range(3):
            s.submit(small_request(f"{number}", PERIODIC, seed=number, max_tokens=30))
        while (batch := s.step()) is not None:
            made.append(batch)
        return made

    assert steps() == steps()
