"""Stragglers are found by their own time and drained once; no other rank is drained."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from serving.executor.straggler_detector import StragglerSettings, StragglerState, judge, slowness

SETTINGS = StragglerSettings(patience=3, cool_off_s=100.0)
EVEN = {0: 10.0, 1: 11.0, 2: 9.0, 3: 10.0}
SLOW = EVEN | {2: 80.0}


def run(blocks, *, state=None, start=0.0, every=1.0, settings=SETTINGS):
    """(verdicts of each block, paces at the end)."""
    state, heard = state or StragglerState(), []
    for number, block in enumerate(blocks):
        state, verdicts = judge(state, block, start + every * number, settings)
        heard.append(verdicts)
    return heard, state


def test_a_rank_that_stays_slow_is_on_probation_and_then_drained():
    heard, _ = run([SLOW] * 6)
    assert heard == [{}, {}, {2: "probation"}, {}, {}, {2: "drain"}]


def test_ranks_are_compared_with_those_of_their_role_alone():
    apart = {0: 20.0, 1: 21.0, 2: 1.0, 3: 1.0, 4: 9.0}
    roles = {0: "attention", 1: "attention", 2: "expert", 3: "expert", 4: "expert"}
    assert max(slowness(apart, roles), key=slowness(apart, roles).get) == 4
    assert slowness(apart, roles)[0] < SETTINGS.recovery_factor * SETTINGS.factor
    assert not slowness({0: 5.0, 1: 1.0}, {0: "attention", 1: "expert"})


def test_a_rank_that_recovers_leaves_probation_without_a_record():
    heard, state = run([SLOW] * 5 + [EVEN])
    assert heard[-1] == {2: "recovered"}
    assert state.slow[2] == 0
    assert not any(run([SLOW] * 2, state=state)[0])


def test_a_rank_between_the_two_bounds_is_neither_blamed_more_nor_relieved():
    middling = EVEN | {2: 26.0}
    assert SETTINGS.recovery_factor * SETTINGS.factor < slowness(middling)[2] < SETTINGS.factor
    heard, state = run([SLOW] * 3 + [middling] * 20)
    assert not any(heard[3:])
    assert state.slow[2] == 3


def test_after_a_drain_none_follows_within_the_cool_off_which_doubles():
    heard, state = run([SLOW] * 200, every=1.0)
    drains = [i for i, verdicts in enumerate(heard) if "drain" in verdicts.values()]
    assert drains == [5, 105]
    assert state.not_before == 105 + 200


def test_a_single_rank_is_never_slow():
    assert not any(run([{0: 1e9}] * 50)[0])


times = st.floats(0.01, 1e4)


@given(st.lists(st.dictionaries(st.integers(0, 5), times, min_size=1), max_size=40), st.floats(0.01, 100))
def test_verdicts_do_not_depend_on_the_unit_of_time(blocks, unit):
    scaled = [{rank: ms * 2.0 ** round(unit) for rank, ms in block.items()} for block in blocks]
    assert run(blocks)[0] == run(scaled)[0]


@given(st.lists(st.dictionaries(st.integers(0, 5), times, min_size=1), max_size=60))
def test_nobody_is_drained_who_was_not_slow_for_twice_the_patience_and_one_at_a_time(blocks):
    heard, _ = run(blocks)
    for at, verdicts in enumerate(heard):
        drained = [rank for rank, verdict in verdicts.items() if verdict == "drain"]
        assert len(drained) <= 1
        for rank in drained:
            slow = sum(slowness(block).get(rank, 0) > SETTINGS.factor for block in blocks[: at + 1])
            assert slow >= 2 * SETTINGS.patience


@given(st.integers(2, 8), times, st.integers(1, 100))
def test_ranks_of_equal_pace_are_left_alone(ranks, own, blocks):
    assert not any(run([dict.fromkeys(range(ranks), own)] * blocks)[0])


def test_a_rank_that_left_is_forgotten():
    heard, state = run([SLOW] * 3 + [{0: 10.0, 1: 11.0}])
    assert set(state.slow) == {0, 1}
    assert dataclasses.replace(state, slow={}).drains == 0
    assert heard[-1] == {}
