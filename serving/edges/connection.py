"""One connection between an edge and the front: frames in, frames out."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from serving.edges.messages import EdgeMessage, encode

MAX_FRAME_BYTES = 1 << 30
"""Longer frames end the connection: no message is that long."""
MAX_BUFFERED_BYTES = 64 << 20
"""A peer that reads nothing loses its connection when this much waits for it. An edge attaches again and gets what it
lacks; nothing else waits for it."""
_LENGTH_BYTES = 4

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """Passes each frame to `on_frame`, and the end of the connection to `on_lost`, once. What is sent within one turn
    of the event loop, the tokens of a step among others, leaves in one write."""

    def __init__(
        self, on_frame: Callable[["Connection", bytes], None], on_lost: Callable[["Connection"], None]
    ) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unsent: list[bytes] = []

    @property
    def open(self) -> bool:
        """False once the connection has ended."""
        return self._transport is not None

    def send(self, message: EdgeMessage) -> None:
        """Send a message. Does nothing once the connection has ended."""
        if self._transport is None:
            return
        frame = encode(message)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += (len(frame).to_bytes(_LENGTH_BYTES, "big"), frame)

    def close(self) -> None:
        """End the connection once everything is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is None or not data:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_BUFFERED_BYTES:
            log.warning("a process on the other side of the edges' socket reads nothing; its connection is ended")
            self._transport.abort()

    # -- asyncio.Protocol -------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        received, at = self._received, 0
        received += data
        while len(received) - at >= _LENGTH_BYTES and self._transport is not None:
            length = int.from_bytes(received[at : at + _LENGTH_BYTES], "big")
            if length > MAX_FRAME_BYTES:
                self._transport.abort()
                return
            end = at + _LENGTH_BYTES + length
            if len(received) < end:
                break
            frame, at = bytes(received[at + _LENGTH_BYTES : end]), end
            try:
                self._on_frame(self, frame)
            except Exception:
                log.exception("a message on the edges' socket is not understood; its connection is ended")
                self._transport.abort()
                return
        del received[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self._on_lost(self)
