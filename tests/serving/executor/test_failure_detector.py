import dataclasses
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.executor.failure_detector import (
    CRASHES,
    Cause,
    Delay,
    FailureDetectorSettings,
    Observation,
    all_late,
    failed_of_itself,
    late_or_dead,
    p99,
)

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SETTINGS = FailureDetectorSettings(heartbeat_floor_s=0.35, step_floor_s=2.0)
NOW = 100.0


def seen(rank: int = 0, *, gap: float = 0.05, **fields) -> Observation:
    """A rank whose last heartbeat was `gap` seconds ago."""
    return Observation(rank=rank, last_heartbeat=NOW - gap, **fields)


def judge(*observations: Observation, **fields) -> dict[int, str]:
    return {rank: cause.kind for rank, cause in late_or_dead(observations, NOW, SETTINGS, **fields).items()}


def test_a_healthy_rank_is_not_suspected():
    assert judge(seen(0), seen(1, step_sent_at=NOW - 1), seen(2, process_state="S")) == {}


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"process_state": "Z"}, "exited: process ended"),
        ({"process_state": "X"}, "exited: process ended"),
        ({"stream_error": "connection reset"}, "stream: connection reset"),
    ],
)
def test_what_is_certain_needs_no_waiting(fields, cause):
    found = late_or_dead([seen(0), seen(1, **fields)], NOW, SETTINGS)
    assert {rank: str(why) for rank, why in found.items()} == {1: cause}


def test_the_surest_cause_is_the_one_named():
    gone = seen(1, gap=9, process_state="Z", stream_error="y", step_sent_at=1.0)
    assert judge(seen(0), gone) == {1: "exited"}


def test_what_is_certain_counts_though_all_ranks_have_it():
    assert judge(seen(0, process_state="Z"), seen(1, process_state="Z")) == {0: "exited", 1: "exited"}


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
    survivors = [seen(rank, gap=1.0, step_sent_at=NOW - 3) for rank in (0, 2)]
    assert judge(survivors[0], seen(1, process_state="Z"), survivors[1]) == {1: "exited"}


def test_a_stall_of_the_front_is_no_ranks_fault():
    assert judge(seen(0), seen(1, gap=1.0), front_lag_s=0.8) == {}
    assert judge(seen(0), seen(1, gap=1.0), front_lag_s=0.2) == {1: "heartbeat"}
    assert judge(seen(0, step_sent_at=NOW), seen(1, step_sent_at=NOW - 3), front_lag_s=1.5) == {}
    assert judge(seen(0), seen(1, gap=0.2, process_state="T"), front_lag_s=0.15) == {}


def test_a_rank_alone_past_its_step_is_suspected():
    assert judge(seen(0), seen(1, step_sent_at=NOW - 1.9)) == {}
    assert judge(seen(0), seen(1, step_sent_at=NOW - 2.1)) == {1: "step"}


def test_a_model_with_slow_steps_is_given_longer():
    slow = (0.5,) * 50
    assert judge(seen(0), seen(1, step_sent_at=NOW - 4.9, step_times=slow)) == {}
    assert judge(seen(0), seen(1, step_sent_at=NOW - 5.1, step_times=slow)) == {1: "step"}


def test_ranks_that_wait_for_each_other_in_a_step_are_stuck_and_none_is_named():
    waiting = [seen(rank, step_sent_at=NOW - 3) for rank in range(3)]
    assert judge(*waiting) == {}
    assert all_late(waiting, NOW, SETTINGS)
    assert not all_late(waiting, NOW, SETTINGS, front_lag_s=1.5)
    assert not all_late([*waiting, seen(3)], NOW, SETTINGS)
    assert not all_late([], NOW, SETTINGS)


def test_a_rank_alone_past_the_limit_of_a_command_is_named():
    limit = SETTINGS.command_limit_s
    assert judge(seen(0), seen(1, command_since=NOW - limit + 0.1)) == {}
    assert judge(seen(0), seen(1, command_since=NOW - limit - 0.1)) == {1: "command"}
    assert judge(seen(1, command_since=NOW - limit - 0.1)) == {1: "command"}


def test_ranks_that_are_all_late_with_a_command_wait_for_the_same_thing_and_none_is_named():
    assert judge(*(seen(rank, command_since=NOW - 10 * SETTINGS.command_limit_s) for rank in range(3))) == {}


def test_a_rank_that_joins_is_no_sign_that_those_of_the_plan_are_late_alone():
    joins = seen(3, in_plan=False)
    steps = [seen(rank, step_sent_at=NOW - 3) for rank in range(3)]
    assert judge(*steps, joins) == {}
    assert all_late([*steps, joins], NOW, SETTINGS)
    commands = [seen(rank, command_since=NOW - 2 * SETTINGS.command_limit_s) for rank in range(3)]
    assert judge(*commands, joins) == {}
    assert judge(*commands, seen(3)) == dict.fromkeys(range(3), "command")
    assert judge(seen(0), seen(3, in_plan=False, command_since=NOW - 2 * SETTINGS.command_limit_s)) == {3: "command"}


