"""HTTP and gRPC over the fake backend: `async with serve(backend)`, or `python -m tests.support.fake_server`.

As a program it answers every prompt with the same text, slowly; the dashboard's buttons kill its imaginary ranks.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Any

from serving.api.grpc.server import start_grpc
from serving.api.http.server import start_http
from serving.auth.limits import CallLimits
from serving.auth.tls import ServerTls
from serving.core.request_processor import RequestProcessor
from serving.observability.metrics import Metrics
from simulation.byte_tokenizer import byte_tokenizer
from tests.support.fake_backend import FakeBackend, model_named

REPLY = (
    "Mixture-of-Experts models route each token to a few experts. When the device that holds an expert dies, "
    "another copy answers, and the text goes on: café, naïve, 数学, 🎉.\n\n"
    "Lost weights come from the host's store in the background. "
)


@dataclasses.dataclass(frozen=True)
class FakeServer:
    """A running server: its backend, its request processor and its ports."""

    backend: FakeBackend
    processor: RequestProcessor
    grpc_port: int
    http_port: int

    @property
    def address(self) -> str:
        """host:port of gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def url(self) -> str:
        """The base URL of HTTP."""
        return f"http://127.0.0.1:{self.http_port}"


@contextlib.asynccontextmanager
async def serve(
    backend: FakeBackend,
    *,
    grpc_port: int = 0,
    http_port: int = 0,
    limits: CallLimits | None = None,
    tls: ServerTls | None = None,
    vllm: bool = False,
) -> AsyncIterator[FakeServer]:
    """Serve until the block is left."""
    processor = RequestProcessor(backend, byte_tokenizer(), Metrics(backend), draw_seed=lambda: 7)
    grpc_server = await start_grpc(processor, port=grpc_port, limits=limits, tls=tls, vllm=vllm)
    http_server = await start_http(processor, port=http_port, limits=limits, tls=tls)
    try:
        yield FakeServer(backend, processor, grpc_server.port, http_server.port)
    finally:
        await asyncio.gather(grpc_server.stop(0), http_server.stop(0))


@contextlib.contextmanager
def serve_in_thread(backend: FakeBackend, **options: Any) -> Iterator[FakeServer]:
    """Serve in a thread until the block is left, for blocking clients. Options as for `serve`."""
    started: Future[tuple[FakeServer, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def run() -> None:
        stop = asyncio.Event()
        async with serve(backend, **options) as server:
            started.set_result((server, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    server, loop, stop = started.result(20)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds between two tokens")
    options = parser.parse_args()
    model = dataclasses.replace(model_named("fake-moe"), max_context=4096)
    backend = FakeBackend(model=model, reply=list((REPLY * 4).encode()), delay_s=options.delay)
    async with serve(backend, grpc_port=options.grpc_port, http_port=options.http_port) as server:
        print(f"gRPC {server.address}, HTTP {server.url}", flush=True)
        await backend.emit("ready")
        await backend.emit("lattice_ready", message="14 meshes")
        while True:
            await asyncio.sleep(5)
            for rank in tuple(backend.dead):
                await backend.rejoin(rank)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
