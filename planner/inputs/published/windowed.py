"""Models whose layers with a window have heads, or a rotary embedding, of their own."""

from __future__ import annotations

from typing import Any

from planner.inputs.published.config_fields import ConfigFields
from planner.inputs.published.model import PublishedRope, PublishedWindowed
from planner.inputs.published.rope import read_rope

WINDOW, FULL = "sliding_attention", "full_attention"
_ROPE = ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters")


def without_rope(f: ConfigFields) -> ConfigFields:
    """The fields without those of rotary embeddings, which `rope_of_kind` reads."""
    return ConfigFields({key: value for key, value in f.values.items() if key not in _ROPE}, f.where)


def rope_of_kind(
    f: ConfigFields, kind: str, head_size: int, *, base: float, context: int, partial: float = 1.0
) -> PublishedRope:
    """The rotary embedding of layers of a `kind`, WINDOW or FULL: `rope_parameters` has one for each. `base` and
    `partial` are the defaults of the family's class."""
    given = f.nested("rope_parameters")
    own = None if given is None else given.nested(kind)
    values = dict(without_rope(f).values) | ({} if own is None else {"rope_parameters": own.values})
    return read_rope(ConfigFields(values, f.where), head_size, partial=partial, base=base, context=context)


def with_windowed(
    plain: dict[str, Any], windows: tuple[int | None, ...], windowed: PublishedWindowed
) -> dict[str, Any]:
    """Fields of PublishedModel: those of layers that see everything, `plain`, and the attention of the others. Where
    all layers have a window their attention is that of the model."""
    if any(window is None for window in windows):
        mixed = any(window is not None for window in windows)
        return plain | {"windows": windows, "windowed": windowed if mixed else None}
    return plain | {
        "windows": windows,
        "heads": windowed.n_heads,
        "kv_heads": windowed.n_kv_heads,
        "head_size": windowed.d_head,
        "value_size": windowed.d_value,
        "sinks": windowed.sinks,
        "rope": windowed.rope,
    }
