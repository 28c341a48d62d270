"""Forked processes are children of who asked, and start also when the fork server is gone, stuck or not ready."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.launch.child import AdoptedProcess
from serving.launch.edge_processes import EDGE_PROGRAM
from serving.launch.forkserver import Forkserver, Order
from serving.launch.process import adopting
from serving.launch.rank_process import LaunchSpec
from serving.launch.standby import FRONT_PROGRAM
from tests.support import forked_program
from tests.support.processes import command_line, has_ended
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


@pytest.mark.parametrize("wait_s", [0.0, WAIT_S])
def test_input_descriptors_arguments_and_name_are_those_of_a_process_with_imports_of_its_own(
    forkserver, tmp_path, wait_s, monkeypatch
):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    reading, writing = os.pipe()
    os.write(writing, b"passed")
    log = tmp_path / "log"
    log.touch()
    order = Order(variables={"ECHO": "1"}, log=str(tmp_path / "log"), passed=(reading,))
    process, pipe = forkserver.start_with_input(order, wait_s=wait_s)
    assert isinstance(process, AdoptedProcess) == (wait_s > 0)
    wait_until(lambda: "an error" in log.read_text(), "it runs")
    *command, descriptor = command_line(process.pid)
    assert command == [sys.executable, "-m", forked_program.__name__]
    assert descriptor.isdigit()
    with pipe:
        pipe.write(b"said\n")
    wait_until(lambda: "said" in log.read_text(), "it has its input")
    said = [line for line in log.read_text().splitlines() if line != "an error"]
    assert said == [f"{os.getpid()} 1 2", "said passed None"]
    process.kill()
    process.wait()
    for each in (reading, writing):
        os.close(each)


def test_what_fronts_and_edges_import_starts_no_thread(tmp_path):
    programs = (FRONT_PROGRAM, EDGE_PROGRAM, forked_program.__name__)
    server, log = Forkserver(*programs), tmp_path / "log"
    order = Order(module=forked_program.__name__, variables={"CODE": "7"}, log=str(log))
    try:
        process = server.fork(order, wait_s=WAIT_S)
        assert process is not None
        assert process.wait() == 7
    finally:
        server.end()
    assert log.read_text().splitlines()[0] == f"{os.getpid()} 1 1"


def test_a_process_whose_owner_does_not_learn_its_pid_does_not_run(forkserver, tmp_path):
    assert forked(forkserver, tmp_path / "first", CODE="0").wait() == 0
    log, (awaited, go) = tmp_path / "log", os.pipe()
    assert forkserver._orders is not None
    with adopting():
        socket.send_fds(forkserver._orders, [Order(variables={}, log=str(log)).message()], [awaited])
        process = AdoptedProcess(int(forkserver._orders.recv(100)))
    assert process.poll() is None
    os.close(awaited)
    os.close(go)
    assert process.wait() == 1
    assert not log.exists()


def test_an_owner_of_another_version_sends_no_descriptor(forkserver, tmp_path):
    assert forked(forkserver, tmp_path / "first", CODE="0").wait() == 0
    assert forkserver._orders is not None
    with adopting():
        forkserver._orders.send(Order(variables={"CODE": "6"}, log=str(tmp_path / "log")).message())
        assert AdoptedProcess(int(forkserver._orders.recv(100))).wait() == 6


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
