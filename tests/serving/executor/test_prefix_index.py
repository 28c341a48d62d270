"""The page keys that ranks know suffice for another front, and are never of pages that were written since."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.page_pool import KEY_BYTES, PagePool, check_pages, hash_pages
from serving.executor.prefix_index import PrefixIndex, PrefixUpdates, read_pages, read_snapshots
from serving.proto.moejax.v1 import link_pb2

TOTAL = 6
PAGES = st.integers(0, TOTAL - 1)
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), PAGES, st.integers(0, 30)),
        st.tuples(st.just("write"), PAGES, st.just(0)),
        st.tuples(st.just("adopt"), PAGES, st.just(0)),
        st.tuples(st.just("step"), PAGES, st.just(0)),
    ),
    max_size=40,
)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


@given(ACTS)
def test_a_rank_knows_the_sent_keys_of_pages_that_were_not_written_since(acts: list[tuple[str, int, int]]) -> None:
    """`content` is what really is in the pages. A step that writes a page says that the front knows it no more."""
    content: dict[int, bytes] = {}
    known: dict[int, bytes] = {}
    rank, news = PrefixIndex(), PrefixUpdates()

    def step(*pages: int) -> None:
        if (full := news.update_for(0, known)) is not None:
            rank.add(full)
        rank.invalidate(np.array(pages, np.int32))

    for what, page, number in acts:
        if what == "fill" and page not in known:
            content[page] = key(number)
            step(page)
            known = {**known, page: key(number)}
        elif what == "write":
            content.pop(page, None)
            known = {other: name for other, name in known.items() if other != page}
            step(page)
        elif what == "adopt":
            rank.truncate(0)
            news.reset()
        elif what == "step":
            step()
            assert read_pages(rank.message()) == known
        assert read_pages(rank.message()).items() <= content.items()


def test_no_key_of_a_page_is_sent_twice() -> None:
    news, keys = PrefixUpdates(), {1: key(1)}
    first = news.update_for(0, keys)
    assert first is not None
    assert read_pages(first) == keys
    assert news.update_for(0, keys) is None
    more = news.update_for(0, {**keys, 2: key(2)})
    assert more is not None
    assert read_pages(more) == {2: key(2)}
    assert news.update_for(1, keys) == first, "another rank is another matter"


@given(st.dictionaries(st.integers(0, 2 * TOTAL), st.integers(0, 4).map(key)))
def test_a_pool_that_holds_known_pages_is_whole_and_finds_them(keys: dict[int, bytes]) -> None:
    pool = PagePool.with_cached_pages(TOTAL, keys)
    check_pages(pool, [])
    assert pool.available == TOTAL
    assert set(pool.index) == {name for page, name in keys.items() if page < TOTAL}
    assert all(keys[page] == name for name, page in pool.index.items())


def test_prefixes_of_a_front_before_are_found_page_by_page() -> None:
    tokens = list(range(40))
    names = hash_pages(tokens, 8, b"")
    pool = PagePool.with_cached_pages(TOTAL, dict(zip((4, 0, 3), names, strict=False)))
    assert pool.match(names) == (4, 0, 3)


def test_the_last_pages_go_first() -> None:
    pool, taken = PagePool.with_cached_pages(3, {0: key(0), 1: key(1), 2: key(2)}).alloc(1)
    assert taken == (2,)
    assert pool.match([key(0), key(1)]) == (0, 1)


def test_a_message_that_names_no_page_changes_nothing() -> None:
    rank = PrefixIndex()
    rank.add(link_pb2.FullPages())
    assert read_pages(rank.message()) == {}


def test_a_snapshot_is_known_until_its_place_is_written_again() -> None:
    rank, news = PrefixIndex(), PrefixUpdates()
    pages, snapshots = {0: key(0), 3: key(1)}, {key(0): 12, key(1): 13}
    full = news.update_for(0, pages, snapshots)
    assert full is not None
    assert news.update_for(0, pages, snapshots) is None
    rank.add(full)
    assert (read_pages(rank.message()), read_snapshots(rank.message())) == (pages, {12: key(0), 13: key(1)})
    rank.invalidate_snapshots(np.array([12, 1 << 30, 0]))
    assert read_snapshots(rank.message()) == {13: key(1)}
    more = news.update_for(0, pages, {key(1): 13, key(0): 14})
    assert more is not None
    assert (read_pages(more), read_snapshots(more)) == ({}, {14: key(0)})
    rank.add(more)
    rank.truncate(2)
    assert read_snapshots(rank.message()) == {14: key(0)}, "the page of the other one is not kept"
    news.reset()
    assert news.update_for(0, pages, snapshots) == full


def test_a_rank_with_known_pages_has_the_snapshots_behind_them() -> None:
    pool = PagePool.with_cached_pages(4, {0: key(0), 2: key(1)}, {12: key(1), 13: key(5)})
    assert pool.snapshots.places == {key(1): 12}
    assert pool.match([key(0), key(1)], states=True) == (0, 2)
    assert pool.match([key(0)], states=True) == ()
