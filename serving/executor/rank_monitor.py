"""Looks at the ranks again and again: whether they are late, whether the kernel has ended them, and whether a rank that
is late hangs or is starved.

A rank that is late is fenced only after its evidence was read: how long its process, and the front itself, have waited
for a processor meanwhile.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple

from serving.executor.failure_detector import (
    NO_DELAY,
    Cause,
    Delay,
    FailureDetectorSettings,
    Observation,
    all_late,
    heartbeat_lateness,
    late_or_dead,
    step_lateness,
)
from serving.executor.incarnation import Incarnation
from serving.protocol import clock

POLL_S = 0.01
"""Seconds between two looks at the ranks (a pidfd reports the end of a process only when its last thread is gone)."""
MANY_RANKS, MANY_POLLS = 64, 5
"""Above so many ranks, which are not all of this machine, only each fifth of these times is a look at them: the ends of
their processes are reported, and what a look finds by itself are limits of at least 100 ms."""
REPORT_S = 60.0
"""Least seconds between two reports that one rank is starved."""


class Reading(NamedTuple):
    """The counters of the kernel and of the front at a time: seconds for which a process has waited for a processor
    since its start (None where nobody knows), and by which the front's own looks came late."""

    at: float
    process_s: float | None
    front_s: float


class DelayEvidence:
    """The delay of a rank while the front waits for one thing of it: its next heartbeat, the end of its step, or the
    answer to a command.

    It is counted from the first reading, at half of the fewest seconds that the limit can be, so that nothing is read
    while ranks answer in time.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._first = Reading(0.0, None, 0.0)
        self._delay = NO_DELAY

    def has_begun(self, since: float) -> bool:
        """Whether there is a reading of what the front has waited for since then."""
        return self._since == since

    def take(self, since: float, reading: Reading) -> None:
        """Take a reading of what the front has waited for since then; the first one begins the count."""
        if self._since != since:
            self._since, self._first, self._delay = since, reading, NO_DELAY
            return
        first, process_s = self._first, 0.0
        if reading.process_s is not None and first.process_s is not None:
            process_s = reading.process_s - first.process_s  # of many threads: it may be more than the time that passed
        passed = reading.at - first.at
        self._delay = Delay(_within(process_s, passed), _within(reading.front_s - first.front_s, passed))

    def since(self, since: float | None) -> Delay:
        """The delay, as last read, of what the front has waited for since then."""
        return self._delay if since is not None and self._since == since else NO_DELAY


@dataclasses.dataclass
class Watched:
    """A rank that is monitored, and the evidence of its delays."""

    incarnation: Incarnation
    heartbeat: DelayEvidence = dataclasses.field(default_factory=DelayEvidence)
    step: DelayEvidence = dataclasses.field(default_factory=DelayEvidence)
    command: DelayEvidence = dataclasses.field(default_factory=DelayEvidence)
    reported_at: float | None = None
    """When it was last reported that it is starved."""

    def observe(self) -> Observation:
        """The rank as the failure detector judges it."""
        each = self.incarnation
        return Observation(
            rank=each.rank,
            last_heartbeat=each.last_heartbeat,
            heartbeat_gaps=each.heartbeat_gaps,
            heartbeat_delay=self.heartbeat.since(each.last_heartbeat),
            stream_error=each.stream_error,
            process_state=each.process.state,
            step_sent_at=each.step_sent_at,
            step_times=each.step_times,
            step_delay=self.step.since(each.step_sent_at),
            in_plan=each.in_plan,
            command_since=each.command_since,
            command_delay=self.command.since(each.command_since),
        )


class RankMonitor:
    """Monitors the ranks of an executor. `declare` is called for each rank that is lost, with the time of the first
    sign of it; `fail_step` when all ranks are late with a step and none counts as failed; `on_starved`, at most once in
    REPORT_S for each rank, with one that is late and excused, and with the evidence."""

    def __init__(
        self,
        settings: FailureDetectorSettings,
        *,
        declare: Callable[[int, Cause, float], None],
        fail_step: Callable[[], None],
        on_starved: Callable[[int, str], None],
    ) -> None:
        self._settings = settings
        self._declare = declare
        self._fail_step = fail_step
        self._on_starved = on_starved
        self._watched: dict[int, Watched] = {}
        self._front_late_s = 0.0
        """Seconds by which this front's looks came late, in all; small ones are not counted."""
        self.front_lag_s = 0.0
        """How long the front itself stood still of late."""

    async def run(self, ranks: Callable[[], Collection[Incarnation]]) -> None:
        """Look at the ranks until cancelled."""
        last, polls = clock.now(), 0
        while True:
            await asyncio.sleep(POLL_S)
            now = clock.now()
            late_s = now - last - POLL_S
            self.front_lag_s = max(late_s, 0.9 * self.front_lag_s if self.front_lag_s > POLL_S else 0.0)
            self._front_late_s += late_s if late_s > POLL_S else 0.0
            last, polls = now, polls + 1
            known = ranks()
            if len(known) <= MANY_RANKS or polls % MANY_POLLS == 0:
                self.look([each for each in known if each.monitored and each.loss is None], now)

    def look(self, ranks: Collection[Incarnation], now: float) -> None:
        """Judge these ranks now, and act on it."""
        known = self._watched
        self._watched = {each.rank: known[each.rank] if self._is_known(each) else Watched(each) for each in ranks}
        if not any(self._may_be_late(each.incarnation, now) for each in self._watched.values()):
            return
        for each in self._watched.values():
            self._begin_evidence(each, now)
        found, stuck = self._judge(now)
        overdue = [rank for rank, cause in found.items() if cause.kind in ("heartbeat", "step", "command")]
        if overdue or stuck:
            concerned = self._watched.keys() if stuck or any(found[r].kind == "step" for r in overdue) else overdue
            for rank in concerned:
                self._renew_evidence(self._watched[rank], now)
            found, stuck = self._judge(now)
            self._report_starved(now)
        for rank, cause in found.items():
            each = self._watched[rank].incarnation
            if cause.kind == "exited":
                self._declare(rank, Cause("exited", each.describe_exit()), now)
            else:
                self._declare(rank, cause, each.last_heartbeat)
        if stuck:
            self._fail_step()

    def _may_be_late(self, each: Incarnation, now: float) -> bool:
        """Whether there is anything to judge or to begin with: False for a rank that all of the judgement below would
        find well, at a fraction of its time."""
        settings, since = self._settings, each.command_since
        return (
            each.stream_error is not None
            or now - each.last_heartbeat > settings.heartbeat_floor_s / 2
            or (each.step_sent_at is not None and now - each.step_sent_at > settings.step_floor_s / 2)
            or (since is not None and now - since > settings.command_limit_s / 2)
            or each.process.state in ("Z", "X", "T")
        )

    def _is_known(self, each: Incarnation) -> bool:
        return each.rank in self._watched and self._watched[each.rank].incarnation is each

    def _judge(self, now: float) -> tuple[dict[int, Cause], bool]:
        """The ranks that count as failed, and whether all are late with the step."""
        observed = [each.observe() for each in self._watched.values()]
        found = late_or_dead(observed, now, self._settings, front_lag_s=self.front_lag_s)
        return found, all_late(observed, now, self._settings, front_lag_s=self.front_lag_s)

    def _begin_evidence(self, watched: Watched, now: float) -> None:
        """Take the first reading of a rank that may become late."""
        each, settings = watched.incarnation, self._settings
        for evidence, since, floor_s in (
            (watched.heartbeat, each.last_heartbeat, settings.heartbeat_floor_s),
            (watched.step, each.step_sent_at, settings.step_floor_s),
            (watched.command, each.command_since, settings.command_limit_s),
        ):
            if since is not None and now - since > floor_s / 2 and not evidence.has_begun(since):
                evidence.take(since, self._read(each, now))

    def _renew_evidence(self, watched: Watched, now: float) -> None:
        each = watched.incarnation
        reading = self._read(each, now)
        watched.heartbeat.take(each.last_heartbeat, reading)
        if each.step_sent_at is not None:
            watched.step.take(each.step_sent_at, reading)
        if each.command_since is not None:
            watched.command.take(each.command_since, reading)

    def _read(self, each: Incarnation, now: float) -> Reading:
        return Reading(now, each.process.run_delay_s(), self._front_late_s)

    def _report_starved(self, now: float) -> None:
        observed = [each.observe() for each in self._watched.values()]
        moment = now - self.front_lag_s
        steps = step_lateness(observed, moment, self._settings)
        for o, step in zip(observed, steps, strict=True):
            beat = heartbeat_lateness(o, moment, self._settings)
            watched = self._watched[o.rank]
            recently = watched.reported_at is not None and now - watched.reported_at < REPORT_S
            if recently or not (beat.is_excused or (step.is_excused and o.step_delay == step.delay)):
                continue
            watched.reported_at = now
            late, what = (beat, "no heartbeat") if beat.is_excused else (step, "a step was not done")
            self._on_starved(o.rank, late.describe(what, o.process_state))


def _within(seconds: float, passed: float) -> float:
    return min(max(seconds, 0.0), passed)
