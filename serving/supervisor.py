"""Keeps a front running: one that dies is started again, on the same ports, and goes on from the journal.

The supervisor does nothing else, so it has little to die of. What they share is in a folder for their owner only,
which goes when the server ends. A front dies with its supervisor, and ranks with their front.
"""

import collections
import os
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

MOST_RESTARTS, WITHIN_S = 5, 120.0
"""A front that dies more often than so is not started again."""


def supervise(settings: Settings) -> int:
    """Run a front until it ends in good order. Returns its exit status."""
    logs.configure(settings.log_format, settings.log_level)
    run = RunFolder(Path(tempfile.mkdtemp(prefix="moejax-run-")))  # owner-only
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
    try:
        run.settings.write_text(settings.to_toml())
        while True:
            command = [sys.executable, "-m", "serving.front"]
            front = subprocess.Popen(command, env=os.environ | {RUN: str(run.path)})
            code = front.wait()
            now = time.monotonic()
            often = len(deaths) == MOST_RESTARTS and now - deaths[0] < WITHIN_S
            if stopping or code == 0 or often or not run.was_ready(front.pid):
                return 128 - code if code < 0 else code
            deaths.append(now)
            how = f"signal {-code}" if code < 0 else f"code {code}"
            logs.SERVER.error("the front ended with %s; starting it again, its requests go on", how)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)
