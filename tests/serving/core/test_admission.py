"""Which requests are refused when they arrive, instead of being ended late."""

import dataclasses

import pytest

from serving.core.admission import Admission
from serving.engine.queue_time import QueueTime
from serving.errors import DeadlineExceeded, QueueFull
from simulation.hand_model import small_limits, small_request
from tests.support.fake_engine import FakeEngine

NOW = 1000.0
ONE_EACH_SECOND = QueueTime(left=10.0, seconds=10.0)


def check(waiting: int, queue_time: QueueTime, left_s: float | None) -> None:
    """Check a request that comes when others wait, with so many seconds to its deadline."""
    server = FakeEngine.start(small_limits(max_queue=100), {0: 16})
    for number in range(waiting):
        server.submit(small_request(f"w{number}"))
    deadline = None if left_s is None else NOW + left_s
    Admission(queue_time).check(dataclasses.replace(small_request("new"), deadline=deadline), server.state, NOW)


def test_a_request_that_can_only_end_late_is_refused_with_the_time_the_queue_takes():
    with pytest.raises(QueueFull, match=r"would wait 20\.0 s for its turn, and its deadline is in 5\.0 s") as refusal:
        check(20, ONE_EACH_SECOND, 5.0)
    assert refusal.value.retry_after_s == 20


def test_a_deadline_that_has_passed_is_no_request():
    with pytest.raises(DeadlineExceeded):
        check(0, ONE_EACH_SECOND, -1.0)


@pytest.mark.parametrize(("waiting", "left_s"), [(20, None), (20, 60.0), (0, 0.5)])
def test_requests_that_can_be_in_time_are_taken(waiting, left_s):
    check(waiting, ONE_EACH_SECOND, left_s)


def test_nothing_is_refused_on_a_rate_nobody_has_measured():
    check(20, QueueTime(), 0.5)
