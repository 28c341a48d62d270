"""Experts and paged attention on a TPU.

Experts use JAX's own kernel for groups of rows (Megablox). In attention, the steps of the grid take a segment through
its pages. The page table says which page comes next, so it is fetched while the page before is computed. (JAX's own
`ragged_paged_attention` wants old and new keys and values in one array; here the cache is not written before the step
has ended.) Rows multiply bfloat16 weights in bfloat16 with float32 sums; float32 stays float32. int8 and int4
weights and caches narrower than float32 are left to the references (`supports_experts`, `supports_attention`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jaxtyping import Float, Int

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import MASKED_SCORE, ArrayLike
from moejax.config.kv_cache import KVCache, numbers_of
from moejax.config.weight_formats import StackSlice, is_scaled
from moejax.ops.pallas.grouping import group_by_slot
from moejax.ops.pallas.queries import GroupedQueries

LANES = 128
SUBLANES = 8
_TILE_ROWS, _TILE = 128, 512


def supports_experts(gate_up: StackSlice, down: StackSlice) -> bool:
    """True when `experts` covers these weights: of a float type, with sizes in whole vectors of lanes."""
    stacks = (gate_up.stack, down.stack)
    return all(not is_scaled(each) and all(size % LANES == 0 for size in each.shape[-2:]) for each in stacks)


def experts(
    rows_rD: Float[ArrayLike, "r D"],
    wanted_rA: Int[ArrayLike, "r A"],
    gate_up: StackSlice,
    down: StackSlice,
    slots: int,
    *,
    interpret: bool = False,
) -> Float[jax.Array, "r A D"]:
    """The answers of the slots that each row wants (-1: zeros), for one layer of `[R, P, 2F, D]` and `[R, P, D, F]`."""
    tile = min(_TILE_ROWS, -(-wanted_rA.size // SUBLANES) * SUBLANES)
    places = -(-wanted_rA.size // tile) * tile
    by_slot = group_by_slot(rows_rD, wanted_rA, slots, whole=1, places=places)

    def grouped(rows_PK: Float[ArrayLike, "P K"], weight: StackSlice) -> jax.Array:
        """Multiply rows by the matrices of their slots. The whole stack is passed, with no rows for its other layers:
        otherwise the weights of one layer would be copied out."""
        stack, (layer,) = weight.stack, weight.index
        size_G = jnp.zeros((stack.shape[0], slots), jnp.int32).at[layer].set(by_slot.size_S).reshape(-1)
        n, k = stack.shape[-2:]
        return gmm(
            rows_PK.astype(stack.dtype),
            stack.reshape(-1, n, k),
            size_G,
            tiling=(tile, min(_TILE, k), min(_TILE, n)),
            transpose_rhs=True,
            interpret=interpret,
        )

    gate, up = jnp.split(grouped(by_slot.rows, gate_up), 2, axis=-1)
    return by_slot.answers(grouped(jax.nn.silu(gate) * up, down))


def supports_attention(inputs: AttentionInputs) -> bool:
    """True when `paged_attention` covers the cache and its pages: float32, entries and pages of whole vectors."""
    held = (inputs.cache.k, inputs.cache.v)
    if any(numbers_of(each).dtype != jnp.float32 for each in held):
        return False
    widths = [each.shape[-1] for each in held]
    return all(width % LANES == 0 for width in widths) and inputs.page_size % SUBLANES == 0


def paged_attention(inputs: AttentionInputs, *, interpret: bool = False) -> Float[jax.Array, "Z Q N H"]:
    """Attention of plain inputs (`AttentionInputs.is_plain`), float32."""
    page_table_ZM, cache, page_size = inputs.page_table, inputs.cache, inputs.page_size
    (Z, Q, N, H), R, K = inputs.q.shape, inputs.new.entries, inputs.kv_heads
    M = page_table_ZM.shape[1]
    rows = -(-(Q * N // K) // SUBLANES) * SUBLANES
    queries = GroupedQueries.of(inputs, rows)
    # A page may begin before the step's new rows and end after them, and rows are read in whole vectors.
    after = page_size + SUBLANES - R % SUBLANES
    new = [jnp.pad(each, ((page_size, after), (0, 0))) for each in (inputs.new.k, inputs.new.v)]

    def page_of(z: Any, i: Any, layer: Any, table: Any, cached: Any, base: Any, last: Any) -> tuple[Any, ...]:
        """The page that a grid step reads: the last page again when no page is left."""
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
        cost_estimate=_cost_estimate(Z * M * page_size, rows, K, H, cache),
        interpret=interpret,
    )(
        *(inputs.layer.reshape(1), page_table_ZM, inputs.cached, inputs.new_base, inputs.last_positions()),
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
    del layer_ref, table_ref  # `page_of` has used them
    z, i = pl.program_id(0), pl.program_id(1)
    heads, _, size = mixed_ref.shape

    @pl.when(i == 0)
    def _() -> None:
        highest_ref[...] = jnp.full(highest_ref.shape, MASKED_SCORE)
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
            scores = jnp.where(seen, _dot(q_ref[0, head], k[:, own], 1), MASKED_SCORE)
            higher = jnp.maximum(highest_ref[head], scores.max(-1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
            shrink = jnp.exp(highest_ref[head] - higher)
            highest_ref[head] = higher
            total_ref[head] = total_ref[head] * shrink + weights.sum(-1, keepdims=True)
            mixed_ref[head] = mixed_ref[head] * shrink + _dot(weights, v[:, own], 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        out_ref[0] = mixed_ref[...] / jnp.maximum(total_ref[...], 1e-30)


def _cost_estimate(entries: int, rows: int, heads: int, size: int, cache: KVCache) -> pl.CostEstimate:
    """The cost of attention over so many cache entries, all pages full, for the compiler's scheduler."""
    return pl.CostEstimate(
        flops=4 * entries * heads * rows * size,
        bytes_accessed=entries * heads * size * (cache.k.dtype.itemsize + cache.v.dtype.itemsize),
        transcendentals=entries * heads * rows,
    )


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The product of `a` and `b`, summed over the last axis of `a` and this axis of `b`, in float32."""
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
