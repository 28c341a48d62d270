"""Attention of layers with a window that is not the same as that of the other layers: the numbers that planner and
server share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WindowedHeads:
    """The heads of layers with a window, where they are not those of the other layers: their number, that of keys and
    values, the size of queries and keys, and that of values. `sinks` gives each head a score that takes weight and adds
    nothing (arXiv 2309.17453)."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int | None = None
    sinks: bool = False

    @property
    def value_size(self) -> int:
        """Numbers of a head's value."""
        return self.d_head if self.d_value is None else self.d_value
