"""Keeps a front running. When the front dies, the standby front takes over its ports, its journal and its ranks.

Front, standby front and local ranks are children of the supervisor and die with it. The supervisor does little else, so
that little can go wrong in it. The files that they share are in a folder that only their owner can read; it is removed
when the server ends.
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

from serving.config import Settings
from serving.launch.run_folder import ENV_RUN, RunFolder
from serving.launch.supervised import RankParent
from serving.observability import logs

MAX_RESTARTS, RESTART_WINDOW_S = 5, 120.0
"""After more deaths than this within so many seconds, no front is started again."""
_POLL_S = 0.5
"""Seconds between two checks if the front serves."""
_MAX_TEMPORARY_PATH = 70
"""Longest path of a folder for Unix sockets: with the name of the socket, the kernel accepts up to 107 bytes."""


def supervise(settings: Settings) -> int:
    """Run fronts until one ends on request or fails for good. Returns its exit status."""
    logs.configure(settings.log_format, settings.log_level)
    for note in settings.deprecations:
        logs.SERVER.warning("%s", note)
    within = "/tmp" if len(tempfile.gettempdir()) > _MAX_TEMPORARY_PATH else None
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
    deaths: collections.deque[float] = collections.deque(maxlen=MAX_RESTARTS)
    ranks, standby = RankParent(run.path), Standby(run)
    try:
        run.settings.write_text(settings.to_toml())
        while True:
            front = standby.serve()
            code = _wait_for(front, ranks, standby, run)
            now = time.monotonic()
            often = len(deaths) == MAX_RESTARTS and now - deaths[0] < RESTART_WINDOW_S
            if stopping or code == 0 or often or not run.was_ready(front.pid):
                return 128 - code if code < 0 else code
            deaths.append(now)
            how = f"signal {-code}" if code < 0 else f"code {code}"
            logs.SERVER.error("the front ended with %s; the standby front takes over, and its requests continue", how)
    finally:
        standby.end()
        ranks.end()
        shutil.rmtree(run.path, ignore_errors=True)


class Standby:
    """The next front: a process that has made all imports and waits for the order to serve."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Start the process, if none runs."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "serving.cli.front"]
            environment = os.environ | {ENV_RUN: str(self._run.path)}
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)

    def serve(self) -> "subprocess.Popen[bytes]":
        """Let the process serve, and return it."""
        self.prepare()
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has just died; its exit status is noticed by the caller
            process.stdin.write(b"\n")
            process.stdin.close()
        return process

    def end(self) -> None:
        """Kill the process, if one waits."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _wait_for(front: "subprocess.Popen[bytes]", ranks: RankParent, standby: Standby, run: RunFolder) -> int:
    """Answer the requests of the front until it ends, and start the standby front once it serves. Its return code."""
    ended, pause = os.pidfd_open(front.pid), _POLL_S
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
