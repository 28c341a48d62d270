"""Keeps a front running: one that dies is started again, on the same ports, and goes on from the journal with the ranks
that are there, which are this process's children too.

The supervisor does little else, so it has little to die of. What they share is in a folder for their owner only, which
goes when the server ends. Fronts and ranks die with their supervisor.
"""

import collections
import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving import logs
from serving.config import Settings
from serving.run_folder import RUN, RunFolder
from serving.supervised import RankParent

MOST_RESTARTS, WITHIN_S = 5, 120.0
"""A front that dies more often than so is not started again."""
_LOOK_S = 0.5
"""How often it is looked whether the front serves."""
_LONG = 70
"""Letters of a folder's path in which sockets can have names: the kernel takes 107 for all."""


def supervise(settings: Settings) -> int:
    """Run a front until it ends in good order. Returns its exit status."""
    logs.configure(settings.log_format, settings.log_level)
    within = "/tmp" if len(tempfile.gettempdir()) > _LONG else None
    run = RunFolder(Path(tempfile.mkdtemp(prefix="moejax-run-", dir=within)))  # owner-only
    front: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop(number: int, _frame: Any) -> None:
        nonlocal stopping
        stopping = True
        if front is not None:
            front.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    deaths: collections.deque[float] = collections.deque(maxlen=MOST_RESTARTS)
    ranks, standby = RankParent(run.path), Standby(run)
    try:
        run.settings.write_text(settings.to_toml())
        while True:
            front = standby.serve()
            code = _wait(front, ranks, standby, run)
            now = time.monotonic()
            often = len(deaths) == MOST_RESTARTS and now - deaths[0] < WITHIN_S
            if stopping or code == 0 or often or not run.was_ready(front.pid):
                return 128 - code if code < 0 else code
            deaths.append(now)
            how = f"signal {-code}" if code < 0 else f"code {code}"
            logs.SERVER.error("the front ended with %s; starting it again, its requests go on", how)
    finally:
        standby.end()
        ranks.end()
        shutil.rmtree(run.path, ignore_errors=True)


class Standby:
    """The next front, which has imported everything and waits to be told to serve."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Have one, if there is none."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "serving.front"]
            environment = os.environ | {RUN: str(self._run.path)}
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)

    def serve(self) -> "subprocess.Popen[bytes]":
        """Have it serve."""
        self.prepare()
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died, which shows soon enough
            process.stdin.write(b"\n")
            process.stdin.close()
        return process

    def end(self) -> None:
        """End it without having served."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _wait(front: "subprocess.Popen[bytes]", ranks: RankParent, standby: Standby, run: RunFolder) -> int:
    """Do what the front asks until it ends, and have another one at hand once it serves. How it ended."""
    ended, pause = os.pidfd_open(front.pid), _LOOK_S
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(ended, selectors.EVENT_READ)
            selector.register(ranks, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(pause)}
                if ranks in ready:
                    ranks.answer()
                if ended in ready:
                    return front.wait()
                if pause is not None and run.was_ready(front.pid):
                    standby.prepare()
                    pause = None
    finally:
        os.close(ended)
