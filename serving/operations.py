"""What is done between two steps because somebody or something asked for it: drains, pauses, damaged weights.

Asking (from any surface) only notes down what is wanted; `tend` carries it out when no step is in flight. Whatever is
cut short by the loss of a rank is still noted down, and goes on after the recovery.
"""

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from serving import drain
from serving.batch import Batch, segments
from serving.engine import EngineState
from serving.errors import Internal, MoejaxError, NoCapacity
from serving.events import EventLog
from serving.failover import Failover
from serving.faults import DeviceError, Instruction, Response
from serving.health import Cause
from serving.links import RankLinks, RankLost, RankRefused
from serving.policy import Slot
from serving.proto.moejax.v1 import link_pb2
from serving.sequence import Sequence

MOVE_BUDGET_S = 0.02
"""How long requests are moved between two steps, one at least."""
WAIT_S = 0.02
MOVE_ENTRIES = 256
"""Cache entries in one message."""
PREPARED_S = 20.0
"""How long a rank that runs nothing any more waits for the mesh without it to be prepared."""
SUSPECT_AGAIN = 2
"""How often a request may come out as no numbers, with all weights intact, before it is the one at fault."""


@dataclasses.dataclass(frozen=True)
class Leaving:
    """A rank that is to go. `until` is when its requests wait no longer for room elsewhere (monotonic)."""

    cause: str
    replace: bool
    until: float
    asked_at: float


class Engine(Protocol):
    """What operations need of the loop that carries them out."""

    state: EngineState
    events: EventLog
    failover: Failover
    links: RankLinks

    @property
    def stepping(self) -> bool:
        """Results of a step are still to come."""
        ...

    def wake(self) -> None:
        """Look again at what is to be done."""
        ...

    def replace(self, rank: int) -> None:
        """Start a rank anew beside the steps."""
        ...

    def is_coming(self, rank: int) -> bool:
        """A rank is being started, or waits to join."""
        ...

    def taken(self) -> None:
        """A plan has come into force."""
        ...

    def end(self, request_id: str, error: MoejaxError) -> None:
        """End a request with an error."""
        ...


