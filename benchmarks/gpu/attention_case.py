"""Inputs of paged attention with random numbers, for benchmarks and tests of kernels."""

import jax
import numpy as np

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.kv_cache import KVCache


def attention_case(
    draw: np.random.Generator,
    cache: KVCache,
    cached: np.ndarray,
    *,
    queries: int,
    heads: int,
    head_size: int,
    page: int,
    scale: float,
) -> AttentionInputs:
    """One segment for each of `cached [Z]`, with `queries` new positions after so many cached ones. Pages of `cache`
    (keys and values `[L, entries, K * H]`) are divided over the segments in random order."""
    segments, entries, width = len(cached), cache.entries, cache.k.shape[2]
    pages = entries // page // segments
    table = draw.permutation(segments * pages).astype(np.int32).reshape(segments, pages)
    new = (segments * queries, width)
    q, k, v = (draw.standard_normal(shape, np.float32) for shape in ((segments, queries, heads, head_size), new, new))
    inputs = AttentionInputs(
        q=q,
        new=KVCache(k, v),
        cache=cache,
        layer=np.array(0, np.int32),
        page_table=table,
        cached=cached.astype(np.int32),
        new_base=queries * np.arange(segments, dtype=np.int32),
        positions=(cached[:, None] + np.arange(queries)).astype(np.int32),
        kv_heads=width // head_size,
        page_size=page,
        scale=scale,
    )
    return jax.tree.map(jax.numpy.asarray, inputs)
