"""The arithmetic of the benchmarks, on traces written by hand."""

import dataclasses
import signal
from typing import Any

import pytest

from benchmarks.losses import LossRecord, Moments, compiles_between, kill_order, rejoin_pause_ms, stalls_of
from benchmarks.recovery import summarize
from benchmarks.stalls import Spread, added_stall_ms, goodput_loss, longest_gap_ms, median_gap_ms
from benchmarks.streams import Ask, Known, Trace, running, whole
from benchmarks.throughput import concurrencies, outside_share, padding_share, percentile
from benchmarks.throughput import summarize as summarize_run
from tests.support.fake_backend import FakeBackend

ASK = Ask("To be", 0.0, 0, 8)
TIMES = [0.00, 0.01, 0.02, 0.03, 0.04, 0.12, 0.13, 0.14]
"""A token each 10 ms, but 80 ms between the fifth and the sixth."""
AT = Moments(quiet=0.0, kill=0.045, lost=0.05, recovered=0.11, rejoining=0.115, rejoined=0.125)


def trace(times: list[float], rank: int | None = 0, **fields: Any) -> Trace:
    """A stream of ASK with a token at each of `times`."""
    tokens = list(range(len(times)))
    return dataclasses.replace(Trace(ASK, 0.0, rank, times=times, tokens=tokens), **fields)


def test_an_added_stall_is_the_gap_around_the_failure_less_the_median_gap() -> None:
    assert added_stall_ms(TIMES, 0.045, 0.11) == pytest.approx(70)


def test_a_token_on_its_way_when_the_rank_dies_does_not_hide_the_stall() -> None:
    assert added_stall_ms(TIMES, 0.039, 0.11) == pytest.approx(70)


def test_a_long_gap_that_begins_after_the_recovery_is_not_of_the_failure() -> None:
    assert added_stall_ms([*TIMES, 9.0], 0.045, 0.11) == pytest.approx(70)


def test_a_failure_that_no_stream_notices_adds_nothing() -> None:
    assert added_stall_ms([0.01 * i for i in range(10)], 0.045, 0.055) == pytest.approx(0)


def test_gaps_before_the_steady_time_do_not_count_for_the_median() -> None:
    placing = [-3.0, -2.0, -1.0, *TIMES]
    assert median_gap_ms(placing, 0.0, 0.045) == pytest.approx(10)
    assert added_stall_ms(placing, 0.045, 0.11, since=0.0) == pytest.approx(70)


@pytest.mark.parametrize("times", [[], [0.01], [0.0, 0.01, 0.02], [0.05, 0.06, 0.07]])
def test_a_stream_without_tokens_before_or_after_has_no_stall(times: list[float]) -> None:
    assert added_stall_ms(times, 0.045, 0.11) is None


def test_the_gap_that_begins_at_the_last_moment_counts() -> None:
    assert longest_gap_ms([0.0, 1.0, 5.0], 0.5, 1.0) == pytest.approx(4000)


def test_stalls_are_separated_by_the_rank_of_the_stream() -> None:
    moved, unknown = trace(TIMES, rank=1), trace(TIMES, rank=None)
    stalls = stalls_of([trace(TIMES), moved, unknown, trace([], rank=0)], 1, AT)
    assert stalls == {"survivors": [70.0], "moved": [70.0]}


def test_the_rejoin_pause_is_the_worst_of_any_stream_less_the_usual_gap() -> None:
    steady = [0.110, 0.112, 0.114, 0.150, 0.152]
    assert rejoin_pause_ms([trace(steady), trace([0.111, 0.113, 0.190])], AT) == pytest.approx(75)
    assert rejoin_pause_ms([trace(steady)], AT) == pytest.approx(34)


def test_a_stream_that_still_waits_for_its_recovery_is_not_held_up_by_the_rejoin() -> None:
    steady = [0.110, 0.112, 0.114, 0.150, 0.152]
    assert rejoin_pause_ms([trace(steady), trace([0.01, 0.02, 0.40])], AT) == pytest.approx(34)
    assert rejoin_pause_ms([trace([])], AT) is None


def test_a_spread_is_median_and_worst_and_nothing_of_nothing() -> None:
    assert Spread.of([1, 2, 9]) == Spread(2, 9)
    assert Spread.of([]) == Spread(None, None)


