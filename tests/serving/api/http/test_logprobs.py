"""Log-probabilities of tokens that are a part of a character, and places of tokens in a text."""

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.http.logprobs import TextOffsets
from serving.api.http.server import application

pytestmark = pytest.mark.anyio


@given(st.text(max_size=20), st.data())
def test_a_token_is_where_its_character_begins(text, data):
    whole, offsets, at = text.encode(), TextOffsets(), 0
    while at < len(whole):
        end = data.draw(st.integers(at + 1, len(whole)))
        assert offsets.place(whole[at:end]) == len(whole[:at].decode(errors="ignore"))
        at = end


async def test_the_bytes_of_the_tokens_make_the_text(processor):
    text = "é\U0001f600 x"
    processor.backend.reply = [*text.encode(), 257]  # 257 ends the answer
    transport = httpx.ASGITransport(application(processor))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        entries = choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"] == text
        assert all(top["bytes"] is not None for entry in entries for top in entry["top_logprobs"])
        body = {"prompt": "é \u00e9 x", "max_tokens": 0, "echo": True, "logprobs": 0}
        scored = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        assert scored["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 3, 4]
        assert scored["text"][scored["logprobs"]["text_offset"][-1] :] == "x"
