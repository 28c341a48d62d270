"""What of a lost request's cache outlived its rank, and how it gets it back: pure transitions beside those of
`serving.engine`."""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.batch import Batch
from serving.engine import EngineState, requeued, sealed
from serving.sequence import Sequence


def written_since(step: int, rank: int, batches: Iterable[Batch], page_size: int) -> dict[int, int]:
    """{page: first offset} of what steps after `step` wrote on a rank, of the steps there are."""
    first: dict[int, int] = {}
    for work in (work for batch in batches if batch.step > step for work in batch.work.get(rank, ())):
        for position in range(work.start, work.start + len(work.tokens)):
            page, offset = divmod(position, page_size)
            first[work.pages[page]] = min(offset, first.get(work.pages[page], offset))
    return first


def copied(sequence: Sequence, missing: Mapping[int, int], page_size: int) -> int:
    """How many of a running request's cache entries, from the first on, are in the copy of its rank's cache. `missing`
    has the pages of which entries are not, and the first offset of these: whoever wrote them, a page may be shared."""
    holes = (
        index * page_size + missing[page]
        for index, page in enumerate(sequence.pages[: -(-sequence.computed // page_size)])
        if page in missing
    )
    return min((sequence.computed, *holes))


def restored(state: EngineState, request_id: str, count: int) -> EngineState:
    """The entries up to position `count - 1` of a request are in the cache of the rank it was given a place on."""
    before = state.running[request_id]
    rank, salvage = before.rank, before.salvage
    assert rank is not None
    assert salvage is not None
    left = None if count >= salvage.count else salvage
    sequence, pool = sealed(state, dataclasses.replace(before, computed=count, salvage=left), state.pools[rank])
    pools, running = {**state.pools, rank: pool}, {**state.running, request_id: sequence}
    return dataclasses.replace(state, pools=pools, running=running)


def forget(state: EngineState, request_ids: Iterable[str]) -> EngineState:
    """What was salvaged of these requests is of no use: they are computed again. Those that are being restored give
    their places back."""
    ids, pools = set(request_ids), dict(state.pools)
    going = [sequence for key, sequence in state.running.items() if key in ids and sequence.restoring]
    for sequence in going:
        assert sequence.rank is not None
        pools[sequence.rank] = pools[sequence.rank].release(sequence.pages)
    waiting = {
        key: sequence.forgotten() if key in ids else sequence
        for key, sequence in requeued(state.waiting, going).items()
    }
    gone = {sequence.id for sequence in going}
    running = {key: sequence for key, sequence in state.running.items() if key not in gone}
    return dataclasses.replace(state, pools=pools, running=running, waiting=waiting)


def salvaged(state: EngineState) -> list[Sequence]:
    """Requests that wait for cache entries, with a place or without."""
    everyone = (*state.running.values(), *state.waiting.values())
    return [sequence for sequence in everyone if sequence.salvage is not None]
