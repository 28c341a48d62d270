"""Planned changes, carried out between two steps: drains, pauses, scaling, and the reload of damaged weights.

An instruction from any surface only notes down what is wanted; `run` carries it out while no step is in flight. When
the loss of a rank interrupts it, it is still noted down and goes on after the recovery.
"""

import asyncio
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from serving.engine import migration
from serving.engine.sequence import Sequence
from serving.errors import NoCapacity
from serving.executor.failure_detector import Cause
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventKind
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.recovery.membership import Leaving
from serving.recovery.membership_events import LeaveRefused, LeaveRequested, Released, TakenOut
from serving.recovery.weight_repair import RepairedServer, WeightRepair
from serving.recovery.weights_update import UpdatedServer, WeightsUpdate

MOVE_BUDGET_S = 0.02
"""Seconds for which requests are moved between two steps; one request at least."""
POLL_S = 0.02
"""Seconds between two looks whether an instruction is done."""
MOVE_ENTRIES = 256
"""KV entries in one message."""
PREPARE_TIMEOUT_S = 20.0
"""Seconds that a rank without requests waits for the mesh without it to be prepared."""


class MaintainedServer(RepairedServer, UpdatedServer, Protocol):
    """The parts of the engine's loop that maintenance uses."""

    @property
    def stepping(self) -> bool:
        """True when results of a step are still to come."""
        ...

    def replace(self, rank: int) -> None:
        """Start a rank beside the steps."""
        ...


