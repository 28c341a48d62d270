"""Measured costs decide whether a context is restored or computed again."""

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.restore_cost import LinearFit, RestoreCosts, should_restore

seconds = st.floats(1e-4, 10.0)


def measured(*, step_s: float, token_s: float, piece_s: float, entry_s: float) -> RestoreCosts:
    costs = RestoreCosts.guess(4096)
    for tokens in (0, 32, 64) * 200:
        costs = costs.with_step(tokens, step_s + tokens * token_s)
    for entries in (16, 256) * 200:
        costs = costs.with_copy(entries, piece_s + entries * entry_s)
    return costs


def restores(costs: RestoreCosts, length: int, entries: int, *, found: int = 0, budget_s: float = 0.03) -> bool:
    return should_restore(costs, length, entries, found=found, chunk=64, piece=256, budget_s=budget_s)


@given(fixed=seconds, slope=st.floats(1e-6, 1e-2), guess=seconds)
def test_a_line_comes_to_what_is_measured(fixed, slope, guess):
    line = LinearFit.guess(guess, guess, 64)
    for tokens in (1, 40, 256) * 300:
        line = line.observed(tokens, fixed + slope * tokens)
    for tokens in (1, 100, 256):
        assert abs(line.at(tokens) - (fixed + slope * tokens)) < 0.01 * (fixed + slope * tokens)


def test_what_is_measured_all_at_one_length_is_predicted_there():
    line = LinearFit.guess(1.0, 1.0, 256)
    for _ in range(1000):
        line = line.observed(256, 0.01)
    assert abs(line.at(256) - 0.01) < 1e-4


def test_steps_that_prefill_nothing_tell_nothing_of_the_rate():
    line = LinearFit.guess(0.02, 1e-3, 64)
    for _ in range(100_000):
        line = line.observed(0, 0.02)
    assert line.slope >= 0.0
    assert abs(line.fixed - 0.02) < 1e-6


@given(length=st.integers(2, 4000), step_s=seconds, token_s=seconds, piece_s=seconds, entry_s=seconds)
def test_a_longer_context_of_the_same_server_is_restored_when_a_shorter_one_is_and_the_copy_keeps_pace(
    length, step_s, token_s, piece_s, entry_s
):
    costs = measured(step_s=step_s, token_s=token_s, piece_s=piece_s, entry_s=entry_s)
    free = 1e9  # no step in between
    if costs.piece.at(256) < costs.recompute_s(256, 64) and restores(costs, length, length - 1, budget_s=free):
        assert restores(costs, length + 256, length + 255, budget_s=free)


def test_a_short_context_is_computed_again_where_a_message_costs_more_than_a_step():
    costs = measured(step_s=0.002, token_s=2e-4, piece_s=0.020, entry_s=1e-6)
    assert not restores(costs, 30, 29)
    assert restores(costs, 3000, 2999)


def test_where_prefill_is_slow_even_few_tokens_are_restored():
    costs = measured(step_s=0.150, token_s=2e-3, piece_s=0.005, entry_s=5e-5)
    assert restores(costs, 41, 40)


def test_what_another_rank_has_in_its_cache_is_not_copied_for_the_rest_alone():
    costs = measured(step_s=0.010, token_s=5e-4, piece_s=0.050, entry_s=1e-6)
    assert restores(costs, 1000, 999)
    assert not restores(costs, 1000, 999, found=992)
    assert not restores(costs, 1000, 992, found=992)


def test_a_copy_that_holds_little_of_a_context_does_not_hide_what_is_left_to_compute():
    costs = measured(step_s=0.010, token_s=1e-3, piece_s=0.1, entry_s=1e-5)
    assert restores(costs, 2000, 1999)
    assert not restores(costs, 2000, 32)
