"""Ranks as children of the supervisor, so that they outlive the front that had them started.

The front asks over a socket in the run folder, one JSON object a connection: to start a rank, how one ended, which run.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serving.rank_process import STAY, Child, Ended, Order, RankProcess

SOCKET = "ranks"
"""Name of the socket in the run folder."""
_REQUEST_BYTES = 1 << 20
_PATIENCE_S = 1.0
_POLL_S = 0.001


class RankParent:
    """The supervisor's side: the parent of all ranks, in the thread that made it."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / SOCKET))
        self._socket.listen()
        self._children: dict[int, tuple[Order, subprocess.Popen[bytes]]] = {}

    def fileno(self) -> int:
        """For a selector: readable when `answer` has something to do."""
        return self._socket.fileno()

    def answer(self) -> None:
        """Answer one request. A front that dies or stops in the middle of it is not waited for."""
        connection, _ = self._socket.accept()
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(_PATIENCE_S)
            with connection.makefile("rb") as request:
                asked = json.loads(request.readline(_REQUEST_BYTES))
            try:
                answer = {"is": self._obey(**asked)}
            except OSError as error:
                answer = {"error": str(error)}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _obey(self, start: dict[str, Any] | None = None, ended: int | None = None) -> Any:
        if start is not None:
            order = Order(**start)
            process = order.start()
            self._children[process.pid] = order, process
            return process.pid
        if ended is not None:
            code = self._children[ended][1].poll()
            if code is not None:
                del self._children[ended]
            return code
        running = {pid: order for pid, (order, process) in self._children.items() if process.poll() is None}
        return [[pid, dataclasses.asdict(order)] for pid, order in running.items()]

    def end(self) -> None:
        """End every rank there is."""
        for _, process in self._children.values():
            process.kill()
        for _, process in self._children.values():
            process.wait()
        self._socket.close()


class Supervised:
    """Has the supervisor start ranks. Their output goes to files in `logs`, `folder` is the run folder."""

    def __init__(self, folder: Path, logs: Path, threads: int) -> None:
        self._ask = functools.partial(_ask, folder / SOCKET)
        self._logs = logs
        self._threads = threads

    def start(self, rank: int, front: str, ended: Ended) -> RankProcess:
        """See `Launcher.start`."""
        order = Order.of(rank, front, self._logs, self._threads, variables={STAY: "1"})
        pid = self._ask(start=dataclasses.asdict(order))
        return Child(SupervisedProcess(pid, self._ask), order, ended)

    def left(self) -> Mapping[int, Callable[[Ended], RankProcess]]:
        """See `Launcher.left`. Of two that are the same rank the older one was about to be replaced, and is ended."""
        found: dict[int, tuple[int, Order]] = {}
        for pid, told in self._ask():
            order = Order(**told)
            if order.rank in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found[order.rank][0], signal.SIGKILL)
            found[order.rank] = pid, order
        return {
            rank: functools.partial(Child, SupervisedProcess(pid, self._ask), order)
            for rank, (pid, order) in found.items()
        }


class SupervisedProcess:
    """A child of the supervisor; see `serving.rank_process.Handle`."""

    def __init__(self, pid: int, ask: Callable[..., Any]) -> None:
        self.pid = pid
        self._ask = ask
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `Handle.poll`."""
        if self._code is None:
            self._code = self._ask(ended=self.pid)
        return self._code

    def wait(self) -> int:
        """See `Handle.wait`."""
        while (code := self.poll()) is None:
            time.sleep(_POLL_S)
        return code


def _ask(path: Path, **request: Any) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as reply:
            answer = json.loads(reply.readline())
    if "error" in answer:
        raise OSError(f"the supervisor could not start a rank: {answer['error']}")
    return answer["is"]
