"""Inputs for the tests of kernels: random matrices, weights in a format, and paged attention of three segments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu import attention_case as paged
from moejax.config.attention_inputs import AttentionInputs
from moejax.config.int4 import FP4, Planes
from moejax.config.kv_cache import KVCache, to_cache_format
from moejax.config.packed_form import PackedForm
from moejax.config.params import ParamSpec
from moejax.config.weight_formats import from_published, to_weight_format
from tests.support.models import MIXTRAL


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PACKED = {
    "mxfp4": PackedForm(scale="e8m0", group=32),
    "nvfp4": PackedForm(scale="e4m3", group=16),
    "awq": PackedForm(scale="float16", group=64, zeros=True),
    "gptq": PackedForm(scale="float16", group=32, zeros=True),
    "int4 by rows": PackedForm(scale="bfloat16", group=0),
}
"""Forms of four bits as they are published, by the names that tests have for them."""
EIGHT_BIT = {
    "fp8 by blocks": PackedForm(numbers="fp8", scale="float32", group=48, rows=16),
    "fp8 by bfloat16 blocks": PackedForm(numbers="fp8", scale="bfloat16", group=32, rows=3),
    "fp8 by exponents": PackedForm(numbers="fp8", scale="e8m0", group=32),
    "fp8 by rows": PackedForm(numbers="fp8", scale="float32", group=0),
    "int8 by rows": PackedForm(numbers="int8", scale="float32", group=0),
    "int8 by rows, zero points": PackedForm(numbers="int8", scale="float32", group=0, zeros=True),
    "int8 by groups": PackedForm(numbers="int8", scale="float16", group=20, zeros=True),
}
"""Forms of eight bits, likewise."""
PUBLISHED = PACKED | EIGHT_BIT


def held(values: np.ndarray, form: str) -> Any:
    """A matrix `[..., F, D]` in a weight format, on the device; in a published form random numbers of its shape."""
    if form in PUBLISHED:
        packed = from_published(planes(values.shape, PUBLISHED[form]), PUBLISHED[form])
        assert packed is not None
        return jax.tree.map(jnp.asarray, packed)
    spec = ParamSpec(values.shape, ("layer", "expert", "ffn", "model"), 1.0)
    return jax.tree.map(jnp.asarray, to_weight_format(dataclasses.replace(MIXTRAL, weights=form), spec, values))


def planes(shape: tuple[int, ...], form: PackedForm, seed: int = 0) -> Planes:
    """Random published numbers of a form, at most about 1 in magnitude."""
    draw = np.random.default_rng(seed)
    *lead, columns = shape
    group = form.group or columns
    groups = (*lead, -(-columns // group))
    spread = lambda each: np.repeat(each, group, axis=-1)[..., :columns]  # noqa: E731
    if form.is_eight_bit:
        return _eight_bit_planes(draw, shape, form)
    scale: np.ndarray = draw.uniform(0.002, 0.02, groups)
    if form.scale == "e8m0":
        scale = draw.integers(117, 122, groups).astype(np.uint8)
    elif form.scale == "e4m3":
        scale = draw.uniform(0.1, 400, groups).astype(ml_dtypes.float8_e4m3fn)
    else:
        scale = scale.astype(np.float16 if form.scale == "float16" else ml_dtypes.bfloat16)
    factor = draw.uniform(0.0001, 0.0002, (*lead, 1)).astype(np.float32)
    return Planes(
        codes=draw.integers(0, 16, shape).astype(np.uint8),
        scale=spread(scale),
        zero=spread(draw.integers(0, 17, groups).astype(np.uint8)) if form.zeros else None,
        factor=np.broadcast_to(factor, shape) if form.scale == "e4m3" else None,
    )


def _eight_bit_planes(draw: np.random.Generator, shape: tuple[int, ...], form: PackedForm) -> Planes:
    *lead, rows, columns = shape
    group = form.group or columns
    blocks = (*lead, -(-rows // form.rows), -(-columns // group))

    def spread(each: np.ndarray) -> np.ndarray:
        return np.repeat(np.repeat(each, form.rows, axis=-2)[..., :rows, :], group, axis=-1)[..., :columns]

    if form.scale == "e8m0":
        scale = draw.integers(114, 120, blocks).astype(np.uint8)
    else:
        dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[form.scale]
        scale = draw.uniform(0.001, 0.01, blocks).astype(dtype)
    zero = spread(draw.integers(-127, 128, blocks).astype(np.int16)) if form.zeros else None
    if form.numbers == "int8":
        return Planes(draw.integers(-128, 128, shape).astype(np.int8), spread(scale), zero)
    bits = draw.integers(0, 256, shape).astype(np.uint8)
    return Planes(np.where(bits & 127 == 127, np.uint8(0), bits), spread(scale))  # without what is no number


def published_numbers(planes: Planes, form: PackedForm | None = None) -> np.ndarray:
    """The numbers of a published form, by its formula, in float32; `form` is that of eight bits."""
    if form is not None and form.is_eight_bit:
        numbers = planes.codes.view(ml_dtypes.float8_e4m3fn) if form.numbers == "fp8" else planes.codes
        exponents = planes.scale.dtype == np.uint8
        scale = np.exp2(planes.scale.astype(np.float32) - 127) if exponents else planes.scale.astype(np.float32)
        return (numbers.astype(np.float32) - (0 if planes.zero is None else planes.zero.astype(np.float32))) * scale
    if planes.scale.dtype == np.uint8:
        return FP4[planes.codes] * np.exp2(planes.scale.astype(np.float32) - 127)
    scale = planes.scale.astype(np.float32)
    if planes.factor is not None:
        return FP4[planes.codes] * (scale * planes.factor)
    zero = np.float32(8) if planes.zero is None else planes.zero.astype(np.float32)
    return (planes.codes.astype(np.float32) - zero) * scale


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
