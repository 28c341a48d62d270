"""Inputs for the tests of kernels: random matrices, weights in a format, and paged attention of three segments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import attention_case as paged
from moejax.config.attention_inputs import AttentionInputs
from moejax.config.kv_cache import KVCache, to_cache_format
from moejax.config.params import ParamSpec
from moejax.config.weight_formats import to_weight_format
from tests.support.models import MIXTRAL


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def held(values: np.ndarray, form: str) -> Any:
    """A matrix `[..., F, D]` in a weight format, on the device."""
    spec = ParamSpec(values.shape, ("layer", "expert", "ffn", "model"), 1.0)
    return jax.tree.map(jnp.asarray, to_weight_format(dataclasses.replace(MIXTRAL, weights=form), spec, values))


def attention_case(
    queries: int, heads: int = 6, kv_heads: int = 2, size: int = 16, page: int = 8, form: str = "float32"
) -> AttentionInputs:
    """Three segments: one all new, one partly cached, one that is padding; pages in no order. The cache is of a
    format."""
    cache = KVCache(*(jnp.asarray(normal(2, 12 * page, kv_heads * size, seed=s)) for s in (1, 2)))
    draw, cached = np.random.default_rng(7), np.array([0, 29, 0])
    case = paged.attention_case(draw, cache, cached, queries=queries, heads=heads, head_size=size, page=page, scale=0.3)
    cfg = dataclasses.replace(MIXTRAL, n_heads=heads, n_kv_heads=kv_heads, d_head=size, cache_format=form)
    new, cache = (to_cache_format(cfg, each.k, each.v) for each in (case.new, case.cache))
    return dataclasses.replace(case, layer=jnp.int32(1), positions=case.positions.at[2].set(-1), new=new, cache=cache)


def last_query_alone(case: AttentionInputs) -> AttentionInputs:
    """The last of three queries of the middle segment, alone, with the two before it in the cache."""
    page, table = case.page_size, case.page_table
    entries = np.array([table[1, p // page] * page + p % page for p in (29, 30)])
    return dataclasses.replace(
        case,
        q=case.q[1:2, 2:],
        new=jax.tree.map(lambda rows: rows[5:6], case.new),
        cache=jax.tree.map(lambda held, rows: held.at[1, entries].set(rows[3:5]), case.cache, case.new),
        page_table=table[1:2],
        cached=jnp.array([31]),
        new_base=jnp.array([0]),
        positions=jnp.array([[31]]),
    )
