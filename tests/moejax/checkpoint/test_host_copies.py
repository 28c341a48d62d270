"""Laws of the copies in the host's memory: one for all, never removed while read, bounded, pruned when idle."""

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moejax.checkpoint import host_copies
from moejax.checkpoint.host_copies import LIMIT_VARIABLE, LOCK_FILE, ensure_copy, hold_copy, list_copies
from moejax.checkpoint.host_store import HostStore, StoreMissing
from tests.support.models import SHARED, model_folder

VERSION = "shared-shape-{:016x}"
READER = """
import sys, time
from pathlib import Path
from moejax.checkpoint.host_store import HostStore
store = HostStore.open(Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""
RANK = """
import hashlib, sys
from pathlib import Path
from moejax.checkpoint.host_store import HostStore
store = HostStore.create(Path(sys.argv[1]), Path(sys.argv[2]))
assert store.folder == Path(sys.argv[2]), store.folder
print("ready", flush=True)
sys.stdin.readline()
digest = hashlib.sha256()
for _ in range(5):
    experts = store.read_experts([(layer, e) for layer in range(2) for e in range(8)])
    for expert in sorted(experts):
        for array in experts[expert]:
            digest.update(array.tobytes())
    digest.update(store.non_expert_params().embed.tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "shared"
    model_folder(folder, SHARED, np.float16)
    return folder


@pytest.fixture
def host(tmp_path):
    (tmp_path / "host").mkdir(mode=0o700)
    return tmp_path / "host"


def age(folder) -> None:
    """Make a copy look unused for long enough."""
    os.utime(folder / LOCK_FILE, (0, 0))


@pytest.fixture
def reader():
    """Starts processes that hold a store open."""
    started = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", READER, folder], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_ranks_that_start_and_read_at_once_share_one_copy_and_read_the_same(model, host):
    place = host / VERSION.format(1)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, model, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 4
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    answers = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert len(set(answers)) == 1
    assert len(answers[0]) == 65
    assert sorted(p.name for p in host.iterdir()) == [".lock", place.name]


def test_a_copy_is_not_removed_while_a_process_reads_it_and_goes_after_it_was_killed(model, host, reader):
    old, new = (host / VERSION.format(i) for i in (1, 2))
    ensure_copy(model, old)
    rank = reader(old)
    age(old)
    ensure_copy(model, new)
    assert old.is_dir()
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    age(old)
    ensure_copy(model, new)
    assert not old.exists()
    assert new.is_dir()


def test_a_copy_that_a_server_is_about_to_open_stays(model, host):
    old, new = (host / VERSION.format(i) for i in (1, 2))
    for place in (old, new):
        ensure_copy(model, place)
    assert old.is_dir()


def test_copies_of_other_models_stay_while_there_is_room(model, host):
    other = host / "other-0000000000000001"
    ensure_copy(model, other)
    age(other)
    ensure_copy(model, host / VERSION.format(1))
    assert other.is_dir()


def test_the_longest_unused_goes_when_room_is_needed_and_no_more_than_that(model, host, monkeypatch):
    places = [host / f"model{i}-{i:016x}" for i in range(3)]
    for i, place in enumerate(places):
        ensure_copy(model, place)
        os.utime(place / LOCK_FILE, (i, i))
    size = list_copies(host)[0].bytes
    assert [copy.folder for copy in list_copies(host)] == places
    monkeypatch.setattr(
        host_copies, "_available_bytes", lambda parent: 3 * size - sum(c.bytes for c in list_copies(parent))
    )
    assert ensure_copy(model, host / VERSION.format(1)) == host / VERSION.format(1)
    assert [place.is_dir() for place in places] == [False, True, True]


def test_all_copies_together_stay_below_the_bound(model, host, monkeypatch):
    first, second = (host / VERSION.format(i) for i in (1, 2))
    ensure_copy(model, first)
    size = list_copies(host)[0].bytes
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    with pytest.warns(UserWarning, match=f"has room for 0 MiB.*{LIMIT_VARIABLE} bounds all copies"):
        assert ensure_copy(model, second) == model
    monkeypatch.setenv(LIMIT_VARIABLE, str((2 * size >> 20) + 1))
    assert ensure_copy(model, second) == second
    assert sum(copy.bytes for copy in list_copies(host)) <= ((2 * size >> 20) + 1) << 20


def test_a_copy_takes_at_most_half_of_the_free_memory(model, host, monkeypatch):
    monkeypatch.setattr(host_copies, "_free_memory", lambda: 1000)
    with pytest.warns(UserWarning, match="has room for 0 MiB"):
        assert ensure_copy(model, host / VERSION.format(1)) == model


def test_what_a_killed_copy_left_is_removed(model, host):
    (host / ".draft-abc").mkdir()
    (host / ".draft-abc" / "config.json").write_text("{}")
    ensure_copy(model, host / VERSION.format(1))
    assert sorted(p.name for p in host.iterdir()) == [".lock", VERSION.format(1)]


def test_a_copy_made_before_there_were_leases_is_kept_for_a_while(model, host):
    old = host / VERSION.format(1)
    ensure_copy(model, old)
    (old / LOCK_FILE).unlink()
    (copy,) = list_copies(host)
    assert not copy.idle
    assert copy.folder == old


def test_sizes_are_those_of_the_weights(model, host):
    store = HostStore.create(model, host / VERSION.format(1))
    (copy,) = list_copies(host)
    assert copy.busy
    assert store.bytes <= copy.bytes < 2 * store.bytes
    del store
    assert not list_copies(host)[0].busy


def test_a_model_folder_needs_no_lease_and_a_copy_being_removed_cannot_be_opened(model, host):
    assert hold_copy(model) is None
    place = ensure_copy(model, host / VERSION.format(1))
    with (place / LOCK_FILE).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreMissing, match="is being removed; start again"):
            HostStore.open(place)


def test_many_threads_may_read_one_store(model, host):
    store = HostStore.create(model, host / VERSION.format(1))
    wanted = [(layer, e) for layer in range(2) for e in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: store.read_experts(wanted), range(16)))
    for expert in wanted:
        assert len({result[expert][0].tobytes() for result in results}) == 1
