"""A writer may be killed at any store: entries below the seal are complete, and no entry is taken for another."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import serving.executor.kv_replica
from serving.executor.kv_replica import UNSEALED, KVReplica, NotReplicated, entry_indices, replica_bytes

ENTRIES, WIDTH, ROWS = 24, 16, 6
"""Sizes of the copies here, in entries, bytes of an entry, and entries that a step writes."""


def entries_at(step: int) -> np.ndarray:
    """The entries that a step writes: any two steps after each other have some in common."""
    return (5 * step + 7 * np.arange(ROWS)) % ENTRIES


def tags_at(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions of these."""
    return np.arange(ROWS) + 3, np.full(ROWS, step % 50)


def rows_at(step: int) -> np.ndarray:
    return np.repeat(np.full((ROWS, 1), step % 251, np.uint8), WIDTH, axis=1)


def write(copy: KVReplica, step: int) -> None:
    copy.write(entries_at(step), *tags_at(step), rows_at(step))
    copy.seal(step)


def new_copy() -> tuple[KVReplica, int]:
    file = os.memfd_create("test")
    return KVReplica.create(file, ENTRIES, WIDTH), file


def assert_whole(copy: KVReplica, last: int) -> None:
    """Every entry has what the last sealed step left there, unless the one after it was killed while it wrote there;
    then it has all of the one, all of the other, or nothing that can be read."""
    sealed = copy.sealed
    assert sealed <= last
    writer: dict[int, tuple[int, int]] = {}
    for step in range(max(0, sealed - 2 * ENTRIES), sealed + 1):
        writer |= {int(entry): (step, i) for i, entry in enumerate(entries_at(step))}
    torn = set(entries_at(sealed + 1).tolist())
    for entry, (step, i) in writer.items():
        tokens, positions = (tags[i : i + 1] for tags in tags_at(step))
        if entry not in torn:
            assert copy.read(np.array([entry]), tokens, positions).tolist() == rows_at(step)[i : i + 1].tolist()
            continue
        for candidate in (step, sealed + 1):
            at = entries_at(candidate).tolist().index(entry)
            tokens, positions = (tags[at : at + 1] for tags in tags_at(candidate))
            try:
                row = copy.read(np.array([entry]), tokens, positions)
            except NotReplicated:
                continue
            assert row.tolist() == rows_at(candidate)[at : at + 1].tolist()


class Killed(Exception):
    """The writer's process ends here."""


class Dying:
    """An array whose stores are counted; at one of them only some elements are still written."""

    def __init__(self, array: np.ndarray, left: list[int], done: int) -> None:
        self.array, self.left, self.done = array, left, done

    def __setitem__(self, at, value) -> None:
        self.left[0] -= 1
        if self.left[0] >= 0:
            self.array[at] = value
            return
        after = self.array.copy()
        after[at] = value
        changed = np.argwhere(after != self.array)
        for where in map(tuple, changed[: self.done]):
            self.array[where] = after[where]
        raise Killed

    def __getitem__(self, at):
        return self.array[at]

    def tolist(self) -> list:
        return self.array.tolist()


@given(stores=st.integers(0, 3 * (ROWS + 3)), done=st.integers(0, ROWS * WIDTH), before=st.integers(0, 5))
def test_whatever_store_is_the_last_what_was_sealed_can_be_read_and_is_right(stores, done, before):
    copy, file = new_copy()
    for step in range(before):
        write(copy, step)
    left, last = [stores], before
    arrays = copy._header, copy._tags
    copy._header, copy._tags = (Dying(array, left, done) for array in arrays)

    def pwrite(file: int, data: memoryview, at: int) -> int:
        left[0] -= 1
        wrote = os.pwrite(file, data if left[0] >= 0 else data.cast("B")[:done], at)
        if left[0] < 0:
            raise Killed
        return wrote

    try:
        with mock.patch.object(serving.executor.kv_replica, "os", mock.Mock(wraps=os, pwrite=pwrite)):
            for last in range(before, before + 3):
                write(copy, last)
    except Killed:
        pass
    copy._header, copy._tags = arrays
    assert_whole(copy, last)
    del arrays
    copy.close()
    os.close(file)


WRITER = """
import sys
from pathlib import Path
from serving.executor.kv_replica import KVReplica
from tests.serving.executor.test_kv_replica import write
copy, step = KVReplica.open(Path(sys.argv[1])), 0
print(flush=True)
while True:
    write(copy, step)
    step += 1
"""


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01, 0.02, 0.05])
def test_a_process_killed_while_it_writes_leaves_what_it_sealed(after_s):
    copy, file = new_copy()
    path = f"/proc/{os.getpid()}/fd/{file}"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(after_s)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert_whole(copy, copy.sealed)
    copy.close()
    os.close(file)


def test_a_new_copy_has_nothing_in_it_and_takes_next_to_no_memory():
    file = os.memfd_create("test")
    copy = KVReplica.create(file, 1024, 1 << 20)
    assert copy.sealed == UNSEALED
    assert os.fstat(file).st_size == replica_bytes(1024, 1 << 20) > 1 << 30
    assert 512 * os.fstat(file).st_blocks < 1 << 20
    with pytest.raises(
        NotReplicated, match="entry 3 of the replica has token -1 at position -1, and token 0 at position 0"
    ):
        copy.read(np.array([3]), np.zeros(1), np.zeros(1))
    copy.close()
    os.close(file)


@pytest.mark.parametrize("change", ["token", "position"])
def test_what_an_earlier_request_left_in_an_entry_is_not_read_as_another(change):
    copy, file = new_copy()
    write(copy, 4)
    tokens, positions = tags_at(4)
    np.testing.assert_array_equal(copy.read(entries_at(4), tokens, positions), rows_at(4))
    wrong = (tokens + (np.arange(ROWS) == 2), positions) if change == "token" else (tokens, positions + 1)
    with pytest.raises(NotReplicated):
        copy.read(entries_at(4), *wrong)
    copy.close()
    os.close(file)


def test_a_file_that_is_no_copy_is_refused(tmp_path: Path):
    other = tmp_path / "other"
    other.write_bytes(b"x" * 100_000)
    with pytest.raises(NotReplicated, match="this is no KV replica"):
        KVReplica.open(other)


def test_entries_of_positions_follow_the_pages():
    assert entry_indices((5, 2), 4, 2, 4).tolist() == [22, 23, 8, 9]
