"""The relay between a rank's client and its coordination service: bytes pass both ways, and once it holds, the client
never learns of the end of the service."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from moejax.runtime.relay import Relay, check_service

LIMIT_S = 60.0
"""Ends a test that would hang."""


class Ends:
    """A client and its service, connected by a relay."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.lost = threading.Semaphore(0)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.relay = Relay(self.address, lost=lambda relay: self.lost.release())
        stack.callback(self.relay.close)
        host, _, port = self.relay.address.rpartition(":")
        self.client = stack.enter_context(socket.create_connection((host, int(port)), timeout=LIMIT_S))
        self._listener.settimeout(LIMIT_S)
        self.service, _ = self._listener.accept()
        stack.enter_context(self.service)
        self.service.settimeout(LIMIT_S)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with contextlib.ExitStack() as stack:
        yield Ends(stack)


def received(end: socket.socket, count: int) -> bytes:
    """So many bytes, or those before the other side closed."""
    parts = b""
    while len(parts) < count and (part := end.recv(count - len(parts))):
        parts += part
    return parts


def test_bytes_pass_both_ways_in_order(ends: Ends) -> None:
    there, back = bytes(range(256)) * 2000, b"an answer"
    ends.client.sendall(there[:100_000])
    assert received(ends.service, 100_000) == there[:100_000]
    ends.service.sendall(back)
    assert received(ends.client, len(back)) == back
    assert not ends.relay.silent


def test_before_it_holds_the_end_of_the_service_reaches_the_client(ends: Ends) -> None:
    ends.service.close()
    assert ends.client.recv(1) == b""
    assert not ends.relay.silent
    assert ends.lost.acquire(timeout=LIMIT_S), "nobody learns of it"


def test_while_it_holds_the_client_is_told_nothing(ends: Ends) -> None:
    ends.relay.hold()
    ends.service.shutdown(socket.SHUT_RDWR)
    ends.service.close()
    while not ends.relay.silent:  # the relay has seen the end
        pass
    ends.client.setblocking(False)
    with pytest.raises(BlockingIOError):
        ends.client.recv(1)
    assert not ends.lost.acquire(blocking=False)


def test_a_service_that_is_gone_is_not_reached(ends: Ends) -> None:
    ends._listener.close()
    host, _, port = ends.relay.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT_S) as late:
        assert late.recv(1) == b""


def test_it_is_known_before_whether_somebody_listens(ends: Ends) -> None:
    check_service(ends.address)
    ends._listener.close()
    with pytest.raises(ConnectionRefusedError):
        check_service(ends.address)
