"""Experts and paged attention on a TPU.

Experts multiply by JAX's own kernel for groups of rows (Megablox). In attention, steps of the grid take a segment
through its pages; which page comes next is known from the page table before the step, so that it is on its way while
the one before is computed. (JAX's own `ragged_paged_attention` wants keys and values in one array, the step's own among
them: here the cache is only read until the step has come to its end.) Rows meet bfloat16 weights in bfloat16 with
float32 sums; float32 stays float32. Weights of int8 are left to the reference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from moejax.attention import NEGATIVE
from moejax.cache import Cache
from moejax.layers import Stacked
from moejax.pallas.grouping import by_slot
from moejax.pallas.queries import Queries
from moejax.precision import Int8

LANES = 128
SUBLANES = 8
_TILE_ROWS, _TILE = 128, 512


def takes_experts(gate_up: Stacked, down: Stacked) -> bool:
    """Whether `experts` covers these weights: numbers of a float type, in whole vectors of lanes."""
    stacks = (gate_up.stack, down.stack)
    return all(not isinstance(each, Int8) and all(size % LANES == 0 for size in each.shape[-2:]) for each in stacks)


def experts(
    rows_rD: jax.Array, wanted_rA: jax.Array, gate_up: Stacked, down: Stacked, slots: int, *, interpret: bool = False
) -> jax.Array:
    """Answers `[r, A, D]` of the slots wanted (-1: zeros) of one layer of `[R, S, 2F, D]` and `[R, S, D, F]`."""
    tile = min(_TILE_ROWS, -(-wanted_rA.size // SUBLANES) * SUBLANES)
    places = -(-wanted_rA.size // tile) * tile
    there = by_slot(rows_rD, wanted_rA, slots, whole=1, places=places)

    def grouped(rows_PK: jax.Array, weight: Stacked) -> jax.Array:
        """Rows by the matrices of their slots. The stack is taken whole, with no rows for its other layers: one layer's
        weights would be copied out."""
        stack, (layer,) = weight.stack, weight.index
        size_G = jnp.zeros((stack.shape[0], slots), jnp.int32).at[layer].set(there.size_S).reshape(-1)
        n, k = stack.shape[-2:]
        return gmm(
            rows_PK.astype(stack.dtype),
            stack.reshape(-1, n, k),
            size_G,
            tiling=(tile, min(_TILE, k), min(_TILE, n)),
            transpose_rhs=True,
            interpret=interpret,
        )

    gate, up = jnp.split(grouped(there.rows, gate_up), 2, axis=-1)
    return there.answers(grouped(jax.nn.silu(gate) * up, down))


def takes_attention(cache: Cache, page_size: int) -> bool:
    """Whether `paged_attention` covers a cache and its pages: entries and pages in whole vectors."""
    widths = [each.shape[-1] for each in (cache.k, cache.v)]
    return all(width % LANES == 0 for width in widths) and page_size % SUBLANES == 0


def paged_attention(
    q_ZQNH: jax.Array,
    k_RKH: jax.Array,
    v_RKH: jax.Array,
    cache: Cache,
    layer: jax.Array,
    page_table_ZM: jax.Array,
    cached_Z: jax.Array,
    new_base_Z: jax.Array,
    positions_ZQ: jax.Array,
    page_size: int,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Outputs `[Z, Q, N, H]`; the arguments are those of `moejax.attention.paged_attention`."""
    Z, Q, N, H = q_ZQNH.shape
    R, K, _ = k_RKH.shape
    M = page_table_ZM.shape[1]
    rows = -(-(Q * N // K) // SUBLANES) * SUBLANES
    queries = Queries.of(q_ZQNH * scale, positions_ZQ, K, rows)
    # A page may begin before the step's new rows and end after them, and rows are read in whole vectors.
    after = page_size + SUBLANES - R % SUBLANES
    new = [jnp.pad(each.reshape(R, K * H), ((page_size, after), (0, 0))) for each in (k_RKH, v_RKH)]
    last = positions_ZQ.max(1)

    def page_of(z: Any, i: Any, layer: Any, table: Any, cached: Any, base: Any, last: Any) -> tuple[Any, ...]:
        """The page a grid step reads; again the last one that counts when there is nothing left to read."""
        most = jnp.maximum(jnp.minimum(last[z], cached[z] - 1), 0) // page_size
        return layer[0], table[z, jnp.minimum(i, most)], 0

    own = lambda *block: pl.BlockSpec((1, *block), lambda z, i, *_: (z, *(0 for _ in block)))  # noqa: E731
    whole = pl.BlockSpec(new[0].shape, lambda z, i, *_: (0, 0))
    paged = pl.BlockSpec((1, page_size, K * H), page_of)
    out = pl.pallas_call(
        functools.partial(_attend, page_size=page_size),
        out_shape=jax.ShapeDtypeStruct((Z, K, rows, H), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(Z, M),
            in_specs=[own(rows, 1), own(K, rows, H), whole, whole, paged, paged],
            out_specs=own(K, rows, H),
            scratch_shapes=[
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, 1), jnp.float32),
                pltpu.VMEM((K, rows, H), jnp.float32),
            ],
        ),
        cost_estimate=_longest(Z * M * page_size, rows, K, H, cache),
        interpret=interpret,
    )(
        *(layer.reshape(1), page_table_ZM, cached_Z, new_base_Z, last),
        *(queries.position[..., None], queries.rows, *new, cache.k, cache.v),
    )
    return queries.outputs(out, Q)