@pytest.mark.parametrize(("kills", "ranks"), [(1, 4), (3, 4), (4, 4), (8, 4), (9, 3), (20, 5)])
def test_every_victim_has_its_turn_and_every_fourth_hangs(kills: int, ranks: int) -> None:
    order = kill_order(kills, ranks)
    assert len(order) == kills
    assert len({rank for rank, _ in order[:ranks]}) == min(kills, ranks)
    assert sum(how is signal.SIGSTOP for _, how in order) == max(1, kills // 4)


def test_not_always_the_same_rank_hangs() -> None:
    assert len({rank for rank, how in kill_order(16, 4) if how is signal.SIGSTOP}) == 4


def test_changed_tokens_are_found_and_a_failed_stream_is_judged_by_what_it_has() -> None:
    known = Known([trace(TIMES)])
    cut = trace(TIMES[:3], error="NoCapacity: gone")
    short, other = trace(TIMES[:3]), trace(TIMES, tokens=[0, 1, 2, 3, 4, 9, 6, 7])
    assert known.changed([trace(TIMES), cut]) == 0
    assert known.changed([short, other]) == 2
    assert known.failed([trace(TIMES), cut, short]) == 1


def test_compiles_are_counted_on_ranks_that_lived_through_it() -> None:
    before = FakeBackend().status()
    same, anew = (dataclasses.replace(before.ranks[0], compiles=n, pid=p) for n, p in ((5, 1000), (50, 2000)))
    assert compiles_between(before, dataclasses.replace(before, ranks=(same, *before.ranks[1:]))) == 3
    assert compiles_between(before, dataclasses.replace(before, ranks=(anew, *before.ranks[1:]))) == 0


def test_a_server_is_whole_when_all_ranks_serve_and_each_loss_is_prepared() -> None:
    backend = FakeBackend()
    assert whole(backend.status())
    assert not whole(dataclasses.replace(backend.status(), lattice={"1 rank": 0.75}))
    assert running(backend.status()) == {0: 0, 1: 0, 2: 0, 3: 0}
    backend.dead.add(2)
    assert not whole(backend.status())
    assert running(backend.status()) == {0: 0, 1: 0, 3: 0}


def record(how: str, survivors: list[float], moved: list[float]) -> LossRecord:
    """A loss with these stalls."""
    return LossRecord(
        victim=0,
        signal=how,
        detect_ms=5.0,
        adopt_ms=30.0,
        phases={},
        survivor_stall_ms=Spread.of(survivors),
        moved_stall_ms=Spread.of(moved),
        stalls={"survivors": survivors, "moved": moved},
        rejoin_pause_ms=None,
        rejoin_ms=100.0,
        whole_after_s=3.0,
        context_tokens=256,
        gap_ms=10.0,
        compiles_between=0,
        tokens_restored=500,
        tokens_recomputed=2,
        preemptions=0,
        requests=8,
        failed=0,
        tokens_changed=0,
    )


def test_the_summary_keeps_kills_and_hangs_apart_and_takes_medians_over_streams() -> None:
    records = [record("SIGKILL", [40, 60, 50], [100]), record("SIGSTOP", [500], [700, 900])]
    summary = summarize(records, warm_restart_s=5.5, cold_start_s=None)
    assert summary["survivor_stall_ms"] == {"median": 50, "max": 60}
    assert summary["moved_stall_ms"] == {"median": 100, "max": 100}
    assert summary["hang_stall_ms"] == {"median": 700, "max": 900}
    assert summary["ratio"] == 100.0  # 5.5 s over the median of 40, 50, 60 and 100 ms
    assert summary["requests"] == 16
    assert summary["cold_start_s"] is None
    assert summary["rejoin_pause_ms"] is None


def test_throughput_counts_output_tokens_from_the_first_request_to_the_last_token() -> None:
    run = summarize_run([trace([1.0, 1.5, 2.0]), trace([2.0, 2.5, 4.0])], 2)
    assert run["output_tokens_per_s"] == 1.5
    assert run["ttft_ms"] == 1500
    assert run["itl_ms"] == 500


def test_throughput_of_failed_requests_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="QueueFull"):
        summarize_run([trace([], error="QueueFull: 9 wait")], 2)


def test_the_share_outside_the_program_is_of_the_steps_in_between() -> None:
    before = FakeBackend().status()
    after = dataclasses.replace(before, step_ms=before.step_ms + 200, program_ms=before.program_ms + 150)
    assert outside_share(before, after) == 0.25
    assert outside_share(before, before) is None


def test_the_share_of_padding_is_of_the_rows_in_between() -> None:
    before = FakeBackend().status()
    after = dataclasses.replace(before, rows=before.rows + 80, rows_filled=before.rows_filled + 20)
    assert padding_share(before, after) == 0.75
    assert padding_share(before, before) is None


def test_percentiles_and_lists_of_streams() -> None:
    assert percentile([3.0, 1.0, 2.0], 95) == 3.0
    assert percentile(list(range(1, 101)), 95) == 95
    assert concurrencies("1,8,32") == (1, 8, 32)


def test_goodput_is_back_when_tokens_come_as_before_for_a_window() -> None:
    before, after = [0.1 * i for i in range(30)], [5.0 + 0.1 * i for i in range(40)]
    slow = [3.5, 4.2]
    assert goodput_loss([*after, *before, *slow], 3.0, since=0.0) == pytest.approx((2.0, 18.0))
    assert goodput_loss([*before, *slow], 3.0, since=0.0) is None
    assert goodput_loss(after, 3.0, since=0.0) is None
    assert goodput_loss([*before, *(3.0 + 0.1 * i for i in range(40))], 3.0, since=0.0) == pytest.approx((0.0, 0.0))
