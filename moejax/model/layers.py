"""The parts of a decoder layer that know nothing of meshes, pages or batches.

Rows are independent: the result for a row does not depend, in any bit, on how many other rows there are or which. So a
stream is the same alone, in a batch, and after a failure. Plain dots and sums do not have this property on XLA:CPU
(docs/decisions/0001), `row_dot` and `ordered_sum` do.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from moejax.config.axes import ArrayLike
from moejax.config.weight_formats import Quantized, StackSlice, dequantize, index_weight
from moejax.ops import cpu
from planner.inputs.routed_experts import Activation

_LANES = 32
"""Partial sums kept side by side in `ordered_sum`."""


Weight = ArrayLike | Quantized | StackSlice
Dot = Callable[[ArrayLike, Weight], ArrayLike]
"""`row_dot` or `row_dot_reference`."""


def read_weight(w: Weight) -> ArrayLike:
    """The weight as one array, copied out of its stack: for small weights."""
    return w.read() if isinstance(w, StackSlice) else dequantize(w)


def row_dot(x_TD: Float[ArrayLike, "T D"], w_FD: Weight) -> Float[ArrayLike, "T F"]:
    """`x @ w.T` `[T, F]` for a weight `[out, in]`, each row summed in the same order whatever T is."""
    stack, index = (w_FD.stack, w_FD.index) if isinstance(w_FD, StackSlice) else (w_FD, ())
    if cpu.active():
        return cpu.row_dot(x_TD, stack, index).astype(x_TD.dtype)
    if not isinstance(stack, Quantized) and stack.dtype == jnp.float32:
        return row_dot_reference(x_TD, w_FD)
    from moejax.ops.pallas import gpu  # not at import: a rank on a CPU does without and starts 0.25 s sooner

    kernels = {"cuda": lambda x: gpu.row_dot(x, stack, index).astype(x.dtype)} if gpu.supports_row_dot(stack) else {}
    return lax.platform_dependent(x_TD, default=lambda x: row_dot_reference(x, w_FD), **kernels)


def row_dot_reference(x_TD: Float[ArrayLike, "T D"], w_FD: Weight) -> Float[ArrayLike, "T F"]:
    """`row_dot` by XLA, differentiable.

    Weights are stored `[out, in]` for this: with the contracted axis last, XLA:CPU keeps the order for any two
    rows or more; a single row would take another path and is doubled.
    """
    if x_TD.shape[0] == 1:
        return row_dot_reference(jnp.concatenate([x_TD, x_TD]), w_FD)[:1]
    w = read_weight(w_FD).astype(x_TD.dtype)
    return lax.dot_general(x_TD, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x_TD.dtype)


def ordered_sum(x: Float[ArrayLike, "*T D"]) -> Float[ArrayLike, "*T"]:
    """Sum over the last axis in an order that depends on the length of the axis alone, unlike XLA's own sum."""
    size = x.shape[-1]
    if size > _LANES and size % _LANES == 0:
        return ordered_sum(functools.reduce(jnp.add, jnp.split(x, size // _LANES, axis=-1)))
    odd = []
    while size > 1:
        if size % 2:
            odd.append(x[..., size - 1])
        size //= 2
        x = x[..., :size] + x[..., size : 2 * size]
    return functools.reduce(jnp.add, odd, x[..., 0])


def rms_norm(x_TD: Float[ArrayLike, "*T D"], scale_D: Float[ArrayLike, " D"], eps: float) -> Float[ArrayLike, "*T D"]:
    """Root-mean-square norm (arXiv 1910.07467), in float32."""
    x32 = x_TD.astype(jnp.float32)
    variance = ordered_sum(x32 * x32)[..., None] / x_TD.shape[-1]
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D


def layer_norm(
    x_TD: Float[ArrayLike, "*T D"], scale_D: Float[ArrayLike, " D"], bias_D: Float[ArrayLike, " D"], eps: float
) -> Float[ArrayLike, "*T D"]:
    """Layer norm (arXiv 1607.06450), in float32."""
    x32 = x_TD.astype(jnp.float32)
    x32 = x32 - ordered_sum(x32)[..., None] / x_TD.shape[-1]
    variance = ordered_sum(x32 * x32)[..., None] / x_TD.shape[-1]
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D + bias_D


def norm(
    x_TD: Float[ArrayLike, "*T D"],
    scale_D: Float[ArrayLike, " D"],
    bias_D: Float[ArrayLike, " D"] | None,
    eps: float,
) -> Float[ArrayLike, "*T D"]:
    """Layer norm if there is a bias, root-mean-square norm if not."""
    return rms_norm(x_TD, scale_D, eps) if bias_D is None else layer_norm(x_TD, scale_D, bias_D, eps)


def rounded(products_TD: Float[ArrayLike, "*T D"]) -> Float[ArrayLike, "*T D"]:
    """The same numbers, rounded before they are added to others. XLA leaves one product of a sum unrounded where it
    fuses the two, and which one, and whether it does, depends on the program; behind a select there is none to fuse.
    What is not finite becomes not-a-number."""
    return jnp.where(jnp.isfinite(products_TD), products_TD, jnp.nan)


def head_dot(x_TNH: Float[ArrayLike, "T N H"], w_NFH: Weight) -> Float[ArrayLike, "T N F"]:
    """Each head by its own weight `[out, in]`: `[T, N, F]`. One head after the other, so that `row_dot` applies."""

    def one(_: None, head: tuple[ArrayLike, ArrayLike]) -> tuple[None, ArrayLike]:
        n, x_TH = head
        return None, row_dot(x_TH, w_NFH.at(n) if isinstance(w_NFH, StackSlice) else index_weight(w_NFH, (n,)))

    heads = jnp.arange(x_TNH.shape[1])
    return lax.scan(one, None, (heads, x_TNH.swapaxes(0, 1)))[1].swapaxes(0, 1)


def swiglu(
    x_TD: Float[ArrayLike, "T D"],
    gate_up_2FD: Weight,
    down_DF: Weight,
    dot: Dot = row_dot,
    limit: float | None = None,
) -> Float[ArrayLike, "T D"]:
    """SwiGLU feed-forward (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`. With a `limit` it bounds `silu(gate(x))`
    from above and `up(x)` from both sides (Step-3.5-Flash technical report, StepFun, 2026)."""
    hidden = dot(x_TD, gate_up_2FD)
    gate, up = jnp.split(hidden, 2, axis=-1)
    gate = jax.nn.silu(gate)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return dot(gate * up, down_DF)


def geglu(
    x_TD: Float[ArrayLike, "T D"], gate_up_2FD: Weight, down_DF: Weight, dot: Dot = row_dot
) -> Float[ArrayLike, "T D"]:
    """GEGLU feed-forward (arXiv 2002.05202): `down(gelu(gate(x)) * up(x))`, GELU with its tanh (arXiv 1606.08415)."""
    gate, up = jnp.split(dot(x_TD, gate_up_2FD), 2, axis=-1)
    return dot(jax.nn.gelu(gate, approximate=True) * up, down_DF)


def feed_forward_of(
    x_TD: Float[ArrayLike, "T D"],
    above: Weight,
    down_DF: Weight,
    activation: Activation,
    dot: Dot = row_dot,
    limit: float | None = None,
) -> Float[ArrayLike, "T D"]:
    """A feed-forward part: SwiGLU, with the `limit` of `swiglu`, GEGLU, or `down(relu(up(x)) ** 2)` (arXiv
    2109.08668)."""
    if activation == "swiglu":
        return swiglu(x_TD, above, down_DF, dot, limit)
    if activation == "geglu":
        return geglu(x_TD, above, down_DF, dot)
    return dot(jnp.square(jax.nn.relu(dot(x_TD, above))), down_DF)


def biased_swiglu(
    x_TD: Float[ArrayLike, "T D"],
    gate_up_2FD: Weight,
    down_DF: Weight,
    gate_up_bias_2F: Float[ArrayLike, " F2"],
    down_bias_D: Float[ArrayLike, " D"],
    limit: float | None,
    alpha: float,
    dot: Dot = row_dot,
) -> Float[ArrayLike, "T D"]:
    """SwiGLU with biases. With a `limit` it is gpt-oss's (arXiv 2508.10925): gate and up are bounded by it, the gate is
    `gate * sigmoid(alpha * gate)`, and 1 is added to up."""
    hidden = dot(x_TD, gate_up_2FD) + gate_up_bias_2F
    gate, up = jnp.split(hidden, 2, axis=-1)
    if limit is None:
        return dot(jax.nn.silu(gate) * up, down_DF) + down_bias_D
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return dot(gate * jax.nn.sigmoid(alpha * gate) * (up + 1), down_DF) + down_bias_D