def test_a_stopped_rank_is_named_and_not_the_ones_that_wait_for_it_in_the_step():
    ranks = [seen(rank, step_sent_at=NOW - 3) for rank in range(3)]
    ranks[1] = dataclasses.replace(ranks[1], last_heartbeat=NOW - 3)
    assert judge(*ranks) == {1: "heartbeat"}


@UNHURRIED
@given(gap=st.floats(0, 3), process_s=st.floats(0, 3), front_s=st.floats(0, 3), usual=st.floats(0, 0.5))
def test_a_rank_is_given_as_much_longer_as_it_waited_for_a_processor_up_to_twice_its_limit(
    gap, process_s, front_s, usual
):
    limit = max(SETTINGS.heartbeat_floor_s, 3 * usual)
    late = seen(1, gap=gap, heartbeat_gaps=(usual,) * 9, heartbeat_delay=Delay(process_s, front_s))
    wanted = NOW - late.last_heartbeat > limit + min(process_s, limit) + min(front_s, limit)
    assert judge(seen(0), late) == ({1: "heartbeat"} if wanted else {})


def test_the_cause_of_a_fence_has_the_time_the_limit_and_the_evidence():
    late = seen(1, gap=0.75, process_state="R", heartbeat_delay=Delay(0.3, 0.0625))
    found = late_or_dead([seen(0), late], NOW, SETTINGS)
    assert str(found[1]) == (
        "heartbeat: no heartbeat for 0.750 s (limit 0.712 s, process state R, its process waited 0.300 s for a "
        "processor, the front 0.062 s)"
    )
    late = seen(1, step_sent_at=NOW - 3)
    assert (
        str(late_or_dead([seen(0), late], NOW, SETTINGS)[1]) == "step: a step was not done for 3.000 s (limit 2.000 s)"
    )


def test_a_stopped_process_is_given_no_longer_however_long_it_waited_for_a_processor():
    late = seen(1, gap=0.2, process_state="T", heartbeat_delay=Delay(9.0), step_delay=Delay(9.0))
    assert judge(seen(0), late) == {1: "stopped"}


def test_ranks_that_are_all_late_are_excused_together_also_those_that_did_not_wait_for_a_processor():
    ranks = [seen(rank, gap=1.0, heartbeat_delay=Delay(0.5 * rank)) for rank in range(3)]
    assert judge(*ranks) == {}


def test_a_starved_rank_holds_up_all_ranks_of_its_step():
    waiting = [seen(rank, step_sent_at=NOW - 3) for rank in range(3)]
    waiting[1] = dataclasses.replace(waiting[1], step_delay=Delay(1.5))
    assert judge(*waiting) == {}
    assert not all_late(waiting, NOW, SETTINGS)
    assert all_late(waiting, NOW + 1, SETTINGS)
    late = [dataclasses.replace(o, step_sent_at=NOW - 4.1) for o in waiting]
    assert all_late(late, NOW, SETTINGS), "twice the limit is the most"


def test_ranks_of_one_step_have_the_limit_of_the_one_with_the_longest():
    usual = (0.3,) * 50, (0.31,) * 50
    ranks = [seen(rank, step_sent_at=NOW - 3.05, step_times=usual[rank]) for rank in range(2)]
    assert judge(*ranks) == {}
    assert not all_late(ranks, NOW, SETTINGS)
    assert all_late(ranks, NOW + 0.06, SETTINGS)


@UNHURRIED
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_p99_is_a_value_that_all_but_one_in_a_hundred_do_not_exceed(values):
    assert p99(values) in values
    assert sum(value > p99(values) for value in values) <= len(values) / 100


def test_p99_of_nothing_is_nothing():
    assert p99(()) == 0.0


OWN = [
    (Cause("raised", "IndexError: x"), None),
    (Cause("exited", "process ended with code 1"), 1),
    *((Cause(kind, "x"), -number) for kind in ("exited", "stream", "heartbeat", "step") for number in CRASHES),
]
OUTSIDE = [
    *((Cause(kind, "x"), -signal.SIGKILL) for kind in ("exited", "stream", "stopped", "heartbeat", "step", "error")),
    (Cause("exited", "process ended with code 0"), 0),
    (Cause("exited", "process ended"), None),
    (Cause("drained", "scale_down"), -signal.SIGSEGV),
    (Cause("error", "device error 5"), 1),
]


@pytest.mark.parametrize(
    ("cause", "code", "own"), [(*case, True) for case in OWN] + [(*case, False) for case in OUTSIDE]
)
def test_a_rank_failed_of_itself_by_an_exception_or_a_crash_and_not_by_what_others_did(cause, code, own):
    assert failed_of_itself(cause, code) == own
