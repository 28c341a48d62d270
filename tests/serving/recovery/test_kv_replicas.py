"""Which copies there are, how long they are kept, and what they may take."""

from pathlib import Path

import numpy as np
import pytest

import serving.recovery.kv_replicas
from serving.config import Settings
from serving.engine.batch import Batch, StepBucket
from serving.engine.sequence import Sequence
from serving.executor.kv_replica import KVReplica, replica_bytes
from serving.recovery.kv_replicas import KVReplicas, free_bytes
from serving.worker.kv_replicator import KVReplicator
from simulation.hand_model import PREPARED, small_request
from tests.support.stepping import work

ENTRIES, ENTRY_BYTES = 64, 1024


def replicas(wanted: str = "memory", *, free: int = 1 << 40) -> KVReplicas:
    return KVReplicas.create(wanted, 2, entries=ENTRIES, entry_bytes=ENTRY_BYTES, free=free)


def filled(made: KVReplicas, rank: int, count: int, step: int) -> Sequence:
    """A rank starts, and one request has `count` entries there after `step`."""
    replicator = KVReplicator.of(made.assign(rank))
    assert replicator is not None
    at = np.arange(count)
    replicator.copy(at, at, at, np.zeros((count, 1, ENTRY_BYTES // 4), np.float32))
    replicator.seal(step)
    for message in replicator.take_messages():
        made.receive(rank, message)
    request = small_request("a", range(count + 1))
    return Sequence(request, 0, rank=rank, computed=count, pages=tuple(range(-(-count // 8))))


def test_auto_makes_copies_where_memory_is_plenty_and_says_why_not_elsewhere():
    need = 2 * replica_bytes(ENTRIES, ENTRY_BYTES)
    assert (replicas("auto", free=4 * need).channel, replicas("auto", free=4 * need).reason) == ("memory", "")
    bare = replicas("auto", free=4 * need - 1)
    assert bare.channel == "off"
    assert "more than a quarter of the 0 MiB free" in bare.reason
    assert replicas("memory", free=0).channel == "memory"


@pytest.mark.parametrize(
    ("arch", "launcher", "channel"),
    [
        ("pd", "join", "stream"),
        ("pd", "local", "memory"),
        ("collocated", "join", "off"),
        ("collocated", "local", "memory"),
    ],
)
def test_pools_have_replicas_wherever_their_ranks_are(monkeypatch, arch: str, launcher: str, channel: str):
    monkeypatch.setattr(serving.recovery.kv_replicas, "free_bytes", lambda: 1 << 40)
    settings = Settings(arch=arch, launcher=launcher, rank_tokens="file")
    made = KVReplicas.of_server(settings, PREPARED, 10, single_host=launcher == "local")
    assert made.channel == channel


def test_a_replica_that_an_earlier_front_made_is_known_as_such():
    made, next_front = replicas(), replicas()
    path = made.assign(0).cache_copy
    assert not made.is_reopened(0)
    assert next_front.reopen(0, path) is not None
    assert next_front.is_reopened(0)
    next_front.assign(0)
    assert not next_front.is_reopened(0), "a rank that is started again has an empty one"


def test_off_asks_nothing_of_a_rank_and_takes_nothing():
    off = replicas("off")
    assert off.assign(0).WhichOneof("protection") is None
    assert KVReplicator.of(off.assign(0)) is None
    assert off.bytes == 0
    off.retire(0)
    assert off.recoverable(Sequence(small_request("a"), 0, rank=0, computed=2, pages=(0,)), 8) is None


def test_a_rank_of_another_machine_is_given_no_path_and_is_sent_entries():
    made = replicas("memory")
    far, near = made.assign(0, on_front_host=False), made.assign(1)
    assert far.WhichOneof("protection") == "tell_copies"
    assert near.WhichOneof("protection") == "cache_copy"
    assert [made.can_map(rank) for rank in (0, 1)] == [False, True]
    made.close()


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_what_a_rank_wrote_is_there_after_it_and_none_of_its_successor(way):
    made = replicas(way)
    sequence = filled(made, 0, 20, step=3)
    made.retire(0)
    recoverable = made.recoverable(sequence, 8)
    assert recoverable is not None
    assert (recoverable.pages, recoverable.count) == ((0, 1, 2), 20)
    filled(made, 0, 9, step=5)
    assert made.recoverable(sequence, 8) == recoverable
    kept = made.replica(recoverable.replicas[0])
    assert kept is not None
    assert len(kept.replica.read(np.arange(20), np.arange(20), np.arange(20))) == 20
    made.close()


def test_a_request_of_a_tensor_group_is_in_the_copies_of_all_its_ranks_as_far_as_the_slowest():
    made = KVReplicas.create("memory", 4, entries=32, entry_bytes=ENTRY_BYTES, tensor=2)
    made.set_groups({3: (3, 1), 1: (3, 1), 0: (0, 2), 2: (0, 2)})
    sequence = filled(made, 1, 20, step=3)
    filled(made, 3, 20, step=4)
    made.retire(3)
    assert made.recoverable(sequence, 8) is None, "the other rank of the group is not known to have lost it yet"
    made.retire(1)
    made.set_groups({0: (0, 2), 2: (0, 2)})
    recoverable = made.recoverable(sequence, 8)
    assert recoverable is not None
    assert (recoverable.pages, recoverable.count) == ((4, 5, 6), 20), (
        "rank 1 has the second part of each cache of its group"
    )
    found = [made.replica(number) for number in recoverable.replicas]
    assert [kept.replica.sealed for kept in found if kept is not None] == [4, 3], "in order of the shares"
    for step in range(4, 6):
        works = (work([1], 16, (0, 1, 2)),)
        made.record_step(Batch(step, 0, StepBucket(2, 0), {1: works}))
    recoverable = made.recoverable(sequence, 8)
    assert recoverable is not None
    assert recoverable.count == 16, "what step 4 wrote is in one copy only"
    made.close()


def test_copies_of_the_dead_go_when_nobody_needs_them_the_oldest_first_when_there_are_too_many():
    made = replicas()
    numbers = []
    for _ in range(4):
        sequence = filled(made, 1, 20, step=3)
        made.retire(1)
        recoverable = made.recoverable(sequence, 8)
        assert recoverable is not None
        numbers.append(recoverable.replicas[0])
    before = made.bytes
    assert made.discard_except(numbers[1:]) == {numbers[1]}
    assert made.bytes == before // 2
    assert [made.replica(number) is not None for number in numbers] == [False, False, True, True]
    assert made.discard_except(()) == set()
    assert made.bytes == 0


def test_a_rank_that_was_not_lost_frees_its_replica_when_it_is_started_again():
    made = replicas()
    filled(made, 0, 60, step=1)
    full = made.bytes
    made.assign(0)
    assert made.bytes < full
    path = Path(made.assign(0).cache_copy)
    copy = KVReplica.open(path)
    copy.close()
    made.close()
    assert not path.exists()


def test_free_memory_is_that_of_the_control_group_where_it_has_a_bound(tmp_path: Path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4000 kB\n")
    assert free_bytes(tmp_path) == 4000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1000000\n")
    for bound, free in (("max", 4000 << 10), ("3000000", 2000000), ("500000", 0)):
        (group / "memory.max").write_text(bound + "\n")
        assert free_bytes(tmp_path) == free
