"""The forms in which a rank holds its matrices: float32, bfloat16, or int8 with a scale for each output.

Activations, sums, norms, biases and routers are float32 in all of them. On a CPU, rows are rounded to 16 bits where
they meet int8 (docs/decisions/0012).
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from moejax.config import ModelConfig
from moejax.manifest import is_expert, tensor_specs
from moejax.params import ParamSpec


@struct.dataclass
class Int8:
    """A stack of matrices: `numbers [..., F, D]` int8, each row of which counts `scale [..., F]` times."""

    numbers: Any
    scale: Any


def is_matrix(spec: ParamSpec) -> bool:
    """Whether rows are multiplied by it, and it may be held in fewer bits. A router decides, so it may not."""
    return len(set(spec.axes) - {"layer", "expert"}) >= 2 and "router" not in spec.axes


def held_shape(cfg: ModelConfig, spec: ParamSpec) -> Any:
    """The form in which a rank of `cfg` holds a parameter: a ShapeDtypeStruct, or an Int8 of two."""
    if cfg.weights == "int8" and is_matrix(spec):
        return Int8(jax.ShapeDtypeStruct(spec.shape, jnp.int8), jax.ShapeDtypeStruct(spec.shape[:-1], jnp.float32))
    narrow = cfg.weights == "bfloat16" and is_matrix(spec)
    return jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16 if narrow else jnp.float32)


def hold(cfg: ModelConfig, spec: ParamSpec, values: np.ndarray) -> Any:
    """A parameter, or a part of its leading axes, in that form, from float32 values."""
    if not is_matrix(spec) or cfg.weights == "float32":
        return np.asarray(values, np.float32)
    if cfg.weights == "bfloat16":
        return values.astype(ml_dtypes.bfloat16)
    highest = np.maximum(values.max(-1), -values.min(-1))
    scale = np.where(highest > 0, highest / np.float32(127), np.float32(1))
    return Int8(np.rint(values / scale[..., None]).astype(np.int8), scale)


def held_bytes(cfg: ModelConfig, *, experts: bool) -> int:
    """Bytes of all routed experts in that form, each counted once; or of all else."""
    specs = (spec for name, spec in tensor_specs(cfg).items() if is_expert(name) == experts)
    return sum(leaf.size * leaf.dtype.itemsize for spec in specs for leaf in jax.tree.leaves(held_shape(cfg, spec)))


def at(weight: Any, index: tuple[Any, ...]) -> Any:
    """`weight[index]` over its leading axes, whatever its form."""
    return jax.tree.map(lambda leaf: leaf[index], weight)


def look_up(weight: Any, index: jax.Array) -> jax.Array:
    """Rows of a matrix `[..., D]` in float32, as an embedding looks them up."""
    if isinstance(weight, Int8):
        return weight.numbers[index].astype(jnp.float32) * weight.scale[index][..., None]
    return weight[index].astype(jnp.float32)


def widened(weight: Any) -> Any:
    """The numbers themselves: float32 if they are held as int8, as they are if not."""
    return look_up(weight, ...) if isinstance(weight, Int8) else weight
