"""After the loss of a rank: what of its requests' caches is restored from a copy, piece by piece between two steps.

A piece is one message to the rank that has the request now. Whatever is cut short by another loss is done again: what
was salvaged stays where it is until all of it is in a cache.
"""

import asyncio
import math
import time
from collections.abc import Collection
from typing import Protocol

import numpy as np

from serving.batch import TILE, Batch
from serving.breakeven import Costs, is_restored
from serving.cache_copies import CacheCopies
from serving.cache_copy import NotCopied, entries_of, piece_of
from serving.engine import EngineState
from serving.events import EventLog
from serving.failover import Failover
from serving.links import RankLinks, RankRefused
from serving.proto.moejax.v1 import link_pb2
from serving.salvage import forget, restored, salvaged
from serving.scheduler import reserve
from serving.sequence import Salvage, Sequence

FEW_S, ALL_S = 0.03, 0.12
"""How long requests are restored between two steps, one piece on each rank at least: when few of all wait for it, and
when all do."""


class Engine(Protocol):
    """What a restoration needs of the loop that carries it out."""

    state: EngineState
    events: EventLog
    failover: Failover
    links: RankLinks


class Restoration:
    """Restores what the copies of a server have; counts tokens restored and computed again."""

    def __init__(self, engine: Engine, copies: CacheCopies) -> None:
        self._engine = engine
        self.copies = copies
        self.costs = Costs.guess(copies.entry_bytes)
        self.restored = 0
        self.recomputed = 0
        self._piece = piece_of(copies.entry_bytes)
        self._began: float | None = None
        self._requests = 0
        self._tokens = 0

    @property
    def pending(self) -> bool:
        """Requests wait to be restored."""
        return bool(salvaged(self._engine.state))

    @property
    def underway(self) -> bool:
        """There are cache entries to copy now: those of requests that have a place."""
        return any(sequence.restoring for sequence in self._engine.state.running.values())

    @property
    def in_turn(self) -> bool:
        """Whether prompts that the smallest bucket holds are computed one after the other rather than together."""
        least = min(bucket.tiles for bucket in self._engine.state.limits.buckets if bucket.tiles)
        return self.costs.in_turn(TILE * least)

    def stepped(self, batch: Batch, seconds: float) -> None:
        """A step took so long."""
        tokens = max(sum(len(work.tokens) for work in part if work.tiles) for part in batch.work.values())
        self.costs = self.costs.stepped(tokens, seconds)

    def of_lost(self, ranks: set[int]) -> tuple[dict[str, Salvage], int]:
        """What is to be restored of the requests of ranks that were lost, by request, and how many cache entries of
        theirs will be computed again instead."""
        state = self._engine.state
        found: dict[str, Salvage] = {}
        again = 0
        for sequence in state.running.values():
            if sequence.rank not in ranks or sequence.restoring:
                continue
            sequence = sequence.withdrawn()
            salvage = self.copies.salvage(sequence, state.limits.page_size)
            if salvage is not None and self._is_restored(sequence, salvage, ranks):
                found[sequence.id] = salvage
            again += sequence.computed - (salvage.count if sequence.id in found and salvage is not None else 0)
        self.recomputed += again
        return found, again

    def _is_restored(self, sequence: Sequence, salvage: Salvage, dead: set[int]) -> bool:
        state = self._engine.state
        pools = [pool for rank, pool in state.pools.items() if rank not in dead]
        others = any(other.rank not in dead for other in state.running.values())
        found = max((len(pool.match(salvage.chain or ())) for pool in pools), default=0) * state.limits.page_size
        tiles = state.limits.tiles_while_decoding if others else state.limits.most_tiles
        return is_restored(
            self.costs,
            sequence.length,
            salvage.count,
            found=found,
            chunk=TILE * min(tiles, state.limits.most_tiles),
            piece=self._piece,
            budget_s=self._budget_s(sum(other.rank in dead for other in state.running.values())),
        )

    def _budget_s(self, waiting: int) -> float:
        """Between two steps, when so many requests wait to be restored: what the others lose is theirs to gain."""
        return FEW_S + (ALL_S - FEW_S) * waiting / max(1, len(self._engine.state.running))

    async def tend(self) -> None:
        """Restore for a while. Raises RankLost; nothing is lost by that."""
        engine, began = self._engine, time.monotonic()
        wanted = salvaged(engine.state)
        needed = {number for each in wanted if each.salvage is not None for number in each.salvage.copies}
        gone = self.copies.keep_only(needed)
        if not wanted:
            return
        self._forget([each for each in wanted if each.salvage is not None and gone.intersection(each.salvage.copies)])
        budget_s = self._budget_s(len(wanted))
        engine.state = reserve(engine.state, at_once=self._is_at_once(wanted, budget_s))
        self._began = self._began or began
        while first := self._next():
            ended = await asyncio.gather(*map(self._restore_piece, first), return_exceptions=True)
            for error in ended:
                if isinstance(error, BaseException):
                    raise error
            if time.monotonic() - began > budget_s:
                break
        if not self.pending and self._requests:
            self._tell()

    def _is_at_once(self, wanted: Collection[Sequence], budget_s: float) -> bool:
        """Whether all are restored before the first step after a loss: when no more streams wait for that step than for
        the copying, which takes less."""
        state, entries = self._engine.state, [each.salvage.count for each in wanted if each.salvage is not None]
        copying = sum(self.costs.restore_s(count, self._piece, math.inf) for count in entries)
        copying /= max(1, len(state.pools))  # ranks copy beside each other
        others = sum(not each.restoring for each in state.running.values())
        return others <= len(entries) and copying < min(budget_s, self.costs.step.fixed)

    def _next(self) -> list[Sequence]:
        """Of each rank the request that is restored next: the one with the fewest entries left."""
        first: dict[int | None, Sequence] = {}
        for sequence in sorted(self._engine.state.running.values(), key=_quickest):
            if sequence.restoring:
                first.setdefault(sequence.rank, sequence)
        return list(first.values())

    async def _restore_piece(self, sequence: Sequence) -> None:
        """The next entries of a request, and the state with them."""
        engine, salvage, first = self._engine, sequence.salvage, sequence.computed
        assert sequence.rank is not None
        assert salvage is not None
        count = min(self._piece, salvage.count - first)
        began = time.monotonic()
        if count > 0:
            try:
                await self._call(sequence, salvage, first, count)
            except (NotCopied, RankRefused) as refusal:
                cause = f"{type(refusal).__name__}: {refusal}"
                engine.events.add("not_restored", engine.failover.epoch, rank=sequence.rank, cause=cause)
                self._forget([sequence])
                return
        if engine.state.running.get(sequence.id) is not sequence:
            return  # it ended meanwhile
        engine.state = restored(engine.state, sequence.id, max(first, first + count))
        if count > 0:
            self.costs = self.costs.copied(count, time.monotonic() - began)
        if not engine.state.running[sequence.id].restoring:
            self._requests += 1
            self._tokens += salvage.count
            self.restored += salvage.count

    async def _call(self, sequence: Sequence, salvage: Salvage, first: int, count: int) -> None:
        assert sequence.rank is not None
        tokens = np.array(sequence.tokens(first, first + count), np.int32)
        messages = {}
        for number, (rank, pages) in zip(
            salvage.copies, self._engine.failover.places(sequence.rank, sequence.pages), strict=True
        ):
            kept = self.copies.find(number)
            if kept is None:
                raise NotCopied("the copy is there no more")
            message = link_pb2.RestoreCache(pages=pages, first=first, count=count, tokens=tokens.tobytes())
            if self.copies.maps(rank):
                message.cache_copy = kept.copy.path
                message.from_pages.extend(salvage.pages)
            else:
                size = self._engine.state.limits.page_size
                entries = entries_of(salvage.pages, size, first, count)
                message.rows = kept.copy.read(entries, tokens, np.arange(first, first + count)).tobytes()
            messages[rank] = message
        await self._engine.links.call_all("restore_cache", messages)

    def _forget(self, sequences: list[Sequence]) -> None:
        """These requests are computed again after all."""
        for sequence in sequences:
            assert sequence.salvage is not None
            self.recomputed += sequence.salvage.count
        self._engine.state = forget(self._engine.state, [sequence.id for sequence in sequences])

    def _tell(self) -> None:
        assert self._began is not None
        text = f"{self._tokens} cache entries of {self._requests} requests"
        phases = {"restore": 1e3 * (time.monotonic() - self._began)}
        self._engine.events.add("cache_restored", self._engine.failover.epoch, message=text, phases=phases)
        self._began, self._requests, self._tokens = None, 0, 0


def _quickest(sequence: Sequence) -> tuple[int, int]:
    """The fewest entries to restore first, then the first to arrive."""
    count = sequence.salvage.count if sequence.salvage is not None else 0
    return count - sequence.computed, sequence.arrival
