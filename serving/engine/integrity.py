"""A check that a state conserves pages, decode rows and requests. Tests run it after every transition."""

from serving.engine.page_pool import check_pages
from serving.engine.sequence import Sequence
from serving.engine.state import EngineState


def check_integrity(state: EngineState, before: EngineState | None = None) -> None:
    """Raise AssertionError unless pages, decode rows and requests are conserved. Sequences and pools that are those of
    `before`, a state that was checked, are not looked at again."""
    known = {} if before is None else {**before.waiting, **before.running}
    both = state.waiting.keys() & state.running.keys()
    assert not both, f"{both} are waiting and running"
    arrivals = [sequence.arrival for sequence in state.waiting.values()]
    assert arrivals == sorted(arrivals), f"the queue is out of order: {arrivals}"
    everyone = [*state.waiting.items(), *state.running.items()]
    assert len({sequence.arrival for _, sequence in everyone}) == len(everyone), "two requests, one arrival"
    for key, sequence in everyone:
        request = sequence.request
        assert key == sequence.id
        assert sequence.arrival < state.arrivals, f"{key} arrived as {sequence.arrival} of {state.arrivals}"
        if known.get(key) is sequence:
            continue
        assert not request.sampling.stop_tokens.intersection(sequence.generated), f"{key} is past its stop token"
        over = sequence.known_tokens and state.limits.length_reason(request, sequence.known_tokens)
        assert not over, f"{key} has all its tokens and is still open"
    for key, sequence in state.waiting.items():
        if before is not None and before.waiting.get(key) is sequence:
            continue
        assert sequence == sequence.preempted(), f"{sequence.id} waits and holds {sequence.pages}"
    open_and_sent = state.sent.keys() & {**state.waiting, **state.running}.keys()
    assert not open_and_sent, f"{open_and_sent} are open here and in another pool"
    for sequence in state.running.values():
        assert sequence.rank in state.pools, f"{sequence.id} runs on rank {sequence.rank}, which is not there"
        assert sequence.pending >= 1 or sequence.ending, f"{sequence.id} has nothing to compute"
        room = len(sequence.pages) * state.limits.page_size
        assert sequence.computed <= room, f"{sequence.id} has {sequence.computed} entries in room for {room}"
    for rank, pool in state.pools.items():
        here = [sequence for sequence in state.running.values() if sequence.rank == rank]
        if before is not None and before.pools.get(rank) is pool:
            there = [sequence for sequence in before.running.values() if sequence.rank == rank]
            if list(map(id, here)) == list(map(id, there)) and state.sent == before.sent:
                continue
        most = state.limits.max_decode_rows
        assert len(here) <= most, f"rank {rank} runs {len(here)} sequences, its rows are {most}"
        sent = [sequence for sequence in state.sent.values() if sequence.rank == rank]
        check_pages(pool, [page for sequence in (*here, *sent) for page in sequence.pages])
        slots = [sequence.slot for sequence in here if state.limits.states]
        assert len(set(slots)) == len(slots), f"rank {rank} has two sequences in one slot of states: {slots}"
        beyond = [slot for slot in slots if slot is None or slot >= most]
        assert not beyond, f"rank {rank} has sequences in slots {beyond}, and {most} slots of states"
        _check_snapshots(state, rank, here)
        for sequence in here:
            for page in sequence.pages[sequence.committed // state.limits.page_size :]:
                assert pool.ref_counts[page] == 1, f"{sequence.id} will write on page {page}, which others read"
                assert page not in pool.keys, f"{sequence.id} will write on page {page}, which is sealed"


def _check_snapshots(state: EngineState, rank: int, here: list[Sequence]) -> None:
    """Raise AssertionError unless each place for snapshots has one use: a snapshot that is known, or one that a step in
    flight writes, beside reads of it."""
    places, known = state.limits.snapshot_places, [*state.pools[rank].snapshots.places.values()]
    written = [write.place for each in here for step in each.in_flight for write in step.snapshots]
    used = [*known, *written]
    assert len(set(used)) == len(used), f"rank {rank} has two uses of one place: snapshots {known}, written {written}"
    foreign = set(used).union(*(each.held_places for each in here)).difference(places)
    assert not foreign, f"rank {rank} uses {foreign} for snapshots, whose places are {places}"
    for sequence in here:
        reads = {sequence.snapshot, *(each.snapshot for each in sequence.in_flight)} - {None}
        own = {write.place for each in sequence.in_flight for write in each.snapshots}
        assert not reads & set(written) - own, f"{sequence.id} reads {reads}, and others write {written}"
