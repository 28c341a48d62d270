"""The figures that `benchmarks.front_kills` makes of streams as its clients saw them."""

from benchmarks.front_kills import Seen, longest_gap, pauses, summary

TEXT = "abcdefghij"
STEADY = [float(n) for n in range(10)]


def test_a_gap_counts_if_the_stream_was_open_and_the_gap_touches_the_span() -> None:
    times = [0.0, 1.0, 4.0, 5.0, 11.0]
    assert longest_gap(times, 1.5, 3.0) == 3.0
    assert longest_gap(times, 1.5, 6.0) == 6.0
    assert longest_gap(times, 4.0, 4.5) == 1.0
    assert longest_gap(times, 11.0, 12.0) is None
    assert longest_gap(times, -1.0, 12.0) is None
    assert longest_gap([], 0.0, 1.0) is None


def test_each_open_stream_has_a_pause_for_each_kill() -> None:
    streams = [Seen("p", TEXT, STEADY, None), Seen("p", TEXT, [2.5, 4.5], None)]
    assert pauses(streams, [3.2, 8.5], 1.0) == [1.0, 1.0, 2.0]


def test_what_is_broken_lost_doubled_or_changed_is_counted() -> None:
    streams = [
        Seen("p", TEXT, STEADY, None),
        Seen("p", TEXT[:4], STEADY[:4], "APIError: gone"),
        Seen("p", TEXT[:5] + TEXT[4:], STEADY, None),
        Seen("p", TEXT[:4] + TEXT[6:], STEADY, None),
        Seen("p", TEXT[:8] + "XY", STEADY, None),
    ]
    found = summary(streams, {"p": TEXT}, [3.5], [7.5])
    assert (found["streams"], found["broken"], found["differing"]) == (5, 1, 3)
    assert found["lost_doubled_changed"] == [2, 1, 2]
    assert found["errors"] == ["APIError: gone"]
    assert (found["open_at_a_kill"], found["pause_worst_s"]) == (4, 1.0)
