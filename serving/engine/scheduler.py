"""Schedules the next step: continuous batching with chunked prefill, a pure function of the state.

Every sequence with one token left to compute gets a decode row. The others get tiles of 32 rows: first sequences that
have streamed before, then in order of arrival. They get few tiles while most sequences decode; otherwise as many as
the largest bucket has, or, where a step costs less than a prompt, as many as the first prompt needs. All ranks use
one bucket. A rank that runs out of pages preempts its youngest sequence. Decode rows that are left may take drafts
(serving/engine/draft_rows.py).

Requests are admitted strictly in order (serving/engine/fairness.py), so none starves. A request goes to the rank that
has most of its prefix in the cache, unless that rank has much more to do than another. Of several requests with the
same prompt the first computes it; the others wait, and share its pages. With layers whose context is a state a prefix
is shared up to a snapshot (serving/engine/snapshots.py). A request with recoverable KV gets a rank
from `reserve_for_restore`, and runs once its entries are restored.
"""

import dataclasses
from collections.abc import Mapping

from planner.cost.buckets import covering_bucket
from planner.plan.step_layout import TILE
from serving.engine.batch import Batch, ScheduledRequest, required_bucket
from serving.engine.canaries import others, preempted_for
from serving.engine.draft_passes import plan_drafts
from serving.engine.draft_rows import add_drafts
from serving.engine.fairness import AdmissionOrder
from serving.engine.page_pool import PageKey, hash_pages
from serving.engine.poison import Turn
from serving.engine.sequence import Sequence, free_slot
from serving.engine.snapshot_steps import add_snapshots
from serving.engine.state import EngineState, requeue
from serving.engine.step_results import look_ahead
from serving.protocol.request import LogitsParams

DECODE_ROWS_PER_TILE = 4
"""Decode rows that let one more prefill tile run beside them."""


def schedule(state: EngineState, *, serial_prefill: bool = False) -> tuple[EngineState, Batch | None]:
    """Schedule a step. Returns the state with the step in flight, and the step; the same state and None when there is
    nothing to run, or, where another pool decodes, the state with requests placed whose prompts the cache has. With
    `serial_prefill` a step for prompts has no more tiles than the bucket of the first prompt."""
    successor = state
    turns = state.suspicion.turns() if not state.canaries else (Turn(without=others(state)),)
    for turn in turns:
        successor, batch = _schedule(state, turn, serial_prefill=serial_prefill)
        if batch is not None:
            return successor, batch
    return successor, None


def _schedule(state: EngineState, turn: Turn, *, serial_prefill: bool) -> tuple[EngineState, Batch | None]:
    """`schedule` for a step with the requests that the turn admits; all others keep their places."""
    limits, builder = state.limits, _StepBuilder(state)
    for rank in [rank for rank, sequences in builder.ranks.items() if sequences]:
        builder.allocate_decode_pages(rank)
    tiles = 0
    if state.canaries:
        builder.admit_canaries()
        tiles = limits.max_tiles
    elif not (state.decode_first and builder.decoding):
        builder.admit()
        decoding = builder.decoding
        if decoding >= builder.prefilling_or_waiting(decoding):
            tiles = builder.tiles_beside_decode
        else:
            tiles = builder.tiles_of_first_prompt if serial_prefill else limits.max_tiles
    work = {
        rank: _schedule_rank([each for each in sequences if turn.admits(each.id)], tiles) if sequences else ()
        for rank, sequences in builder.running.items()
    }
    if not any(work.values()):
        goes_on_elsewhere = not state.decodes and len(builder.waiting) < len(state.waiting)
        return builder.with_placed() if goes_on_elsewhere and not state.canaries else state, None
    drafted = add_drafts(limits, state.suspicion, builder.ranks, builder.pools, work)
    builder.ranks, builder.pools, work = drafted.ranks, drafted.pools, drafted.work
    if limits.snapshots:
        builder.pools, work = add_snapshots(limits, builder.ranks, builder.pools, work)
    suspicion = state.suspicion if state.canaries else state.suspicion.after_turn(turn)
    successor = dataclasses.replace(builder.with_step(), suspicion=suspicion)
    batch = Batch(successor.step, state.epoch, covering_bucket(limits.buckets, required_bucket(work.values())), work)
    return plan_drafts(look_ahead(successor, batch, drafted.drafts), batch)


