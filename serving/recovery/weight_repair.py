"""Finds damaged weights on ranks, and has them loaded again between two steps."""

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from serving.engine import migration
from serving.engine.batch import Batch, layout
from serving.engine.state import EngineState
from serving.errors import Internal, MoejaxError
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover
from serving.recovery.lost_experts import Slot

MAX_NON_FINITE = 2
"""Times that the values of a request may be not finite, with all weights intact, before the request is ended."""


class RepairedServer(Protocol):
    """The parts of the engine's loop that the repair of weights uses."""

    state: EngineState
    events: EventLog
    failover: Failover
    executor: RankExecutor

    def wake(self) -> None:
        """Make the loop look again at what is due."""
        ...

    def plan_adopted(self) -> None:
        """Take the plan that was put into force into the engine's state."""
        ...

    def fail_request(self, request_id: str, error: MoejaxError) -> None:
        """End a request with an error."""
        ...


class WeightRepair:
    """The damaged weights of one server, until they are loaded again. `recompute` has the requests of ranks computed
    again."""

    def __init__(self, server: RepairedServer, recompute: Callable[[Collection[int]], None]) -> None:
        self._server = server
        self._recompute = recompute
        self.damaged_slots: set[Slot] = set()
        self.experts_restored = 0
        self._values_suspect = False
        self._non_finite_counts: dict[str, int] = {}

    def on_lost(self, ranks: Collection[int]) -> None:
        """Ranks were lost, and their damaged weights with them."""
        self.damaged_slots = {slot for slot in self.damaged_slots if slot[0] not in ranks}

    async def reload_damaged(self) -> None:
        """Reload damaged experts, from another copy or from the store by the policy for lost experts. Raises
        RankLost or CommandFailed."""
        server, slots = self._server, set(self.damaged_slots)
        await server.failover.adoption.reload_damaged(slots)
        self.damaged_slots -= slots
        if self._values_suspect:  # entries computed with finite but wrong weights look like all others
            server.state, self._values_suspect = migration.invalidate_caches(server.state), False
        self.experts_restored += len(slots)
        server.plan_adopted()
        server.events.emit(EventKind.RESTORED, server.failover.epoch, message=f"{len(slots)} experts")

    def record_inspection(self, rank: int, answer: link_pb2.Done) -> None:
        """Take in the result of an inspection of a rank's weights."""
        server, epoch = self._server, self._server.failover.epoch
        slots = {(rank, slot.layer, slot.slot) for slot in answer.missing}
        if slots:
            named = ", ".join(f"layer {slot.layer} expert {slot.expert}" for slot in answer.missing[:8])
            server.events.emit(
                EventKind.DAMAGED, epoch, rank=rank, message=f"weights that are not those of the store: {named}"
            )
            self.damaged_slots |= slots
            server.wake()
        if answer.damaged:
            server.events.emit(
                EventKind.DAMAGED, epoch, rank=rank, message=f"weights that every rank has: {answer.trouble}"
            )
            cause = Cause("error", f"damaged weights: {answer.trouble}")
            server.executor.declare(rank, cause, clock.now())

    async def on_non_finite(self, batch: Batch, rows: Mapping[int, tuple[int, ...]]) -> None:
        """A step had values that are not finite in `rows` by rank, and was not applied. Inspect the experts and, where
        these are intact, all other weights, which takes longer. Where all weights are intact the KV cache may be wrong:
        the requests concerned are computed again, and ended when that does not help."""
        server = self._server
        epoch, found = server.failover.epoch, len(self.damaged_slots)
        concerned = {request for rank, bad in rows.items() for request in _requests_of(batch, rank, bad)}
        ranks = ", ".join(map(str, sorted(rows)))
        server.events.emit(EventKind.POISONED, epoch, message=f"{len(concerned)} requests on ranks {ranks}; not sent")
        alive, plan = server.failover.plan_ranks, server.failover.plan
        slots = plan.moe_layers * plan.slots_per_rank if plan is not None else 0
        for inspect in (link_pb2.Inspect(count=slots), link_pb2.Inspect()) if slots else (link_pb2.Inspect(),):
            answers = await server.executor.call_all("inspect", dict.fromkeys(alive, inspect))
            for rank, answer in zip(alive, answers, strict=True):
                self.record_inspection(rank, answer)
            if len(self.damaged_slots) > found or any(answer.damaged for answer in answers):
                return
        self._recompute({rank for rank in rows if rank in alive})
        for request_id in concerned:
            self._non_finite_counts[request_id] = self._non_finite_counts.get(request_id, 0) + 1
        again = [request_id for request_id in concerned if self._non_finite_counts[request_id] > MAX_NON_FINITE]
        for request_id in again:
            error = Internal(f"request {request_id} gives no numbers with this model, whose weights are intact.")
            server.fail_request(request_id, error)
        self._non_finite_counts = {
            key: n for key, n in self._non_finite_counts.items() if server.state.find(key) and key not in again
        }

    async def inspect_next(self, number: int) -> None:
        """Inspect slot `number` of every rank, between its steps."""
        server = self._server
        for rank in server.failover.plan_ranks:
            try:
                answer = await server.executor.call(rank, "inspect", link_pb2.Inspect(first=number, count=1))
            except (RankLost, CommandFailed):
                continue
            if rank in server.failover.plan_ranks and (answer.missing or answer.damaged):
                self._values_suspect = True
                self.record_inspection(rank, answer)


def _requests_of(batch: Batch, rank: int, rows: tuple[int, ...]) -> set[str]:
    """The ids of the requests that these rows of a rank belong to."""
    bad, found = set(rows), set()
    for work, first, _ in layout(batch.bucket, batch.scheduled.get(rank, ())):
        if bad.intersection(range(first, first + work.rows)):
            found.add(work.request_id)
    return found
