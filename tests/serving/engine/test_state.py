import dataclasses

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.batch import Result
from serving.engine import apply, cancel, check_integrity, expire, is_foreseeable, lose, submit
from serving.errors import InvalidRequest, MoejaxError, NoCapacity, PromptTooLong, QueueFull
from serving.request import Finished, Guide, Phase, Scored, Token
from serving.scheduler import schedule
from tests.fakes import FakeServer, alone, next_token, small_limits, small_request

CONTEXT = 96


def server(pages=(16, 16), **changes) -> FakeServer:
    return FakeServer.start(small_limits(**changes), dict(enumerate(pages)))


def test_the_fake_model_can_be_worked_out_by_hand():
    assert next_token((5, 6), seed=3) == 3 + 1 * 5 + 2 * 6
    assert alone(small_request("a", (5, 6), seed=3, max_tokens=2), CONTEXT) == ([20, 80], "length")


def test_a_request_streams_its_tokens_and_then_its_end():
    s = server()
    s.submit(small_request("a", (5, 6), seed=3, max_tokens=2))
    s.drain()
    assert s.heard["a"] == [Token(0, 20, -20 / 64, 0), Token(1, 80, -80 / 64, 0), Finished("length")]


def test_a_stop_token_ends_the_stream_and_is_not_part_of_it():
    s = server()
    s.submit(small_request("a", (5, 6), seed=3, max_tokens=9, stop_tokens=frozenset({80})))
    s.drain()
    assert s.tokens("a") == [20]
    assert s.heard["a"][-1] == Finished("stop")


def test_a_full_context_ends_the_stream():
    s = server(max_context=10)
    s.submit(small_request("a", range(7), max_tokens=50))
    s.drain()
    assert len(s.tokens("a")) == 3
    s.check_streams(all_ended=True)


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    with pytest.raises(PromptTooLong, match="96 tokens and the context holds 96"):
        server().submit(small_request("a", range(96)))


def test_a_request_larger_than_a_rank_is_refused_with_both_numbers():
    with pytest.raises(InvalidRequest, match="need 7 pages of 8 tokens; a rank has 6"):
        server((4, 6)).submit(small_request("a", range(40), max_tokens=10))


def test_the_largest_request_a_rank_can_hold_is_served():
    s = server((6,))
    s.submit(small_request("a", range(40), max_tokens=9))
    s.drain()
    s.check_streams(all_ended=True)


@pytest.mark.parametrize("change", [{"prompt": ()}, {"max_tokens": 0}, {"id": "taken"}])
def test_what_cannot_be_served_is_refused_and_names_its_field(change):
    s = server()
    s.submit(small_request("taken"))
    with pytest.raises(InvalidRequest) as refusal:
        s.submit(dataclasses.replace(small_request("a"), **change))
    assert refusal.value.param


def test_the_queue_has_a_bound():
    s = server(max_queue=2)
    s.submit(small_request("a"))
    s.submit(small_request("b"))
    with pytest.raises(QueueFull, match="2 requests are waiting and the queue holds 2") as refusal:
        s.submit(small_request("c"))
    assert refusal.value.retry_after_s


def test_a_cancelled_request_ends_once_and_frees_its_pages():
    s = server()
    s.submit(small_request("a"))
    s.step()
    s.cancel("a")
    s.cancel("a")
    assert s.heard["a"][-1:] == [Finished("cancelled")]
    assert all(pool.used == 0 for pool in s.state.pools.values())
    s.check_streams(all_ended=True)


def test_the_front_can_end_a_request_at_a_stop_string():
    state = submit(server().state, small_request("a"))
    assert cancel(state, "a", "stop")[1] == (("a", Finished("stop")),)


def test_an_unknown_request_is_not_cancelled():
    state = server().state
    assert cancel(state, "a") == (state, ())


def test_a_request_ends_at_its_deadline_and_not_before():
    state = submit(server().state, small_request("a", deadline=5.0))
    assert expire(state, 4.9) == (state, ())
    assert expire(state, 5.0)[1] == (("a", Finished("deadline")),)


