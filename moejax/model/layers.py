"""The parts of a decoder layer that do not know about meshes, pages or batches.

Rows are independent: the result for a row does not depend, in any bit, on how many rows there are or
which they are. That makes a stream the same alone, in a batch, and after a failure. Plain dots and sums do
not have this property on XLA:CPU (docs/decisions/0001), `row_dot` and `ordered_sum` do.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Float

from moejax import kernels
from moejax.axes import Numbers
from moejax.precision import Int8, at, widened

_LANES = 32
"""Partial sums kept side by side in `ordered_sum`."""


@struct.dataclass
class Stacked:
    """`stack[index]`, not yet read: one matrix of a stack `[..., F, D]`, or an `Int8` of one, so that who multiplies
    by it can leave it where it lies. `index` has a number for each leading axis that is fixed."""

    stack: Any
    index: tuple[Any, ...]

    def read(self) -> Numbers:
        """The matrix itself, copied out."""
        return widened(at(self.stack, self.index))

    def at(self, *index: Any) -> "Stacked":
        """Further leading axes fixed."""
        return Stacked(self.stack, (*self.index, *index))


Weight = Numbers | Int8 | Stacked
Dot = Callable[[Numbers, Weight], Numbers]
"""`row_dot` or another of its kind."""


def value(w: Weight) -> Numbers:
    """The numbers themselves, for what is small."""
    return w.read() if isinstance(w, Stacked) else widened(w)


def row_dot(x_TD: Float[Numbers, "T D"], w_FD: Weight) -> Float[Numbers, "T F"]:
    """`x @ w.T` `[T, F]` for a weight `[out, in]`, each row summed in the same order whatever T is."""
    stack, index = (w_FD.stack, w_FD.index) if isinstance(w_FD, Stacked) else (w_FD, ())
    if kernels.active():
        return kernels.row_dot(x_TD, stack, index).astype(x_TD.dtype)
    if not isinstance(stack, Int8) and stack.dtype == jnp.float32:
        return row_dot_reference(x_TD, w_FD)
    from moejax.pallas import gpu  # a CPU's rank can do without: a quarter of a second of its start

    ways = {"cuda": lambda x: gpu.row_dot(x, stack, index).astype(x.dtype)} if gpu.takes_rows(stack) else {}
    return lax.platform_dependent(x_TD, default=lambda x: row_dot_reference(x, w_FD), **ways)


def row_dot_reference(x_TD: Float[Numbers, "T D"], w_FD: Weight) -> Float[Numbers, "T F"]:
    """`row_dot` by XLA, differentiable.

    Weights are stored `[out, in]` for this: with the contracted axis last, XLA:CPU keeps the order for any two
    rows or more; a single row would take another path and is doubled.
    """
    if x_TD.shape[0] == 1:
        return row_dot_reference(jnp.concatenate([x_TD, x_TD]), w_FD)[:1]
    w = value(w_FD).astype(x_TD.dtype)
    return lax.dot_general(x_TD, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x_TD.dtype)


def ordered_sum(x: Float[Numbers, "*T D"]) -> Float[Numbers, "*T"]:
    """Sum over the last axis in an order that depends on its length alone (XLA's own does not: see row_dot)."""
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


def rms_norm(x_TD: Float[Numbers, "*T D"], scale_D: Float[Numbers, " D"], eps: float) -> Float[Numbers, "*T D"]:
    """Root-mean-square norm (arXiv 1910.07467), in float32."""
    x32 = x_TD.astype(jnp.float32)
    variance = ordered_sum(x32 * x32)[..., None] / x_TD.shape[-1]
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D


def layer_norm(
    x_TD: Float[Numbers, "*T D"], scale_D: Float[Numbers, " D"], bias_D: Float[Numbers, " D"], eps: float
) -> Float[Numbers, "*T D"]:
    """Layer norm (arXiv 1607.06450), in float32."""
    x32 = x_TD.astype(jnp.float32)
    x32 = x32 - ordered_sum(x32)[..., None] / x_TD.shape[-1]
    variance = ordered_sum(x32 * x32)[..., None] / x_TD.shape[-1]
    return (x32 * lax.rsqrt(variance + eps)).astype(x_TD.dtype) * scale_D + bias_D


def norm(x_TD: Numbers, scale_D: Numbers, bias_D: Numbers | None, eps: float) -> Numbers:
    """Layer norm if there is a bias, root-mean-square norm if not."""
    return rms_norm(x_TD, scale_D, eps) if bias_D is None else layer_norm(x_TD, scale_D, bias_D, eps)


def head_dot(x_TNH: Float[Numbers, "T N H"], w_NFH: Weight) -> Float[Numbers, "T N F"]:
    """Each head by its own weight `[out, in]`: `[T, N, F]`. One head after the other, for the sake of `row_dot`."""

    def one(_: None, head: tuple[Numbers, Numbers]) -> tuple[None, Numbers]:
        n, x_TH = head
        return None, row_dot(x_TH, w_NFH.at(n) if isinstance(w_NFH, Stacked) else at(w_NFH, (n,)))

    heads = jnp.arange(x_TNH.shape[1])
    return lax.scan(one, None, (heads, x_TNH.swapaxes(0, 1)))[1].swapaxes(0, 1)


def swiglu(x_TD: Numbers, gate_up_2FD: Weight, down_DF: Weight, dot: Dot = row_dot) -> Numbers:
    """SwiGLU feed-forward (arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""
    hidden = dot(x_TD, gate_up_2FD)
    gate, up = jnp.split(hidden, 2, axis=-1)
    return dot(jax.nn.silu(gate) * up, down_DF)


def biased_swiglu(
    x_TD: Numbers,
    gate_up_2FD: Weight,
    down_DF: Weight,
    gate_up_bias_2F: Numbers,
    down_bias_D: Numbers,
    limit: float | None,
    alpha: float,
    dot: Dot = row_dot,
) -> Numbers:
    """SwiGLU with biases. With a `limit` it is gpt-oss's (arXiv 2508.10925): gate and up are bounded by it, the gate is
    `gate * sigmoid(alpha * gate)`, and 1 is added to up."""
    hidden = dot(x_TD, gate_up_2FD) + gate_up_bias_2F
    gate, up = jnp.split(hidden, 2, axis=-1)
    if limit is None:
        return dot(jax.nn.silu(gate) * up, down_DF) + down_bias_D
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return dot(gate * jax.nn.sigmoid(alpha * gate) * (up + 1), down_DF) + down_bias_D
