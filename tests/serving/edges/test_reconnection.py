"""An edge dials again and again, and not without a pause."""

import asyncio

import pytest

from serving.edges import messages
from serving.edges.connection import Connection
from serving.edges.front_dialer import RETRY_MAX_S, OnFrame, OnLost
from serving.edges.reconnection import Reconnection
from tests.serving.edges.test_connection import Transport


class BriefFront:
    """A front that answers Hello, and loses each connection right after it."""

    remote = True
    retry_max_s = RETRY_MAX_S

    def __init__(self) -> None:
        self.link = Reconnection(self, lambda *_: None, self._detach)
        self.dialled = 0

    def _detach(self) -> None:
        self.link.welcomed.clear()

    async def dial(self, on_frame: OnFrame, on_lost: OnLost) -> Connection:
        self.dialled += 1
        connection = Connection(on_frame, on_lost)
        connection.connection_made(Transport())
        self.link.welcomed.set()
        asyncio.get_running_loop().call_later(0, connection.connection_lost, None)
        return connection

    def hello(self) -> messages.Hello:
        return messages.Hello(version=1, pid=1)

    def since(self) -> float:
        return 0.0


@pytest.mark.anyio
async def test_a_front_that_loses_each_connection_at_once_is_left_alone_for_a_while() -> None:
    front = BriefFront()
    front.link.start()
    await asyncio.sleep(0.3)
    await front.link.stop()
    assert 1 < front.dialled < 10  # the pauses double from 10 ms: five fit
