"""Rotary position embedding (arXiv 2104.09864), halves rotated against each other, and its scaling for longer
contexts."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from moejax.config.attention_config import RopeScaling
from moejax.config.axes import ArrayLike
from moejax.config.model_config import ModelConfig


def rotate(
    x_TNH: Float[ArrayLike, "T N H"], positions_T: Int[ArrayLike, " T"], cfg: ModelConfig
) -> Float[ArrayLike, "T N H"]:
    """Rotate the first `cfg.rotated` numbers of each head by position; the others stay."""
    dims = cfg.rotated
    if dims == x_TNH.shape[-1]:
        return rope(x_TNH, positions_T, frequencies(cfg), _magnitude(cfg))
    rotated = rope(x_TNH[..., :dims], positions_T, frequencies(cfg), _magnitude(cfg))
    return jnp.concatenate([rotated, x_TNH[..., dims:]], axis=-1)


def rope(
    x_TNH: Float[ArrayLike, "T N H"],
    positions_T: Int[ArrayLike, " T"],
    frequency: Float[ArrayLike, " half"],
    magnitude: float = 1.0,
) -> Float[ArrayLike, "T N H"]:
    """Rotate all of each head: numbers i and i + H/2 by position times `frequency[i]`, then times `magnitude`."""
    half = x_TNH.shape[-1] // 2
    angle = positions_T.astype(jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    if magnitude != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def frequencies(cfg: ModelConfig) -> Float[ArrayLike, " half"]:
    """Radians per position of each of the `cfg.rotated / 2` pairs, scaled as `cfg.rope_scaling` says."""
    half = cfg.rotated // 2
    plain = cfg.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if cfg.rope_scaling is None:
        return plain
    scaling = cfg.rope_scaling.for_context(cfg.max_context)
    return jnp.asarray(scaled_frequencies(cfg.rope_base, cfg.rotated, scaling), jnp.float32)


def scaled_frequencies(base: float, dims: int, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Frequencies of a model that serves a longer context than it was first trained on, in float64."""
    plain = base ** (-np.arange(0, dims, 2) / dims)
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "proportional":
        return np.where(np.arange(len(plain)) < scaling.pairs, plain / scaling.factor, 0.0)
    if scaling.kind == "longrope":
        return plain / np.array(scaling.factors)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, base, dims, scaling)


def _llama3(plain: Float[np.ndarray, " half"], s: RopeScaling) -> Float[np.ndarray, " half"]:
    """Short waves stay, waves too long for the original context are slowed by `factor`, waves between are
    interpolated."""
    turns = s.original_context * plain / (2 * math.pi)
    share = np.clip((turns - s.low_frequency) / (s.high_frequency - s.low_frequency), 0, 1)
    return share * plain + (1 - share) * plain / s.factor


def _yarn(plain: Float[np.ndarray, " half"], base: float, dims: int, s: RopeScaling) -> Float[np.ndarray, " half"]:
    """Interpolated by a ramp over the dimensions (arXiv 2309.00071, section 3.2), its ends whole numbers if
    `truncate`."""

    def dimension(turns: float) -> float:
        return dims * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    slowed = np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - slowed) + plain / s.factor * slowed


def _magnitude(cfg: ModelConfig) -> float:
    return 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.for_context(cfg.max_context).magnitude
