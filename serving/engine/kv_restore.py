"""Restores the KV entries of requests whose rank died from a KV replica: pure transitions of the state."""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.engine.batch import Batch
from serving.engine.sequence import Sequence
from serving.engine.state import EngineState, requeue, seal_full_pages


def written_since(step: int, rank: int, batches: Iterable[Batch], page_size: int) -> dict[int, int]:
    """{page: first offset} written on a rank by those of `batches` that come after `step`."""
    first: dict[int, int] = {}
    for work in (work for batch in batches if batch.step > step for work in batch.scheduled.get(rank, ())):
        for position in range(work.start, work.start + work.rows):
            page, offset = divmod(position, page_size)
            first[work.pages[page]] = min(offset, first.get(work.pages[page], offset))
    return first


def replicated_entries(sequence: Sequence, missing: Mapping[int, int], page_size: int) -> int:
    """Number of leading KV entries of a running request that the replica of its rank's cache holds. `missing` maps
    each page that the replica lacks entries of to the first missing offset; pages may be shared with other requests."""
    holes = (
        index * page_size + missing[page]
        for index, page in enumerate(sequence.pages[: -(-sequence.computed // page_size)])
        if page in missing
    )
    return min((sequence.computed, *holes))


def mark_restored(state: EngineState, request_id: str, count: int) -> EngineState:
    """The state after the entries of positions 0 .. count - 1 of a request were written to its new rank's cache."""
    before = state.running[request_id]
    rank, recoverable = before.rank, before.recoverable
    assert rank is not None
    assert recoverable is not None
    left = None if count >= recoverable.count else recoverable
    sequence, pool = seal_full_pages(
        state, dataclasses.replace(before, computed=count, recoverable=left), state.pools[rank]
    )
    pools, running = {**state.pools, rank: pool}, {**state.running, request_id: sequence}
    return dataclasses.replace(state, pools=pools, running=running)


def drop_recoverable(state: EngineState, request_ids: Iterable[str]) -> EngineState:
    """The state without recoverable KV for these requests: they are computed again. Requests that were being restored
    give up their rank."""
    ids, pools = set(request_ids), dict(state.pools)
    going = [sequence for key, sequence in state.running.items() if key in ids and sequence.restoring]
    for sequence in going:
        assert sequence.rank is not None
        pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    waiting = {
        key: sequence.restarted() if key in ids else sequence for key, sequence in requeue(state.waiting, going).items()
    }
    gone = {sequence.id for sequence in going}
    running = {key: sequence for key, sequence in state.running.items() if key not in gone}
    return dataclasses.replace(state, pools=pools, running=running, waiting=waiting)


def sequences_to_restore(state: EngineState) -> list[Sequence]:
    """Sequences that wait for recoverable KV, with a rank or without."""
    everyone = (*state.running.values(), *state.waiting.values())
    return [sequence for sequence in everyone if sequence.recoverable is not None]
