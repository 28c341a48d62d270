"""The order in which owners' requests get a rank: virtual token counters (arXiv 2401.00588). A value.

An owner is the API key of a request. The next request to run is one of the owner that was served the fewest tokens for
its share. An owner that returns after a pause starts level with the owners that wait, so that no owner saves up
service; no waiting owner falls behind another by more than a bounded number of tokens. Among the requests of one owner
the lower `priority` goes first, then the earlier arrival. Requests that ran before (their rank died, or its pages ran
out) go before all others.
"""

import dataclasses
import heapq
from collections.abc import Collection, Iterable, Mapping

from serving.engine.sequence import Sequence

GENERATED_WEIGHT = 2.0
"""Cost of a generated token relative to a prompt token (as in the paper)."""


@dataclasses.dataclass(frozen=True)
class TokenCounters:
    """Tokens served by owner, each divided by the owner's share; `level` is the count of the owner served last."""

    used: Mapping[str, float] = dataclasses.field(default_factory=dict)
    level: float = 0.0

    def of(self, owner: str) -> float:
        """An owner's counter; the level for an owner without one."""
        return self.used.get(owner, self.level)

    def on_arrival(self, owner: str, waiting: Collection[str]) -> "TokenCounters":
        """The counters after a request of `owner` has joined those of the owners `waiting`."""
        if owner in waiting:
            return self
        floor = min(map(self.of, waiting), default=self.level)
        used = {o: u for o, u in self.used.items() if o in waiting or u > self.level}
        return TokenCounters({**used, owner: max(self.of(owner), floor)}, self.level)

    def charge(self, costs: Mapping[str, float]) -> "TokenCounters":
        """The counters after owners were served: tokens divided by the share, by owner."""
        return dataclasses.replace(self, used={**self.used, **{o: self.of(o) + c for o, c in costs.items()}})

    def admit(self, owner: str, cost: float) -> "TokenCounters":
        """The counters after a request of an owner was given a rank."""
        return TokenCounters({**self.used, owner: self.of(owner) + cost}, max(self.level, self.of(owner)))


class AdmissionOrder:
    """The waiting sequences in order of admission. Mutable, for scheduling one step."""

    def __init__(self, waiting: Iterable[Sequence], shares: TokenCounters) -> None:
        self.counters = shares
        self._returning: list[tuple[int, str, Sequence]] = []
        self._fresh: dict[str, list[tuple[int, int, str, Sequence]]] = {}
        for each in waiting:
            if each.started:
                heapq.heappush(self._returning, (each.arrival, each.id, each))
            else:
                row = self._fresh.setdefault(each.request.owner, [])
                heapq.heappush(row, (each.request.sampling.priority, each.arrival, each.id, each))

    def peek(self) -> Sequence | None:
        """The next sequence, None when there is none."""
        if self._returning:
            return self._returning[0][-1]
        owner = min(self._fresh, key=lambda o: (self.counters.of(o), self._fresh[o][0][1]), default=None)
        return None if owner is None else self._fresh[owner][0][-1]

    def admit(self, sequence: Sequence, tokens: int) -> None:
        """Remove the next sequence, which was given a rank with `tokens` to compute. The owner is charged for it the
        first time."""
        self.skip(sequence)
        if not sequence.started:
            self.counters = self.counters.admit(sequence.request.owner, tokens / sequence.request.share)

    def skip(self, sequence: Sequence) -> None:
        """Remove the next sequence, which gets no rank in this step and must not hold up others."""
        if sequence.started:
            heapq.heappop(self._returning)
            return
        row = self._fresh[sequence.request.owner]
        heapq.heappop(row)
        if not row:
            del self._fresh[sequence.request.owner]


def count_ahead(waiting: Iterable[Sequence], owner: str, priority: int) -> int:
    """Number of waiting requests likely to be admitted before a new one: requests that ran before, the owner's
    own of the same or a better priority, and of each other owner as many as the owner's turns."""
    started, own, others = 0, 0, dict[str, int]()
    for each in waiting:
        if each.started:
            started += 1
        elif each.request.owner != owner:
            others[each.request.owner] = others.get(each.request.owner, 0) + 1
        elif each.request.sampling.priority <= priority:
            own += 1
    return started + own + sum(min(count, own + 1) for count in others.values())
