"""The numbers of multi-head latent attention, which planner and server share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent of `d_latent` and one rotated key of
    `d_rope` per position stand for the keys (`d_plain` unrotated numbers per head) and values (`d_value`) of all
    heads, and are what the cache keeps. Queries go through `d_query` numbers, or straight from the model if 0."""

    d_latent: int
    d_rope: int
    d_plain: int
    d_value: int
    d_query: int = 0
