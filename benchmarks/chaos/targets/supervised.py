"""A server without a supervisor of its own, under the one that operators give it: started again when it ends, and
killed when it does not answer."""

import abc
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Self

from benchmarks.chaos.environments import without_python_path
from benchmarks.chaos.processes import descendants, resident_pages
from benchmarks.chaos.targets.target import Target
from benchmarks.local_server import free_port, is_healthy

PROBE_EVERY_S = 1.0
FAILED_PROBES = 3
"""Failures of /health in a row after which the server is killed: quicker than Kubernetes' usual 30 seconds."""
_START_LIMIT_S = 600.0


class Supervised(Target):
    """One command. A thread starts it again at once when its process ends, and probes /health."""

    def __init__(self, options: Sequence[str]) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._options = options
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._restarts = 0
        self._stopping = threading.Event()
        self._process = self._spawn()
        self._watch = threading.Thread(target=self._supervise, daemon=True)

    @abc.abstractmethod
    def command(self, port: int) -> list[str]:
        """The command that serves on this port of the loopback."""

    @classmethod
    def start(cls, options: Sequence[str]) -> Self:
        """Start the command and wait until /health answers. Raises RuntimeError with its output when it ends first."""
        target = cls(options)
        end = time.monotonic() + _START_LIMIT_S
        while not target.whole():
            if target._process.poll() is not None or time.monotonic() > end:
                output = target._output()
                target.stop()
                raise RuntimeError(f"{cls.__name__} did not start:\n{output}")
            time.sleep(0.1)
        target._watch.start()
        return target

    @property
    def selectors(self) -> Sequence[str]:
        """The process that was started, and the last of its children, which computes where there are several."""
        return ("server", "worker")

    def process(self, selector: str) -> int:
        """Of `worker`: the descendant with the most memory, or the server if it has none."""
        if selector not in self.selectors:
            raise LookupError(f"{selector} is none of {', '.join(self.selectors)}")
        children = descendants(self._process.pid) if selector == "worker" else []
        return max(children, key=resident_pages, default=self._process.pid)

    def whole(self) -> bool:
        """True if /health answers."""
        return is_healthy(self.url)

    @property
    def restarts(self) -> int:
        """Counted by the supervising thread."""
        return self._restarts

    def stop(self) -> None:
        """End the whole process group."""
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join()
        self._kill()
        self._log.close()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.command(self._port), *self._options],
            env=without_python_path() | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _supervise(self) -> None:
        failed, answered = 0, True
        while not self._stopping.wait(PROBE_EVERY_S if self._process.poll() is None else 0.0):
            if self._process.poll() is None:
                up = self.whole()
                answered = answered or up
                failed = 0 if up or not answered else failed + 1  # a server that still starts is not probed
                if failed < FAILED_PROBES:
                    continue
            self._kill()
            self._process, failed, answered = self._spawn(), 0, False
            self._restarts += 1

    def _kill(self) -> None:
        """SIGKILL to the process, to all that it started, and to what it left behind in its group."""
        family = descendants(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]
