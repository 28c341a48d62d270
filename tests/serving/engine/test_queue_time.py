from hypothesis import given
from hypothesis import strategies as st

from serving.engine.queue_time import LONGEST_RETRY_S, UNKNOWN_RETRY_S, QueueTime


def after(steps) -> QueueTime:
    backlog, now = QueueTime(), 100.0
    for passed, left, queued in steps:
        now += passed
        backlog = backlog.observed(now, left=left, queued=queued)
    return backlog


def test_nothing_is_said_before_anything_was_seen():
    assert QueueTime().wait_s(3) is None
    assert QueueTime().wait_s(0) == 0
    assert QueueTime().retry_s(50) == UNKNOWN_RETRY_S


def test_a_steady_queue_gives_its_own_rate():
    backlog = after([(0.1, 1, True)] * 600)
    assert abs(backlog.wait_s(20) - 2) < 0.1


def test_a_new_rate_is_believed_after_a_while():
    backlog = after([(0.1, 1, True)] * 600 + [(0.1, 0, True), (0.1, 1, True)] * 300)
    assert abs(backlog.wait_s(20) - 4) < 0.2


def test_time_without_a_queue_says_nothing_of_its_rate():
    busy = [(0.1, 1, True)] * 300
    assert after([*busy, (0.1, 1, False), (1000, 0, True)]).wait_s(10) == after([*busy, (0.1, 1, True)]).wait_s(10)


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 9), st.booleans()), max_size=30), st.integers(0, 10_000))
def test_clients_get_a_retry_time_that_is_neither_zero_nor_infinite(steps, ahead):
    backlog = after(steps)
    assert UNKNOWN_RETRY_S <= backlog.retry_s(ahead) <= LONGEST_RETRY_S
    waits = [wait for n in (1, 2, 5) if (wait := backlog.wait_s(n)) is not None]
    assert waits == sorted(waits)
