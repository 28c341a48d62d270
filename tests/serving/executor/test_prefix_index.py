"""What ranks are told of their pages is enough for another front, and never too much."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.page_index import PageIndex, PageNews, read
from serving.pages import KEY_BYTES, PagePool, check_pages, page_keys
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
def test_a_rank_knows_what_it_was_told_of_pages_that_were_not_written_since(acts: list[tuple[str, int, int]]) -> None:
    """`content` is what really is in the pages. A step that writes a page says that the front knows it no more."""
    content: dict[int, bytes] = {}
    known: dict[int, bytes] = {}
    rank, news = PageIndex(), PageNews()

    def step(*pages: int) -> None:
        if (full := news.of(0, known)) is not None:
            rank.note(full)
        rank.wrote(np.array(pages, np.int32))

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
            rank.keep(0)
            news.again()
        elif what == "step":
            step()
            assert read(rank.hello()) == known
        assert read(rank.hello()).items() <= content.items()


def test_nothing_is_told_twice() -> None:
    news, keys = PageNews(), {1: key(1)}
    first = news.of(0, keys)
    assert first is not None
    assert read(first) == keys
    assert news.of(0, keys) is None
    more = news.of(0, {**keys, 2: key(2)})
    assert more is not None
    assert read(more) == {2: key(2)}
    assert news.of(1, keys) == first, "another rank is another matter"


@given(st.dictionaries(st.integers(0, 2 * TOTAL), st.integers(0, 4).map(key)))
def test_a_pool_that_holds_known_pages_is_whole_and_finds_them(keys: dict[int, bytes]) -> None:
    pool = PagePool.holding(TOTAL, keys)
    check_pages(pool, [])
    assert pool.available == TOTAL
    assert set(pool.index) == {name for page, name in keys.items() if page < TOTAL}
    assert all(keys[page] == name for name, page in pool.index.items())


def test_prefixes_of_a_front_before_are_found_page_by_page() -> None:
    tokens = list(range(40))
    names = page_keys(tokens, 8, b"")
    pool = PagePool.holding(TOTAL, dict(zip((4, 0, 3), names, strict=False)))
    assert pool.match(names) == (4, 0, 3)


def test_the_last_pages_go_first() -> None:
    pool, taken = PagePool.holding(3, {0: key(0), 1: key(1), 2: key(2)}).alloc(1)
    assert taken == (2,)
    assert pool.match([key(0), key(1)]) == (0, 1)


def test_a_message_that_names_no_page_changes_nothing() -> None:
    rank = PageIndex()
    rank.note(link_pb2.FullPages())
    assert read(rank.hello()) == {}
