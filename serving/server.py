"""A server inside a Python program."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

from serving.app import App, Log, no_log
from serving.config import Settings
from serving.errors import StartError


class Server:
    """A server inside this program: it starts when the block is entered and stops when it is left.

    >>> from serving import Client, Server
    >>> with Server(model="tiny", ranks=2) as server, Client(server) as client:   # doctest: +SKIP
    ...     print(client.generate("ROMEO:", max_tokens=20).text)

    The arguments are the fields of `serving.config.Settings`; ports default to free ones, and `log`
    takes the lines that a server logs while it starts. In a coroutine use
    `async with Server(...)` and `AsyncClient`.
    """

    def __init__(self, *, log: Log = no_log, **settings: Any) -> None:
        values: dict[str, Any] = {"grpc_port": 0, "http_port": 0} | settings
        self.settings = Settings.load(None, {}, **values)
        self._log = log
        self._thread: threading.Thread | None = None
        self._starting = False
        self._stopping: Callable[[], object] = lambda: None
        self.app: App | None = None

    @property
    def address(self) -> str:
        """host:port of gRPC. Raises StartError if the server is not running."""
        return f"{self.settings.host}:{self._running().ports.grpc}"

    @property
    def url(self) -> str:
        """http://host:port of HTTP. Raises StartError if the server is not running."""
        return f"http://{self.settings.host}:{self._running().ports.http}"

    def _running(self) -> App:
        if self.app is None:
            raise StartError("the server is not running. Use it as a context manager: with Server(...) as server.")
        return self.app

    def _check_stopped(self) -> None:
        if self.app is not None or self._thread is not None or self._starting:
            raise StartError("this server runs already. Leave its block first, or make another Server.")

    def __enter__(self) -> Self:
        self._check_stopped()
        started: Future[None] = Future()

        def run() -> None:
            try:
                asyncio.run(self._serve(started))
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)

        self._thread = threading.Thread(target=run, name="moejax-server")
        self._thread.start()
        try:
            started.result()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop is closed when the start failed by itself
                self._stopping()
            self._thread.join()
            self._thread = None
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed when the server ended by itself
            self._stopping()
        if self._thread is not None:
            self._thread.join()
        self.app = self._thread = None

    async def _serve(self, started: "Future[None]") -> None:
        loop, stop, starting = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()

        def stopping() -> None:
            if self.app is None and starting is not None:
                starting.cancel()
            stop.set()

        self._stopping = lambda: loop.call_soon_threadsafe(stopping)
        self.app = await App.start(self.settings, self._log)
        started.set_result(None)
        await stop.wait()
        await self.app.stop(0.0)

    async def __aenter__(self) -> Self:
        self._check_stopped()
        self._starting = True
        try:
            self.app = await App.start(self.settings, self._log)
        finally:
            self._starting = False
        return self

    async def __aexit__(self, *_exc: object) -> None:
        app, self.app = self._running(), None
        await app.stop(0.0)
