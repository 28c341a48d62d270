"""Which requests are suspected of breaking ranks, and in which steps they run until that is decided. Pure.

A rank that fails of itself in a step (an exception, a crash) is an incident, and every request of the step is accused.
A request with enough incidents is a suspect: it runs in steps of its own, in turn with steps of all other requests, so
that the next incident names its cause. A suspect that gets past the place of its incidents is cleared. One that breaks
a rank alone, and had an incident before, is convicted; nothing else ends a request (docs/decisions/0017).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from serving.engine.batch import Batch

LOSS = 2
"""Weight of an incident in which a rank was lost by its own failure."""
FAILED_STEP = 1
"""Weight of a step that failed without a loss: a link may be the cause, so that two of them weigh as much as a loss."""
SOON = 2
"""Positions after the place where it was cleared within which a request that is accused again stays apart to its end:
it fails beside others only."""
TO_ITS_END = 1 << 53
"""A position that no request reaches."""


@dataclasses.dataclass(frozen=True)
class Incident:
    """A failure in a step. `until` has the requests of the step, in the order in which they are to be tried, each with
    the number of leading positions that the step would have computed, `since` the number before it. `ranks`
    are the ranks that failed."""

    weight: int
    until: Mapping[str, int]
    ranks: tuple[int, ...] = ()
    since: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Turn(NamedTuple):
    """Which requests may be in the next step: only one of them, or all `without` some."""

    only: str | None = None
    without: frozenset[str] = frozenset()

    def admits(self, request_id: str) -> bool:
        """Whether this request may be in the step."""
        return request_id not in self.without if self.only is None else request_id == self.only


EVERYBODY = Turn()


@dataclasses.dataclass(frozen=True)
class Suspicion:
    """The requests that ran while ranks failed, and how each is tried. A request is ended at `limit` losses. `tried`
    is the suspect that ran last, `others_next` whether it is the turn of the others. `cleared` has the position at
    which a request was cleared."""

    limit: int = 2
    incidents: tuple[Incident, ...] = ()
    cleared: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tried: str = ""
    others_next: bool = True

    def weight_of(self, request_id: str) -> int:
        """The weight of all incidents of a request."""
        return sum(each.weight for each in self.incidents if request_id in each.until)

    @property
    def suspects(self) -> tuple[str, ...]:
        """The requests that must run alone, in the order of their trials: those of the last incident first."""
        accused = dict.fromkeys(key for each in reversed(self.incidents) for key in each.until)
        return tuple(key for key in accused if self.weight_of(key) >= LOSS * (self.limit - 1))

    def turns(self) -> Iterator[Turn]:
        """The next turns, in order of preference: the first that has work is taken."""
        if not (suspects := self.suspects):
            yield EVERYBODY
            return
        others = Turn(without=frozenset(suspects))
        at = suspects.index(self.tried) + 1 if self.tried in suspects else 0
        alone = [Turn(only=key) for key in (*suspects[at:], *suspects[:at])]
        yield from (others, *alone) if self.others_next else (*alone, others)

    def after_turn(self, turn: Turn) -> "Suspicion":
        """The suspicion once a step of this turn was made."""
        if turn is EVERYBODY:
            return self
        return dataclasses.replace(self, tried=turn.only or self.tried, others_next=turn.only is not None)

    def accuse(self, incident: Incident) -> tuple["Suspicion", str | None]:
        """Take in an incident. Returns the request that it convicts, too, whose incidents are then explained."""
        until = {
            key: TO_ITS_END if incident.since.get(key, at) <= self.cleared.get(key, -SOON - 1) + SOON else at
            for key, at in incident.until.items()
        }
        after = dataclasses.replace(self, incidents=(*self.incidents, dataclasses.replace(incident, until=until)))
        if len(until) == 1 and after.weight_of(alone := next(iter(until))) >= LOSS * self.limit:
            unexplained = tuple(each for each in after.incidents if alone not in each.until)
            return dataclasses.replace(after, incidents=unexplained), alone
        return after, None

    def without(self, request_id: str) -> tuple["Suspicion", tuple[Incident, ...]]:
        """The suspicion of the other requests, and the incidents of this one, which goes on in another pool."""
        own = tuple(
            dataclasses.replace(each, until={request_id: each.until[request_id]})
            for each in self.incidents
            if request_id in each.until
        )
        left = (
            dataclasses.replace(each, until={key: at for key, at in each.until.items() if key != request_id})
            for each in self.incidents
        )
        return dataclasses.replace(self, incidents=tuple(each for each in left if each.until)), own

    def with_incidents(self, incidents: tuple[Incident, ...]) -> "Suspicion":
        """The suspicion with incidents of another pool."""
        return dataclasses.replace(self, incidents=(*self.incidents, *incidents))

    def ranks_of(self, request_id: str) -> tuple[int, ...]:
        """The ranks that failed while a request ran, in order."""
        return tuple(rank for each in self.incidents if request_id in each.until for rank in each.ranks)

    def settle(self, committed: Mapping[str, int]) -> "Suspicion":
        """The suspicion after a step. `committed` has the number of positions in the cache of every open request: a
        request past the place of its incidents is cleared, one that is not open any more is forgotten."""
        if not self.incidents:
            return self
        reach = {key: max(each.until.get(key, 0) for each in self.incidents) for key in self._accused()}
        passed = {key: at for key, at in reach.items() if committed.get(key, -1) >= at}
        kept = {key for key in reach if key in committed and key not in passed}
        if kept == reach.keys():
            return self
        left = (
            dataclasses.replace(each, until={key: at for key, at in each.until.items() if key in kept})
            for each in self.incidents
        )
        cleared = {key: at for key, at in {**self.cleared, **passed}.items() if key in committed}
        return dataclasses.replace(self, incidents=tuple(each for each in left if each.until), cleared=cleared)

    def _accused(self) -> set[str]:
        return {key for each in self.incidents for key in each.until}


def incident_of(batches: Iterable[Batch], ranks: tuple[int, ...], weight: int) -> Incident:
    """The incident of steps that were in flight when `ranks` failed. Requests of these ranks are tried first."""
    until: dict[str, int] = {}
    since: dict[str, int] = {}
    for batch in batches:
        for rank in sorted(batch.scheduled, key=lambda rank: rank not in ranks):
            for work in batch.scheduled[rank]:
                until[work.request_id] = max(until.get(work.request_id, 0), work.start + work.rows)
                since.setdefault(work.request_id, work.start)
    return Incident(weight, until, ranks, since)
