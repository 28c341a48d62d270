"""Decides which ranks count as failed, from what the front observed of them. Pure: the time is an argument."""

import dataclasses
import math
import signal
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

Kind = Literal["exited", "raised", "stream", "error", "stopped", "heartbeat", "step", "command", "drained"]

CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS})
"""Signals by which a process ends through its own fault. SIGKILL is not among them: the fence sends it, operators do,
and so does a kernel without memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailureDetectorSettings:
    """When a rank is late: above a floor in seconds, and above a factor times the 99th percentile of its recent
    times."""

    heartbeat_floor_s: float
    step_floor_s: float
    command_limit_s: float = 120.0
    """Seconds that a rank has for a command whose caller sets no limit."""
    heartbeat_factor: float = 3.0
    step_factor: float = 10.0
    stopped_grace_s: float = 0.1
    """Seconds without a heartbeat after which a process that the kernel has stopped counts as failed."""
    all_late_limit_s: float = 5.0
    """Seconds by which each rank must be overdue before ranks that are all late together count as failed."""
    starved_factor: float = 2.0
    """The most by which a limit is multiplied for a rank whose process waits for a processor."""


@dataclasses.dataclass(frozen=True)
class Delay:
    """How long a rank's process, and the front itself, have waited for a processor while the front waited for the rank:
    evidence that it is starved and does not hang."""

    process_s: float = 0.0
    front_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Both together."""
        return self.process_s + self.front_s


