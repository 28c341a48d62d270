"""Server-sent events."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.api.http.sse import EventStream, frame


def test_a_frame_is_one_line_of_json_with_its_id():
    assert frame({"a": "é\n"}).decode() == 'data: {"a":"é\\n"}\n\n'
    assert frame(1, sequence=7) == b"data: 1\nid: 7\n\n"


@given(st.text())
@example("\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r")
def test_no_text_ends_a_line(text):
    sent = frame({"text": text})
    assert sent.decode().splitlines() == [sent.decode().rstrip("\n"), ""]
    assert json.loads(sent.removeprefix(b"data: "))["text"] == text


@pytest.mark.anyio
async def test_every_source_is_closed_when_the_client_is_gone():
    closed = []

    async def source(name):
        try:
            yield "data: 1\n\n"
            yield "data: 2\n\n"
        finally:
            closed.append(name)

    async def send(message) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    frames, items = source("frames"), source("items")
    await anext(items)
    with pytest.raises(OSError, match="gone"):
        await EventStream(frames, items).stream_response(send)
    assert closed == ["frames", "items"]
