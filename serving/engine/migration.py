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


def migrate(state: EngineState, request_id: str) -> tuple[EngineState, Sequence] | None:
    """Move a request to another rank, with as many pages there, and return its sequence as it is then. None when no
    open rank has room.

    The caller must copy the KV entries of positions 0 .. computed - 1 from the old pages to the new ones, and the state
    that its next step reads, before it uses the state. No step may be in flight.
    """
    assert not state.in_flight, "a request cannot move while its step runs"
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
    pool, pages = state.pools[target].alloc(len(sequence.pages))
    for page, key in zip(pages, sequence.page_keys or (), strict=False):
        pool = pool.seal(page, key)
    others = (other for other in state.running.values() if other.rank == target)
    slot = free_slot(others, states=state.limits.states)
    moved = dataclasses.replace(sequence, rank=target, pages=pages, slot=slot)
    pools = {**state.pools, target: pool, source: state.pools[source].release(sequence.pages)}
    return dataclasses.replace(state, pools=pools, running={**state.running, request_id: moved}), moved


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
