import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engine.page_pool import PagePool, check_pages, hash_pages

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_pages_are_handed_out_from_the_first_upwards():
    pool, first = PagePool.empty(4).alloc(2)
    pool, second = pool.alloc(2)
    assert (first, second) == ((0, 1), (2, 3))
    assert pool.used == 4


def test_pages_given_back_are_the_next_to_be_taken():
    pool, pages = PagePool.empty(8).alloc(5)
    pool, again = pool.release(pages[1:3]).alloc(3)
    assert again == (1, 2, 5)


def sealed(total: int, count: int) -> tuple[PagePool, tuple[int, ...]]:
    """A pool of which `count` pages were taken, sealed with keys b"0", b"1" ... and released."""
    pool, pages = PagePool.empty(total).alloc(count)
    for number, page in enumerate(pages):
        pool = pool.seal(page, str(number).encode())
    return pool.release(pages), pages


def test_content_that_is_known_outlives_its_holder():
    pool, pages = sealed(4, 3)
    assert pool.match([b"0", b"1", b"x", b"2"]) == pages[:2]
    assert (pool.used, pool.available, pool.extent) == (0, 4, 3)
    pool = pool.share(pages[:2]).share(pages[:1])
    assert (pool.used, pool.available, pool.available_after_sharing(pages)) == (2, 2, 1)
    pool = pool.release(pages[:2])
    assert pool.used == 1
    check_pages(pool, pages[:1])


def test_free_pages_go_first_then_the_content_let_go_first_the_end_of_a_prefix_before_its_beginning():
    pool, pages = sealed(4, 3)
    pool, taken = pool.alloc(2)
    assert taken == (3, pages[2])
    assert pool.match([b"0", b"1", b"2"]) == pages[:2]
    check_pages(pool, taken)


def test_a_second_page_of_the_same_content_stays_unknown():
    pool, pages = PagePool.empty(3).alloc(2)
    pool = pool.seal(pages[0], b"k").seal(pages[1], b"k").release(pages)
    assert pool.evictable == pages[:1]
    assert len(pool.free) == 2


def test_a_key_says_everything_up_to_the_end_of_its_page():
    keys = hash_pages(range(20), 8, b"")
    assert len(keys) == 2
    assert keys == hash_pages(range(16), 8, b"")
    assert hash_pages(range(8, 16), 8, keys[0]) == keys[1:]
    others = hash_pages([9, *range(1, 16)], 8, b""), hash_pages(range(16), 8, b"root"), hash_pages(range(8, 24), 8, b"")
    assert len({keys[1], *(other[1] for other in others)}) == 4


@UNHURRIED
@given(
    st.integers(1, 10),
    st.lists(st.tuples(st.sampled_from(("take", "return", "seal", "share")), st.integers(0, 9), st.integers(0, 9))),
)
def test_pages_are_conserved_under_any_order_of_takes_seals_shares_and_returns(total, events):
    pool, owned, content = PagePool.empty(total), [], {}
    for what, a, b in events:
        if what == "take" and a <= pool.available:
            pool, pages = pool.alloc(a)
            for page in pages:
                content.pop(page, None)
            owned.append(pages)
        elif what == "return" and owned:
            pool = pool.release(owned.pop(a % len(owned)))
        elif what == "seal" and owned and owned[a % len(owned)]:
            page, key = owned[a % len(owned)][0], bytes([b])
            if key not in pool.index and page not in pool.keys:
                content[page] = key
            pool = pool.seal(page, key)
        elif what == "share" and a != b and (found := pool.match([bytes([a]), bytes([b])])):
            pool = pool.share(found)
            owned.append(found)
        check_pages(pool, [page for pages in owned for page in pages])
        assert dict(pool.keys) == content


@UNHURRIED
@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 12))))
def test_every_page_is_free_or_owned_once_under_any_order_of_takes_and_returns(total, events):
    pool, owned = PagePool.empty(total), []
    for take, count in events:
        if take and count <= len(pool.free):
            pool, pages = pool.alloc(count)
            assert len(pages) == count
            owned.append(pages)
        elif not take and owned:
            pool = pool.release(owned.pop(count % len(owned)))
        check_pages(pool, [page for pages in owned for page in pages])
        assert pool.used == sum(map(len, owned))


def test_the_pool_before_a_take_is_unchanged():
    before = PagePool.empty(3)
    before.alloc(2)
    assert before == PagePool.empty(3)


def test_a_pool_never_gives_what_it_does_not_have():
    with pytest.raises(AssertionError, match="3 pages wanted, 2 of 2 available"):
        PagePool.empty(2).alloc(3)


def test_a_page_given_back_twice_is_noticed():
    pool, pages = PagePool.empty(2).alloc(1)
    with pytest.raises(AssertionError, match="released without a holder"):
        pool.release(pages).release(pages)


@pytest.mark.parametrize(
    ("owned", "message"),
    [((0, 0, 1), r"otherwise than counted \[0\]"), ((0,), r"lost \[1\]"), ((0, 1, 7), r"not ours \[7\]")],
)
def test_a_broken_pool_is_named(owned, message):
    with pytest.raises(AssertionError, match=message):
        check_pages(PagePool(3, (2,), ref_counts=dict.fromkeys(owned, 1)), owned)


def test_a_pool_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool.empty(-1)
