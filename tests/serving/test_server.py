"""A server inside a Python program."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from serving.app import _weights_record
from serving.config import Settings
from serving.errors import StartError
from serving.launch.run_folder import RunFolder
from serving.launch.weights_record import FILE, WeightsRecord
from serving.protocol.prepared_model import prepare_model
from serving.protocol.weights import WeightsVersion
from serving.server import Server
from simulation.hand_model import PREPARED
from tests.support.joining import JoinFiles, free_address

TINY = Path(__file__).parents[2] / "models" / "tiny"


class Interrupted(Exception):
    """Raised in the main thread, as Ctrl-C is."""


def interrupt(*_: object) -> None:
    raise Interrupted


def test_a_start_that_is_interrupted_ends_at_once_and_leaves_no_thread(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGUSR1, interrupt)

    def log(line: str) -> None:
        if "lets one in" in line:  # it waits for hosts, which never come
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    join_files = JoinFiles.made(tmp_path, "127.0.0.1")
    server = Server(model=str(TINY), ranks=2, log=log, **join_files.settings(free_address()))
    try:
        with pytest.raises(Interrupted), server:
            pytest.fail("there are no hosts, so it cannot start")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not any(thread.name == "moejax-server" for thread in threading.enumerate())


def test_a_recorded_version_is_refused_where_ranks_on_other_hosts_do_not_have_it(tmp_path: Path) -> None:
    join_files = JoinFiles.made(tmp_path, "127.0.0.1")
    prepared = asyncio.run(prepare_model(str(TINY)))
    WeightsRecord(tmp_path, prepared.content).save(WeightsVersion(1, "two", "/models/two"))
    settings = join_files.settings(free_address())
    server = Server(model=str(TINY), ranks=2, journal=str(tmp_path), **settings)
    with pytest.raises(StartError, match=r"version two is in force .* other hosts .*--model /models/two"), server:
        pytest.fail("its ranks would have other weights")


def test_the_record_of_the_weights_lies_with_the_journal_also_under_a_supervisor(tmp_path: Path) -> None:
    run, version = RunFolder(tmp_path / "run"), WeightsVersion(1, "two", "/models/two")
    for settings, folder in (
        (Settings(journal=str(tmp_path / "journal")), tmp_path / "journal"),
        (Settings(), run.path),
        (Settings(journal="off"), run.path),
    ):
        _weights_record(settings, PREPARED, run).save(version)
        assert WeightsRecord(folder, PREPARED.content).load() == version
        (folder / FILE).unlink()


def test_a_server_that_runs_is_not_entered_again_and_can_be_started_again() -> None:
    server = Server(model=str(TINY), ranks=1)
    for _ in range(2):
        with server:
            url = server.url
            with pytest.raises(StartError, match="this server runs already"), server:
                pytest.fail("it ran already")
            assert server.url == url
    with pytest.raises(StartError, match="not running"):
        _ = server.url
