"""Attention scores that grow with position: the numbers that planner and server share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedScoreGrowth:
    """The queries at position p of layers without rotary embedding are multiplied by
    1 + scale * log(1 + floor((p + 1) / every)), so that attention stays sharp over long contexts (Llama 4; arXiv
    2501.19399)."""

    scale: float
    every: int
