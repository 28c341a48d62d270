"""What the next step does: continuous batching with chunked prefill, a pure function of the engine's state.

Every sequence with one token left to compute gets a decode row; the others get tiles of 32 rows, first those
that have streamed before, then in order of arrival. All ranks use one bucket. A rank that runs out of pages
preempts its youngest sequence. Requests are admitted strictly in order of arrival, so nobody starves.
"""

import dataclasses
from collections.abc import Iterable

from serving.batch import TILE, Batch, Bucket, Work
from serving.engine import EngineState, requeued
from serving.sequence import Sequence


def schedule(state: EngineState) -> tuple[EngineState, Batch | None]:
    """The state with the step's pages taken and places given, and the step, if there is anything to do."""
    limits, draft = state.limits, _Draft(state)
    for rank in state.pools:
        draft.grow(rank)
    tiles = 0
    if not (state.decode_first and draft.decoding):
        draft.admit()
        tiles = min(limits.tiles_while_decoding, limits.most_tiles) if draft.decoding else limits.most_tiles
    work = {rank: _rank_work(sequences, tiles) for rank, sequences in draft.ranks.items()}
    if not any(work.values()):
        return state, None
    successor = draft.state()
    return successor, Batch(successor.step, state.epoch, _smallest(limits.buckets, work.values()), work)


class _Draft:
    """A state in the making, mutable, never seen outside `schedule`. `ranks` lists sequences by arrival."""

    def __init__(self, state: EngineState) -> None:
        self.before = state
        self.pools = dict(state.pools)
        self.waiting = dict(state.waiting)
        self.preempted = 0
        self.ranks: dict[int, list[Sequence]] = {rank: [] for rank in state.pools}
        for sequence in sorted(state.running.values(), key=_arrival):
            assert sequence.rank is not None
            self.ranks[sequence.rank].append(sequence)

    @property
    def decoding(self) -> bool:
        """Whether any sequence anywhere is at its decode rows."""
        return any(sequence.pending == 1 for sequences in self.ranks.values() for sequence in sequences)

    def grow(self, rank: int) -> None:
        """A page for every decode row that starts one: the oldest sequence first, at the youngest's cost."""
        sequences, page_size, at = self.ranks[rank], self.before.limits.page_size, 0
        while at < len(sequences):
            sequence = sequences[at]
            if sequence.computed == len(sequence.pages) * page_size:
                if not self.pools[rank].free:
                    self.preempt(rank)
                    continue
                self.pools[rank], pages = self.pools[rank].alloc(1)
                sequences[at] = dataclasses.replace(sequence, pages=sequence.pages + pages)
            at += 1

    def preempt(self, rank: int) -> None:
        """Send the rank's youngest sequence back to the queue."""
        youngest = self.ranks[rank].pop()
        self.pools[rank] = self.pools[rank].release(youngest.pages)
        self.waiting = requeued(self.waiting, [youngest])
        self.preempted += 1

    def admit(self) -> None:
        """Give the queue's first request a place, and the next, until one finds none."""
        pages_for = self.before.limits.pages_for
        for sequence in list(self.waiting.values()):
            rank = self.place(sequence)
            if rank is None:
                break
            del self.waiting[sequence.id]
            self.pools[rank], pages = self.pools[rank].alloc(pages_for(sequence.length))
            self.ranks[rank].append(sequence.placed(rank, pages))
        for sequences in self.ranks.values():
            sequences.sort(key=_arrival)

    def place(self, sequence: Sequence) -> int | None:
        """The rank with the fewest sequences, then the most free pages, that has room for this one.

        Room is the pages of its tokens so far and one to go on, or all it can ever need.
        """
        limits = self.before.limits
        need = limits.pages_needed(sequence.request)
        wanted = min(limits.pages_for(sequence.length) + 1, need)
        rooms = (
            rank
            for rank, pool in self.pools.items()
            if len(self.ranks[rank]) < limits.most_decode and need <= pool.total and wanted <= len(pool.free)
        )
        return min(rooms, key=lambda rank: (len(self.ranks[rank]), -len(self.pools[rank].free), rank), default=None)

    def state(self) -> EngineState:
        """The finished successor, with one more step in flight."""
        step = self.before.step + 1
        return dataclasses.replace(
            self.before,
            pools=self.pools,
            waiting=self.waiting,
            running={sequence.id: sequence for sequences in self.ranks.values() for sequence in sequences},
            step=step,
            in_flight=step,
            preemptions=self.before.preemptions + self.preempted,
            decode_first=False,
        )


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _rank_work(sequences: list[Sequence], tiles: int) -> tuple[Work, ...]:
    """A decode row for each sequence that needs just that, then chunks of the others in so many tiles."""
    work = [_work(sequence, 1) for sequence in sequences if sequence.pending == 1]
    if tiles:
        prefill = [sequence for sequence in sequences if sequence.pending > 1]
        for sequence in sorted(prefill, key=lambda sequence: not sequence.generated):
            if tiles == 0:
                break
            work.append(_work(sequence, min(sequence.pending, tiles * TILE)))
            tiles -= work[-1].tiles
    return tuple(work)


def _work(sequence: Sequence, count: int) -> Work:
    request, start = sequence.request, sequence.computed
    return Work(
        request_id=request.id,
        start=start,
        tokens=sequence.tokens(start, start + count),
        pages=sequence.pages,
        samples=count == sequence.pending,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        seed=request.seed,
    )


def _smallest(buckets: Iterable[Bucket], work: Iterable[tuple[Work, ...]]) -> Bucket:
    """The bucket with the fewest rows that covers every rank."""
    tiles = [[item.tiles for item in part] for part in work]
    most_rows = max(part.count(0) for part in tiles)
    most_tiles = max(sum(part) for part in tiles)
    return min((b for b in buckets if b.decode >= most_rows and b.tiles >= most_tiles), key=lambda b: b.rows)
