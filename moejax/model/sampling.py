"""The next token of each segment, chosen on the device.

A row's choice depends on its logits, its parameters and (seed, position) alone, in every bit: sums over the
vocabulary are made in integers, whose order does not matter, and thresholds by bisection instead of a sort.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from moejax import kernels
from moejax.axes import Numbers
from moejax.inputs import StepInputs
from moejax.layers import ordered_sum
from moejax.shaping import Shaping, shape_logits

TOP = 20
"""Alternatives whose log-probabilities are told, at most; OpenAI's bound."""

_LIMB = 14
_LANES = 1024
"""Sums over the vocabulary that go on side by side."""


def _keys(x: Numbers) -> Numbers:
    """Float32 as uint32 of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(holds, shape: tuple[int, ...]) -> Numbers:
    """The highest uint32 for which `holds` (true below some point, false above it) is still true."""

    def bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros(shape, jnp.uint32))


def _mass(weights: Numbers, inside: Numbers) -> Numbers:
    """Sum of weights in [0, 1] over the last axis, exact in two integer limbs and so in any order."""
    scaled = (weights * (1 << 2 * _LIMB)).astype(jnp.uint32)
    high = jnp.where(inside, scaled >> _LIMB, 0).sum(-1, dtype=jnp.uint32)
    low = jnp.where(inside, scaled & ((1 << _LIMB) - 1), 0).sum(-1, dtype=jnp.uint32)
    return high.astype(jnp.float32) + low.astype(jnp.float32) / (1 << _LIMB)


def filter_logits(
    logits_ZV: Float[Numbers, "Z V"],
    top_k_Z: Int[Numbers, " Z"],
    top_p_Z: Float[Numbers, " Z"],
    min_p_Z: Float[Numbers, " Z"],
) -> Float[Numbers, "Z V"]:
    """Logits with -inf for tokens outside of top-k (0: all), then outside the smallest set of mass top-p among
    the rest (1: all), or less likely than min_p x the likeliest (0: all). Ties at a threshold stay in."""
    Z, V = logits_ZV.shape
    keys_ZV = _keys(logits_ZV)
    k_Z = jnp.where((top_k_Z <= 0) | (top_k_Z > V), V, top_k_Z)
    at_k = _highest(lambda t: (keys_ZV >= t[:, None]).sum(-1) >= k_Z, (Z,))
    inside = keys_ZV >= at_k[:, None]
    weights = jnp.where(inside, jnp.exp(logits_ZV - logits_ZV.max(-1, keepdims=True)), 0.0)
    goal_Z = top_p_Z * _mass(weights, inside)
    at_p = _highest(lambda t: _mass(weights, inside & (keys_ZV >= t[:, None])) >= goal_Z, (Z,))
    at_p = jnp.where(top_p_Z < 1.0, at_p, 0)
    inside &= (keys_ZV >= at_p[:, None]) & (weights >= min_p_Z[:, None])
    return jnp.where(inside, logits_ZV, -jnp.inf)


def choose(logits_ZV: Float[Numbers, "Z V"], greedy_Z: Int[Numbers, " Z"], inputs: StepInputs) -> Int[Numbers, " Z"]:
    """Tokens `[Z]`. Temperature 0 takes the likeliest, `greedy [Z]`. Otherwise Gumbel-max with a key of (seed,
    position): the same stream on any rank, in any batch, before and after a failure."""
    warm_Z = inputs.temperature > 0

    def draw() -> Numbers:
        filters = warm_Z & ((inputs.top_k > 0) | (inputs.top_p < 1) | (inputs.min_p > 0))
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(inputs.seed, inputs.sample_position)

        def drawn_of_the_kept() -> Numbers:
            scaled = logits_ZV / jnp.where(warm_Z, inputs.temperature, 1.0)[:, None]
            kept = filter_logits(scaled, inputs.top_k, inputs.top_p, inputs.min_p)
            return drawn(kept, warm_Z.astype(jnp.float32), keys)

        return lax.cond(filters.any(), drawn_of_the_kept, lambda: drawn(logits_ZV, inputs.temperature, keys))

    return jnp.where(warm_Z, lax.cond(warm_Z.any(), draw, lambda: greedy_Z), greedy_Z)


def drawn(logits_ZV: Numbers, temperature_Z: Numbers, keys_Z: Numbers) -> Numbers:
    """Gumbel-max (arXiv 1411.0030): of each row of a temperature above 0 the token `[Z]` whose logit / temperature +
    noise is highest."""
    if kernels.active():
        return kernels.drawn(logits_ZV, temperature_Z, jax.random.key_data(keys_Z))
    return drawn_reference(logits_ZV, temperature_Z, keys_Z)


def drawn_reference(logits_ZV: Numbers, temperature_Z: Numbers, keys_Z: Numbers) -> Numbers:
    """`drawn` by XLA."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_ZV.shape[1:], jnp.float32))(keys_Z)
    scaled = logits_ZV / jnp.where(temperature_Z > 0, temperature_Z, 1.0)[:, None]
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)


