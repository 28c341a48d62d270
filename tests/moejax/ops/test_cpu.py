"""Laws of the CPU kernels: they compute what their references do, and no bit of a row depends on its batch."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.config import int4
from moejax.config.attention_inputs import AttentionInputs
from moejax.config.kv_cache import Scaled, numbers_of
from moejax.config.params import FeedForward
from moejax.config.weight_formats import Int8, StackSlice, dequantize, from_published
from moejax.model.attention import paged_attention_reference
from moejax.model.experts import apply_experts_reference
from moejax.model.layers import row_dot_reference
from moejax.model.sampling import draw_tokens_reference
from moejax.ops import cpu
from planner.inputs.cache_formats import CACHE_FORMATS
from tests.support.kernel_cases import (
    EIGHT_BIT,
    PACKED,
    attention_case,
    held,
    last_query_alone,
    normal,
    planes,
    published_numbers,
)
from tests.support.models import MIXTRAL

pytestmark = pytest.mark.skipif(not cpu.active(), reason="no C++ compiler on this machine")
FORMS = ["float32", "bfloat16", *EIGHT_BIT, "int8", "int4", *PACKED]
ROUNDING = dict.fromkeys(FORMS, 2e-5) | dict.fromkeys(["int8", "int4", *PACKED], 1e-4)
"""Relative to the largest number: float32 sums of up to 1536 products in two orders; with int8 and four bits, rows of
16 bits, two in turn for experts."""


def close(a, b, form: str = "float32") -> None:
    np.testing.assert_allclose(a, b, rtol=0, atol=ROUNDING[form] * max(1.0, float(np.abs(b).max())))


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="flags of g++ for x86")
@pytest.mark.parametrize("processor", ["x86-64", "ivybridge", "haswell"])
def test_narrow_weights_compile_for_processors_of_every_age(processor, tmp_path) -> None:
    flags = [flag for flag in cpu.FLAGS if not flag.startswith("-march")]
    header = next(source for source in cpu.SOURCES if source.name == "eight_bit.h")  # includes int4.h
    (tmp_path / "one.cc").write_text(f'#include "{header}"\n')
    command = ["g++", *flags, f"-march={processor}", "-fsyntax-only", str(tmp_path / "one.cc")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5, 4), (8, 576), (576, 1536), (1027, 37)], ids=str)
def test_a_row_dot_is_its_reference_and_rows_do_not_know_of_each_other(shape, form) -> None:
    stack = held(normal(2, 3, *shape, seed=1), form)
    x = normal(200, shape[1])
    dot = jax.jit(lambda rows: cpu.row_dot(rows, stack, (1, jnp.int32(2))))
    whole = np.asarray(dot(x))
    close(whole[:40], row_dot_reference(x[:40], StackSlice(stack, (1, 2))), form)
    for rows in (1, 2, 3, 4, 5, 7, 40, 131):
        np.testing.assert_array_equal(dot(x[:rows]), whole[:rows])
        np.testing.assert_array_equal(dot(x[-rows:]), whole[-rows:])


def test_rows_of_zeros_give_zeros_and_change_no_other() -> None:
    stack, x = normal(1, 24, 16, seed=1), normal(7, 16)
    padded = x.copy()
    padded[[1, 5]] = 0
    dot = jax.jit(lambda rows: cpu.row_dot(rows, stack, (0,)))
    np.testing.assert_array_equal(dot(padded)[np.array([1, 5])], 0)
    np.testing.assert_array_equal(np.delete(dot(padded), [1, 5], axis=0), np.delete(dot(x), [1, 5], axis=0))


def test_int8_sums_do_not_overflow_at_the_largest_numbers_there_are() -> None:
    size = 20_011
    stack = Int8(jnp.full((1, 5, size), 127, jnp.int8), jnp.ones((1, 5)))
    rows = np.full((7, size), 32767, np.float32) * np.array([1, -1] * 3 + [1e-3], np.float32)[:, None]
    np.testing.assert_allclose(
        cpu.row_dot(rows, stack, (0,)), np.repeat(127 * rows.sum(1, keepdims=True), 5, axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("columns", [32, 48, 576])
@pytest.mark.parametrize("form", PACKED)
def test_dots_of_integers_with_packed_weights_are_exact(form, columns) -> None:
    published = planes((24, columns), PACKED[form])
    one = {"mxfp4": 127, "awq": 512}.get(form, 1)
    factor = None if published.factor is None else np.ones_like(published.factor)
    published = published._replace(scale=np.full_like(published.scale, one), factor=factor)
    packed = int4.from_published(published, PACKED[form])
    rows = np.random.default_rng(columns).integers(-99, 100, (9, columns)).astype(np.float32)
    rows[:, 5] = 32767  # integers of 16 bits as they are
    answer = cpu.row_dot(rows, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], packed), (0,))
    np.testing.assert_array_equal(answer, rows @ published_numbers(published).T)


@pytest.mark.parametrize("form", EIGHT_BIT)
def test_a_widened_weight_is_the_published_number_in_every_bit(form) -> None:
    """By rows of one number each, so that a dot is a weight."""
    published = planes((37, 83), EIGHT_BIT[form])
    if EIGHT_BIT[form].numbers == "fp8":
        published.codes.reshape(-1)[:256] = np.arange(256)  # of all numbers there are
    weight = from_published(published, EIGHT_BIT[form])
    answer = cpu.row_dot(np.eye(83, dtype=np.float32), jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], weight), (0,))
    numbers = published_numbers(published, EIGHT_BIT[form]).T
    for row, expected in zip(np.asarray(answer).T, numbers.T, strict=True):
        finite = np.isfinite(expected).all()  # what is no number spoils the sums of its row
        np.testing.assert_array_equal(row, expected if finite else np.nan)


@pytest.mark.parametrize("columns", [32, 37, 576])
def test_int4_dots_of_integers_are_exact(columns) -> None:
    draw = np.random.default_rng(columns)
    steps, scale = draw.integers(-8, 8, (24, columns)), draw.choice([0.5, 1.0, 2.0], (24, -(-columns // 32)))
    steps[:, ::32] = -8
    weights = steps * np.repeat(scale, 32, axis=1)[:, :columns]
    rows = draw.integers(-99, 100, (9, columns))
    rows[:, 5] = 32767  # integers of 16 bits as they are
    stack = jax.tree.map(jnp.asarray, int4.quantize(weights.astype(np.float32)[None]))
    np.testing.assert_array_equal(dequantize(stack)[0], weights)
    np.testing.assert_array_equal(cpu.row_dot(rows.astype(np.float32), stack, (0,)), rows @ weights.T)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_a_row_that_is_no_number_stays_none_and_spoils_no_other(damage, form) -> None:
    stack, x = held(normal(1, 24, 70, seed=1), form), normal(9, 70)
    spoilt = x.copy()
    spoilt[4, 37] = damage
    dot = jax.jit(lambda rows: cpu.row_dot(rows, stack, (0,)))
    answer = np.asarray(dot(spoilt))
    assert not np.isfinite(answer[4]).any()
    np.testing.assert_array_equal(np.delete(answer, 4, axis=0), np.delete(dot(x), 4, axis=0))


def test_a_row_dot_has_the_gradient_of_its_reference() -> None:
    stack, x = normal(3, 24, 16, seed=1), normal(6, 16)
    ours = jax.grad(lambda x, w: jnp.sin(cpu.row_dot(x, w, (1,))).sum(), (0, 1))(x, stack)
    theirs = jax.grad(lambda x, w: jnp.sin(row_dot_reference(x, w[1])).sum(), (0, 1))(x, stack)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "activation"), [(4, "swiglu"), (128, "swiglu"), (128, "geglu"), (128, "relu2")])
def test_experts_answer_as_their_reference_whoever_else_asks(width, activation, form) -> None:
    above, moe = width if activation == "relu2" else 2 * width, dataclasses.replace(MIXTRAL.moe, activation=activation)
    gate_up, down = (held(normal(*shape, seed=3) / 4, form) for shape in ((2, 5, above, 48), (2, 5, 48, width)))
    experts = FeedForward(gate_up=StackSlice(gate_up, (1,)), down=StackSlice(down, (1,)))
    rows, wanted = normal(70, 48), np.random.default_rng(4).integers(-1, 5, (70, 2)).astype(np.int32)
    ask = jax.jit(lambda r, w: cpu.experts(r, w, gate_up, down, jnp.int32(1), activation))
    whole = np.asarray(ask(rows, wanted))
    close(whole, apply_experts_reference(jnp.asarray(rows), jnp.asarray(wanted), experts, 5, moe), form)
    assert not whole[wanted < 0].any()
    for i in (0, 33, 69):
        np.testing.assert_array_equal(ask(rows[i : i + 1], wanted[i : i + 1])[0], whole[i])


def attention_by_hand(case: AttentionInputs) -> np.ndarray:
    """Softmax attention in float64, one query and one head at a time, over numbers that NumPy reads from the cache."""
    (Z, Q, N, H), K = case.q.shape, case.kv_heads
    out = np.zeros((Z, Q, N, H))
    for z, q, n in np.ndindex(Z, Q, N):
        seen = np.arange(int(case.positions[z, q]) + 1)
        entry = np.asarray(case.page_table)[z, seen // case.page_size] * case.page_size + seen % case.page_size
        new = seen >= int(case.cached[z])
        row = np.where(new, int(case.new_base[z]) + seen - int(case.cached[z]), 0)
        k, v = (
            np.where(
                new[:, None], widened(here, K)[row], widened(jax.tree.map(lambda a: a[case.layer], held), K)[entry]
            ).reshape(len(seen), K, H)[:, n // (N // K)]
            for here, held in ((case.new.k, case.cache.k), (case.new.v, case.cache.v))
        )
        if len(seen):
            scores = k @ np.asarray(case.q[z, q, n], np.float64) * case.scale
            weights = np.exp(scores - scores.max())
            out[z, q, n] = weights @ v / weights.sum()
    return out


def widened(rows: Any, heads: int) -> np.ndarray:
    """Rows of a cache `[..., width]` in float64, as NumPy reads their bits."""
    numbers = np.asarray(numbers_of(rows))
    floats = {"uint16": ml_dtypes.bfloat16, "uint8": ml_dtypes.float8_e4m3fn}.get(numbers.dtype.name, numbers.dtype)
    numbers = numbers.view(floats)
    if not isinstance(rows, Scaled):
        return numbers.astype(np.float64)
    return numbers.astype(np.float64) * np.repeat(np.asarray(rows.scale), numbers.shape[-1] // heads, axis=-1)


@pytest.mark.parametrize("form", CACHE_FORMATS)
@pytest.mark.parametrize(("queries", "size"), [(1, 16), (3, 20)])
def test_attention_over_a_cache_of_any_format_is_its_reference(queries, size, form) -> None:
    case = attention_case(queries, size=size, form=form)
    ours = cpu.paged_attention(case)
    close(ours, paged_attention_reference(case))
    close(ours, attention_by_hand(case))


def test_every_number_of_eight_bits_is_read_as_numpy_reads_it() -> None:
    case = attention_case(1, heads=2, kv_heads=2, size=20, form="fp8")
    bits = np.arange(256, dtype=np.uint8)
    finite = bits[(bits & 127) < 127]
    held = np.resize(finite, case.cache.v.numbers.shape)
    one = dataclasses.replace(case.cache.v, numbers=jnp.asarray(held), scale=jnp.ones_like(case.cache.v.scale))
    keys = dataclasses.replace(case.cache.k, numbers=jnp.zeros_like(case.cache.k.numbers))
    case = dataclasses.replace(case, cache=case.cache.replace(k=keys, v=one))
    close(cpu.paged_attention(case), attention_by_hand(case))


def test_queries_at_no_position_give_zeros_and_change_no_other() -> None:
    case = attention_case(3)
    fewer = case.positions.at[0, :2].set(-1).at[1, 1].set(-1)
    attend = jax.jit(cpu.paged_attention)
    whole, some = np.asarray(attend(case)), np.asarray(attend(dataclasses.replace(case, positions=fewer)))
    np.testing.assert_array_equal(some[fewer < 0], 0)
    np.testing.assert_array_equal(some[fewer >= 0], whole[fewer >= 0])


@pytest.mark.parametrize("form", CACHE_FORMATS)
def test_attention_does_not_know_what_was_cached_nor_who_else_attends(form) -> None:
    case = attention_case(3, form=form)
    whole = np.asarray(cpu.paged_attention(case))
    # The last query of the middle segment once more, alone, with the two before it in the cache.
    alone = cpu.paged_attention(last_query_alone(case))
    np.testing.assert_array_equal(alone[0, 0], whole[1, 2])


@pytest.mark.parametrize("vocabulary", [5, 2048 + 77])
def test_tokens_are_drawn_as_by_the_reference_and_rows_do_not_know_of_each_other(vocabulary) -> None:
    logits = normal(300, vocabulary) * 2
    heat = np.random.default_rng(1).choice([0.0, 0.3, 1.0, 5.0], 300).astype(np.float32)
    keys = jax.vmap(jax.random.key)(np.arange(300, dtype=np.uint32) * 12_345_678)
    ours = np.asarray(cpu.draw_tokens(logits, heat, jax.random.key_data(keys)))
    np.testing.assert_array_equal(ours, np.where(heat > 0, draw_tokens_reference(logits, heat, keys), 0))
    assert len(set(ours.tolist())) > min(vocabulary - 1, 100)
    np.testing.assert_array_equal(cpu.draw_tokens(logits[7:9], heat[7:9], jax.random.key_data(keys[7:9])), ours[7:9])


def test_of_tokens_that_are_level_the_first_is_drawn() -> None:
    logits = np.zeros((1, 37), np.float32)
    logits[:, [3, 8, 32]] = 1e12  # which no noise can change
    assert cpu.draw_tokens(logits, np.ones(1, np.float32), np.array([[1, 2]], np.uint32)).tolist() == [3]


def test_what_is_filtered_out_is_never_drawn() -> None:
    logits = np.full((64, 37), -np.inf, np.float32)
    logits[:, [3, 36]] = 0
    keys = jax.random.key_data(jax.vmap(jax.random.key)(np.arange(64)))
    assert set(np.asarray(cpu.draw_tokens(logits, np.ones(64, np.float32), keys)).tolist()) == {3, 36}


def test_an_index_outside_of_the_stack_is_an_error_not_a_read() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="index outside of the stack"):
        jax.block_until_ready(cpu.row_dot(normal(2, 8), normal(3, 4, 8), (3,)))


def test_without_a_compiler_the_error_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(cpu.KernelError, match=r"no C\+\+ compiler"):
        cpu.build(tmp_path)


def test_a_library_that_others_could_have_put_there_is_not_loaded(tmp_path) -> None:
    tmp_path.joinpath("own").mkdir()
    tmp_path.joinpath("own").chmod(0o770)
    with pytest.raises(cpu.KernelError, match=r"others can write there \(mode 770\)"):
        cpu.build(tmp_path / "own")


def test_a_library_is_built_once(tmp_path, monkeypatch) -> None:
    source = tmp_path / "small.cc"
    source.write_text("int nothing() { return 0; }")
    monkeypatch.setattr(cpu, "SOURCES", (source,))
    built = cpu.build(tmp_path)
    run = subprocess.run

    def no_compile(command, **kwargs):
        assert "--version" in command
        return run(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", no_compile)
    assert cpu.build(tmp_path) == built


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_threads_that_help_keep_off_the_core_of_the_one_that_shares_work_out() -> None:
    program = """
import os, threading
from pathlib import Path
import jax.numpy as jnp
from moejax.ops import cpu
from planner.inputs.cache_formats import CACHE_FORMATS
cpu.load()
cores = os.sched_getaffinity(0)
for _ in range(20):
    cpu.row_dot(jnp.ones((64, 512)), jnp.ones((1024, 512)), ()).block_until_ready()
def allowed(task):
    return os.sched_getaffinity(int(task.name))
sets = [allowed(task) for task in Path("/proc/self/task").iterdir()]
helping = [each for each in sets if each != cores]
assert helping, "no thread has helped"
assert all(len(each) == len(cores) - 1 and each < cores for each in helping), helping
assert os.sched_getaffinity(0) == cores
"""
    told = {"NPROC": "2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | told)
    assert done.returncode == 0, done.stderr