def test_a_step_in_flight_passes_over_what_was_cancelled_even_if_the_id_is_used_again():
    s = server()
    s.submit(small_request("a"))
    batch = s.begin()
    s.cancel("a")
    s.submit(small_request("a", (9,)))
    s.end(batch)
    assert s.heard["a"] == []
    s.drain()
    s.check_streams(all_ended=True)


def test_results_count_once_and_not_after_a_loss():
    state, batch = schedule(submit(server().state, small_request("a", (5,))))
    results = {"a": Result(1, 0.0)}
    after, _ = apply(state, batch, results)
    for refused in (after, lose(state, [1])):
        with pytest.raises(ValueError, match=f"step {batch.step} came, but steps \\[\\] are"):
            apply(refused, batch, results)


def test_requests_of_dead_ranks_go_to_the_front_in_order_of_arrival_with_their_tokens():
    s = server((16, 16), max_queue=20)
    for name in "abcdefghij":
        s.submit(small_request(name, (1, 2, 3), max_tokens=9))
    for _ in range(4):
        s.step()
    assert list(s.state.waiting) == ["i", "j"]
    lost = [sequence for sequence in s.state.running.values() if sequence.rank == 1]
    s.lose([1])
    assert list(s.state.waiting) == [*sorted(sequence.id for sequence in lost), "i", "j"]
    for sequence in lost:
        back = s.state.waiting[sequence.id]
        assert (back.generated, back.phase) == (sequence.generated, Phase.WAITING)
    s.drain()
    s.check_streams(all_ended=True)


def test_after_a_loss_tokens_go_on_from_the_next_index_under_the_new_epoch():
    s = server((16, 16))
    s.submit(small_request("a", (5, 6), max_tokens=6))
    s.step()
    s.step()
    s.lose([s.state.running["a"].rank])
    s.adopt(dict.fromkeys(s.ranks, 16))
    s.drain()
    assert [token.epoch for token in s.heard["a"][:-1]] == [0, 0, 1, 1, 1, 1]
    s.check_streams(all_ended=True)


def test_a_step_in_flight_is_not_taken_for_that_of_a_new_request_with_its_id():
    s = server()
    s.submit(small_request("a", (5, 6), seed=3))
    first = s.begin()
    s.cancel("a")
    s.submit(small_request("a", (7, 8, 9), seed=4))
    second = s.begin()
    s.end(first)
    assert s.heard["a"] == []
    s.end(second)
    s.drain()
    s.check_streams(all_ended=True)


def test_no_step_is_made_ahead_for_a_request_whose_last_token_is_in_flight():
    s = server()
    s.submit(small_request("a", range(8), max_tokens=1))
    first = s.begin()
    assert s.begin() is None
    s.end(first)
    s.check_streams(all_ended=True)


@pytest.mark.parametrize(
    ("fields", "foreseeable"),
    [
        ({}, True),
        ({"frequency_penalty": 0.5}, False),
        ({"guide": Guide("regex", "any")}, False),
        ({"min_tokens": 3}, False),
    ],
)
def test_no_step_is_made_ahead_of_a_choice_that_depends_on_the_token_in_flight(fields, foreseeable):
    s = server()
    s.submit(small_request("a", range(40), **fields))
    s.end(s.begin())
    first = s.begin()
    assert is_foreseeable(s.state) is foreseeable
    s.end(first)
    assert is_foreseeable(s.state)


def test_a_step_lost_in_flight_is_made_again():
    s = server((16, 16))
    s.submit(small_request("a", range(50)))
    s.submit(small_request("b", range(60)))
    batch = s.begin()
    s.ranks[0].commit(s.arrays(batch, 0))
    s.lose([1])
    s.drain()
    s.check_streams(all_ended=True)


