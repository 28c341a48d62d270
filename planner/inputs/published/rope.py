"""Rotary position embedding as published configurations spell it, old (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`)."""

import math
from typing import Any

from moejax.config import RopeScaling
from moejax.families.fields import Fields


def read_rope(f: Fields, d_head: int, *, partial: float, base: float, published: int, served: int) -> dict[str, Any]:
    """`rope_base`, `rope_dims` and `rope_scaling` of ModelConfig. `partial` (the part of the `d_head` dimensions that
    is rotated) and `base` are the family's own defaults; `published` and `served` are contexts.

    Raises ConfigError for a kind of scaling that is not known, and where the old and the new spelling contradict.
    """
    new = f.nested("rope_parameters")
    base = _either(f, new, "rope_theta", base)
    dims = int(d_head * _either(f, new, "partial_rotary_factor", partial))
    scaling = new or f.nested("rope_scaling")
    return {
        "rope_base": base,
        "rope_dims": None if dims == d_head else dims,
        "rope_scaling": None if scaling is None else _scaling(scaling, f, dims, (published, served)),
    }


def _either(f: Fields, new: Fields | None, key: str, default: float) -> float:
    inside = new.number(key, None) if new else None
    if inside is not None and f.number(key, inside) != inside:
        raise f.error(f"{key} is {f.number(key)}, but rope_parameters says {inside}")
    return f.number(key, default) if inside is None else inside


def _scaling(s: Fields, f: Fields, dims: int, contexts: tuple[int, int]) -> RopeScaling | None:
    kind = s.values.get("rope_type") or s.values.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=s.number("factor"))
    original = s.integer("original_max_position_embeddings", f.integer("original_max_position_embeddings", None))
    if original is None:
        original = contexts[0]
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=s.number("factor"),
            original_context=original,
            low_frequency=s.number("low_freq_factor"),
            high_frequency=s.number("high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(s, original, contexts[0])
    if kind in ("longrope", "su"):
        return _longrope(s, dims, original, contexts)
    raise s.error(f"rope_type is {kind!r}; known are 'default', 'linear', 'llama3', 'yarn' and 'longrope'")


def _yarn(s: Fields, original: int, published: int) -> RopeScaling:
    factor = s.number("factor", published / original)
    mscale, all_dims = s.number("mscale", 0.0), s.number("mscale_all_dim", 0.0)
    if mscale and all_dims:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dims)
    else:
        magnitude = yarn_magnitude(factor)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=s.number("beta_fast", 32.0) or 32.0,
        beta_slow=s.number("beta_slow", 1.0) or 1.0,
        truncate=s.flag("truncate", True),
        magnitude=s.number("attention_factor", magnitude),
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN scales scores at a stretch of `factor` (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(s: Fields, dims: int, original: int, contexts: tuple[int, int]) -> RopeScaling:
    """One set of factors for the whole of a served context: keys in the cache cannot change theirs when a sequence
    grows past the original context, so a model served beyond it uses the long ones from the start."""
    published, served = contexts
    which = "long" if served > original else "short"
    factors = s.listed(f"{which}_factor", float)
    if len(factors) != dims // 2:
        raise s.error(f"{which}_factor has {len(factors)} numbers; {dims} rotated dimensions need {dims // 2}")
    factor = s.number("factor", published / original)
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    magnitude = s.number("attention_factor", s.number(f"{which}_mscale", magnitude))
    return RopeScaling(kind="longrope", original_context=original, factors=factors, magnitude=magnitude)
