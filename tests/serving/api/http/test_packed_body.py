"""Bodies that arrive packed."""

import gzip
import json
import zlib

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from serving.api.http.packed_body import PackedBody
from serving.api.http.server import application
from serving.auth.limits import CallLimits
from serving.config import Settings


@given(st.binary(max_size=200), st.binary(max_size=50), st.integers(1, 20))
def test_a_body_in_any_pieces_is_unpacked_up_to_the_bound(first, second, size):
    whole = first + second

    def unpack(packed: bytes, encoding: str, bound: int) -> bytes:
        body, pieces = PackedBody(bound, encoding), [packed[i : i + size] for i in range(0, len(packed), size)]
        return b"".join(body.push(piece, last=i + 1 == len(pieces)) for i, piece in enumerate(pieces))

    for encoding, packed in (
        ("gzip", gzip.compress(first) + gzip.compress(second)),  # two members make one file
        ("deflate", zlib.compress(whole)),
        ("deflate", zlib.compress(whole, wbits=-15)),  # without a header, as some clients send it
    ):
        assert unpack(packed, encoding, len(whole)) == whole
        if whole:
            with pytest.raises(HTTPException) as caught:
                unpack(packed, encoding, len(whole) - 1)
            assert caught.value.status_code == 413


WRONG = {
    "gzip": (b"plain", gzip.compress(b"x", mtime=0)[:-3], b"", zlib.compress(b"x")),
    "deflate": (b"plain", zlib.compress(b"x")[:-3], b"", zlib.compress(b"x") + b"y", gzip.compress(b"x", mtime=0)),
}


@pytest.mark.parametrize(("encoding", "data"), [(each, data) for each, wrong in WRONG.items() for data in wrong])
def test_a_body_in_another_encoding_than_it_says_is_refused(encoding, data):
    with pytest.raises(HTTPException, match=f"not valid {encoding}") as caught:
        PackedBody(100, encoding).push(data, last=True)
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
        assert (await send(zlib.compress(ask), "Deflate")).json()["choices"][0]["text"] == "bc"
        assert (await send(ask, "identity")).status_code == 200
        assert (await send(gzip.compress(b" " * 100_000 + ask), "gzip")).status_code == 413
        assert (await send(ask, "gzip")).status_code == 400
        assert (await send(ask, "br")).status_code == 415
