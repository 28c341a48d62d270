"""Restores the KV entries of requests whose rank was lost from its replica, piece by piece between two steps.

A piece is one message to the rank that has the request now. When another loss interrupts a request's restoration it
begins again: its recoverable entries stay in the replica until all of them are in a cache.
"""

import asyncio
import math
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from planner.plan.step_layout import TILE
from serving.engine.batch import Batch
from serving.engine.kv_restore import drop_recoverable, mark_restored, sequences_to_restore
from serving.engine.restore_cost import RestoreCosts, should_restore
from serving.engine.scheduler import reserve_for_restore
from serving.engine.sequence import RecoverableKV, Sequence
from serving.engine.state import EngineState
from serving.executor.executor import RankExecutor
from serving.executor.kv_replica import NotReplicated, entry_indices, piece_entries
from serving.executor.rank_errors import CommandFailed
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover
from serving.recovery.kv_replicas import KVReplicas

MIN_BUDGET_S, MAX_BUDGET_S = 0.03, 0.12
"""Seconds for which requests are restored between two steps, one piece on each rank at least: when a small part of all
requests waits for it, and when all do."""


class RestoringServer(Protocol):
    """The parts of the engine's loop that a restoration uses."""

    state: EngineState
    events: EventLog
    failover: Failover
    executor: RankExecutor


