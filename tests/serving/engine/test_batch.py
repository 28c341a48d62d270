import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.plan.step_layout import DROPPED, TILE
from serving.engine.batch import (
    PLACEHOLDER_TOKEN,
    Batch,
    ScheduledRequest,
    StepBucket,
    collect_results,
    layout,
    prepare_inputs,
    token_sources,
)
from serving.protocol.sampling import ResolvedSampling

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PAGE, MAX_PAGES = 8, 20


def work(name: str, start: int, tokens, pages, samples=True, **fields) -> ScheduledRequest:
    targets = fields.pop("targets", ())
    values = {"max_tokens": 9, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3} | fields
    return ScheduledRequest(name, start, tuple(tokens), tuple(pages), samples, ResolvedSampling(**values), targets)


def batch_of(bucket, *items: ScheduledRequest) -> Batch:
    return Batch(step=1, epoch=0, bucket=StepBucket(*bucket), scheduled={0: items})


def arrays_of(bucket, *items: ScheduledRequest) -> dict[str, np.ndarray]:
    return prepare_inputs(batch_of(bucket, *items), 0, page_size=PAGE, max_pages=MAX_PAGES)


def test_a_bucket_has_a_row_for_each_decode_segment_and_32_for_each_tile():
    assert (StepBucket(8, 2).rows, StepBucket(8, 2).segments) == (72, 10)


def test_what_work_does_not_fill_of_the_bucket_on_every_rank_is_padding():
    both = {0: (work("a", 9, [50], [4, 7]), work("b", 0, range(40), range(5))), 1: (work("c", 3, [9], [9]),), 2: ()}
    batch = Batch(step=1, epoch=0, bucket=StepBucket(4, 2), scheduled=both)
    assert batch.rows == 3 * (4 + 2 * 32)
    assert batch.rows_filled == 1 + 40 + 1


def test_a_decode_row_is_a_segment_of_its_own():
    a = arrays_of((2, 0), work("a", 9, [50], [4, 7]))
    assert a["tokens"].tolist() == [50, 0]
    assert a["positions"].tolist() == [9, -1]
    assert a["page_table"][:, :3].tolist() == [[4, 7, 0], [0, 0, 0]]
    assert a["cached"].tolist() == [9, 0]
    assert a["new_base"].tolist() == [0, 1]
    assert a["write"].tolist() == [7 * PAGE + 1, DROPPED]
    assert a["sample_row"].tolist() == [0, 1]
    assert a["sample_position"].tolist() == [10, 0]
    assert (a["top_k"].tolist(), a["seed"].tolist()) == ([5, 0], [3, 0])
    for name, value in (("temperature", [0.7, 0]), ("top_p", [0.9, 1]), ("min_p", [0.1, 0])):
        np.testing.assert_array_equal(a[name], np.array(value, np.float32))


def test_a_row_whose_token_is_unknown_names_the_segment_that_chooses_it():
    before = batch_of((2, 2), work("b", 0, range(40), range(6)), work("a", 9, [50], [7, 8]))
    rows = (
        work("b", 40, [PLACEHOLDER_TOKEN], range(6)),
        work("c", 3, [9], [9]),
        work("a", 10, [PLACEHOLDER_TOKEN], [7, 8]),
    )
    assert token_sources(before, batch_of((4, 0), *rows), 0).tolist() == [3, -1, 0]
    assert token_sources(before, batch_of((4, 0), *rows), 1).tolist() == []


def test_a_chunk_takes_consecutive_tiles_that_share_their_cache_and_first_row():
    pages = range(5, 5 + 14)
    a = arrays_of((1, 4), work("a", 32, range(70), pages))
    assert a["cached"].tolist() == [0, 32, 32, 32, 0]
    assert a["new_base"].tolist() == [0, 1, 1, 1, 1 + 3 * TILE]
    assert (a["page_table"][1:4, :14] == list(pages)).all()
    assert a["positions"][1:71].tolist() == list(range(32, 102))
    assert (a["positions"][71:] == -1).all()
    assert a["sample_row"].tolist() == [0, 1, 1 + TILE, 70, 1 + 3 * TILE]
    assert a["sample_position"].tolist() == [0, 0, 0, 102, 0]


def test_drafts_are_segments_that_see_the_rows_before_them():
    drafted = dataclasses.replace(work("a", 6, [50], [4, 7]), drafts=(51, 52))
    a = arrays_of((5, 0), work("b", 3, [9], [2]), drafted, work("c", 1, [8], [3]))
    assert a["tokens"].tolist() == [9, 50, 51, 52, 8]
    assert a["positions"].tolist() == [3, 6, 7, 8, 1]
    assert a["write"].tolist() == [2 * PAGE + 3, 4 * PAGE + 6, 4 * PAGE + 7, 7 * PAGE, 3 * PAGE + 1]
    assert a["cached"].tolist() == [3, 6, 6, 6, 1]
    assert a["new_base"].tolist() == [0, 1, 1, 1, 4]
    assert a["sample_row"].tolist() == [0, 1, 2, 3, 4]
    assert a["sample_position"].tolist() == [4, 7, 8, 9, 2]
    assert a["read"].tolist() == [1] * 5
    assert a["page_table"][1:4, :2].tolist() == [[4, 7]] * 3
    assert len({tuple(a[name][1:4].tolist()) for name in ("seed",)}) == 1


def test_results_after_drafts_are_those_of_their_segments():
    drafted = dataclasses.replace(work("a", 6, [50], [4, 7]), drafts=(51, 52))
    batch = batch_of((5, 0), work("b", 3, [9], [2]), drafted, work("c", 1, [8], [3]))
    results = collect_results(batch, 0, np.arange(10, 15), -np.arange(5.0))
    assert [results[name].token for name in "bac"] == [10, 11, 14]
    assert [(each.token, each.logprob) for each in results["a"].after_drafts] == [(12, -2.0), (13, -3.0)]
    assert results["b"].after_drafts == ()


