"""A prompt starts after the pages of it that are in a rank's cache, and its stream is the one it would have without."""

import pytest

from serving.protocol.request import Finished
from simulation.hand_model import small_request
from tests.support.fake_engine import FakeEngine, small_engine


def prefixed(name: str, length: int, **fields):
    return small_request(name, range(length), **fields)


def started(s: FakeEngine) -> dict[str, int]:
    """{request id: first position computed} of the next step."""
    batch = s.step()
    return {work.request_id: work.start for part in batch.scheduled.values() for work in part}


@pytest.mark.parametrize("length", [32, 33, 40, 90])
def test_a_prompt_starts_after_the_full_pages_of_it_that_are_in_the_cache(length):
    s = small_engine((16,))
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
    s = small_engine((16,))
    s.submit(prefixed("a", 24, max_tokens=20))
    for _ in range(12):
        s.step()
    told = [*range(24), *s.tokens("a")]
    s.submit(small_request("b", [*told, 1, 2], max_tokens=9))
    assert started(s)["b"] == 32
    a, b = s.state.running["a"], s.state.running["b"]
    assert a.pages[:4] == b.pages[:4]
    assert s.state.pools[0].used == len(a.pages) + len(b.pages) - 4
    s.finish()


def test_without_prefix_caching_every_prompt_is_computed_and_the_streams_are_the_same():
    told = []
    for caching in (True, False):
        s = small_engine((16,), prefix_caching=caching)
        for name in "ab":
            s.submit(prefixed(name, 40))
            s.drain()
        told.append([s.tokens(name) for name in "ab"])
        assert (s.state.prefix_hits > 0) is caching
    assert told[0] == told[1]


def test_a_cached_prefix_outlives_other_ranks_and_dies_with_its_own():
    s = small_engine((16, 16))
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
    s = small_engine((64,))
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


def test_a_cached_prefix_is_computed_again_where_it_is_to_be_scored():
    s = small_engine((16,))
    for name in "ab":
        s.submit(prefixed(name, 40, prompt_logprobs=0))
        s.finish()
    assert s.heard["b"][-1].cached_tokens == 0
