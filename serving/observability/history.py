"""Keeps the figures of a server for each second of the last ten minutes and each minute of the last day."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence

from serving.errors import MoejaxError
from serving.protocol.status import Status

SECONDS = 600
MINUTES = 1440
_MINUTE_S = 60


@dataclasses.dataclass(frozen=True)
class Sample:
    """The figures of an interval that ends `at`, in seconds since the epoch. Of a minute: the mean rate, the fewest
    ranks that served, the most of the other figures, and all failures."""

    at: float
    tokens_per_s: float
    running: int
    waiting: int
    serving: int
    masked: int
    failed: int
    """Requests that failed within the interval."""


class History:
    """The samples of one process, in memory: the process after it begins with none."""

    def __init__(self) -> None:
        self._seconds = collections.deque[Sample](maxlen=SECONDS)
        self._minutes = collections.deque[Sample](maxlen=MINUTES)
        self._open: list[Sample] = []
        self._last: tuple[float, int, int] | None = None

    def add(self, at: float, status: Status) -> None:
        """Add the status at a time. Its counters are compared with those of the call before."""
        before, self._last = self._last, (at, status.tokens, status.failed)
        if before is None or at <= before[0] or status.tokens < before[1]:  # the counters of another front
            return
        sample = Sample(
            at=at,
            tokens_per_s=(status.tokens - before[1]) / (at - before[0]),
            running=status.running,
            waiting=status.waiting,
            serving=sum(rank.state == "serving" for rank in status.ranks),
            masked=len(status.masked),
            failed=status.failed - before[2],
        )
        self._seconds.append(sample)
        if self._open and int(at) // _MINUTE_S != int(self._open[0].at) // _MINUTE_S:
            self._minutes.append(_joined(self._open))
            self._open = []
        self._open.append(sample)

    def columns(self, *, minutes: bool) -> dict[str, list[float]]:
        """All samples by field, the oldest first: of seconds, or of minutes with the one that has begun."""
        samples = [*self._minutes, *([_joined(self._open)] if self._open else [])] if minutes else self._seconds
        return {
            field.name: [round(getattr(sample, field.name), 2) for sample in samples]
            for field in dataclasses.fields(Sample)
        }

    async def follow(self, status: Callable[[], Awaitable[Status]]) -> None:
        """Add the status every second until this is cancelled. Leaves out seconds in which no front has one."""
        while True:
            with contextlib.suppress(MoejaxError):
                self.add(time.time(), await status())
            await asyncio.sleep(1.0)


def _joined(samples: Sequence[Sample]) -> Sample:
    return Sample(
        at=samples[-1].at,
        tokens_per_s=sum(sample.tokens_per_s for sample in samples) / len(samples),
        running=max(sample.running for sample in samples),
        waiting=max(sample.waiting for sample in samples),
        serving=min(sample.serving for sample in samples),
        masked=max(sample.masked for sample in samples),
        failed=sum(sample.failed for sample in samples),
    )
