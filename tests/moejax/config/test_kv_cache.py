"""Formats of the KV cache: what a row becomes depends on its own parts alone, and bytes are those of the arrays."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import (
    LARGEST,
    STORED,
    Scaled,
    bytes_per_token,
    cache_shapes,
    empty_cache,
    from_cache_format,
    to_cache_format,
)
from moejax.config.model_config import CacheFormat, ModelConfig
from planner.inputs.cache_formats import CACHE_FORMATS, SCALED_CACHE_FORMATS
from tests.support.decoder_models import CONFIGS
from tests.support.kernel_cases import normal
from tests.support.models import HYBRID

KINDS = {"heads": CONFIGS["mixtral"], "latents": CONFIGS["deepseek-sparse"], "states": HYBRID}
KINDS |= {"convolutions": CONFIGS["lfm2"], "windowed": CONFIGS["windowed"], "Mamba-2": CONFIGS["nemotron"]}
KINDS["states and latents"] = CONFIGS["ling"]


def held_as(form: str, kind: str = "heads") -> ModelConfig:
    return dataclasses.replace(KINDS[kind], cache_format=form)


def by_numpy(values: np.ndarray, sizes: tuple[int, ...], form: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales of rows `[R, width]`, a row and a part at a time."""
    numbers, scales = np.zeros(values.shape, np.float32), np.zeros((len(values), len(sizes)), np.float32)
    for r, row in enumerate(values):
        for i, (last, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
            part = slice(last - size, last)
            highest = np.abs(row[part]).max()
            if highest < 1e-30:
                continue
            near = row[part] * (np.float32(LARGEST[form]) / highest)
            numbers[r, part] = np.rint(near) if form == "int8" else near.astype(ml_dtypes.float8_e4m3fn)
            scales[r, i] = highest * np.float32(1 / LARGEST[form])
    return numbers, scales


def test_the_planner_and_the_server_know_the_same_formats() -> None:
    assert set(CACHE_FORMATS) == set(STORED) == set(CacheFormat.__args__)
    assert set(SCALED_CACHE_FORMATS) == set(LARGEST)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", CACHE_FORMATS)
def test_bytes_of_a_token_are_those_of_the_arrays(form: str, kind: str) -> None:
    cfg = held_as(form, kind)
    cache, shapes = empty_cache(cfg, 24, states=3), cache_shapes(cfg, 24, states=3)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k, cache.v)))
    assert held == 24 * bytes_per_token(cfg)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == (
        jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), shapes)
    )
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(cache.states))


@pytest.mark.parametrize("kind", ["heads", "latents"])
@pytest.mark.parametrize("form", SCALED_CACHE_FORMATS)
def test_rows_are_rounded_as_numpy_rounds_them_and_do_not_know_of_each_other(form: str, kind: str) -> None:
    cfg = held_as(form, kind)
    k, v = (
        normal(9, width, seed=width) * 10.0 ** np.arange(-4, 5)[:, None].astype(np.float32)
        for width in cfg.cache_widths
    )
    k[3] = v[4, : cfg.cache_parts[1][0]] = 0
    convert = jax.jit(lambda k, v: to_cache_format(cfg, k, v))
    made = convert(k, v)
    for values, rows, sizes in zip((k, v), (made.k, made.v), cfg.cache_parts, strict=True):
        assert isinstance(rows, Scaled)
        numbers, scales = by_numpy(values, sizes, form)
        found = np.asarray(rows.numbers)
        found = found if form == "int8" else found.view(ml_dtypes.float8_e4m3fn)
        np.testing.assert_allclose(rows.scale, scales, rtol=1e-6)
        # A number half-way between two others may be either, by the last bit of its factor.
        step = 1 if form == "int8" else np.maximum(np.abs(numbers) / 8, 2.0**-9)
        assert (np.abs(found.astype(np.float32) - numbers) <= step).all()
        assert (found.astype(np.float32) == numbers).mean() > 0.98
        largest = np.repeat(np.asarray(rows.scale) * LARGEST[form], sizes, axis=-1)
        bound = largest / 254 if form == "int8" else np.maximum(np.abs(values) / 16, largest / 448 / 1024)
        assert (np.abs(from_cache_format(rows) - values) <= 1.001 * bound).all()
    for r in range(9):
        alone = convert(k[r : r + 1], v[r : r + 1])
        jax.tree.map(lambda one, all_rows, r=r: np.testing.assert_array_equal(one[0], all_rows[r]), alone, made)


@pytest.mark.parametrize("form", CACHE_FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_not_finite_in_the_cache(form: str, bad: float) -> None:
    cfg = held_as(form)
    k, v = (normal(4, width) for width in cfg.cache_widths)
    k[2, 5] = bad
    rows = to_cache_format(cfg, k, v).k
    assert np.isfinite(np.asarray(from_cache_format(rows))).all(-1).tolist() == [True, True, False, True]


def test_a_format_that_is_not_known_is_refused_and_the_usual_one_is_not_written() -> None:
    with pytest.raises(ConfigError, match="cache_format is 'int3'; known are 'float32'"):
        held_as("int3")
    assert "cache_format" not in KINDS["heads"].to_json()
    assert ModelConfig.from_json(held_as("fp8").to_json()) == held_as("fp8")
