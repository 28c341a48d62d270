"""Server-sent events."""

import pytest

from serving.sse import EventStream, frame


def test_a_frame_is_one_line_of_json_with_its_id():
    assert frame({"a": "é\n"}) == 'data: {"a":"é\\n"}\n\n'
    assert frame(1, sequence=7) == "id: 7\ndata: 1\n\n"


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
