"""What the loop refuses when it comes, instead of ending it late."""

import dataclasses
import time

import pytest

from serving.backlog import Backlog
from serving.errors import DeadlineExceeded, QueueFull
from serving.loop import Loop
from tests.fakes import FakeServer, small_limits, small_request


class Queue:
    """As much of a loop as admission looks at."""

    def __init__(self, waiting: int, backlog: Backlog) -> None:
        server = FakeServer.start(small_limits(max_queue=100), {0: 16})
        for number in range(waiting):
            server.submit(small_request(f"w{number}"))
        self.state, self._backlog = server.state, backlog


MEASURED = Backlog(left=10.0, seconds=10.0)
"""One request a second."""


def check(queue: Queue, left_s: float | None) -> None:
    deadline = None if left_s is None else time.monotonic() + left_s
    Loop._check_wait(queue, dataclasses.replace(small_request("new"), deadline=deadline))  # type: ignore[arg-type]


def test_a_request_that_can_only_end_late_is_refused_with_the_time_the_queue_takes():
    with pytest.raises(QueueFull, match=r"would wait 20\.0 s for its turn, and its deadline is in 5\.0 s") as refusal:
        check(Queue(20, MEASURED), 5.0)
    assert refusal.value.retry_after_s == 20


def test_a_deadline_that_has_passed_is_no_request():
    with pytest.raises(DeadlineExceeded):
        check(Queue(0, MEASURED), -1.0)


@pytest.mark.parametrize(("waiting", "left_s"), [(20, None), (20, 60.0), (0, 0.5)])
def test_requests_that_can_be_in_time_are_taken(waiting, left_s):
    check(Queue(waiting, MEASURED), left_s)


def test_nothing_is_refused_on_a_rate_nobody_has_measured():
    check(Queue(20, Backlog()), 0.5)
