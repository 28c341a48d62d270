"""The process of a rank on this machine: how it is started, and what is known of its end."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.launch.rank_process import ChildProcess, LaunchSpec, describe_exit

pytestmark = pytest.mark.anyio


def start(spec: LaunchSpec, program: str) -> "subprocess.Popen[bytes]":
    with Path(spec.log).open("wb") as out:
        return subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=out)


def test_a_rank_finds_its_front_its_number_and_its_secret_in_its_environment(tmp_path):
    spec = LaunchSpec.of(3, "unix:/link", tmp_path, 2, variables={"MORE": "1"})
    link = {name: value for name, value in spec.variables.items() if name.startswith("MOEJAX_LINK_")}
    assert link == {"MOEJAX_LINK_FRONT": "unix:/link", "MOEJAX_LINK_RANK": "3", "MOEJAX_LINK_TOKEN": spec.token}
    assert (spec.variables["NPROC"], spec.variables["MORE"]) == ("2", "1")
    assert LaunchSpec.of(3, "unix:/link", tmp_path, 2).token != spec.token


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("print('[Gloo] x\\nfirst\\n\\nlast'); raise SystemExit(3)", "process ended with code 3: first | last"),
        ("raise SystemExit(0)", "process ended with code 0: it wrote nothing"),
        ("import os; os.kill(os.getpid(), 9)", "process ended with signal 9"),
    ],
)
async def test_the_end_of_a_process_is_reported_once_with_its_last_output(tmp_path, program, how):
    ended: asyncio.Queue[str] = asyncio.Queue()
    spec = LaunchSpec.of(0, "unix:/link", tmp_path, 1)
    process = ChildProcess(start(spec, program), spec, ended.put_nowait)
    async with asyncio.timeout(60):
        assert await ended.get() == how
        await process.fenced()
    assert not Path(spec.log).exists()
    process.end()
    assert ended.empty()


async def test_a_process_that_is_killed_is_fenced_and_its_end_not_reported(tmp_path):
    ended: list[str] = []
    spec = LaunchSpec.of(0, "unix:/link", tmp_path, 1)
    process = ChildProcess(start(spec, "import time; time.sleep(60)"), spec, ended.append)
    assert process.state not in ("", "X", "Z")
    process.end()
    async with asyncio.timeout(60):
        await process.fenced()
    await asyncio.sleep(0.05)
    assert process.code == -9
    assert ended == []
    assert not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
async def test_how_a_process_crashes_is_known_before_its_parent_is_told(tmp_path, number):
    spec = LaunchSpec.of(0, "unix:/link", tmp_path, 1)
    program = f"import faulthandler, os; faulthandler.enable(); os.kill(os.getpid(), {number})"
    process = ChildProcess(start(spec, program), spec, lambda how: None)
    assert process.exit_code in (None, -number)
    deadline = time.monotonic() + 20  # the event loop, which reports the end, does not run meanwhile
    while process.state not in ("X", "Z") and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.exit_code == -number
    assert describe_exit(process.exit_code, process.last_output()).startswith(
        f"process ended with signal {number:d}: Fatal Python error: "
    )
    process.end()
    assert process.exit_code in (None, -number)


async def test_of_an_exception_that_ended_a_process_its_text_comes_first(tmp_path):
    ended: asyncio.Queue[str] = asyncio.Queue()
    spec = LaunchSpec.of(0, "unix:/link", tmp_path, 1)
    process = ChildProcess(start(spec, "raise IndexError('out; of bounds')"), spec, ended.put_nowait)
    async with asyncio.timeout(20):
        how = await ended.get()
    assert how.startswith(
        "process ended with code 1: IndexError: out, of bounds | Traceback (most recent call last): | "
    )
    assert process.exit_code == 1
