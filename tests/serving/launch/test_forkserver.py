"""Forked processes are children of who asked, and start also when the fork server is gone, stuck or not ready."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.launch.forkserver import AdoptedProcess, Forkserver, Order
from serving.launch.rank_process import LaunchSpec
from tests.support import forked_program
from tests.support.processes import has_ended
from tests.support.streams import wait_until

WAIT_S = 60.0
OWNER = """
import pathlib, sys, time
from serving.launch.forkserver import Forkserver, Order
from tests.support.forked_program import __name__ as program
forkserver = Forkserver(program)
process = forkserver.fork(Order(variables={}, log=sys.argv[1]), wait_s=60.0)
print(process.pid, forkserver._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def forkserver() -> Iterator[Forkserver]:
    server = Forkserver(forked_program.__name__)
    yield server
    server.end()


def forked(server: Forkserver, log: Path, **variables: str) -> AdoptedProcess:
    process = server.fork(Order(variables=variables, log=str(log)), wait_s=WAIT_S)
    assert process is not None
    return process


@pytest.mark.parametrize("code", [0, 3])
def test_a_forked_process_is_a_child_with_its_own_variables_output_and_exit_code(forkserver, tmp_path, code):
    log = tmp_path / "log"
    log.write_text("what was there before is gone, and " * 10)
    process = forked(forkserver, log, CODE=str(code))
    assert process.wait() == process.poll() == code
    assert log.read_text().splitlines() == [f"{os.getpid()} 1 1", "an error"]
    assert "CODE" not in os.environ


def test_a_process_that_is_killed_says_so_and_is_no_zombie(forkserver, tmp_path):
    process = forked(forkserver, tmp_path / "log")
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()
    process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_was_forked_outlives_the_fork_server_and_the_next_start_needs_none(forkserver, tmp_path, how):
    process = forked(forkserver, tmp_path / "log")
    assert forkserver._process is not None
    before = forkserver._process.pid
    os.kill(before, how)
    spec = LaunchSpec.of(1, "", tmp_path, 1, variables={"CODE": "4"})
    assert spec.start(forkserver).wait() == 4, "by its own imports"
    assert process.poll() is None
    process.kill()
    process.wait()
    assert forked(forkserver, tmp_path / "log", CODE="5").wait() == 5
    assert forkserver._process.pid != before


def test_a_process_starts_before_the_fork_server_is_ready(forkserver, tmp_path):
    spec = LaunchSpec.of(1, "", tmp_path, 1, variables={"CODE": "4"})
    assert spec.start(forkserver).wait() == 4


def test_the_fork_server_and_what_it_forked_end_with_their_owner(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path / "log"], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert not any(map(has_ended, pids))
    (tmp_path / "log").touch()
    wait_until(lambda: (tmp_path / "log").read_text() != "", "it runs")
    owner.kill()
    owner.wait()
    wait_until(lambda: all(map(has_ended, pids)), "both have ended")
    owner.stdout.close()
