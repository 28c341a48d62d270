"""Requests that go on in another pool: pure transitions of the states of both.

A pool for prompts does not decode: a request stops there when a single token is left to compute. `send` takes it out of
that state, which holds its pages, and `receive` puts it into the queue of the other one, where its entries are restored
as those of a lost rank are (serving/engine/kv_restore.py). `release` gives the pages up.
"""

import dataclasses
from collections.abc import Collection

from planner.plan.step_layout import TILE
from serving.engine.page_pool import hash_pages
from serving.engine.sequence import RecoverableKV, Sequence
from serving.engine.state import EngineState, remove_requests, requeue


def decoding_here(state: EngineState, decodes: bool) -> EngineState:
    """The state in which requests get decode rows, or do so no longer."""
    return state if state.decodes == decodes else dataclasses.replace(state, decodes=decodes)


def sequences_to_send(state: EngineState) -> list[Sequence]:
    """The requests of a pool that does not decode of which one token is left to compute, in order of arrival."""
    if state.decodes:
        return []
    ready = [each for each in state.running.values() if each.pending == 1 and not (each.in_flight or each.restoring)]
    return sorted(ready, key=lambda sequence: sequence.arrival)


def has_room(state: EngineState, sequence: Sequence) -> bool:
    """Whether a rank of the pool has pages for the request and for one token more, and a decode row, beside the
    requests that wait already."""
    limits, need = state.limits, state.limits.pages_needed(sequence.request)
    ranks = [rank for rank in state.pools if rank not in state.closed_ranks]
    running = sum(each.rank in ranks for each in state.running.values())
    pages = min(limits.pages_for(sequence.length) + 1, need)
    waiting = sum(limits.pages_for(each.length) + 1 for each in state.waiting.values())
    return running + len(state.waiting) < limits.max_decode_rows * len(ranks) and any(
        need <= state.pools[rank].total and pages + waiting <= state.pools[rank].available for rank in ranks
    )


def send(state: EngineState, request_id: str) -> EngineState:
    """The state in which another pool goes on with a request of this one, whose pages are held."""
    running = {key: sequence for key, sequence in state.running.items() if key != request_id}
    return dataclasses.replace(state, running=running, sent={**state.sent, request_id: state.running[request_id]})


def release(state: EngineState, request_ids: Collection[str]) -> EngineState:
    """The state that holds no pages for these requests any more; full pages stay in the prefix cache."""
    pools, ids = dict(state.pools), set(request_ids) & state.sent.keys()
    for sequence in (state.sent[request_id] for request_id in ids):
        assert sequence.rank is not None
        pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    sent = {key: sequence for key, sequence in state.sent.items() if key not in ids}
    return dataclasses.replace(state, pools=pools, sent=sent) if ids else state


def receive(state: EngineState, sequence: Sequence, recoverable: RecoverableKV | None) -> EngineState:
    """The state with a request of another pool in its queue, in order of arrival, with the entries that replicas hold
    of it."""
    waiting = requeue(state.waiting, [dataclasses.replace(sequence, recoverable=recoverable)])
    return dataclasses.replace(state, waiting=waiting, arrivals=max(state.arrivals, sequence.arrival + 1))


def take_out(state: EngineState, request_ids: Collection[str]) -> tuple[EngineState, list[Sequence]]:
    """The state without these waiting requests, and the requests."""
    taken = [state.waiting[request_id] for request_id in request_ids]
    return remove_requests(state, request_ids) if taken else state, taken


def is_prompt(state: EngineState, sequence: Sequence) -> bool:
    """Whether a waiting request has more to compute than one tile, with what the pool's prefix caches have of it: in a
    decode step it would delay the others."""
    if sequence.recoverable is not None:
        return False
    found = 0
    if state.limits.prefix_caching:
        keys = hash_pages(sequence.tokens(0, sequence.length - 1), state.limits.page_size, state.root_key)
        found = max((len(pool.match(keys)) for pool in state.pools.values()), default=0) * state.limits.page_size
    return sequence.length - found > TILE
