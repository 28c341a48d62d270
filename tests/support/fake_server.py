"""Both surfaces over the fake backend: `async with serve(backend)`, or `python -m tests.fake_server`.

Run by hand it answers every prompt with the same text, slowly, and its kill buttons work on imaginary ranks.
"""

import argparse
import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from serving import http, rpc
from serving.generation import Generation
from serving.guard import Guard
from serving.metrics import Metrics
from serving.tls import ServerTls
from tests.fake_backend import FakeBackend, renamed
from tests.fake_tokens import byte_tokenizer

REPLY = (
    "Mixture-of-Experts models route each token to a few experts. When the device that holds an expert dies, "
    "another copy answers, and the text goes on: café, naïve, 数学, 🎉.\n\n"
    "Lost weights come from the host's store in the background. "
)


@dataclasses.dataclass(frozen=True)
class FakeServer:
    """Addresses of a running server, and what is behind it."""

    backend: FakeBackend
    generation: Generation
    grpc_port: int
    http_port: int

    @property
    def address(self) -> str:
        """Where gRPC listens."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def url(self) -> str:
        """Where HTTP listens."""
        return f"http://127.0.0.1:{self.http_port}"


@contextlib.asynccontextmanager
async def serve(
    backend: FakeBackend,
    *,
    grpc_port: int = 0,
    http_port: int = 0,
    guard: Guard | None = None,
    tls: ServerTls | None = None,
    vllm: bool = False,
) -> AsyncIterator[FakeServer]:
    """Serve until the block is left."""
    generation = Generation(backend, byte_tokenizer(), Metrics(backend), draw=lambda: 7)
    grpc_server = await rpc.start(generation, port=grpc_port, guard=guard, tls=tls, vllm=vllm)
    http_server = await http.start(generation, port=http_port, guard=guard, tls=tls)
    try:
        yield FakeServer(backend, generation, grpc_server.port, http_server.port)
    finally:
        await asyncio.gather(grpc_server.stop(0), http_server.stop(0))


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between two tokens")
    options = parser.parse_args()
    model = dataclasses.replace(renamed("fake-moe"), max_context=4096)
    backend = FakeBackend(model=model, reply=list((REPLY * 4).encode()), delay_s=options.delay)
    async with serve(backend, grpc_port=options.grpc_port, http_port=options.http_port) as server:
        print(f"gRPC {server.address}, HTTP {server.url}", flush=True)
        await backend.happen("ready")
        await backend.happen("lattice_ready", message="14 meshes")
        while True:
            await asyncio.sleep(5)
            for rank in tuple(backend.dead):
                await backend.rejoin(rank)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
