"""The process of the coordination service: its address as ranks are given it, and its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving.errors import StartError
from serving.launch.coordinator import LOOPBACK, Coordinator

pytestmark = pytest.mark.anyio


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of Python with the service."""
    path = tmp_path / "program"
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def write(program: Path, text: str) -> None:
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(("host", "address"), [(LOOPBACK, "127.0.0.1:4321"), ("10.0.0.7", ":4321")])
async def test_it_is_at_the_port_that_it_prints_and_ends_when_it_is_stopped(
    program: Path, host: str, address: str
) -> None:
    write(program, 'echo 4321; echo "$@" > "$0.arguments"; exec sleep 600')
    service = await Coordinator.start(3, 8, host)
    assert service.address == address
    assert service.process.returncode is None
    await service.stop()
    assert service.process.returncode == -9
    await service.stop()


async def test_one_that_does_not_start_is_an_error_with_its_code(program: Path) -> None:
    write(program, "exit 3")
    with pytest.raises(StartError, match="the coordinator did not start: it ended with code 3"):
        await Coordinator.start(3, 8)


def test_it_ends_with_its_front_also_before_it_serves():
    command = [sys.executable, "-m", "moejax.runtime.coordinator", "1", "3", "127.0.0.1"]  # rank 0 never comes
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert process.stdout.read() == b""
    assert process.wait() == 0
    process.stdout.close()
