"""Which shapes of a step to compile: those that leave the fewest rows empty over what steps wanted.

A bucket is (decode rows, tiles); a step runs in the one with the fewest rows that has as many of both as any rank
wants. All of it is counting: no model, no clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from planner.errors import InputError

TILE = 32
"""Rows of a tile."""
HEDGE = 0.01
"""Share of the steps that are taken to want the given buckets instead, evenly: tomorrow's load may be another."""
SEARCHED = 3e8
"""Comparisons up to which all choices are looked at."""
FORM = 1

Bucket = tuple[int, int]
B = TypeVar("B", bound=Bucket)


class Want(NamedTuple):
    """Steps that wanted the same: how many, their ranks summed up, and the rows they filled on all of these."""

    steps: int
    ranks: int
    filled: int

    def __add__(self, other: tuple[int, ...]) -> Want:  # type: ignore[override]
        return Want(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """What steps wanted, by the most decode rows and the most tiles of any rank; `served` are the buckets they ran in
    last, `chosen` is the last choice made of such counts, and `about` says whose they are."""

    wanted: Mapping[Bucket, Want]
    served: tuple[Bucket, ...] = ()
    chosen: tuple[Bucket, ...] = ()
    about: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """All of them."""
        return sum(want.steps for want in self.wanted.values())

    def plus(self, wanted: Mapping[Bucket, Want]) -> StepCounts:
        """With those of further steps."""
        sums = dict(self.wanted)
        for bucket, want in wanted.items():
            sums[bucket] = want + sums[bucket] if bucket in sums else want
        return dataclasses.replace(self, wanted=sums)

    def faded(self, steps: int) -> StepCounts:
        """The same shares of at most so many steps: old ones count less than those that follow."""
        if self.steps <= steps:
            return self
        less = {b: Want(*(n * steps // self.steps for n in want)) for b, want in self.wanted.items()}
        return dataclasses.replace(self, wanted={b: want for b, want in less.items() if want.steps})

    def to_json(self) -> str:
        """As `from_json` reads it."""
        wanted = [[*bucket, *want] for bucket, want in sorted(self.wanted.items())]
        sets = {"served": self.served, "chosen": self.chosen}
        return json.dumps({"form": FORM, "about": dict(self.about), **sets, "wanted": wanted})

    @classmethod
    def from_json(cls, text: str) -> StepCounts:
        """Raises InputError for anything else."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["form"] != FORM:
                raise ValueError(f"its form is {values['form']!r}, not {FORM}")
            wanted = {(a, t): Want(*want) for a, t, *want in map(_numbers, values["wanted"])}
            served, chosen = (tuple((a, t) for a, t in map(_numbers, values[name])) for name in ("served", "chosen"))
            return cls(wanted, served, chosen, dict(values["about"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"no counts of steps: {error}") from None


def read_counts(path: str) -> StepCounts:
    """The counts in a file. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return StepCounts.from_json(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except InputError as error:
        raise InputError(f"{path} holds {error}") from None


def rows_of(bucket: Bucket) -> int:
    """Rows of a step in this bucket on each rank."""
    return bucket[0] + TILE * bucket[1]


def largest(buckets: Iterable[Bucket]) -> Bucket:
    """The smallest bucket that covers all of these."""
    buckets = list(buckets)
    return max(b[0] for b in buckets), max(b[1] for b in buckets)


def covering(buckets: Iterable[B], want: Bucket) -> B:
    """The one of the buckets that a step which wants this runs in. Raises ValueError when there is none."""
    return min((b for b in buckets if b[0] >= want[0] and b[1] >= want[1]), key=rows_of)


def computed(counts: StepCounts, buckets: Sequence[Bucket]) -> int:
    """Rows that the counted steps would compute on all ranks. What is beyond the largest bucket counts as that."""
    most = largest(buckets)
    return sum(want.ranks * rows_of(covering(buckets, _within(b, most))) for b, want in counts.wanted.items())


def padding(counts: StepCounts, buckets: Sequence[Bucket]) -> float:
    """The share of these rows that no token would fill."""
    rows = computed(counts, buckets)
    return max(0.0, 1 - sum(want.filled for want in counts.wanted.values()) / rows) if rows else 0.0


def bucket_figures(counts: StepCounts, buckets: Sequence[Bucket]) -> dict[str, Any]:
    """Rows, padding, and of each bucket the share of steps that run in it and of their rows that are padding."""
    most, ran = largest(buckets), {bucket: Want(0, 0, 0) for bucket in buckets}
    for bucket, want in counts.wanted.items():
        at = covering(buckets, _within(bucket, most))
        ran[at] = want + ran[at]
    each = [
        {
            "bucket": list(bucket),
            "steps": want.steps,
            "padding": max(0.0, 1 - want.filled / (want.ranks * rows_of(bucket))) if want.ranks else 0.0,
        }
        for bucket, want in ran.items()
    ]
    return {"rows": computed(counts, buckets), "padding": padding(counts, buckets), "buckets": each}


def read_buckets(text: str) -> tuple[Bucket, ...]:
    """Buckets from "2,0;8,2". Raises InputError."""
    try:
        buckets = tuple((a, t) for a, t in (_numbers(map(int, each.split(","))) for each in text.split(";")))
    except ValueError:
        raise InputError(f"{text!r} is no buckets; give decode rows and tiles of each, as 2,0;8,2") from None
    if (most := largest(buckets)) not in buckets or min(map(rows_of, buckets)) < 1:
        raise InputError(f"{text!r}: every bucket needs rows, and one must cover all others; add {most[0]},{most[1]}")
    return buckets


class Choice(NamedTuple):
    """Buckets, and whether no others are better."""

    buckets: tuple[Bucket, ...]
    exact: bool


def choose(counts: StepCounts, given: Sequence[Bucket], count: int | None = None) -> Choice:
    """At most `count` buckets, as many as `given` if left out, with the largest of the given ones among them, for which
    the counted steps compute the fewest rows: never more than for the given ones, if as many are allowed.

    Raises InputError when `count` is less than 1.
    """
    count = len(given) if count is None else count
    if count < 1:
        raise InputError(f"the number of buckets is {count}; it must be at least 1")
    search = _Search.of(counts, given)
    free = min(count - 1, len(search.corners))
    effort = math.comb(len(search.corners), max(free - 1, 0)) * search.rows.size
    if effort <= SEARCHED:
        return Choice(search.buckets(search.best(free)), True)
    starts = [search.greedy(free)]
    if len(given) <= count:
        starts.append([search.corners.index(b) for b in given if b != search.most])
    return Choice(search.buckets(min(map(search.improved, starts), key=search.cost)), False)


def settle(counts: StepCounts, given: Sequence[Bucket], *, steps: int, saves: float) -> tuple[Bucket, ...]:
    """The buckets to serve with: those chosen last, or the given ones, unless there are counts of so many `steps` and
    others compute less of the rows by the share `saves`: what is new has to be compiled."""
    last = counts.chosen if counts.chosen and largest(counts.chosen) == largest(given) else tuple(given)
    if counts.steps < steps:
        return last
    proposed = choose(counts, given).buckets
    return proposed if computed(counts, proposed) <= (1 - saves) * computed(counts, last) else last


@dataclasses.dataclass
class _Search:
    """`rows[p, c]` are those of corner c where it covers what p wants, infinite where not; `none[p]` those of the
    largest bucket, which covers all; `weight[p]` says how often p is wanted."""

    most: Bucket
    corners: list[Bucket]
    rows: np.ndarray
    none: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, counts: StepCounts, given: Sequence[Bucket]) -> _Search:
        most = largest(given)
        weights: dict[Bucket, float] = {}
        for bucket, want in counts.wanted.items():
            at = _within(bucket, most)
            weights[at] = weights.get(at, 0.0) + want.ranks
        share = HEDGE * max(sum(weights.values()), 1.0) / len(given)
        for bucket in given:
            weights[bucket] = weights.get(bucket, 0.0) + share
        # A bucket can be shrunk to what its steps want at most of each: a corner of two of them.
        corners = {largest(pair) for pair in itertools.product(weights, repeat=2)} - {most}
        points, order = np.array(list(weights)), sorted(corners, key=lambda b: (rows_of(b), b))
        at = np.array(order, int).reshape(-1, 2)
        covers = (at[None] >= points[:, None]).all(-1)
        sizes = at[:, 0] + TILE * at[:, 1]
        rows = np.where(covers, sizes, np.inf)
        return cls(most, order, rows, np.full(len(points), float(rows_of(most))), np.array(list(weights.values())))

    def buckets(self, chosen: Iterable[int]) -> tuple[Bucket, ...]:
        """Of the corners chosen, those that something runs in, and the largest."""
        kept = sorted({*(self.corners[c] for c in chosen), self.most}, key=lambda b: (rows_of(b), b))
        return tuple(kept)

    def cost(self, chosen: Sequence[int]) -> float:
        """Rows of all that is wanted."""
        return float(self.weight @ self._least(chosen))

    def best(self, free: int) -> list[int]:
        """The `free` corners that cost least, of all there are."""
        if not free:
            return []
        found: tuple[float, list[int]] = (math.inf, [])
        for some in itertools.combinations(range(len(self.corners)), free - 1):
            cost, last = self._one_more(some)
            if cost < found[0]:
                found = cost, [*some, last]
        return found[1]

    def greedy(self, free: int) -> list[int]:
        """One corner after the other."""
        chosen: list[int] = []
        for _ in range(free):
            chosen.append(self._one_more(chosen)[1])
        return chosen

    def improved(self, chosen: list[int]) -> list[int]:
        """The same with one corner for another as long as that costs less."""
        cost = self.cost(chosen)
        while True:
            others = [chosen[:i] + chosen[i + 1 :] for i in range(len(chosen))]
            found = min(((*self._one_more(some), some) for some in others), default=(math.inf, 0, []))
            if not found[0] < cost:
                return chosen
            cost, chosen = found[0], [*found[2], found[1]]

    def _one_more(self, chosen: Sequence[int]) -> tuple[float, int]:
        costs = self.weight @ np.minimum(self._least(chosen)[:, None], self.rows)
        best = int(costs.argmin())
        return float(costs[best]), best

    def _least(self, chosen: Sequence[int]) -> np.ndarray:
        return np.minimum(self.none, self.rows[:, list(chosen)].min(1, initial=np.inf))


def _within(bucket: Bucket, most: Bucket) -> Bucket:
    return min(bucket[0], most[0]), min(bucket[1], most[1])


def _numbers(row: Iterable[Any]) -> list[int]:
    row = list(row)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in row):
        raise ValueError(f"{row!r} is not of whole numbers")
    return row
