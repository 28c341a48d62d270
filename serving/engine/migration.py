"""Moves requests off ranks that are to leave: pure transitions of the state."""

import dataclasses
from collections.abc import Collection

from serving.engine.page_pool import PagePool
from serving.engine.sequence import Sequence, free_slot
from serving.engine.state import EngineState, requeue


def hold_requests(state: EngineState, held: bool) -> EngineState:
    """The state in which requests that have not started wait, or do so no longer."""
    return state if state.held == held else dataclasses.replace(state, held=held)


def started_requests(state: EngineState) -> int:
    """The number of open requests that have been given a rank."""
    return len(state.running) + sum(sequence.started for sequence in state.waiting.values())


def close_ranks(state: EngineState, ranks: Collection[int]) -> EngineState:
    """The state in which exactly these ranks admit no requests. Requests that run there go on."""
    return (
        state if state.closed_ranks == frozenset(ranks) else dataclasses.replace(state, closed_ranks=frozenset(ranks))
    )


def leaving_sequences(state: EngineState) -> list[Sequence]:
    """Sequences on closed ranks, those with the fewest tokens in the cache first: they are the quickest to move."""
    running = [sequence for sequence in state.running.values() if sequence.rank in state.closed_ranks]
    return sorted(running, key=lambda sequence: (sequence.computed, sequence.arrival))


def place_elsewhere(state: EngineState, request_id: str) -> Sequence | None:
    """The sequence of a request as it would be on another rank, with as many pages there. None when no open rank has
    room."""
    sequence = state.running[request_id]
    source = sequence.rank
    assert source is not None
    running = [other.rank for other in state.running.values()]
    rooms = [
        rank
        for rank, pool in state.pools.items()
        if rank != source
        and rank not in state.closed_ranks
        and running.count(rank) < state.limits.max_decode_rows
        and len(sequence.pages) < pool.available  # one more, so that it can go on
    ]
    if not rooms:
        return None
    target = min(rooms, key=lambda rank: (running.count(rank), -state.pools[rank].available, rank))
    _, pages = state.pools[target].alloc(len(sequence.pages))
    others = (other for other in state.running.values() if other.rank == target)
    slot = free_slot(others, states=state.limits.states)
    return dataclasses.replace(
        sequence, rank=target, pages=pages, slot=slot, snapshot=None, answer_snapshot=None, branch=0
    )


def free_places(state: EngineState, after: Sequence) -> EngineState:
    """The state in which the pages of `place_elsewhere` have no content: entries can be copied to them, whether or not
    the request moves then."""
    rank = after.rank
    assert rank is not None
    pool, pages = state.pools[rank].alloc(len(after.pages))
    assert pages == after.pages, f"pages {pages} are next on rank {rank}, not {after.pages}"
    return dataclasses.replace(state, pools={**state.pools, rank: pool.release(pages)})


def move(state: EngineState, before: Sequence, after: Sequence) -> EngineState:
    """The state in which a request is at the places that `free_places` freed. Requests may have come, ended or gone to
    another pool since; where it is not as `before` any more nothing changes.

    The caller has copied the KV entries of positions 0 .. computed - 1 from the old pages to the new ones, and the
    state that its next step reads. No step may be in flight.
    """
    assert not state.in_flight, "a request cannot move while its step runs"
    if state.running.get(before.id) != before:
        return state
    assert before.rank is not None
    assert after.rank is not None
    pool = state.pools[after.rank].take(after.pages)
    for page, key in zip(after.pages, after.page_keys or (), strict=False):
        pool = pool.seal(page, key)
    pools = {**state.pools, after.rank: pool, before.rank: state.pools[before.rank].release(before.pages)}
    return dataclasses.replace(state, pools=pools, running={**state.running, before.id: after})


def requeue_ranks(state: EngineState, ranks: Collection[int]) -> EngineState:
    """The requests of these ranks back at the front of the queue, as prompt + generated tokens, to be computed again.
    No step may be in flight."""
    assert not state.in_flight, "a request cannot move while its step runs"
    going = [sequence for sequence in state.running.values() if sequence.rank in ranks]
    pools = dict(state.pools)
    for sequence in going:
        assert sequence.rank is not None
        pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    ids = {sequence.id for sequence in going}
    running = {key: sequence for key, sequence in state.running.items() if key not in ids}
    return dataclasses.replace(state, pools=pools, running=running, waiting=requeue(state.waiting, going))


def invalidate_caches(state: EngineState) -> EngineState:
    """The state without any cached or recoverable KV: every request is computed again, and no prefix is found."""
    state = requeue_ranks(state, state.pools)
    waiting = {key: sequence.restarted() for key, sequence in state.waiting.items()}
    pools = {rank: PagePool.empty(pool.total) for rank, pool in state.pools.items()}
    return dataclasses.replace(state, pools=pools, waiting=waiting, sent={})
