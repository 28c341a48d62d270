"""Inputs for the tests of kernels: random matrices, weights in a format, and paged attention of three segments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import attention_case as paged
from moejax.config.attention_inputs import AttentionInputs
from moejax.config.kv_cache import KVCache
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


def attention_case(queries: int, heads: int = 6, kv_heads: int = 2, size: int = 16, page: int = 8) -> AttentionInputs:
    """Three segments: one all new, one partly cached, one that is padding; pages in no order."""
    cache = KVCache(*(jnp.asarray(normal(2, 12 * page, kv_heads * size, seed=s)) for s in (1, 2)))
    draw, cached = np.random.default_rng(7), np.array([0, 29, 0])
    case = paged.attention_case(draw, cache, cached, queries=queries, heads=heads, head_size=size, page=page, scale=0.3)
    return dataclasses.replace(case, layer=jnp.int32(1), positions=case.positions.at[2].set(-1))


def last_query_alone(case: AttentionInputs) -> AttentionInputs:
    """The last of three queries of the middle segment, alone, with the two before it in the cache."""
    page, table, caches = case.page_size, case.page_table, (case.cache.k, case.cache.v)
    entries = np.array([table[1, p // page] * page + p % page for p in (29, 30)])
    grown = (c.at[1, entries].set(new[3:5].reshape(2, -1)) for c, new in zip(caches, (case.k, case.v), strict=True))
    return dataclasses.replace(
        case,
        q=case.q[1:2, 2:],
        k=case.k[5:6],
        v=case.v[5:6],
        cache=KVCache(*grown),
        page_table=table[1:2],
        cached=jnp.array([31]),
        new_base=jnp.array([0]),
        positions=jnp.array([[31]]),
    )
