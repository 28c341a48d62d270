"""The record of the weights in force: whole or not at all, and of one model."""

from pathlib import Path

import pytest

from serving.errors import StartError
from serving.launch.weights_record import FILE, WeightsRecord
from serving.protocol.weights import FIRST_WEIGHTS, WeightsVersion

VERSION = WeightsVersion(3, "step-300", "/models/step-300", "/dev/shm/copy", "0123")


def test_the_version_that_was_saved_last_is_in_force(tmp_path: Path) -> None:
    record = WeightsRecord(tmp_path, "base")
    assert record.load() == FIRST_WEIGHTS
    record.save(WeightsVersion(2, "two"))
    record.save(VERSION)
    assert WeightsRecord(tmp_path, "base").load() == VERSION
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_record_of_another_model_is_void(tmp_path: Path) -> None:
    WeightsRecord(tmp_path, "base").save(VERSION)
    assert WeightsRecord(tmp_path, "another").load() == FIRST_WEIGHTS


def test_without_a_folder_nothing_outlives_the_front() -> None:
    record = WeightsRecord(None, "base")
    record.save(VERSION)
    assert record.load() == FIRST_WEIGHTS


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"base": "base", "version": {"nu')
    with pytest.raises(StartError, match=f"{FILE}, which names the weights in force, cannot be read"):
        WeightsRecord(tmp_path, "base").load()
