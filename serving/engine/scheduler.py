"""What the next step does: continuous batching with chunked prefill, a pure function of the engine's state.

Every sequence with one token left to compute gets a decode row; the others get tiles of 32 rows, first those that
have streamed before, then in order of arrival: few of them while most decode, else as many as the largest bucket has,
or as the first prompt needs where a step costs less than a prompt. All ranks use one bucket. A rank that runs out of
pages preempts its youngest sequence. Requests are admitted strictly in turn (serving/fairness.py), so nobody starves.
A request goes to the rank that has most of its prefix in the cache, unless that rank has much more to do than
another. Of several answers to one prompt the first computes it; the others wait for that and share its pages. A
request whose cache entries outlived its rank is given its place by `reserve`, and no work before they are there.
"""

import dataclasses

from planner.buckets import covering
from serving.batch import TILE, Batch, Shaped, Work, wanted
from serving.engine import EngineState, foreseen, requeued
from serving.fairness import Turns
from serving.pages import Key, page_keys
from serving.sequence import Sequence

DECODE_ROWS_OF_A_TILE = 4
"""So many decode rows let one more tile of a prompt run beside them."""


def schedule(state: EngineState, *, in_turn: bool = False) -> tuple[EngineState, Batch | None]:
    """The state with the step's pages taken and places given, and the step, if there is anything to do. With `in_turn`
    a step that is for prompts has no more of them than fit in the bucket of the first."""
    limits, draft = state.limits, _Draft(state)
    for rank in state.pools:
        draft.grow(rank)
    tiles = 0
    if not (state.decode_first and draft.decoding):
        draft.admit()
        if draft.decoding >= draft.behind:
            tiles = draft.tiles_beside
        else:
            tiles = draft.tiles_of_first if in_turn else limits.most_tiles
    work = {rank: _rank_work(sequences, tiles) for rank, sequences in draft.ranks.items()}
    if not any(work.values()):
        return state, None
    successor = draft.state()
    batch = Batch(successor.step, state.epoch, covering(limits.buckets, wanted(work.values())), work)
    return foreseen(successor, batch), batch


def reserve(state: EngineState, *, at_once: bool = False) -> EngineState:
    """The state with places and pages given to requests whose cache entries outlived their rank, as far as there is
    room; unless `at_once`, not before the survivors' streams have had the first step after the loss."""
    if not any(sequence.salvage for sequence in state.waiting.values()):
        return state
    draft = _Draft(state)
    if at_once or not (state.decode_first and draft.decoding):
        draft.admit_salvaged()
    return draft.reserved()


