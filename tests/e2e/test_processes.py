"""The server as a process: it starts or says why not, drains on a signal, and leaves nothing behind."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from serving.api.client import Client
from tests.e2e.conftest import TINY
from tests.support.processes import SMALL, processes_of, read_until, start
from tests.support.streams import wait_until


@pytest.mark.parametrize(
    "how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)  # the server of `test_front` ends upon the latter
def test_a_signal_drains_the_server_and_leaves_no_process(how: signal.Signals) -> None:
    process = start(*SMALL, "--ranks", "2")
    said = read_until(process, r"\btry\b")
    address = re.search(r"gRPC +(\S+)", said)
    assert address is not None
    with Client(address[1]) as client:
        stream = iter(client.stream("ROMEO:", max_tokens=100, ignore_eos=True))
        tokens = len(next(stream).token_ids)
        os.killpg(process.pid, how)  # as a terminal and systemd do
        tokens += sum(len(chunk.token_ids) for chunk in stream)
        assert tokens == 100, "a request that runs when the server is told to stop is served to its end"
    assert process.wait(60) == 0
    wait_until(lambda: not processes_of(process.pid), "no process is left", 10)


def test_nothing_outlives_a_supervisor_that_is_killed_not_even_a_rank_that_is_stopped() -> None:
    process = start(*SMALL, "--ranks", "2")
    pids = re.findall(r"pid (\d+)", read_until(process, r"\btry\b"))
    assert len(pids) == 2
    os.kill(int(pids[0]), signal.SIGSTOP)
    process.kill()
    process.wait(10)
    wait_until(lambda: not processes_of(process.pid), "no process is left", 10)


def test_a_port_that_is_taken_ends_the_start_with_the_cause_and_no_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(*SMALL, "--ranks", "1", "--grpc-port", str(port))
        _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert f"127.0.0.1:{port}" in said
    assert "--grpc-port" in said
    wait_until(lambda: not processes_of(process.pid), "no process is left", 10)


def test_a_damaged_checkpoint_ends_the_start_with_its_tensor_and_no_process(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    chunk = max((folder / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    chunk.write_bytes(chunk.read_bytes()[:-100])
    process = start("--model", str(folder), "--ranks", "2", "--grpc-port", "0")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert re.search(r"corrupt|truncated|damaged", said), said
    wait_until(lambda: not processes_of(process.pid), "no process is left", 10)


def test_a_rank_that_cannot_start_is_named_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
    process = start(*SMALL, "--ranks", "2")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 1
    assert re.search(r"rank [01]", said), said
    assert "no_such_platform" in said
    wait_until(lambda: not processes_of(process.pid), "no process is left", 10)
