"""Counts of steps outlive the server, whatever stands in the file; with enough of them, buckets are chosen."""

import asyncio
import dataclasses

import pytest

from planner.buckets import StepCounts, Want, choose, read_counts
from serving import step_book
from serving.batch import Batch, Bucket
from serving.config import Settings
from serving.run_folder import RunFolder
from serving.step_book import ENOUGH_STEPS, StepBook, with_buckets
from serving.tally import Tally
from tests.serving.test_recovery_machine import MODEL as PREPARED
from tests.serving.test_tally import MODEL, work

AUTO = Settings(model="tiny", buckets=())
SMALL = {(1, 0): Want(ENOUGH_STEPS, 4 * ENOUGH_STEPS, ENOUGH_STEPS)}
STEP = Batch(step=1, epoch=0, bucket=Bucket(2, 0), work={0: (work(5),), 1: ()})


@pytest.fixture
def book(tmp_path) -> StepBook:
    found = StepBook.of(AUTO, dataclasses.replace(PREPARED, steps=str(tmp_path / "steps")))
    assert found is not None
    return found


def chosen(book: StepBook | None, run: RunFolder | None = None) -> tuple[tuple[tuple[int, int], ...], str]:
    said: list[str] = []
    return with_buckets(AUTO, book, said.append, run).buckets, " ".join(said)


def test_what_is_counted_is_added_to_what_was_and_nothing_else_is_left_there(book):
    tally = Tally(AUTO, MODEL)
    for _ in range(3):
        tally.stepped(STEP, 0.0, 1.0)
        asyncio.run(book.save(tally, Settings.buckets))
    asyncio.run(book.save(tally, Settings.buckets))
    counts = read_counts(str(book.path))
    assert counts.wanted == {(1, 0): Want(3, 6, 3)}
    assert (counts.served, counts.chosen) == (Settings.buckets, ())
    assert [path.name for path in book.path.parent.iterdir()] == [book.path.name]


def test_each_model_number_of_ranks_and_architecture_has_a_book_of_its_own(tmp_path):
    model = dataclasses.replace(PREPARED, steps=str(tmp_path))
    books = [
        StepBook.of(AUTO, model),
        StepBook.of(AUTO, dataclasses.replace(model, content="other")),
        StepBook.of(dataclasses.replace(AUTO, ranks=3), model),
        StepBook.of(dataclasses.replace(AUTO, arch="disaggregated"), model),
    ]
    assert len({each.path for each in books if each is not None}) == len(books)
    assert StepBook.of(AUTO, dataclasses.replace(model, steps="")) is None


def test_the_usual_buckets_are_served_until_enough_is_counted(book):
    assert chosen(book)[0] == chosen(None)[0] == Settings.buckets
    book.add({(1, 0): Want(ENOUGH_STEPS - 1, 4, 1)})
    buckets, said = chosen(book)
    assert buckets == Settings.buckets
    assert f"now {ENOUGH_STEPS - 1}" in said


def test_a_choice_is_made_of_the_counts_and_stays(book):
    book.add(SMALL)
    first, said = chosen(book)
    assert first == choose(StepCounts(SMALL), Settings.buckets).buckets != Settings.buckets
    assert "75% would have been padding, 88% with the usual ones" in said
    book.add({(2, 1): Want(2, 8, 2)})  # of which another choice would save too little to compile it
    assert chosen(book)[0] == first
    assert read_counts(str(book.path)).chosen == first


def test_buckets_that_were_given_stay(book):
    book.add(SMALL)
    given = dataclasses.replace(AUTO, buckets=((4, 0), (4, 4)))
    assert with_buckets(given, book, pytest.fail, None) == given


def test_the_next_front_has_the_buckets_of_the_first_whatever_was_counted_meanwhile(book, tmp_path):
    run = RunFolder(tmp_path)
    first = chosen(book, run)[0]
    book.add(SMALL)
    assert chosen(book, run) == (first, "")
    assert chosen(book)[0] != first


def test_a_file_that_holds_something_else_is_begun_anew(book, caplog):
    book.path.parent.mkdir()
    book.path.write_text("[1")
    assert chosen(book)[0] == Settings.buckets
    assert "begun anew" in caplog.text
    book.add(SMALL)
    assert read_counts(str(book.path)).steps == ENOUGH_STEPS


def test_a_folder_that_cannot_be_written_stops_nothing(book):
    book.path.parent.write_text("a file, no folder")
    tally = Tally(AUTO, MODEL)
    tally.stepped(STEP, 0.0, 1.0)
    asyncio.run(book.save(tally, Settings.buckets))
    assert tally.take_wanted() == {}
    assert chosen(book)[0] == Settings.buckets


def test_old_steps_fade(book, monkeypatch):
    monkeypatch.setattr(step_book, "MOST_STEPS", 100)
    book.add({(1, 0): Want(1000, 4000, 1000)})
    book.add({(2, 0): Want(100, 400, 200)})
    counts = read_counts(str(book.path))
    assert counts.wanted == {(1, 0): Want(50, 200, 50), (2, 0): Want(50, 200, 100)}
