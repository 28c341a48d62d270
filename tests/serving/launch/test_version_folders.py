"""Folders of changed weights stay while something needs them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.launch.version_folders import INCOMING, VersionFolders, incoming_folder
from serving.launch.weights_record import VERSIONS, WeightsRecord
from serving.protocol.weights import WeightsVersion


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.anyio
async def test_only_what_is_needed_and_what_a_living_process_receives_stays(tmp_path: Path) -> None:
    folders = VersionFolders(tmp_path / "weights")
    assert not folders.exist
    folders.remove_unneeded(())
    needed, other = folders.of_version(3), folders.of_version(4)
    left = folders.place() / f"{INCOMING}{dead_pid()}-a"
    draft = folders.place() / ".version-4-x"
    for each in (needed, other, left, draft):
        (each / "inside").mkdir(parents=True)
    async with incoming_folder(str(folders.place())) as received:
        folders.remove_unneeded({str(needed)})
        assert set(folders.place().iterdir()) == {needed, received}
        assert str(os.getpid()) in received.name
    assert list(folders.place().iterdir()) == [needed]


def test_a_temporary_place_goes_with_the_server() -> None:
    folders = VersionFolders(None)
    assert not folders.exist
    folders.close()
    place = folders.place()
    assert folders.exist
    assert folders.place() == place
    assert place.stat().st_mode & 0o077 == 0
    folders.close()
    assert not place.exists()


@pytest.mark.anyio
async def test_a_received_folder_is_removed_when_receiving_fails(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError):
        async with incoming_folder(str(tmp_path)) as received:
            (received / "data").touch()
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_the_recorded_version_stays_also_under_a_server_of_another_model(tmp_path: Path) -> None:
    record = WeightsRecord(tmp_path, "base")
    recorded, other = (record.versions.of_version(number) for number in (1, 2))
    for each in (recorded, other):
        each.mkdir()
    record.save(WeightsVersion(1, "one", str(recorded)))
    WeightsRecord(tmp_path, "another").remove_unneeded()
    assert list((tmp_path / VERSIONS).iterdir()) == [recorded]


def test_nothing_is_removed_while_the_record_cannot_be_read(tmp_path: Path) -> None:
    record = WeightsRecord(tmp_path, "base")
    folder = record.versions.of_version(1)
    folder.mkdir()
    (tmp_path / "weights.json").write_text("{")
    record.remove_unneeded()
    assert folder.is_dir()
