"""Experts, products of a few rows, and paged attention on a GPU (Pallas through Triton, compute capability 8.0 and
later).

For experts, a program of the grid multiplies a tile of rows that want the same slot, so that only wanted weights are
read. For attention, it takes the queries of a segment and one of its key/value heads through the pages. Rows multiply
bfloat16 and int8 weights in bfloat16 with float32 sums; float32 stays float32, except for the last bit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Float, Int

from moejax.config.attention_inputs import AttentionInputs
from moejax.config.axes import MASKED_SCORE, ArrayLike
from moejax.config.eight_bit import EightBit, Int8
from moejax.config.int4 import Int4
from moejax.config.kv_cache import numbers_of
from moejax.config.weight_formats import StackSlice, index_weight
from moejax.ops.pallas.grouping import group_by_slot
from moejax.ops.pallas.queries import GroupedQueries

_MIN_TILE = 16
"""Rows of a tile: the fewest that tensor cores multiply."""
_LARGER_TILES = ((512, 128), (48, 64))
"""(Average rows per slot, rows of a tile) above which larger tiles pay: weights are read once per tile. Not for
float32, of which so much does not fit in shared memory."""
_MAX_IN_BLOCK = 128
"""Products of a row that are summed at a time. It is the same for tiles of any size, so that rows do not depend on
their batch."""
_MAX_ROWS = 64
"""Most rows for which `row_dot` multiplies by the weights in their stack; with more rows XLA's own product is
faster."""
_PROGRAMS = 256
"""Programs that a grid should have: two for each multiprocessor of an H100, so that all of them read."""
_MAX_QUERY_ROWS = 64
"""Most rows of queries of a program: 256 rows of 128 numbers do not fit in the shared memory of an H100."""


def supports_experts(gate_up: StackSlice, down: StackSlice) -> bool:
    """True when `experts` covers these weights: not int4 or `EightBit`, and their sizes, F and D, are multiples of
    16."""
    if any(isinstance(each.stack, (EightBit, Int4)) for each in (gate_up, down)):
        return False
    sizes = [size for weight in (gate_up, down) for size in jax.tree.leaves(weight.stack)[0].shape[-2:]]
    return all(size % _MIN_TILE == 0 for size in sizes)


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
    items = wanted_rA.size
    held = _compute_dtype(gate_up.stack)
    larger = _LARGER_TILES if held == jnp.bfloat16 else ()
    tile = next((tile for rows, tile in larger if items >= rows * slots), _MIN_TILE)
    tiles = min(items, slots) + items // tile
    by_slot = group_by_slot(rows_rD.astype(held), wanted_rA, slots, whole=tile, places=tiles * tile)
    end_S = jnp.cumsum(-(-by_slot.size_S // tile))
    number_T = jnp.arange(tiles)
    slot_T = (number_T[:, None] >= end_S).sum(1, dtype=jnp.int32)
    where = jnp.stack([jnp.broadcast_to(gate_up.index[0], slot_T.shape).astype(jnp.int32), slot_T], axis=1)
    where = jnp.where(number_T[:, None] < end_S[-1], where, -1)
    hidden = _grouped_matmul(by_slot.rows, where, gate_up.stack, held, gated=True, interpret=interpret)
    return by_slot.answers(_grouped_matmul(hidden, where, down.stack, jnp.float32, gated=False, interpret=interpret))


def _compute_dtype(stack: Any) -> Any:
    """The type in which rows multiply weights."""
    return jnp.float32 if not isinstance(stack, Int8) and stack.dtype == jnp.float32 else jnp.bfloat16


def _grouped_matmul(
    rows_PK: Float[ArrayLike, "P K"], where_T2: jax.Array, stack: Any, dtype: Any, *, gated: bool, interpret: bool
) -> jax.Array:
    """Multiply each tile of rows by the matrix `[N, K]` at its (layer, slot): `[P, N]`. If `gated`, silu of the first
    half times the second half: `[P, N/2]`."""
    parts = jax.tree.leaves(stack)  # of Int8 also the scale
    numbers, tile = parts[0], rows_PK.shape[0] // len(where_T2)
    n = numbers.shape[-2] // (2 if gated else 1)
    k = numbers.shape[-1]
    out_block, in_block = _block(n, 64 if tile == _MIN_TILE else 128), _block(k, _MAX_IN_BLOCK)
    while tile == _MIN_TILE and out_block > _MIN_TILE and len(where_T2) * (n // out_block) < _PROGRAMS:
        out_block //= 2
    kernel = functools.partial(
        _multiply, n=n if gated else None, in_block=in_block, exact=_float32_precision(interpret)
    )
    return pl.pallas_call(
        kernel if isinstance(stack, Int8) else functools.partial(_without_scale, kernel),
        out_shape=jax.ShapeDtypeStruct((rows_PK.shape[0], n), dtype),
        grid=(len(where_T2), n // out_block),
        in_specs=[
            pl.BlockSpec((1, 2), lambda t, _: (t, 0)),
            pl.BlockSpec((tile, k), lambda t, _: (t, 0)),
            *[pl.BlockSpec(each.shape, lambda t, _, each=each: (0,) * each.ndim) for each in parts],
        ],
        out_specs=pl.BlockSpec((tile, out_block), lambda t, o: (t, o)),
        compiler_params=triton.CompilerParams(num_warps=8 if tile > 64 else 4, num_stages=3),
        interpret=interpret,
    )(where_T2, rows_PK, *parts)


def _without_scale(kernel: Any, where_ref: Any, rows_ref: Any, stack_ref: Any, out_ref: Any) -> None:
    kernel(where_ref, rows_ref, stack_ref, None, out_ref)


def _multiply(
    where_ref: Any,
    rows_ref: Any,
    stack_ref: Any,
    scale_ref: Any,
    out_ref: Any,
    *,
    n: int | None,
    in_block: int,
    exact: Any,
) -> None:
    layer, slot = where_ref[0, 0], where_ref[0, 1]
    out_block = out_ref.shape[1]
    first = pl.program_id(1) * out_block

    @pl.when(slot >= 0)
    def _() -> None:
        def product(offset: Any) -> jax.Array:
            outs = pl.ds(offset + first, out_block)

            def part(i: jax.Array, total: jax.Array) -> jax.Array:
                ins = pl.ds(i * in_block, in_block)
                return total + _dot(rows_ref[:, ins], stack_ref[layer, slot, outs, ins], exact)

            total = lax.fori_loop(0, rows_ref.shape[1] // in_block, part, jnp.zeros(out_ref.shape, jnp.float32))
            return total if scale_ref is None else total * scale_ref[layer, slot, outs][None, :]

        if n is None:
            out_ref[...] = product(0).astype(out_ref.dtype)
        else:
            gate = product(0)
            out_ref[...] = (gate * jax.nn.sigmoid(gate) * product(n)).astype(out_ref.dtype)


def supports_row_dot(stack: Any) -> bool:
    """True when `row_dot` covers a stack `[..., F, D]`: bfloat16 or int8, F and D multiples of 16."""
    if isinstance(stack, (EightBit, Int4)):
        return False
    numbers = jax.tree.leaves(stack)[0]
    narrow = isinstance(stack, Int8) or numbers.dtype == jnp.bfloat16
    return narrow and all(size % _MIN_TILE == 0 for size in numbers.shape[-2:])


def row_dot(
    x_TD: Float[ArrayLike, "T D"], stack: Any, index: tuple[Any, ...], *, interpret: bool = False
) -> Float[jax.Array, "T F"]:
    """`x @ stack[index].T` in float32. For a few rows the matrix is not copied out of its stack."""
    rows = x_TD.astype(jnp.bfloat16)
    if len(rows) > _MAX_ROWS:
        numbers, *scale = jax.tree.leaves(index_weight(stack, index))
        product = _dot(rows, numbers, None)
        return product * scale[0] if scale else product
    lead = jax.tree.leaves(stack)[0].shape[:-2]
    slot = functools.reduce(lambda slot, axis: slot * axis[0] + axis[1], zip(lead, index, strict=True), 0)
    flat = jax.tree.map(lambda leaf: leaf.reshape(1, -1, *leaf.shape[len(lead) :]), stack)
    tiles = -(-len(rows) // _MIN_TILE)
    where = jnp.stack([jnp.zeros(tiles, jnp.int32), jnp.full(tiles, slot, jnp.int32)], axis=1)
    padded = jnp.pad(rows, ((0, tiles * _MIN_TILE - len(rows)), (0, 0)))
    return _grouped_matmul(padded, where, flat, jnp.float32, gated=False, interpret=interpret)[: len(rows)]


def supports_attention(inputs: AttentionInputs) -> bool:
    """True when `paged_attention` covers these sizes, of heads and pages: powers of two, 16 or more; and the format of
    the cache, which is any but fp8."""
    if numbers_of(inputs.cache.k).dtype == jnp.uint8:
        return False
    sizes = (inputs.q.shape[-1], inputs.page_size)
    return all(size >= _MIN_TILE and size & (size - 1) == 0 for size in sizes)


def paged_attention(inputs: AttentionInputs, *, interpret: bool = False) -> Float[jax.Array, "Z Q N H"]:
    """Attention of plain inputs (`AttentionInputs.is_plain`), float32."""
    page_table_ZM, page_size, new, cache = inputs.page_table, inputs.page_size, inputs.new, inputs.cache
    (Z, Q, N, H), K = inputs.q.shape, inputs.kv_heads
    rows = max(_MIN_TILE, 1 << (Q * N // K - 1).bit_length())
    block = min(rows, _MAX_QUERY_ROWS)
    queries = GroupedQueries.of(inputs, rows)
    facts = jnp.stack(
        [jnp.broadcast_to(inputs.layer, Z), inputs.cached, inputs.new_base, inputs.last_positions()], axis=1
    ).astype(jnp.int32)
    whole = lambda each: pl.BlockSpec(each.shape, lambda *_: (0,) * each.ndim)  # noqa: E731
    parts = jax.tree.leaves((new.k, new.v, cache.k, cache.v))  # where keys have scales, each is two arrays
    out = pl.pallas_call(
        functools.partial(_attend, page_size=page_size, size=H, exact=_float32_precision(interpret)),
        out_shape=jax.ShapeDtypeStruct((Z, K, rows, H), jnp.float32),
        grid=(Z, K, rows // block),
        in_specs=[
            pl.BlockSpec((1, 4), lambda z, h, b: (z, 0)),
            pl.BlockSpec((1, page_table_ZM.shape[1]), lambda z, h, b: (z, 0)),
            pl.BlockSpec((1, block), lambda z, h, b: (z, b)),
            pl.BlockSpec((1, 1, block, H), lambda z, h, b: (z, h, b, 0)),
            *map(whole, parts),
        ],
        out_specs=pl.BlockSpec((1, 1, block, H), lambda z, h, b: (z, h, b, 0)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(facts, page_table_ZM, queries.position, queries.rows, *parts)
    return queries.outputs(out, Q)


def _attend(
    facts_ref: Any,
    table_ref: Any,
    positions_ref: Any,
    q_ref: Any,
    *refs: Any,
    page_size: int,
    size: int,
    exact: Any,
) -> None:
    *parts, out_ref = refs
    each = len(parts) // 4  # keys and values, new and old: numbers, and their scales if there are any
    new_k, new_v, cache_k, cache_v = (parts[i * each : (i + 1) * each] for i in range(4))
    layer, cached, base, last = (facts_ref[0, i] for i in range(4))
    nth = pl.program_id(1)
    head = pl.ds(nth * size, size)
    q, positions = q_ref[0, 0], positions_ref[0]
    at_P = jnp.arange(page_size)

    def read(refs: Any, *rows: Any) -> jax.Array:
        """The numbers of this head in some rows `[page_size, H]`, float32."""
        numbers = refs[0][(*rows, head)]
        if numbers.dtype == jnp.uint16:  # the bits of bfloat16
            numbers = lax.bitcast_convert_type(numbers.astype(jnp.uint32) << 16, jnp.float32)
        numbers = numbers.astype(jnp.float32)
        return numbers if len(refs) == 1 else numbers * refs[1][(*rows, nth)][:, None]

    def old(refs: Any, i: jax.Array) -> jax.Array:
        return read(refs, layer, pl.ds(table_ref[0, i] * page_size, page_size))

    def mixed(new_refs: Any, old_refs: Any, i: jax.Array) -> jax.Array:
        """A page with some positions that are not in the cache yet."""
        at = i * page_size + at_P
        row = jnp.clip(base + at - cached, 0, new_refs[0].shape[0] - 1)
        return jnp.where((at >= cached)[:, None], read(new_refs, row), old(old_refs, i))

    def page(i: jax.Array, carry: Any, k: jax.Array, v: jax.Array) -> Any:
        highest, total, out = carry
        seen = (i * page_size + at_P)[None, :] <= positions[:, None]
        scores = jnp.where(seen, _dot(q, k, exact), MASKED_SCORE)
        higher = jnp.maximum(highest, scores.max(-1))
        weights = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        shrink = jnp.exp(highest - higher)
        return higher, total * shrink + weights.sum(-1), out * shrink[:, None] + _dot(weights, v.T, exact)

    def of_cache(i: jax.Array, carry: Any) -> Any:
        return page(i, carry, old(cache_k, i), old(cache_v, i))

    def of_both(i: jax.Array, carry: Any) -> Any:
        return page(i, carry, mixed(new_k, cache_k, i), mixed(new_v, cache_v, i))

    rows = q.shape[0]
    start = (jnp.full(rows, MASKED_SCORE), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32))
    pages = (last + page_size) // page_size
    full = jnp.minimum(cached // page_size, pages)
    middle = lax.fori_loop(0, full, of_cache, start)
    _, total, out = lax.fori_loop(full, pages, of_both, middle)
    out_ref[0, 0] = out / jnp.maximum(total, 1e-30)[:, None]


def _float32_precision(interpret: bool) -> Any:
    """Precision of products of float32: three products of TF32, which tensor cores compute to about the last bit. A
    CPU, where kernels are interpreted, has plain float32."""
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _dot(a_MK: Any, b_NK: Any, exact: Any) -> Any:
    """`a @ b.T` with float32 sums."""
    dims = (((1,), (1,)), ((), ()))
    if b_NK.dtype == jnp.float32:
        return lax.dot_general(a_MK, b_NK, dims, precision=exact, preferred_element_type=jnp.float32)
    a_MK, b_NK = a_MK.astype(jnp.bfloat16), b_NK.astype(jnp.bfloat16)
    return lax.dot_general(a_MK, b_NK, dims, preferred_element_type=jnp.float32)


def _block(size: int, most: int) -> int:
    """The largest power of two that divides a size, `most` at most."""
    return min(most, size & -size)