class KVRestoration:
    """Restores what the KV replicas of a server have, and counts the entries restored and computed again."""

    def __init__(self, server: RestoringServer, replicas: KVReplicas) -> None:
        self._server = server
        self.replicas = replicas
        self.costs = RestoreCosts.guess(replicas.entry_bytes)
        self.prompts_go_elsewhere: Callable[[], bool] = lambda: False
        """Whether another pool computes what this one does not restore: its queue and its steps are in no cost that is
        measured here, so all that a replica has is restored."""
        self.restored = 0
        self.recomputed = 0
        self.received = 0
        """Entries of requests that came from another pool."""
        self._piece = piece_entries(replicas.entry_bytes)
        replicas.needs.append(self._needed)
        self._began: float | None = None
        self._requests = 0
        self._tokens = 0

    @property
    def pending(self) -> bool:
        """True when requests wait to be restored."""
        return bool(sequences_to_restore(self._server.state))

    @property
    def in_progress(self) -> bool:
        """True when entries can be copied now: a request to restore has pages on a rank."""
        return any(sequence.restoring for sequence in self._server.state.running.values())

    @property
    def serial_prefill(self) -> bool:
        """Whether prompts that fit the smallest bucket are computed one after the other rather than together."""
        least = min(bucket.tiles for bucket in self._server.state.limits.buckets if bucket.tiles)
        return self.costs.serial_prefill(TILE * least)

    def record_step(self, batch: Batch, seconds: float) -> None:
        """Take the seconds of a step into the estimates of costs."""
        tokens = max(sum(len(work.tokens) for work in part if work.tiles) for part in batch.scheduled.values())
        self.costs = self.costs.with_step(tokens, seconds)

    def recoverable_of(self, ranks: set[int]) -> tuple[dict[str, RecoverableKV], int]:
        """The KV entries to restore of the requests of lost ranks, by request, and the number of their entries that are
        computed again instead."""
        state = self._server.state
        found: dict[str, RecoverableKV] = {}
        again = 0
        for sequence in state.running.values():
            if sequence.rank not in ranks or sequence.restoring:
                continue
            sequence = sequence.without_in_flight()
            recoverable = self.replicas.recoverable(sequence, state.limits.page_size)
            if recoverable is not None and self._should_restore(sequence, recoverable, ranks):
                found[sequence.id] = recoverable
            again += sequence.computed - (recoverable.count if sequence.id in found and recoverable is not None else 0)
        self.recomputed += again
        return found, again

    def _should_restore(self, sequence: Sequence, recoverable: RecoverableKV, dead: set[int]) -> bool:
        if self.prompts_go_elsewhere():
            return True
        state = self._server.state
        pools = [pool for rank, pool in state.pools.items() if rank not in dead]
        others = any(other.rank not in dead for other in state.running.values())
        found = (
            max((len(pool.match(recoverable.page_keys or ())) for pool in pools), default=0) * state.limits.page_size
        )
        tiles = state.limits.tiles_while_decoding if others else state.limits.max_tiles
        return should_restore(
            self.costs,
            sequence.length,
            recoverable.count,
            found=found,
            chunk=TILE * min(tiles, state.limits.max_tiles),
            piece=self._piece,
            budget_s=self._budget_s(sum(other.rank in dead for other in state.running.values())),
        )

    def _budget_s(self, waiting: int) -> float:
        """Seconds to restore for between two steps when `waiting` requests wait for it: the larger their part of all
        requests, the less others lose by the pause."""
        return MIN_BUDGET_S + (MAX_BUDGET_S - MIN_BUDGET_S) * waiting / max(1, len(self._server.state.running))

    async def run(self) -> None:
        """Restore for the time there is between two steps. Raises RankLost, after which it can be called again."""
        server, began = self._server, clock.now()
        wanted = sequences_to_restore(server.state)
        gone = self.replicas.discard_except({number for needed in self.replicas.needs for number in needed()})
        if not wanted:
            return
        self._compute_again(
            [each for each in wanted if each.recoverable is not None and gone.intersection(each.recoverable.replicas)]
        )
        budget_s = self._budget_s(len(wanted)) if self._restores_losses(wanted) else 0.0
        server.state = reserve_for_restore(server.state, at_once=self._is_at_once(wanted, budget_s))
        self._began = self._began or began
        while first := self._next():
            ended = await asyncio.gather(*map(self._restore_piece, first), return_exceptions=True)
            for error in ended:
                if isinstance(error, BaseException):
                    raise error
            if clock.now() - began > budget_s:
                break
        if not self.pending:
            self._report()

    def _restores_losses(self, wanted: Collection[Sequence]) -> bool:
        """Whether a loss is behind any of the requests that wait, or no other request would be delayed. Streams never
        wait for more than a piece on each rank of a request that another pool sends."""
        lost = any(each.recoverable is not None and not each.recoverable.sent for each in wanted)
        return lost or all(each.restoring for each in self._server.state.running.values())

    def _needed(self) -> set[int]:
        """The numbers of the replicas that requests wait for."""
        wanted = (each.recoverable for each in sequences_to_restore(self._server.state))
        return {number for each in wanted if each is not None for number in each.replicas}

    def _is_at_once(self, wanted: Collection[Sequence], budget_s: float) -> bool:
        """Whether all requests are restored before the first step after a loss: when no more requests wait for that
        step than for the restoration, and the restoration takes less time."""
        state, entries = self._server.state, [each.recoverable.count for each in wanted if each.recoverable is not None]
        copying = sum(self.costs.restore_s(count, self._piece, math.inf) for count in entries)
        copying /= max(1, len(state.pools))  # ranks copy beside each other
        others = sum(not each.restoring for each in state.running.values())
        return others <= len(entries) and copying < min(budget_s, self.costs.step.fixed)

    def _next(self) -> list[Sequence]:
        """The request that each rank restores next: the one with the fewest entries left."""
        first: dict[int | None, Sequence] = {}
        for sequence in sorted(self._server.state.running.values(), key=_quickest):
            if sequence.restoring:
                first.setdefault(sequence.rank, sequence)
        return list(first.values())

    async def _restore_piece(self, sequence: Sequence) -> None:
        """Restore the next entries of a request, and note it in the engine's state."""
        server, recoverable, first = self._server, sequence.recoverable, sequence.computed
        assert sequence.rank is not None
        assert recoverable is not None
        count = min(self._piece, recoverable.count - first)
        began = clock.now()
        if count > 0:
            try:
                await self._call(sequence, recoverable, first, count)
            except (NotReplicated, CommandFailed) as error:
                cause = f"{type(error).__name__}: {error}"
                server.events.emit(EventKind.NOT_RESTORED, server.failover.epoch, rank=sequence.rank, cause=cause)
                self._compute_again([sequence])
                return
        if server.state.running.get(sequence.id) is not sequence:
            return  # it ended meanwhile
        server.state = mark_restored(server.state, sequence.id, max(first, first + count))
        if count > 0:
            self.costs = self.costs.with_copy(count, clock.now() - began)
        if not server.state.running[sequence.id].restoring:
            if recoverable.sent:
                self.received += recoverable.count
                return
            self._requests += 1
            self._tokens += recoverable.count
            self.restored += recoverable.count

    async def _call(self, sequence: Sequence, recoverable: RecoverableKV, first: int, count: int) -> None:
        assert sequence.rank is not None
        tokens = np.array(sequence.tokens(first, first + count), np.int32)
        messages = {}
        for number, (rank, pages) in zip(
            recoverable.replicas,
            self._server.failover.adoption.kv_locations(sequence.rank, sequence.pages),
            strict=True,
        ):
            lost = self.replicas.replica(number)
            if lost is None:
                raise NotReplicated("the replica was closed")
            message = link_pb2.RestoreCache(pages=pages, first=first, count=count, tokens=tokens.tobytes())
            if self.replicas.can_map(rank):
                message.cache_copy = lost.replica.path
                message.from_pages.extend(recoverable.pages)
            else:
                size = self._server.state.limits.page_size
                entries = entry_indices(recoverable.pages, size, first, count)
                message.rows = lost.replica.read(entries, tokens, np.arange(first, first + count)).tobytes()
            messages[rank] = message
        await self._server.executor.call_all("restore_cache", messages)

    def _compute_again(self, sequences: list[Sequence]) -> None:
        """Compute these requests again after all."""
        for sequence in sequences:
            assert sequence.recoverable is not None
            self.recomputed += sequence.recoverable.count
        self._server.state = drop_recoverable(self._server.state, [sequence.id for sequence in sequences])

    def _report(self) -> None:
        """All that waited is restored. Requests that came from another pool are no event."""
        if self._began is None or not self._requests:
            self._began = None
            return
        text = f"{self._tokens} cache entries of {self._requests} requests"
        phases = {"restore": 1e3 * (clock.now() - self._began)}
        self._server.events.emit(EventKind.CACHE_RESTORED, self._server.failover.epoch, message=text, phases=phases)
        self._began, self._requests, self._tokens = None, 0, 0


def _quickest(sequence: Sequence) -> tuple[int, int]:
    """The sort key of requests to restore: the fewest entries first, then the first to arrive."""
    count = sequence.recoverable.count if sequence.recoverable is not None else 0
    return count - sequence.computed, sequence.arrival
