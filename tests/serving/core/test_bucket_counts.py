"""Counts of steps survive the server, whatever is in the file; with enough of them, buckets are chosen."""

import asyncio
import dataclasses

import pytest

from planner.cost.buckets import StepCounts, StepDemand, choose_buckets, read_counts
from serving.config import Settings
from serving.core import bucket_counts
from serving.core.bucket_counts import MIN_STEPS, BucketCounts, resolve_buckets
from serving.core.step_stats import StepStats
from serving.engine.batch import Batch, StepBucket
from serving.launch.run_folder import RunFolder
from simulation.hand_model import PREPARED
from tests.serving.core.test_step_stats import MODEL, work

AUTO = Settings(model="tiny", buckets=())
SMALL = {(1, 0): StepDemand(MIN_STEPS, 4 * MIN_STEPS, MIN_STEPS)}
STEP = Batch(step=1, epoch=0, bucket=StepBucket(2, 0), scheduled={0: (work(5),), 1: ()})


@pytest.fixture
def saved_counts(tmp_path) -> BucketCounts:
    found = BucketCounts.for_server(AUTO, dataclasses.replace(PREPARED, steps=str(tmp_path / "steps")))
    assert found is not None
    return found


def chosen(saved_counts: BucketCounts | None, run: RunFolder | None = None) -> tuple[tuple[tuple[int, int], ...], str]:
    said: list[str] = []
    return resolve_buckets(AUTO, saved_counts, said.append, run).buckets, " ".join(said)


def test_what_is_counted_is_added_to_what_was_and_nothing_else_is_left_there(saved_counts):
    step_stats = StepStats(AUTO, MODEL)
    for _ in range(3):
        step_stats.record_step(STEP, 0.0, 1.0)
        asyncio.run(saved_counts.save(step_stats, Settings.buckets))
    asyncio.run(saved_counts.save(step_stats, Settings.buckets))
    counts = read_counts(str(saved_counts.path))
    assert counts.wanted == {(1, 0): StepDemand(3, 6, 3)}
    assert (counts.served, counts.chosen) == (Settings.buckets, ())
    assert [path.name for path in saved_counts.path.parent.iterdir()] == [saved_counts.path.name]


def test_each_model_number_of_ranks_and_architecture_has_a_book_of_its_own(tmp_path):
    model = dataclasses.replace(PREPARED, steps=str(tmp_path))
    books = [
        BucketCounts.for_server(AUTO, model),
        BucketCounts.for_server(AUTO, dataclasses.replace(model, content="other")),
        BucketCounts.for_server(dataclasses.replace(AUTO, ranks=3), model),
        BucketCounts.for_server(dataclasses.replace(AUTO, arch="disaggregated"), model),
    ]
    assert len({each.path for each in books if each is not None}) == len(books)
    assert BucketCounts.for_server(AUTO, dataclasses.replace(model, steps="")) is None


def test_the_usual_buckets_are_served_until_enough_is_counted(saved_counts):
    assert chosen(saved_counts)[0] == chosen(None)[0] == Settings.buckets
    saved_counts.add({(1, 0): StepDemand(MIN_STEPS - 1, 4, 1)})
    buckets, said = chosen(saved_counts)
    assert buckets == Settings.buckets
    assert f"now {MIN_STEPS - 1}" in said


def test_a_choice_is_made_of_the_counts_and_stays(saved_counts):
    saved_counts.add(SMALL)
    first, said = chosen(saved_counts)
    assert first == choose_buckets(StepCounts(SMALL), Settings.buckets).buckets != Settings.buckets
    assert "75% would have been padding, 88% with the usual ones" in said
    saved_counts.add({(2, 1): StepDemand(2, 8, 2)})  # of which another choice would save too little to compile it
    assert chosen(saved_counts)[0] == first
    assert read_counts(str(saved_counts.path)).chosen == first


def test_buckets_that_were_given_stay(saved_counts):
    saved_counts.add(SMALL)
    given = dataclasses.replace(AUTO, buckets=((4, 0), (4, 4)))
    assert resolve_buckets(given, saved_counts, pytest.fail, None) == given


def test_the_next_front_has_the_buckets_of_the_first_whatever_was_counted_meanwhile(saved_counts, tmp_path):
    run = RunFolder(tmp_path)
    first = chosen(saved_counts, run)[0]
    saved_counts.add(SMALL)
    assert chosen(saved_counts, run) == (first, "")
    assert chosen(saved_counts)[0] != first


def test_a_file_of_another_kind_is_replaced(saved_counts, caplog):
    saved_counts.path.parent.mkdir()
    saved_counts.path.write_text("[1")
    assert chosen(saved_counts)[0] == Settings.buckets
    assert "a new file is begun" in caplog.text
    saved_counts.add(SMALL)
    assert read_counts(str(saved_counts.path)).steps == MIN_STEPS


def test_a_folder_that_cannot_be_written_stops_nothing(saved_counts):
    saved_counts.path.parent.write_text("a file, no folder")
    step_stats = StepStats(AUTO, MODEL)
    step_stats.record_step(STEP, 0.0, 1.0)
    asyncio.run(saved_counts.save(step_stats, Settings.buckets))
    assert step_stats.take_demand() == {}
    assert chosen(saved_counts)[0] == Settings.buckets


def test_old_steps_fade(saved_counts, monkeypatch):
    monkeypatch.setattr(bucket_counts, "MAX_STEPS", 100)
    saved_counts.add({(1, 0): StepDemand(1000, 4000, 1000)})
    saved_counts.add({(2, 0): StepDemand(100, 400, 200)})
    counts = read_counts(str(saved_counts.path))
    assert counts.wanted == {(1, 0): StepDemand(50, 200, 50), (2, 0): StepDemand(50, 200, 100)}
