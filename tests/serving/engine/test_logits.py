"""What bends a choice, worked out by hand."""

import numpy as np
import pytest

from serving.batch import Batch, Bucket, Shaped, Work
from serving.shaping import row_shape, shapes, tiles
from tests.fakes import allowed_by, small_request


def bent(generated=(), **fields) -> tuple[dict[int, float], list[int], float]:
    """{token: added}, tokens seen, and the repetition penalty."""
    row = row_shape(Shaped(small_request("a", (1, 2, 2), **fields), generated), allowed_by)
    return dict(zip(row.tokens.tolist(), row.add.tolist(), strict=True)), row.seen.tolist(), row.repetition


def test_frequency_counts_every_time_and_presence_once_and_neither_the_prompt():
    assert bent((7, 7, 8), frequency_penalty=0.5, presence_penalty=0.25)[0] == {7: -1.25, 8: -0.75}
    assert bent((7, 7, 8), presence_penalty=-1.0)[0] == {7: 1.0, 8: 1.0}


def test_a_bias_adds_to_what_penalties_take():
    assert bent((7,), frequency_penalty=0.5, logit_bias=((7, 2.0), (9, -100.0)))[0] == {7: 1.5, 9: -100.0}


def test_repetition_counts_the_prompt_too():
    assert bent((7, 2), repetition_penalty=1.5)[1:] == ([1, 2, 7], 1.5)
    assert bent((7, 2), frequency_penalty=1.0)[1:] == ([], 1.0)


@pytest.mark.parametrize(("count", "added"), [(0, -np.inf), (2, -np.inf), (3, None)])
def test_stop_tokens_are_out_of_reach_until_there_are_enough_tokens(count, added):
    add, _, _ = bent((7,) * count, min_tokens=3, stop_tokens=frozenset({5}), logit_bias=((6, 1.0),))
    assert add.get(5) == added
    assert add[6] == 1.0


def test_a_guide_gives_the_mask_and_no_guide_none():
    shaped = Shaped(small_request("a", min_tokens=2), (7,))
    assert row_shape(shaped, allowed_by).allowed.size == 0


def test_shapes_stand_at_the_segment_that_samples_and_targets_at_their_rows():
    request = small_request("a", range(40), logit_bias=((1, 1.0),), prompt_logprobs=0)
    values = {
        "pages": (0, 1, 2, 3, 4),
        "samples": True,
        "temperature": 0,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "seed": 0,
    }
    chunk = Work("a", 0, tuple(range(40)), targets=(*range(1, 40), -1), shaped=Shaped(request, ()), **values)
    row = Work("b", 40, (1,), shaped=Shaped(request, (1,)), **values)
    batch = Batch(1, 0, Bucket(2, 2), {0: (row, chunk)})
    assert list(shapes(batch, 0, allowed_by)) == [0, 3]
    first, second = tiles(batch, 0)
    assert (first.row, first.targets.tolist()) == (2, list(range(1, 33)))
    assert (second.row, second.targets.tolist()) == (34, [*range(33, 40), *[-1] * 25])
