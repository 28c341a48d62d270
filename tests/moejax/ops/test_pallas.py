"""Laws of the kernels for GPUs and TPUs, interpreted on a CPU: they compute what their references do, and no row
depends on who else asks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import kernels
from moejax.attention import paged_attention, paged_attention_reference
from moejax.cache import Cache
from moejax.experts import apply_experts, apply_experts_reference
from moejax.layers import Stacked, row_dot, row_dot_reference
from moejax.pallas import gpu, tpu
from moejax.params import FeedForward
from tests.moejax.models import MIXTRAL
from tests.moejax.test_kernels import attention_case, held, normal

SLOTS = 5
FORMS = [(gpu, "float32"), (gpu, "bfloat16"), (gpu, "int8"), (tpu, "float32"), (tpu, "bfloat16")]
BOTH = pytest.mark.parametrize("kernel", [gpu, tpu], ids=["gpu", "tpu"])


def weights(form: str, width: int, hidden: int) -> FeedForward:
    """Layer 1 of two, of five slots each."""
    sizes = (2 * width, hidden), (hidden, width)
    gate_up, down = (held(normal(2, SLOTS, *each, seed=3) / 8, form) for each in sizes)
    return FeedForward(gate_up=Stacked(gate_up, (1,)), down=Stacked(down, (1,)))


def wanting(rows: int) -> np.ndarray:
    return np.random.default_rng(4).integers(-1, SLOTS, (rows, 2)).astype(np.int32)


def near(ours, theirs, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(np.abs(theirs).max()))


@pytest.mark.parametrize("rows", [1, 70, 200])
@pytest.mark.parametrize(("kernel", "form"), FORMS)
def test_experts_answer_as_their_reference_whoever_else_asks(kernel, form, rows) -> None:
    experts = weights(form, 128, 256)
    assert kernel.takes_experts(experts.gate_up, experts.down)
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
    assert gpu.takes_rows(stack)
    ours = np.asarray(gpu.row_dot(jnp.asarray(x), stack, (1, jnp.int32(2)), interpret=True))
    near(ours, row_dot_reference(jnp.asarray(x), Stacked(stack, (1, 2))), 1e-2)
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
        stacks = (Stacked(spoil(each.stack), each.index) for each in (experts.gate_up, experts.down))
        return kernel.experts(x, jnp.asarray(wanted), *stacks, SLOTS, interpret=True)

    spoilt = ask(lambda stack: stack.at[1, 2].set(jnp.nan).at[0].set(jnp.nan))
    np.testing.assert_array_equal(spoilt, ask(lambda stack: stack))


@BOTH
@pytest.mark.parametrize("queries", [1, 3, 32])
def test_attention_is_its_reference(kernel, queries) -> None:
    case = attention_case(queries, page=16, size=64)
    near(kernel.paged_attention(*case, scale=0.3, interpret=True), paged_attention_reference(*case, scale=0.3), 1e-6)


@BOTH
def test_queries_at_no_position_give_zeros_and_change_no_other(kernel) -> None:
    *others, positions, page = attention_case(3, page=16, size=64)
    fewer = positions.at[0, :2].set(-1).at[1, 1].set(-1)
    whole, some = (kernel.paged_attention(*others, at, page, scale=0.3, interpret=True) for at in (positions, fewer))
    np.testing.assert_array_equal(some[fewer < 0], 0)
    near(some[fewer >= 0], whole[fewer >= 0], 1e-6)


@BOTH
def test_attention_does_not_know_what_was_cached_nor_who_else_attends(kernel) -> None:
    q, k, v, cache, layer, table, cached, base, positions, page = attention_case(3, page=16, size=64)
    attend = functools.partial(kernel.paged_attention, scale=0.25, interpret=True)
    whole = np.asarray(attend(q, k, v, cache, layer, table, cached, base, positions, page))
    # The last query of the middle segment once more, alone, with the two before it in the cache.
    entries = np.array([table[1, p // page] * page + p % page for p in (29, 30)])
    grown = Cache(*(c.at[1, entries].set(new[3:5].reshape(2, -1)) for c, new in ((cache.k, k), (cache.v, v))))
    facts = (jnp.array([31]), jnp.array([0]), jnp.array([[31]]))
    alone = attend(q[1:2, 2:], k[5:6], v[5:6], grown, layer, table[1:2], *facts, page)
    near(alone[0, 0], whole[1, 2], 1e-6)


def test_sizes_that_a_kernel_does_not_cover_are_left_to_the_reference() -> None:
    narrow = weights("float32", 8, 24)
    assert not gpu.takes_experts(narrow.gate_up, narrow.down)
    assert not tpu.takes_experts(narrow.gate_up, narrow.down)
    whole = weights("int8", 128, 256)
    assert not tpu.takes_experts(whole.gate_up, whole.down)
    assert not gpu.takes_attention(24, 16)
    assert not tpu.takes_attention(Cache(*[jax.ShapeDtypeStruct((2, 64, 96), jnp.float32)] * 2), 16)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_a_step_lowered_for_a_gpu_has_the_kernels_in_it(monkeypatch: pytest.MonkeyPatch, form) -> None:
    monkeypatch.setattr(kernels, "_library", None)
    experts, product = weights(form, 128, 256), form != "float32"  # by which XLA multiplies itself

    def layer(x, wanted, *case):
        attended = paged_attention(*case, 16, scale=0.3)
        projected = row_dot(x, experts.gate_up.at(0))
        return attended, projected, apply_experts(x, wanted, experts, SLOTS, MIXTRAL.moe)

    arguments = (normal(20, 256), wanting(20), *attention_case(1, page=16, size=64)[:-1])
    lower = jax.jit(layer).trace(*arguments).lower
    assert lower(lowering_platforms=("cuda",)).as_text().count("__gpu$xla.gpu.triton") == 3 + product
    assert "triton" not in lower(lowering_platforms=("cpu",)).as_text()
