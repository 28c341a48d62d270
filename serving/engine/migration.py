"""How requests leave a rank that is to go: pure transitions beside those of `serving.engine`."""

import dataclasses
from collections.abc import Collection

from serving.engine import EngineState, requeued
from serving.pages import PagePool
from serving.sequence import Sequence


def close(state: EngineState, ranks: Collection[int]) -> EngineState:
    """No request is given a place on these ranks any more; those that run there go on. All other ranks are open."""
    return state if state.closed == frozenset(ranks) else dataclasses.replace(state, closed=frozenset(ranks))


def leaving(state: EngineState) -> list[Sequence]:
    """Requests on closed ranks, those with the fewest tokens in the cache first: they are the quickest to move."""
    running = [sequence for sequence in state.running.values() if sequence.rank in state.closed]
    return sorted(running, key=lambda sequence: (sequence.computed, sequence.arrival))


def move(state: EngineState, request_id: str) -> tuple[EngineState, Sequence] | None:
    """The request on another rank, with as many pages there as it has here, and the sequence as it is then.

    The cache entries 0 .. computed - 1 must have been copied from its old pages to its new ones before the state is
    used. None when no open rank has room. The step in flight, if any, must be over.
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
        and rank not in state.closed
        and running.count(rank) < state.limits.most_decode
        and len(sequence.pages) < pool.available  # one more, so that it can go on
    ]
    if not rooms:
        return None
    target = min(rooms, key=lambda rank: (running.count(rank), -state.pools[rank].available, rank))
    pool, pages = state.pools[target].alloc(len(sequence.pages))
    for page, key in zip(pages, sequence.chain or (), strict=False):
        pool = pool.seal(page, key)
    moved = dataclasses.replace(sequence, rank=target, pages=pages)
    pools = {**state.pools, target: pool, source: state.pools[source].release(sequence.pages)}
    return dataclasses.replace(state, pools=pools, running={**state.running, request_id: moved}), moved


def displace(state: EngineState, ranks: Collection[int]) -> EngineState:
    """The requests of these ranks at the front of the queue, as prompt + tokens so far, to be computed again."""
    assert not state.in_flight, "a request cannot move while its step runs"
    going = [sequence for sequence in state.running.values() if sequence.rank in ranks]
    pools = dict(state.pools)
    for sequence in going:
        assert sequence.rank is not None
        pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    ids = {sequence.id for sequence in going}
    running = {key: sequence for key, sequence in state.running.items() if key not in ids}
    return dataclasses.replace(state, pools=pools, running=running, waiting=requeued(state.waiting, going))


def distrust(state: EngineState) -> EngineState:
    """Nothing in any cache or copy counts any more: all requests are computed again, and no prefix is found."""
    state = displace(state, state.pools)
    waiting = {key: sequence.forgotten() for key, sequence in state.waiting.items()}
    pools = {rank: PagePool.of(pool.total) for rank, pool in state.pools.items()}
    return dataclasses.replace(state, pools=pools, waiting=waiting)
