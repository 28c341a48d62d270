"""Laws of layers with a state: kernel and reference agree, and no bit depends on how rows are cut into steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config.delta_inputs import CHAINED, EMPTY, PADDING, DeltaInputs
from moejax.model.delta_net import delta_rule_reference
from moejax.ops import cpu
from planner.plan.step_layout import TILE
from serving.engine.batch import StepBucket
from tests.support.models import HYBRID, lively_params
from tests.support.stepping import Stepper, work

KEYS, VALUES, D_KEY, D_VALUE, STATES = 2, 4, 12, 20, 5
PAGES = (5, 2, 9, 11)
KINDS = pytest.mark.parametrize(
    ("factors", "corrects"), [(1, True), (D_KEY, True), (1, False)], ids=["delta net", "by key", "Mamba-2"]
)


def random_inputs(
    decode: int, source: list[int], rows: int = TILE, seed: int = 0, factors: int = 1, corrects: bool = True
) -> DeltaInputs:
    """Inputs of segments that begin so; the last tile has so many rows that are no padding. Of a head's state all keys
    decay by one factor, or each by its own."""
    draw, count = np.random.default_rng(seed), decode + TILE * (len(source) - decode)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)  # noqa: E731
    rate = draw.uniform(0, 1, (count, VALUES)).astype(np.float32)
    if len(source) > decode and rows < TILE:
        rate[rows - TILE :] = PADDING
    return DeltaInputs(
        q=normal(count, KEYS, D_KEY),
        k=normal(count, KEYS, D_KEY) / np.float32(3),
        v=normal(count, VALUES, D_VALUE),
        decay=draw.uniform(0.5, 1, (count, VALUES, factors)).astype(np.float32),
        rate=rate,
        states=normal(3, STATES, VALUES, D_KEY, D_VALUE),
        layer=jnp.int32(1),
        source=np.array(source, np.int32),
        decode=decode,
        corrects=corrects,
    )


@pytest.mark.parametrize(
    ("decode", "source", "rows"),
    [
        (3, [4, EMPTY, 0], TILE),
        (0, [EMPTY, CHAINED, 2], 7),
        (2, [1, 1, 3, CHAINED, EMPTY, CHAINED], 1),
    ],
)
@KINDS
def test_the_kernel_gives_the_outputs_and_states_of_the_reference(
    decode: int, source: list[int], rows: int, factors: int, corrects: bool
) -> None:
    inputs = random_inputs(decode, source, rows, factors=factors, corrects=corrects)
    for ours, theirs in zip(jax.jit(cpu.delta_rule)(inputs), jax.jit(delta_rule_reference)(inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [cpu.delta_rule, delta_rule_reference], ids=["kernel", "reference"])
@KINDS
def test_rows_of_a_tile_have_the_bits_of_rows_of_their_own(rule, factors: int, corrects: bool) -> None:
    """One tile, and the same rows one after the other beside a neighbour, each from the state after the one before."""
    kind = {"factors": factors, "corrects": corrects}
    tile = random_inputs(0, [2], **kind)
    outputs, states = jax.jit(rule)(tile)
    crowd, held, run = random_inputs(2, [0, 3], seed=1, **kind), np.array(tile.states), jax.jit(rule)
    for row in range(TILE):
        beside = {
            name: np.concatenate([getattr(tile, name)[row : row + 1], getattr(crowd, name)[1:2]])
            for name in ("q", "k", "v", "decay", "rate")
        }
        one = dataclasses.replace(tile, **beside, states=held, source=np.array([2, 3], np.int32), decode=2)
        output, state = run(one)
        np.testing.assert_array_equal(output[0], outputs[row])
        held[1, 2] = state[0]
    np.testing.assert_array_equal(state[0], states[0])


def test_padding_leaves_the_state_as_it_is() -> None:
    inputs = random_inputs(0, [3], rows=0)
    for rule in (cpu.delta_rule, delta_rule_reference):
        outputs, states = jax.jit(rule)(inputs)
        assert not np.asarray(outputs).any()
        np.testing.assert_array_equal(states[0], inputs.states[1, 3])


@functools.cache
def stepper() -> Stepper:
    return Stepper(HYBRID, lively_params(HYBRID, seed=3), 2, 2, np.arange(4))


def test_a_step_made_again_after_the_next_one_was_committed_reads_what_it_read() -> None:
    model, tokens = stepper(), np.random.default_rng(5).integers(0, 96, 44).tolist()
    tile, row = StepBucket(2, 2), StepBucket(2, 0)
    model.run(tile, {1: (work(tokens[:40], 0, PAGES),)})
    first = [model.run(row, {1: (work([tokens[at]], at, PAGES),)}) for at in (40, 41)]
    again = [model.run(row, {1: (work([tokens[at]], at, PAGES),)}) for at in (40, 41)]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.hidden, other.hidden)
        jax.tree.map(np.testing.assert_array_equal, one.new_kv, other.new_kv)
