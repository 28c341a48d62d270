"""The next token of each segment, chosen on the device.

A row's choice depends on its logits, its parameters and (seed, position) alone, in every bit: sums over the
vocabulary are made in integers, whose order does not matter, and thresholds by bisection instead of a sort.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Key, UInt32

from moejax.config.axes import ArrayLike
from moejax.config.step_inputs import StepInputs
from moejax.model.layers import ordered_sum
from moejax.model.logits import LogitsAdjustments, adjust_logits
from moejax.ops import cpu

MAX_ALTERNATIVES = 20
"""Most alternatives of a token whose log-probabilities are returned: OpenAI's bound."""

NO_TOKEN = -1
"""In the place of a token where no token has a finite logit after adjustments and filters."""

_LIMB = 14
_LANES = 1024
"""Partial sums over the vocabulary that are kept side by side."""


def _sortable(x: Float[ArrayLike, "*shape"]) -> UInt32[ArrayLike, "*shape"]:
    """Float32 as uint32 of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(holds: Callable[[ArrayLike], ArrayLike], shape: tuple[int, ...]) -> UInt32[ArrayLike, "..."]:
    """The highest uint32 for which `holds` (true below some point, false above it) is still true."""

    def bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, found)

    return lax.fori_loop(0, 32, bit, jnp.zeros(shape, jnp.uint32))


def _mass(weights_ZV: Float[ArrayLike, "Z V"], inside_ZV: Bool[ArrayLike, "Z V"]) -> Float[ArrayLike, " Z"]:
    """Sum of weights in [0, 1] over the last axis, exact in two integer limbs and so in any order."""
    scaled = (weights_ZV * (1 << 2 * _LIMB)).astype(jnp.uint32)
    high = jnp.where(inside_ZV, scaled >> _LIMB, 0).sum(-1, dtype=jnp.uint32)
    low = jnp.where(inside_ZV, scaled & ((1 << _LIMB) - 1), 0).sum(-1, dtype=jnp.uint32)
    return high.astype(jnp.float32) + low.astype(jnp.float32) / (1 << _LIMB)


def filter_logits(
    logits_ZV: Float[ArrayLike, "Z V"],
    top_k_Z: Int[ArrayLike, " Z"],
    top_p_Z: Float[ArrayLike, " Z"],
    min_p_Z: Float[ArrayLike, " Z"],
) -> Float[ArrayLike, "Z V"]:
    """Logits with -inf for tokens outside of top-k (0: all), then outside the smallest set of mass top-p among
    the rest (1: all), or less likely than min_p x the likeliest (0: all). Ties at a threshold stay in."""
    Z, V = logits_ZV.shape
    keys_ZV = _sortable(logits_ZV)
    k_Z = jnp.where((top_k_Z <= 0) | (top_k_Z > V), V, top_k_Z)
    at_k = _highest(lambda t: (keys_ZV >= t[:, None]).sum(-1) >= k_Z, (Z,))
    inside = keys_ZV >= at_k[:, None]
    weights = jnp.where(inside, jnp.exp(logits_ZV - logits_ZV.max(-1, keepdims=True)), 0.0)
    goal_Z = top_p_Z * _mass(weights, inside)
    at_p = _highest(lambda t: _mass(weights, inside & (keys_ZV >= t[:, None])) >= goal_Z, (Z,))
    at_p = jnp.where(top_p_Z < 1.0, at_p, 0)
    inside &= (keys_ZV >= at_p[:, None]) & (weights >= min_p_Z[:, None])
    return jnp.where(inside, logits_ZV, -jnp.inf)


def choose_tokens(
    logits_ZV: Float[ArrayLike, "Z V"], greedy_Z: Int[ArrayLike, " Z"], inputs: StepInputs
) -> Int[ArrayLike, " Z"]:
    """Tokens `[Z]`. Temperature 0 takes the likeliest, `greedy [Z]`. Otherwise Gumbel-max with a key of (seed,
    position): the same stream on any rank, in any batch, before and after a failure."""
    warm_Z = inputs.temperature > 0

    def draw() -> jax.Array:
        filters = warm_Z & ((inputs.top_k > 0) | (inputs.top_p < 1) | (inputs.min_p > 0))
        keys = jax.vmap(lambda s, p: jax.random.fold_in(jax.random.key(s), p))(inputs.seed, inputs.sample_position)

        def draw_filtered() -> jax.Array:
            scaled = logits_ZV / jnp.where(warm_Z, inputs.temperature, 1.0)[:, None]
            kept = filter_logits(scaled, inputs.top_k, inputs.top_p, inputs.min_p)
            return _with_finite_logit(kept, draw_tokens(kept, warm_Z.astype(jnp.float32), keys))

        return lax.cond(filters.any(), draw_filtered, lambda: draw_tokens(logits_ZV, inputs.temperature, keys))

    return jnp.where(warm_Z, lax.cond(warm_Z.any(), draw, lambda: greedy_Z), greedy_Z)


def draw_tokens(
    logits_ZV: Float[ArrayLike, "Z V"], temperature_Z: Float[ArrayLike, " Z"], keys_Z: Key[ArrayLike, " Z"]
) -> Int[ArrayLike, " Z"]:
    """Gumbel-max (arXiv 1411.0030): of each row of a temperature above 0 the token `[Z]` whose logit / temperature +
    noise is highest."""
    if cpu.active():
        return cpu.draw_tokens(logits_ZV, temperature_Z, jax.random.key_data(keys_Z))
    return draw_tokens_reference(logits_ZV, temperature_Z, keys_Z)


def draw_tokens_reference(
    logits_ZV: Float[ArrayLike, "Z V"], temperature_Z: Float[ArrayLike, " Z"], keys_Z: Key[ArrayLike, " Z"]
) -> Int[ArrayLike, " Z"]:
    """`draw_tokens` by XLA."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits_ZV.shape[1:], jnp.float32))(keys_Z)
    scaled = logits_ZV / jnp.where(temperature_Z > 0, temperature_Z, 1.0)[:, None]
    return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)