NO_DELAY = Delay()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observation:
    """The front's observations of one rank. Times are of the front's monotonic clock, gaps and durations are recent."""

    rank: int
    last_heartbeat: float
    heartbeat_gaps: Collection[float] = ()
    stream_error: str | None = None
    """Why the rank's stream broke."""
    heartbeat_delay: Delay = NO_DELAY
    """The delay since about the middle of its silence, as far as known."""
    process_state: str = ""
    """The state letter of /proc/PID/stat; empty where nobody reports it."""
    step_sent_at: float | None = None
    """When the step that it has not answered yet was sent to it."""
    step_times: Collection[float] = ()
    step_delay: Delay = NO_DELAY
    """As `heartbeat_delay`, of the step that it has not answered yet."""
    in_plan: bool = True
    """It takes part in the steps. A rank that joins does not, and is no sign that a late rank alone is late."""
    command_since: float | None = None
    """When it could begin with the command that it obeys now."""
    command_delay: Delay = NO_DELAY
    """As `heartbeat_delay`, of that command."""


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a rank counts as failed."""

    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def failed_of_itself(cause: Cause, exit_code: int | None) -> bool:
    """Whether a rank was lost through an exception or a crash of its own, and not by a signal from outside, a stopped
    process, or a connection. `exit_code` is minus the signal for a process that one ended, None if unknown."""
    if cause.kind == "raised":
        return True
    if exit_code is None or cause.kind not in ("exited", "stream", "heartbeat", "step", "command"):
        return False
    return exit_code > 0 or -exit_code in CRASHES


@dataclasses.dataclass(frozen=True)
class Lateness:
    """How late a rank is with its heartbeat or its step. `limit_s` is the longest time allowed to any rank, and
    `extended_s` the longest one allowed to this rank because of the delay."""

    took_s: float
    limit_s: float
    extended_s: float
    delay: Delay = NO_DELAY

    @property
    def overdue_s(self) -> float:
        """Seconds past the extended limit; above 0 is late."""
        return self.took_s - self.extended_s

    @property
    def is_excused(self) -> bool:
        """Whether it is past the limit, and only the delay keeps it from being late."""
        return self.limit_s < self.took_s <= self.extended_s

    def describe(self, what: str, state: str) -> str:
        """The lateness and its evidence in words, where `what` took so long."""
        evidence = [f"limit {self.extended_s:.3f} s"]
        evidence += [f"process state {state}"] if state else []
        evidence += [f"its process waited {self.delay.process_s:.3f} s for a processor"] if self.delay.process_s else []
        evidence += [f"the front {self.delay.front_s:.3f} s"] if self.delay.front_s else []
        return f"{what} for {self.took_s:.3f} s ({', '.join(evidence)})"


IN_TIME = Lateness(0.0, math.inf, math.inf)


def late_or_dead(
    observations: Iterable[Observation], now: float, settings: FailureDetectorSettings, *, front_lag_s: float = 0.0
) -> dict[int, Cause]:
    """The ranks that count as failed, each with its surest cause.

    `front_lag_s` is how long the front itself stood still of late: it is subtracted from gaps. Ranks that are all late
    together are excused: late heartbeats of all mean that the machine stalls, a late step of all that one rank holds up
    the others (see `all_late`). They are excused until all are overdue by `all_late_limit_s`; for ever if they are late
    with commands: what they read is slow then, and not they. A rank whose process
    waits for a processor is given as much longer, up to `starved_factor` times its limit; and so it is again for the
    time in which the front itself stood still and could receive nothing.
    """
    seen, moment = list(observations), now - front_lag_s
    found: dict[int, Cause] = {}
    for judge in (_certain, _stopped):
        for o in seen:
            cause = judge(o, moment, settings)
            if cause is not None:
                found.setdefault(o.rank, cause)
    beats = [(o, heartbeat_lateness(o, moment, settings)) for o in seen if o.rank not in found]
    least = min((late.took_s - late.limit_s for _, late in beats), default=0.0)
    if not 0 < least <= settings.all_late_limit_s:
        for o, late in beats:
            if late.overdue_s > 0:
                found[o.rank] = Cause("heartbeat", late.describe("no heartbeat", o.process_state))
    left = [o for o in seen if o.rank not in found]
    obeying = [o for o in left if o.in_plan or o.command_since is not None]
    commands = [command_lateness(o, moment, settings) for o in obeying]
    if len(obeying) == 1 or min((late.overdue_s for late in commands), default=0.0) <= 0:
        for o, late in zip(obeying, commands, strict=True):
            if late.overdue_s > 0:
                found[o.rank] = Cause("command", late.describe("a command was not answered", o.process_state))
    left = [o for o in left if o.rank not in found and _steps(o)]
    steps = step_lateness(left, moment, settings)
    least = min((late.overdue_s for late in steps), default=0.0)
    if not 0 < least <= settings.all_late_limit_s:
        for o, late in zip(left, steps, strict=True):
            if late.overdue_s > 0:
                found[o.rank] = Cause("step", late.describe("a step was not done", o.process_state))
    return found


def all_late(
    observations: Iterable[Observation], now: float, settings: FailureDetectorSettings, *, front_lag_s: float = 0.0
) -> bool:
    """Whether every rank is late with the step, so that none counts as failed. The executor then aborts the exchange,
    and a rank that is stuck does not answer that."""
    stepping = [o for o in observations if _steps(o)]
    overdue = [late.overdue_s for late in step_lateness(stepping, now - front_lag_s, settings)]
    return min(overdue, default=0.0) > 0


def _steps(o: Observation) -> bool:
    return o.in_plan or o.step_sent_at is not None


def heartbeat_lateness(o: Observation, moment: float, settings: FailureDetectorSettings) -> Lateness:
    """How late the heartbeat of a rank is at a moment."""
    gap = moment - o.last_heartbeat
    limit_s = _limit_s(gap, settings.heartbeat_floor_s, settings.heartbeat_factor, o.heartbeat_gaps)
    return _lateness(gap, limit_s, o.heartbeat_delay, settings)


def command_lateness(o: Observation, moment: float, settings: FailureDetectorSettings) -> Lateness:
    """How late a rank is with its command at a moment."""
    if o.command_since is None:
        return IN_TIME
    return _lateness(moment - o.command_since, settings.command_limit_s, o.command_delay, settings)


def step_lateness(
    observations: Sequence[Observation], moment: float, settings: FailureDetectorSettings
) -> list[Lateness]:
    """How late each rank is with its step at a moment. In a step ranks wait for each other: the limit is that of the
    rank with the longest one, and the delay that of the rank with the most."""
    pending = [(o, moment - o.step_sent_at) for o in observations if o.step_sent_at is not None]
    limits = [_limit_s(took, settings.step_floor_s, settings.step_factor, o.step_times) for o, took in pending]
    limit_s = max(limits, default=math.inf)
    delay = max((o.step_delay for o, _ in pending), key=lambda delay: delay.seconds, default=NO_DELAY)
    found = {o.rank: _lateness(took, limit_s, delay, settings) for o, took in pending}
    return [found.get(o.rank, IN_TIME) for o in observations]


def p99(values: Collection[float]) -> float:
    """The 99th percentile (nearest rank); 0 of no values."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1] if values else 0.0


def _certain(o: Observation, moment: float, settings: FailureDetectorSettings) -> Cause | None:
    """The causes that need no clock."""
    if o.process_state in ("Z", "X"):
        return Cause("exited", "process ended")
    if o.stream_error is not None:
        return Cause("stream", o.stream_error)
    return None


def _stopped(o: Observation, moment: float, settings: FailureDetectorSettings) -> Cause | None:
    """A process the kernel says is stopped (a debugger's stop is another letter)."""
    gap = moment - o.last_heartbeat
    if o.process_state == "T" and gap > settings.stopped_grace_s:
        return Cause("stopped", f"process stopped, no heartbeat for {gap:.3f} s")
    return None


def _lateness(took_s: float, limit_s: float, delay: Delay, settings: FailureDetectorSettings) -> Lateness:
    most_s = (settings.starved_factor - 1) * limit_s
    extended_s = limit_s + min(delay.process_s, most_s) + min(delay.front_s, most_s)
    return Lateness(took_s, limit_s, extended_s, delay)


def _limit_s(took: float, floor: float, factor: float, before: Collection[float]) -> float:
    """The floor, or the factor times the 99th percentile of earlier times where that is more. Below the floor nothing
    is late: nearly every look ends there, and need not sort."""
    return floor if took <= floor else max(floor, factor * p99(before))
