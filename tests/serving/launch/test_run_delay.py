"""The run delay of real processes: it grows only while more of them are ready to run than there are processors."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from serving.launch.run_delay import run_delay_s

PROGRAM = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
while sys.argv[2] == "busy":
    pass
time.sleep(600)
"""


@pytest.fixture
def processes() -> Iterator[dict[str, int]]:
    """Two processes that are busy and one that sleeps, all on one processor."""
    processor = str(min(os.sched_getaffinity(0)))
    started = [
        subprocess.Popen([sys.executable, "-S", "-c", PROGRAM, processor, how]) for how in ("busy", "busy", "idle")
    ]
    yield dict(zip(("first", "second", "idle"), (each.pid for each in started), strict=True))
    for each in started:
        each.kill()
        each.wait()


def test_the_run_delay_of_busy_processes_on_one_processor_grows_and_that_of_an_idle_one_does_not(processes) -> None:
    before = {name: run_delay_s(pid) for name, pid in processes.items()}
    if None in before.values():
        pytest.skip("this kernel does not count run delay")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        grown = {name: (run_delay_s(pid) or 0.0) - (before[name] or 0.0) for name, pid in processes.items()}
        if grown["first"] > 0.5 and grown["second"] > 0.5:
            break
        time.sleep(0.05)
    assert min(grown["first"], grown["second"]) > 0.5
    assert grown["idle"] < min(grown["first"], grown["second"])


def test_of_a_process_that_has_ended_nobody_knows_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert run_delay_s(process.pid) is None