class Maintenance:
    """The changes that are to be made to one server, until they are made."""

    def __init__(self, server: MaintainedServer) -> None:
        self._server = server
        self.paused = False
        self.error_levels: dict[int, int] = {}
        self.repair = WeightRepair(server, self._request_recompute)
        self.weights = WeightsUpdate(server)
        self._recompute: set[int] = set()

    @property
    def leaving(self) -> Mapping[int, Leaving]:
        """The ranks that are LEAVING."""
        return self._server.failover.membership.leaving

    @property
    def closed_ranks(self) -> set[int]:
        """The ranks that get no new requests: LEAVING ranks, and ranks that lose their tensor group with them."""
        failover = self._server.failover
        going = set(failover.plan_ranks).intersection(self.leaving)
        return failover.adoption.affected_by(going) if going else going

    @property
    def pending(self) -> bool:
        """True when `run` has something to do beside the ranks that are leaving."""
        return bool(self._recompute or self.repair.damaged_slots)

    async def apply(self, instruction: Instruction, hosts: Mapping[int, str]) -> None:
        """Carry out an instruction; returns when it is done. Raises InvalidRequest, NoCapacity or Conflict."""
        server, action = self._server, instruction.action
        if action == "weights":
            await self.weights.apply(instruction)
            return
        if action in ("pause", "retry"):
            self.paused = action == "pause"
            if action == "retry":
                server.failover.adoption.retry_unreadable()
                membership = server.failover.membership
                for rank in hosts:
                    if membership.can_start(rank) and not membership.is_out(rank):
                        server.replace(rank)
            server.events.emit(EventKind.PAUSED if self.paused else EventKind.RESUMED, server.failover.epoch)
            server.wake()
            while self.paused and server.stepping:  # a pause is done when nothing moves any more
                await asyncio.sleep(POLL_S)
            return
        serving = [rank for rank in server.failover.plan_ranks if rank not in self.leaving]
        ranks = instruction.select_ranks(hosts, serving)
        if action == "scale_up":
            for rank in ranks:
                server.replace(rank)
            while any(server.failover.membership.is_incoming(rank) for rank in ranks):
                await asyncio.sleep(POLL_S)
            return
        left = sorted(set(serving).difference(ranks))
        if ranks and (why := server.failover.plans.why_infeasible(left)):
            raise NoCapacity(f"{action} of {list(ranks)} would leave ranks {left}: {why}")
        for rank in ranks:
            self.leave(rank, action, replace=instruction.replace, timeout_s=instruction.timeout_s)
        while any(rank in self.leaving for rank in ranks):
            await asyncio.sleep(POLL_S)

    def leave(self, rank: int, cause: str, *, replace: bool, timeout_s: float = 30.0) -> None:
        """Have a rank leave once its requests have moved."""
        now = clock.now()
        self._server.failover.state.record(LeaveRequested(rank, Leaving(cause, replace, now + timeout_s, now)))

    def report(self, error: DeviceError) -> ErrorResponse:
        """Take note of a device's error, and begin the response to its level."""
        server, response = self._server, error.response
        self.error_levels[error.rank] = error.level
        server.events.emit(
            EventKind.DEVICE_ERROR, server.failover.epoch, rank=error.rank, cause=str(error), message=response.value
        )
        if error.rank not in server.failover.plan_ranks:
            return response
        if response is ErrorResponse.RECOMPUTE:
            self._request_recompute({error.rank})
            server.wake()
        elif response is ErrorResponse.DRAIN:
            self.leave(error.rank, str(error), replace=True)
        elif response in (ErrorResponse.RESTART, ErrorResponse.ISOLATE):
            if response is ErrorResponse.ISOLATE:
                server.failover.state.record(TakenOut(error.rank))
            server.executor.declare(error.rank, Cause("error", str(error)), clock.now())
        return response

    def on_lost(self, ranks: set[int]) -> None:
        """Ranks were lost: drop what was to be done for them."""
        for rank in ranks:
            self._recompute.discard(rank)
            self.error_levels.pop(rank, None)
        self.repair.on_lost(ranks)

    async def run(self) -> None:
        """Carry out a part of what is wanted: steps wait for it. Raises RankLost, CommandFailed or TimeoutError."""
        server = self._server
        alive = set(server.failover.plan_ranks)
        going: set[int] = set()
        for rank in [rank for rank in self.leaving if rank in alive]:
            if cause := server.failover.plans.why_infeasible(alive - going - {rank}):
                server.events.emit(EventKind.DRAIN_FAILED, server.failover.epoch, rank=rank, cause=cause)
                server.failover.state.record(LeaveRefused(rank))
            else:
                going.add(rank)
        server.state = migration.close_ranks(server.state, self.closed_ranks)
        if self._recompute:
            ranks, self._recompute = self._recompute, set()
            server.state = migration.requeue_ranks(server.state, ranks)
        if self.repair.damaged_slots:
            await self.repair.reload_damaged()
        if self.leaving:
            await self._evacuate()

    def _request_recompute(self, ranks: Collection[int]) -> None:
        """Have the requests of these ranks computed again."""
        self._recompute.update(ranks)

    # -- Drains -------------------------------------------------------------------------------------------------

    async def _evacuate(self) -> None:
        """Move requests of LEAVING ranks; release the ranks that have none left."""
        server, began = self._server, clock.now()
        for sequence in migration.leaving_sequences(server.state):
            is_here = sequence.id in server.state.running
            if is_here and (moved := migration.place_elsewhere(server.state, sequence.id)) is not None:
                server.state = migration.free_places(server.state, moved)
                await self._copy_kv(sequence, moved)
                server.state = migration.move(server.state, sequence, moved)
            if clock.now() - began > MOVE_BUDGET_S:
                break
        affected_by = server.failover.adoption.affected_by
        late = [rank for rank, leaving in self.leaving.items() if began > leaving.until]
        server.state = migration.requeue_ranks(server.state, affected_by(late) if late else ())
        occupied = {sequence.rank for sequence in server.state.running.values()}
        empty = {rank: leaving for rank, leaving in self.leaving.items() if occupied.isdisjoint(affected_by([rank]))}
        if not empty or not occupied.isdisjoint(affected_by(empty)):
            return
        overdue = any(began > leaving.until + PREPARE_TIMEOUT_S for leaving in empty.values())
        if server.failover.preparation.is_prepared_without(empty) or overdue:
            await self._release(empty)

    async def _release(self, empty: dict[int, Leaving]) -> None:
        server = self._server
        phases = await server.failover.release(empty)
        for rank, leaving in empty.items():
            server.failover.state.record(Released(rank))
            total = 1e3 * (clock.now() - leaving.asked_at)
            server.executor.declare(rank, Cause("drained", leaving.cause), clock.now())
            server.events.emit(
                EventKind.DRAINED,
                server.failover.epoch,
                rank=rank,
                cause=leaving.cause,
                phases=phases | {"total": total},
            )
            if leaving.replace:
                server.replace(rank)
        server.plan_adopted()

    async def _copy_kv(self, before: Sequence, after: Sequence) -> None:
        """Copy the KV entries of a request from the pages it had to those it gets, and the state that its next step
        reads."""
        executor = self._server.executor
        failover = self._server.failover
        assert before.rank is not None
        assert after.rank is not None
        places = zip(
            failover.adoption.kv_locations(before.rank, before.pages),
            failover.adoption.kv_locations(after.rank, after.pages),
            strict=True,
        )
        for (source, there), (target, here) in places:
            for first in range(0, before.computed, MOVE_ENTRIES):
                count = min(MOVE_ENTRIES, before.computed - first)
                read = link_pb2.ReadCache(pages=there, first=first, count=count)
                rows = (await executor.call(source, "read_cache", read)).rows
                tokens = np.array(before.tokens(first, first + count), np.int32).tobytes()
                write = link_pb2.WriteCache(pages=here, first=first, count=count, rows=rows, tokens=tokens)
                await executor.call(target, "write_cache", write)
        if before.states is not None and after.states is not None:
            (there, _), (here, _) = before.states, after.states
            rows = (await executor.call(before.rank, "read_cache", link_pb2.ReadCache(state=there))).rows
            await executor.call(after.rank, "write_cache", link_pb2.WriteCache(state=here, rows=rows))
