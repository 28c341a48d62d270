"""Which ranks to suspect, judged from what was seen of them. Pure: the time is an argument."""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from typing import Literal

Kind = Literal["exited", "stream", "error", "stopped", "heartbeat", "step", "drained"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthSettings:
    """When a rank is late: above a floor in seconds, and above a factor times the 99th percentile seen."""

    heartbeat_floor_s: float
    step_floor_s: float
    heartbeat_factor: float = 3.0
    step_factor: float = 10.0
    stopped_grace_s: float = 0.1
    """Without a heartbeat this long, a process that the kernel says is stopped is suspected."""
    together_limit_s: float = 5.0
    """Ranks that are all late together are excused until each is overdue by this much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """One rank, as the front sees it. Times are of its monotonic clock, gaps and durations recent ones."""

    rank: int
    last_heartbeat: float
    heartbeat_gaps: Collection[float] = ()
    exit_code: int | None = None
    """Of the process, once it has ended; negative for a signal."""
    stream_error: str | None = None
    """Why the rank's stream broke."""
    error: str | None = None
    """What the rank itself reported."""
    process_state: str = ""
    """The letter of /proc/PID/stat, where it can be had."""
    step_sent: float | None = None
    """When the step it has not answered yet was sent to it."""
    step_times: Collection[float] = ()


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a rank is suspected."""

    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def suspects(
    observations: Iterable[Observation], now: float, settings: HealthSettings, *, front_lag_s: float = 0.0
) -> dict[int, Cause]:
    """{rank: cause}, the surest cause of each.

    `front_lag_s` is how long the front itself stood still of late: gaps are counted without it. Ranks that
    are all late together are excused: a late heartbeat then says that the machine stalls, a late step that
    one of them holds up the others (see `stuck`). The excuse ends when all are overdue by `together_limit_s`.
    """
    seen, moment = list(observations), now - front_lag_s
    found: dict[int, Cause] = {}
    for judge in (_certain, _stopped):
        for o in seen:
            cause = judge(o, moment, settings)
            if cause is not None:
                found.setdefault(o.rank, cause)
    clocks: tuple[tuple[Kind, Callable[[Observation, float, HealthSettings], float]], ...]
    clocks = (("heartbeat", _heartbeat_overdue), ("step", _step_overdue))
    for kind, overdue in clocks:
        late = {o.rank: overdue(o, moment, settings) for o in seen if o.rank not in found}
        least = min(late.values(), default=0.0)
        if not 0 < least <= settings.together_limit_s:
            found |= {rank: Cause(kind, f"{s:.3f} s overdue") for rank, s in late.items() if s > 0}
    return found


def stuck(
    observations: Iterable[Observation], now: float, settings: HealthSettings, *, front_lag_s: float = 0.0
) -> bool:
    """Whether every rank is late with the step, so that none can be named.

    The way out is to abort the step on all and make it again: who does not come back is late alone.
    """
    overdue = [_step_overdue(o, now - front_lag_s, settings) for o in observations]
    return min(overdue, default=0.0) > 0


def p99(values: Collection[float]) -> float:
    """The 99th percentile (nearest rank), 0 of nothing."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def _certain(o: Observation, moment: float, settings: HealthSettings) -> Cause | None:
    """What needs no clock."""
    if o.exit_code is not None:
        how = f"signal {-o.exit_code}" if o.exit_code < 0 else f"code {o.exit_code}"
        return Cause("exited", f"process ended with {how}")
    if o.process_state in ("Z", "X"):
        return Cause("exited", "process ended")
    if o.error is not None:
        return Cause("error", o.error)
    if o.stream_error is not None:
        return Cause("stream", o.stream_error)
    return None


def _stopped(o: Observation, moment: float, settings: HealthSettings) -> Cause | None:
    """A process the kernel says is stopped (a debugger's stop is another letter)."""
    gap = moment - o.last_heartbeat
    if o.process_state == "T" and gap > settings.stopped_grace_s:
        return Cause("stopped", f"process stopped, no heartbeat for {gap:.3f} s")
    return None


def _heartbeat_overdue(o: Observation, moment: float, settings: HealthSettings) -> float:
    """Seconds the heartbeat is past the longest gap allowed; above 0 is late."""
    gap = moment - o.last_heartbeat
    return _overdue(gap, settings.heartbeat_floor_s, settings.heartbeat_factor, o.heartbeat_gaps)


def _step_overdue(o: Observation, moment: float, settings: HealthSettings) -> float:
    """Seconds the step is past the longest time allowed; above 0 is late."""
    if o.step_sent is None:
        return 0.0
    return _overdue(moment - o.step_sent, settings.step_floor_s, settings.step_factor, o.step_times)


def _overdue(took: float, floor: float, factor: float, before: Collection[float]) -> float:
    """How far past the floor and past what was usual. What is under the floor is not late whatever was usual: nearly
    every look ends there, and need not sort."""
    return took - (floor if took <= floor else max(floor, factor * p99(before)))
