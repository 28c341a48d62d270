"""Transitions when ranks are lost and when a plan is adopted."""

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping

from serving.engine.migration import invalidate_caches
from serving.engine.page_pool import PageKey, PagePool
from serving.engine.sequence import RecoverableKV, Sequence
from serving.engine.state import EngineState, Output, remove_requests, requeue
from serving.errors import NoCapacity


def lose(
    state: EngineState, dead: Collection[int], recoverable: Mapping[str, RecoverableKV] | None = None
) -> EngineState:
    """Put the requests of dead ranks at the front of the queue, as prompt + generated tokens. Nothing is sent to a
    client twice.

    Steps in flight are dropped: their results will be refused, and their tokens are scheduled again. `recoverable` is
    the KV that replicas hold, by request; a request that was being restored keeps its own.
    """
    found = recoverable or {}
    lost = [
        dataclasses.replace(sequence, recoverable=found.get(sequence.id, sequence.recoverable))
        for sequence in state.running.values()
        if sequence.rank in dead
    ]
    return dataclasses.replace(
        state,
        pools={rank: pool for rank, pool in state.pools.items() if rank not in dead},
        running={key: each.without_in_flight() for key, each in state.running.items() if each.rank not in dead},
        waiting=requeue(state.waiting, lost),
        in_flight=(),
        decode_first=True,
        sent={key: each for key, each in state.sent.items() if each.rank not in dead},
    )


def adopt(
    state: EngineState,
    pages: Mapping[int, int],
    *,
    epoch: int,
    fresh: Collection[int] = (),
    masked: Iterable[tuple[int, int]] = (),
    known: Mapping[int, Mapping[int, PageKey]] | None = None,
    known_snapshots: Mapping[int, Mapping[int, PageKey]] | None = None,
    weights: int = 0,
) -> tuple[EngineState, tuple[Output, ...]]:
    """Take up the ranks of a new epoch and their numbers of pages. A rank of the previous epoch keeps its cache and
    its requests.

    A rank's cache is empty when the rank is new, in `fresh`, or has another number of pages than before; a new rank
    that has served before has the pages in `known`, with their keys, and the snapshots of states in `known_snapshots`,
    {place: key}. A request that no rank can hold any more ends
    with NoCapacity; without any rank all requests wait. A prefix is found only by requests that run with the same
    experts `masked`, (layer, expert), and with the weights of the same number, as the request that computed it. With
    other `weights` than before no cache holds anything: every open request is computed again, and requests that were
    held are not any more.
    """
    other_weights = weights != state.weights
    state = _rooted(dataclasses.replace(state, weights=weights), frozenset(masked))
    emptied = {rank for rank, pool in state.pools.items() if rank in fresh or pages.get(rank) != pool.total}
    decode_first = state.decode_first or bool(emptied)
    state = lose(state, emptied)
    if other_weights:
        state = dataclasses.replace(invalidate_caches(state), held=False)
    known, snapshots = known or {}, known_snapshots or {}
    pools = {
        rank: state.pools.get(rank) or PagePool.with_cached_pages(count, known.get(rank, {}), snapshots.get(rank, {}))
        for rank, count in pages.items()
    }
    state = dataclasses.replace(state, pools=pools, epoch=epoch, decode_first=decode_first)
    most = max(pages.values(), default=None)
    if most is None:
        return state, ()
    outputs: list[Output] = []
    for sequence in state.waiting.values():
        need = state.limits.pages_needed(sequence.request)
        if need > most:
            message = (
                f"the request needs {need} pages and the ranks alive have {most} each. "
                "Bring a rank with more memory back, or ask for fewer tokens."
            )
            outputs.append((sequence.id, NoCapacity(message)))
    return remove_requests(state, [request_id for request_id, _ in outputs]), tuple(outputs)


def _rooted(state: EngineState, masked: Collection[tuple[int, int]]) -> EngineState:
    """The state after the set of masked experts, or the weights, changed: what runs was computed in part by others."""
    named = repr(sorted(masked)) + (f" weights {state.weights}" if state.weights else "")
    root = hashlib.blake2b(named.encode(), digest_size=16).digest() if masked or state.weights else b""
    if root == state.root_key:
        return state
    running = {key: dataclasses.replace(_mixed(sequence), page_keys=None) for key, sequence in state.running.items()}
    waiting = {key: _mixed(sequence) for key, sequence in state.waiting.items()}
    return dataclasses.replace(state, root_key=root, running=running, waiting=waiting)


def _mixed(sequence: Sequence) -> Sequence:
    """The sequence with recoverable KV that other requests must not share."""
    if sequence.recoverable is None:
        return sequence
    return dataclasses.replace(sequence, recoverable=dataclasses.replace(sequence.recoverable, page_keys=None))
