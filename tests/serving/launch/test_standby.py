"""The standby front is forked from a process that has its imports, with any code, and starts also without that one."""

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.config import Settings
from serving.launch.code import Code
from serving.launch.forkserver import Forkserver
from serving.launch.run_folder import RunFolder
from serving.launch.standby import FRONT_PROGRAM, Standby
from tests.support.checkouts import copy_checkout
from tests.support.processes import command_line, has_ended, stack_of
from tests.support.streams import wait_until


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.settings.write_text(Settings().to_toml())
    return run


@pytest.fixture
def forkserver() -> Iterator[Forkserver]:
    server = Forkserver(FRONT_PROGRAM)
    yield server
    server.end()


def becomes_ready(standby: Standby) -> int:
    """The process that waits, once it does."""

    def waits() -> bool:
        if standby.pending:
            standby.prepare()
        return standby.waiting

    standby.prepare()
    wait_until(waits, "the standby front waits")
    assert standby._process is not None
    return standby._process.pid


def test_it_is_forked_outlives_the_fork_server_and_ends_when_it_serves_nobody(
    run: RunFolder, forkserver: Forkserver
) -> None:
    standby = Standby(run, forkserver)
    pid = becomes_ready(standby)
    assert forkserver._process is not None
    server = forkserver._process.pid
    assert stack_of(pid) == stack_of(server)
    assert command_line(pid) == [sys.executable, "-m", FRONT_PROGRAM]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: has_ended(server), "the fork server has ended")
    standby.prepare()
    assert not standby.pending
    assert standby.waiting
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: standby.exit_code == -signal.SIGKILL, "its end is noticed")
    after = becomes_ready(standby)
    assert forkserver._process.pid != server
    assert stack_of(after) == stack_of(forkserver._process.pid), "another fork server made the imports once"
    standby.end()
    assert has_ended(after)


def test_it_runs_other_code_with_the_imports_of_that_code(
    run: RunFolder, forkserver: Forkserver, tmp_path: Path
) -> None:
    standby = Standby(run, forkserver)
    before, server = becomes_ready(standby), forkserver._process
    assert server is not None
    folder = str(copy_checkout(tmp_path / "new"))
    new = dataclasses.replace(Code.own(), path=folder, root=folder, build="new")
    standby.use(new)
    assert has_ended(before)
    assert has_ended(server.pid)
    pid = becomes_ready(standby)
    assert stack_of(pid) == stack_of(forkserver._process.pid)  # type: ignore[union-attr]
    assert f"PYTHONPATH={folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    assert standby.code == new
    standby.end()


def test_it_starts_with_imports_of_its_own_where_those_of_the_fork_server_fail(run: RunFolder) -> None:
    forkserver = Forkserver("serving.no_such_program", FRONT_PROGRAM)
    standby = Standby(run, forkserver)
    pid = becomes_ready(standby)
    assert command_line(pid) == [sys.executable, "-m", FRONT_PROGRAM]
    standby.end()
    forkserver.end()
