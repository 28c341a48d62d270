"""Laws of what follows the logits: shaped choice, the likeliest tokens, scores of given tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.step_inputs import StepInputs
from moejax.model.logits import LogitsAdjustments, RowAdjustment, adjust_logits, dense_adjustments
from moejax.model.sampling import (
    MAX_ALTERNATIVES,
    NO_TOKEN,
    normalizer_reference,
    sample,
    sample_adjusted,
    score,
    summarize,
)

V = 2048 + 77
NOTHING = np.zeros(0, np.uint32)


def logits_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (rows, V)).astype(np.float32)


def inputs_of(rows: int, temperature: float = 0.0) -> StepInputs:
    zeros = jnp.zeros(rows, jnp.int32)
    names = ("tokens", "positions", "cached", "new_base", "write", "sample_row")
    return StepInputs(
        **dict.fromkeys(names, zeros),
        page_table=zeros[:, None],
        temperature=jnp.full(rows, temperature),
        top_k=zeros,
        top_p=jnp.full(rows, 0.95),
        min_p=jnp.zeros(rows),
        seed=jnp.arange(rows, dtype=jnp.uint32),
        sample_position=zeros + 5,
        read=zeros + 1,
    )


def row(tokens=(), add=(), seen=(), repetition=1.0, allowed=NOTHING) -> RowAdjustment:
    return RowAdjustment(
        np.array(tokens, np.int32), np.array(add, np.float32), np.array(seen, np.int32), repetition, allowed
    )


def mask_of(tokens: list[int]) -> np.ndarray:
    bits = np.zeros(V + (-V % 32), bool)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def by_hand(logits: np.ndarray, shape: RowAdjustment, allowed: list[int] | None) -> np.ndarray:
    bent = logits.astype(np.float64)
    for token in shape.seen:
        bent[token] = bent[token] / shape.repetition if bent[token] > 0 else bent[token] * shape.repetition
    bent[shape.tokens] += shape.add
    if allowed is not None:
        bent[np.setdiff1d(np.arange(V), allowed)] = -np.inf
    return bent


def test_logits_are_adjusted_by_the_formulas():
    logits, allowed = logits_of(3), [3, 31, 32, 700, V - 1]
    rows = {
        0: row((5, 9), (3.5, -np.inf), (5, 6, 40, V - 1), 1.7),
        2: row(allowed=mask_of(allowed), seen=(3,), repetition=0.5),
    }
    bent = np.asarray(adjust_logits(logits, dense_adjustments(rows, 3, V)))
    np.testing.assert_allclose(bent[0], by_hand(logits[0], rows[0], None), rtol=1e-6)
    np.testing.assert_allclose(bent[2], by_hand(logits[2], rows[2], allowed), rtol=1e-6)
    np.testing.assert_array_equal(bent[1], logits[1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_nobody_bends_is_chosen_as_by_the_plain_program(temperature):
    logits, inputs = logits_of(4), inputs_of(4, temperature)
    adjustments = dense_adjustments({1: row((5,), (9.0,))}, 4, V)
    plain = jax.jit(sample)(logits, inputs)
    token, logprob, tokens, _ = jax.jit(sample_adjusted)(logits, inputs, adjustments)
    for one in (0, 2, 3):
        assert (token[one], logprob[one]) == (plain[0][one], plain[1][one])
    np.testing.assert_array_equal(tokens, np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_ALTERNATIVES])


def test_a_forbidden_token_is_never_drawn_at_any_temperature():
    logits, allowed = logits_of(8), [100, 200]
    adjustments = dense_adjustments({i: row(allowed=mask_of(allowed)) for i in range(8)}, 8, V)
    for temperature in (0.0, 1.0, 50.0):
        token, *_ = jax.jit(sample_adjusted)(logits, inputs_of(8, temperature), adjustments)
        assert set(np.asarray(token).tolist()) <= set(allowed)


def test_log_probabilities_are_those_of_the_model_as_it_is():
    logits = logits_of(2)
    adjustments: LogitsAdjustments = dense_adjustments({0: row((7,), (100.0,))}, 2, V)
    token, logprob, _, top = jax.jit(sample_adjusted)(logits, inputs_of(2), adjustments)
    whole = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1)[:, None]
    assert token[0] == 7
    np.testing.assert_allclose(logprob, whole[np.arange(2), token], atol=1e-5)
    np.testing.assert_allclose(top, -np.sort(-whole, axis=-1)[:, :MAX_ALTERNATIVES], atol=1e-5)


def test_no_bit_of_a_score_depends_on_how_many_rows_there_are():
    logits = logits_of(40)
    targets = np.arange(40, dtype=np.int32) * 3
    many = jax.jit(score)(logits, targets)
    alone = [jax.jit(score)(logits[i : i + 1], targets[i : i + 1]) for i in (0, 7, 39)]
    for i, each in zip((0, 7, 39), alone, strict=True):
        for a, b in zip(many, each, strict=True):
            np.testing.assert_array_equal(a[i], b[0])
    greedy, normalizer = jax.jit(summarize)(logits)
    np.testing.assert_array_equal(many[0], logits[np.arange(40), targets] - normalizer)
    np.testing.assert_array_equal(many[1][:, 0], greedy)


@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_the_summary_of_a_row_is_that_of_its_reference(size):
    logits = 30 * np.random.default_rng(5).standard_normal((9, size)).astype(np.float32)
    logits[:, size // 2 :] = np.minimum(logits[:, size // 2 :], logits[:, : size // 2 + 1].max())
    logits[3] = -np.inf
    logits[3, -1] = 2.0
    greedy, normalizer = jax.jit(summarize)(logits)
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    np.testing.assert_allclose(normalizer, normalizer_reference(logits), rtol=0, atol=1e-5)
    for z in range(9):
        alone = jax.jit(summarize)(logits[z : z + 1])
        assert (alone[0][0], alone[1][0]) == (greedy[z], normalizer[z])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_an_allowed_token_has_none_and_changes_no_other(temperature):
    logits = logits_of(4)
    rows = {
        1: row(allowed=mask_of([])),
        2: row(tokens=[5], add=[-np.inf], allowed=mask_of([5])),
        3: row(tokens=range(V), add=[-np.inf] * V),
    }
    token, logprob, *_ = jax.jit(sample_adjusted)(logits, inputs_of(4, temperature), dense_adjustments(rows, 4, V))
    assert token[1:].tolist() == [NO_TOKEN] * 3
    assert token[0] == jax.jit(sample)(logits, inputs_of(4, temperature))[0][0]
    assert np.isfinite(logprob).all()  # the model's own logits are sound


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_row_without_a_finite_logit_has_no_finite_log_probability(temperature, value):
    logits = logits_of(3)
    logits[1] = value
    token, logprob = jax.jit(sample)(logits, inputs_of(3, temperature))
    assert np.isfinite(logprob).tolist() == [True, False, True]
    alone = jax.jit(sample)(logits_of(3), inputs_of(3, temperature))
    assert token[0] == alone[0][0]
    assert token[2] == alone[0][2]


def test_filters_that_let_in_nothing_choose_nothing():
    inputs = inputs_of(2, 1.0).replace(top_p=jnp.array([1e-40, 1.0], jnp.float32))
    token, _ = jax.jit(sample)(logits_of(2), inputs)
    assert token[0] in (NO_TOKEN, int(logits_of(2)[0].argmax()))
    assert token[1] >= 0
