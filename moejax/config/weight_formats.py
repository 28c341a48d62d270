"""Weight formats: float32, bfloat16, int8 with a scale for each output, int4 with a scale for each group of 32, or the
four or eight bits that a model is published in (`moejax.config.packed_form`).

Only matrices are stored in the narrow formats: activations, sums, norms, biases and routers are always float32. In
int4, the embedding and the head are int8 (docs/decisions/0020). On a CPU, rows are rounded to 16 bits before they
multiply int8 or four bits (docs/decisions/0012); published FP8 and int8 are widened for products of float32
(docs/decisions/0033).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from moejax.config import eight_bit, int4
from moejax.config.axes import ArrayLike
from moejax.config.eight_bit import EightBit, Int8
from moejax.config.int4 import Int4, Planes
from moejax.config.model_config import ModelConfig
from moejax.config.packed_form import PackedForm, part_of
from moejax.config.params import FeedForward, ParamSpec, Position, expert_specs, is_expert, is_spec, tensor_specs

USUAL = {
    "mxfp4": PackedForm(scale="e8m0", group=32),
    "nvfp4": PackedForm(scale="e4m3", group=16),
    "int4": PackedForm(scale="bfloat16", group=32),
    "fp8": PackedForm(numbers="fp8", scale="float32", group=128, rows=128),
    "int8": PackedForm(numbers="int8", scale="float32", group=0),
}
"""The usual form of what is published in a format, where there is a configuration and no weights."""
Quantized = Int8 | EightBit | Int4
"""A matrix in few bits, whose numbers and scales are arrays of their own."""


def is_matrix(spec: ParamSpec) -> bool:
    """True for matrices that can be stored in fewer bits. A router cannot, rounding would change its choices; nor can
    the rates of a delta net and convolutions over time, which are small and act on every later position, and the
    weights of an indexer's heads."""
    return len(set(spec.axes) - {"layer", "expert"}) >= 2 and not {"router", "rate"} & set(spec.axes)


def format_of(cfg: ModelConfig, spec: ParamSpec) -> str:
    """The format of one parameter: float32, bfloat16, int8, int4 or packed, as published. The embedding and the head,
    which decides between tokens, are int8 where other matrices are int4."""
    if not is_matrix(spec):
        return "float32"
    if cfg.packed is not None:
        return "packed" if part_of(spec.axes) in cfg.packed.parts else "bfloat16"
    return "int8" if cfg.weights == "int4" and "vocab" in spec.axes else cfg.weights


def weight_shape(cfg: ModelConfig, spec: ParamSpec) -> Any:
    """Shape and dtype of a parameter in the format of `cfg`: a ShapeDtypeStruct, or a `Quantized` of several."""
    match format_of(cfg, spec):
        case "int4":
            return int4.shape_of(spec.shape)
        case "packed":
            assert cfg.packed is not None, "ModelConfig checks it"
            return packed_shape(spec.shape, cfg.packed)
        case "int8":
            return Int8(jax.ShapeDtypeStruct(spec.shape, jnp.int8), jax.ShapeDtypeStruct(spec.shape[:-1], jnp.float32))
        case plain:
            return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(plain))


def packed_shape(shape: tuple[int, ...], form: PackedForm) -> Quantized:
    """Shapes of a matrix `[..., F, D]` in a published form."""
    return eight_bit.shape_of(shape, form) if form.is_eight_bit else int4.shape_of(shape, form)


def usual_form(cfg: ModelConfig, name: str) -> PackedForm | None:
    """The usual form of experts that are published in this format, or of the matrices of a model without experts; None
    for a format that is widened."""
    matrices = [spec.axes for spec in tensor_specs(cfg).values() if is_matrix(spec) and "vocab" not in spec.axes]
    parts = {part_of(axes) for axes in matrices if "expert" in axes} or {part_of(axes) for axes in matrices}
    return dataclasses.replace(USUAL[name], parts=tuple(sorted(parts))) if name in USUAL else None


def from_published(planes: Planes, form: PackedForm) -> Quantized | None:
    """Published numbers `[..., F, D]` as ranks hold them; None where scales or zero points are not those of groups, or
    blocks, in the order of the inputs."""
    return eight_bit.from_published(planes, form) if form.is_eight_bit else int4.from_published(planes, form)


