"""The inputs that the feed-forward layers of a dense model have for a text, kept in files: they are larger than the
model, and an interrupted run goes on from the files that are there.

    inputs-0003.npy       those of eight rows of the text: [layer, token, D] in float16
    residuals-0003.npy    the mean square of the residual stream after each layer: [layer, token] in float32
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.config.model_config import ModelConfig
from moejax.config.params import Layer, Params
from moejax.model.layers import rms_norm, swiglu
from moejax.model.reference import attention

ROWS = 8
"""Rows of the text that are computed at once."""


def write_layer_inputs(
    folder: Path,
    params: Params,
    cfg: ModelConfig,
    layers: Sequence[int],
    tokens_BT: np.ndarray,
    real_BT: np.ndarray,
    done: Callable[[], None],
) -> None:
    """Compute the inputs of some layers of a dense model for those tokens that are text and not filling; what the
    folder has is not computed again. `done` is called after each part."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, at in enumerate(range(0, len(tokens_BT), ROWS)):
        names = [folder / f"{name}-{part:04}.npy" for name in ("inputs", "residuals")]
        if not all(name.is_file() for name in names):
            real = real_BT[at : at + ROWS]
            inputs_LBTD, residuals_LBT = feed_forward_inputs(params, cfg, tokens_BT[at : at + ROWS])
            inputs_LTD = np.asarray(inputs_LBTD[np.array(layers)], np.float16)[:, real]
            residuals_LT = np.asarray(residuals_LBT[np.array(layers)])[:, real]
            for name, values in zip(names, (inputs_LTD, residuals_LT), strict=True):
                write_whole(name, lambda file, values=values: np.save(file, values))
        done()


def parts_of(tokens_BT: np.ndarray) -> int:
    """The number of parts in which a text is computed."""
    return -(-len(tokens_BT) // ROWS)


def read_layer_inputs(folder: Path, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs `[T, D]` of one of the layers that were written, counted among these, and the mean square of the
    residual stream after it `[T]`, both in float32."""
    read = lambda name: [np.load(file, mmap_mode="r")[layer] for file in sorted(folder.glob(f"{name}-*.npy"))]  # noqa: E731
    return np.concatenate(read("inputs")).astype(np.float32), np.concatenate(read("residuals"))


@partial(jax.jit, static_argnames=("cfg",))
def feed_forward_inputs(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inputs of the feed-forward part of each layer of a dense model `[L, B, T, D]`, and the mean square of the
    residual stream after it `[L, B, T]`."""

    def body(x_BTD: jax.Array, at: tuple[Layer, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        layer, index = at
        assert layer.ffn is not None
        x_BTD = x_BTD + attention(layer, cfg, rms_norm(x_BTD, layer.attention_norm, cfg.norm_eps), index)
        h_BTD = rms_norm(x_BTD, layer.ffn_norm, cfg.norm_eps)
        y_TD = swiglu(h_BTD.reshape(-1, cfg.d_model), layer.ffn.gate_up, layer.ffn.down)
        x_BTD = x_BTD + y_TD.reshape(x_BTD.shape)
        return x_BTD, (h_BTD, jnp.square(x_BTD).mean(-1))

    return lax.scan(body, params.embed[tokens_BT], (params.segments[0][0], jnp.arange(cfg.n_layers)))[1]


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file, whole or not at all."""
    draft = path.with_suffix(f".{os.getpid()}")
    with draft.open("wb") as file:
        write(file)
    draft.rename(path)
