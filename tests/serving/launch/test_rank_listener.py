"""Where the front listens for ranks: an address that others can dial, or an error that says what to change."""

from collections.abc import AsyncIterator
from typing import Any, Never, cast

import pytest

import serving.launch.rank_listener
from serving.errors import StartError
from serving.launch.rank_listener import AttachService, RankListener, first_report

pytestmark = pytest.mark.anyio


class Nobody:
    """Serves no rank."""

    async def Attach(self, reports: AsyncIterator[Any], context: Any) -> AsyncIterator[Never]:
        for each in ():
            yield each


class Aborted(Exception):
    """The call was ended by its handler."""


class Context:
    """The server's side of a call."""

    async def abort(self, code: Any, details: str) -> None:
        raise Aborted(details)


async def test_a_free_port_is_taken_and_is_in_the_address() -> None:
    server, address = await RankListener(address="127.0.0.1:0").open(cast(AttachService, Nobody()))
    try:
        host, _, port = address.rpartition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        with pytest.raises(StartError, match=rf"cannot listen for ranks on {address}; .*--rank-listen HOST:PORT"):
            await RankListener(address=address).open(cast(AttachService, Nobody()))
    finally:
        await server.stop(0)


async def test_ranks_of_this_machine_dial_a_file(tmp_path) -> None:
    address = f"unix:{tmp_path / 'link'}"
    server, found = await RankListener(address=address).open(cast(AttachService, Nobody()))
    await server.stop(0)
    assert found == address


async def test_a_caller_says_who_it_is_first_or_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reports(*messages: str) -> AsyncIterator[str]:
        for each in messages:
            yield each

    async def never() -> AsyncIterator[str]:
        await serving.launch.rank_listener.asyncio.Event().wait()
        yield ""

    assert await first_report(reports("hello", "more"), Context()) == "hello"
    monkeypatch.setattr(serving.launch.rank_listener, "HELLO_TIMEOUT_S", 0.01)
    for silent in (reports(), never()):
        with pytest.raises(Aborted, match="no first message came"):
            await first_report(silent, Context())
