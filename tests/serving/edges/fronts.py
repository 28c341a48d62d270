"""Fronts that die under an edge: the real loop, journal, socket and `RemoteBackend`, on ranks without processes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from serving.core.journal import Journal
from serving.core.request_log import RequestLog
from serving.core.request_processor import RequestProcessor
from serving.edges.front_dialer import LocalFront
from serving.edges.front_socket import FrontSocket
from serving.edges.remote_backend import RemoteBackend
from serving.edges.served_model import ServedModel
from serving.observability.metrics import Metrics
from serving.protocol.status import EdgeStatus
from simulation.byte_tokenizer import byte_tokenizer
from simulation.hand_model import PREPARED
from tests.support.recovery_machine import SETTINGS, Machine

SERVED = ServedModel(prepared=PREPARED.to_json(), settings={}, server="one", build="1")


class Front:
    """A front that serves edges in a folder; `kill` ends it as SIGKILL does."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.loop = machine.loop
        self.started: list[int] = []
        self.lost: list[tuple[int, int]] = []
        """Process ids of edges that have gone, and how many calls they left."""
        processor = RequestProcessor(self.loop, byte_tokenizer(), Metrics(self.loop))
        self._unattended = asyncio.create_task(processor.read_unattended(self.loop.engine.request_log.running()))
        self.socket = FrontSocket(
            self.loop, processor, on_started=self._on_started, on_lost=self._on_lost, served=SERVED
        )
        self.loop.connected_edges = lambda: self.socket.edges

    def _on_started(self, edge: EdgeStatus) -> None:
        self.started.append(edge.pid)
        self.loop.edge_started(edge)

    def _on_lost(self, edge: EdgeStatus, announced: bool) -> None:
        self.lost.append((edge.pid, edge.calls))
        self.loop.edge_lost(edge, announced)

    @classmethod
    async def start(cls, folder: Path, before: "Front | None" = None) -> "Front":
        """The first front, or the one after it, with its journal and its ranks."""
        journal, records = Journal.open(folder / "journal")
        machine = Machine(SETTINGS, before and before.machine.executor, RequestLog(journal, records))
        await machine.failover.start()
        machine.loop.start()
        front = cls(machine, folder)
        await front.socket.open(folder)
        return front

    async def kill(self) -> None:
        """Nothing of it runs any more, and nobody gets anything of it."""
        socket, loop = self.socket, self.loop
        loop.engine.request_log.close()
        self.machine.failover.kv_replicas.close()
        socket._closing = True
        assert socket._server is not None
        socket._server.close()
        for connection in list(socket._edges):
            connection.abort()
        failover = self.machine.failover
        running = [self._unattended, *socket._tasks, *loop.tasks, *loop._pipeline.answers]
        running += [failover.meshes._loading, failover.joining._task, failover._rendezvous._monitoring]
        for task in filter(None, running):
            task.cancel()
        await asyncio.gather(*filter(None, running), return_exceptions=True)

    async def stop(self) -> None:
        """It ends in order."""
        await self.loop.drain(0.0)
        await self.socket.close()
        self._unattended.cancel()
        await self.machine.failover.close()


@contextlib.asynccontextmanager
async def edge(folder: Path) -> AsyncIterator[RemoteBackend]:
    """An edge that serves."""
    backend = RemoteBackend(LocalFront(folder))
    await backend.open()
    backend.serve()
    try:
        yield backend
    finally:
        await backend.close()


async def seen(holds: Callable[[], object]) -> None:
    """Wait turn by turn of the event loop, in which the front makes at most one step of several, until `holds`."""
    while not holds():
        await asyncio.sleep(0)
