"""A request is accepted or refused with both numbers; it is cancelled and expires once."""

import pytest

from serving.engine.lifecycle import cancel, expire, resubmit, submit
from serving.errors import InvalidRequest, PromptTooLong, QueueFull
from serving.protocol.request import Finished
from simulation.hand_model import small_request
from tests.support.fake_engine import small_engine


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    with pytest.raises(PromptTooLong, match="96 tokens and the context holds 96"):
        small_engine().submit(small_request("a", range(96)))


def test_a_request_larger_than_a_rank_is_refused_with_both_numbers():
    with pytest.raises(InvalidRequest, match="need 7 pages of 8 tokens; a rank has 6"):
        small_engine((4, 6)).submit(small_request("a", range(40), max_tokens=10))


def test_the_largest_request_a_rank_can_hold_is_served():
    s = small_engine((6,))
    s.submit(small_request("a", range(40), max_tokens=9))
    s.finish()


@pytest.mark.parametrize("change", [{"prompt": ()}, {"max_tokens": 0}, {"name": "taken"}])
def test_what_cannot_be_served_is_refused_and_names_its_field(change):
    s = small_engine()
    s.submit(small_request("taken"))
    with pytest.raises(InvalidRequest) as refusal:
        s.submit(small_request(**{"name": "a"} | change))
    assert refusal.value.param


def test_drafts_that_a_state_cannot_take_back_are_refused_but_not_of_a_request_that_goes_on():
    s = small_engine(states=True, prefix_caching=False)
    with pytest.raises(InvalidRequest, match="speculate is true, and this model has layers whose context") as refusal:
        s.submit(small_request("a", speculate=True))
    assert refusal.value.param == "speculate"
    for name, speculate in (("b", None), ("c", False)):
        s.submit(small_request(name, speculate=speculate))
    asked = small_request("d", speculate=True)
    state, ends = resubmit(s.state, asked, generated=(5,), scored=0, cached_tokens=None)
    assert (set(state.waiting), ends) == ({"b", "c", "d"}, ())


def test_the_queue_has_a_bound():
    s = small_engine(max_queue=2)
    s.submit(small_request("a"))
    s.submit(small_request("b"))
    with pytest.raises(QueueFull, match="2 requests are waiting and the queue holds 2") as refusal:
        s.submit(small_request("c"))
    assert refusal.value.retry_after_s


def test_a_cancelled_request_ends_once_and_frees_its_pages():
    s = small_engine()
    s.submit(small_request("a"))
    s.step()
    s.cancel("a")
    s.cancel("a")
    assert s.heard["a"][-1:] == [Finished("cancelled")]
    assert all(pool.used == 0 for pool in s.state.pools.values())
    s.check_streams(all_ended=True)


def test_the_front_can_end_a_request_at_a_stop_string():
    state = submit(small_engine().state, small_request("a"))
    assert cancel(state, "a", "stop")[1] == (("a", Finished("stop")),)


def test_an_unknown_request_is_not_cancelled():
    state = small_engine().state
    assert cancel(state, "a") == (state, ())


def test_a_request_ends_at_its_deadline_and_not_before():
    state = submit(small_engine().state, small_request("a", deadline=5.0))
    assert expire(state, 4.9) == (state, ())
    assert expire(state, 5.0)[1] == (("a", Finished("deadline")),)
