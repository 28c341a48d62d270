"""The choice of buckets, the shapes of a step to compile, so that counted steps would compute the fewest padding rows.

A bucket is (decode rows, prefill tiles); a step runs in the bucket with the fewest rows that has enough of both for
every rank.
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
from planner.inputs.file_kinds import FileKind
from planner.plan.step_layout import TILE

HEDGE = 0.01
"""Share of the steps that count as demand for the given buckets, evenly, since tomorrow's load may differ."""
SEARCHED = 3e8
"""Comparisons up to which the search is exhaustive."""
FORM = 1
"""Version of the counts file."""
COUNTS = FileKind(
    no="no counts of steps",
    way_out="Give a file that a server writes, in the folder steps of its cache (docs/buckets.md).",
    form=FORM,
)

BucketSize = tuple[int, int]
B = TypeVar("B", bound=BucketSize)


class StepDemand(NamedTuple):
    """Steps with the same demand: their number, the sum of their ranks, and the rows that they filled on all ranks."""

    steps: int
    ranks: int
    filled: int

    def __add__(self, other: tuple[int, ...]) -> StepDemand:  # type: ignore[override]
        return StepDemand(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """The demand of counted steps, by the most decode rows and the most tiles of any rank.

    `served` are the buckets of the last server, `chosen` the last choice made from such counts, and `about` describes
    the server.
    """

    wanted: Mapping[BucketSize, StepDemand]
    served: tuple[BucketSize, ...] = ()
    chosen: tuple[BucketSize, ...] = ()
    about: Mapping[str, str | int] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of steps counted."""
        return sum(want.steps for want in self.wanted.values())

    def merged(self, wanted: Mapping[BucketSize, StepDemand]) -> StepCounts:
        """The counts with those of further steps added."""
        sums = dict(self.wanted)
        for bucket, want in wanted.items():
            sums[bucket] = want + sums[bucket] if bucket in sums else want
        return dataclasses.replace(self, wanted=sums)

    def scaled_to(self, steps: int) -> StepCounts:
        """The same shares of at most `steps` steps, so that old steps count less than later ones."""
        if self.steps <= steps:
            return self
        scaled = {b: StepDemand(*(n * steps // self.steps for n in want)) for b, want in self.wanted.items()}
        return dataclasses.replace(self, wanted={b: want for b, want in scaled.items() if want.steps})

    def to_json(self) -> str:
        """JSON text; `from_json` gives back equal counts."""
        wanted = [[*bucket, *want] for bucket, want in sorted(self.wanted.items())]
        sets = {"served": self.served, "chosen": self.chosen}
        return json.dumps({"form": FORM, "about": dict(self.about), **sets, "wanted": wanted})

    @classmethod
    def from_json(cls, text: str) -> StepCounts:
        """The counts written by `to_json`. Raises InputError for any other text."""
        values = COUNTS.parse_object(text, "form", "wanted")
        try:
            wanted = {(a, t): StepDemand(*want) for a, t, *want in map(_numbers, values["wanted"])}
            served, chosen = (tuple((a, t) for a, t in map(_numbers, values[name])) for name in ("served", "chosen"))
            return cls(wanted, served, chosen, dict(values["about"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise COUNTS.wrong(error) from None


def read_counts(path: str) -> StepCounts:
    """The counts in a file. Raises InputError when it cannot be read or is no file of counts."""
    return COUNTS.read(path, StepCounts.from_json)


def rows_of(bucket: BucketSize) -> int:
    """Rows of a step in this bucket on each rank."""
    return bucket[0] + TILE * bucket[1]


def largest_bucket(buckets: Iterable[BucketSize]) -> BucketSize:
    """The smallest bucket that covers all of these."""
    buckets = list(buckets)
    return max(b[0] for b in buckets), max(b[1] for b in buckets)


def covering_bucket(buckets: Iterable[B], want: BucketSize) -> B:
    """The bucket in which a step with this demand runs. Raises ValueError when no bucket is large enough."""
    return min((b for b in buckets if b[0] >= want[0] and b[1] >= want[1]), key=rows_of)


def computed_rows(counts: StepCounts, buckets: Sequence[BucketSize]) -> int:
    """Rows that the counted steps would compute on all ranks; larger demand counts as the largest bucket."""
    most = largest_bucket(buckets)
    return sum(want.ranks * rows_of(covering_bucket(buckets, _clipped(b, most))) for b, want in counts.wanted.items())


def padding_share(counts: StepCounts, buckets: Sequence[BucketSize]) -> float:
    """The share of the computed rows that would be padding."""
    rows = computed_rows(counts, buckets)
    return max(0.0, 1 - sum(want.filled for want in counts.wanted.values()) / rows) if rows else 0.0


def bucket_figures(counts: StepCounts, buckets: Sequence[BucketSize]) -> dict[str, Any]:
    """For JSON: the rows, the padding share, and for each bucket the number of its steps and their padding share."""
    most, ran = largest_bucket(buckets), {bucket: StepDemand(0, 0, 0) for bucket in buckets}
    for bucket, want in counts.wanted.items():
        at = covering_bucket(buckets, _clipped(bucket, most))
        ran[at] = want + ran[at]
    each = [
        {
            "bucket": list(bucket),
            "steps": want.steps,
            "padding": max(0.0, 1 - want.filled / (want.ranks * rows_of(bucket))) if want.ranks else 0.0,
        }
        for bucket, want in ran.items()
    ]
    return {"rows": computed_rows(counts, buckets), "padding": padding_share(counts, buckets), "buckets": each}


def read_buckets(text: str) -> tuple[BucketSize, ...]:
    """Buckets from "2,0;8,2". Raises InputError when the text is none, or no bucket covers all others."""
    try:
        buckets = tuple((a, t) for a, t in (_numbers(map(int, each.split(","))) for each in text.split(";")))
    except ValueError:
        raise InputError(f"{text!r} is no buckets; give decode rows and tiles of each, as 2,0;8,2") from None
    if (most := largest_bucket(buckets)) not in buckets or min(map(rows_of, buckets)) < 1:
        raise InputError(f"{text!r}: every bucket needs rows, and one must cover all others; add {most[0]},{most[1]}")
    return buckets


class BucketChoice(NamedTuple):
    """Chosen buckets; `exact` when an exhaustive search found no better ones."""

    buckets: tuple[BucketSize, ...]
    exact: bool


def choose_buckets(counts: StepCounts, given: Sequence[BucketSize], count: int | None = None) -> BucketChoice:
    """The at most `count` buckets (default: as many as `given`) for which the counted steps compute the fewest rows.

    The largest of the given ones is among them. They never compute more rows than the given ones, if as many are
    allowed.

    Raises InputError when `count` is less than 1.
    """
    count = len(given) if count is None else count
    if count < 1:
        raise InputError(f"the number of buckets is {count}; it must be at least 1")
    search = _Search.of(counts, given)
    free = min(count - 1, len(search.corners))
    effort = math.comb(len(search.corners), max(free - 1, 0)) * search.rows.size
    if effort <= SEARCHED:
        return BucketChoice(search.buckets(search.best(free)), True)
    starts = [search.greedy(free)]
    if len(given) <= count:
        starts.append([search.corners.index(b) for b in given if b != search.most])
    return BucketChoice(search.buckets(min(map(search.improved, starts), key=search.cost)), False)


def buckets_to_serve(
    counts: StepCounts, given: Sequence[BucketSize], *, steps: int, saves: float
) -> tuple[BucketSize, ...]:
    """The buckets to serve with: those chosen last, or the given ones, until others are worth their compilation.

    They are once at least `steps` steps are counted and others save the share `saves` of the rows.
    """
    last = counts.chosen if counts.chosen and largest_bucket(counts.chosen) == largest_bucket(given) else tuple(given)
    if counts.steps < steps:
        return last
    proposed = choose_buckets(counts, given).buckets
    return proposed if computed_rows(counts, proposed) <= (1 - saves) * computed_rows(counts, last) else last


@dataclasses.dataclass
class _Search:
    """The search for buckets: demand points p, and corners c, the candidates for buckets.

    `rows[p, c]` are the rows of corner c where it covers p, else infinite; `none[p]` those of the largest bucket, which
    covers all; `weight[p]` is how often p is wanted.
    """

    most: BucketSize
    corners: list[BucketSize]
    rows: np.ndarray
    none: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, counts: StepCounts, given: Sequence[BucketSize]) -> _Search:
        """The search over the counted demand, with a share of it (HEDGE) for the given buckets."""
        most = largest_bucket(given)
        weights: dict[BucketSize, float] = {}
        for bucket, want in counts.wanted.items():
            at = _clipped(bucket, most)
            weights[at] = weights.get(at, 0.0) + want.ranks
        share = HEDGE * max(sum(weights.values()), 1.0) / len(given)
        for bucket in given:
            weights[bucket] = weights.get(bucket, 0.0) + share
        # A bucket can shrink to the largest demand of its steps in each direction, which two of them set: a corner.
        corners = {largest_bucket(pair) for pair in itertools.product(weights, repeat=2)} - {most}
        points, order = np.array(list(weights)), sorted(corners, key=lambda b: (rows_of(b), b))
        at = np.array(order, int).reshape(-1, 2)
        covers = (at[None] >= points[:, None]).all(-1)
        sizes = at[:, 0] + TILE * at[:, 1]
        rows = np.where(covers, sizes, np.inf)
        return cls(most, order, rows, np.full(len(points), float(rows_of(most))), np.array(list(weights.values())))

    def buckets(self, chosen: Iterable[int]) -> tuple[BucketSize, ...]:
        """The chosen corners and the largest bucket, by rows."""
        kept = sorted({*(self.corners[c] for c in chosen), self.most}, key=lambda b: (rows_of(b), b))
        return tuple(kept)

    def cost(self, chosen: Sequence[int]) -> float:
        """Rows computed for all demand with the `chosen` corners."""
        return float(self.weight @ self._least(chosen))

    def best(self, free: int) -> list[int]:
        """The `free` corners with the lowest cost, by exhaustive search."""
        if not free:
            return []
        found: tuple[float, list[int]] = (math.inf, [])
        for some in itertools.combinations(range(len(self.corners)), free - 1):
            cost, last = self._one_more(some)
            if cost < found[0]:
                found = cost, [*some, last]
        return found[1]

    def greedy(self, free: int) -> list[int]:
        """`free` corners, chosen one after the other."""
        chosen: list[int] = []
        for _ in range(free):
            chosen.append(self._one_more(chosen)[1])
        return chosen

    def improved(self, chosen: list[int]) -> list[int]:
        """The chosen corners, with one exchanged for another as long as that lowers the cost."""
        cost = self.cost(chosen)
        while True:
            others = [chosen[:i] + chosen[i + 1 :] for i in range(len(chosen))]
            found = min(((*self._one_more(some), some) for some in others), default=(math.inf, 0, []))
            if not found[0] < cost:
                return chosen
            cost, chosen = found[0], [*found[2], found[1]]

    def _one_more(self, chosen: Sequence[int]) -> tuple[float, int]:
        """The lowest cost with one corner more than the `chosen` ones, and that corner."""
        costs = self.weight @ np.minimum(self._least(chosen)[:, None], self.rows)
        best = int(costs.argmin())
        return float(costs[best]), best

    def _least(self, chosen: Sequence[int]) -> np.ndarray:
        """Rows of the smallest chosen corner that covers each point, float [points]."""
        return np.minimum(self.none, self.rows[:, list(chosen)].min(1, initial=np.inf))


def _clipped(bucket: BucketSize, most: BucketSize) -> BucketSize:
    """The bucket, at most as large as `most` in each direction."""
    return min(bucket[0], most[0]), min(bucket[1], most[1])


def _numbers(row: Iterable[Any]) -> list[int]:
    """The row as a list of whole numbers of at least 0. Raises ValueError for anything else."""
    row = list(row)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in row):
        raise ValueError(f"{row!r} is not of whole numbers")
    return row
