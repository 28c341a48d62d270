"""How fast the queue empties, measured, and what that means for a request that comes now. A value."""

import dataclasses
import math

MEMORY_S = 10.0
"""What was seen so long ago counts a third."""
LEAST_S = 1.0
"""So much time with a queue must have been seen before a rate is believed."""
LONGEST_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0
"""What a client is told before a rate is known."""


@dataclasses.dataclass(frozen=True)
class Backlog:
    """Requests that left the queue for a rank, and the seconds in which there was one, older ones counting less.

    `at` is the last look, in seconds of the monotonic clock; `queued` whether requests were waiting then.
    """

    left: float = 0.0
    seconds: float = 0.0
    at: float | None = None
    queued: bool = False

    def looked(self, now: float, *, left: int, queued: bool) -> "Backlog":
        """Since the last look `left` requests have got a place. Time without a queue tells nothing of its rate."""
        if self.at is None or not self.queued:
            return Backlog(self.left, self.seconds, now, queued)
        passed = now - self.at
        fade = math.exp(-passed / MEMORY_S)
        return Backlog(self.left * fade + left, self.seconds * fade + passed, now, queued)

    def wait_s(self, ahead: int) -> float | None:
        """Seconds until `ahead` requests have got a place; None when that is not known."""
        if ahead == 0:
            return 0.0
        if self.seconds < LEAST_S or self.left < 1:
            return None
        return ahead * self.seconds / self.left

    def retry_s(self, ahead: int) -> float:
        """When a client that is refused now should come back: when what waits has left."""
        wait = self.wait_s(ahead)
        return UNKNOWN_RETRY_S if wait is None else min(max(wait, UNKNOWN_RETRY_S), LONGEST_RETRY_S)
