"""Refuses requests on arrival that could only end after their deadline."""

from serving.engine.fairness import count_ahead
from serving.engine.queue_time import QueueTime
from serving.engine.state import EngineState
from serving.errors import DeadlineExceeded, QueueFull
from serving.protocol.request import Request


class Admission:
    """Measures how fast the queue moves, and refuses requests whose wait would exceed their deadline."""

    def __init__(self, queue_time: QueueTime | None = None) -> None:
        self._queue_time = queue_time or QueueTime()

    def check(self, request: Request, state: EngineState, now: float) -> None:
        """Raises DeadlineExceeded or QueueFull when the request, which comes at `now` (monotonic), could only end after
        its deadline."""
        if request.deadline is None:
            return
        left = request.deadline - now
        if left <= 0:
            raise DeadlineExceeded("the deadline had passed when the request came.")
        ahead = count_ahead(state.waiting.values(), request.owner, request.sampling.priority)
        wait = self._queue_time.wait_s(ahead)
        if wait is not None and wait > left:
            raise QueueFull(
                f"the request would wait {wait:.1f} s for its turn, and its deadline is in {left:.1f} s. "
                "Try again later, or give it more time.",
                retry_after_s=self.retry_after_s(state),
            )

    def retry_after_s(self, state: EngineState) -> float:
        """Seconds after which a refused client should try again."""
        return self._queue_time.retry_s(len(state.waiting))

    def record(self, now: float, *, left: int, queued: bool) -> None:
        """Take in that `left` requests left the queue at `now` (monotonic), and whether others still wait."""
        self._queue_time = self._queue_time.observed(now, left=left, queued=queued)
