"""Places for ranks that other hosts keep (`moejax rank --join`), and the ranks that run there.

A place is free for a rank once its keeper has shown a join token that counts and has the same model and the same moejax
as the front. A rank there is a process of its keeper's: the front orders its start and, as the fence, SIGKILL.

Where that order does not arrive, the network is cut or the host is gone, and nothing the rank still does reaches
anybody: the front has closed its stream, the survivors shut down their ends of its collectives, what it proved itself
with counts once for each front, and whatever it sent would be of an old epoch. Back in reach, both it and its keeper
are told to end it.

A rank whose front is gone waits for the next one, whose first places are those with such ranks: it goes on with them.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from planner.cluster import Cluster, Device, Hardware
from planner.plan import Plan
from serving.errors import StartError
from serving.logs import SERVER
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2
from serving.rank_listener import first_report
from serving.rank_process import Ended, Home, RankProcess
from serving.version import build

SPARE_S = 3.0
"""How long ranks that the last front has left are waited for before others take their places."""
FENCE_S = 0.3
"""How long a lost rank's keeper may take to say that it has ended, before being cut off counts as the end."""
UNKNOWN = "unknown"
_MOST = 1 << 53
"""No front has had so many incarnations."""

WhyNot = Callable[[str, float], str | None]
"""Of a join token's secret and the time in seconds since the epoch: why it does not count, None when it does."""


class Place:
    """Where one rank at a time can run. `home` is None until the model is there."""

    def __init__(self, number: int, told: link_pb2.Place, peer: str) -> None:
        self.number = number
        self.host = told.host or UNKNOWN
        self.rack = told.rack
        self.peer = peer
        self.orders: asyncio.Queue[link_pb2.PlaceOrder | None] = asyncio.Queue()
        self.home: Home | None = None
        self.rank: KeptRank | None = None
        self.left = told.left if told.left.token and told.left.incarnation < _MOST else None
        """What runs here since before this front was."""
        self.trouble = ""

    @property
    def free(self) -> bool:
        """A rank can be started here."""
        return self.home is not None and self.rank is None


