"""The host pool: slots for ranks that other hosts offer (`moejax rank --join`), and the starter of ranks there.

A slot is free for a rank once its host agent has shown a valid join token and has the same model and the same moejax
as the front. A rank there is a process of the host agent: the front orders its start and, as the fence, SIGKILL.

When that order does not arrive, the network is cut or the host is gone, and nothing the rank still does reaches any
other process: the front has closed the rank's stream, the survivors shut down their ends of its collectives, its token
is valid once for each front, and whatever it sent would be of an old epoch. When the host is reachable again, both the
rank and its agent get the order to end it.

A rank whose front is gone is an orphan and waits for the next front. That front first takes slots with such ranks.
"""

import asyncio
import collections
import dataclasses
import functools
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any

import grpc

from planner.inputs.cluster import Cluster, Device, Hardware
from planner.plan.plan import Plan
from serving.errors import StartError
from serving.launch.host_slot import MAX_INCARNATION, UNKNOWN_HOST, HostSlot, RemoteRank
from serving.launch.rank_listener import first_report
from serving.launch.rank_process import HostPaths, OnExit, RankProcess, describe_exit
from serving.observability.logs import SERVER
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.versions import HOST, VersionRange
from serving.version import build

ORPHAN_WAIT_S = 3.0
"""Seconds that a front waits for orphans of the last front before it gives their slots to other ranks."""

TokenCheck = Callable[[str, float], str | None]
"""Takes a join token's secret and the time in seconds since the epoch; returns why the token is not valid, or None."""


