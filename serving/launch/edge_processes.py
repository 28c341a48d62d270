"""Edges as child processes of the supervisor, and the ports that they share.

The supervisor has both ports from its start to its end, so that edges come and go while no other program takes them.
Every edge accepts from the one socket of HTTP: connections wait in it while an edge is started. gRPC opens its sockets
itself: each edge has one at the same port, which the supervisor reserves.
"""

import contextlib
import dataclasses
import logging
import os
import selectors
import socket
import subprocess
import sys
import time
from typing import Any

from serving.config import Settings
from serving.errors import StartError
from serving.launch.run_folder import ENV_RUN, RunFolder

PAUSES_S = (0.0, 0.2, 1.0, 5.0)
"""Seconds until an edge that died is started again: the first time, and when it dies again and again."""
STEADY_S = 60.0
"""An edge that has lived that long is started again at once when it dies."""
END_S = 5.0
"""Most seconds for an edge to end by itself."""

log = logging.getLogger(__name__)


class SharedPorts:
    """The ports of gRPC and HTTP, reserved. Raises StartError when one of them cannot be had."""

    def __init__(self, settings: Settings) -> None:
        self.http = _bind(settings.host, settings.http_port, "HTTP", "--http-port")
        try:
            self._grpc = _bind(settings.host, settings.grpc_port, "gRPC", "--grpc-port")
        except StartError:
            self.http.close()
            raise
        # Only after it is bound, so that a port which another server has is refused.
        self._grpc.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def in_settings(self, settings: Settings) -> Settings:
        """The settings with the ports in use."""
        grpc, http = self._grpc.getsockname()[1], self.http.getsockname()[1]
        return dataclasses.replace(settings, grpc_port=grpc, http_port=http)

    def close(self) -> None:
        """Give the ports back."""
        self.http.close()
        self._grpc.close()


@dataclasses.dataclass
class EdgeProcess:
    """An edge that runs. `deaths` of its place, in a row, came before it."""

    process: subprocess.Popen[bytes]
    ended: int
    started_at: float
    deaths: int


class EdgeProcesses:
    """Keeps `settings.edges` edges running, in the thread that made it. `selector` gets a descriptor for each, which is
    readable once the edge has ended, with this object as its data."""

    def __init__(
        self, settings: Settings, run: RunFolder, ports: SharedPorts, selector: selectors.BaseSelector
    ) -> None:
        self._run = run
        self._ports = ports
        self._selector = selector
        self._edges: dict[int, EdgeProcess] = {}
        self._due: dict[int, tuple[float, int]] = {}
        for place in range(settings.edges):
            self._start(place, deaths=0)

    @property
    def pause_s(self) -> float | None:
        """Seconds until `start_due` has something to do; None: not before an edge ends."""
        return max(min(at for at, _ in self._due.values()) - time.monotonic(), 0.0) if self._due else None

    def start_due(self) -> None:
        """Start the edges whose pause is over."""
        now = time.monotonic()
        for place, (at, deaths) in list(self._due.items()):
            if at <= now:
                del self._due[place]
                self._start(place, deaths)

    def on_ended(self, descriptor: Any, *, was_ready: bool) -> int:
        """An edge has ended. It is started again; `was_ready`: the server has served before. Returns its exit code."""
        place, edge = next((place, edge) for place, edge in self._edges.items() if edge.ended == descriptor)
        code = self._forget(place)
        steady = time.monotonic() - edge.started_at > STEADY_S
        deaths = 0 if steady else edge.deaths
        pause = PAUSES_S[min(deaths, len(PAUSES_S) - 1)]
        how = f"signal {-code}" if code < 0 else f"code {code}"
        if was_ready:
            log.error("an edge ended with %s; another one is started, and its calls can be resumed there", how)
        else:
            log.error("an edge ended with %s before the server was ready", how)
        self._due[place] = time.monotonic() + pause, deaths + 1
        return code

    def end(self) -> None:
        """Let every edge finish what it writes, and end it."""
        self._due.clear()
        for edge in self._edges.values():
            assert edge.process.stdin is not None
            with contextlib.suppress(OSError):
                edge.process.stdin.close()
        deadline = time.monotonic() + END_S
        for place, edge in list(self._edges.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                edge.process.wait(max(deadline - time.monotonic(), 0.01))
            edge.process.kill()
            self._forget(place)

    def _start(self, place: int, deaths: int) -> None:
        descriptor = self._ports.http.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli.edge", str(descriptor)],
            env=os.environ | {ENV_RUN: str(self._run.path)},
            stdin=subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        ended = os.pidfd_open(process.pid)
        self._edges[place] = EdgeProcess(process, ended, time.monotonic(), deaths)
        self._selector.register(ended, selectors.EVENT_READ, self)

    def _forget(self, place: int) -> int:
        edge = self._edges.pop(place)
        self._selector.unregister(edge.ended)
        os.close(edge.ended)
        return edge.process.wait()


def _bind(host: str, port: int, what: str, flag: str) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise StartError(
            f"{what} cannot listen on {host}:{port}: {error.strerror}. Choose another port with {flag}, "
            "or 0 for any free one."
        ) from error
    return bound
