"""Ranks as child processes of the supervisor, so that they survive the front that had them started.

The front sends requests over a socket in the run folder, one JSON object a connection: start a rank, report how a rank
ended, list the ranks that run, or what an upgrade needs (`serving.launch.upgrade`).
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from serving.launch.child import ChildHandle
from serving.launch.code import Code, known_fields
from serving.launch.forkserver import IMPORTS_S
from serving.launch.rank_process import ENV_STAY, ChildProcess, LaunchSpec, OnExit, RankProcess, rank_forkserver

SOCKET = "ranks"
"""Name of the socket in the run folder."""
_REQUEST_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 1.0
_POLL_S = 0.001


class RankParent:
    """The supervisor's side: the parent of all ranks, in the thread that made it. Ranks run the code of this process
    until `use` says otherwise; `on_upgrade` answers what fronts ask about upgrades."""

    def __init__(self, folder: Path) -> None:
        self.on_upgrade: Callable[[Mapping[str, Any]], Any] = lambda _: None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(folder / SOCKET))
        self._socket.listen()
        self._children: dict[int, tuple[LaunchSpec, ChildHandle]] = {}
        self._forkserver = rank_forkserver()

    def prepare(self) -> None:
        """Make the imports of the ranks that will be asked for."""
        self._forkserver.prepare()

    def use(self, code: Code) -> None:
        """Have ranks run other code from now on."""
        self._forkserver.use(code)
        if self._children:
            self.prepare()

    def fileno(self) -> int:
        """A descriptor for a selector: readable when a request waits for `answer`."""
        return self._socket.fileno()

    def answer(self) -> None:
        """Answer one request. A front that dies or stops in the middle of it delays this by `_REQUEST_TIMEOUT_S` at
        most."""
        connection, _ = self._socket.accept()
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(_REQUEST_TIMEOUT_S)
            with connection.makefile("rb") as lines:
                request = json.loads(lines.readline(_REQUEST_BYTES))
            try:
                answer = {"is": self._handle(**request)}
            except OSError as error:
                answer = {"error": str(error)}
            except (TypeError, ValueError, KeyError, AttributeError) as error:  # of a front of another version
                answer = {"error": f"the request is not understood: {type(error).__name__}: {error}"}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _handle(
        self,
        start: dict[str, Any] | None = None,
        ended: int | None = None,
        upgrade: dict[str, Any] | None = None,
    ) -> Any:
        """The answer to a request: the pid of a started rank, the exit code of the process `ended`, what is to be said
        about an `upgrade`, or all ranks that run."""
        if upgrade is not None:
            return self.on_upgrade(upgrade)
        if start is not None:
            spec = LaunchSpec(**known_fields(LaunchSpec, start))
            process = spec.start(self._forkserver, wait_s=0.0 if self._children else IMPORTS_S)
            self._children[process.pid] = spec, process
            return process.pid
        if ended is not None:
            code = self._children[ended][1].poll()
            if code is not None:
                del self._children[ended]
            return code
        running = {pid: spec for pid, (spec, process) in self._children.items() if process.poll() is None}
        return [[pid, dataclasses.asdict(spec)] for pid, spec in running.items()]

    def end(self) -> None:
        """Kill every rank."""
        for _, process in self._children.values():
            process.kill()
        for _, process in self._children.values():
            process.wait()
        self._forkserver.end()
        self._socket.close()


class SupervisedStarter:
    """Has the supervisor start ranks, and takes over the `ranks` that an earlier front left (None: all). `folder`
    is the run folder; the ranks' output goes to files in `logs`."""

    def __init__(self, folder: Path, logs: Path, threads: int, ranks: Collection[int] | None = None) -> None:
        self._request = functools.partial(request_supervisor, folder)
        self._logs = logs
        self._threads = threads
        self._ranks = ranks

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """See `RankStarter.start`."""
        spec = LaunchSpec.of(rank, front, self._logs, self._threads, variables={ENV_STAY: "1"})
        pid = self._request(start=dataclasses.asdict(spec))
        return ChildProcess(SupervisedProcess(pid, self._request), spec, on_exit)

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """See `RankStarter.orphans`. Of two processes of one rank the older was about to be replaced: it is killed."""
        found: dict[int, tuple[int, LaunchSpec]] = {}
        for pid, fields in self._request():
            spec = LaunchSpec(**known_fields(LaunchSpec, fields))
            if spec.rank in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found[spec.rank][0], signal.SIGKILL)
            found[spec.rank] = pid, spec
        return {
            rank: functools.partial(ChildProcess, SupervisedProcess(pid, self._request), spec)
            for rank, (pid, spec) in found.items()
            if self._ranks is None or rank in self._ranks
        }


class SupervisedProcess:
    """A child of the supervisor; see `serving.launch.child.ProcessHandle`."""

    def __init__(self, pid: int, request: Callable[..., Any]) -> None:
        self.pid = pid
        self._request = request
        self._code: int | None = None

    def poll(self) -> int | None:
        """See `ProcessHandle.poll`."""
        if self._code is None:
            self._code = self._request(ended=self.pid)
        return self._code

    def wait(self) -> int:
        """See `ProcessHandle.wait`."""
        while (code := self.poll()) is None:
            time.sleep(_POLL_S)
        return code


def request_supervisor(folder: Path, **request: Any) -> Any:
    """Send one request to the supervisor's socket in the run folder, and return its answer. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / SOCKET))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile("rb") as reply:
            answer = json.loads(reply.readline())
    if "error" in answer:
        raise OSError(f"the supervisor could not do what a front asked: {answer['error']}")
    return answer["is"]
