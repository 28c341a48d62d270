"""Requests that are suspected of breaking ranks: which loss accuses whom, and what becomes of it (decision 0017)."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from serving.core.request_log import RequestLog
from serving.engine.batch import Batch
from serving.engine.poison import FAILED_STEP, LOSS, Incident, Suspicion, incident_of
from serving.engine.state import EngineState
from serving.errors import MoejaxError, PoisonRequest
from serving.executor.executor import RankExecutor
from serving.protocol.events import EventKind, EventLog
from serving.recovery.failover import Failover

NAMED = 8
"""Most requests that an event names."""


class SuspectingServer(Protocol):
    """The parts of the engine's loop that suspicion uses."""

    state: EngineState
    events: EventLog
    failover: Failover
    executor: RankExecutor
    request_log: RequestLog

    def fail_request(self, request_id: str, error: MoejaxError) -> None:
        """End a request with an error."""
        ...


class Suspects:
    """The suspicion of one server. A request is ended at `limit` losses; `convicted` counts the requests that were."""

    def __init__(self, server: SuspectingServer, limit: int) -> None:
        self._server = server
        self._limit = limit
        self._noted: dict[int, tuple[Batch, ...]] = {}
        """The steps that were in flight when a rank was lost, in order of the losses."""
        self._recorded: tuple[Incident, ...] = ()
        self.elsewhere: Callable[[], tuple[Incident, ...]] = tuple
        """The incidents of requests in another pool of the server, which are written with those of this one."""
        self.convicted = 0
        self.last_failures: dict[int, str] = {}
        """How a rank failed of itself the last time."""

    def restore(self, *, recorded: bool = True) -> None:
        """Take up what the front before this one suspected, if this pool is to."""
        server = self._server
        self._recorded = server.request_log.incidents if recorded else ()
        self._set(Suspicion(self._limit, self._recorded))

    def note_losses(self, ranks: Iterable[int], batches: tuple[Batch, ...]) -> None:
        """These ranks were lost, in this order, while steps were in flight. How they ended is known only once they are
        fenced."""
        self._noted |= dict.fromkeys(ranks, batches)

    def judge_losses(self, ranks: Collection[int]) -> None:
        """These ranks are fenced. Of several that were lost in one step the first one counts: its end may have been the
        end of the others."""
        judged: set[int] = set()
        for rank in dict.fromkeys((*(rank for rank in self._noted if rank in ranks), *ranks)):
            batches = self._noted.pop(rank, ())
            steps = {batch.step for batch in batches}
            first, judged = judged.isdisjoint(steps), judged | steps
            incarnation = self._server.executor.get(rank)
            if incarnation is None or incarnation.loss is None or not incarnation.failed_of_itself:
                continue
            self.last_failures[rank] = str(incarnation.loss.cause)
            if first:
                self._accuse(incident_of(batches, (rank,), LOSS))

    def judge_failed_step(self, rank: int, batch: Batch) -> None:
        """A step failed on a rank that lives, and no loss explains it."""
        self._accuse(incident_of((batch,), (rank,), FAILED_STEP))

    def record_changes(self) -> None:
        """A step was applied: write which requests it has cleared."""
        left = self._server.state.suspicion
        if left.incidents == self._recorded:
            return
        accused = {key for each in self._recorded for key in each.until}
        cleared = accused.intersection(left.cleared) - {key for each in left.incidents for key in each.until}
        if cleared:
            self._emit(EventKind.CLEARED, None, f"{_named(sorted(cleared))} ran on without the failure")
        self._record()

    def _accuse(self, incident: Incident) -> None:
        server, before = self._server, self._server.state.suspicion
        known = {key: at for key, at in incident.until.items() if server.state.find(key) is not None}
        if not known:
            return
        incident = dataclasses.replace(incident, until=known)
        suspicion, convicted = before.accuse(incident)
        self._set(suspicion)
        if convicted is not None:
            ranks = sorted({*before.ranks_of(convicted), *incident.ranks})
            names = ", ".join(map(str, ranks))
            self.convicted += 1
            self._emit(EventKind.CONVICTED, incident.ranks[0], f"{convicted}: ranks {names} failed while it ran")
            error = PoisonRequest(
                f"request {convicted} was ended: ranks {names} failed of themselves while it ran, the last one while "
                "it ran alone. It is not run again. The server's events and its log say how the ranks failed."
            )
            server.fail_request(convicted, error)
        elif suspects := [key for key in suspicion.suspects if key in known]:
            self._emit(EventKind.SUSPECTED, incident.ranks[0], f"{_named(suspects)} run alone, one after the other")
        self._record()

    def _set(self, suspicion: Suspicion) -> None:
        self._server.state = self._server.state.with_suspicion(suspicion)

    def _record(self) -> None:
        self._recorded = self._server.state.suspicion.incidents
        self._server.request_log.record_incidents((*self._recorded, *self.elsewhere()))

    def _emit(self, kind: EventKind, rank: int | None, message: str) -> None:
        self._server.events.emit(kind, self._server.failover.epoch, rank=rank, message=message)


def _named(request_ids: list[str]) -> str:
    """The number of some requests, and the ids of the first ones."""
    more = ", ..." if len(request_ids) > NAMED else ""
    return f"{len(request_ids)} requests ({', '.join(request_ids[:NAMED])}{more})"