def slot_shapes(cfg: ModelConfig, position: Position, slots: int) -> FeedForward:
    """Shapes `[R, P, ...]` of the slots of a rank for the experts at a position."""
    slot = lambda s: jax.ShapeDtypeStruct((s.shape[0], slots, *s.shape[2:]), s.dtype)  # noqa: E731
    experts = expert_specs(cfg, position)
    return jax.tree.map(lambda spec: jax.tree.map(slot, weight_shape(cfg, spec)), experts, is_leaf=is_spec)


def to_weight_format(cfg: ModelConfig, spec: ParamSpec, values: np.ndarray | Quantized) -> Any:
    """Convert float32 values of a parameter, or of a part of its leading axes, to the format of `cfg`. What is packed
    stays as it was published. Raises ValueError for float32 values that were to be packed."""
    if isinstance(values, Quantized):
        return values
    match format_of(cfg, spec):
        case "float32":
            return np.asarray(values, np.float32)
        case "bfloat16":
            return values.astype(ml_dtypes.bfloat16)
        case "int4":
            return int4.quantize(values)
        case "packed":
            raise ValueError(
                f"weights of shape {values.shape} are to be held in {cfg.weights} as they are published, and were "
                "published in another form."
            )
    highest = np.maximum(values.max(-1), -values.min(-1))
    scale = np.where(highest > 0, highest / np.float32(127), np.float32(1))
    return Int8(np.rint(values / scale[..., None]).astype(np.int8), scale)


def weight_bytes(cfg: ModelConfig, *, experts: bool) -> int:
    """Bytes of all routed experts in the format of `cfg`, each counted once; or of all other weights."""
    specs = (spec for name, spec in tensor_specs(cfg).items() if is_expert(name) == experts)
    return sum(leaf.size * leaf.dtype.itemsize for spec in specs for leaf in jax.tree.leaves(weight_shape(cfg, spec)))


def bytes_per_expert(cfg: ModelConfig) -> int:
    """Bytes of one expert of one layer in the format of `cfg`, on average over the layers; 0 without experts."""
    return weight_bytes(cfg, experts=True) // (cfg.n_moe_layers * cfg.moe.experts) if cfg.moe else 0


def index_weight(weight: Any, index: tuple[Any, ...]) -> Any:
    """`weight[index]` over its leading axes, in any format."""
    return jax.tree.map(lambda leaf: leaf[index], weight)


def look_up(weight: Any, index: Int[ArrayLike, "..."]) -> Float[ArrayLike, "... D"]:
    """Rows of a matrix in float32: an embedding lookup."""
    if isinstance(weight, Int8):
        return weight.numbers[index].astype(jnp.float32) * weight.scale[index][..., None]
    return weight[index].astype(jnp.float32)


def dequantize(weight: Any) -> Any:
    """The weight as one array: float32 if it is stored in eight or four bits, otherwise unchanged."""
    if isinstance(weight, Int4):
        return int4.dequantize(weight)
    return eight_bit.dequantize(weight) if isinstance(weight, (Int8, EightBit)) else weight


@struct.dataclass
class StackSlice:
    """`stack[index]`, not yet read: one matrix of a stack `[..., F, D]`, which may be `Quantized`. A kernel can
    multiply by it without copying it out. `index` has a number for each leading axis that is fixed."""

    stack: Any
    index: tuple[Any, ...]

    def read(self) -> ArrayLike:
        """Copy the matrix out of its stack."""
        return dequantize(index_weight(self.stack, self.index))

    def at(self, *index: Any) -> "StackSlice":
        """Fix further leading axes."""
        return StackSlice(self.stack, (*self.index, *index))


def is_scaled(leaf: Any) -> bool:
    """True for a `Quantized`: as `is_leaf`, it keeps the arrays of a weight together."""
    return isinstance(leaf, Quantized)


def slice_stacks(weights: Any, *index: Any) -> Any:
    """A tree of weights with every leaf `[..., F, D]` as a `StackSlice` at `index`."""
    return jax.tree.map(lambda leaf: StackSlice(leaf, index), weights, is_leaf=is_scaled)
