"""Frames arrive whole and in order, however they are cut; a peer that reads nothing loses its connection."""

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.edges import connection as module
from serving.edges import messages
from serving.edges.connection import Connection
from tests.support.waiting import until


class Transport(asyncio.Transport):
    """Takes what is written, and nothing of it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def get_write_buffer_size(self) -> int:
        return len(self.written)

    def abort(self) -> None:
        self.aborted = True


@given(st.lists(st.text(max_size=300), max_size=8), st.lists(st.integers(0, 2000), max_size=8))
def test_frames_arrive_as_they_were_sent_however_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    got: list[str] = []
    receiver = Connection(lambda _, frame: got.append(messages.decode_from_edge(frame).call_id), lambda _: None)  # type: ignore[union-attr]
    receiver.connection_made(Transport())
    frames = [messages.encode(messages.CloseCall(call_id=text)) for text in texts]
    data = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in itertools.pairwise(edges):
        receiver.data_received(data[start:end])
    assert got == texts


@pytest.mark.anyio
async def test_what_is_sent_in_one_turn_leaves_at_once_and_a_peer_that_reads_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_BUFFERED_BYTES", 1000)
    sender, transport = Connection(lambda *_: None, lambda _: None), Transport()
    sender.connection_made(transport)
    for _ in range(3):
        sender.send(messages.Serving())
    assert transport.written == b""
    await until(lambda: transport.written != b"")
    assert len(transport.written) == 3 * (4 + len(messages.encode(messages.Serving())))
    assert not transport.aborted
    sender.send(messages.CloseCall(call_id="x" * 5000))
    sender.grant_unsent()
    sender.send(messages.CloseCall(call_id="x" * 500))
    await until(lambda: len(transport.written) > 5500)
    assert not transport.aborted, "what an edge attaches with has ended its connection"
    sender.send(messages.CloseCall(call_id="x" * 1000))
    await until(lambda: transport.aborted)
