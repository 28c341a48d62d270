"""Bodies that arrive packed."""

import gzip
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from serving.api.http.gzip_body import GzipBody
from serving.api.http.server import application
from serving.auth.limits import CallLimits
from serving.config import Settings


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(1, 20))
def test_a_body_in_any_pieces_is_unpacked_up_to_the_bound(first, second, size):
    packed = gzip.compress(first) + gzip.compress(second)  # two members make one file
    pieces = [packed[i : i + size] for i in range(0, len(packed), size)]
    whole = len(first) + len(second)

    def unpack(bound: int) -> bytes:
        body = GzipBody(bound)
        return b"".join(body.push(piece, last=i + 1 == len(pieces)) for i, piece in enumerate(pieces))

    assert unpack(whole) == first + second
    if whole:
        with pytest.raises(HTTPException) as caught:
            unpack(whole - 1)
        assert caught.value.status_code == 413


@pytest.mark.parametrize("data", [b"plain", gzip.compress(b"x", mtime=0)[:-3], b""], ids=["plain", "cut", "empty"])
def test_what_is_no_gzip_is_refused(data):
    with pytest.raises(HTTPException, match="not valid gzip") as caught:
        GzipBody(100).push(data, last=True)
    assert caught.value.status_code == 400


@pytest.mark.anyio
async def test_the_bound_of_the_server_is_that_of_the_unpacked_body(processor):
    limits = CallLimits.of(Settings(max_body_bytes=1000))
    transport = httpx.ASGITransport(application(processor, limits=limits))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

        async def send(body: bytes, encoding: str) -> httpx.Response:
            return await client.post("/v1/completions", content=body, headers={"Content-Encoding": encoding})

        ask = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
        assert (await send(gzip.compress(ask), "gzip")).json()["choices"][0]["text"] == "bc"
        assert (await send(ask, "identity")).status_code == 200
        assert (await send(gzip.compress(b" " * 100_000 + ask), "gzip")).status_code == 413
        assert (await send(ask, "gzip")).status_code == 400
        assert (await send(ask, "br")).status_code == 415