class KeptRank:
    """A rank that runs in a place, or waits for one; see `RankProcess`."""

    def __init__(self, rank: int, incarnation: int, ended: Ended, token: str = "") -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.token = token or secrets.token_hex(16)
        self.pid: int | None = None
        self.home: Home | None = None
        self.state = ""
        self.place: Place | None = None
        self._over = asyncio.Event()
        self._ended = ended
        self._said = "it has not been started: no place was free"

    @property
    def waits(self) -> bool:
        """It still wants a place."""
        return self.place is None and not self._over.is_set()

    def take(self, place: Place) -> None:
        """Start in a place."""
        self.be_in(place)
        start = link_pb2.StartRank(incarnation=self.incarnation, rank=self.rank, token=self.token)
        place.orders.put_nowait(link_pb2.PlaceOrder(start=start))

    def be_in(self, place: Place) -> None:
        """Run there from now on."""
        self.place, self.home, place.rank = place, place.home, self
        self._said = f"it is on {place.host}, whose keeper has the rest"

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`. One that waits for a place has no process, and ends by any."""
        if self.place is None:
            self._over.set()
        elif not self._over.is_set():
            order = link_pb2.SignalRank(incarnation=self.incarnation, name=name)
            self.place.orders.put_nowait(link_pb2.PlaceOrder(signal=order))

    async def fenced(self) -> None:
        """See `RankProcess.fenced`, and this module for why the wait has an end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FENCE_S):
                await self._over.wait()

    def said(self) -> str:
        """See `RankProcess.said`."""
        return self._said

    def end(self) -> None:
        """See `RankProcess.end`."""
        self.signal("SIGKILL")

    def over(self, how: str, said: str = "") -> None:
        """Its process has ended, or can be reached no more."""
        if not self._over.is_set():
            self._over.set()
            self._said = said or self._said
            self._ended(f"{how}{f': {said}' if said else ''}")


class Places:
    """All places that are kept for this front, and a launcher that starts ranks there (`serving.rank_process`)."""

    def __init__(self, model: Prepared, order: link_pb2.PrepareModel, why_not: WhyNot) -> None:
        self._model = model
        self._prepare = link_pb2.PlaceOrder(prepare=order)
        self._why_not = why_not
        self._places: dict[int, Place] = {}
        self._numbers = 0
        self._waiting: collections.deque[KeptRank] = collections.deque()
        self._meant: dict[int, int] = {}
        """Numbers of the places that ranks were counted in at the start."""
        self._hosts: dict[int, str] = {}
        self._takes_over = True
        """Ranks that were left may come still."""
        self._changed = asyncio.Event()

    @property
    def free(self) -> list[Place]:
        """Where a rank can be started now, in the order in which they were offered."""
        return [place for place in self._places.values() if place.free]

    async def gather(self, ranks: int, address: str, timeout_s: float, say: Callable[[str], None]) -> Cluster:
        """Wait for places for all ranks. Those that were left keep their numbers; others get them so that those of a
        host follow each other. Raises StartError, saying which are there."""
        began, told = time.monotonic(), -1
        end = began + timeout_s
        while True:
            free, left = self.free, self._left(ranks)
            waited = not left or len(left) == ranks or time.monotonic() - began > SPARE_S
            if len(free) >= ranks and waited:
                break
            here = ", ".join(sorted(place.host for place in free)) or "none"
            text = f"{ranks - len(free)} of {ranks} ranks are missing (here: {here})"
            if len(free) < ranks and len(free) != told:
                told = len(free)
                say(f"{text}; `moejax rank --join HOST:PORT` lets one in, this front listens on {address}")
            self._changed.clear()
            try:
                async with asyncio.timeout((end if len(free) < ranks else began + SPARE_S) - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                if len(free) >= ranks:
                    continue
                raise StartError(f"{text} after {timeout_s:.0f} s. Start them, or serve with fewer --ranks.") from None
        others = [place for place in free if place not in left.values()][: ranks - len(left)]
        others.sort(key=lambda place: (place.rack, place.host, place.number))
        numbers = (rank for rank in range(ranks) if rank not in left)
        chosen = left | dict(zip(numbers, others, strict=True))
        self._meant = {rank: place.number for rank, place in chosen.items()}
        devices = tuple(Device(id=i, host=chosen[i].host, rack=chosen[i].rack) for i in range(ranks))
        return Cluster(name="joined", devices=devices, hardware=Hardware())

    def start(self, rank: int, front: str, ended: Ended) -> RankProcess:
        """See `Launcher.start`. Without a free place the rank waits for one."""
        self._numbers += 1
        kept = KeptRank(rank, self._numbers, ended)
        self._waiting.append(kept)
        self._fill()
        if kept.waits:
            SERVER.warning("rank %d waits for a place: none of %d is free", rank, len(self._places))
        return kept

    def left(self) -> Mapping[int, Callable[[Ended], RankProcess]]:
        """See `Launcher.left`. What else was left is ended."""
        self._takes_over = False
        left = {rank: place for rank, place in self._left().items() if self._meant.get(rank) == place.number}
        for place in self._places.values():
            if place not in left.values():
                self._end_left(place)
        return {rank: functools.partial(self._take_over, place) for rank, place in left.items()}

    def _left(self, ranks: int | None = None) -> dict[int, Place]:
        """The places with ranks that were left, below this number: one for each."""
        there = ((place.left.rank, place) for place in self.free if place.left is not None)
        return {rank: place for rank, place in there if ranks is None or rank < ranks}

    def _take_over(self, place: Place, ended: Ended) -> RankProcess:
        left, place.left = place.left, None
        assert left is not None
        kept = KeptRank(left.rank, left.incarnation, ended, left.token)
        kept.pid = left.pid
        kept.be_in(place)
        self._hosts[kept.rank] = place.host
        return kept

    def _end_left(self, place: Place) -> None:
        if place.left is not None:
            order = link_pb2.SignalRank(incarnation=place.left.incarnation, name="SIGKILL")
            place.orders.put_nowait(link_pb2.PlaceOrder(signal=order))
            place.left = None

    async def Keep(
        self, reports: AsyncIterator[link_pb2.PlaceReport], context: Any
    ) -> AsyncIterator[link_pb2.PlaceOrder]:
        """A host offers a place."""
        told = (await first_report(reports, context)).place
        why_not = self._why_not(told.token, time.time())
        if why_not is not None:
            SERVER.warning("%s (%s) may keep no place: %s", told.host or UNKNOWN, context.peer(), why_not)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, why_not)
        if told.build != build():
            text = f"this host has moejax {told.build}, the front has {build()}. Install the same on every host."
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        self._numbers = 1 + max(self._numbers, told.left.incarnation if told.left.incarnation < _MOST else 0)
        place = self._places[self._numbers] = Place(self._numbers, told, context.peer())
        place.orders.put_nowait(self._prepare)
        listener = asyncio.create_task(self._listen(place, reports))
        try:
            while (order := await place.orders.get()) is not None:
                yield order
            if place.trouble:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, place.trouble)
        finally:
            listener.cancel()
            self._leave(place)

    async def _listen(self, place: Place, reports: AsyncIterator[link_pb2.PlaceReport]) -> None:
        try:
            async for report in reports:
                self._hear(place, report)
        except grpc.RpcError:
            pass
        finally:
            place.orders.put_nowait(None)

    def _hear(self, place: Place, report: link_pb2.PlaceReport) -> None:
        what, kept = report.WhichOneof("what"), place.rank
        if what == "prepared":
            self._welcome(place, report.prepared)
        elif what == "started" and kept is not None and kept.incarnation == report.started.incarnation:
            kept.pid = report.started.pid
        elif what == "ended" and kept is not None and kept.incarnation == report.ended.incarnation:
            place.rank = None
            code = report.ended.code
            killed = code == -9
            kept.over(f"process ended with {_how(code)}", "" if killed else f"on {place.host}: {report.ended.said}")
            self._fill()
        elif what == "ended" and place.left is not None and place.left.incarnation == report.ended.incarnation:
            place.left = None
            self._changed.set()

    def _welcome(self, place: Place, told: link_pb2.ModelPrepared) -> None:
        """The host has the model, or says why not."""
        ours, trouble = self._model, told.error
        if not trouble and (told.config, told.content) != (ours.config, ours.content):
            trouble = f"its {ours.name} is another than the front's: the configuration or the weights differ"
        if trouble:
            place.trouble = trouble
            SERVER.warning("%s (%s) can keep no place: %s", place.host, place.peer, trouble)
            place.orders.put_nowait(None)
            return
        if told.numerics != ours.numerics:
            SERVER.warning(
                "%s computes other last bits than the front's machine (processor, kernels or jax differ): a request "
                "that moves between unlike hosts may go on with other tokens",
                place.host,
            )
        place.home = Home(
            host=place.host, rack=place.rack, store=told.store, executables=told.executables, disk=told.disk
        )
        SERVER.info("a place on %s%s", place.host, f", rack {place.rack}" if place.rack else "")
        if not self._takes_over:
            self._end_left(place)
        self._fill()

    def _leave(self, place: Place) -> None:
        self._places.pop(place.number, None)
        kept, place.rank = place.rank, None
        if kept is not None:
            kept.over(f"the stream of {place.host} broke")
        if place.home is not None:
            SERVER.warning("%s keeps its place no more", place.host)

    def _fill(self) -> None:
        """Ranks that wait get places: the one meant for them, one of the host they were on, or any."""
        self._changed.set()
        still: list[KeptRank] = []
        for kept in self._waiting:
            free = self.free
            if kept.waits and free:
                kept.take(min(free, key=lambda place, rank=kept.rank: self._distance(place, rank)))
                assert kept.place is not None
                self._hosts[kept.rank] = kept.place.host
            elif kept.waits:
                still.append(kept)
        self._waiting = collections.deque(still)

    def _distance(self, place: Place, rank: int) -> tuple[bool, bool, bool, int]:
        meant = set(self._meant.values()) - {self._meant.get(rank)}
        host = self._hosts.get(rank)
        return (place.number != self._meant.get(rank), place.host != host, place.number in meant, place.number)


def at_home(cluster: Cluster, rank: int, home: Home) -> Cluster:
    """The same cluster with a rank where it is now."""
    devices = (dataclasses.replace(d, host=home.host, rack=home.rack) if d.id == rank else d for d in cluster.devices)
    return dataclasses.replace(cluster, devices=tuple(devices))


def placed(plan: Plan, cluster: Cluster) -> Plan:
    """The same plan with its ranks where they are now: it may have been made before one moved."""
    now = {device.id: device for device in cluster.devices}
    ranks = (dataclasses.replace(r, host=now[r.id].host, rack=now[r.id].rack) for r in plan.ranks)
    return dataclasses.replace(plan, ranks=tuple(ranks))


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
