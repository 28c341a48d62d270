"""The results of a step count once, and become tokens and scores in order; nobody gets those of a cancelled request."""

import pytest

from serving.engine.batch import StepResult
from serving.engine.lifecycle import submit
from serving.engine.rank_changes import lose
from serving.engine.scheduler import schedule
from serving.engine.step_results import apply, can_look_ahead
from serving.errors import NoTokenAllowed
from serving.protocol.request import Finished, Token
from serving.protocol.sampling import StructuredOutputs
from simulation.hand_model import alone, next_token, small_request
from tests.support.fake_engine import CONTEXT, small_engine


def test_the_fake_model_can_be_worked_out_by_hand():
    assert next_token((5, 6), seed=3) == 3 + 1 * 5 + 2 * 6
    assert alone(small_request("a", (5, 6), seed=3, max_tokens=2), CONTEXT) == ([20, 80], "length")


def test_a_request_streams_its_tokens_and_then_its_end():
    s = small_engine()
    s.submit(small_request("a", (5, 6), seed=3, max_tokens=2))
    s.drain()
    assert s.heard["a"] == [Token(0, 20, -20 / 64, 0), Token(1, 80, -80 / 64, 0), Finished("length")]


def test_a_stop_token_ends_the_stream_and_is_not_part_of_it():
    s = small_engine()
    s.submit(small_request("a", (5, 6), seed=3, max_tokens=9, stop_tokens=frozenset({80})))
    s.drain()
    assert s.tokens("a") == [20]
    assert s.heard["a"][-1] == Finished("stop")


def test_a_full_context_ends_the_stream():
    s = small_engine(max_context=10)
    s.submit(small_request("a", range(7), max_tokens=50))
    s.drain()
    assert len(s.tokens("a")) == 3
    s.check_streams(all_ended=True)


def test_a_step_in_flight_passes_over_what_was_cancelled_even_if_the_id_is_used_again():
    s = small_engine()
    s.submit(small_request("a"))
    batch = s.begin()
    s.cancel("a")
    s.submit(small_request("a", (9,)))
    s.end(batch)
    assert s.heard["a"] == []
    s.finish()


def test_results_count_once_and_not_after_a_loss():
    state, batch = schedule(submit(small_engine().state, small_request("a", (5,))))
    results = {"a": StepResult(1, 0.0)}
    after, _ = apply(state, batch, results)
    for refused in (after, lose(state, [1])):
        with pytest.raises(ValueError, match=f"step {batch.step} came, but steps \\[\\] are"):
            apply(refused, batch, results)


def test_a_step_in_flight_is_not_taken_for_that_of_a_new_request_with_its_id():
    s = small_engine()
    s.submit(small_request("a", (5, 6), seed=3))
    first = s.begin()
    s.cancel("a")
    s.submit(small_request("a", (7, 8, 9), seed=4))
    second = s.begin()
    s.end(first)
    assert s.heard["a"] == []
    s.end(second)
    s.finish()


def test_no_step_is_made_ahead_for_a_request_whose_last_token_is_in_flight():
    s = small_engine()
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
        ({"structured_outputs": StructuredOutputs("regex", "any")}, False),
        ({"min_tokens": 3}, False),
    ],
)
def test_no_step_is_made_ahead_of_a_choice_that_depends_on_the_token_in_flight(fields, foreseeable):
    s = small_engine()
    s.submit(small_request("a", range(40), **fields))
    s.end(s.begin())
    first = s.begin()
    assert can_look_ahead(s.state) is foreseeable
    s.end(first)
    assert can_look_ahead(s.state)


@pytest.mark.parametrize("length", [1, 2, 33, 64, 65, 90])
def test_a_prompt_that_is_only_scored_ends_without_a_token(length):
    s = small_engine((16,))
    s.submit(small_request("a", range(length), max_tokens=0, prompt_logprobs=0))
    s.finish()
    assert s.tokens("a") == []
    assert sum(len(item.logprobs) for item in s.heard["a"][:-1]) == length - 1


def test_a_prompt_that_fills_the_context_can_be_scored():
    s = small_engine((16,))
    s.submit(small_request("a", range(CONTEXT), max_tokens=0, prompt_logprobs=0))
    s.finish()


def test_a_request_without_an_allowed_token_ends_alone_with_the_field_that_excludes_them():
    server = small_engine((24,))
    server.submit(small_request("banned", min_tokens=2, stop_tokens=frozenset((3,)), logit_bias=((1, -1.0),)))
    server.submit(small_request("other"))
    batch = server.begin()
    assert batch is not None
    results = server.run(batch, 0)
    server._move(*apply(server.state, batch, results | {"banned": results["banned"]._replace(token=-1)}))
    (error,) = server.heard.pop("banned")
    assert isinstance(error, NoTokenAllowed)
    assert error.param == "logit_bias"
    assert "logit_bias and min_tokens exclude all of them" in str(error)
    server.drain()
    server.check_streams(all_ended=True)
