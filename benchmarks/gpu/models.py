"""The models measured: published shapes, as many layers as fit, random weights made on the device that holds them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.checkpoint.families import read_config
from moejax.config.kv_cache import bytes_per_token
from moejax.config.model_config import ModelConfig
from moejax.config.params import BIAS_STD, Params, is_spec, param_specs
from moejax.config.weight_formats import weight_bytes, weight_shape

CONFIGS = Path(__file__).parents[2] / "configs/models"
SHARE = 0.8
"""Share of the memory that a process may take, for weights and cache. XLA's scheduler assumes 80 % of a device: if the
arguments of a program take more than that, it computes values again instead of keeping them."""


def config(name: str, *, small: bool = False) -> ModelConfig:
    """The published model held in bfloat16; if small, its form at sizes for a CPU."""
    cfg = read_config(json.loads((CONFIGS / f"{name}.json").read_text()), name=name)
    cfg = dataclasses.replace(cfg, weights="bfloat16")
    if not small or cfg.moe is None:
        return cfg
    moe = dataclasses.replace(cfg.moe, experts=8, experts_per_token=2, d_expert=64)
    heads = {"n_heads": 4, "n_kv_heads": 2, "d_head": 32}
    return dataclasses.replace(cfg, vocab_size=256, d_model=64, n_layers=3, d_ff=64, moe=moe, **heads)


def with_layers(cfg: ModelConfig, layers: int) -> ModelConfig:
    """The configuration with its first layers only."""
    return dataclasses.replace(cfg, n_layers=layers)


def layers_that_fit(cfg: ModelConfig, room: int, entries: int) -> int:
    """The most layers whose weights and cache of `entries` positions fit in `room` bytes, all else once."""

    def size(layers: int) -> int:
        some = with_layers(cfg, layers)
        return weight_bytes(some, experts=True) + weight_bytes(some, experts=False) + entries * bytes_per_token(some)

    return next((n for n in range(cfg.n_layers, 1, -1) if size(n) <= room), 1)


def memory(device: jax.Device) -> int:
    """Bytes of the device for weights and cache; a fixed number on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return int(SHARE * stats["bytes_limit"]) if stats else 1 << 30


def random_params(cfg: ModelConfig, device: jax.Device) -> Params:
    """Random parameters in the format of a rank, made on the device, one matrix at a time."""
    specs, tree = jax.tree.flatten(param_specs(cfg), is_leaf=is_spec)

    def leaf(number: int, spec: Any) -> jax.Array:
        held = weight_shape(cfg, spec)
        if spec.std <= BIAS_STD:
            return jax.device_put(np.full(held.shape, float(spec.std == 0), np.float32), device)
        return random_array(held.shape, held.dtype, number, device)

    return jax.tree.unflatten(tree, [leaf(i, spec) for i, spec in enumerate(specs)])


def random_array(shape: tuple[int, ...], dtype: Any, seed: int, device: jax.Device) -> jax.Array:
    """Numbers of either sign between 2**-7 and 2**-5, made from random bits, so that the memory for drawing them is a
    small part of the array, however large that is."""
    rows, width = int(np.prod(shape[:-2], dtype=np.int64)), shape[-2:]

    def one(i: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.key(seed), i), width, jnp.uint16)
        return lax.bitcast_convert_type(bits & jnp.uint16(0x80FF) | jnp.uint16(0x3C00), jnp.bfloat16).astype(dtype)

    def fill(i: jax.Array, filled: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(filled, one(i), i, 0)

    with jax.default_device(device):
        made = jax.jit(lambda: lax.fori_loop(0, rows, fill, jnp.zeros((rows, *width), dtype)).reshape(shape))()
    return jax.block_until_ready(made)