class _Draft:
    """A state in the making, mutable, never seen outside `schedule`. `ranks` lists sequences by arrival."""

    def __init__(self, state: EngineState) -> None:
        self.before = state
        self.pools = dict(state.pools)
        self.waiting = dict(state.waiting)
        self.preempted = 0
        self.queried = 0
        self.reused = 0
        self.admitted = 0
        self.shares = state.shares
        self.ranks: dict[int, list[Sequence]] = {rank: [] for rank in state.pools}
        for sequence in sorted(state.running.values(), key=_arrival):
            assert sequence.rank is not None
            self.ranks[sequence.rank].append(sequence)

    @property
    def decoding(self) -> int:
        """How many sequences are at their decode rows, on all ranks."""
        return sum(_decodes(sequence) for sequences in self.ranks.values() for sequence in sequences)

    @property
    def tiles_beside(self) -> int:
        """Tiles of prompts in a step of those that decode: the more they are, the more prompts come in their time, and
        the less each of them is held up by another tile."""
        limits = self.before.limits
        wanted = max(limits.tiles_while_decoding, self.decode_rows // DECODE_ROWS_OF_A_TILE)
        return min(wanted, limits.most_tiles)

    @property
    def tiles_of_first(self) -> int:
        """Tiles of the bucket that the first prompt of every rank fits in beside what decodes there."""
        limits = self.before.limits
        first = (next(iter(_prefills(sequences)), None) for sequences in self.ranks.values())
        need = max((-(-each.pending // TILE) for each in first if each is not None), default=0)
        return covering(limits.buckets, (self.decode_rows, min(need, limits.most_tiles))).tiles

    @property
    def decode_rows(self) -> int:
        """Of the rank that has most."""
        return max((sum(map(_decodes, sequences)) for sequences in self.ranks.values()), default=0)

    @property
    def behind(self) -> int:
        """How many requests have yet to come that far: those that decode wait for them no longer than they would."""
        ending = sum(sequence.ending for sequences in self.ranks.values() for sequence in sequences)
        return sum(map(len, self.ranks.values())) - ending - self.decoding + len(self.waiting)

    def grow(self, rank: int) -> None:
        """A page for every decode row that starts one: the oldest sequence first, at the youngest's cost."""
        sequences, page_size, at = self.ranks[rank], self.before.limits.page_size, 0
        while at < len(sequences):
            sequence = sequences[at]
            if sequence.computed == len(sequence.pages) * page_size and not sequence.ending:
                if not self.pools[rank].available:
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
        """Give the request whose turn it is a place, and the next, until one finds none."""
        limits, root = self.before.limits, self.before.root
        if all(len(sequences) >= limits.most_decode for sequences in self.ranks.values()):
            return
        turns = Turns(self.waiting.values(), self.shares)
        while (sequence := turns.head()) is not None:
            if self.awaits_prompt(sequence):
                turns.skip(sequence)
                continue
            if sequence.salvage is not None:  # it found no room just now, and is next
                break
            keys = ()
            if limits.prefix_caching:
                known = sequence.scored if sequence.unscored else sequence.length - 1
                keys = page_keys(sequence.tokens(0, known), limits.page_size, root)
            rank = self.place(sequence, keys)
            if rank is None:
                break
            del self.waiting[sequence.id]
            pool = self.pools[rank]
            found = pool.match(keys)
            self.pools[rank], pages = pool.share(found).alloc(limits.pages_for(sequence.length) - len(found))
            computed = len(found) * limits.page_size
            placed = sequence.placed(rank, found + pages, computed=computed, chain=keys[: len(found)])
            self.ranks[rank].append(placed)
            turns.take(sequence, sequence.length - computed)
            if not sequence.started:
                self.admitted += 1
                self.queried += len(sequence.request.prompt)
                self.reused += computed
        self.shares = turns.shares
        for sequences in self.ranks.values():
            sequences.sort(key=_arrival)

    def admit_salvaged(self) -> None:
        """Places for those that are to be restored, the first to arrive first, until one finds none. Pages of theirs
        that a rank has already are shared instead."""
        for sequence in [sequence for sequence in self.waiting.values() if sequence.salvage is not None]:
            salvage = sequence.salvage
            assert salvage is not None
            keys = salvage.chain or ()
            if self.awaits_restored(keys):
                continue
            rank = self.place(sequence, keys)
            if rank is None:
                break
            found = self.pools[rank].match(keys)
            del self.waiting[sequence.id]
            need = self.before.limits.pages_for(sequence.length) - len(found)
            self.pools[rank], pages = self.pools[rank].share(found).alloc(need)
            chain = None if salvage.chain is None else keys[: len(found)]
            computed = len(found) * self.before.limits.page_size
            self.ranks[rank].append(sequence.placed(rank, found + pages, computed=computed, chain=chain))
            self.ranks[rank].sort(key=_arrival)

    def awaits_restored(self, keys: tuple[Key, ...]) -> bool:
        """Whether pages are being restored that one with these keys will share, and that no rank has yet."""
        more = 1 + max((len(pool.match(keys)) for pool in self.pools.values()), default=0)
        coming = [each.salvage.chain or () for row in self.ranks.values() for each in row if each.salvage]
        return len(keys) >= more and any(keys[:more] == chain[:more] for chain in coming)

    def awaits_prompt(self, sequence: Sequence) -> bool:
        """Whether the first answer to the same prompt is computing pages that this one will share."""
        family, limits = sequence.request.family, self.before.limits
        if not limits.prefix_caching or not family or family == sequence.id or sequence.started or sequence.unscored:
            return False
        running = (other for sequences in self.ranks.values() for other in sequences)
        first = next((other for other in running if other.id == family), None)
        if first is None or first.chain is None or first.rank in self.before.closed:
            return False
        return first.settled < (len(sequence.request.prompt) - 1) // limits.page_size * limits.page_size

    def place(self, sequence: Sequence, keys: tuple[Key, ...]) -> int | None:
        """The rank for this sequence: of those that have room, the one with most of its pages, then the fewest
        sequences, then the most pages to spare. A rank is passed over for its cache alone when it has so many
        more sequences than the emptiest that waiting for it would cost more than it saves.

        Room is the pages of its tokens so far and one to go on, or all it can ever need.
        """
        limits = self.before.limits
        need = limits.pages_needed(sequence.request)
        wanted = min(limits.pages_for(sequence.length) + 1, need)
        rooms: dict[int, int] = {}
        for rank, pool in self.pools.items():
            found = pool.match(keys)
            fits = need <= pool.total and wanted - len(found) <= pool.available_beside(found)
            if fits and rank not in self.before.closed and len(self.ranks[rank]) < limits.most_decode:
                rooms[rank] = len(found)
        least = min((len(self.ranks[rank]) for rank in rooms), default=0)

        def order(rank: int) -> tuple[int, int, int, int]:
            busy = len(self.ranks[rank])
            found = rooms[rank] if busy - least <= limits.most_decode // 4 else 0
            return -found, busy, -self.pools[rank].available, rank

        return min(rooms, key=order, default=None)

    def reserved(self) -> EngineState:
        """The finished successor, between two steps."""
        running = {sequence.id: sequence for sequences in self.ranks.values() for sequence in sequences}
        return dataclasses.replace(self.before, pools=self.pools, waiting=self.waiting, running=running)

    def state(self) -> EngineState:
        """The finished successor, with one more step in flight."""
        step = self.before.step + 1
        return dataclasses.replace(
            self.before,
            pools=self.pools,
            waiting=self.waiting,
            running={sequence.id: sequence for sequences in self.ranks.values() for sequence in sequences},
            step=step,
            preemptions=self.before.preemptions + self.preempted,
            decode_first=False,
            prefix_queries=self.before.prefix_queries + self.queried,
            prefix_hits=self.before.prefix_hits + self.reused,
            shares=self.shares,
            admitted=self.before.admitted + self.admitted,
        )


def _decodes(sequence: Sequence) -> bool:
    return sequence.pending == 1 and not (sequence.restoring or sequence.ending)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _rank_work(sequences: list[Sequence], tiles: int) -> tuple[Work, ...]:
    """A decode row for each sequence that needs just that, then chunks of the others in so many tiles."""
    work = [_work(sequence, 1) for sequence in sequences if _decodes(sequence)]
    if tiles:
        for sequence in _prefills(sequences):
            if tiles == 0:
                break
            work.append(_work(sequence, min(sequence.pending, tiles * TILE)))
            tiles -= work[-1].tiles
    return tuple(work)


def _prefills(sequences: list[Sequence]) -> list[Sequence]:
    """Those with more than a token to compute, the next one first."""
    prefill = [sequence for sequence in sequences if sequence.pending > 1 and not sequence.restoring]
    return sorted(prefill, key=lambda sequence: not sequence.generated)


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
        targets=_targets(sequence, start, count),
        shaped=Shaped(request, sequence.generated) if request.is_shaped(len(sequence.generated)) else None,
        top=request.top_logprobs,
        prompt_top=request.prompt_logprobs or 0,
    )


def _targets(sequence: Sequence, start: int, count: int) -> tuple[int, ...]:
    """The tokens to score after each of `count` positions; none that was told before."""
    prompt, stop = sequence.request.prompt, start + count
    first, end = max(start, sequence.scored), min(stop, len(sequence.request.prompt) - 1)
    if not sequence.unscored or first >= end:
        return ()
    return (-1,) * (first - start) + prompt[first + 1 : end + 1] + (-1,) * (stop - end)
