"""Recoverable KV is restored, and nothing else: every stream has the tokens it has alone."""

import dataclasses

import pytest

from serving.engine import migration
from serving.engine.kv_restore import drop_recoverable, mark_restored, replicated_entries, sequences_to_restore
from serving.protocol.request import RequestPhase
from serving.recovery.kv_replicas import STEPS_KEPT
from simulation.hand_model import small_limits, small_request
from tests.support.replicated_engine import ReplicatedEngine

MOST_PAGES = 24


def server(pages=(16, 16), *, way: str = "memory", piece: int = 5, **changes) -> ReplicatedEngine:
    return ReplicatedEngine(
        small_limits(**changes), dict(enumerate(pages)), way=way, most_pages=MOST_PAGES, piece=piece
    )


def everything(_) -> bool:
    return True


def back(s: ReplicatedEngine, ranks: int = 2) -> None:
    s.adopt({**{rank: pool.total for rank, pool in s.state.pools.items()}, **dict.fromkeys(range(ranks), 16)})


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_a_moved_request_decodes_on_without_computing_anything_again(way):
    s = server(way=way, piece=100)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(6):
        s.step()
    s.copy_now(0)
    before = s.state.running["a"]
    s.lose_protected([0], worth=everything)
    assert s.state.waiting["a"].recoverable.count == before.computed
    batch = s.step()
    assert [len(work.tokens) for work in batch.scheduled[1]] == [1]
    assert s.state.running["a"].rank == 1
    s.finish()


def test_what_the_last_step_wrote_is_computed_again_when_it_was_not_copied():
    s = server(piece=100)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(6):
        s.step()
    before = s.state.running["a"]
    s.lose_protected([0], worth=everything)
    assert s.state.waiting["a"].recoverable.count == before.computed - 1
    s.finish()


def test_a_page_that_another_request_wrote_last_and_was_not_copied_is_not_taken_for_whole():
    s = server((16,), piece=100)
    s.submit(small_request("a", range(31), max_tokens=20))
    s.step()
    s.submit(small_request("b", range(33), max_tokens=20))
    s.begin()  # shares what the step just made, of which nothing is copied
    assert s.state.running["b"].committed == 24
    s.lose_protected([0], part=3, worth=everything)
    assert s.state.waiting["b"].recoverable is None
    back(s, 1)
    s.finish()


def test_a_long_context_is_restored_in_pieces_while_the_others_stream():
    s = server(piece=4)
    for name in "ab":
        s.submit(small_request(name, range(ord(name), ord(name) - 40, -1), max_tokens=40))
    for _ in range(8):
        s.step()
    dead = s.state.running["a"].rank
    s.lose_protected([dead], worth=everything)
    told = len(s.heard["b"])
    s.step()
    assert not s.state.running["b"].restoring
    assert "a" in s.state.waiting  # the first step is the survivors' alone
    s.step()
    assert s.state.running["a"].restoring
    assert s.state.running["a"].phase is RequestPhase.PREFILL
    for _ in range(5):
        s.step()
    assert len(s.heard["b"]) == told + 7
    s.finish()


def test_answers_that_shared_pages_share_them_again():
    s = server((24, 24), piece=4, buckets=((2, 0), (8, 0), (8, 2)))
    s.submit(small_request("a", range(40), max_tokens=20, prompt_group="a"))
    for name in "bc":
        s.submit(small_request(name, range(40), max_tokens=20, prompt_group="a", seed=ord(name)))
    s.submit(small_request("z", (9, 8, 7), max_tokens=60))
    for _ in range(5):
        s.step()
    rank = s.state.running["a"].rank
    held = s.state.pools[rank].used
    assert {s.state.running[name].rank for name in "abc"} == {rank}
    s.copy_now(rank)
    s.lose_protected([rank], worth=everything)
    while sequences_to_restore(s.state):
        s.step()
    assert {s.state.running[name].rank for name in "abc"} == {1 - rank}
    assert s.state.pools[1 - rank].used <= held + 8
    assert 40 <= s.restored < 60
    s.finish()


def test_a_target_that_dies_in_the_middle_of_it_loses_nothing():
    s = server((16, 16, 16), piece=4)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(6):
        s.step()
    s.lose_protected([0], worth=everything)
    s.step()
    first = s.state.running["a"]
    assert first.restoring
    assert first.computed > 0
    s.lose_protected([first.rank], worth=everything)
    assert s.state.waiting["a"].recoverable == first.recoverable
    s.drain()
    assert s.restored > 40
    s.check_streams(all_ended=True)
    s.close()


