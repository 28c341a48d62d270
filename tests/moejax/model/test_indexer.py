"""Laws of the indexer: which positions a query attends to, and that a score does not depend on what is beside it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.model.indexer import best_positions, index_scores

SIZES = st.sampled_from([(1, 1), (7, 24), (24, 24), (40, 1), (40, 23)])
"""Positions and how many are chosen: each pair compiles."""


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), SIZES, st.integers(0, 3))
def test_the_best_positions_that_a_query_may_see_are_chosen_the_earlier_of_equal_ones(seed, sizes, values):
    size, chosen = sizes
    random = np.random.default_rng(seed)
    scores = random.integers(0, values + 1, (2, 3, size)).astype(np.float32) - 1
    positions = random.integers(-1, size, (2, 3))
    found = np.asarray(best_positions(scores, positions, chosen))
    for z, q in np.ndindex(2, 3):
        order = sorted(range(positions[z, q] + 1), key=lambda s, row=scores[z, q]: (-row[s], s))
        assert set(np.flatnonzero(found[z, q])) == set(order[:chosen])


def test_a_score_has_the_same_bits_whatever_queries_and_keys_are_beside_it():
    random = np.random.default_rng(3)
    q, weights, keys = (random.standard_normal(s).astype(np.float32) for s in ((3, 5, 6, 20), (3, 5, 6), (3, 16, 20)))
    whole = np.asarray(index_scores(q, weights, keys))
    for z, at, s in ((0, 0, 0), (1, 3, 9), (2, 4, 15)):
        alone = index_scores(q[z, at][None, None], weights[z, at][None, None], keys[z, s][None, None])
        assert np.asarray(alone)[0, 0, 0] == whole[z, at, s]
    expected = np.einsum("zqi,zqis->zqs", weights, np.maximum(np.einsum("zqih,zsh->zqis", q, keys), 0))
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
