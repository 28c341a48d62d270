"""Laws of the model on one device: it is the float64 reference, masked experts included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model.reference import forward, greedy, logits, losses
from tests.support.models import ALL, MIXTRAL, SHARED, random_params
from tests.support.reference import forward as reference

# float32 against float64 through up to 7 layers, logits of up to 30.
ROUNDING = 3e-3
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 21))


@pytest.mark.parametrize("cfg", ALL, ids=lambda c: c.name)
def test_logits_are_those_of_the_reference(cfg):
    params = random_params(cfg)
    ours = logits(params, cfg, TOKENS)
    for row, tokens in zip(ours, TOKENS, strict=True):
        np.testing.assert_allclose(row, reference(params, cfg, tokens.tolist()), atol=ROUNDING)


@pytest.mark.parametrize("cfg", [MIXTRAL, SHARED], ids=lambda c: c.name)
def test_masked_experts_are_left_out_of_every_layer(cfg):
    params = random_params(cfg)
    alive = np.ones((cfg.n_moe_layers, cfg.moe.experts), bool)
    alive[:, 1] = False
    expected = reference(params, cfg, TOKENS[0].tolist(), masked={1})
    np.testing.assert_allclose(logits(params, cfg, TOKENS[:1], alive)[0], expected, atol=ROUNDING)
    chosen = forward(params, cfg, jnp.asarray(TOKENS), alive_LE=jnp.asarray(alive))[1].chosen
    assert chosen.shape == (cfg.n_moe_layers, TOKENS.size, cfg.moe.experts_per_token)
    assert not (np.asarray(chosen) == 1).any()


def test_room_for_all_tokens_leaves_none_out():
    params = random_params(MIXTRAL)
    whole, _ = forward(params, MIXTRAL, jnp.asarray(TOKENS))
    roomy, _ = forward(params, MIXTRAL, jnp.asarray(TOKENS), capacity=TOKENS.size - 1)
    np.testing.assert_allclose(whole, roomy, atol=ROUNDING)
    tight, _ = forward(params, MIXTRAL, jnp.asarray(TOKENS), capacity=4)
    assert np.abs(np.asarray(tight) - np.asarray(whole)).max() > ROUNDING


def test_balance_is_one_for_a_uniform_router():
    params = jax.tree.map(jnp.asarray, random_params(MIXTRAL))
    layer = params.segments[0][0]
    even = layer.moe.replace(router=0 * layer.moe.router, bias=0 * layer.moe.bias)
    params = params.replace(segments=((layer.replace(moe=even),),))
    balance = forward(params, MIXTRAL, jnp.asarray(TOKENS))[1].balance
    np.testing.assert_allclose(balance, 1, rtol=1e-5)
    assert balance.shape == (3,)


def test_losses_are_the_surprise_at_each_next_token():
    params = random_params(SHARED)
    expected = reference(params, SHARED, TOKENS[0].tolist())
    chance = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    nats = -chance[np.arange(20), TOKENS[0, 1:]]
    np.testing.assert_allclose(losses(params, SHARED, TOKENS[:1])[0], nats, atol=ROUNDING)


def test_greedy_takes_the_likeliest_token_each_time():
    cfg = dataclasses.replace(MIXTRAL, name="greedy")
    params = random_params(cfg)
    prompt = [3, 5, 7]
    for token in greedy(params, cfg, prompt, 4):
        assert token == int(np.argmax(reference(params, cfg, prompt)[-1]))
        prompt.append(token)
