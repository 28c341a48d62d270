"""The two kernels of a layer, by the functions that a step calls them by: experts, and attention over pages."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.chains import chained, each_ms
from benchmarks.gpu.models import random_array
from benchmarks.gpu.rows import Row, attention_work, moe_work, relative
from moejax.attention import paged_attention, paged_attention_reference
from moejax.cache import Cache
from moejax.config import ModelConfig
from moejax.experts import apply_experts, apply_experts_reference
from moejax.inputs import TILE
from moejax.layers import Stacked
from moejax.params import FeedForward

PAGE = 32
LAYERS = 4
"""Layers taken in turn, so that none is still in the device's cache when it is next."""
COMPARED_ROWS, COMPARED_SEGMENTS = 64, 8
"""What of a large case is compared: the reference has a memory of its own."""


def experts_rows(cfg: ModelConfig, device: jax.Device, cases: tuple[int, ...], times: int) -> Iterator[Row]:
    """`apply_experts` for so many rows each, that want distinct experts drawn at random."""
    moe = cfg.moe
    assert moe is not None
    E, A, D, F = moe.experts, moe.experts_per_token, cfg.d_model, moe.d_expert
    stacks = [
        random_array((LAYERS, E, *size), jnp.bfloat16, seed, device) for seed, size in enumerate(((2 * F, D), (D, F)))
    ]

    def layer(stacks: Any, i: Any) -> FeedForward:
        gate_up, down = (Stacked(stack, (i % LAYERS,)) for stack in stacks)
        return FeedForward(gate_up=gate_up, down=down)

    def body(x: jax.Array, i: jax.Array, operands: Any) -> jax.Array:
        wanted, stacks = operands
        return x + 1e-3 * apply_experts(x, wanted, layer(stacks, i), E, moe).sum(1)

    @functools.partial(jax.jit, static_argnames="apply")
    def once(x: jax.Array, wanted: jax.Array, stacks: Any, *, apply: Any) -> jax.Array:
        return apply(x, wanted, layer(stacks, 1), E, moe)

    draw, run = np.random.default_rng(0), chained(body, times)
    for rows in cases:
        chosen = np.argsort(draw.random((rows, E)), axis=1)[:, :A].astype(np.int32)
        x = jax.device_put(draw.standard_normal((rows, D), np.float32), device)
        wanted = jax.device_put(chosen, device)
        ms = each_ms(run, times, x, (wanted, stacks))
        part = slice(min(rows, COMPARED_ROWS))
        ours = once(x, wanted, stacks, apply=apply_experts)[part]
        theirs = once(x[part], wanted[part], stacks, apply=apply_experts_reference)
        size, flops = moe_work(np.bincount(chosen.reshape(-1), minlength=E).tolist(), rows, D, F)
        error = relative(ours, theirs)
        yield Row(part="experts", model=cfg.name, case=f"{rows} rows", ms=ms, bytes=size, flops=flops, error=error)


def attention_rows(
    cfg: ModelConfig, device: jax.Device, cases: tuple[tuple[int, int, int], ...], times: int
) -> Iterator[Row]:
    """`paged_attention` of (segments, new positions of each, cached positions of each)."""
    for segments, new, context in cases:
        assert new in (1, TILE), f"{new} new positions: a step has 1 or {TILE} of each segment"
        yield _attention_row(cfg, device, segments, new, context, times)


def _attention_row(cfg: ModelConfig, device: jax.Device, Z: int, Q: int, context: int, times: int) -> Row:
    """Of segments that have pages of their own, in no order."""
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    pages = -(-(context + Q) // PAGE)
    cache = Cache(*(random_array((LAYERS, Z * pages * PAGE, K * H), jnp.float32, seed, device) for seed in (0, 1)))
    draw = np.random.default_rng(0)
    table = draw.permutation(Z * pages).astype(np.int32).reshape(Z, pages)
    q, k, v = (draw.standard_normal(shape, np.float32) for shape in ((Z, Q, N, H), (Z * Q, K, H), (Z * Q, K, H)))
    cached = np.full(Z, context, np.int32)
    base = Q * np.arange(Z, dtype=np.int32)
    positions = np.broadcast_to(context + np.arange(Q, dtype=np.int32), (Z, Q))
    q, *rest = jax.device_put((q, k, v, table, cached, base, positions), device)

    def attend(q: jax.Array, layer: Any, rest: Any, by: Any) -> jax.Array:
        k, v, cache, table, cached, base, positions = rest
        return by(q, k, v, cache, layer, table, cached, base, positions, PAGE, scale=H**-0.5)

    def body(q: jax.Array, i: jax.Array, rest: Any) -> jax.Array:
        return q + 1e-3 * attend(q, i % LAYERS, rest, paged_attention)

    run, once = chained(body, times), jax.jit(attend, static_argnames="by")
    k, v, table, cached, base, positions = rest
    operands = (k, v, cache, table, cached, base, positions)
    ms = each_ms(run, times, q, operands)
    some = slice(min(Z, COMPARED_SEGMENTS))
    fewer = (k, v, cache, table[some], cached[some], base[some], positions[some])
    ours = once(q, jnp.int32(1), operands, by=paged_attention)[some]
    theirs = once(q[some], jnp.int32(1), fewer, by=paged_attention_reference)
    size, flops = attention_work([context] * Z, Q, N, K, H)
    case = f"{Z} x {Q} after {context}"
    return Row(
        part="attention", model=cfg.name, case=case, ms=ms, bytes=size, flops=flops, error=relative(ours, theirs)
    )
