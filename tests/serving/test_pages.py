import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.pages import PagePool, check_pages

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_pages_are_handed_out_from_the_first_upwards():
    pool, first = PagePool.of(4).alloc(2)
    pool, second = pool.alloc(2)
    assert (first, second) == ((0, 1), (2, 3))
    assert pool.used == 4


def test_pages_given_back_are_the_next_to_be_taken():
    pool, pages = PagePool.of(8).alloc(5)
    pool, again = pool.release(pages[1:3]).alloc(3)
    assert again == (1, 2, 5)


@UNHURRIED
@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 12))))
def test_every_page_is_free_or_owned_once_under_any_order_of_takes_and_returns(total, events):
    pool, owned = PagePool.of(total), []
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
    before = PagePool.of(3)
    before.alloc(2)
    assert before == PagePool.of(3)


def test_a_pool_never_gives_what_it_does_not_have():
    with pytest.raises(AssertionError, match="3 pages wanted, 2 of 2 free"):
        PagePool.of(2).alloc(3)


def test_a_page_given_back_twice_is_noticed():
    pool, pages = PagePool.of(2).alloc(1)
    with pytest.raises(AssertionError, match="3 pages free in a pool of 2"):
        pool.release(pages).release(pages)


@pytest.mark.parametrize(
    ("owned", "message"),
    [((0, 0, 1), r"twice \[0\]"), ((0,), r"lost \[1\]"), ((0, 1, 7), r"not ours \[7\]")],
)
def test_a_broken_pool_is_named(owned, message):
    with pytest.raises(AssertionError, match=message):
        check_pages(PagePool(3, (2,)), owned)


def test_a_pool_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="-1 pages"):
        PagePool.of(-1)
