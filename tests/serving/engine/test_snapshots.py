"""Snapshots of states: requests with layers whose context is a state begin after what an earlier one has computed."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.plan.step_layout import TILE
from serving.engine.batch import Batch
from serving.engine.snapshots import SPACING_PAGES, Boundary, Snapshots, boundaries
from serving.protocol.request import Finished
from simulation.hand_model import small_request
from tests.support.fake_engine import FakeEngine, small_engine

RANKS, PAGES = 2, 14


def engine(snapshots: int = 4, pages: tuple[int, ...] = (16,), **limits: Any) -> FakeEngine:
    return small_engine(pages, states=True, snapshots=snapshots, **limits)


def started(fake: FakeEngine) -> dict[str, int]:
    """{request id: first position computed} of the next step."""
    batch = fake.step()
    assert batch is not None
    return {work.request_id: work.start for part in batch.scheduled.values() for work in part}


def told(fake: FakeEngine, name: str) -> list[int]:
    """The prompt of a request and its answer so far."""
    return [*fake.requests[name].prompt, *fake.tokens(name)]


# -- What is found ----------------------------------------------------------------------------------------------------


def test_the_same_prompt_begins_at_the_last_boundary_that_the_first_one_had_a_state_at() -> None:
    fake = engine()
    fake.submit(small_request("a", range(75)))
    fake.drain()
    fake.submit(small_request("b", range(75)))
    assert started(fake) == {"b": 64}
    fake.finish()
    assert fake.heard["b"][-1] == Finished("length", 64)


def test_the_next_turn_begins_at_the_last_page_of_the_answer() -> None:
    fake = engine()
    fake.submit(small_request("a", range(21), max_tokens=30))
    fake.drain()
    fake.submit(small_request("b", [*told(fake, "a"), 1, 2, 3]))
    assert started(fake) == {"b": 48}, "21 + 30 tokens, of which the last is in no cache: six full pages"
    fake.finish()


def test_the_third_prompt_begins_where_the_second_one_left_the_first() -> None:
    fake = engine()
    common = list(range(40))
    for name, rest in {"a": 50, "b": 60, "c": 70}.items():
        fake.submit(small_request(name, [*common, *range(rest, rest + 30)], max_tokens=1))
        first = started(fake)[name]
        assert first == {"a": 0, "b": 0, "c": 32}[name]
        fake.drain()
    fake.finish()


def test_a_preempted_request_goes_on_from_its_last_snapshot() -> None:
    fake = engine(pages=(9,))
    fake.submit(small_request("old", range(20), max_tokens=50))
    fake.step()
    fake.submit(small_request("young", range(50, 70), max_tokens=40))
    while not fake.state.preemptions:
        fake.step()
    had = len(told(fake, "young"))
    fake.cancel("old")
    assert had - 8 <= started(fake)["young"] < had
    fake.finish()


def test_without_room_for_snapshots_nothing_is_shared_and_the_streams_are_the_same() -> None:
    streams = []
    for snapshots in (0, 1, 4):
        fake = engine(snapshots)
        for name in "ab":
            fake.submit(small_request(name, range(40)))
            fake.drain()
        streams.append([fake.tokens(name) for name in "ab"])
        assert (fake.state.prefix_hits > 0) is (snapshots > 0)
        fake.finish()
    assert streams[0] == streams[1] == streams[2]


def test_a_snapshot_goes_with_its_page_with_its_rank_and_with_other_weights() -> None:
    fake = engine(pages=(16, 16))
    fake.submit(small_request("a", range(40)))
    fake.drain()
    fake.submit(small_request("masked", range(40)))
    fake.adopt({0: 16, 1: 16}, masked=[(0, 3)])
    assert started(fake)["masked"] == 0
    fake.drain()
    fake.adopt({0: 16, 1: 16})
    fake.submit(small_request("b", range(40)))
    assert started(fake) == {"b": 32}
    fake.drain()
    fake.submit(small_request("all pages", range(90, 0, -1)))
    for name in ("and", "others"):
        fake.submit(small_request(name, range(96, 6, -1)))
    fake.drain()
    assert all(pool.snapshots.places.keys() <= pool.index.keys() for pool in fake.state.pools.values())
    fake.lose([0, 1])
    fake.adopt({0: 16, 1: 16})
    fake.submit(small_request("c", range(40)))
    assert started(fake) == {"c": 0}
    fake.finish()


# -- Where snapshots are taken ----------------------------------------------------------------------------------------


@given(
    start=st.integers(0, 12),
    count=st.integers(2, 700),
    page_size=st.sampled_from([1, 8, 16, 32, 64, 24]),
    rest=st.integers(0, 100),
    branch=st.integers(0, 600),
)
def test_snapshots_are_at_boundaries_at_which_a_step_has_a_state(
    start: int, count: int, page_size: int, rest: int, branch: int
) -> None:
    start *= page_size
    stop = start + count
    prompt = stop if rest == 0 else stop - min(rest, count - 1)
    found = [*boundaries(start, stop, page_size=page_size, prompt=prompt, branch=branch)]
    assert [each.position for each in found] == sorted({each.position for each in found})
    for position, _ in found:
        assert start < position <= stop
        assert position % page_size == 0
        assert position == stop or (position - start) % TILE == 0
    assert sum(position >= prompt for position, _ in found) <= 1, "one behind the prompt"
    ends = [at for at in range(start + TILE, stop, TILE) if at % page_size == 0 and at < prompt]
    if ends:
        assert Boundary(ends[-1], optional=False) in found, "the last one inside of the prompt"
    if any(at <= branch for at in ends):
        assert Boundary(max(at for at in ends if at <= branch), optional=False) in found, "where another prompt left"
    spaced = [position for position, optional in found if optional]
    assert len({position // (SPACING_PAGES * page_size) for position in spaced}) == len(spaced)


def test_a_chunk_that_is_not_the_last_of_its_prompt_takes_optional_snapshots_alone() -> None:
    found = [*boundaries(0, 256, page_size=16, prompt=1000, branch=0)]
    assert found == [Boundary(128, optional=True), Boundary(256, optional=True)]
    assert [*boundaries(256, 257, page_size=16, prompt=200, branch=0)] == []
    assert [*boundaries(271, 272, page_size=16, prompt=200, branch=0)] == [Boundary(272, optional=False)]


def test_the_place_of_the_snapshot_used_longest_ago_is_taken_and_never_one_that_is_held() -> None:
    snapshots = Snapshots().add(b"a", 5).add(b"b", 6).add(b"c", 7, first=True)
    assert [*snapshots.places] == [b"c", b"a", b"b"]
    assert snapshots.take(range(5, 9), (), only_free=True) == (snapshots, 8)
    assert snapshots.take(range(5, 8), (), only_free=True) == (snapshots, None)
    assert snapshots.take(range(5, 8), {7}) == (snapshots.without([b"a"]), 5)
    assert snapshots.take(range(5, 8), {5, 6, 7}) == (snapshots, None)
    assert snapshots.take(range(5, 8), (), before=b"b") == (snapshots.without([b"b"]), 6)
    assert snapshots.take(range(5, 8), {6}, before=b"b") == (snapshots.without([b"c"]), 7)
    assert [*snapshots.used(b"c").places] == [b"a", b"b", b"c"]
    assert snapshots.add(b"a", 8).places[b"a"] == 5, "the first one stays: a request may begin from it"
    assert snapshots.last_of([b"x", b"a", b"y"]) == 2


def test_a_snapshot_takes_the_place_of_a_state_in_the_step_and_is_read_by_the_next() -> None:
    fake = engine()
    fake.submit(small_request("a", range(6), max_tokens=9))
    states = []
    for _ in range(6):
        batch = fake.step()
        assert batch is not None
        (work,) = batch.scheduled[0]
        written = fake.arrays(batch, 0)["state_write"]
        states.append((work.states, [int(place) for place in written if place < 99]))
    first = fake.state.limits.snapshot_places[0]
    assert states == [((0, 1), [1]), ((1, 2), [2]), ((2, 0), [first]), ((first, 1), [1]), ((1, 2), [2]), ((2, 0), [0])]


# -- Whatever happens -------------------------------------------------------------------------------------------------

events = st.lists(
    st.one_of(
        *[st.tuples(st.just("submit"), st.integers(20, 60), st.integers(8, 30))] * 2,
        *[st.tuples(st.just("turn"), st.integers(0, 9), st.integers(8, 20))] * 2,
        st.tuples(st.just("begin"), st.integers(1, 2), st.just(0)),
        *[st.tuples(st.just("step"), st.integers(1, 9), st.just(0))] * 4,
        # ranks that commit the first step in flight, and ranks of these that commit the one after it, as bits
        st.tuples(st.just("fail"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("lose"), st.integers(0, RANKS - 1), st.integers(0, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("mask"), st.integers(0, 1), st.just(0)),
    ),
    min_size=20,
    max_size=50,
)


class Script:
    """An engine with up to two steps in flight, and what happens to it."""

    def __init__(self, snapshots: int) -> None:
        self.fake = engine(snapshots, (PAGES,) * RANKS)
        self.in_flight: list[Batch] = []
        self.count = 0

    def run(self, what: str, value: int, length: int) -> None:
        fake = self.fake
        if what in ("submit", "turn") and len(fake.state.waiting) < fake.state.limits.max_queue:
            prompt = self.prompt(what, value)
            fake.submit(small_request(f"r{self.count}", prompt, max_tokens=length, seed=self.count % 3))
            self.count += 1
        elif what == "begin":
            self.begin(value)
        elif what == "step":
            for _ in range(value):
                self.begin(1 + value % 2)
                self.end()
        elif what == "fail":
            self.fail(value, length)
            fake.lose(())
        elif what == "lose":
            self.fail(length, length)
            fake.lose({value})
            fake.adopt({rank: PAGES for rank in range(RANKS) if rank != value})
            fake.adopt(dict.fromkeys(range(RANKS), PAGES))
        elif what == "cancel" and f"r{value}" in fake.requests:
            fake.cancel(f"r{value}")
        elif what == "mask":
            self.fail(3, 3)
            fake.lose(())
            fake.adopt(dict.fromkeys(range(RANKS), PAGES), masked=[(0, 1)] if value else [])

    def prompt(self, what: str, value: int) -> list[int]:
        """A prompt of a few kinds, so that many share prefixes; or a former one with its answer and a little more."""
        if what == "turn" and f"r{value}" in self.fake.requests:
            return [*told(self.fake, f"r{value}"), value][:70]
        rest, length = random.Random(value % 5), max(value, 1)
        return [*range(length // 2), *(rest.randrange(90) for _ in range(length - length // 2))]

    def begin(self, count: int) -> None:
        while len(self.in_flight) < count and (batch := self.fake.begin()) is not None:
            self.in_flight.append(batch)

    def end(self) -> None:
        if self.in_flight:
            self.fake.end(self.in_flight.pop(0))

    def fail(self, first: int, second: int) -> None:
        """The steps in flight fail: some ranks have committed the one, and some of these the other."""
        self.begin(2)
        ranks = set(range(RANKS))
        for batch, bits in zip(self.in_flight, (first, second), strict=False):
            ranks = {rank for rank in ranks if bits >> rank & 1}
            for rank in ranks & batch.scheduled.keys():
                self.fake.run(batch, rank)
        self.in_flight.clear()


@given(events, st.integers(1, 7))
def test_no_state_is_one_of_other_tokens_and_no_place_has_two_uses(
    script: list[tuple[str, int, int]], snapshots: int
) -> None:
    run = Script(snapshots)
    for event in script:
        run.run(*event)
        run.fake.check_streams()
    while run.in_flight:
        run.end()
    run.fake.finish()
    for pool in run.fake.state.pools.values():
        assert len(pool.snapshots.places) <= snapshots


@pytest.mark.parametrize("snapshots", [1, 2, 6])
def test_places_are_conserved_while_conversations_go_on(snapshots: int) -> None:
    fake = engine(snapshots, (40,))
    texts = [list(range(at, at + 20)) for at in range(4)]
    for turn in range(3):
        for at, text in enumerate(texts):
            fake.submit(small_request(f"{at}.{turn}", text, max_tokens=9))
        fake.drain()
        texts = [[*told(fake, f"{at}.{turn}"), 1, 2] for at in range(4)]
        assert len(fake.state.pools[0].snapshots.places) <= snapshots
    fake.finish()
    assert fake.state.prefix_hits > 0
