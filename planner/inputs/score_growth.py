"""Attention scores that grow with position: the numbers that planner and server share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PublishedScoreGrowth:
    """The queries at position p are multiplied by 1 + scale * log(1 + floor((p + first) / every)), so that attention
    stays sharp over long contexts (arXiv 2501.19399): those of layers without rotary embedding (Llama 4), or with
    `all_layers` of every layer (Ministral 3, Mistral 4)."""

    scale: float
    every: int
    first: int = 1
    all_layers: bool = False
