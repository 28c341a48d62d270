"""States of requests: each has a slot to itself on its rank, and a step made again reads what it read before."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from planner.inputs.layer_states import STATE_COPIES
from serving.engine.sequence import free_slot
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine

RANKS, PAGES = 3, 10


def engine(**limits: Any) -> FakeEngine:
    """An engine of a model with states, with so few pages that requests are preempted."""
    return FakeEngine.start(
        small_limits(states=True, prefix_caching=False, **limits), dict.fromkeys(range(RANKS), PAGES)
    )


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 40), st.integers(1, 20)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        # ranks that commit the step, and ranks of these that commit the one after it, as bits
        st.tuples(st.just("fail"), st.integers(0, 7), st.integers(0, 7)),
        st.tuples(st.just("lose"), st.integers(0, RANKS - 1), st.integers(0, 7)),
    ),
    max_size=30,
)


@given(events)
def test_a_step_made_again_adds_no_token_twice_whoever_had_committed_it(script: list[tuple[str, int, int]]) -> None:
    fake, count = engine(), 0
    for what, value, length in script:
        if what == "submit" and len(fake.state.waiting) < fake.state.limits.max_queue:
            fake.submit(small_request(f"r{count}", range(value), max_tokens=length, seed=count))
            count += 1
        elif what == "step":
            for _ in range(value):
                fake.step()
        elif what == "fail":
            fail(fake, value, length)
            fake.lose(())
        elif what == "lose":
            fail(fake, length, length)
            fake.lose({value})
            fake.adopt({rank: PAGES for rank in range(RANKS) if rank != value})
            fake.adopt(dict.fromkeys(range(RANKS), PAGES))
        fake.check_streams()
    fake.finish()


def fail(fake: FakeEngine, first: int, second: int) -> None:
    """Two steps in flight that fail: some ranks have committed the one, and some of these the other."""
    steps = [fake.begin(), fake.begin()]
    ranks = set(range(RANKS))
    for batch, bits in zip(steps, (first, second), strict=True):
        if batch is None:
            return
        ranks = {rank for rank in ranks if bits >> rank & 1}
        for rank in ranks & batch.scheduled.keys():
            fake.run(batch, rank)


def test_a_state_is_read_until_two_more_steps_were_committed() -> None:
    fake = engine()
    fake.submit(small_request("a", range(5), max_tokens=9))
    places = []
    for _ in range(5):
        batch = fake.step()
        assert batch is not None
        places.append(batch.scheduled[0][0].states)
    assert places == [(0, 1), (1, 2), (2, 0), (0, 1), (1, 2)]
    assert STATE_COPIES == 3


def test_a_request_gets_the_lowest_slot_that_is_free() -> None:
    fake = engine(buckets=((4, 4),))
    for name in "abc":
        fake.submit(small_request(name, range(3), max_tokens=2 if name == "b" else 9))
    fake.adopt({0: 40})
    fake.step()
    assert [fake.state.running[name].slot for name in "abc"] == [0, 1, 2]
    fake.step()
    fake.submit(small_request("d", range(3), max_tokens=2))
    fake.step()
    assert fake.state.running["d"].slot == 1
    assert free_slot(fake.state.running.values(), states=True) == 3
    assert free_slot(fake.state.running.values(), states=False) is None
