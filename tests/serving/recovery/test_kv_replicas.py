"""Which copies there are, how long they are kept, and what they may take."""

from pathlib import Path

import numpy as np
import pytest

from serving.batch import Batch, Bucket
from serving.cache_copies import CacheCopies, free_bytes
from serving.cache_copy import CacheCopy, size_of
from serving.protector import Protector
from serving.sequence import Sequence
from tests.fakes import small_request
from tests.moejax.stepping import work

ENTRIES, ENTRY_BYTES = 64, 1024


def copies(wanted: str = "memory", *, free: int = 1 << 40) -> CacheCopies:
    return CacheCopies.of(wanted, 2, entries=ENTRIES, entry_bytes=ENTRY_BYTES, free=free)


def filled(made: CacheCopies, rank: int, count: int, step: int) -> Sequence:
    """A rank starts, and one request has `count` entries there after `step`."""
    protector = Protector.of(made.fresh(rank))
    assert protector is not None
    at = np.arange(count)
    protector.copy(at, at, at, np.zeros((count, 1, ENTRY_BYTES // 4), np.float32))
    protector.seal(step)
    for message in protector.told():
        made.told(rank, message)
    request = small_request("a", range(count + 1))
    return Sequence(request, 0, rank=rank, computed=count, pages=tuple(range(-(-count // 8))))


def test_auto_makes_copies_where_memory_is_plenty_and_says_why_not_elsewhere():
    need = 2 * size_of(ENTRIES, ENTRY_BYTES)
    assert (copies("auto", free=4 * need).way, copies("auto", free=4 * need).reason) == ("memory", "")
    bare = copies("auto", free=4 * need - 1)
    assert bare.way == "off"
    assert "more than a quarter of the 0 MiB free" in bare.reason
    assert copies("memory", free=0).way == "memory"


def test_off_asks_nothing_of_a_rank_and_takes_nothing():
    off = copies("off")
    assert off.fresh(0).WhichOneof("protection") is None
    assert Protector.of(off.fresh(0)) is None
    assert off.bytes == 0
    off.lost(0)
    assert off.salvage(Sequence(small_request("a"), 0, rank=0, computed=2, pages=(0,)), 8) is None


def test_a_rank_of_another_machine_is_given_no_path_and_is_sent_entries():
    made = copies("memory")
    far, near = made.fresh(0, here=False), made.fresh(1)
    assert far.WhichOneof("protection") == "tell_copies"
    assert near.WhichOneof("protection") == "cache_copy"
    assert [made.maps(rank) for rank in (0, 1)] == [False, True]
    made.close()


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_what_a_rank_wrote_is_there_after_it_and_none_of_its_successor(way):
    made = copies(way)
    sequence = filled(made, 0, 20, step=3)
    made.lost(0)
    salvage = made.salvage(sequence, 8)
    assert salvage is not None
    assert (salvage.pages, salvage.count) == ((0, 1, 2), 20)
    filled(made, 0, 9, step=5)
    assert made.salvage(sequence, 8) == salvage
    kept = made.find(salvage.copies[0])
    assert kept is not None
    assert len(kept.copy.read(np.arange(20), np.arange(20), np.arange(20))) == 20
    made.close()


def test_a_request_of_a_tensor_group_is_in_the_copies_of_all_its_ranks_as_far_as_the_slowest():
    made = CacheCopies.of("memory", 4, entries=32, entry_bytes=ENTRY_BYTES, tensor=2)
    made.grouped({3: (3, 1), 1: (3, 1), 0: (0, 2), 2: (0, 2)})
    sequence = filled(made, 1, 20, step=3)
    filled(made, 3, 20, step=4)
    made.lost(3)
    assert made.salvage(sequence, 8) is None, "the other rank of the group is not known to have lost it yet"
    made.lost(1)
    made.grouped({0: (0, 2), 2: (0, 2)})
    salvage = made.salvage(sequence, 8)
    assert salvage is not None
    assert (salvage.pages, salvage.count) == ((4, 5, 6), 20), "rank 1 has the second part of each cache of its group"
    found = [made.find(number) for number in salvage.copies]
    assert [kept.copy.sealed for kept in found if kept is not None] == [4, 3], "in order of the shares"
    for step in range(4, 6):
        works = (work([1], 16, (0, 1, 2)),)
        made.stepped(Batch(step, 0, Bucket(2, 0), {1: works}))
    salvage = made.salvage(sequence, 8)
    assert salvage is not None
    assert salvage.count == 16, "what step 4 wrote is in one copy only"
    made.close()


def test_copies_of_the_dead_go_when_nobody_needs_them_the_oldest_first_when_there_are_too_many():
    made = copies()
    numbers = []
    for _ in range(4):
        sequence = filled(made, 1, 20, step=3)
        made.lost(1)
        salvage = made.salvage(sequence, 8)
        assert salvage is not None
        numbers.append(salvage.copies[0])
    before = made.bytes
    assert made.keep_only(numbers[1:]) == {numbers[1]}
    assert made.bytes == before // 2
    assert [made.find(number) is not None for number in numbers] == [False, False, True, True]
    assert made.keep_only(()) == set()
    assert made.bytes == 0


def test_a_rank_that_was_never_lost_gives_its_memory_back_when_it_is_started_anew():
    made = copies()
    filled(made, 0, 60, step=1)
    full = made.bytes
    made.fresh(0)
    assert made.bytes < full
    path = Path(made.fresh(0).cache_copy)
    copy = CacheCopy.open(path)
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
