"""Reports a recovery when the first step after it is done: its cause, its phases, what became of the requests."""

import dataclasses
from collections.abc import Mapping

from serving.executor.incarnation import Loss
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover


@dataclasses.dataclass(frozen=True)
class _OpenRecovery:
    """A recovery whose first step is not done. Times are monotonic; `phases` are milliseconds by name."""

    rank: int | None
    cause: str
    outcome: str
    phases: Mapping[str, float]
    evidence_at: float
    adopted_at: float


class RecoveryReport:
    """Counts recoveries, and emits their events with the time from the first evidence to the first step."""

    def __init__(self, failover: Failover, events: EventLog) -> None:
        self.recoveries = 0
        self._failover = failover
        self._events = events
        self._open: _OpenRecovery | None = None

    def begin(self, losses: Mapping[int, Loss], began: float, phases: Mapping[str, float], outcome: str) -> None:
        """A plan without the lost ranks is in force. `began`: when the recovery started (monotonic); `outcome`: what
        becomes of the KV entries of the requests concerned."""
        self.recoveries += 1
        first = min((loss.evidence_at for loss in losses.values()), default=began)
        judged = max((loss.judged_at for loss in losses.values()), default=began)
        self._open = _OpenRecovery(
            rank=min(losses, default=None),
            cause=causes(losses) or "communicators: no rank was lost",
            outcome=outcome,
            phases={"detect": 1e3 * (judged - first)} | dict(phases),
            evidence_at=first,
            adopted_at=clock.now(),
        )

    def finish(self) -> None:
        """The first step after a recovery is done, or there is none to make."""
        if self._open is None or not self._failover.adoption.can_step:
            return
        recovery, now, self._open = self._open, clock.now(), None
        ends = {"resume": 1e3 * (now - recovery.adopted_at), "total": 1e3 * (now - recovery.evidence_at)}
        self._events.emit(
            EventKind.RECOVERED,
            self._failover.epoch,
            rank=recovery.rank,
            cause=recovery.cause,
            phases=dict(recovery.phases) | ends,
            message=recovery.outcome,
        )
        plan = self._failover.plan
        if plan is not None and plan.masked:
            share = self._failover.adoption.lost_share(plan)
            text = f"{len(plan.masked)} experts with {share:.1%} of the traffic"
            self._events.emit(EventKind.MASKED, self._failover.epoch, message=text)


def causes(losses: Mapping[int, Loss]) -> str:
    """The causes of losses, by rank, as one text."""
    return "; ".join(f"rank {rank} {loss.cause}" for rank, loss in sorted(losses.items()))