class Operations:
    """Planned and found changes of one server, until they are done."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.paused = False
        self.leaving: dict[int, Leaving] = {}
        self.out: set[int] = set()
        """Ranks that are not replaced until somebody scales up."""
        self.levels: dict[int, int] = {}
        self.damaged: set[Slot] = set()
        self.restored = 0
        self._recompute: set[int] = set()
        self._doubtful = False
        self._suspects: dict[str, int] = {}

    @property
    def closed(self) -> set[int]:
        """Ranks that are to have no requests any more: those that leave, and those that cannot attend without them."""
        failover = self._engine.failover
        going = set(failover.alive).intersection(self.leaving)
        return failover.disturbed(going) if going else going

    @property
    def pending(self) -> bool:
        """There is something to carry out."""
        return bool(self.leaving or self._recompute or self.damaged)

    async def apply(self, instruction: Instruction, hosts: Mapping[int, str]) -> None:
        """Carry out an instruction; returns when it is done. Raises InvalidRequest or NoCapacity."""
        engine, action = self._engine, instruction.action
        if action in ("pause", "retry"):
            self.paused = action == "pause"
            if action == "retry":
                engine.failover.ask_again()
                absent = set(hosts) - set(engine.failover.alive) - self.out - engine.failover.newcomers
                for rank in sorted(absent):
                    engine.replace(rank)
            engine.events.add("paused" if self.paused else "resumed", engine.failover.epoch)
            engine.wake()
            while self.paused and engine.stepping:  # a pause is done when nothing moves any more
                await asyncio.sleep(WAIT_S)
            return
        serving = [rank for rank in engine.failover.alive if rank not in self.leaving]
        ranks = instruction.chosen(hosts, serving)
        if action == "scale_up":
            self.out -= set(ranks)
            for rank in ranks:
                engine.replace(rank)
            while any(engine.is_coming(rank) for rank in ranks):
                await asyncio.sleep(WAIT_S)
            return
        left = sorted(set(serving).difference(ranks))
        if ranks and (why := engine.failover.why_not(left)):
            raise NoCapacity(f"{action} of {list(ranks)} would leave ranks {left}: {why}")
        for rank in ranks:
            self.leave(rank, action, replace=instruction.replace, timeout_s=instruction.timeout_s)
        while any(rank in self.leaving for rank in ranks):
            await asyncio.sleep(WAIT_S)

    def leave(self, rank: int, cause: str, *, replace: bool, timeout_s: float = 30.0) -> None:
        """A rank is to go once its requests have moved."""
        if rank in self.leaving:
            return
        now = time.monotonic()
        self.leaving[rank] = Leaving(cause, replace, now + timeout_s, now)
        self._engine.events.add("leaving", self._engine.failover.epoch, rank=rank, cause=cause)
        self._engine.wake()

    def report(self, error: DeviceError) -> Response:
        """Take note of a device's error, and do what its level asks for."""
        engine, response = self._engine, error.response
        self.levels[error.rank] = error.level
        engine.events.add(
            "device_error", engine.failover.epoch, rank=error.rank, cause=str(error), message=response.value
        )
        if error.rank not in engine.failover.alive:
            return response
        if response is Response.RECOMPUTE:
            self._recompute.add(error.rank)
            engine.wake()
        elif response is Response.DRAIN:
            self.leave(error.rank, str(error), replace=True)
        elif response in (Response.RESTART, Response.ISOLATE):
            if response is Response.ISOLATE:
                self.out.add(error.rank)
            engine.links.declare(error.rank, Cause("error", str(error)), time.monotonic())
        return response

    def lost(self, ranks: set[int]) -> None:
        """Ranks died: nothing is left to be done for them."""
        for rank in ranks:
            leaving = self.leaving.pop(rank, None)
            if leaving is not None and not leaving.replace:
                self.out.add(rank)
            self._recompute.discard(rank)
            self.levels.pop(rank, None)
        self.damaged = {slot for slot in self.damaged if slot[0] not in ranks}

    async def tend(self) -> None:
        """Carry out a part of what is wanted, so that steps are not held up for long."""
        engine = self._engine
        alive = set(engine.failover.alive)
        going: set[int] = set()
        for rank in [rank for rank in self.leaving if rank in alive]:
            if cause := engine.failover.why_not(alive - going - {rank}):
                engine.events.add("drain_failed", engine.failover.epoch, rank=rank, cause=cause)
                del self.leaving[rank]
            else:
                going.add(rank)
        engine.state = drain.close(engine.state, self.closed)
        if self._recompute:
            ranks, self._recompute = self._recompute, set()
            engine.state = drain.displace(engine.state, ranks)
        if self.damaged:
            await self._restore()
        if self.leaving:
            await self._evacuate()

    # -- Drains -------------------------------------------------------------------------------------------------

    async def _evacuate(self) -> None:
        """Move requests of leaving ranks; release the ranks that have none left."""
        engine, began = self._engine, time.monotonic()
        for sequence in drain.leaving(engine.state):
            before = engine.state
            moved = drain.move(before, sequence.id) if sequence.id in before.running else None
            if moved is not None:
                await self._copy(sequence, moved[1])
                if engine.state is before:  # else somebody's request ended meanwhile: this one moves the next time
                    engine.state = moved[0]
            if time.monotonic() - began > MOVE_BUDGET_S:
                break
        disturbed = engine.failover.disturbed
        late = [rank for rank, leaving in self.leaving.items() if began > leaving.until]
        engine.state = drain.displace(engine.state, disturbed(late) if late else ())
        occupied = {sequence.rank for sequence in engine.state.running.values()}
        empty = {rank: leaving for rank, leaving in self.leaving.items() if occupied.isdisjoint(disturbed([rank]))}
        if not empty or not occupied.isdisjoint(disturbed(empty)):
            return
        overdue = any(began > leaving.until + PREPARED_S for leaving in empty.values())
        if engine.failover.is_ready_without(empty) or overdue:
            await self._release(empty)

    async def _release(self, empty: dict[int, Leaving]) -> None:
        engine = self._engine
        phases = await engine.failover.release(empty)
        for rank, leaving in empty.items():
            del self.leaving[rank]
            total = 1e3 * (time.monotonic() - leaving.asked_at)
            engine.links.declare(rank, Cause("drained", leaving.cause), time.monotonic())
            engine.events.add(
                "drained", engine.failover.epoch, rank=rank, cause=leaving.cause, phases=phases | {"total": total}
            )
            if leaving.replace:
                engine.replace(rank)
            else:
                self.out.add(rank)
        engine.taken()

    async def _copy(self, before: Sequence, after: Sequence) -> None:
        """The cache entries of a request from the pages it had to those it gets."""
        links = self._engine.links
        failover = self._engine.failover
        assert before.rank is not None
        assert after.rank is not None
        places = zip(failover.places(before.rank, before.pages), failover.places(after.rank, after.pages), strict=True)
        for (source, there), (target, here) in places:
            for first in range(0, before.computed, MOVE_ENTRIES):
                count = min(MOVE_ENTRIES, before.computed - first)
                read = link_pb2.ReadCache(pages=there, first=first, count=count)
                rows = (await links.call(source, "read_cache", read)).rows
                tokens = np.array(before.tokens(first, first + count), np.int32).tobytes()
                write = link_pb2.WriteCache(pages=here, first=first, count=count, rows=rows, tokens=tokens)
                await links.call(target, "write_cache", write)

    # -- Weights ------------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        """Experts whose weights are damaged, from another copy or from the store, by policy."""
        engine, slots = self._engine, set(self.damaged)
        await engine.failover.readopt(slots)
        self.damaged -= slots
        if self._doubtful:  # what was computed with finite but wrong weights cannot be told from the rest
            engine.state, self._doubtful = drain.distrust(engine.state), False
        self.restored += len(slots)
        engine.taken()
        engine.events.add("restored", engine.failover.epoch, message=f"{len(slots)} experts")

    def found_damaged(self, rank: int, answer: link_pb2.Done) -> None:
        """An inspection of a rank's weights has ended."""
        engine, epoch = self._engine, self._engine.failover.epoch
        slots = {(rank, slot.layer, slot.slot) for slot in answer.missing}
        if slots:
            named = ", ".join(f"layer {slot.layer} expert {slot.expert}" for slot in answer.missing[:8])
            engine.events.add("damaged", epoch, rank=rank, message=f"weights that are not those of the store: {named}")
            self.damaged |= slots
            engine.wake()
        if answer.damaged:
            engine.events.add("damaged", epoch, rank=rank, message=f"weights that every rank has: {answer.trouble}")
            cause = Cause("error", f"damaged weights: {answer.trouble}")
            engine.links.declare(rank, cause, time.monotonic())

    async def poisoned(self, batch: Batch, rows: Mapping[int, tuple[int, ...]]) -> None:
        """A step came out as no numbers on some ranks, and was not applied. Inspect the experts and, where these are
        intact, all other weights, which takes longer. Where all are the cache may hold the poison: the requests
        concerned are computed again, and end when that does not help."""
        engine = self._engine
        epoch, found = engine.failover.epoch, len(self.damaged)
        concerned = {request for rank, bad in rows.items() for request in _requests_of(batch, rank, bad)}
        ranks = ", ".join(map(str, sorted(rows)))
        engine.events.add("poisoned", epoch, message=f"{len(concerned)} requests on ranks {ranks}; not sent")
        alive, plan = engine.failover.alive, engine.failover.plan
        slots = plan.moe_layers * plan.slots_per_rank if plan is not None else 0
        for what in (link_pb2.Inspect(count=slots), link_pb2.Inspect()) if slots else (link_pb2.Inspect(),):
            answers = await engine.links.call_all("inspect", dict.fromkeys(alive, what))
            for rank, answer in zip(alive, answers, strict=True):
                self.found_damaged(rank, answer)
            if len(self.damaged) > found or any(answer.damaged for answer in answers):
                return
        self._recompute |= {rank for rank in rows if rank in alive}
        for request_id in concerned:
            self._suspects[request_id] = self._suspects.get(request_id, 0) + 1
        again = [request_id for request_id in concerned if self._suspects[request_id] > SUSPECT_AGAIN]
        for request_id in again:
            error = Internal(f"request {request_id} gives no numbers with this model, whose weights are intact.")
            engine.end(request_id, error)
        self._suspects = {key: n for key, n in self._suspects.items() if engine.state.find(key) and key not in again}

    async def inspect_next(self, number: int) -> None:
        """Inspect slot `number` of every rank, between its steps."""
        engine = self._engine
        for rank in engine.failover.alive:
            try:
                answer = await engine.links.call(rank, "inspect", link_pb2.Inspect(first=number, count=1))
            except (RankLost, RankRefused):
                continue
            if rank in engine.failover.alive and (answer.missing or answer.damaged):
                self._doubtful = True
                self.found_damaged(rank, answer)


def _requests_of(batch: Batch, rank: int, rows: tuple[int, ...]) -> set[str]:
    """Ids of the requests that these rows of a rank's part belong to."""
    bad, found = set(rows), set()
    for work, first, _ in segments(batch.bucket, batch.work.get(rank, ())):
        if bad.intersection(range(first, first + len(work.tokens))):
            found.add(work.request_id)
    return found
