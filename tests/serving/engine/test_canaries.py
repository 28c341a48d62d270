"""Canaries run alone, on the ranks they are for, and change no token of anybody."""

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.canaries import end_canaries, submit_canaries
from serving.engine.sequence import Sequence
from serving.protocol.request import Request
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine

PAGES = {0: 24, 1: 24, 2: 24}

prompts = st.lists(st.integers(0, 96), min_size=1, max_size=40)
requests = st.lists(st.tuples(prompts, st.integers(1, 30)), max_size=12)


def canary(rank: int) -> Request:
    return small_request(f"canary-{rank}", tuple(range(11, 30)), max_tokens=5)


def begin_canaries(fake: FakeEngine) -> None:
    made = [(canary(rank), rank) for rank in fake.state.pools]
    fake._move(submit_canaries(fake.state, made))
    for request, _ in made:
        fake.requests[request.id], fake.heard[request.id] = request, []


def placed(fake: FakeEngine) -> dict[str, Sequence]:
    return {key: each for key, each in fake.state.running.items() if key in fake.state.canaries}


@given(requests, st.integers(0, 12), st.booleans())
def test_canaries_run_alone_each_on_its_rank_and_everybody_gets_the_tokens_it_has_alone(
    drawn: list[tuple[list[int], int]], steps: int, twice: bool
) -> None:
    fake = FakeEngine.start(small_limits(), PAGES)
    for number, (prompt, count) in enumerate(drawn):
        fake.submit(small_request(f"r{number}", tuple(prompt), max_tokens=count))
    for _ in range(steps):
        if (batch := fake.begin()) is not None:
            fake.end(batch)
    begin_canaries(fake)
    if twice and (batch := fake.begin()) is not None:
        fake.end(batch)
        begin_canaries(fake)
    while any(fake.state.find(key) is not None for key in fake.state.canaries):
        batch = fake.begin()
        assert batch is not None, "the canaries stand still"
        for rank, work in batch.scheduled.items():
            assert {each.request_id for each in work} <= {f"canary-{rank}"}
        fake.end(batch)
    fake._move(end_canaries(fake.state))
    fake.finish()


def test_a_canary_reads_no_prefix_that_was_cached_before() -> None:
    fake = FakeEngine.start(small_limits(), PAGES)
    fake.submit(small_request("before", canary(0).prompt, max_tokens=5))
    fake.drain()
    begin_canaries(fake)
    batch = fake.begin()
    assert batch is not None
    assert len(placed(fake)) == len(PAGES)
    assert all(each.cached_tokens == 0 for each in placed(fake).values())
    fake.end(batch)


def test_without_canaries_everybody_runs_again() -> None:
    fake = FakeEngine.start(small_limits(), PAGES)
    fake.submit(small_request("a", (1, 2, 3), max_tokens=3))
    begin_canaries(fake)
    fake._move(end_canaries(fake.state))
    batch = fake.begin()
    assert batch is not None
    assert [each.request_id for work in batch.scheduled.values() for each in work] == ["a"]
    fake.end(batch)
