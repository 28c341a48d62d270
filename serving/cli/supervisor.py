"""Keeps a front running. When the front dies, the standby front takes over its ports, its journal and its ranks.

Front, standby front, edges and local ranks are children of the supervisor and die with it. The supervisor does little
else, so that little can go wrong in it. The files that they share are in a folder that only their owner can read; it is
removed when the server ends.
"""

import contextlib
import os
import selectors
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.config import Settings
from serving.errors import StartError
from serving.launch import upgrade
from serving.launch.child import ChildHandle
from serving.launch.edge_processes import EDGE_PROGRAM, EdgeProcesses, SharedPorts
from serving.launch.forkserver import Forkserver
from serving.launch.run_folder import RunFolder
from serving.launch.standby import FRONT_PROGRAM, Standby
from serving.launch.supervised import RankParent
from serving.launch.upgrade import Upgrade
from serving.observability import logs
from serving.observability.metrics_folder import FOLDER as METRICS_FOLDER

STEADY_S = 5.0
"""A front that serves for less counts as short-lived."""
FREE_RESTARTS = 5
"""After so many short-lived fronts in a row the next one still serves at once, after more it waits."""
MAX_PAUSE_S = 30.0
"""Most seconds that a front waits to serve."""
_POLL_S = 0.5
"""Seconds between two checks if the front serves."""
_STOP_POLL_S = 0.1
"""Seconds between two checks, in a pause, if the server is to end."""
_MAX_TEMPORARY_PATH = 70
"""Longest path of a folder for Unix sockets: with the name of the socket, the kernel accepts up to 107 bytes."""


def pause_before_front_s(short_lived: int) -> float:
    """Seconds until the next front serves, after so many short-lived ones in a row: none after a few, then 1, 2, 4 and
    so on. A server that fronts die in at once takes no processor from its neighbours, and still serves as soon as the
    cause is gone."""
    beyond = short_lived - FREE_RESTARTS
    return 0.0 if beyond <= 0 else min(2.0 ** (beyond - 1), MAX_PAUSE_S)


def supervise(settings: Settings) -> int:
    """Run fronts until one ends on request or fails for good. Returns its exit status."""
    logs.configure(settings.log_format, settings.log_level)
    for note in settings.deprecations:
        logs.SERVER.warning("%s", note)
    within = "/tmp" if len(tempfile.gettempdir()) > _MAX_TEMPORARY_PATH else None
    run = RunFolder(Path(tempfile.mkdtemp(prefix="moejax-run-", dir=within)))  # owner-only
    try:
        with contextlib.ExitStack() as stack:
            return Supervisor(settings, run, stack).serve()
    except StartError as error:
        logs.SERVER.error("%s", error)
        return 1
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


