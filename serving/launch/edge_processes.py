"""Edges as child processes of the supervisor, and the ports that they share.

The supervisor has both ports from its start to its end, so that edges come and go while no other program takes them.
Every edge accepts from the one socket of HTTP: connections wait in it while an edge is started. gRPC opens its sockets
itself: each edge has one at the same port, which the supervisor reserves.
"""

import contextlib
import dataclasses
import logging
import math
import os
import select
import selectors
import socket
import time
from typing import Any, BinaryIO

from serving.config import Settings
from serving.errors import StartError
from serving.launch.child import ChildHandle
from serving.launch.code import Code
from serving.launch.forkserver import IMPORTS_S, Forkserver, Order
from serving.launch.run_folder import ENV_RUN, RunFolder

EDGE_PROGRAM = "serving.cli.edge"
"""The module whose `main` is an edge."""
PAUSES_S = (0.0, 0.2, 1.0, 5.0)
"""Seconds until an edge that died is started again: the first time, and when it dies again and again."""
STEADY_S = 60.0
"""An edge that has lived that long is started again at once when it dies."""
END_S = 5.0
"""Most seconds for an edge to end by itself, and for one that drains beyond the time that its streams have."""

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
    """An edge that runs the code of a `build`, with the other end of its standard input. `deaths` of its place, in a
    row, came before it. One that drains is ended at `until`, on the monotonic clock."""

    process: ChildHandle
    input: BinaryIO
    ended: int
    started_at: float
    deaths: int
    build: str
    until: float = math.inf

    def send(self, line: str) -> None:
        """Write a line to its standard input."""
        with contextlib.suppress(OSError):  # it has just died, which is noticed by its descriptor
            self.input.write(f"{line}\n".encode())


class EdgeProcesses:
    """Keeps `settings.edges` edges running, in the thread that made it. `selector` gets a descriptor for each, which is
    readable once the edge has ended, with this object as its data. Edges are forked by a fork server that has
    EDGE_PROGRAM, and run its code until `replace_next` says otherwise."""

    def __init__(
        self,
        settings: Settings,
        run: RunFolder,
        ports: SharedPorts,
        selector: selectors.BaseSelector,
        forkserver: Forkserver,
    ) -> None:
        self.code = forkserver.code
        self.successor_failed = ""
        """How the successor of an edge ended before clients could connect to it; empty unless one did."""
        self._successor: tuple[int, EdgeProcess] | None = None
        self._draining: list[EdgeProcess] = []
        self._run = run
        self._ports = ports
        self._selector = selector
        self._forkserver = forkserver
        self._edges: dict[int, EdgeProcess] = {}
        self._due: dict[int, tuple[float, int]] = {}
        for place in range(settings.edges):
            self._edges[place] = self._spawn(deaths=0, wait_s=IMPORTS_S)

    @property
    def pause_s(self) -> float | None:
        """Seconds until `start_due` has something to do; None: not before an edge ends."""
        return max(min(at for at, _ in self._due.values()) - time.monotonic(), 0.0) if self._due else None

    @property
    def successor_started_at(self) -> float | None:
        """When the edge was started that is to replace another one and does not serve yet, on the monotonic clock."""
        return None if self._successor is None else self._successor[1].started_at

    def start_due(self) -> None:
        """Start the edges whose pause is over."""
        now = time.monotonic()
        for place, (at, deaths) in list(self._due.items()):
            if at <= now:
                del self._due[place]
                self._edges[place] = self._spawn(deaths)

    def on_ended(self, descriptor: Any, *, was_ready: bool) -> int:
        """An edge has ended. It is started again; `was_ready`: the server has served before. Returns its exit code."""
        if (code := self._on_replacement_ended(descriptor)) is not None:
            return code
        place, edge = next((place, edge) for place, edge in self._edges.items() if edge.ended == descriptor)
        code = self._forget(self._edges.pop(place))
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
        edges = [*self._edges.values(), *self._draining]
        if self._successor is not None:
            edges.append(self._successor[1])
        for edge in edges:
            edge.input.close()
        deadline = time.monotonic() + END_S
        for edge in edges:
            ended = select.poll()  # `select` takes no descriptor above 1,023
            ended.register(edge.ended, select.POLLIN)
            ended.poll(1e3 * max(deadline - time.monotonic(), 0.01))
            edge.process.kill()
            self._forget(edge)

    # -- Other code ---------------------------------------------------------------------------------------------

    def replace_next(self, code: Code, drain_s: float) -> bool:
        """Do the next part of replacing the edges, one after the other, by edges that run `code`: start the successor
        of one, drain the edge once clients can connect to its successor, and end it when its streams have not ended
        within `drain_s` seconds. False when nothing is left to do."""
        self.code = code
        now = time.monotonic()
        for edge in self._draining:
            if edge.until < now:
                edge.process.kill()
        if self._successor is not None:
            place, successor = self._successor
            if self._run.has_noted("serving", successor.process.pid):
                self._successor = None
                former = self._edges.pop(place, None)
                self._due.pop(place, None)
                self._edges[place] = successor
                if former is not None:
                    former.until = now + drain_s + END_S
                    former.send(f"drain {drain_s}")
                    self._draining.append(former)
            return True
        if self._draining or self._due:
            return True
        place = next((place for place, edge in self._edges.items() if edge.build != code.build), None)
        if place is None:
            return False
        self.successor_failed = ""
        self._successor = place, self._spawn(deaths=0)
        return True

    def drop_successor(self) -> None:
        """Kill the edge that is being started beside another one."""
        if self._successor is not None:
            edge, self._successor = self._successor[1], None
            edge.process.kill()
            self._forget(edge)

    def _on_replacement_ended(self, descriptor: Any) -> int | None:
        """An edge has ended: its code when it was a successor, or one that drained; None for any other."""
        if self._successor is not None and self._successor[1].ended == descriptor:
            code, self._successor = self._forget(self._successor[1]), None
            self.successor_failed = f"the new edge ended with code {code} before clients could connect to it"
            return code
        for edge in self._draining:
            if edge.ended == descriptor:
                self._draining.remove(edge)
                return self._forget(edge)
        return None

    def _spawn(self, deaths: int, wait_s: float = 0.0) -> EdgeProcess:
        variables, passed = {ENV_RUN: str(self._run.path)}, (self._ports.http.fileno(),)
        order = Order(module=EDGE_PROGRAM, variables=variables, passed=passed)
        process, writing = self._forkserver.start_with_input(order, code=self.code, wait_s=wait_s)
        ended = os.pidfd_open(process.pid)
        self._selector.register(ended, selectors.EVENT_READ, self)
        return EdgeProcess(process, writing, ended, time.monotonic(), deaths, self.code.build)

    def _forget(self, edge: EdgeProcess) -> int:
        self._selector.unregister(edge.ended)
        os.close(edge.ended)
        edge.input.close()
        code = edge.process.wait()
        self._run.forget(edge.process.pid)
        return code


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