def summarize(logits_ZV: Numbers) -> tuple[Numbers, Numbers]:
    """Of each row the first of the highest logits `[Z]`, and log(sum(exp(logits))) `[Z]` in an order that depends on V
    alone."""
    if kernels.active():
        return kernels.likeliest(logits_ZV)
    return jnp.argmax(logits_ZV, axis=-1).astype(jnp.int32), normalizer_reference(logits_ZV)


def normalizer_reference(logits_ZV: Numbers) -> Numbers:
    """The second part of `summarize`, by XLA."""
    Z, V = logits_ZV.shape
    most_Z1 = logits_ZV.max(-1, keepdims=True)
    weights = jnp.pad(jnp.exp(logits_ZV - most_Z1), ((0, 0), (0, -V % _LANES)))
    lanes = weights.reshape(Z, -1, _LANES).swapaxes(0, 1)
    sums, _ = lax.scan(lambda sums, part: (sums + part, None), jnp.zeros((Z, _LANES), jnp.float32), lanes)
    return most_Z1[:, 0] + jnp.log(ordered_sum(sums))


def _logprobs_of(logits_ZV: Numbers, token_Z: Numbers, normalizer_Z: Numbers) -> Numbers:
    return jnp.take_along_axis(logits_ZV, token_Z[:, None], axis=1)[:, 0] - normalizer_Z


def likeliest(logits_ZV: Numbers, normalizer_Z: Numbers) -> tuple[Numbers, Numbers]:
    """The TOP likeliest tokens of each row `[Z, TOP]`, first the likeliest, and their log-probabilities."""
    values, tokens = lax.top_k(logits_ZV, min(TOP, logits_ZV.shape[-1]))
    return tokens.astype(jnp.int32), values - normalizer_Z[:, None]


def sample(logits_ZV: Float[Numbers, "Z V"], inputs: StepInputs) -> tuple[Int[Numbers, " Z"], Float[Numbers, " Z"]]:
    """Tokens `[Z]` and their log-probabilities `[Z]` under the unfiltered model."""
    logits_ZV = logits_ZV.astype(jnp.float32)
    greedy_Z, normalizer_Z = summarize(logits_ZV)
    token_Z = choose(logits_ZV, greedy_Z, inputs)
    return token_Z, _logprobs_of(logits_ZV, token_Z, normalizer_Z)


def sample_shaped(logits_ZV: Numbers, inputs: StepInputs, shaping: Shaping) -> tuple[Numbers, ...]:
    """As `sample`, from bent logits; log-probabilities are those of the model as it is. Then the likeliest tokens
    `[Z, TOP]` and theirs."""
    logits_ZV = logits_ZV.astype(jnp.float32)
    _, normalizer_Z = summarize(logits_ZV)
    bent_ZV = shape_logits(logits_ZV, shaping)
    token_Z = choose(bent_ZV, jnp.argmax(bent_ZV, axis=-1).astype(jnp.int32), inputs)
    return (token_Z, _logprobs_of(logits_ZV, token_Z, normalizer_Z), *likeliest(logits_ZV, normalizer_Z))


def score(logits_TV: Numbers, target_T: Numbers) -> tuple[Numbers, ...]:
    """Log-probabilities `[T]` of given tokens (those of targets below 0 mean nothing), the likeliest tokens `[T, TOP]`
    and their log-probabilities."""
    logits_TV = logits_TV.astype(jnp.float32)
    _, normalizer_T = summarize(logits_TV)
    return (_logprobs_of(logits_TV, jnp.maximum(target_T, 0), normalizer_T), *likeliest(logits_TV, normalizer_T))
