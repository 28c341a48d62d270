"""Clients that read one byte a second. They must not slow down other clients."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

PAUSE_S = 1.0
WINDOW = 4096
"""Approximate number of bytes of a stream that the kernel buffers for a reader."""


@contextlib.asynccontextmanager
async def slow_readers(http: str, count: int, max_tokens: int) -> AsyncIterator[list[int]]:
    """Run `count` readers of long outputs at `http` (host:port). A reader that is cut off sends another request.

    Yields the number of bytes that each reader has read so far.
    """
    read = [0] * count
    tasks = [asyncio.create_task(_read_slowly(http, max_tokens, read, reader)) for reader in range(count)]
    try:
        yield read
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_slowly(http: str, max_tokens: int, read: list[int], reader: int) -> None:
    host, _, port = http.rpartition(":")
    asked = {"prompt": "Once", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "logprobs": 5}
    body = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    loop = asyncio.get_running_loop()
    while True:
        with contextlib.suppress(OSError), socket.socket() as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
            end.setblocking(False)
            await loop.sock_connect(end, (host, int(port)))
            await loop.sock_sendall(end, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            while byte := await loop.sock_recv(end, 1):
                read[reader] += len(byte)
                await asyncio.sleep(PAUSE_S)
        await asyncio.sleep(PAUSE_S)
