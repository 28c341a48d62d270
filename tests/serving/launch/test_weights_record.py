"""The record of the weights in force: whole or not at all, and of one model."""

import errno
import os
import resource
import signal
import stat
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


def test_a_folder_that_cannot_be_flushed_leaves_the_new_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, fsync = WeightsRecord(tmp_path, "base"), os.fsync

    def only_files(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.raises(OSError, match="Input/output"):
        record.save(VERSION)
    assert record.has(VERSION)
    assert not record.has(WeightsVersion(4, "four"))


def test_a_record_is_whole_where_a_write_takes_only_some_of_the_bytes(
    tmp_path: Path,
) -> None:
    record, limits = WeightsRecord(tmp_path, "base"), resource.getrlimit(resource.RLIMIT_FSIZE)
    record.save(WeightsVersion(2, "two"))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # as a disk with 40 free bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            record.save(VERSION)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert record.load() == WeightsVersion(2, "two")