def reserve_for_restore(state: EngineState, *, at_once: bool = False) -> EngineState:
    """The state with ranks and pages for requests that have recoverable KV, as far as there is room. Unless
    `at_once`, streams on the surviving ranks get the first step after a loss before that."""
    if not any(sequence.recoverable for sequence in state.waiting.values()):
        return state
    builder = _StepBuilder(state)
    if at_once or not (state.decode_first and builder.decoding):
        builder.admit_recoverable()
    return builder.without_step()


class _StepBuilder:
    """A mutable state under construction, private to this module. `ranks` lists sequences by arrival."""

    def __init__(self, state: EngineState) -> None:
        self.before = state
        self.pools = dict(state.pools)
        self.waiting = dict(state.waiting)
        self.preempted = 0
        self.queried = 0
        self.cached_tokens = 0
        self.admitted = 0
        self.counters = state.counters
        self.ranks: dict[int, list[Sequence]] = {rank: [] for rank in state.pools}
        for sequence in sorted(state.running.values(), key=_arrival):
            assert sequence.rank is not None
            self.ranks[sequence.rank].append(sequence)

    @property
    def running(self) -> Mapping[int, list[Sequence]]:
        """The sequences that the step may have: all, or without the ones that another pool decodes."""
        if self.before.decodes:
            return self.ranks
        return {rank: [each for each in row if not _decodes(each)] for rank, row in self.ranks.items()}

    @property
    def decoding(self) -> int:
        """Number of sequences that need one decode row, on all ranks."""
        return sum(_decodes(sequence) for sequences in self.running.values() for sequence in sequences)

    @property
    def tiles_beside_decode(self) -> int:
        """Prefill tiles beside decode rows: with more decode rows more prompts arrive in the same time, and each row
        is delayed less by one more tile."""
        limits = self.before.limits
        tiles = max(limits.tiles_while_decoding, self.decode_rows // DECODE_ROWS_PER_TILE)
        return min(tiles, limits.max_tiles)

    @property
    def tiles_of_first_prompt(self) -> int:
        """Tiles of the bucket that holds the first prompt of every rank beside the decode rows."""
        limits = self.before.limits
        first = (next(iter(_prefills(sequences)), None) for sequences in self.ranks.values())
        need = max((-(-each.pending // TILE) for each in first if each is not None), default=0)
        return covering_bucket(limits.buckets, (self.decode_rows, min(need, limits.max_tiles))).tiles

    @property
    def decode_rows(self) -> int:
        """Decode rows of the rank that has most."""
        return max((sum(map(_decodes, sequences)) for sequences in self.running.values()), default=0)

    def prefilling_or_waiting(self, decoding: int) -> int:
        """Number of requests that do not decode yet, beside the ones that do."""
        ending = sum(sequence.ending for sequences in self.ranks.values() for sequence in sequences)
        return sum(map(len, self.running.values())) - ending - decoding + len(self.waiting)

    def allocate_decode_pages(self, rank: int) -> None:
        """Allocate a page to every sequence whose next decode row starts one: the oldest first, at the youngest's
        expense."""
        sequences, page_size, at = self.ranks[rank], self.before.limits.page_size, 0
        while self.before.decodes and at < len(sequences):
            sequence = sequences[at]
            if sequence.computed == len(sequence.pages) * page_size and not sequence.ending:
                if not self.pools[rank].available:
                    self.preempt(rank)
                    continue
                self.pools[rank], pages = self.pools[rank].alloc(1)
                sequences[at] = dataclasses.replace(sequence, pages=sequence.pages + pages)
            at += 1

    def preempt(self, rank: int) -> None:
        """Put the rank's youngest sequence back into the queue."""
        youngest = self.ranks[rank].pop()
        self.pools[rank] = self.pools[rank].release(youngest.pages)
        self.waiting = requeue(self.waiting, [youngest])
        self.preempted += 1

    def admit(self) -> None:
        """Give ranks to waiting requests in order, until one finds no room."""
        limits, root_key = self.before.limits, self.before.root_key
        if all(len(sequences) >= limits.max_decode_rows for sequences in self.ranks.values()):
            return
        order = AdmissionOrder(self.waiting.values(), self.counters)
        while (sequence := order.peek()) is not None:
            if (self.before.held and not sequence.started) or self.waits_for_shared_prompt(sequence):
                order.skip(sequence)
                continue
            if sequence.recoverable is not None:  # it found no room just now, and is next
                break
            keys = ()
            if limits.prefix_caching:
                known = sequence.scored if sequence.unscored else sequence.length - 1
                keys = hash_pages(sequence.tokens(0, known), limits.page_size, root_key)
            rank = self.choose_rank(sequence, keys)
            if rank is None:
                break
            del self.waiting[sequence.id]
            placed = self.place(sequence, rank, keys)
            order.admit(sequence, placed.pending)
            if not sequence.started:
                self.admitted += 1
                self.queried += len(sequence.request.prompt)
                self.cached_tokens += placed.computed
        self.counters = order.counters
        for sequences in self.ranks.values():
            if len(sequences) > 1:
                sequences.sort(key=_arrival)

    def admit_canaries(self) -> None:
        """Give each canary that waits its rank, at the expense of the rank's youngest requests."""
        limits, canaries = self.before.limits, self.before.canaries
        for sequence in [each for each in self.waiting.values() if canaries.get(each.id) in self.pools]:
            rank = canaries[sequence.id]
            need = limits.pages_needed(sequence.request)
            while len(self.ranks[rank]) >= limits.max_decode_rows or self.pools[rank].available < need:
                youngest = preempted_for(self.ranks[rank], canaries)
                if youngest is None:
                    break
                self.ranks[rank].remove(youngest)
                self.pools[rank] = self.pools[rank].release(youngest.pages)
                self.waiting = requeue(self.waiting, [youngest])
                self.preempted += 1
            else:
                del self.waiting[sequence.id]
                self.pools[rank], pages = self.pools[rank].alloc(need)
                placed = sequence.placed_on(rank, pages, page_keys=None, slot=self.free_slot(rank))
                self.ranks[rank].append(placed)

    def admit_recoverable(self) -> None:
        """Give ranks to requests with recoverable KV in order of arrival, until one finds no room. Pages that a rank
        has in its prefix cache are shared instead of restored."""
        for sequence in [sequence for sequence in self.waiting.values() if sequence.recoverable is not None]:
            recoverable = sequence.recoverable
            assert recoverable is not None
            keys = recoverable.page_keys or ()
            if self.shares_restoring_pages(keys):
                continue
            rank = self.choose_rank(sequence, keys)
            if rank is None:
                break
            del self.waiting[sequence.id]
            self.place(sequence, rank, keys, shared=recoverable.page_keys is not None)
            self.ranks[rank].sort(key=_arrival)

    def place(self, sequence: Sequence, rank: int, keys: tuple[PageKey, ...], *, shared: bool = True) -> Sequence:
        """Give a sequence a rank that has room. It shares the pages there that have the first of these keys, and
        begins after them; with states, from the snapshot behind them. Others share its own pages if `shared`."""
        limits, pool = self.before.limits, self.pools[rank]
        found, branch, snapshot = pool.match(keys, states=limits.states), 0, None
        if limits.snapshots:
            branch = len(pool.match(keys)) * limits.page_size
        if limits.states and found:
            key = keys[len(found) - 1]
            pool = dataclasses.replace(pool, snapshots=pool.snapshots.used(key))
            snapshot = pool.snapshots.places[key]
        self.pools[rank], pages = pool.share(found).alloc(limits.pages_for(sequence.length) - len(found))
        placed = sequence.placed_on(
            rank,
            found + pages,
            computed=len(found) * limits.page_size,
            page_keys=keys[: len(found)] if shared else None,
            slot=self.free_slot(rank),
            snapshot=snapshot,
            branch=branch,
        )
        self.ranks[rank].append(placed)
        return placed

    def free_slot(self, rank: int) -> int | None:
        """A slot for the states of one more sequence of a rank; None when requests have no states."""
        return free_slot(self.ranks[rank], states=self.before.limits.states)

    def shares_restoring_pages(self, keys: tuple[PageKey, ...]) -> bool:
        """Whether pages with some of these keys are being restored that no rank has yet."""
        more = 1 + max((len(pool.match(keys)) for pool in self.pools.values()), default=0)
        coming = [each.recoverable.page_keys or () for row in self.ranks.values() for each in row if each.recoverable]
        return len(keys) >= more and any(keys[:more] == page_keys[:more] for page_keys in coming)

    def waits_for_shared_prompt(self, sequence: Sequence) -> bool:
        """Whether the first request with the same prompt is still computing pages that this one will share."""
        group, limits = sequence.request.prompt_group, self.before.limits
        if not limits.prefix_caching or not group or group == sequence.id or sequence.started or sequence.unscored:
            return False
        running = (other for sequences in self.ranks.values() for other in sequences)
        first = next((other for other in running if other.id == group), None)
        if first is None or first.page_keys is None or first.rank in self.before.closed_ranks:
            return False
        return first.committed < (len(sequence.request.prompt) - 1) // limits.page_size * limits.page_size

    def choose_rank(self, sequence: Sequence, keys: tuple[PageKey, ...]) -> int | None:
        """The rank for a sequence: of the ranks with room, the one with most of its pages, then the fewest sequences,
        then the most available pages; None when none has room. Cached pages do not count on a rank with so many more
        sequences than the emptiest that waiting there would cost more than the cache saves.

        Room means pages for its tokens so far and one more, or for all it can ever need.
        """
        limits = self.before.limits
        need, most = limits.pages_needed(sequence.request), limits.max_decode_rows
        pages = min(limits.pages_for(sequence.length) + 1, need)
        rooms: dict[int, int] = {}
        for rank, pool in self.pools.items():
            found = pool.match(keys, states=limits.states)
            fits = need <= pool.total and pages - len(found) <= pool.available_after_sharing(found)
            if fits and rank not in self.before.closed_ranks and len(self.ranks[rank]) < most:
                rooms[rank] = len(found)
        least = min((len(self.ranks[rank]) for rank in rooms), default=0)

        def order(rank: int) -> tuple[int, int, int, int]:
            busy = len(self.ranks[rank])
            found = rooms[rank] if busy - least <= most // 4 else 0
            return -found, busy, -self.pools[rank].available, rank

        return min(rooms, key=order, default=None)

    def without_step(self) -> EngineState:
        """The finished state, without a new step."""
        running = {sequence.id: sequence for sequences in self.ranks.values() for sequence in sequences}
        return dataclasses.replace(self.before, pools=self.pools, waiting=self.waiting, running=running)

    def with_step(self) -> EngineState:
        """The finished state, with one more step in flight."""
        return dataclasses.replace(self.with_placed(), step=self.before.step + 1, decode_first=False)

    def with_placed(self) -> EngineState:
        """The finished state, with the requests that got ranks and without a new step."""
        return dataclasses.replace(
            self.without_step(),
            preemptions=self.before.preemptions + self.preempted,
            prefix_queries=self.before.prefix_queries + self.queried,
            prefix_hits=self.before.prefix_hits + self.cached_tokens,
            counters=self.counters,
            admitted=self.before.admitted + self.admitted,
        )


def _decodes(sequence: Sequence) -> bool:
    return sequence.pending == 1 and not (sequence.restoring or sequence.ending)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _schedule_rank(sequences: list[Sequence], tiles: int) -> tuple[ScheduledRequest, ...]:
    """A decode row for each sequence that needs only that, then chunks of the others in `tiles` tiles."""
    work = [_scheduled(sequence, 1) for sequence in sequences if _decodes(sequence)]
    if tiles:
        for sequence in _prefills(sequences):
            if tiles == 0:
                break
            work.append(_scheduled(sequence, min(sequence.pending, tiles * TILE)))
            tiles -= work[-1].tiles
    return tuple(work)


def _prefills(sequences: list[Sequence]) -> list[Sequence]:
    """Sequences with more than one token to compute, the next one first."""
    prefill = [sequence for sequence in sequences if sequence.pending > 1 and not sequence.restoring]
    return sorted(prefill, key=lambda sequence: not sequence.generated)


def _scheduled(sequence: Sequence, count: int) -> ScheduledRequest:
    request, start = sequence.request, sequence.computed
    return ScheduledRequest(
        request_id=request.id,
        start=start,
        tokens=sequence.tokens(start, start + count),
        pages=sequence.pages,
        samples=count == sequence.pending,
        sampling=request.sampling,
        targets=_targets(sequence, start, count),
        logits_params=LogitsParams(request, sequence.generated)
        if request.sampling.needs_logits_processing(len(sequence.generated))
        else None,
        states=sequence.states,
    )


def _targets(sequence: Sequence, start: int, count: int) -> tuple[int, ...]:
    """The tokens to score after each of `count` positions, without those scored before."""
    prompt, stop = sequence.request.prompt, start + count
    first, end = max(start, sequence.scored), min(stop, len(sequence.request.prompt) - 1)
    if not sequence.unscored or first >= end:
        return ()
    return (-1,) * (first - start) + prompt[first + 1 : end + 1] + (-1,) * (stop - end)