def summarize(logits_ZV: Float[ArrayLike, "Z V"]) -> tuple[Int[ArrayLike, " Z"], Float[ArrayLike, " Z"]]:
    """The first of the highest logits of each row, and log(sum(exp(logits))) in an order that depends on V alone."""
    if cpu.active():
        return cpu.likeliest(logits_ZV)
    return jnp.argmax(logits_ZV, axis=-1).astype(jnp.int32), normalizer_reference(logits_ZV)


def normalizer_reference(logits_ZV: Float[ArrayLike, "Z V"]) -> Float[ArrayLike, " Z"]:
    """The second part of `summarize`, by XLA."""
    Z, V = logits_ZV.shape
    most_Z1 = logits_ZV.max(-1, keepdims=True)
    weights = jnp.pad(jnp.exp(logits_ZV - most_Z1), ((0, 0), (0, -V % _LANES)))
    lanes = weights.reshape(Z, -1, _LANES).swapaxes(0, 1)
    sums, _ = lax.scan(lambda sums, part: (sums + part, None), jnp.zeros((Z, _LANES), jnp.float32), lanes)
    return most_Z1[:, 0] + jnp.log(ordered_sum(sums))


def _logprobs_of(
    logits_ZV: Float[ArrayLike, "Z V"], token_Z: Int[ArrayLike, " Z"], normalizer_Z: Float[ArrayLike, " Z"]
) -> Float[ArrayLike, " Z"]:
    return jnp.take_along_axis(logits_ZV, jnp.maximum(token_Z, 0)[:, None], axis=1)[:, 0] - normalizer_Z


def _with_finite_logit(logits_ZV: Float[ArrayLike, "Z V"], token_Z: Int[ArrayLike, " Z"]) -> Int[ArrayLike, " Z"]:
    """The tokens, NO_TOKEN for one whose logit is not finite: then no logit of its row is."""
    chosen_Z = jnp.take_along_axis(logits_ZV, jnp.maximum(token_Z, 0)[:, None], axis=1)[:, 0]
    return jnp.where(jnp.isfinite(chosen_Z), token_Z, NO_TOKEN)


def likeliest(
    logits_ZV: Float[ArrayLike, "Z V"], normalizer_Z: Float[ArrayLike, " Z"]
) -> tuple[Int[ArrayLike, "Z top"], Float[ArrayLike, "Z top"]]:
    """The likeliest tokens of each row `[Z, MAX_ALTERNATIVES]`, the likeliest first, and their log-probabilities."""
    values, tokens = lax.top_k(logits_ZV, min(MAX_ALTERNATIVES, logits_ZV.shape[-1]))
    return tokens.astype(jnp.int32), values - normalizer_Z[:, None]


def sample(
    logits_ZV: Float[ArrayLike, "Z V"], inputs: StepInputs
) -> tuple[Int[ArrayLike, " Z"], Float[ArrayLike, " Z"]]:
    """Tokens `[Z]`, NO_TOKEN where none can be chosen, and their log-probabilities `[Z]` under the unfiltered model. A
    log-probability is not finite where the model's own logits are not."""
    logits_ZV = logits_ZV.astype(jnp.float32)
    greedy_Z, normalizer_Z = summarize(logits_ZV)
    token_Z = choose_tokens(logits_ZV, greedy_Z, inputs)
    return token_Z, _logprobs_of(logits_ZV, token_Z, normalizer_Z)


def sample_adjusted(
    logits_ZV: Float[ArrayLike, "Z V"], inputs: StepInputs, adjustments: LogitsAdjustments
) -> tuple[Int[ArrayLike, " Z"], Float[ArrayLike, " Z"], Int[ArrayLike, "Z top"], Float[ArrayLike, "Z top"]]:
    """`sample` from adjusted logits, and the likeliest tokens. All log-probabilities are those of the unadjusted
    model."""
    logits_ZV = logits_ZV.astype(jnp.float32)
    _, normalizer_Z = summarize(logits_ZV)
    adjusted_ZV = adjust_logits(logits_ZV, adjustments)
    token_Z = choose_tokens(adjusted_ZV, jnp.argmax(adjusted_ZV, axis=-1).astype(jnp.int32), inputs)
    token_Z = _with_finite_logit(adjusted_ZV, token_Z)
    return (token_Z, _logprobs_of(logits_ZV, token_Z, normalizer_Z), *likeliest(logits_ZV, normalizer_Z))


def score(
    logits_TV: Float[ArrayLike, "T V"], target_T: Int[ArrayLike, " T"]
) -> tuple[Float[ArrayLike, " T"], Int[ArrayLike, "T top"], Float[ArrayLike, "T top"]]:
    """Log-probabilities `[T]` of given tokens (those of targets below 0 mean nothing), the likeliest tokens
    `[T, MAX_ALTERNATIVES]` and their log-probabilities."""
    logits_TV = logits_TV.astype(jnp.float32)
    _, normalizer_T = summarize(logits_TV)
    return (_logprobs_of(logits_TV, jnp.maximum(target_T, 0), normalizer_T), *likeliest(logits_TV, normalizer_T))
