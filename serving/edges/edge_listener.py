"""Where edges on other hosts connect: a TCP port with TLS, on which nothing is obeyed before a Hello with a token."""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from serving.auth.join_tokens import JoinTokenFileError, JoinTokens
from serving.auth.tls import ServerTls
from serving.config import Settings, split_address
from serving.edges import messages
from serving.edges.connection import MAX_FRAME_BYTES, Connection
from serving.edges.front_dialer import CLOSE_S
from serving.errors import StartError

HELLO_BYTES = 4096
"""Most bytes of the first message of a peer that is not known yet."""
HELLO_S = 5.0
"""Most seconds for TLS and the first message together."""
MAX_STRANGERS = 64
"""Most peers that are not known yet, from the moment they are accepted: the handshake of TLS costs a buffer. One more,
and the one that has waited longest is disconnected."""
BACKLOG = 128
MAX_NAME, MAX_PID = 253, 1 << 31
"""Most characters of the name of a host, and more than any process id."""

Admit = Callable[[Connection, messages.Hello], object]

log = logging.getLogger(__name__)


class EdgeListener:
    """Listens for edges at `edge_listen` of the settings, with the tokens and the TLS files there. An edge whose token
    is valid goes to `admit`; any other gets Refused, with the reason, and is disconnected, as is a peer that says
    something else or nothing. Raises StartError for a TLS file that cannot be used."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._host, self.port = split_address(address)
        self._path = Path(settings.edge_tokens or "")
        self._tls = ServerTls.of_ranks(settings)
        self._context: ssl.SSLContext | None = None
        self._admit: Admit
        self._server: asyncio.Server | None = None
        self._strangers: dict[Connection, asyncio.TimerHandle] = {}

    def rejection(self, secret: str) -> str | None:
        """Why this is no valid token; None if it is one. Raises JoinTokenFileError."""
        return JoinTokens.open(self._path, param="edge_tokens").rejection(secret, time.time())

    async def open(self, admit: Admit, former_port: int = 0) -> None:
        """Begin to listen. A port of 0 is that of the front before this one, or a free one. Raises StartError when the
        address cannot be had."""
        self._admit, self.port = admit, self.port or former_port
        self._context = None if self._tls is None else self._tls.context()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._make, self._host, self.port, backlog=BACKLOG
            )
        except OSError as error:
            raise StartError(
                f"the front cannot listen for edges on {self._host}:{self.port}: {error.strerror or error}. Choose "
                "another address with --edge-listen HOST:PORT."
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Accept no more edges. The admitted ones stay connected."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._strangers):
            connection.abort()

    def _make(self) -> Connection:
        return Stranger(self._on_stranger, self._on_first, self._forget, self._context)

    def _on_stranger(self, connection: Connection) -> None:
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            self._forget(oldest)
            oldest.abort()
        timer = asyncio.get_running_loop().call_later(HELLO_S, connection.abort)
        self._strangers[connection] = timer

    def _forget(self, connection: Connection) -> None:
        if (timer := self._strangers.pop(connection, None)) is not None:
            timer.cancel()

    def _on_first(self, connection: Connection, frame: bytes) -> None:
        peer = connection.peer
        self._forget(connection)
        try:
            hello = messages.decode_hello(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            log.warning("%s is no edge: its first message is not understood", peer)
            connection.abort()
            return
        hello = _shown(hello, peer)
        try:
            why = self.rejection(hello.token)
        except JoinTokenFileError as error:
            log.error("no edge is let in: %s", error)
            connection.abort()
            return
        if why is not None:
            log.warning("%s (%s) may not be an edge: %s", hello.host, peer, why)
            connection.send(messages.Refused(text=f"the front does not let this edge in: {why}."))
            connection.close()
            return
        connection.max_frame_bytes = MAX_FRAME_BYTES
        self._admit(connection, hello)


def _shown(hello: messages.Hello, peer: str) -> messages.Hello:
    """The message with texts and numbers that a status and a log can show."""
    texts = ("".join(each for each in text if each.isprintable())[:MAX_NAME] for text in (hello.host, hello.build))
    host, build = texts
    return msgspec.structs.replace(
        hello, host=host or peer, build=build, pid=hello.pid if 0 < hello.pid < MAX_PID else 1
    )


class Stranger(Connection):
    """A connection of a peer that is not known yet. It goes to `on_made` when it is accepted, and begins TLS after that
    if there is a `context`: asyncio's own TLS server would name it only once the handshake is done."""

    def __init__(
        self,
        on_made: Callable[[Connection], None],
        on_frame: Callable[[Connection, bytes], None],
        on_lost: Callable[[Connection], None],
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(on_frame, on_lost, HELLO_BYTES)
        self._on_made = on_made
        self._context = context
        self._securing: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._on_made(self)
        if self._context is not None and self._transport is not None:
            self._transport.pause_reading()
            self._securing = asyncio.create_task(self._secure(self._transport, self._context))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`. Nothing is read before TLS can also answer."""
        if self._securing is not None:
            self._received += data
        else:
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`. Called once, whether TLS or the connection below it has ended."""
        if self._transport is not None:
            super().connection_lost(exc)

    async def _secure(self, transport: asyncio.Transport, context: ssl.SSLContext) -> None:
        secured = None
        if not transport.is_closing():
            try:
                secured = await asyncio.get_running_loop().start_tls(
                    transport,
                    self,
                    context,
                    server_side=True,
                    ssl_handshake_timeout=HELLO_S,
                    ssl_shutdown_timeout=CLOSE_S,
                )
            except OSError as error:
                log.debug("%s does not begin TLS: %s", self.peer, error)
        self._securing = None
        if secured is None or self._closing:
            transport.abort()
            self.connection_lost(None)
        elif self._transport is not None:
            self._transport = secured
            self.data_received(b"")
