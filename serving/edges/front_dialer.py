"""How an edge reaches the front: by its Unix socket in the run folder, or by TCP from another host."""

import asyncio
import os
import socket
import ssl
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from serving.config import split_address
from serving.edges import messages
from serving.edges.connection import Connection
from serving.protocol import clock
from serving.protocol.versions import EDGE
from serving.version import build

RETRY_S = 0.01
"""Seconds between two attempts to reach the next front."""
RETRY_MAX_S = 0.5
"""Most seconds between two attempts to reach a front on another host: each attempt waits twice as long as the last."""
DIAL_S = 3.0
"""Most seconds for a connection to another host, and for TLS: a host that has gone does not refuse, it says nothing."""
CLOSE_S = 1.0
"""Most seconds for the end of TLS."""

OnFrame = Callable[[Connection, bytes], None]
OnLost = Callable[[Connection], None]


class FrontDialer(Protocol):
    """Makes connections to whichever front there is."""

    remote: bool
    """Whether the front is on another host: it may come again after its server has ended, and has another clock."""
    retry_max_s: float

    async def dial(self, on_frame: OnFrame, on_lost: OnLost) -> Connection:
        """A connection. Raises OSError or TimeoutError when there is no front."""
        ...

    def hello(self) -> messages.Hello:
        """The first message on a connection."""
        ...

    def since(self) -> float:
        """The time that is subtracted from deadlines before they are sent (`messages.call_record`)."""
        ...


class LocalFront:
    """The front of a run folder."""

    remote = False
    retry_max_s = RETRY_S

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / messages.SOCKET)

    async def dial(self, on_frame: OnFrame, on_lost: OnLost) -> Connection:
        """See `FrontDialer.dial`."""
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(lambda: Connection(on_frame, on_lost), self._path))[1]

    def hello(self) -> messages.Hello:
        """See `FrontDialer.hello`."""
        return _hello()

    def since(self) -> float:
        """See `FrontDialer.since`: edge and front have one clock."""
        return 0.0


class RemoteFront:
    """The front at `address` (host:port), which lets edges with the join token `secret` in. Without `tls` the token and
    all prompts can be read on the way."""

    remote = True
    retry_max_s = RETRY_MAX_S

    def __init__(self, address: str, secret: str, tls: ssl.SSLContext | None) -> None:
        self.address = address
        self._host, self._port = split_address(address)
        self._secret = secret
        self._tls = tls
        self._id = uuid.uuid4().hex

    async def dial(self, on_frame: OnFrame, on_lost: OnLost) -> Connection:
        """See `FrontDialer.dial`."""
        loop, tls = asyncio.get_running_loop(), {}
        if self._tls is not None:
            tls = {"ssl": self._tls, "ssl_handshake_timeout": DIAL_S, "ssl_shutdown_timeout": CLOSE_S}
        async with asyncio.timeout(DIAL_S):
            made = await loop.create_connection(lambda: Connection(on_frame, on_lost), self._host, self._port, **tls)
        return made[1]

    def hello(self) -> messages.Hello:
        """See `FrontDialer.hello`."""
        return _hello(token=self._secret, host=socket.gethostname(), id=self._id)

    def since(self) -> float:
        """See `FrontDialer.since`."""
        return clock.now()


def _hello(**of_another_host: str) -> messages.Hello:
    return messages.Hello(version=EDGE.newest, oldest=EDGE.oldest, pid=os.getpid(), build=build(), **of_another_host)
