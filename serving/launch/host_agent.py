"""`moejax rank --join`: keeps a place for a rank on this host. Dials the front until it is let in, prepares the model
here, starts the rank's process when told to, ends it when told to, and dials again when the front is gone: the next
one is told of the rank that the last has left, and goes on with it.

Every incarnation of a rank is a process of its own. This one has no JAX in it and little to die of; it is the agent
that can end a rank which hangs. It leaves nothing behind: the kernel ends the rank with it.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc

from serving.dial import Way
from serving.errors import MoejaxError
from serving.prepared import Prepared, prepare
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.rank_process import STAY, Child, Order
from serving.version import build

PAUSE_S, LONGEST_S, REFUSED_S = 0.5, 5.0, 30.0
"""How long to wait before the front is dialled again: twice as long each time up to a bound, a higher one where the
front is there and does not want this host."""
AGAIN_S = 0.1
"""The same while a rank waits for the next front."""
FORGOTTEN_S = 60.0
"""How long it waits before it is ended."""
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


@dataclasses.dataclass(frozen=True)
class Kept:
    """The rank that runs here: as it was ordered, and its process."""

    order: link_pb2.StartRank
    child: Child


class Keeper:
    """One place. `await run()` returns only when cancelled, and leaves no process then."""

    def __init__(self, way: Way, offer: Offer, say: Callable[[str], None]) -> None:
        self._way = way
        self._offer = offer
        self._say = say
        self._told = ""
        self._reports: asyncio.Queue[link_pb2.PlaceReport | None] = asyncio.Queue()
        self._kept: Kept | None = None
        self._alone_since: float | None = None
        """When the front of the rank that runs here was gone, on the monotonic clock."""
        self._prepared: tuple[link_pb2.PrepareModel, link_pb2.ModelPrepared] | None = None
        """What the front was told last of the model, and what it had asked for."""
        self._preparing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep the place."""
        pause = PAUSE_S
        with tempfile.TemporaryDirectory(prefix="moejax-rank-") as logs:
            try:
                while True:
                    bound = LONGEST_S
                    try:
                        async for order in self._orders():
                            pause = PAUSE_S if order.HasField("start") else pause
                            self._obey(order, Path(logs))
                        self._tell("the front has ended")
                    except grpc.RpcError as error:
                        code, why = error.code(), error.details()  # pyright: ignore[reportAttributeAccessIssue]
                        self._tell(f"{self._way.front}: {why or code.name}")
                        if code in REFUSALS:
                            bound = REFUSED_S
                            self._end_child()
                    self._left()
                    await asyncio.sleep(pause if self._kept is None else AGAIN_S)
                    pause = min(bound, 2 * pause)
            finally:
                self._left()
                self._end_child()

    def _left(self) -> None:
        """The front is gone. What runs here waits for the next one, for a while."""
        if self._preparing is not None:
            self._preparing.cancel()
        now = time.monotonic()
        self._alone_since = self._alone_since or now
        if self._kept is not None and now - self._alone_since > FORGOTTEN_S:
            self._tell(f"rank {self._kept.order.rank} is ended: no front has come for {FORGOTTEN_S:.0f} s")
            self._end_child()

    def _obey(self, order: link_pb2.PlaceOrder, logs: Path) -> None:
        what, kept, self._alone_since = order.WhichOneof("what"), self._kept, None
        if what == "prepare":
            self._preparing = asyncio.create_task(self._prepare(order.prepare))
        elif what == "start":
            self._start(order.start, logs)
        elif what == "signal" and kept is not None and kept.order.incarnation == order.signal.incarnation:
            kept.child.signal(order.signal.name)
        elif what == "signal":  # it ended before this front could hear of it
            ended = link_pb2.RankEnded(incarnation=order.signal.incarnation, code=-signal.SIGKILL)
            self._reports.put_nowait(link_pb2.PlaceReport(ended=ended))

    async def _prepare(self, order: link_pb2.PrepareModel) -> None:
        name = self._offer.model or order.model
        if self._kept is not None and self._prepared is not None and self._prepared[0] == order:
            self._tell(f"let in by {self._way.front} with rank {self._kept.order.rank}")
            self._reports.put_nowait(link_pb2.PlaceReport(prepared=self._prepared[1]))
            return
        self._tell(f"let in by {self._way.front}; preparing {name}")
        try:
            answer = _prepared(await prepare(name, order.data_type, in_place=order.in_place, dense=order.dense))
        except MoejaxError as error:
            answer = link_pb2.ModelPrepared(error=f"{error} (moejax rank --model says where this host has it)")
        self._prepared = order, answer
        self._reports.put_nowait(link_pb2.PlaceReport(prepared=answer))
        self._tell(answer.error or f"{name} is here; waiting for a rank to be")

    def _start(self, order: link_pb2.StartRank, logs: Path) -> None:
        self._end_child()
        incarnation, device = order.incarnation, self._offer.device
        variables = self._way.variables() | {STAY: "1"}
        variables |= {} if device is None else {"CUDA_VISIBLE_DEVICES": str(device)}
        process = Order.of(order.rank, self._way.front, logs, self._offer.threads, order.token, variables)
        child = Child(process.start(), process, lambda _: self._ended(incarnation))
        self._kept = Kept(order, child)
        self._tell(f"rank {order.rank} (pid {child.pid})")
        started = link_pb2.RankStarted(incarnation=incarnation, pid=child.pid)
        self._reports.put_nowait(link_pb2.PlaceReport(started=started))

    def _ended(self, incarnation: int) -> None:
        if self._kept is None or self._kept.order.incarnation != incarnation:
            return
        child, self._kept = self._kept.child, None
        said, code = child.said(), child.code or 0
        self._tell(f"the rank ended with {f'signal {-code}' if code < 0 else f'code {code}: {said}'}")
        ended = link_pb2.RankEnded(incarnation=incarnation, code=code, said=said)
        self._reports.put_nowait(link_pb2.PlaceReport(ended=ended))

    def _end_child(self) -> None:
        if self._kept is not None:
            self._kept.child.end()
            self._kept = None

    async def _orders(self) -> AsyncIterator[link_pb2.PlaceOrder]:
        """What a front says, from being dialled until it is gone."""
        reports = self._reports = asyncio.Queue()
        try:
            async with self._way.aio_channel() as channel:
                async for order in link_pb2_grpc.RankLinkStub(channel).Keep(self._sent(reports)):
                    yield order
        finally:
            reports.put_nowait(None)

    async def _sent(self, reports: "asyncio.Queue[link_pb2.PlaceReport | None]") -> AsyncIterator[link_pb2.PlaceReport]:
        offer = self._offer
        place = link_pb2.Place(token=offer.secret, host=offer.host, rack=offer.rack, build=build())
        if self._kept is not None:
            order, pid = self._kept.order, self._kept.child.pid
            left = link_pb2.LeftRank(incarnation=order.incarnation, rank=order.rank, token=order.token, pid=pid)
            place.left.CopyFrom(left)
        yield link_pb2.PlaceReport(place=place)
        while (report := await reports.get()) is not None:
            yield report

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