class Supervisor:
    """The processes of one server; `stack` ends them. Raises StartError when a port of the edges cannot be had."""

    def __init__(self, settings: Settings, run: RunFolder, stack: contextlib.ExitStack) -> None:
        self._run = run
        self._front: ChildHandle | None = None
        self._stopped_by = 0
        """The signal upon which the server ends; 0 while it is to serve."""
        self._edge_code: int | None = None
        """How an edge ended before any front was ready: the server cannot start."""
        self._edges: EdgeProcesses | None = None
        self._upgrade: Upgrade | None = None
        """None without edges: the front holds the clients' connections, and cannot be replaced under them."""
        self._selector = stack.enter_context(selectors.DefaultSelector())
        self._ranks = RankParent(run.path)
        stack.callback(self._ranks.end)
        if settings.launcher == "local":
            self._ranks.prepare()
        self._selector.register(self._ranks, selectors.EVENT_READ, self._ranks)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        if settings.edges:
            for auth in (CallLimits, ServerTls):  # an error in a file of keys is said once, before any process starts
                auth.of(settings)
            ports = SharedPorts(settings)
            stack.callback(ports.close)
            settings = ports.in_settings(settings)
            run.metrics.mkdir()
            os.environ[METRICS_FOLDER] = str(run.metrics)
        run.settings.write_text(settings.to_toml())
        forkserver = Forkserver(FRONT_PROGRAM, EDGE_PROGRAM)
        stack.callback(forkserver.end)
        forkserver.prepare()  # not before: `prometheus_client` reads METRICS_FOLDER when it is imported
        self._standby = Standby(run, forkserver)
        stack.callback(self._standby.end)
        if settings.edges:
            self._edges = EdgeProcesses(settings, run, ports, self._selector, forkserver)
            stack.callback(self._edges.end)
            start_s = settings.start_timeout_s
            self._upgrade = Upgrade(run, self._standby, self._edges, self._ranks, start_s=start_s)
            self._ranks.on_upgrade = self._upgrade.answer

    def serve(self) -> int:
        """Run one front after the other. Returns the exit status of the last one."""
        short_lived = failed_starts = 0
        while True:
            if self._upgrade is not None:
                self._upgrade.on_front_started()
            self._standby.prepare_now()
            if self._stopping:  # while no front had it
                return 128 + self._stopped_by
            began, front = time.monotonic(), self._standby.serve()
            self._front = front
            code = self._wait_for(front)
            if self._edge_code is not None:
                return self._edge_code
            if self._upgrade is not None and self._upgrade.on_front_ended(front, code):
                self._sleep(self._upgrade.pause_s)
                if not self._stopping:
                    continue
            by_itself = code > 0 and not self._run.was_ready(front.pid)
            failed_starts = failed_starts + 1 if by_itself else 0
            # Before the server has served, a front that ends has logged why it cannot start.
            if self._stopping or code == 0 or not self._run.ports or failed_starts > FREE_RESTARTS:
                return 128 - code if code < 0 else code
            short_lived = short_lived + 1 if time.monotonic() - began < STEADY_S else 0
            pause_s = pause_before_front_s(short_lived)
            how = f"signal {-code}" if code < 0 else f"code {code}"
            when = f" in {pause_s:g} s, since fronts die at once" if pause_s else ""
            logs.SERVER.error(
                "the front ended with %s; the standby front takes over%s, and its requests continue", how, when
            )
            self._sleep(pause_s)
            if self._stopping:
                return 128 - code if code < 0 else code

    @property
    def _stopping(self) -> bool:
        return self._stopped_by != 0

    def _sleep(self, seconds: float) -> None:
        """Wait so long, or until the server is to end."""
        end = time.monotonic() + seconds
        while not self._stopping and (rest := end - time.monotonic()) > 0:
            time.sleep(min(rest, _STOP_POLL_S))

    def _stop(self, number: int, _frame: Any) -> None:
        self._stopped_by = number
        if self._front is not None:
            self._front.send_signal(number)

    def _wait_for(self, front: ChildHandle) -> int:
        """Answer the requests of the front until it ends, start the standby front once it serves, and edges that have
        ended. The front's return code."""
        ended, pause = os.pidfd_open(front.pid), _POLL_S
        self._selector.register(ended, selectors.EVENT_READ)
        try:
            while True:
                upgrading = self._upgrade is not None and self._upgrade.active and not self._stopping
                polls = upgrading or self._standby.pending
                waits = (pause, self._edges and self._edges.pause_s, upgrade.POLL_S if polls else None)
                pauses = [each for each in waits if each is not None]
                ready = self._selector.select(min(pauses, default=None))
                for key, _ in ready:
                    if key.data is self._ranks:
                        self._ranks.answer()
                    elif key.data is self._edges and self._edges is not None:
                        was_ready = bool(self._run.ports)
                        self._on_edge_ended(self._edges.on_ended(key.fileobj, was_ready=was_ready), front)
                if any(key.fileobj == ended for key, _ in ready):
                    return front.wait()
                if self._edges is not None and not self._stopping:
                    self._edges.start_due()
                if upgrading and self._upgrade is not None:
                    self._upgrade.step(front)
                if self._standby.pending:
                    self._standby.prepare()
                if pause is not None and self._run.was_ready(front.pid):
                    self._standby.prepare()
                    pause = None
        finally:
            self._selector.unregister(ended)
            os.close(ended)

    def _on_edge_ended(self, code: int, front: ChildHandle) -> None:
        """An edge that ends by itself before any front is ready has logged what is wrong: the server does not start."""
        if code > 0 and not self._run.ports:
            self._edge_code = code
            front.send_signal(signal.SIGTERM)
