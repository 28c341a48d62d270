"""After a loss requests go on where they were, and a rank that returns takes nothing from a survivor."""

import pytest

from serving.engine.integrity import check_integrity
from serving.engine.migration import hold_requests, started_requests
from serving.engine.page_pool import PagePool
from serving.engine.rank_changes import adopt
from serving.errors import NoCapacity
from serving.protocol.request import RequestPhase, Scored
from simulation.hand_model import small_request
from tests.support.fake_engine import small_engine


def test_requests_of_dead_ranks_go_to_the_front_in_order_of_arrival_with_their_tokens():
    s = small_engine((16, 16), max_queue=20)
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
        assert (back.generated, back.phase) == (sequence.generated, RequestPhase.WAITING)
    s.finish()


def test_after_a_loss_tokens_go_on_from_the_next_index_under_the_new_epoch():
    s = small_engine((16, 16))
    s.submit(small_request("a", (5, 6), max_tokens=6))
    s.step()
    s.step()
    s.lose([s.state.running["a"].rank])
    s.adopt(dict.fromkeys(s.ranks, 16))
    s.drain()
    assert [token.epoch for token in s.heard["a"][:-1]] == [0, 0, 1, 1, 1, 1]
    s.check_streams(all_ended=True)


def test_a_step_lost_in_flight_is_made_again():
    s = small_engine((16, 16))
    s.submit(small_request("a", range(50)))
    s.submit(small_request("b", range(60)))
    batch = s.begin()
    s.ranks[0].commit(s.arrays(batch, 0))
    s.lose([1])
    s.finish()


def test_a_survivors_cache_is_kept_when_a_rank_returns():
    s = small_engine((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    kept = s.state.running["a"]
    assert (kept.rank, kept.computed) == (0, 40)
    s.lose([1])
    s.adopt({0: 16, 1: 16})
    assert s.state.running["a"] == kept
    assert s.state.pools[1].used == 0


@pytest.mark.parametrize("pages", [{1: 16}, {0: 12, 1: 16}])
def test_a_rank_left_out_or_with_another_cache_loses_its_requests(pages):
    s = small_engine((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    s.adopt(pages)
    assert s.state.waiting["a"].computed == 0
    s.finish()


def test_a_restarted_rank_of_the_same_id_has_an_empty_cache():
    s = small_engine((16, 16))
    s.submit(small_request("a", range(40)))
    s.step()
    s.adopt({0: 16, 1: 16}, fresh=[0])
    assert list(s.state.waiting) == ["a"]
    s.finish()


def test_a_request_no_rank_can_hold_any_more_ends_with_both_numbers():
    s = small_engine((12, 4))
    s.submit(small_request("a", range(60)))
    s.lose([0])
    s.adopt({1: 4})
    assert isinstance(s.heard["a"][0], NoCapacity)
    assert "needs 8 pages and the ranks alive have 4" in str(s.heard["a"][0])


def test_without_ranks_requests_wait_for_one():
    s = small_engine((16,))
    s.submit(small_request("a"))
    s.step()
    s.lose([0])
    s.adopt({})
    s.submit(small_request("b"))
    assert s.step() is None
    s.adopt({7: 16})
    s.finish()


def test_scores_sent_before_a_loss_are_not_sent_again_and_the_rest_follow():
    s = small_engine((16, 16))
    s.submit(small_request("a", range(90), prompt_logprobs=1))
    s.step()
    assert len(s.heard["a"]) == 1
    s.lose([0])
    s.finish()
    assert sum(len(item.logprobs) for item in s.heard["a"] if isinstance(item, Scored)) == 89


def test_other_weights_take_nothing_from_a_cache_and_nothing_from_a_client():
    s = small_engine((16, 16))
    s.submit(small_request("a", range(20), max_tokens=9))
    s.submit(small_request("b", range(20), max_tokens=9, seed=1))
    s.step()
    s.step()
    before = s.state
    state, outputs = adopt(before, {0: 16, 1: 16}, epoch=1, weights=1)
    check_integrity(state)
    assert outputs == ()
    assert not state.running
    assert {key: each.generated for key, each in state.waiting.items()} == {
        key: each.generated for key, each in before.running.items()
    }
    assert all(each.recoverable is None for each in state.waiting.values())
    assert all(pool == PagePool.empty(16) for pool in state.pools.values())
    assert state.root_key not in (before.root_key, adopt(before, {0: 16, 1: 16}, epoch=1, weights=2)[0].root_key)
    assert adopt(state, {0: 16, 1: 16}, epoch=2, weights=1)[0].root_key == state.root_key


def test_held_requests_wait_until_those_that_started_have_ended():
    s = small_engine((16, 16))
    s.submit(small_request("a", (5, 6), max_tokens=3))
    s.step()
    s.state = hold_requests(s.state, True)
    s.submit(small_request("b", (7, 8), max_tokens=2))
    while s.step() is not None:
        pass
    assert started_requests(s.state) == 0
    assert list(s.state.waiting) == ["b"]
    state, _ = adopt(s.state, {0: 16, 1: 16}, epoch=1, weights=1)
    assert not state.held
    s.state = hold_requests(s.state, False)
    s.finish()
