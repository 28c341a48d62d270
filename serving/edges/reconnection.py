"""Keeps an edge connected: to the front, and to the one after it when it dies."""

import asyncio
import logging
from collections.abc import Callable

from serving.edges.connection import Connection
from serving.edges.front_dialer import RETRY_S, FrontDialer
from serving.protocol import clock

WELCOME_S = 10.0
"""Most seconds for a front on another host to answer Hello."""
STEADY_S = 1.0
"""A connection that ends sooner after Welcome counts as one that was not made: the next one waits."""

log = logging.getLogger(__name__)


class Reconnection:
    """`run` connects again and again. `on_frame` gets each frame, `on_lost` is called when a connection has ended.
    Whoever reads the frames sets `welcomed` when the front has answered Hello, and clears it in `on_lost`."""

    def __init__(
        self, front: FrontDialer, on_frame: Callable[[Connection, bytes], None], on_lost: Callable[[], None]
    ) -> None:
        self.welcomed = asyncio.Event()
        self.over = False
        """Set to make no connection after this one."""
        self._front = front
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._task: asyncio.Task[None] | None = None
        self._said = ""

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End the connection once everything is sent, and make no other one."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause = RETRY_S
        while not self.over:
            if await self._connect():
                pause = RETRY_S
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._front.retry_max_s)

    async def _connect(self) -> bool:
        """Connect, and stay connected as long as the front does. True if that was a while."""
        lost = asyncio.Event()
        try:
            connection = await self._front.dial(self._on_frame, lambda _: lost.set())
        except (OSError, TimeoutError, UnicodeError) as error:
            self._log(f"no front can be reached: {error or 'it does not answer'}")
            return False
        welcomed = False
        try:
            connection.send(self._front.hello())
            welcomed = await self._is_welcomed(lost)
            if not welcomed:
                self._log("no front has answered" if lost.is_set() else f"no front has answered in {WELCOME_S:g} s")
                connection.abort()
                return False
            self._said = ""
            since = clock.now()
            await lost.wait()
            self._log("the front has gone; requests wait for the next one")
            return clock.now() - since >= STEADY_S
        finally:
            self._on_lost()
            connection.close()

    async def _is_welcomed(self, lost: asyncio.Event) -> bool:
        waiting = [asyncio.ensure_future(self.welcomed.wait()), asyncio.ensure_future(lost.wait())]
        try:
            limit_s = WELCOME_S if self._front.remote else None
            await asyncio.wait(waiting, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            return self.welcomed.is_set()
        finally:
            for each in waiting:
                each.cancel()

    def _log(self, line: str) -> None:
        """Log a line that differs from the last one. Beside the front its supervisor logs what becomes of it."""
        if self._front.remote and line != self._said:
            log.warning("%s", line)
        self._said = line
