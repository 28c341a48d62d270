"""The entries that a step wrote are copied one by one, with the same bits, to another cache."""

import dataclasses

import jax
import numpy as np
import pytest

from moejax.config.kv_cache import KVCache, bytes_per_token, cache_shapes, empty_cache
from moejax.config.model_config import ModelConfig
from moejax.config.step_inputs import Bucket, idle_inputs
from moejax.runtime import steps
from moejax.runtime.executables import CompileCounter
from moejax.runtime.kv_transfer import (
    EntryWriter,
    entry_indices,
    read_entries,
    read_state,
    rows_by_entry,
    written_rows,
)
from serving.engine.batch import Batch, prepare_inputs
from serving.engine.batch import StepBucket as Shape
from serving.executor import kv_replica
from tests.support.models import HYBRID, MIXTRAL
from tests.support.stepping import MAX_PAGES, PAGE, work

ENTRIES = 12 * PAGE
SHAPE = Shape(4, 2)
BUCKET = Bucket(decode=SHAPE.decode, tiles=SHAPE.tiles, max_pages=MAX_PAGES)
WORKS = (
    work([11], 70, (3, 9, 0)),
    work([12], 5, (7,)),
    work(list(range(20, 70)), 14, (10, 2)),
)
"""Two decode rows and a chunk of fifty tokens that begins in the middle of a page."""


def packed_step() -> np.ndarray:
    arrays = prepare_inputs(Batch(0, 0, SHAPE, {0: WORKS}), 0, page_size=PAGE, max_pages=MAX_PAGES)
    return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays.values()])


def random_rows(cfg: ModelConfig, count: int) -> KVCache:
    draw, shapes = np.random.default_rng(0), cache_shapes(cfg, count)
    return jax.tree.map(lambda each: (100 * draw.normal(size=each.shape)).astype(each.dtype), shapes)


def new_cache(cfg: ModelConfig) -> KVCache:
    return jax.device_put(empty_cache(cfg, ENTRIES), jax.devices()[0], may_alias=False)


def test_a_step_wrote_its_tokens_at_their_positions_and_no_padding():
    wrote = written_rows(packed_step(), BUCKET)
    assert wrote.tokens.tolist() == [11, 12, *range(20, 70)]
    assert wrote.positions.tolist() == [70, 5, *range(14, 64)]
    of_works = [entry_indices(w.pages, PAGE, w.start, len(w.tokens)) for w in WORKS]
    assert wrote.entries.tolist() == np.concatenate(of_works).tolist()
    assert len(written_rows(idle_inputs(BUCKET), BUCKET).rows) == 0


def test_the_step_of_a_tensor_group_wrote_for_every_member_in_its_part_of_the_cache():
    alone = written_rows(packed_step(), BUCKET)
    both = written_rows(np.concatenate([packed_step(), idle_inputs(BUCKET), packed_step()]), BUCKET, ENTRIES)
    n = len(alone.rows)
    for first, t in ((0, 0), (n, 2)):
        part = slice(first, first + n)
        np.testing.assert_array_equal(both.rows[part], alone.rows + t * BUCKET.rows)
        np.testing.assert_array_equal(both.entries[part], alone.entries + t * ENTRIES)
        np.testing.assert_array_equal(both.tokens[part], alone.tokens)
    assert len(both.rows) == 2 * n


@pytest.mark.parametrize(
    ("sizes", "form"),
    [
        (((2, 0),), "float32"),
        (((8, 2), (2, 0)), "int8"),
        (((8, 0), (8, 1)), "bfloat16"),
        (((2, 0), (2, 1)), "fp8"),
    ],
)
def test_rows_copied_by_entry_are_the_bits_that_were_committed(sizes, form):
    cfg = dataclasses.replace(MIXTRAL, cache_format=form)
    sizes = [Bucket(decode=decode, tiles=tiles, max_pages=1) for decode, tiles in sizes]
    packed, new = packed_step(), random_rows(cfg, BUCKET.rows)
    here = steps.run_commit(new_cache(cfg), new, packed, bucket=BUCKET)
    wrote = written_rows(packed, BUCKET)
    rows = rows_by_entry(new, wrote.rows)
    assert rows[0].nbytes == bytes_per_token(cfg)
    np.testing.assert_array_equal(rows.swapaxes(0, 1), read_entries(here, wrote.entries))

    def commit(index):
        return lambda cache, new, packed: steps.run_commit(cache, new, packed, bucket=sizes[index])

    writer, there, device = EntryWriter(cfg, sizes), new_cache(cfg), jax.devices()[0]
    there = writer.warm(there, len(wrote.entries), commit, device)
    first, rest = wrote.entries[:5], wrote.entries[5:]
    for entries, block in ((rest, rows[5:]), (first, rows[:5])):
        there = writer.write(there, entries, block.swapaxes(0, 1), commit, device)
    for one, other in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_state_comes_to_another_place_with_the_same_bits_and_nothing_else_changes():
    bucket, draw = Bucket(decode=2, tiles=1, max_pages=1, states=True), np.random.default_rng(0)
    shapes = cache_shapes(HYBRID, 2 * PAGE, 6)
    before = jax.tree.map(lambda each: draw.normal(size=each.shape).astype(np.float32), shapes)
    state, device = read_state(before, 4), jax.devices()[0]
    assert state.size == HYBRID.state_elements

    def commit(_):
        return lambda cache, new, packed: steps.run_commit(cache, new, packed, bucket=bucket)

    writer, cache = EntryWriter(HYBRID, [bucket]), jax.device_put(before, device, may_alias=False)
    after = jax.tree.map(np.asarray, writer.write_state(cache, 1, state, commit, device))
    np.testing.assert_array_equal(read_state(after, 1), state)
    for one, other in zip(jax.tree.leaves(before.states), jax.tree.leaves(after.states), strict=True):
        others = [place for place in range(6) if place != 1]
        np.testing.assert_array_equal(one[:, others], other[:, others])
    np.testing.assert_array_equal(before.k, after.k)
    np.testing.assert_array_equal(before.v, after.v)


def test_reading_a_state_of_a_rank_compiles_nothing():
    shapes = cache_shapes(HYBRID, 2 * PAGE, 6)
    cache = jax.device_put(jax.tree.map(lambda each: np.ones(each.shape, np.float32), shapes), jax.devices()[0])
    counter = CompileCounter()
    assert read_state(cache, 3).sum() == HYBRID.state_elements
    assert counter.count == 0


def test_ranks_and_copies_count_entries_alike():
    for first, count in ((0, 5), (3, 40), (31, 2)):
        assert entry_indices((4, 2), PAGE, first, count).tolist() == (
            kv_replica.entry_indices((4, 2), PAGE, first, count).tolist()
        )
