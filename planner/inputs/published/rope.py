"""Rotary position embedding as published configurations spell it, old (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`)."""

from __future__ import annotations

import math
from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.model import PublishedRope


def read_rope(f: ConfigFields, head_size: int, *, partial: float, base: float, context: int) -> PublishedRope:
    """The rotary embedding of heads of `head_size`. `partial` (the part of a head that is rotated) and `base` are the
    defaults of the family's class; `context` is the published one.

    Raises InputError where the old and the new spelling contradict.
    """
    new = f.nested("rope_parameters")
    base = _either(f, new, "rope_theta", base)
    share = _either(f, new, "partial_rotary_factor", partial)
    size, scaling = int(head_size * share), new or f.nested("rope_scaling")
    if scaling is not None and rope_scaling_kind(scaling) == "proportional":
        factor, pairs = _positive(scaling, "factor", 1.0), int(share * head_size // 2)
        return PublishedRope(theta=base, size=head_size, kind="proportional", factor=factor, pairs=pairs)
    return PublishedRope(theta=base, size=size, **({} if scaling is None else _scaling(scaling, f, size, context)))


def rope_scaling_kind(scaling: ConfigFields) -> str:
    """The `rope_type`, which older configurations call `type`."""
    return str(scaling.values.get("rope_type") or scaling.values.get("type") or "default")


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN scales scores at a stretch of `factor` (arXiv 2309.00071, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _either(f: ConfigFields, new: ConfigFields | None, key: str, default: float) -> float:
    inside = new.number(key, None) if new else None
    if inside is not None and f.number(key, inside) != inside:
        raise f.error(f"{key} is {f.number(key)}, but rope_parameters says {inside}")
    return f.number(key, default) if inside is None else inside


def _scaling(s: ConfigFields, f: ConfigFields, size: int, context: int) -> dict[str, Any]:
    kind = rope_scaling_kind(s)
    if kind == "linear":
        return {"kind": kind, "factor": _positive(s, "factor")}
    original = s.integer("original_max_position_embeddings", f.integer("original_max_position_embeddings", context))
    if kind == "llama3":
        return {
            "kind": kind,
            "factor": _positive(s, "factor"),
            "original_context": original,
            "low_frequency": s.number("low_freq_factor"),
            "high_frequency": s.number("high_freq_factor"),
        }
    if kind == "yarn":
        return _yarn(s, original, context)
    if kind in ("longrope", "su"):
        return _longrope(s, size, original, context)
    return {"kind": kind}


def _positive(s: ConfigFields, key: str, default: float | None = None) -> float:
    value = s.number(key) if default is None else s.number(key, default)
    if value <= 0:
        raise s.error(f"{key} is {value}; it must be above 0")
    return value


def _yarn(s: ConfigFields, original: int, context: int) -> dict[str, Any]:
    factor = _positive(s, "factor", context / original)
    mscale, all_dims = s.number("mscale", 0.0), s.number("mscale_all_dim", 0.0)
    if mscale and all_dims:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dims)
    else:
        magnitude = yarn_magnitude(factor)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_context": original,
        "beta_fast": s.number("beta_fast", 32.0) or 32.0,
        "beta_slow": s.number("beta_slow", 1.0) or 1.0,
        "truncate": s.flag("truncate", True),
        "magnitude": s.number("attention_factor", magnitude),
    }


def _longrope(s: ConfigFields, size: int, original: int, context: int) -> dict[str, Any]:
    factors = {}
    for key in ("short_factor", "long_factor"):
        factors[key] = s.listed(key, float)
        if len(factors[key]) != size // 2:
            raise s.error(f"{key} has {len(factors[key])} numbers; {size} rotated dimensions need {size // 2}")
    factor = _positive(s, "factor", context / original)
    magnitude = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "kind": "longrope",
        "factor": factor,
        "original_context": original,
        "short_factors": factors["short_factor"],
        "long_factors": factors["long_factor"],
        "magnitude": s.number("attention_factor", s.number("short_mscale", magnitude)),
        "long_magnitude": s.number("attention_factor", s.number("long_mscale", magnitude)),
    }