def _attend(
    layer_ref: Any,
    table_ref: Any,
    cached_ref: Any,
    base_ref: Any,
    last_ref: Any,
    positions_ref: Any,
    q_ref: Any,
    new_k_ref: Any,
    new_v_ref: Any,
    cache_k_ref: Any,
    cache_v_ref: Any,
    out_ref: Any,
    highest_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *,
    page_size: int,
) -> None:
    del layer_ref, table_ref  # they have chosen the page
    z, i = pl.program_id(0), pl.program_id(1)
    heads, _, size = mixed_ref.shape

    @pl.when(i == 0)
    def _() -> None:
        highest_ref[...] = jnp.full(highest_ref.shape, NEGATIVE)
        total_ref[...] = jnp.zeros(total_ref.shape)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape)

    @pl.when(i * page_size <= last_ref[z])
    def _() -> None:
        first, cached = i * page_size, cached_ref[z]
        is_new = first + lax.broadcasted_iota(jnp.int32, (page_size, 1), 0) >= cached
        row = jnp.clip(base_ref[z] + first - cached + page_size, 0, new_k_ref.shape[0] - page_size - SUBLANES)
        vector, rest = pl.multiple_of(row // SUBLANES * SUBLANES, SUBLANES), row % SUBLANES

        def both(new_ref: Any, old_ref: Any) -> jax.Array:
            around = new_ref[pl.ds(vector, page_size + SUBLANES), :]
            new = pltpu.roll(around, page_size + SUBLANES - rest, 0)[:page_size]
            return jnp.where(is_new, new, old_ref[0])

        k, v = both(new_k_ref, cache_k_ref), both(new_v_ref, cache_v_ref)
        seen = first + lax.broadcasted_iota(jnp.int32, (1, page_size), 1) <= positions_ref[0]
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = jnp.where(seen, _dot(q_ref[0, head], k[:, own], 1), NEGATIVE)
            higher = jnp.maximum(highest_ref[head], scores.max(-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
            shrink = jnp.exp(highest_ref[head] - higher)
            highest_ref[head] = higher
            total_ref[head] = total_ref[head] * shrink + weights.sum(-1, keepdims=True)
            mixed_ref[head] = mixed_ref[head] * shrink + _dot(weights, v[:, own], 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[0] = mixed_ref[...] / jnp.maximum(total_ref[...], 1e-30)


def _longest(entries: int, rows: int, heads: int, size: int, cache: Cache) -> pl.CostEstimate:
    """What so many entries of the cache take, all pages full, for the compiler."""
    return pl.CostEstimate(
        flops=4 * entries * heads * rows * size,
        bytes_accessed=entries * heads * size * (cache.k.dtype.itemsize + cache.v.dtype.itemsize),
        transcendentals=entries * heads * rows,
    )


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """`a` by `b`, summed over the last axis of `a` and this one of `b`, in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
