import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.health import HealthSettings, Observation, p99, stuck, suspects

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SETTINGS = HealthSettings(heartbeat_floor_s=0.35, step_floor_s=2.0)
NOW = 100.0


def seen(rank: int = 0, *, gap: float = 0.05, **fields) -> Observation:
    """A rank whose last heartbeat was `gap` seconds ago."""
    return Observation(rank=rank, last_heartbeat=NOW - gap, **fields)


def judge(*observations: Observation, **fields) -> dict[int, str]:
    return {rank: cause.kind for rank, cause in suspects(observations, NOW, SETTINGS, **fields).items()}


def test_a_healthy_rank_is_not_suspected():
    assert judge(seen(0), seen(1, step_sent=NOW - 1), seen(2, process_state="S")) == {}


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"exit_code": -9}, "exited: process ended with signal 9"),
        ({"exit_code": 0}, "exited: process ended with code 0"),
        ({"process_state": "Z"}, "exited: process ended"),
        ({"stream_error": "connection reset"}, "stream: connection reset"),
        ({"error": "out of memory"}, "error: out of memory"),
    ],
)
def test_what_is_certain_needs_no_waiting(fields, cause):
    found = suspects([seen(0), seen(1, **fields)], NOW, SETTINGS)
    assert {rank: str(why) for rank, why in found.items()} == {1: cause}


def test_the_surest_cause_is_the_one_named():
    gone = seen(1, gap=9, process_state="T", exit_code=-9, error="x", stream_error="y", step_sent=1.0)
    assert judge(seen(0), gone) == {1: "exited"}


def test_what_is_certain_counts_though_all_ranks_have_it():
    assert judge(seen(0, exit_code=-9), seen(1, exit_code=-9)) == {0: "exited", 1: "exited"}


def test_a_late_heartbeat_is_suspected_only_past_the_floor():
    assert judge(seen(0), seen(1, gap=0.34)) == {}
    assert judge(seen(0), seen(1, gap=0.36)) == {1: "heartbeat"}


def test_a_rank_that_is_often_late_is_given_longer():
    often = (0.05,) * 90 + (0.3,) * 10
    assert judge(seen(0), seen(1, gap=0.8, heartbeat_gaps=often)) == {}
    assert judge(seen(0), seen(1, gap=1.0, heartbeat_gaps=often)) == {1: "heartbeat"}


def test_one_long_gap_in_a_hundred_does_not_make_a_rank_trusted_for_longer():
    assert judge(seen(0), seen(1, gap=0.5, heartbeat_gaps=(0.05,) * 99 + (0.9,))) == {1: "heartbeat"}


def test_a_stopped_process_is_suspected_after_a_short_grace():
    assert judge(seen(0), seen(1, gap=0.09, process_state="T")) == {}
    assert judge(seen(0), seen(1, gap=0.2, process_state="T")) == {1: "stopped"}


def test_a_process_under_a_debugger_is_not_a_stopped_one():
    assert judge(seen(0), seen(1, gap=0.2, process_state="t")) == {}


def test_stopped_processes_are_suspected_though_all_of_them_are():
    assert judge(*(seen(rank, gap=0.2, process_state="T") for rank in range(3))) == dict.fromkeys(range(3), "stopped")


def test_ranks_that_are_all_late_together_are_excused():
    assert judge(*(seen(rank, gap=1.0) for rank in range(4))) == {}


def test_the_excuse_of_being_late_together_ends():
    assert judge(*(seen(rank, gap=6.0) for rank in range(2))) == {0: "heartbeat", 1: "heartbeat"}


def test_survivors_late_together_are_excused_while_a_dead_rank_is_named():
    survivors = [seen(rank, gap=1.0, step_sent=NOW - 3) for rank in (0, 2)]
    assert judge(survivors[0], seen(1, exit_code=-9), survivors[1]) == {1: "exited"}


def test_a_stall_of_the_front_is_no_ranks_fault():
    assert judge(seen(0), seen(1, gap=1.0), front_lag_s=0.8) == {}
    assert judge(seen(0), seen(1, gap=1.0), front_lag_s=0.2) == {1: "heartbeat"}
    assert judge(seen(0, step_sent=NOW), seen(1, step_sent=NOW - 3), front_lag_s=1.5) == {}
    assert judge(seen(0), seen(1, gap=0.2, process_state="T"), front_lag_s=0.15) == {}


def test_a_rank_alone_past_its_step_is_suspected():
    assert judge(seen(0), seen(1, step_sent=NOW - 1.9)) == {}
    assert judge(seen(0), seen(1, step_sent=NOW - 2.1)) == {1: "step"}


def test_a_model_with_slow_steps_is_given_longer():
    slow = (0.5,) * 50
    assert judge(seen(0), seen(1, step_sent=NOW - 4.9, step_times=slow)) == {}
    assert judge(seen(0), seen(1, step_sent=NOW - 5.1, step_times=slow)) == {1: "step"}


def test_ranks_that_wait_for_each_other_in_a_step_are_stuck_and_none_is_named():
    waiting = [seen(rank, step_sent=NOW - 3) for rank in range(3)]
    assert judge(*waiting) == {}
    assert stuck(waiting, NOW, SETTINGS)
    assert not stuck(waiting, NOW, SETTINGS, front_lag_s=1.5)
    assert not stuck([*waiting, seen(3)], NOW, SETTINGS)
    assert not stuck([], NOW, SETTINGS)


def test_a_stopped_rank_is_named_and_not_the_ones_that_wait_for_it_in_the_step():
    ranks = [seen(rank, step_sent=NOW - 3) for rank in range(3)]
    ranks[1] = dataclasses.replace(ranks[1], last_heartbeat=NOW - 3)
    assert judge(*ranks) == {1: "heartbeat"}


@UNHURRIED
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_p99_is_a_value_that_all_but_one_in_a_hundred_do_not_exceed(values):
    assert p99(values) in values
    assert sum(value > p99(values) for value in values) <= len(values) / 100


def test_p99_of_nothing_is_nothing():
    assert p99(()) == 0.0
