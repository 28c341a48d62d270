"""Ranks are shared among owners, and by priority within one; no request waits for ever, nothing is computed twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.fairness import GENERATED_WEIGHT, AdmissionOrder, TokenCounters, count_ahead
from serving.engine.sequence import Sequence
from serving.errors import QueueFull
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine

ROWS = 2
OWNERS = ("a", "b", "c")


def server(**changes) -> FakeEngine:
    return FakeEngine.start(small_limits(max_queue=400, buckets=((ROWS, 2),), **changes), {0: 40})


def request(name: str, owner: str = "", *, prompt: int = 4, max_tokens: int = 3, priority: int = 0, share: float = 1.0):
    return small_request(name, range(prompt), max_tokens=max_tokens, owner=owner, priority=priority, share=share)


sizes = st.tuples(st.sampled_from(OWNERS), st.integers(1, 60), st.integers(1, 12), st.integers(-2, 2))


@given(st.lists(sizes, min_size=1, max_size=24), st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=60, deadline=None)
def test_every_request_ends_with_its_own_tokens_whoever_owns_it(wanted, share):
    s = server()
    for number, (owner, prompt, tokens, priority) in enumerate(wanted):
        s.submit(request(f"{number}", owner, prompt=prompt, max_tokens=tokens, priority=priority, share=share))
        if number % 5 == 4:
            s.step()
    s.finish()


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=30, max_size=40), st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None)
def test_while_two_owners_wait_neither_is_served_much_more_than_its_share(sizes, share):
    """The bound of virtual token counters: what one place can cost, and what runs beside it."""
    s, at = server(prefix_caching=False), TokenCounters().level
    for number, (prompt, tokens) in enumerate(sizes):
        s.submit(request(f"a{number}", "a", prompt=prompt, max_tokens=tokens, share=share))
        s.submit(request(f"b{number}", "b", prompt=prompt, max_tokens=tokens))
    most = 60 + GENERATED_WEIGHT * 12 * (ROWS + 1)
    while {"a", "b"} <= {each.request.owner for each in s.state.waiting.values()}:
        s.step()
        used = s.state.counters
        assert abs(used.of("a") - used.of("b")) <= most
        assert used.level >= at
        at = used.level


def test_a_burst_of_one_key_does_not_keep_another_waiting():
    s = server()
    for number in range(50):
        s.submit(request(f"a{number}", "a"))
    for _ in range(20):
        s.step()
    s.submit(request("b", "b"))
    while "b" in s.state.waiting:
        before = sum(each.request.owner == "a" for each in s.state.waiting.values())
        s.step()
        assert before - sum(each.request.owner == "a" for each in s.state.waiting.values()) <= ROWS
    assert sum(each.request.owner == "a" for each in s.state.waiting.values()) > 30


@given(st.permutations(range(8)))
@settings(max_examples=20, deadline=None)
def test_the_lowest_priority_of_one_owner_runs_first_then_the_first_to_come(priorities):
    waiting = [Sequence(request(f"{i}", priority=p // 2), i) for i, p in enumerate(priorities)]
    turns, order = AdmissionOrder(waiting, TokenCounters()), []
    while (head := turns.peek()) is not None:
        order.append((head.request.sampling.priority, head.arrival))
        turns.admit(head, 1)
    assert order == sorted(order)


def test_priority_buys_nothing_from_another_key():
    turns = AdmissionOrder(
        [Sequence(request("a", "a", priority=-9), 1), Sequence(request("b", "b"), 0)], TokenCounters({"a": 5.0})
    )
    assert (head := turns.peek()) is not None
    assert head.id == "b"


def test_requests_that_ran_before_go_first():
    shares = TokenCounters({"a": 100.0})
    waiting = [Sequence(request("b", "b"), 0), Sequence(request("a", "a", priority=9), 1, cached_tokens=0)]
    assert (head := AdmissionOrder(waiting, shares).peek()) is not None
    assert head.id == "a"


def test_an_owner_that_comes_back_has_saved_nothing_up():
    shares = TokenCounters({"a": 500.0}, level=500.0).on_arrival("b", ())
    assert shares.of("b") == 500
    assert TokenCounters({"a": 400.0, "b": 3.0}, 350.0).on_arrival("b", {"a"}).of("b") == 400


def test_owners_that_are_level_are_forgotten():
    shares = TokenCounters({f"k{i}": float(i) for i in range(100)}, level=98.0).on_arrival("new", ())
    assert set(shares.used) == {"k99", "new"}


def test_a_key_leaves_places_in_the_queue_for_others():
    s = FakeEngine.start(small_limits(max_queue=8, buckets=((ROWS, 2),)), {0: 40})
    for number in range(4):
        s.submit(request(f"a{number}", "a"))
    with pytest.raises(QueueFull, match="4 requests of the key 'a' are waiting, and 4 of 8 places"):
        s.submit(request("a4", "a"))
    s.submit(request("b", "b"))
    for number in range(20):  # without keys there is only one owner
        if len(s.state.waiting) < 8:
            s.submit(request(f"n{number}"))
    assert len(s.state.waiting) == 8


def test_who_stands_ahead_of_a_new_request():
    waiting = [Sequence(request(f"a{i}", "a"), i) for i in range(9)]
    waiting += [Sequence(request("b", "b", priority=5), 9), Sequence(request("old", "c"), 10, cached_tokens=0)]
    assert count_ahead(waiting, "a", 0) == 9 + 1 + 1
    assert count_ahead(waiting, "b", 0) == 1 + 1
    assert count_ahead(waiting, "b", 5) == 1 + 1 + 2


# -- Answers to one prompt ------------------------------------------------------------------------------------------


def family(count: int, prompt: int, **changes):
    names = ["f", *(f"f-{i}" for i in range(1, count))]
    return [
        small_request(name, range(prompt), max_tokens=6, seed=i, prompt_group="f", **changes)
        for i, name in enumerate(names)
    ]


@given(st.integers(2, 4), st.integers(1, 80), st.lists(st.sampled_from(["step", "lose", "cancel"]), max_size=12))
@settings(max_examples=80, deadline=None)
def test_answers_to_one_prompt_compute_its_full_pages_once_and_are_exact_through_failures(count, prompt, events):
    limits = small_limits(buckets=((16, 2),), max_queue=20)
    s = FakeEngine.start(limits, {0: 60, 1: 60})
    for each in family(count, prompt):
        s.submit(each)
    for event in events:
        if event == "step":
            s.step()
        elif event == "lose":
            s.lose([0])
            s.adopt({0: 60, 1: 60}, fresh=[0])
        elif s.state.find("f") is not None:
            s.cancel("f")
    s.finish()
    if not {"lose", "cancel"} & set(events):
        full = (prompt - 1) // limits.page_size * limits.page_size
        assert s.state.prefix_hits == full * (count - 1)
