"""`moejax serve` as a process of its own, and what is left of its process group."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from serving.api.client import Client
from tests.support.streams import pid_of, wait_until

ROOT = Path(__file__).parents[2]
SMALL = ("--model", str(ROOT / "models" / "tiny"), "--buckets", "8,0;8,2", "--grpc-port", "0")
_START_STACK = 28 - 3
"""Place of the address of the stack among the fields of /proc/PID/stat from the state on, see proc(5)."""
SMALL += ("--kv-cache-type", "bfloat16")
"""The tiny model with few compiles, and a cache that is narrow also while fronts, edges and versions change."""


def start(*arguments: str) -> subprocess.Popen[str]:
    """`moejax serve` in a process group of its own."""
    command = [sys.executable, "-m", "serving", "serve", "--http-port", "0", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


@contextlib.contextmanager
def supervised(*arguments: str, end: signal.Signals = signal.SIGTERM) -> "Iterator[Supervised]":
    """`moejax serve` of the tiny model, which serves. Upon the signal `end` it drains and leaves no process."""
    process = start(*SMALL, *arguments)
    try:
        yield Supervised(process)
    finally:
        if process.poll() is None:
            process.send_signal(end)
        assert process.wait(60) == 0
        wait_until(lambda: not processes_of(process.pid), "no process is left", 10)


def processes_of(group: int) -> list[str]:
    """Command lines of the processes left in a session."""
    found = subprocess.run(["ps", "-s", str(group), "-o", "args="], capture_output=True, text=True, check=False)
    return found.stdout.splitlines()


def command_line(pid: int) -> list[str]:
    """The arguments of a process as `ps` shows them."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")


def stack_of(pid: int) -> str:
    """The address of a process's stack: that of the process which it is forked from. An interpreter that starts gets
    one of its own."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[_START_STACK]


def has_ended(pid: int) -> bool:
    """True for a process that is gone, or that only waits for its parent to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith(("Z", "X"))
    except OSError:
        return True


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Lines of standard error up to the one that matches."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"the server ended before it said {pattern!r}:\n{said}")


class Supervised:
    """A running `moejax serve`."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.said = read_until(process, r"\btry\b")
        self.address = re.search(r"gRPC +(\S+)", self.said)[1]  # type: ignore[index]
        self.url = re.search(r"HTTP +(\S+)", self.said)[1]  # type: ignore[index]
        threading.Thread(target=self._drain, daemon=True).start()

    def kill_with(self, client: Client, rank: int) -> None:
        """The front and a rank at once."""
        pid = pid_of(client.status(), rank)
        os.kill(self.front(), signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def front(self) -> int:
        """The process that serves."""
        with Client(self.address) as client:
            return client.status().front_pid
