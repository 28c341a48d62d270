"""Laws of the router."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.config.config_values import ConfigError
from moejax.config.moe_config import Gate, MoEConfig
from moejax.model.router import route

E, X = 8, 3
SCORES = st.lists(st.integers(-3, 3), min_size=E, max_size=E)


def choose(scores, alive, gate="softmax", k=X):
    """Route one token whose scores are given (through the bias)."""
    moe = MoEConfig(experts=E, experts_per_token=k, d_expert=4, gate=gate)
    x, router = jnp.zeros((1, 4)), jnp.zeros((E, 4))
    chosen, gates = route(x, router, jnp.array(scores, jnp.float32), jnp.array(alive), moe)
    return np.asarray(chosen)[0].tolist(), np.asarray(gates)[0]


@settings(max_examples=60, deadline=None)
@given(scores=SCORES, dead=st.sets(st.integers(0, E - 1), max_size=E - X))
def test_the_best_of_those_alive_by_score_and_ties_to_the_lower(scores, dead):
    chosen, _ = choose(scores, [e not in dead for e in range(E)])
    best = sorted((e for e in range(E) if e not in dead), key=lambda e: (-scores[e], e))
    assert chosen == best[:X]


@settings(max_examples=30, deadline=None)
@given(scores=SCORES, dead=st.sets(st.integers(0, E - 1), max_size=E - 1))
def test_masked_experts_never_count_even_when_too_few_are_alive(scores, dead):
    for gate in get_args(Gate):
        k = 1 if gate == "input_sigmoid" else X
        chosen, gates = choose(scores, [e not in dead for e in range(E)], gate, k)
        assert all(g == 0 for e, g in zip(chosen, gates, strict=True) if e in dead)
        assert np.count_nonzero(gates) == min(k, E - len(dead))
        assert np.isfinite(gates).all()


def test_softmax_gates_sum_to_one_over_the_chosen():
    _, gates = choose([0, 1, 2, 3, 4, 5, 6, 7], [True] * E)
    np.testing.assert_allclose(gates, np.exp([0.0, -1, -2]) / np.exp([0.0, -1, -2]).sum(), rtol=1e-6)


def test_a_biased_share_is_chosen_with_the_bias_and_weighed_without_it():
    moe = MoEConfig(experts=4, experts_per_token=2, d_expert=4, gate="biased_share")
    logits, bias = np.log([[1.0, 2.0, 3.0, 4.0]]), jnp.array([0.9, 0.0, 0.0, 0.05])
    chosen, gates = route(jnp.ones((1, 1)), jnp.array(logits.T), bias, jnp.ones(4, bool), moe)
    assert np.asarray(chosen).tolist() == [[0, 3]]
    np.testing.assert_allclose(gates, [[0.1, 0.4]], rtol=1e-6)


def test_an_expert_with_scaled_input_is_the_only_one():
    with pytest.raises(ConfigError, match="experts_per_token is 2 with gate 'input_sigmoid'"):
        MoEConfig(experts=4, experts_per_token=2, d_expert=4, gate="input_sigmoid")


def test_gate_one_counts_each_in_full():
    assert choose([0, 1, 2, 3, 4, 5, 6, 7], [True] * E, "one")[1].tolist() == [1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(scores=SCORES, dead=st.sets(st.integers(0, E - 1), max_size=2), gate=st.sampled_from(["share", "sigmoid"]))
def test_only_experts_of_the_best_groups_are_chosen(scores, dead, gate):
    moe = MoEConfig(experts=E, experts_per_token=2, d_expert=4, gate=gate, groups=4, groups_used=2)
    alive = jnp.array([e not in dead for e in range(E)])
    chosen, _ = route(jnp.zeros((1, 4)), jnp.zeros((E, 4)), jnp.array(scores, jnp.float32), alive, moe)
    values = [-np.inf if e in dead else scores[e] + (0.5 if gate == "sigmoid" else 0) for e in range(E)]
    worth = [sum(pair) if gate == "sigmoid" else max(pair) for pair in zip(values[::2], values[1::2], strict=True)]
    best = sorted(range(4), key=lambda g: (-worth[g], g))[:2]
    assert {e // 2 for e in np.asarray(chosen)[0].tolist() if np.isfinite(values[e])} <= set(best)


def test_shares_are_of_all_alive_and_sigmoids_are_normalised_and_scaled():
    scores, alive = [0, 1, 2, 3, 4, 5, 6, 7], [e != 7 for e in range(E)]
    np.testing.assert_allclose(choose(scores, alive, "share")[1], np.exp([6.0, 5, 4]) / np.exp(np.arange(7.0)).sum())
    moe = MoEConfig(experts=E, experts_per_token=2, d_expert=4, gate="sigmoid", normalised=True, gate_scale=2.5)
    x, router = jnp.ones((1, 1)), jnp.arange(E, dtype=jnp.float32)[:, None] - 4
    bias = jnp.zeros(E).at[0].set(9.0)  # chooses, and counts for nothing
    chosen, gates = route(x, router, bias, jnp.ones(E, bool), moe)
    sigmoid = 1 / (1 + np.exp(-np.array([-4.0, 3.0])))
    assert chosen.tolist() == [[0, 7]]
    np.testing.assert_allclose(gates[0], 2.5 * sigmoid / sigmoid.sum(), rtol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "sparsemixer"])
def test_a_gate_is_multiplied_by_the_number_of_its_expert(gate):
    moe = MoEConfig(experts=4, experts_per_token=2, d_expert=4, gate=gate, jitter=0.1)
    ask = (jnp.zeros((1, 4)), jnp.zeros((4, 4)), jnp.array([-5.0, 1.0, 2.0, 1.5]), jnp.ones(4, bool), moe)
    (chosen, plain), (same, scaled) = route(*ask), route(*ask, jnp.array([7.0, 5.0, 3.0, 2.0]))
    assert chosen.tolist() == same.tolist() == [[2, 3]]
    np.testing.assert_allclose(scaled, plain * np.array([[3.0, 2.0]]), rtol=1e-6)


def test_sparsemixer_weighs_a_choice_against_those_near_it():
    moe = MoEConfig(experts=4, experts_per_token=2, d_expert=4, gate="sparsemixer", jitter=0.1)
    scores = jnp.array([2.0, 1.9, 1.0, -5.0])
    chosen, gates = route(jnp.zeros((1, 4)), jnp.zeros((4, 4)), scores, jnp.ones(4, bool), moe)
    assert chosen.tolist() == [[0, 1]]
    np.testing.assert_allclose(gates[0], [1 / (1 + np.exp(-0.1)), 1.0], rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_a_token_goes_to_the_same_experts_in_any_batch(rows):
    moe = MoEConfig(experts=E, experts_per_token=X, d_expert=4)
    rng = np.random.default_rng(0)
    x, router = (
        rng.standard_normal((40, 64)).astype(np.float32),
        rng.standard_normal((E, 64)).astype(np.float32),
    )
    whole = route(x, router, jnp.zeros(E), jnp.ones(E, bool), moe)
    part = route(x[:rows], router, jnp.zeros(E), jnp.ones(E, bool), moe)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[:rows], b)
