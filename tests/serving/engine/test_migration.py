"""Requests that leave a rank keep their tokens and their cache, and nothing is owned twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.engine import migration
from serving.protocol.request import RequestPhase
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine


def server(ranks: int = 3, pages: int = 24, *, states: bool = False) -> FakeEngine:
    limits = small_limits(states=states, prefix_caching=not states)
    return FakeEngine.start(limits, dict.fromkeys(range(ranks), pages))


def move(fake: FakeEngine, request_id: str, *, ends: bool = True) -> bool:
    """Move a request with its cache entries, as operations do; or only copy them, if the move never `ends`."""
    before = fake.state.running[request_id]
    after = migration.place_elsewhere(fake.state, request_id)
    if after is None:
        return False
    fake._move(migration.free_places(fake.state, after))
    size = fake.state.limits.page_size
    source, target = fake.ranks[before.rank], fake.ranks[after.rank]
    for position in range(before.computed):
        page, offset = divmod(position, size)
        here, there = before.pages[page] * size + offset, after.pages[page] * size + offset
        target.token[there], target.position[there] = source.token[here], source.position[here]
    if before.states is not None and after.states is not None and before.computed:
        target.states[after.states[0]] = source.states[before.states[0]]
    if ends:
        fake._move(migration.move(fake.state, before, after))
    return True


def empty(fake: FakeEngine, rank: int) -> None:
    """Move what can be moved off a rank, and have the rest computed again."""
    fake._move(migration.close_ranks(fake.state, {rank}))
    for sequence in migration.leaving_sequences(fake.state):
        move(fake, sequence.id)
    fake._move(migration.requeue_ranks(fake.state, {rank}))
    assert all(sequence.rank != rank for sequence in fake.state.running.values())


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(st.integers(0, 96), min_size=1, max_size=40), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(1, 5), st.just(0)),
        st.tuples(st.just("drain"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("copy"), st.integers(0, 11), st.just(0)),
        st.tuples(st.just("distrust"), st.just(0), st.just(0)),
        st.tuples(st.just("lose"), st.integers(0, 2), st.just(0)),
    ),
    max_size=40,
)


@given(events, st.booleans())
def test_whatever_is_moved_and_when_every_stream_has_the_tokens_it_has_alone(script, states):
    fake, count = server(states=states), 0
    for what, value, length in script:
        if what == "submit" and len(fake.state.waiting) < fake.state.limits.max_queue:
            fake.submit(small_request(f"r{count}", value, max_tokens=length, seed=count))
            count += 1
        elif what == "step":
            for _ in range(value):
                fake.step()
        elif what == "drain":
            empty(fake, value)
            fake.adopt({rank: 24 for rank in range(3) if rank != value})
            fake.adopt(dict.fromkeys(range(3), 24), fresh=(value,))
            fake._move(migration.close_ranks(fake.state, ()))
        elif what in ("move", "copy") and f"r{value}" in fake.state.running:
            move(fake, f"r{value}", ends=what == "move")
        elif what == "distrust":
            fake._move(migration.invalidate_caches(fake.state))
        elif what == "lose":
            fake.lose({value})
            fake.adopt(dict.fromkeys(range(3), 24), fresh=(value,))
    fake.drain()
    fake.check_streams(all_ended=True)


def test_a_closed_rank_takes_no_request_and_keeps_those_it_has():
    fake = server(2)
    for name in "abcd":
        fake.submit(small_request(name, max_tokens=20))
    fake.step()
    here = {sequence.id for sequence in fake.state.running.values() if sequence.rank == 0}
    fake._move(migration.close_ranks(fake.state, {0}))
    for name in "efgh":
        fake.submit(small_request(name, max_tokens=20))
    for _ in range(3):
        fake.step()
    assert {sequence.id for sequence in fake.state.running.values() if sequence.rank == 0} == here
    assert here


def test_a_moved_request_computes_nothing_again():
    fake = server(2)
    fake.submit(small_request("a", range(1, 30), max_tokens=20))
    for _ in range(4):
        fake.step()
    before = fake.state.running["a"]
    fake._move(migration.close_ranks(fake.state, {before.rank}))
    assert move(fake, "a")
    after = fake.state.running["a"]
    assert after.rank != before.rank
    assert (after.computed, after.generated, after.phase) == (before.computed, before.generated, RequestPhase.DECODE)
    batch = fake.step()
    assert batch is not None
    assert [len(work.tokens) for work in batch.scheduled[after.rank]] == [1]


def test_a_request_moves_to_another_rank_also_from_one_that_is_open():
    fake = server(3)
    for name in "abc":
        fake.submit(small_request(name, max_tokens=20))
    fake.step()
    before = fake.state.running["a"].rank
    assert move(fake, "a")
    assert fake.state.running["a"].rank != before


def test_without_room_elsewhere_a_request_stays_where_it_is():
    fake = server(2, pages=6)
    for name in "ab":
        fake.submit(small_request(name, range(1, 40), max_tokens=8))
    fake.step()
    rank = fake.state.running["a"].rank
    fake._move(migration.close_ranks(fake.state, {rank}))
    assert migration.place_elsewhere(fake.state, "a") is None
    fake.drain()
    fake.check_streams(all_ended=True)


def test_a_request_does_not_move_while_its_step_runs():
    fake = server(2)
    fake.submit(small_request("a"))
    fake.begin()
    with pytest.raises(AssertionError, match="while its step runs"):
        move(fake, "a")


def test_a_copy_whose_request_ended_leaves_no_prefix_that_it_wrote_over():
    fake = server(2, pages=10)
    prompt = range(1, 60)
    fake.submit(small_request("a", prompt, max_tokens=2))
    fake.drain()
    (cached,) = [rank for rank, pool in fake.state.pools.items() if pool.evictable]
    fake._move(migration.close_ranks(fake.state, {cached}))
    fake.submit(small_request("b", range(40, 90), max_tokens=20, seed=5))
    for _ in range(3):
        fake.step()
    fake._move(migration.close_ranks(fake.state, ()))
    assert fake.state.running["b"].rank != cached
    assert move(fake, "b", ends=False)
    fake._move(migration.close_ranks(fake.state, {fake.state.running["b"].rank}))
    fake.submit(small_request("c", prompt, max_tokens=8, seed=1))
    fake.drain()
    fake.check_streams(all_ended=True)