class HostPool:
    """All slots that host agents keep for this front. It is the `RankStarter` of ranks on joined hosts."""

    def __init__(self, model: PreparedModel, order: link_pb2.PrepareModel, token_check: TokenCheck) -> None:
        self._model = model
        self._prepare = link_pb2.PlaceOrder(prepare=order)
        self._token_check = token_check
        self._slots: dict[int, HostSlot] = {}
        self._last_number = 0
        """The last number that a slot or an incarnation got."""
        self._waiting: collections.deque[RemoteRank] = collections.deque()
        self._assigned: dict[int, int] = {}
        """The number of the slot that each rank was counted in at the start."""
        self._hosts: dict[int, str] = {}
        """The host that each rank was last on."""
        self._adopts_orphans = True
        self.own_streams = False
        """Whether every rank has a stream of its own, also on hosts whose agents could pass them on as one."""
        self._changed = asyncio.Event()

    @property
    def free(self) -> list[HostSlot]:
        """Slots in which a rank can be started now, in the order in which they were offered."""
        return [slot for slot in self._slots.values() if slot.is_free]

    async def wait_for_slots(self, ranks: int, address: str, timeout_s: float, log: Callable[[str], None]) -> Cluster:
        """Wait for slots for all ranks. Orphans keep their rank number; other slots are numbered so that ranks of one
        host follow each other. Raises StartError, saying which hosts are there."""
        began, last_logged = time.monotonic(), -1
        while True:
            free, orphans = self.free, self._orphans(ranks)
            waited_s = time.monotonic() - began
            if len(free) >= ranks and (not orphans or len(orphans) == ranks or waited_s > ORPHAN_WAIT_S):
                break
            hosts = ", ".join(sorted(slot.host for slot in free)) or "none"
            text = f"{ranks - len(free)} of {ranks} ranks are missing (here: {hosts})"
            if len(free) < ranks and len(free) != last_logged:
                last_logged = len(free)
                log(f"{text}; `moejax rank --join HOST:PORT` lets one in, this front listens on {address}")
            self._changed.clear()
            try:
                async with asyncio.timeout((timeout_s if len(free) < ranks else ORPHAN_WAIT_S) - waited_s):
                    await self._changed.wait()
            except TimeoutError:
                if len(free) >= ranks:
                    continue
                raise StartError(f"{text} after {timeout_s:.0f} s. Start them, or serve with fewer --ranks.") from None
        return self._assign_ranks(ranks, free, orphans)

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """See `RankStarter.start`. Without a free slot the rank waits for one."""
        self._last_number += 1
        process = RemoteRank(rank, self._last_number, on_exit)
        self._waiting.append(process)
        self._start_waiting()
        if process.is_waiting:
            SERVER.warning("rank %d waits for a slot: none of %d is free", rank, len(self._slots))
        return process

    def orphans(self, ranks: Collection[int] | None = None) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """See `RankStarter.orphans`; of a pool those of its `ranks`. Orphans that nobody takes over are killed, and the
        slots of the others are theirs until they are taken over."""
        self._adopts_orphans = False
        orphans = {rank: slot for rank, slot in self._orphans().items() if self._assigned.get(rank) == slot.number}
        for slot in self._slots.values():
            if slot not in orphans.values():
                slot.kill_orphan()
        return {
            rank: functools.partial(self._take_over, slot)
            for rank, slot in orphans.items()
            if ranks is None or rank in ranks
        }

    async def Keep(
        self, reports: AsyncIterator[link_pb2.PlaceReport], context: Any
    ) -> AsyncIterator[link_pb2.PlaceOrder]:
        """The gRPC method that a host agent calls to offer a slot."""
        offer = (await first_report(reports, context)).place
        refusal = self._refusal(offer.token, offer.build, offer.host, context.peer())
        if refusal is not None:
            await context.abort(*refusal)
        orphan = offer.left.incarnation if offer.left.incarnation < MAX_INCARNATION else 0
        self._last_number = 1 + max(self._last_number, orphan)
        slot = self._slots[self._last_number] = HostSlot(self._last_number, offer, context.peer())
        slot.orders.put_nowait(self._prepare)
        listener = asyncio.create_task(self._receive_all(slot, reports))
        try:
            while (order := await slot.orders.get()) is not None:
                yield order
            if slot.refusal:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, slot.refusal)
        finally:
            listener.cancel()
            self._remove(slot)

    def refusal_of(self, hello: link_pb2.HostHello, peer: str) -> tuple[grpc.StatusCode, str] | None:
        """Why a host agent may not pass on what its ranks and this front send each other; None if it may."""
        theirs = VersionRange(hello.oldest, hello.newest)
        if HOST.common_with(theirs) is None:
            text = f"this host agent speaks version {theirs} of the host protocol, and the front version {HOST}."
            SERVER.warning("%s (%s) may not pass on ranks: %s", hello.host or UNKNOWN_HOST, peer, text)
            return grpc.StatusCode.FAILED_PRECONDITION, f"{text} Install the same moejax on every host."
        return self._refusal(hello.token, hello.build, hello.host, peer)

    def _refusal(self, token: str, theirs: str, host: str, peer: str) -> tuple[grpc.StatusCode, str] | None:
        """Why a host agent with this join token and code may not take part; None if it may."""
        rejection, code = self._token_check(token, time.time()), grpc.StatusCode.UNAUTHENTICATED
        if rejection is None and theirs != build():
            rejection = f"this host has moejax {theirs}, the front has {build()}. Install the same on every host."
            code = grpc.StatusCode.FAILED_PRECONDITION
        if rejection is None:
            return None
        SERVER.warning("%s (%s) may not offer a slot: %s", host or UNKNOWN_HOST, peer, rejection)
        return code, rejection

    async def _receive_all(self, slot: HostSlot, reports: AsyncIterator[link_pb2.PlaceReport]) -> None:
        try:
            async for report in reports:
                self._receive(slot, report)
        except grpc.RpcError:
            pass
        finally:
            slot.orders.put_nowait(None)

    def _receive(self, slot: HostSlot, report: link_pb2.PlaceReport) -> None:
        kind, rank = report.WhichOneof("what"), slot.rank
        if kind == "prepared":
            self._model_prepared(slot, report.prepared)
        elif kind == "started" and rank is not None and rank.incarnation == report.started.incarnation:
            rank.pid = report.started.pid
        elif kind == "condition":
            slot.condition = report.condition
        elif kind == "ended" and rank is not None and rank.incarnation == report.ended.incarnation:
            slot.rank = None
            rank.exit_code = code = report.ended.code
            killed = code == -signal.SIGKILL
            rank.mark_ended(describe_exit(code, ""), "" if killed else f"on {slot.host}: {report.ended.said}")
            self._start_waiting()
        elif kind == "ended" and slot.orphan is not None and slot.orphan.incarnation == report.ended.incarnation:
            slot.orphan = None
            self._start_waiting()

    def _model_prepared(self, slot: HostSlot, theirs: link_pb2.ModelPrepared) -> None:
        """Free a slot whose host has the front's model; refuse a host that has another or none."""
        ours, refusal = self._model, theirs.error
        if not refusal and (_shared(theirs.config), theirs.content) != (_shared(ours.config), ours.content):
            refusal = f"its {ours.name} is another than the front's: the configuration or the weights differ"
        if refusal:
            slot.refusal = refusal
            SERVER.warning("%s (%s) cannot offer a slot: %s", slot.host, slot.peer, refusal)
            slot.orders.put_nowait(None)
            return
        if theirs.numerics != ours.numerics:
            SERVER.warning(
                "%s computes other last bits than the front's machine (processor, kernels or jax differ): a request "
                "that moves between unlike hosts may continue with other tokens",
                slot.host,
            )
        slot.host_paths = HostPaths(
            host=slot.host, rack=slot.rack, store=theirs.store, executables=theirs.executables, disk=theirs.disk
        )
        SERVER.info("a slot on %s%s", slot.host, f", rack {slot.rack}" if slot.rack else "")
        if not self._adopts_orphans:
            slot.kill_orphan()
        self._start_waiting()

    def _remove(self, slot: HostSlot) -> None:
        """Forget a slot whose stream has ended, and report the loss of the rank in it."""
        self._slots.pop(slot.number, None)
        rank, slot.rank = slot.rank, None
        if rank is not None:
            rank.mark_ended(f"the stream of {slot.host} broke")
        if slot.host_paths is not None:
            SERVER.warning("%s has withdrawn its slot", slot.host)

    def _assign_ranks(self, ranks: int, free: list[HostSlot], orphans: dict[int, HostSlot]) -> Cluster:
        """Give each rank number a slot; the cluster that these slots make."""
        others = [slot for slot in free if slot not in orphans.values()][: ranks - len(orphans)]
        others.sort(key=lambda slot: (slot.rack, slot.host, slot.number))
        numbers = (rank for rank in range(ranks) if rank not in orphans)
        assigned = orphans | dict(zip(numbers, others, strict=True))
        self._assigned = {rank: slot.number for rank, slot in assigned.items()}
        devices = tuple(Device(id=i, host=assigned[i].host, rack=assigned[i].rack) for i in range(ranks))
        return Cluster(name="joined", devices=devices, hardware=Hardware())

    def _orphans(self, ranks: int | None = None) -> dict[int, HostSlot]:
        """The slot of each orphan whose rank number is below `ranks`. Of two with one number the last one counts."""
        found = ((slot.orphan.rank, slot) for slot in self.free if slot.orphan is not None)
        return {rank: slot for rank, slot in found if ranks is None or rank < ranks}

    def _take_over(self, slot: HostSlot, on_exit: OnExit) -> RankProcess:
        orphan, slot.orphan = slot.orphan, None
        assert orphan is not None
        process = RemoteRank(orphan.rank, orphan.incarnation, on_exit, orphan.token)
        process.pid = orphan.pid
        process.bind(slot)
        self._hosts[orphan.rank] = slot.host
        return process

    def _start_waiting(self) -> None:
        """Start waiting ranks in free slots, each in the slot it prefers."""
        self._changed.set()
        still_waiting: collections.deque[RemoteRank] = collections.deque()
        for process in self._waiting:
            free = [slot for slot in self.free if slot.orphan is None]
            if process.is_waiting and free:
                slot = min(free, key=lambda slot, rank=process.rank: self._preference(slot, rank))
                process.start_in(slot, own_stream=self.own_streams)
                self._hosts[process.rank] = slot.host
            elif process.is_waiting:
                still_waiting.append(process)
        self._waiting = still_waiting

    def _preference(self, slot: HostSlot, rank: int) -> tuple[bool, bool, bool, int]:
        """The sort key of a slot for a rank: first the slot assigned to it, then one on the host it was last on, then
        one that is assigned to no other rank."""
        others = set(self._assigned.values()) - {self._assigned.get(rank)}
        is_own, is_same_host = slot.number == self._assigned.get(rank), slot.host == self._hosts.get(rank)
        return (not is_own, not is_same_host, slot.number in others, slot.number)


def _shared(config: str) -> dict[str, Any]:
    """The part of a configuration that hosts and front have alike: a front serves contexts of its own length."""
    values = json.loads(config)
    values.pop("max_context", None)
    return values


def with_rank_moved(cluster: Cluster, rank: int, host_paths: HostPaths) -> Cluster:
    """The same cluster with a rank on the host where it is now."""
    here = {"host": host_paths.host, "rack": host_paths.rack}
    devices = (dataclasses.replace(device, **here) if device.id == rank else device for device in cluster.devices)
    return dataclasses.replace(cluster, devices=tuple(devices))


def with_current_hosts(plan: Plan, cluster: Cluster) -> Plan:
    """The same plan with its ranks on the hosts of `cluster`: the plan may have been made before a rank moved."""
    now = {device.id: device for device in cluster.devices}
    ranks = (dataclasses.replace(r, host=now[r.id].host, rack=now[r.id].rack) for r in plan.ranks)
    return dataclasses.replace(plan, ranks=tuple(ranks))
