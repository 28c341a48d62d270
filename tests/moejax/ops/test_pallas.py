"""Laws of the kernels for GPUs and TPUs, interpreted on a CPU: they compute what their references do, and no row
depends on who else asks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.params import FeedForward
from moejax.config.weight_formats import StackSlice
from moejax.model.attention import paged_attention, paged_attention_reference
from moejax.model.experts import apply_experts, apply_experts_reference
from moejax.model.layers import row_dot, row_dot_reference
from moejax.ops import cpu
from moejax.ops.pallas import gpu, tpu
from tests.support.kernel_cases import attention_case, held, last_query_alone, normal
from tests.support.models import MIXTRAL

SLOTS = 5
FORMS = [(gpu, "float32"), (gpu, "bfloat16"), (gpu, "int8"), (tpu, "float32"), (tpu, "bfloat16")]
BOTH = pytest.mark.parametrize("kernel", [gpu, tpu], ids=["gpu", "tpu"])


def weights(form: str, width: int, hidden: int) -> FeedForward:
    """Layer 1 of two, of five slots each."""
    sizes = (2 * width, hidden), (hidden, width)
    gate_up, down = (held(normal(2, SLOTS, *each, seed=3) / 8, form) for each in sizes)
    return FeedForward(gate_up=StackSlice(gate_up, (1,)), down=StackSlice(down, (1,)))


def wanting(rows: int) -> np.ndarray:
    return np.random.default_rng(4).integers(-1, SLOTS, (rows, 2)).astype(np.int32)


def near(ours, theirs, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(np.abs(theirs).max()))


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize(("kernel", "form"), FORMS)
def test_experts_answer_as_their_reference_whoever_else_asks(kernel, form, rows) -> None:
    experts = weights(form, 128, 256)
    assert kernel.supports_experts(experts.gate_up, experts.down)
    x, wanted = normal(rows, 256), wanting(rows)
    ask = functools.partial(kernel.experts, gate_up=experts.gate_up, down=experts.down, slots=SLOTS, interpret=True)
    whole = np.asarray(ask(jnp.asarray(x), jnp.asarray(wanted)))
    rounding = 1e-6 if form == "float32" else 1e-2  # of bfloat16 rows
    near(whole, apply_experts_reference(jnp.asarray(x), jnp.asarray(wanted), experts, SLOTS, MIXTRAL.moe), rounding)
    assert not whole[wanted < 0].any()
    last = slice(rows - 1, rows)
    np.testing.assert_array_equal(ask(jnp.asarray(x[last]), jnp.asarray(wanted[last]))[0], whole[-1])


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 40, 64, 65])
def test_rows_are_multiplied_as_by_the_reference_wherever_the_matrix_lies(form, rows) -> None:
    stack, x = held(normal(2, 3, 48, 80, seed=3), form), normal(rows, 80)
    assert gpu.supports_row_dot(stack)
    ours = np.asarray(gpu.row_dot(jnp.asarray(x), stack, (1, jnp.int32(2)), interpret=True))
    near(ours, row_dot_reference(jnp.asarray(x), StackSlice(stack, (1, 2))), 1e-2)
    single = held(normal(2, 3, 48, 80, seed=3)[1, 2], form)
    np.testing.assert_array_equal(gpu.row_dot(jnp.asarray(x), single, (), interpret=True), ours)
    if rows < 65:
        np.testing.assert_array_equal(gpu.row_dot(jnp.asarray(x[-1:]), single, (), interpret=True)[0], ours[-1])


@BOTH
def test_experts_nobody_wants_are_not_read(kernel) -> None:
    experts, wanted = weights("float32", 128, 256), wanting(20)
    wanted[wanted == 2] = 3
    x = jnp.asarray(normal(20, 256))

    def ask(spoil) -> jax.Array:
        stacks = (StackSlice(spoil(each.stack), each.index) for each in (experts.gate_up, experts.down))
        return kernel.experts(x, jnp.asarray(wanted), *stacks, SLOTS, interpret=True)

    spoilt = ask(lambda stack: stack.at[1, 2].set(jnp.nan).at[0].set(jnp.nan))
    np.testing.assert_array_equal(spoilt, ask(lambda stack: stack))


@pytest.mark.parametrize(
    ("kernel", "queries", "form"),
    [*((gpu, n, "float32") for n in (1, 3, 32)), (gpu, 1, "bfloat16"), (gpu, 3, "int8"), (tpu, 3, "float32")],
)
def test_attention_is_its_reference(kernel, queries, form) -> None:
    case = attention_case(queries, page=16, size=64, form=form)
    assert gpu.supports_attention(case)
    near(kernel.paged_attention(case, interpret=True), paged_attention_reference(case), 1e-6)


@BOTH
def test_queries_at_no_position_give_zeros_and_change_no_other(kernel) -> None:
    case = attention_case(3, page=16, size=64)
    fewer = case.positions.at[0, :2].set(-1).at[1, 1].set(-1)
    cases = (case, dataclasses.replace(case, positions=fewer))
    whole, some = (kernel.paged_attention(each, interpret=True) for each in cases)
    np.testing.assert_array_equal(some[fewer < 0], 0)
    near(some[fewer >= 0], whole[fewer >= 0], 1e-6)


@BOTH
def test_attention_does_not_know_what_was_cached_nor_who_else_attends(kernel) -> None:
    case = attention_case(3, page=16, size=64)
    whole = np.asarray(kernel.paged_attention(case, interpret=True))
    # The last query of the middle segment once more, alone, with the two before it in the cache.
    alone = kernel.paged_attention(last_query_alone(case), interpret=True)
    near(alone[0, 0], whole[1, 2], 1e-6)


def test_sizes_that_a_kernel_does_not_cover_are_left_to_the_reference() -> None:
    narrow = weights("float32", 8, 24)
    assert not gpu.supports_experts(narrow.gate_up, narrow.down)
    assert not tpu.supports_experts(narrow.gate_up, narrow.down)
    whole = weights("int8", 128, 256)
    assert not tpu.supports_experts(whole.gate_up, whole.down)
    assert not gpu.supports_attention(attention_case(1, page=16, size=24))
    assert not tpu.supports_attention(attention_case(1, page=16, size=48))
    assert not gpu.supports_attention(attention_case(1, page=16, size=64, form="fp8"))
    assert tpu.supports_attention(attention_case(1, page=16, size=64))
    assert not tpu.supports_attention(attention_case(1, page=16, size=64, form="bfloat16"))


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_a_step_lowered_for_a_gpu_has_the_kernels_in_it(monkeypatch: pytest.MonkeyPatch, form) -> None:
    monkeypatch.setattr(cpu, "_library", None)
    experts, product = weights(form, 128, 256), form != "float32"  # by which XLA multiplies itself

    leaves, tree = jax.tree.flatten(attention_case(1, page=16, size=64, form=form))

    def layer(x, wanted, leaves):
        attended = paged_attention(jax.tree.unflatten(tree, leaves))
        projected = row_dot(x, experts.gate_up.at(0))
        return attended, projected, apply_experts(x, wanted, experts, SLOTS, MIXTRAL.moe)

    arguments = (normal(20, 256), wanting(20), leaves)
    lower = jax.jit(layer).trace(*arguments).lower
    assert lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == 3 + product
    assert "triton" not in lower(lowering_platforms=("cpu",)).as_text()