def test_nobody_finds_pages_of_what_was_made_with_other_experts():
    s = server(piece=100)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(4):
        s.step()
    s.copy_now(0)
    s.lose_protected([0], worth=everything)
    s.adopt({1: 16}, masked=[(0, 1)])
    assert s.state.waiting["a"].recoverable.page_keys is None
    s.step()
    assert s.state.running["a"].page_keys is None
    assert not s.state.pools[1].keys
    s.close()


def test_after_damage_no_recoverable_entry_is_used():
    s = server(piece=4)
    for name in "ab":
        s.submit(small_request(name, range(ord(name), ord(name) - 40, -1), max_tokens=30))
    for _ in range(4):
        s.step()
    s.lose_protected([s.state.running["a"].rank], worth=everything)
    s.step()
    s.step()
    assert sequences_to_restore(s.state)
    s._move(migration.invalidate_caches(s.state))
    assert not sequences_to_restore(s.state)
    s.finish()


def test_a_request_whose_copy_is_gone_is_computed_again():
    s = server(piece=4)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(4):
        s.step()
    s.lose_protected([0], worth=everything)
    s.restore()
    assert s.state.running["a"].restoring
    s._move(drop_recoverable(s.state, ["a"]))
    assert s.state.waiting["a"] == s.state.waiting["a"].restarted()
    assert s.state.pools[1].used == 0
    s.finish()


def test_copies_of_the_dead_are_kept_as_long_as_somebody_needs_them_and_are_bounded():
    s = server((16, 16), piece=4)
    assert s.replicas.bytes > 0
    for round_ in range(5):
        s.submit(small_request(f"r{round_}", range(10 + round_, 50), max_tokens=40))
        s.step()
        s.step()
        s.lose_protected([0, 1], worth=everything)
        s.adopt({})
        back(s)
        s.restore()
        assert len(s.replicas._lost) <= 2
    s.drain()
    s.restore()
    assert not s.replicas._lost
    s.check_streams(all_ended=True)
    s.close()


def test_a_request_that_ends_while_it_is_restored_gives_its_pages_back():
    s = server(piece=4)
    s.submit(small_request("a", range(40), max_tokens=30))
    for _ in range(4):
        s.step()
    s.lose_protected([0], worth=everything)
    s.restore()
    s.cancel("a")
    assert s.state.pools[1].used == 0
    s.close()


def test_the_hole_nearest_to_the_beginning_bounds_what_is_copied():
    sequence = dataclasses.replace(small_sequence(), computed=29, pages=(4, 9, 2, 7))
    assert replicated_entries(sequence, {}, 8) == 29
    assert replicated_entries(sequence, {2: 3, 9: 5}, 8) == 13
    assert replicated_entries(sequence, {7: 4, 11: 0}, 8) == 28
    assert replicated_entries(sequence, {7: 6}, 8) == 29
    assert replicated_entries(sequence, {4: 0}, 8) == 0


def small_sequence():
    s = server((16,))
    s.submit(small_request("a", range(29), max_tokens=4))
    s.begin()
    s.close()
    return s.state.running["a"]


def test_one_that_waits_for_room_to_be_restored_is_not_overtaken_nor_placed_without_its_entries():
    s = server((8, 8), piece=100)
    for name in "ab":
        s.submit(small_request(name, range(ord(name), ord(name) - 40, -1), max_tokens=16))
    s.step()
    s.step()
    s.copy_now(s.state.running["a"].rank)
    s.submit(small_request("c", max_tokens=20))
    s.lose_protected([s.state.running["a"].rank], worth=everything)
    while "b" in s.state.running:
        assert list(s.state.waiting) == ["a", "c"]
        s.step()
    s.step()
    assert s.state.running["a"].generated
    assert s.restored >= 40
    s.finish()


def test_a_copy_that_fell_behind_further_than_is_remembered_is_not_used():
    s = server()
    s.submit(small_request("a", range(40), max_tokens=30))
    s.step()
    s.copy_now(0)
    s.uncopied.clear()
    for _ in range(STEPS_KEPT + 1):
        s.step()
        s.uncopied.clear()
    s.lose_protected([0], worth=everything)
    assert s.state.waiting["a"].recoverable is None
    s.close()


def test_a_restored_request_of_which_nothing_is_left_to_copy_goes_on():
    s = server(piece=3)
    s.submit(small_request("a", range(40), max_tokens=10))
    s.step()
    s.step()
    s.copy_now(0)
    s.lose_protected([0], worth=everything)
    s._move(drop_recoverable(s.state, []))
    s.restore()
    s._move(mark_restored(s.state, "a", s.state.running["a"].recoverable.count))
    assert not s.state.running["a"].restoring
    s.close()