def test_a_chunk_that_does_not_sample_is_greedy_at_its_first_row():
    a = arrays_of((0, 1), work("a", 0, range(32), range(4), samples=False))
    assert (a["sample_row"][0], a["temperature"][0], a["top_p"][0], a["seed"][0]) == (0, 0, 1, 0)


def test_a_rank_without_work_gets_padding_only():
    a = arrays_of((2, 1))
    assert (a["write"] == DROPPED).all()
    assert (a["positions"] == -1).all()
    assert a["sample_row"].tolist() == a["new_base"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("seed", "entered"), [(2**32 + 5, 5), (-1, 2**32 - 1), (2**31, 2**31)])
def test_a_seed_of_any_size_enters_modulo_32_bits(seed, entered):
    assert arrays_of((1, 0), work("a", 0, [1], [0], seed=seed))["seed"].tolist() == [entered]


def test_arrays_have_the_types_of_the_program():
    a = arrays_of((1, 1))
    floats = {"temperature", "top_p", "min_p"}
    expected = {name: "float32" if name in floats else "int32" for name in a} | {"seed": "uint32"}
    assert {name: str(array.dtype) for name, array in a.items()} == expected
    assert len(a) == 14


def test_work_that_does_not_fit_in_its_bucket_is_noticed():
    with pytest.raises(AssertionError, match="2 decode rows"):
        arrays_of((1, 1), *(work(name, 0, [1], [0]) for name in "ab"))
    with pytest.raises(AssertionError, match="3 tiles"):
        arrays_of((1, 2), work("a", 0, range(65), range(9)))


@st.composite
def parts(draw) -> tuple[StepBucket, list[ScheduledRequest]]:
    """A bucket and the work of a rank that fits in it, every sequence on pages of its own."""
    decode, tiles = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    free = draw(st.permutations(range(5 * MAX_PAGES)))
    items, left = [], tiles
    for number in range(draw(st.integers(0, decode))):
        items.append((number, draw(st.integers(0, MAX_PAGES * PAGE - 1)), 1))
    for number in range(draw(st.integers(0, tiles))):
        if left:
            count = draw(st.integers(2, left * TILE))
            items.append((9 + number, draw(st.integers(0, MAX_PAGES * PAGE - count)), count))
            left -= -(-count // TILE)
    made = []
    for number, start, count in items:
        need = -(-(start + count) // PAGE)
        pages, free = free[:need], free[need:]
        if len(pages) == need:
            tokens = range(100 * number, 100 * number + count)
            made.append(work(str(number), start, tokens, pages, draw(st.booleans()), seed=number))
    return StepBucket(decode, tiles), made


@UNHURRIED
@given(parts())
def test_arrays_decode_back_to_the_work(part):
    bucket, items = part
    a = arrays_of(bucket, *items)
    row, tile, valid = 0, 0, 0
    for item in items:
        count = len(item.tokens)
        base = bucket.decode + TILE * tile if count > 1 else row
        first = bucket.decode + tile if count > 1 else row
        last = first + max(item.tiles, 1) - 1
        row, tile, valid = row + (count == 1), tile + item.tiles, valid + count
        assert tuple(a["tokens"][base : base + count]) == item.tokens
        positions = range(item.start, item.start + count)
        assert a["positions"][base : base + count].tolist() == list(positions)
        entries = [item.pages[p // PAGE] * PAGE + p % PAGE for p in positions]
        assert a["write"][base : base + count].tolist() == entries
        for segment in range(first, last + 1):
            assert tuple(a["page_table"][segment][: len(item.pages)]) == item.pages
            assert not a["page_table"][segment][len(item.pages) :].any()
            assert (a["cached"][segment], a["new_base"][segment]) == (item.start, base)
        if item.samples:
            assert a["sample_row"][last] == base + count - 1
            assert (a["sample_position"][last], a["seed"][last]) == (item.start + count, item.sampling.seed)
    assert (a["positions"] >= 0).sum() == (a["write"] != DROPPED).sum() == valid
    assert (a["sample_position"] > 0).sum() == sum(item.samples for item in items)


@UNHURRIED
@given(parts(), st.data())
def test_rows_that_are_read_are_those_a_token_is_chosen_or_scored_after(part, data):
    bucket, items = part
    targets = st.integers(-1, 2)
    scored = [
        dataclasses.replace(item, targets=tuple(data.draw(st.lists(targets, min_size=n, max_size=n))))
        for item in items
        for n in [data.draw(st.sampled_from([0, len(item.tokens)]))]
    ]
    expected = np.zeros(bucket.rows, int)
    for item, row, _ in layout(bucket, tuple(scored)):
        expected[[row + i for i, target in enumerate(item.targets) if target >= 0]] = 1
        expected[row + len(item.tokens) - 1] |= item.samples
    np.testing.assert_array_equal(arrays_of(bucket, *scored)["read"], expected)


@UNHURRIED
@given(parts())
def test_only_what_samples_is_harvested_each_from_its_last_segment(part):
    bucket, items = part
    batch = batch_of(bucket, *items)
    a = prepare_inputs(batch, 0, page_size=PAGE, max_pages=MAX_PAGES)
    rows = a["sample_row"]
    results = collect_results(batch, 0, a["tokens"][rows], -rows.astype(np.float32))
    assert set(results) == {item.request_id for item in items if item.samples}
    for item in items:
        if item.samples:
            token, logprob, *_ = results[item.request_id]
            assert (type(token), type(logprob)) == (int, float)
            assert token == item.tokens[-1]
            assert a["positions"][int(-logprob)] == item.start + len(item.tokens) - 1
