"""Whose request is next. A value: tokens served so far by owner (the API key of a request), and an order from them.

Virtual token counters (arXiv 2401.00588): the next place goes to the owner that has been served least for its share.
One that comes back after a pause starts level with those that wait, so that nobody saves up; whoever waits is served
before others get more than a bounded number of tokens ahead. Among the requests of one owner the lower `priority`
goes first, then the earlier arrival. Requests that ran before (their rank died, or its pages ran out) go before all.
"""

import dataclasses
import heapq
from collections.abc import Collection, Iterable, Mapping

from serving.sequence import Sequence

GENERATED_WEIGHT = 2.0
"""What a generated token counts beside one of a prompt (as in that paper)."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Tokens served by owner, each divided by the owner's share; `level` is the count of the owner served last."""

    used: Mapping[str, float] = dataclasses.field(default_factory=dict)
    level: float = 0.0

    def of(self, owner: str) -> float:
        """What an owner has had; one that is not known stands at the level."""
        return self.used.get(owner, self.level)

    def arrived(self, owner: str, waiting: Collection[str]) -> "Shares":
        """A request of `owner` joins those of the owners `waiting`."""
        if owner in waiting:
            return self
        floor = min(map(self.of, waiting), default=self.level)
        used = {o: u for o, u in self.used.items() if o in waiting or u > self.level}
        return Shares({**used, owner: max(self.of(owner), floor)}, self.level)

    def charged(self, costs: Mapping[str, float]) -> "Shares":
        """Owners were served so many tokens, divided by their shares."""
        return dataclasses.replace(self, used={**self.used, **{o: self.of(o) + c for o, c in costs.items()}})

    def served(self, owner: str, cost: float) -> "Shares":
        """An owner's request was given a place."""
        return Shares({**self.used, owner: self.of(owner) + cost}, max(self.level, self.of(owner)))


class Turns:
    """Waiting sequences in the order in which they get places; mutable, for the making of one step."""

    def __init__(self, waiting: Iterable[Sequence], shares: Shares) -> None:
        self.shares = shares
        self._returning: list[tuple[int, str, Sequence]] = []
        self._fresh: dict[str, list[tuple[int, int, str, Sequence]]] = {}
        for each in waiting:
            if each.started:
                heapq.heappush(self._returning, (each.arrival, each.id, each))
            else:
                row = self._fresh.setdefault(each.request.owner, [])
                heapq.heappush(row, (each.request.priority, each.arrival, each.id, each))

    def head(self) -> Sequence | None:
        """Who is next."""
        if self._returning:
            return self._returning[0][-1]
        owner = min(self._fresh, key=lambda o: (self.shares.of(o), self._fresh[o][0][1]), default=None)
        return None if owner is None else self._fresh[owner][0][-1]

    def take(self, sequence: Sequence, tokens: int) -> None:
        """The head was given a place, with so many tokens to compute, and is charged if that is its first."""
        self.skip(sequence)
        if not sequence.started:
            self.shares = self.shares.served(sequence.request.owner, tokens / sequence.request.share)

    def skip(self, sequence: Sequence) -> None:
        """The head gets no place this time and holds nobody up."""
        if sequence.started:
            heapq.heappop(self._returning)
            return
        row = self._fresh[sequence.request.owner]
        heapq.heappop(row)
        if not row:
            del self._fresh[sequence.request.owner]


def ahead(waiting: Iterable[Sequence], owner: str, priority: int) -> int:
    """How many of those that wait are likely to get a place before a new request: those that ran before, the owner's
    own of no lower rank, and of each other owner as many as the owner's turns."""
    started, own, others = 0, 0, dict[str, int]()
    for each in waiting:
        if each.started:
            started += 1
        elif each.request.owner != owner:
            others[each.request.owner] = others.get(each.request.owner, 0) + 1
        elif each.request.priority <= priority:
            own += 1
    return started + own + sum(min(count, own + 1) for count in others.values())
