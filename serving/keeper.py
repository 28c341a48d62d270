"""`moejax rank --join`: keeps a place for a rank on this host. Dials the front until it is let in, prepares the model
here, starts the rank's process when told to, ends it when told to or when the front is gone, and dials again.

Every incarnation of a rank is a process of its own. This one has no JAX in it and little to die of; it is the agent
that can end a rank which hangs. It leaves nothing behind: the kernel ends the rank with it.
"""

import asyncio
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc

from serving.dial import Way
from serving.errors import MoejaxError
from serving.prepared import Prepared, prepare
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.rank_process import Child, Order
from serving.version import build

PAUSE_S, LONGEST_S, REFUSED_S = 0.5, 5.0, 30.0
"""How long to wait before the front is dialled again: twice as long each time up to a bound, a higher one where the
front is there and does not want this host."""
REFUSALS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offer:
    """What this host says of a place, and what its ranks are started with. `model` is where this host has the model,
    when not where the front has it; `device` the number of the GPU, when there are several."""

    secret: str
    host: str
    rack: str = ""
    model: str | None = None
    threads: int = 1
    device: int | None = None


class Keeper:
    """One place. `await run()` returns only when cancelled, and leaves no process then."""

    def __init__(self, way: Way, offer: Offer, say: Callable[[str], None]) -> None:
        self._way = way
        self._offer = offer
        self._say = say
        self._told = ""
        self._reports: asyncio.Queue[link_pb2.PlaceReport] = asyncio.Queue()
        self._child: tuple[int, Child] | None = None
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep the place."""
        pause = PAUSE_S
        with tempfile.TemporaryDirectory(prefix="moejax-rank-") as logs:
            while True:
                bound = LONGEST_S
                try:
                    async with self._way.aio_channel() as channel:
                        self._reports = asyncio.Queue()
                        async for order in link_pb2_grpc.RankLinkStub(channel).Keep(self._sent()):
                            pause = PAUSE_S if order.HasField("start") else pause
                            self._obey(order, Path(logs))
                    self._tell("the front has ended")
                except grpc.RpcError as error:
                    code, why = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
                    self._tell(f"{self._way.front}: {why or code.name}")
                    bound = REFUSED_S if code in REFUSALS else bound
                finally:
                    self._end()
                await asyncio.sleep(pause)
                pause = min(bound, 2 * pause)

    def _obey(self, order: link_pb2.PlaceOrder, logs: Path) -> None:
        what = order.WhichOneof("what")
        if what == "prepare":
            self._preparing = asyncio.create_task(self._prepare(order.prepare))
        elif what == "start":
            self._start(order.start, logs)
        elif what == "signal" and self._child is not None and self._child[0] == order.signal.incarnation:
            self._child[1].signal(order.signal.name)

    async def _prepare(self, order: link_pb2.PrepareModel) -> None:
        name = self._offer.model or order.model
        self._tell(f"let in by {self._way.front}; preparing {name}")
        try:
            answer = _prepared(await prepare(name, order.data_type, in_place=order.in_place, dense=order.dense))
        except MoejaxError as error:
            answer = link_pb2.ModelPrepared(error=f"{error} (moejax rank --model says where this host has it)")
        self._reports.put_nowait(link_pb2.PlaceReport(prepared=answer))
        self._tell(answer.error or f"{name} is here; waiting for a rank to be")

    def _start(self, order: link_pb2.StartRank, logs: Path) -> None:
        self._end_child()
        incarnation, device = order.incarnation, self._offer.device
        variables = self._way.variables() | ({} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)})
        process = Order.of(order.rank, self._way.front, logs, self._offer.threads, order.token, variables)
        child = Child(process.start(), process, lambda _: self._ended(incarnation))
        self._child = incarnation, child
        self._tell(f"rank {order.rank} (pid {child.pid})")
        started = link_pb2.RankStarted(incarnation=incarnation, pid=child.pid)
        self._reports.put_nowait(link_pb2.PlaceReport(started=started))

    def _ended(self, incarnation: int) -> None:
        if self._child is None or self._child[0] != incarnation:
            return
        child, self._child = self._child[1], None
        said, code = child.said(), child.code or 0
        self._tell(f"the rank ended with {f'signal {-code}' if code < 0 else f'code {code}: {said}'}")
        ended = link_pb2.RankEnded(incarnation=incarnation, code=code, said=said)
        self._reports.put_nowait(link_pb2.PlaceReport(ended=ended))

    def _end(self) -> None:
        """What belongs to one stay with a front is over with it."""
        if self._preparing is not None:
            self._preparing.cancel()
        self._end_child()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child[1].end()
            self._child = None

    async def _sent(self) -> AsyncIterator[link_pb2.PlaceReport]:
        offer = self._offer
        place = link_pb2.Place(token=offer.secret, host=offer.host, rack=offer.rack, build=build())
        yield link_pb2.PlaceReport(place=place)
        while True:
            yield await self._reports.get()

    def _tell(self, text: str) -> None:
        """Say something that is not what was said last: a front that is not there is dialled again and again."""
        if text != self._told:
            self._told = text
            self._say(text)


async def keep(way: Way, offers: Sequence[Offer], say: Callable[[str], None]) -> None:
    """Keep several places until cancelled."""
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            for offer in offers:
                group.create_task(Keeper(way, offer, say).run())


def _prepared(model: Prepared) -> link_pb2.ModelPrepared:
    executables = Path(model.executables)
    executables.mkdir(mode=0o700, parents=True, exist_ok=True)
    where = os.stat(executables)
    return link_pb2.ModelPrepared(
        config=model.config,
        content=model.content,
        store=model.store,
        executables=model.executables,
        disk=f"{BOOT_ID.read_text().strip()}:{where.st_dev}:{where.st_ino}",
        numerics=model.numerics,
    )
