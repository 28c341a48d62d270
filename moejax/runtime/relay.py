"""Keeps a rank's connection to its coordination service up when the service dies.

JAX's client ends its process as soon as its connection to the service breaks. A running mesh does not need the
service: ranks use it to find one another when they connect. So the client talks to this relay, in its own process. When
the service is gone, the relay goes silent instead of closing, and the front makes a new generation when it is ready.
"""

import contextlib
import socket
import threading
from collections.abc import Callable

_CHUNK = 1 << 16


def check_service(target: str) -> None:
    """Raise OSError when nobody listens at `target` (host:port)."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port))):
        pass


class Relay:
    """Passes bytes between one client, in this process, and the service at `target` (host:port). `lost` is called in a
    thread of its own, once, when the service is gone and its end is not hidden."""

    def __init__(self, target: str, lost: Callable[["Relay"], None] = lambda relay: None) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._on_lost = lost
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        self._holding = False
        self._broken = False
        self.closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    @property
    def holding(self) -> bool:
        """True once the end of the service is hidden from the client."""
        return self._holding

    @property
    def silent(self) -> bool:
        """True when the service is gone and the client does not know."""
        return self._holding and self._broken

    def hold(self) -> None:
        """Hide the end of the service from the client from now on. Until then the end reaches threads that wait in the
        client."""
        self._holding = True

    def close(self) -> None:
        """Close everything: the client must be shut down before, or it ends the process."""
        with self._lock:
            self.closed = True
            ends, self._ends = self._ends, []
        for end in (self._listener, *ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._ends.append(near)
            try:
                far = socket.create_connection(self._target)
            except OSError:
                self._lost(near)
                continue
            with self._lock:
                self._ends.append(far)
            self._start(lambda near=near, far=far: _copy_bytes(near, far))
            self._start(lambda near=near, far=far: self._back(far, near))

    def _back(self, far: socket.socket, near: socket.socket) -> None:
        _copy_bytes(far, near)
        self._lost(near)

    def _lost(self, near: socket.socket) -> None:
        with self._lock:
            first, self._broken = not self._broken, True
        if not self._holding:
            if first:
                self._start(lambda: self._on_lost(self))
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _start(run: Callable[[], None]) -> None:
        threading.Thread(target=run, daemon=True, name="relay").start()


def _copy_bytes(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes from one end to the other until either breaks. The other end stays open."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
