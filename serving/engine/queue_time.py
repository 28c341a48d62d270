"""The measured rate at which the queue empties, and the wait it predicts for a new request. A value."""

import dataclasses
import math

MEMORY_S = 10.0
"""Time constant of the decay: an observation this old counts 1/e."""
LEAST_S = 1.0
"""Seconds with a queue before the rate is used."""
LONGEST_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0
"""Sent to clients while the rate is unknown."""


@dataclasses.dataclass(frozen=True)
class QueueTime:
    """Requests that left the queue for a rank, and the seconds in which the queue was not empty, both decaying.

    `at` is the time of the last observation, on the monotonic clock; `queued` is whether requests were waiting then.
    """

    left: float = 0.0
    seconds: float = 0.0
    at: float | None = None
    queued: bool = False

    def observed(self, now: float, *, left: int, queued: bool) -> "QueueTime":
        """The value after `left` more requests were given a rank. Time with an empty queue says nothing about its
        rate."""
        if self.at is None or not self.queued:
            return QueueTime(self.left, self.seconds, now, queued)
        passed = now - self.at
        fade = math.exp(-passed / MEMORY_S)
        return QueueTime(self.left * fade + left, self.seconds * fade + passed, now, queued)

    def wait_s(self, ahead: int) -> float | None:
        """Seconds until `ahead` requests have been given a rank; None while the rate is unknown."""
        if ahead == 0:
            return 0.0
        if self.seconds < LEAST_S or self.left < 1:
            return None
        return ahead * self.seconds / self.left

    def retry_s(self, ahead: int) -> float:
        """Seconds after which a client that is refused now should try again: when the waiting requests have left."""
        wait = self.wait_s(ahead)
        return UNKNOWN_RETRY_S if wait is None else min(max(wait, UNKNOWN_RETRY_S), LONGEST_RETRY_S)
