"""The figures of streams under faults, and the targets' processes."""

import subprocess
import sys

import msgspec
import pytest

from benchmarks.chaos.__main__ import parse
from benchmarks.chaos.processes import descendants, matching
from benchmarks.chaos.result import Result, fault, longest_wait, totals
from benchmarks.chaos.streams import Stream


def stream(client, times, *, prompt="p", text="", error=None):
    """A stream with pieces of text at these seconds."""
    begun, ended = (times[0] - 0.5, times[-1]) if times else (0.0, 0.0)
    return Stream(client, prompt, begun, text, list(times), len(times), "length", error, ended)


def steady(client, begin, end, *, without=(), **more):
    """Ten pieces a second, but for those within an interval."""
    times = [begin + i / 10 for i in range(int((end - begin) * 10))]
    return stream(client, [t for t in times if not (without and without[0] < t < without[1])], **more)


def test_the_wait_of_a_client_goes_on_from_a_broken_stream_to_its_next():
    broken = steady(0, 0.0, 5.0, error="gone")
    after = steady(0, 8.0, 12.0)
    other = steady(1, 0.0, 12.0, without=(5.0, 6.0))
    assert longest_wait([broken, after, other], 4.95, 11.0) == pytest.approx(8.0 - 4.9)
    assert longest_wait([other], 5.0, 11.0) == pytest.approx(1.0)


def test_a_client_that_receives_nothing_more_waits_for_ever():
    assert longest_wait([steady(0, 0.0, 5.0, error="gone"), steady(1, 0.0, 12.0)], 4.95, 11.0) is None


def test_a_fault_counts_the_streams_that_were_open_and_those_that_broke():
    streams = [
        steady(0, 0.0, 1.0, error="gone"),  # ended before
        steady(1, 0.0, 2.0),
        steady(0, 3.0, 6.25, error="gone"),
        steady(1, 3.0, 30.0, without=(6.05, 8.0)),
        steady(0, 8.0, 30.0),  # sent after it
    ]
    found = fault(
        streams,
        selector="rank",
        signal="SIGKILL",
        moment=5.95,
        began=0.0,
        usual_since=4.0,
        end=20.0,
        restarts=1,
        tokens_a_piece=2.0,
    )
    assert (found.open_streams, found.streams_lost, found.restarts) == (2, 1, 1)
    assert found.longest_wait_s == pytest.approx(2.1, abs=0.11)
    assert found.back_s is not None
    assert 2.0 < found.back_s < 3.0
    assert found.tokens_not_sent == pytest.approx(2.0 * 20 * 2.1, rel=0.2)


def test_totals_tell_lost_streams_from_refused_requests_and_from_changed_ones():
    wanted = {"p": "one two three four"}
    found = totals(
        [
            stream(0, [1.0], text="one two three four"),
            stream(0, [2.0], text="one two", error="gone"),
            stream(0, [], text="", error="refused"),
            stream(1, [3.0], text="one two two three four"),
            stream(1, [4.0], text="one two three five"),
        ],
        wanted,
        0.25,
        by_itself=0,
        restarts=0,
    )
    assert (found.streams, found.streams_lost, found.requests_refused, found.streams_changed) == (5, 1, 1, 2)
    assert found.tokens_lost == pytest.approx(0.25 * len(" three four"), abs=0.1)
    assert found.tokens_doubled == pytest.approx(0.25 * len("two "), abs=0.1)
    assert found.tokens_changed > 0


def test_the_schema_names_every_field_of_a_result():
    schema = msgspec.json.schema(Result)["$defs"]
    assert set(schema["Result"]["properties"]) == set(Result.__struct_fields__)
    assert {"Fault", "Totals"} <= set(schema)


def test_descendants_are_found_through_a_parent_in_between():
    shell = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c 'import time; print(1, flush=True); time.sleep(60)' chaos-leaf & wait"],
        stdout=subprocess.PIPE,
    )
    try:
        assert shell.stdout is not None
        shell.stdout.readline()
        (leaf,) = descendants(shell.pid)
        assert leaf in matching("chaos-leaf")
    finally:
        for pid in [*descendants(shell.pid), shell.pid]:
            subprocess.run(["kill", "-9", str(pid)], check=True)
        shell.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fault", "rank"], "not SELECTOR:SIGNAL"),
        (["--fault", "rank:SIGWHAT"], "not SELECTOR:SIGNAL"),
        (["--target", "http://127.0.0.1:1"], "give --fault"),
    ],
)
def test_a_command_line_that_cannot_be_says_the_way_out(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_flags_after_two_dashes_are_the_servers():
    options = parse(["--clients", "2", "--", "--model", "tiny"])
    assert (options.clients, options.server, options.fault) == (
        2,
        ["--model", "tiny"],
        ["rank:SIGKILL", "rank:SIGSTOP"],
    )
