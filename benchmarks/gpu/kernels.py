"""The two kernels of a layer, called as a step calls them: experts, and attention over pages."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.attention_case import attention_case
from benchmarks.gpu.chains import chained, each_ms
from benchmarks.gpu.models import random_array
from benchmarks.gpu.rows import Row, attention_work, moe_work, relative
from moejax.config.attention_inputs import AttentionInputs
from moejax.config.kv_cache import KVCache
from moejax.config.model_config import ModelConfig
from moejax.config.params import FeedForward
from moejax.config.weight_formats import StackSlice
from moejax.model.attention import paged_attention, paged_attention_reference
from moejax.model.experts import apply_experts, apply_experts_reference
from planner.plan.step_layout import TILE

PAGE = 32
LAYERS = 4
"""Layers used one after the other, so that none is still in the device's cache when it is used again."""
COMPARED_ROWS, COMPARED_SEGMENTS = 64, 8
"""Rows of a large case that are compared with the reference, which needs memory too."""


def experts_rows(cfg: ModelConfig, device: jax.Device, cases: tuple[int, ...], times: int) -> Iterator[Row]:
    """`apply_experts` for these numbers of rows, each routed to distinct random experts."""
    moe = cfg.moe
    assert moe is not None
    E, A, D, F = moe.experts, moe.experts_per_token, cfg.d_model, moe.d_expert
    stacks = [
        random_array((LAYERS, E, *size), jnp.bfloat16, seed, device) for seed, size in enumerate(((2 * F, D), (D, F)))
    ]

    def layer(stacks: Any, i: Any) -> FeedForward:
        gate_up, down = (StackSlice(stack, (i % LAYERS,)) for stack in stacks)
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
    """One case: segments with pages of their own, in random order."""
    N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    pages = -(-(context + Q) // PAGE)
    cache = KVCache(*(random_array((LAYERS, Z * pages * PAGE, K * H), jnp.float32, seed, device) for seed in (0, 1)))
    draw, cached = np.random.default_rng(0), np.full(Z, context)
    case = attention_case(draw, cache, cached, queries=Q, heads=N, head_size=H, page=PAGE, scale=H**-0.5)
    inputs = jax.device_put(case, device)

    def body(q: jax.Array, i: jax.Array, inputs: AttentionInputs) -> jax.Array:
        return q + 1e-3 * paged_attention(dataclasses.replace(inputs, q=q, layer=i % LAYERS))

    ms = each_ms(chained(body, times), times, inputs.q, inputs)
    some = slice(min(Z, COMPARED_SEGMENTS))
    compared = dataclasses.replace(inputs, layer=jnp.int32(1))
    fewer = dataclasses.replace(
        compared,
        **{name: getattr(compared, name)[some] for name in ("q", "page_table", "cached", "new_base", "positions")},
    )
    ours = jax.jit(paged_attention)(compared)[some]
    theirs = jax.jit(paged_attention_reference)(fewer)
    size, flops = attention_work([context] * Z, Q, N, K, H)
    name = f"{Z} x {Q} after {context}"
    return Row(
        part="attention", model=cfg.name, case=name, ms=ms, bytes=size, flops=flops, error=relative(ours, theirs)
    )
