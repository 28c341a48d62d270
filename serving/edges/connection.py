"""One connection between an edge and the front: frames in, frames out."""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import cast

from serving.edges.messages import EdgeMessage, encode

MAX_FRAME_BYTES = 1 << 30
"""Longer frames end the connection: no message is that long."""
MAX_BUFFERED_BYTES = 64 << 20
"""A peer that reads nothing loses its connection when this much waits for it. An edge attaches again and gets what it
lacks; nothing else waits for it."""
_LENGTH_BYTES = 4
PROBE_S, GONE_S = 2, 6
"""Seconds of silence after which the kernel asks whether the other host is there, and after which it has gone."""

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """Passes each frame to `on_frame`, and the end of the connection to `on_lost`, once. What is sent within one turn
    of the event loop, the tokens of a step among others, leaves in one write. A frame of more than `max_frame_bytes`
    ends the connection."""

    def __init__(
        self,
        on_frame: Callable[["Connection", bytes], None],
        on_lost: Callable[["Connection"], None],
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.max_frame_bytes = max_frame_bytes
        self._transport: asyncio.Transport | None = None
        self._closing = False
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._granted = 0

    @property
    def open(self) -> bool:
        """False once the connection has ended."""
        return self._transport is not None

    @property
    def peer(self) -> str:
        """The address of the other side, for the log; empty on a Unix socket."""
        name = None if self._transport is None else self._transport.get_extra_info("peername")
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""

    def send(self, message: EdgeMessage) -> None:
        """Send a message. Does nothing once the connection has ended."""
        if self._transport is None or self._closing:
            return
        frame = encode(message)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += (len(frame).to_bytes(_LENGTH_BYTES, "big"), frame)

    def grant_unsent(self) -> None:
        """Do not count the messages of this turn of the event loop against MAX_BUFFERED_BYTES: with them an edge
        attaches all of its calls. If these ended the connection, so would those of the next connection."""
        self._granted += sum(map(len, self._unsent))

    def close(self) -> None:
        """End the connection once everything is sent."""
        self._flush()
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is None or not data:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_BUFFERED_BYTES + self._granted:
            log.warning("a process on the other side of the edges' socket reads nothing; its connection is ended")
            self._transport.abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)
        connected = transport.get_extra_info("socket")
        if connected is not None and connected.family in (socket.AF_INET, socket.AF_INET6):
            notice_death(connected)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        received, at = self._received, 0
        received += data
        while len(received) - at >= _LENGTH_BYTES and self._transport is not None and not self._closing:
            length = int.from_bytes(received[at : at + _LENGTH_BYTES], "big")
            if length > self.max_frame_bytes:
                log.warning(
                    "%s sends a message of %d bytes, of which %d are allowed; its connection is ended",
                    self.peer or "an edge",
                    length,
                    self.max_frame_bytes,
                )
                self._transport.abort()
                return
            end = at + _LENGTH_BYTES + length
            if len(received) < end:
                break
            frame, at = bytes(received[at + _LENGTH_BYTES : end]), end
            try:
                self.on_frame(self, frame)
            except Exception:
                log.exception("a message on the edges' socket is not understood; its connection is ended")
                self._transport.abort()
                return
        del received[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self.on_lost(self)


def notice_death(connected: socket.socket) -> None:
    """Have the kernel end a TCP connection whose other host has gone without a word, after about GONE_S: while nothing
    is sent (keepalive), and while what was sent is not acknowledged."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, GONE_S // PROBE_S - 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1e3 * GONE_S))
