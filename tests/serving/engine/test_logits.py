"""Logits adjustments, worked out by hand."""

import numpy as np
import pytest

from serving.engine.batch import Batch, ScheduledRequest, StepBucket
from serving.engine.logits import logits_adjustment, logits_adjustments, scored_tiles
from serving.protocol.request import LogitsParams
from simulation.hand_model import allowed_by, small_request


def adjustment(generated=(), **fields) -> tuple[dict[int, float], list[int], float]:
    """{token: added}, tokens seen, and the repetition penalty."""
    row = logits_adjustment(LogitsParams(small_request("a", (1, 2, 2), **fields), generated), allowed_by)
    return dict(zip(row.tokens.tolist(), row.add.tolist(), strict=True)), row.seen.tolist(), row.repetition


def test_frequency_counts_every_time_and_presence_once_and_neither_the_prompt():
    assert adjustment((7, 7, 8), frequency_penalty=0.5, presence_penalty=0.25)[0] == {7: -1.25, 8: -0.75}
    assert adjustment((7, 7, 8), presence_penalty=-1.0)[0] == {7: 1.0, 8: 1.0}


def test_a_bias_adds_to_what_penalties_take():
    assert adjustment((7,), frequency_penalty=0.5, logit_bias=((7, 2.0), (9, -100.0)))[0] == {7: 1.5, 9: -100.0}


def test_repetition_counts_the_prompt_too():
    assert adjustment((7, 2), repetition_penalty=1.5)[1:] == ([1, 2, 7], 1.5)
    assert adjustment((7, 2), frequency_penalty=1.0)[1:] == ([], 1.0)


@pytest.mark.parametrize(("count", "added"), [(0, -np.inf), (2, -np.inf), (3, None)])
def test_stop_tokens_are_out_of_reach_until_there_are_enough_tokens(count, added):
    add, _, _ = adjustment((7,) * count, min_tokens=3, stop_tokens=frozenset({5}), logit_bias=((6, 1.0),))
    assert add.get(5) == added
    assert add[6] == 1.0


def test_a_guide_gives_the_mask_and_no_guide_none():
    params = LogitsParams(small_request("a", min_tokens=2), (7,))
    assert logits_adjustment(params, allowed_by).allowed.size == 0


def test_shapes_stand_at_the_segment_that_samples_and_targets_at_their_rows():
    request = small_request("a", range(40), logit_bias=((1, 1.0),), prompt_logprobs=0)
    values = {"pages": (0, 1, 2, 3, 4), "samples": True, "sampling": request.sampling}
    chunk = ScheduledRequest(
        "a", 0, tuple(range(40)), targets=(*range(1, 40), -1), logits_params=LogitsParams(request, ()), **values
    )
    row = ScheduledRequest("b", 40, (1,), logits_params=LogitsParams(request, (1,)), **values)
    batch = Batch(1, 0, StepBucket(2, 2), {0: (row, chunk)})
    assert list(logits_adjustments(batch, 0, allowed_by)) == [0, 3]
    first, second = scored_tiles(batch, 0)
    assert (first.row, first.targets.tolist()) == (2, list(range(1, 33)))
    assert (second.row, second.targets.tolist()) == (34, [*range(33, 40), *[-1] * 25])


def test_a_row_of_a_draft_is_processed_as_if_the_drafts_up_to_it_were_generated():
    request = small_request("a", frequency_penalty=0.5, min_tokens=4, stop_tokens=frozenset({9}))
    values = {"pages": (0, 1), "samples": True, "sampling": request.sampling}
    drafted = ScheduledRequest("a", 4, (1,), logits_params=LogitsParams(request, (7, 1)), drafts=(1, 8, 1), **values)
    plain = ScheduledRequest("b", 4, (1,), **values)
    rows = logits_adjustments(Batch(1, 0, StepBucket(5, 0), {0: (plain, drafted)}), 0, allowed_by)
    generated = ((7, 1), (7, 1, 1), (7, 1, 1, 8), (7, 1, 1, 8, 1))
    assert list(rows) == [1, 2, 3, 4]
    for row, tokens in zip(rows.values(), generated, strict=True):
        for got, wanted in zip(row, logits_adjustment(LogitsParams(request, tokens), allowed_by), strict=True):
            np.testing.assert_array_equal(got, wanted)


def test_rows_of_drafts_after_the_least_number_of_tokens_are_not_processed():
    request = small_request("a", min_tokens=3, stop_tokens=frozenset({9}))
    drafted = ScheduledRequest(
        "a", 4, (1,), (0, 1), True, request.sampling, logits_params=LogitsParams(request, (7, 1)), drafts=(1, 8)
    )
    assert list(logits_adjustments(Batch(1, 0, StepBucket(3, 0), {0: (drafted,)}), 0, allowed_by)) == [0]
