"""Requests move between two pools under any schedule of losses, and every stream has the tokens it has alone."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.core.hand_over import HandOver
from serving.engine import hand_over
from serving.engine.integrity import check_integrity
from serving.engine.poison import Incident, Suspicion
from serving.errors import MoejaxError
from serving.executor.failure_detector import Cause
from serving.protocol import clock
from serving.protocol.request import Finished
from serving.recovery.kv_replicas import KVReplicas
from simulation.hand_model import small_limits, small_request
from tests.support.replicated_engine import ReplicatedEngine

PAGES = 16


class PooledFake(ReplicatedEngine):
    """The engine of one pool, with a plan while it has ranks."""

    def __init__(self, ranks: range, replicas: KVReplicas | None = None, *, piece: int = 99, **limits: Any) -> None:
        pages = dict.fromkeys(ranks, PAGES)
        super().__init__(small_limits(**limits), pages, way="memory", most_pages=PAGES, piece=piece, replicas=replicas)
        self.all = pages
        self.failover = SimpleNamespace(
            plan=self, kv_replicas=self.replicas, membership=SimpleNamespace(losses=dict[int, Cause]())
        )
        losses = self.failover.membership.losses
        self.executor = SimpleNamespace(declare=lambda rank, cause, _: losses.update({rank: cause}))
        self.polls: list[Callable[[], None]] = []

    def wake(self) -> None:
        """Nothing sleeps here."""

    def call_later(self, delay_s: float, act: Callable[[], None]) -> None:
        self.polls.append(act)

    def lose_some(self, dead: list[int], part: int = 0) -> None:
        """Ranks die; without any left no plan is in force."""
        self.lose_protected(dead, part=part, worth=lambda _: True)
        self.adopt({rank: PAGES for rank in self.all if rank in self.ranks})
        self.failover.plan = self if self.ranks else None

    def come_back(self) -> None:
        """All ranks serve."""
        self.adopt(self.all)
        self.failover.plan = self


class TwoPools:
    """Two pools and the hand-over between them."""

    def __init__(self, prefill: int = 2, decode: int = 2, **limits: Any) -> None:
        self.prefill = PooledFake(range(prefill), **limits)
        self.decode = PooledFake(range(prefill, prefill + decode), self.prefill.replicas, **limits)
        self.decode.heard, self.decode.requests = self.prefill.heard, self.prefill.requests
        self.both = (self.prefill, self.decode)
        self.hand_over = HandOver(*cast(Any, self.both))
        self.count = 0

    def move(self) -> None:
        self.hand_over.run()
        for each in self.both:
            check_integrity(each.state)
        twice = {*self.prefill.state.running, *self.prefill.state.waiting} & {
            *self.decode.state.running,
            *self.decode.state.waiting,
        }
        assert not twice, f"{twice} are open in both pools"

    def submit(self, prompt: tuple[int, ...], **fields: Any) -> str:
        self.count += 1
        target = self.prefill if self.prefill.failover.plan or not self.decode.failover.plan else self.decode
        self.hand_over.count_arrivals()
        target.submit(small_request(f"r{self.count}", prompt, seed=self.count, **fields))
        return f"r{self.count}"

    def step(self, pool: PooledFake) -> None:
        self.move()
        if pool.failover.plan is not None:
            pool.step()
        self.move()

    def open(self) -> list[str]:
        return [key for each in self.both for key in (*each.state.running, *each.state.waiting)]

    def finish(self) -> None:
        for each in self.both:
            if each.failover.plan is None:
                each.come_back()
        for _ in range(2000):
            if not self.open():
                break
            for each in self.both:
                for rank in list(each.uncopied):
                    each.copy_now(rank)
                self.step(each)
        assert not self.open(), "requests that never end"
        self.move()
        assert not self.prefill.state.sent
        for each in self.both:
            assert all(pool.used == 0 for pool in each.state.pools.values())
        self.check()

    def check(self) -> None:
        """See `FakeEngine.check_streams`: a request is open in one of the pools, or has ended."""
        state = self.prefill.state
        others = {**self.decode.state.waiting, **self.decode.state.running}
        self.prefill.state = dataclasses.replace(state, waiting={**state.waiting, **others})
        try:
            self.prefill.check_streams()
        finally:
            self.prefill.state = state

    def close(self) -> None:
        self.prefill.replicas.close()


class AnySchedule(RuleBasedStateMachine):
    """Requests, steps of either pool, copies that come late, losses of ranks and of whole pools, in any order."""

    @initialize(
        prefill=st.integers(1, 2), decode=st.integers(1, 2), piece=st.sampled_from((5, 99)), caching=st.booleans()
    )
    def start(self, prefill: int, decode: int, piece: int, caching: bool) -> None:
        self.pools = TwoPools(prefill, decode, piece=piece, prefix_caching=caching)

    @rule(
        length=st.one_of(st.integers(1, 12), st.integers(30, 80)),
        first=st.integers(0, 1),
        max_tokens=st.integers(0, 20),
    )
    def submit(self, length: int, first: int, max_tokens: int) -> None:
        prompt = tuple((first + 7 * i) % 97 for i in range(length))
        scored = 0 if max_tokens == 0 else None
        try:
            self.pools.submit(prompt, max_tokens=max_tokens, prompt_logprobs=scored)
        except MoejaxError:
            assert f"r{self.pools.count}" not in self.pools.open()

    @rule(which=st.integers(0, 1), count=st.integers(1, 5))
    def steps(self, which: int, count: int) -> None:
        for _ in range(count):
            self.pools.step(self.pools.both[which])

    @rule()
    def copies(self) -> None:
        for pool in self.pools.both:
            for rank in list(pool.uncopied):
                pool.copy_now(rank)
        self.pools.move()

    @rule(which=st.integers(0, 1), data=st.data(), part=st.integers(0, 30))
    def loss(self, which: int, data: st.DataObject, part: int) -> None:
        pool = self.pools.both[which]
        if pool.ranks:
            pool.lose_some(data.draw(st.lists(st.sampled_from(sorted(pool.ranks)), min_size=1, unique=True)), part)

    @rule(which=st.integers(0, 1))
    def comes_back(self, which: int) -> None:
        self.pools.both[which].come_back()

    @precondition(lambda self: self.pools.open())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.pools.open())))
        for pool in self.pools.both:
            pool.cancel(request_id)
        self.pools.move()

    @invariant()
    def streams_have_their_tokens(self) -> None:
        if hasattr(self, "pools"):
            self.pools.check()

    def teardown(self) -> None:
        if hasattr(self, "pools"):
            self.pools.finish()
            self.pools.close()


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def pools():
    made = TwoPools()
    yield made
    made.close()


def test_a_prompt_is_computed_in_one_pool_and_its_tokens_after_the_first_in_the_other(pools: TwoPools) -> None:
    request_id = pools.submit(tuple(range(40)))
    pools.step(pools.prefill)
    pools.step(pools.prefill)
    assert len(pools.prefill.tokens(request_id)) == 1
    assert request_id in pools.prefill.state.running  # until the replica has its entries
    for rank in list(pools.prefill.uncopied):
        pools.prefill.copy_now(rank)
    pools.prefill.polls.pop()()
    assert request_id in pools.decode.state.waiting
    assert request_id in pools.prefill.state.sent
    pools.step(pools.decode)
    assert len(pools.prefill.tokens(request_id)) == 2
    assert pools.prefill.state.sent == {}
    assert sum(pool.used for pool in pools.prefill.state.pools.values()) == 0
    pools.finish()
    assert pools.decode.restored == 40


def test_a_prompt_of_which_the_cache_has_all_but_the_last_token_goes_on_though_no_step_has_work_for_it() -> None:
    pools = TwoPools(prefix_caching=True)
    prompt = tuple(range(2 * pools.prefill.state.limits.page_size + 1))
    for _ in range(2):
        pools.submit(prompt, max_tokens=4)
        pools.finish()
    assert pools.hand_over.sent == 2
    pools.close()


def test_a_decode_rank_that_dies_during_the_hand_over_costs_no_prompt(pools: TwoPools) -> None:
    request_id = pools.submit(tuple(range(40)))
    for _ in range(2):
        pools.step(pools.prefill)
    pools.prefill.copy_now(next(iter(pools.prefill.uncopied)))
    steps = pools.prefill.state.step
    pools.move()
    pools.decode.restore()
    (rank,) = {each.rank for each in pools.decode.state.running.values()}
    assert rank is not None
    pools.decode.lose_some([rank])
    pools.step(pools.decode)
    assert request_id in pools.prefill.state.sent or len(pools.prefill.tokens(request_id)) > 1
    pools.finish()
    assert pools.prefill.state.step == steps, "the prompt was computed again"


def test_the_other_pool_decodes_while_one_is_lost_and_gives_it_back(pools: TwoPools) -> None:
    pools.submit(tuple(range(20)), max_tokens=12)
    pools.decode.lose_some([2, 3])
    for _ in range(4):
        pools.step(pools.prefill)
    assert len(pools.prefill.tokens("r1")) > 1
    pools.decode.come_back()
    for rank in list(pools.prefill.uncopied):
        pools.prefill.copy_now(rank)
    pools.move()
    assert "r1" in pools.decode.state.waiting
    pools.finish()


def test_prompts_wait_where_they_are_when_the_decode_pool_has_no_room(pools: TwoPools) -> None:
    rows = 2 * pools.decode.state.limits.max_decode_rows
    for nth in range(rows + 2):
        pools.submit((nth, 1, 2), max_tokens=30)
    for _ in range(20):
        for rank in list(pools.prefill.uncopied):
            pools.prefill.copy_now(rank)
        pools.step(pools.prefill)
    assert len(pools.decode.state.waiting) + len(pools.decode.state.running) <= rows
    assert len(hand_over.sequences_to_send(pools.prefill.state)) == 2
    pools.finish()


def test_a_rank_that_replicates_nothing_any_more_is_replaced(pools: TwoPools, monkeypatch: pytest.MonkeyPatch) -> None:
    pools.submit(tuple(range(20)))
    for _ in range(2):
        pools.step(pools.prefill)
    assert not pools.prefill.failover.membership.losses
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + 60)
    pools.move()
    ((_, cause),) = pools.prefill.failover.membership.losses.items()
    assert "replica" in str(cause)


def test_a_request_takes_what_it_is_suspected_of_with_it(pools: TwoPools) -> None:
    for nth in range(2):
        pools.submit((nth, 1, 2), max_tokens=8)
    state = pools.prefill.state
    pools.prefill.state = state.with_suspicion(Suspicion(3, (Incident(2, {"r1": 90, "r2": 90}, (0,)),)))
    for _ in range(6):
        pools.step(pools.prefill)
        for rank in list(pools.prefill.uncopied):
            pools.prefill.copy_now(rank)
    pools.move()
    assert not pools.prefill.state.suspicion.incidents
    assert [set(each.until) for each in pools.decode.state.suspicion.incidents] == [{"r1"}, {"r2"}]


def test_owners_are_charged_in_the_prefill_pool_for_what_the_decode_pool_gave_them(pools: TwoPools) -> None:
    pools.submit(tuple(range(20)), max_tokens=10, owner="a")
    pools.finish()
    alone = TwoPools(2, 2)
    alone.decode.lose_some([2, 3])
    alone.submit(tuple(range(20)), max_tokens=10, owner="a")
    for _ in range(40):
        alone.step(alone.prefill)
    assert isinstance(alone.prefill.heard["r1"][-1], Finished)
    assert pools.prefill.state.counters.of("a") == alone.prefill.state.counters.of("a")
    alone.close()
