"""Drafts are guesses of a request's own tokens; more are taken while they are right and a row is worth its cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.inputs.workload import MAX_DRAFTS
from serving.engine.speculation import (
    FIRST_RATES,
    FREE_ROWS,
    MAX_WAIT,
    MIN_MATCH,
    NOTHING_DRAFTED,
    PAUSE_COST,
    Draft,
    DraftChance,
    choose_counts,
    propose,
)


def history(tokens) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def slow_propose(tokens: list[int], count: int) -> list[int] | None:
    """The tokens after the latest of the earlier places with the longest match, the slow way, of all places."""
    best, longest = 0, 0
    for end in range(len(tokens) - 1, 0, -1):
        matched = 0
        while matched < min(end, 16) and tokens[end - 1 - matched] == tokens[-1 - matched]:
            matched += 1
        if matched > longest:
            best, longest = end, matched
    if longest < MIN_MATCH:
        return None
    text = list(tokens)
    for place in range(best, best + count):
        text.append(text[place])
    return text[len(tokens) :]


@settings(deadline=None)
@given(st.lists(st.sampled_from((0, 1, 256, 65536)), max_size=18), st.integers(1, 12))
def test_a_draft_is_what_followed_the_longest_match_in_a_short_history(tokens, count):
    draft, expected = propose(history(tokens), count), slow_propose(tokens, count)
    if expected is None:
        assert draft is None
    elif len(tokens) <= 11:  # so few places that all are candidates
        assert draft is not None
        assert list(draft.tokens) == expected
    else:
        assert draft is not None
        assert len(draft.tokens) == count


def test_a_draft_that_reaches_the_end_goes_on_with_the_period():
    draft = propose(history([9, 8, 7, 1, 2, 3, 1, 2, 3, 1, 2, 3]), 7)
    assert draft is not None
    assert draft.tokens == (1, 2, 3, 1, 2, 3, 1)


def test_a_history_without_a_repetition_gives_no_draft():
    assert propose(history(range(50)), 3) is None
    assert propose(b"", 3) is None
    assert propose(history([1, 2]), 3) is None


def test_a_match_is_a_match_of_tokens_not_of_bytes():
    shifted = np.frombuffer(b"\x00" + history([7, 7, 7]) + b"\x01\x02\x03", np.int32).tolist()
    assert propose(history([*shifted, 7, 7, 7]), 2) is None


def test_longer_matches_are_of_a_higher_class():
    text = list(range(20))
    classes = [propose(history([*text, 99, *text[5 - length : 5]]), 1).match_class for length in (3, 5)]
    assert classes == [0, 0]
    long = propose(history([*text, 99, *text[:14]]), 1)
    assert long is not None
    assert (long.match_class, long.tokens) == (2, (14,))


def test_the_rate_follows_the_drafts_that_were_right():
    drafting, draft = NOTHING_DRAFTED, Draft((4, 5, 6), 1, taken=3)
    right = drafting.judged(draft, (4, 5, 6, 7))
    wrong = drafting.judged(draft, (3,))
    assert right.rates[1] > drafting.rates[1] > wrong.rates[1]
    assert right.rates[::2] == wrong.rates[::2] == drafting.rates[::2]
    assert (right.wait, wrong.wait) == (0, 1)
    assert drafting.judged(draft._replace(taken=0), (4, 9)).rates[1] > drafting.rates[1]  # compared, though not taken


def test_look_ups_in_vain_come_less_and_less_often_until_one_is_right():
    drafting, waits = NOTHING_DRAFTED, []
    for _ in range(6):
        drafting = drafting.missed()
        waits.append(drafting.wait)
    assert waits == sorted(waits)
    assert waits[-1] == MAX_WAIT
    assert drafting.judged(Draft((4,), 0), (4,)).missed().wait == 1


CANDIDATES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.builds(DraftChance, st.integers(0, 2), st.floats(0, 1), st.integers(1, 20)),
    max_size=6,
)


@settings(deadline=None)
@given(CANDIDATES, st.integers(0, 12), st.integers(1, 64), st.sampled_from((None, 1, 4)))
def test_counts_stay_within_rows_and_room_and_grow_with_what_is_free(candidates, free, rows, fixed):
    def counts(free: int, rows: int) -> dict[str, int]:
        return choose_counts(candidates, dict.fromkeys(range(3), free), rows=rows, requests=rows, fixed=fixed)

    chosen = counts(free, rows)
    assert chosen.keys() == candidates.keys()
    for rank in range(3):
        assert sum(n for key, n in chosen.items() if candidates[key].rank == rank) <= free
    for key, count in chosen.items():
        assert 0 <= count <= min(candidates[key].room, MAX_DRAFTS, fixed or MAX_DRAFTS)
    assert sum(counts(free + 1, rows).values()) >= sum(chosen.values())
    assert sum(counts(free, rows + 8).values()) <= sum(chosen.values())  # load leaves less


@pytest.mark.parametrize(
    ("rate", "rows", "drafts"), [(0.0, 1, False), (0.1, 1, False), (0.95, 1, True), (0.3, 64, False)]
)
def test_drafts_that_are_rarely_right_or_delay_many_are_not_taken(rate, rows, drafts):
    counts = choose_counts({"a": DraftChance(0, rate, 8)}, {0: 20}, rows=rows, requests=rows, fixed=None)
    assert (counts["a"] > 0) is drafts


def speed(requests: int, drafts: int, right: float) -> float:
    """Tokens a second over those without drafts, of a step of so many requests with so many drafts, of which so many
    are right on average: by the costs of rows and of the missing look-ahead."""
    plain = FREE_ROWS + requests
    took = plain + (drafts + PAUSE_COST * plain if drafts else 0.0)
    return (1 + right / requests) * plain / took


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=32))
def test_with_rates_that_are_true_no_choice_is_slower_than_plain(rates):
    candidates = {str(n): DraftChance(0, rate, MAX_DRAFTS) for n, rate in enumerate(rates)}
    counts = choose_counts(candidates, {0: 1000}, rows=len(rates), requests=len(rates), fixed=None)
    right = sum(candidates[key].rate ** nth for key, count in counts.items() for nth in range(1, count + 1))
    assert speed(len(rates), sum(counts.values()), right) >= 1 - 1e-9


@pytest.mark.parametrize("requests", [8, 32])
@pytest.mark.parametrize("match_class", range(len(FIRST_RATES)))
def test_under_load_answers_whose_drafts_are_all_wrong_cost_three_percent_at_most(requests, match_class):
    drafting, took, tokens = NOTHING_DRAFTED, 0.0, 128
    for _ in range(tokens):
        if drafting.wait:
            drafting, took = drafting.waited(), took + 1
            continue
        chance = DraftChance(0, drafting.rates[match_class], MAX_DRAFTS)
        candidates = {str(n): chance for n in range(requests)}
        counts = choose_counts(candidates, {0: 1000}, rows=requests, requests=requests, fixed=None)
        taken = counts["0"]
        took += 1 / speed(requests, sum(counts.values()), 0.0)
        drafting = drafting.judged(Draft((1,) * MAX_DRAFTS, match_class, taken), (0,))
    assert tokens / took >= 0.97