def test_a_survivors_cache_is_kept_when_a_rank_returns():
    s = server((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    kept = s.state.running["a"]
    assert (kept.rank, kept.computed) == (0, 40)
    s.lose([1])
    s.adopt({0: 16, 1: 16})
    assert s.state.running["a"] == kept
    assert s.state.pools[1].used == 0


def prefixed(name: str, length: int, **fields):
    return small_request(name, range(length), **fields)


def started(s: FakeServer) -> dict[str, int]:
    """{request id: first position computed} of the next step."""
    batch = s.step()
    return {work.request_id: work.start for part in batch.work.values() for work in part}


@pytest.mark.parametrize("length", [32, 33, 40, 90])
def test_a_prompt_starts_after_the_full_pages_of_it_that_are_in_the_cache(length):
    s = server((16,))
    s.submit(prefixed("a", 40))
    s.drain()
    s.submit(prefixed("b", length, max_tokens=2))
    first = min(40, (length - 1) // 8 * 8)
    assert started(s) == {"b": first}
    s.drain()
    assert s.heard["b"][-1] == Finished("length", first)
    s.check_streams(all_ended=True)
    assert (s.state.prefix_queries, s.state.prefix_hits) == (40 + length, first)


def test_prefixes_are_shared_while_both_run_and_with_the_tokens_an_answer_added():
    s = server((16,))
    s.submit(prefixed("a", 24, max_tokens=20))
    for _ in range(12):
        s.step()
    told = [*range(24), *s.tokens("a")]
    s.submit(small_request("b", [*told, 1, 2], max_tokens=9))
    assert started(s)["b"] == 32
    a, b = s.state.running["a"], s.state.running["b"]
    assert a.pages[:4] == b.pages[:4]
    assert s.state.pools[0].used == len(a.pages) + len(b.pages) - 4
    s.drain()
    s.check_streams(all_ended=True)


def test_without_prefix_caching_every_prompt_is_computed_and_the_streams_are_the_same():
    told = []
    for caching in (True, False):
        s = server((16,), prefix_caching=caching)
        for name in "ab":
            s.submit(prefixed(name, 40))
            s.drain()
        told.append([s.tokens(name) for name in "ab"])
        assert (s.state.prefix_hits > 0) is caching
    assert told[0] == told[1]


def test_a_cached_prefix_outlives_other_ranks_and_dies_with_its_own():
    s = server((16, 16))
    s.submit(prefixed("a", 40))
    s.drain()
    s.lose([1])
    s.adopt({0: 16, 1: 16})
    s.submit(prefixed("b", 40))
    assert started(s) == {"b": 32}
    s.drain()
    s.lose([0])
    s.adopt({0: 16, 1: 16})
    s.submit(prefixed("c", 40))
    assert started(s) == {"c": 0}


def test_prefixes_made_with_experts_masked_are_not_found_without():
    s = server((64,))
    s.submit(prefixed("whole", 40))
    s.drain()
    s.submit(small_request("across", range(30, 60), max_tokens=30))
    s.step()
    s.adopt({0: 64}, masked=[(0, 3)])
    s.submit(prefixed("masked", 40))
    assert started(s)["masked"] == 0
    s.drain()
    across = [*range(30, 60), *s.tokens("across")]
    s.submit(small_request("again", across, max_tokens=2))
    assert started(s) == {"again": 0}
    s.drain()
    s.adopt({0: 64})
    s.submit(prefixed("whole again", 40))
    s.submit(small_request("and again", across, max_tokens=2))
    assert started(s) == {"whole again": 32, "and again": 24}


@pytest.mark.parametrize("pages", [{1: 16}, {0: 12, 1: 16}])
def test_a_rank_left_out_or_with_another_cache_loses_its_requests(pages):
    s = server((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    s.adopt(pages)
    assert s.state.waiting["a"].computed == 0
    s.drain()
    s.check_streams(all_ended=True)


def test_a_restarted_rank_of_the_same_id_has_an_empty_cache():
    s = server((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    s.adopt({0: 16, 1: 16}, fresh=[0])
    assert list(s.state.waiting) == ["a"]
    s.drain()
    s.check_streams(all_ended=True)


def test_a_request_no_rank_can_hold_any_more_ends_with_both_numbers():
    s = server((12, 4))
    s.submit(small_request("a", range(60)))
    s.lose([0])
    s.adopt({1: 4})
    assert isinstance(s.heard["a"][0], NoCapacity)
    assert "needs 8 pages and the ranks alive have 4" in str(s.heard["a"][0])


def test_without_ranks_requests_wait_for_one():
    s = server((16,))
    s.submit(small_request("a"))
    s.step()
    s.lose([0])
    s.adopt({})
    s.submit(small_request("b"))
    assert s.step() is None
    s.adopt({7: 16})
    s.drain()
    s.check_streams(all_ended=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size is 0"),
        ({"max_context": 1}, "max_context is 1"),
        ({"buckets": ((4, 0),)}, "one with prefill tiles"),
        ({"buckets": ()}, "one with decode rows"),
        ({"buckets": ((4, 0), (2, 2))}, r"Add \(4, 2\)"),
    ],
)
def test_limits_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        small_limits(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": (0,)}, r"lost \[1\]"),
        ({"pages": (1, 2)}, r"in two places \[2\]"),
        ({"pages": ()}, "in room for 0"),
        ({"rank": 5}, "which is not there"),
        ({"computed": 999}, "nothing to compute"),
        ({"generated": (1, 2, 3, 4)}, "still open"),
        ({"arrival": 9}, "arrived as 9 of 2"),
    ],
)
def test_broken_conservation_is_noticed(change, message):
    s = server((16,))
    s.submit(small_request("a"))
    s.submit(small_request("b"))
    s.step()
    broken = dataclasses.replace(s.state.running["b"], **change)
    with pytest.raises(AssertionError, match=message):
        check_integrity(dataclasses.replace(s.state, running={**s.state.running, "b": broken}))


def test_a_state_is_never_changed_by_a_transition():
    s = server((4, 6))
    for name in "abc":
        s.submit(small_request(name, range(10), max_tokens=12))
    s.step()
    seen = []
    for _ in range(12):
        seen.append((s.state, repr(s.state)))
        s.step()
    seen.append((s.state, repr(s.state)))
    s.lose([0])
    assert all(repr(state) == text for state, text in seen)


SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "min_tokens": st.integers(0, 9),
        "frequency_penalty": st.sampled_from((-1.5, 0.5, 2.0)),
        "presence_penalty": st.sampled_from((-2.0, 1.0)),
        "repetition_penalty": st.sampled_from((0.5, 1.5)),
        "logit_bias": st.just(((3, 40.0), (4, -100.0))),
        "top_logprobs": st.integers(0, 1),
        "prompt_logprobs": st.integers(0, 1),
        "guide": st.just(Guide("regex", "any")),
    },
)
"""Fields that bend the choice of tokens, or ask for more than tokens."""


@pytest.mark.parametrize("length", [1, 2, 33, 64, 65, 90])
def test_a_prompt_that_is_only_scored_ends_without_a_token(length):
    s = server((16,))
    s.submit(small_request("a", range(length), max_tokens=0, prompt_logprobs=0))
    s.drain()
    s.check_streams(all_ended=True)
    assert s.tokens("a") == []
    assert sum(len(item.logprobs) for item in s.heard["a"][:-1]) == length - 1


def test_a_prompt_that_fills_the_context_can_be_scored():
    s = server((16,))
    s.submit(small_request("a", range(CONTEXT), max_tokens=0, prompt_logprobs=0))
    s.drain()
    s.check_streams(all_ended=True)


def test_scores_told_before_a_loss_are_not_told_again_and_the_rest_come_after():
    s = server((16, 16))
    s.submit(small_request("a", range(90), prompt_logprobs=1))
    s.step()
    assert len(s.heard["a"]) == 1
    s.lose([0])
    s.drain()
    s.check_streams(all_ended=True)
    assert sum(len(item.logprobs) for item in s.heard["a"] if isinstance(item, Scored)) == 89


def test_a_cached_prefix_is_computed_again_where_it_is_to_be_scored():
    s = server((16,))
    for name in "ab":
        s.submit(prefixed(name, 40, prompt_logprobs=0))
        s.drain()
    s.check_streams(all_ended=True)
    assert s.heard["b"][-1].reused == 0


class AnySchedule(RuleBasedStateMachine):
    """Submits, cancels, deadlines, steps, losses and returns in any order."""

    count = 0
    now = 0.0

    @initialize(pages=st.lists(st.one_of(st.integers(3, 6), st.integers(4, 16)), min_size=1, max_size=4))
    def start(self, pages):
        self.server = FakeServer.start(small_limits(), dict(enumerate(pages)))

    @property
    def open(self):
        return [*self.server.state.running, *self.server.state.waiting]

    @rule(
        length=st.one_of(st.integers(1, 12), st.integers(8, 30), st.integers(13, CONTEXT + 1)),
        first=st.one_of(st.integers(0, 1), st.integers(0, 96)),
        max_tokens=st.one_of(st.integers(1, 12), st.just(30)),
        seed=st.integers(0, 2**40),
        stop=st.one_of(st.just(frozenset()), st.frozensets(st.integers(0, 96), max_size=4)),
        patience=st.one_of(st.none(), st.none(), st.integers(1, 3)),
        extras=st.one_of(st.just({}), SHAPED, st.just({"prompt_logprobs": 1})),
    )
    def submit(self, length, first, max_tokens, seed, stop, patience, extras):
        self.count += 1
        prompt = tuple((first + 7 * i) % 97 for i in range(length))
        deadline = None if patience is None else self.now + patience
        request = small_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            seed=seed,
            stop_tokens=stop,
            deadline=deadline,
            **extras,
        )
        try:
            self.server.submit(request)
        except MoejaxError:
            assert request.id not in self.open

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        self.server.cancel(data.draw(st.sampled_from(self.open)))

    @rule()
    def pass_time(self):
        self.now += 1
        self.server.expire(self.now)

    @rule(count=st.integers(1, 12), in_turn=st.booleans())
    def steps(self, count, in_turn):
        self.server.in_turn = in_turn
        for _ in range(count):
            self.server.step()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def step_during_which_a_request_is_cancelled(self, data):
        batch = self.server.begin()
        self.server.cancel(data.draw(st.sampled_from(self.open)))
        if batch is not None:
            self.server.end(batch)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=st.integers(1, 12))
    def steps_that_are_made_before_the_last_is_in(self, data, count):
        batches = []
        for _ in range(count):
            if len(batches) < 2 and (not batches or is_foreseeable(self.server.state)):
                batch = self.server.begin()
                batches += [batch] if batch is not None else []
            if self.open and data.draw(st.booleans()):
                self.server.cancel(data.draw(st.sampled_from(self.open)))
            if batches and (len(batches) == 2 or data.draw(st.booleans())):
                self.server.end(batches.pop(0))
        for batch in batches:
            self.server.end(batch)

    @rule(data=st.data(), in_flight=st.integers(0, 2), replanned=st.booleans())
    def lose(self, data, in_flight, replanned):
        """With up to two steps in flight, of which any rank may have made the first, or both."""
        ranks = sorted(self.server.ranks)
        dead = data.draw(st.sets(st.sampled_from(ranks))) if ranks else set()
        did = set(ranks)
        for _ in range(in_flight):
            batch = self.server.begin() if is_foreseeable(self.server.state) else None
            if batch is None:
                break
            did = data.draw(st.sets(st.sampled_from(sorted(did)))) if did else set()
            for rank in did:
                self.server.run(batch, rank)
        self.server.lose(dead)
        if replanned:
            self.server.adopt({rank: pool.total for rank, pool in self.server.state.pools.items()})

    @rule(rank=st.integers(0, 4), pages=st.integers(4, 16), fresh=st.booleans(), masked=st.booleans())
    def return_of_a_rank(self, rank, pages, fresh, masked):
        alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
        self.server.adopt({**alive, rank: pages}, fresh=[rank] if fresh else [], masked=[(0, 1)] if masked else [])

    @invariant()
    def streams_are_what_each_request_gives_alone(self):
        if hasattr(self, "server"):
            self.server.check_streams()

    def teardown(self):
        if hasattr(self, "server"):
            alive = {rank: pool.total for rank, pool in self.server.state.pools.items()}
            self.server.adopt({**alive, 9: 16})
            self.server.drain()
            self.server.check_streams(all_ended=True)


TestAnySchedule = AnySchedule.TestCase
TestAnySchedule.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
