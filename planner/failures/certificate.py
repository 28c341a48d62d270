"""Certificates: whether every loss that a plan must survive keeps its service levels, or the smallest that does not.

Losses are taken by their number of units: each rank, each host, and so on up to those asked for. Where they are few,
each is priced (`LossModel.outcome`). Where they are many, one loss of each type is priced as if it took no expert with
it (`loss_types`), weights are added for the most experts that any loss of this size can take (`lost_copies`,
`LossModel.weights_at_most`), and losses that may take more experts than the service levels leave time for are priced
one by one. The bound is proven: losses of a type leave the same mesh, so they differ in the time of weights alone,
which grows with the experts lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations, islice
from math import comb, inf
from typing import Any

from planner.cost.band import own_range
from planner.errors import InputError
from planner.failures.loss_bands import LossBands, Ranges
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.loss_types import LossTypes
from planner.failures.lost_copies import LostCopies
from planner.failures.survivors import Survivors, survivors
from planner.inputs.traffic import read_pairs
from planner.plan.deployment import FaultTolerance

EACH = 4096
"""Losses of one size up to which each is priced."""
MOST_PRICED = 50_000
"""Losses of one size that are priced one by one beyond what the bound proves."""


@dataclass(frozen=True, kw_only=True)
class ServiceLevels:
    """The most milliseconds between two tokens (`tpot_ms`), of a stall of streams on surviving ranks (`stall_ms`) and
    on lost ones (`moved_stall_ms`), and the least share of the tokens/s left (`capacity`); None: nothing is asked."""

    tpot_ms: float | None = None
    stall_ms: float | None = None
    moved_stall_ms: float | None = None
    capacity: float | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if not given:
            raise InputError(f"--slo asks for nothing; give one of {', '.join(f.name for f in fields(self))}")
        for name, value in given.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < inf:
                raise InputError(f"--slo {name} is {value!r}; it must be a number above 0")

    def missed(self, figures: Mapping[str, float]) -> str:
        """The levels that `figures` do not keep, each with both values; empty when they keep all."""
        wrong = []
        for f in fields(self):
            asked, value = getattr(self, f.name), figures[f.name]
            if asked is not None and not (value >= asked if f.name == "capacity" else value <= asked):
                wrong.append(f"{f.name} {'never' if value == inf else f'{value:,.4g}'}, asked {asked:g}")
        return ", ".join(wrong)


def read_service_levels(text: str) -> ServiceLevels:
    """ServiceLevels from `tpot_ms=50,stall_ms=500`. InputError for an unknown name or a wrong value."""
    return ServiceLevels(**read_pairs(text, {f.name: float for f in fields(ServiceLevels)}, "--slo"))


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The losses, the service levels, and the number of requests that run all the while."""

    survive: FaultTolerance
    levels: ServiceLevels
    requests: int


@dataclass(frozen=True, kw_only=True)
class LossesOfASize:
    """All losses of `lost` units of a `kind`: how many there are, how many were priced one by one, and the worst of the
    figures of those priced and of the bound on all others.

    `ranges` are the worst figures as {low, mid, high}. `failing` is a loss that misses the service levels, as `missed`
    says; None when none does. `unfinished` is True when some losses are neither proven nor priced.
    """

    kind: str
    lost: int
    losses: int
    priced: int
    worst: Mapping[str, float]
    ranges: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    failing: LossOutcome | None = None
    missed: str = ""
    unfinished: bool = False


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sizes of losses that were checked, in ascending number of ranks, up to the first with a loss that fails.

    `missed` says what the plan itself misses before any loss, `unsure` what would be missed at the worse ends of the
    ranges.
    """

    sizes: tuple[LossesOfASize, ...]
    missed: str = ""
    unsure: str = ""

    @property
    def holds(self) -> bool:
        """True when every loss keeps the service levels."""
        return not self.missed and not any(s.failing or s.unfinished for s in self.sizes)

    @property
    def failing(self) -> LossesOfASize | None:
        """The size with the smallest loss that does not keep the service levels; None when there is none."""
        failing = [(len(s.failing.dead), at) for at, s in enumerate(self.sizes) if s.failing]
        return self.sizes[min(failing)[1]] if failing else None

    def to_dict(self) -> dict[str, Any]:
        """The verdict for JSON; infinite figures are None."""
        rows = []
        for s in self.sizes:
            worst = {name: value if value < inf else None for name, value in s.worst.items()}
            ranges = {
                name: {end: value if value < inf else None for end, value in each.items()}
                for name, each in s.ranges.items()
            }
            failing = s.failing and {"name": s.failing.name, "ranks": list(s.failing.dead), "missed": s.missed}
            rows.append({**asdict(replace(s, failing=None)), "worst": worst, "ranges": ranges, "failing": failing})
        return {"holds": self.holds, "missed": self.missed, "unsure": self.unsure, "sizes": rows}


def certify(losses: LossModel, terms: Terms, *, each: int = EACH, most_priced: int = MOST_PRICED) -> Verdict:
    """Whether every loss that `terms` name keeps their service levels.

    Losses of ranks, of hosts and of racks are each taken by themselves, as `solve --survive` does. Sizes with more than
    `each` losses are proven by the bound where it can; at most `most_priced` losses of a size are priced besides.
    """
    return _Certification(losses, terms, each, most_priced).run()


class _Certification:
    """One run: the loss model, the terms, and what both say of the ranks left of a loss."""

    def __init__(self, losses: LossModel, terms: Terms, each: int, most_priced: int) -> None:
        self.losses, self.terms, self.each, self.most_priced = losses, terms, each, most_priced
        self.capacity_model, self.plan = losses.capacity_model, losses.deployment.plan
        self.types, self.bands = LossTypes(self.capacity_model), LossBands(losses)

    def run(self) -> Verdict:
        """Check size after size; stop where a loss fails and no later size has a smaller one."""
        missed, done, smallest = self._missed_whole(), [], inf
        for least, kind, lost, units in self._sizes():
            if missed or least >= smallest:
                break
            done.append(self._check(kind, lost, units))
            if done[-1].failing:
                smallest = min(smallest, len(done[-1].failing.dead))
        return Verdict(sizes=tuple(done), missed=missed, unsure="" if missed else self._unsure(done))

    def _unsure(self, done: Sequence[LossesOfASize]) -> str:
        """The first service levels that are missed at the worse ends of the ranges; empty when none are."""
        for size in done:
            ends = {name: each["low" if name == "capacity" else "high"] for name, each in size.ranges.items()}
            if ends and not size.failing and (missed := self.terms.levels.missed(ends)):
                return f"{size.lost} {size.kind}: {missed}"
        return ""

    def _sizes(self) -> list[tuple[int, str, int, list[tuple[int, ...]]]]:
        """Each kind and number of units to lose, with the units, by the fewest ranks that such a loss takes."""
        alive, found = set(self.plan.rank_ids), []
        survive = self.terms.survive
        for kind, most in (("rank", survive.ranks), ("host", survive.hosts), ("rack", survive.racks)):
            domains = self.losses.deployment.cluster.domains(kind).values()
            units = [ids for each in domains if (ids := tuple(i for i in each if i in alive))]
            sizes = sorted(map(len, units))
            found += [(sum(sizes[:lost]), kind, lost, units) for lost in range(1, min(most, len(units)) + 1)]
        return sorted(found, key=lambda each: each[0])

    def _missed_whole(self) -> str:
        """The service levels that the plan misses before any loss; empty when it keeps all."""
        nobody = survivors(self.losses.deployment, (), self.capacity_model, self.losses.means)
        tpot = self._tpot_ms(nobody, self.capacity_model.shape.slots)["mid"]
        figures = {"tpot_ms": tpot, "stall_ms": 0.0, "moved_stall_ms": 0.0, "capacity": 1.0}
        missed = self.terms.levels.missed(figures)
        return f"before any loss: {missed}" if missed else ""

    def _check(self, kind: str, lost: int, units: list[tuple[int, ...]]) -> LossesOfASize:
        """All losses of `lost` of the `units`."""
        count = comb(len(units), lost)
        every = combinations(range(len(units)), lost)
        if count <= self.each or not self.types.exact:
            return self._priced(kind, lost, count, units, every)
        chosen = self.types.examples(units, lost)
        examples = [_ranks(units, each) for each in chosen]
        refused = [each for each, dead in zip(chosen, examples, strict=True) if self._bound(dead, 0) is None]
        if refused:
            found = self._priced(kind, lost, count, units, refused)
            return found if found.failing else self._priced(kind, lost, count, units, every)
        copies = LostCopies(self.plan, units, lost)
        kept = _largest(copies.most(), lambda few: all(self._bound(dead, few) for dead in examples))
        bounds = [bound for dead in examples if (bound := self._bound(dead, kept))]
        above = copies.sets_above(kept) if kept < copies.most() else ()
        found = self._priced(kind, lost, count, units, above)
        ranges = _worst([*bounds, found.ranges])
        return replace(found, worst=_mid(ranges), ranges=ranges)

    def _priced(
        self, kind: str, lost: int, count: int, units: list[tuple[int, ...]], sets: Iterable[tuple[int, ...]]
    ) -> LossesOfASize:
        """Losses priced one by one, those of the fewest ranks first, up to the first that fails."""
        chosen = list(islice(sets, self.most_priced + 1))
        more, chosen = len(chosen) > self.most_priced, chosen[: self.most_priced]
        chosen.sort(key=lambda each: sum(len(units[at]) for at in each))
        rows: list[Ranges] = []
        for at, each in enumerate(chosen):
            outcome = self.losses.outcome(_ranks(units, each), kind=kind, name=_name(self.losses, kind, units, each))
            ranges, missed = self._figures(outcome)
            rows.append(ranges)
            if missed:
                worst = _worst(rows)
                head = {"kind": kind, "lost": lost, "losses": count, "priced": at + 1}
                return LossesOfASize(**head, worst=_mid(worst), ranges=worst, failing=outcome, missed=missed)
        worst, head = _worst(rows), {"kind": kind, "lost": lost, "losses": count, "priced": len(chosen)}
        return LossesOfASize(**head, worst=_mid(worst), ranges=worst, unfinished=more)

    def _figures(self, outcome: LossOutcome) -> tuple[Ranges, str]:
        """The figures of a loss that was priced, as ranges, and the service levels that it misses."""
        if not outcome.survivable:
            return {name: dict.fromkeys(ENDS, value) for name, value in UNSURVIVABLE.items()}, outcome.reason
        left = survivors(self.losses.deployment, frozenset(outcome.dead), self.capacity_model, self.losses.means)
        slots, _ = self.losses.slots_after(left)
        ranges = {"tpot_ms": self._tpot_ms(left, slots), **self.bands.of(outcome)}
        return ranges, self.terms.levels.missed(_mid(ranges))

    def _bound(self, dead: tuple[int, ...], lost: int) -> Ranges | None:
        """Bounds on the figures, and on the ends of their ranges, of every loss of this type that takes at most `lost`
        pairs; None when they miss the service levels, or when such a loss may not be survivable."""
        left = survivors(self.losses.deployment, frozenset(dead), self.capacity_model, self.losses.means)
        slots, reason = self.losses.slots_after(left)
        if reason or (lost and "store" not in self.losses.means):
            return None
        after = self.capacity_model.predict(left, slots)
        if not after.tokens_per_second:
            return None
        weights = self.losses.weights_at_most(left, lost, len(dead))
        phases = self.losses.phases(left, after, weights)
        moved = sum(phases.values()) + self.losses.recompute(left, after)[1]
        capacity = self.capacity_model.capacity(left, slots)
        ranges = {"tpot_ms": self._tpot_ms(left, slots), **self.bands.around(phases, moved, capacity)}
        return None if self.terms.levels.missed(_mid(ranges)) else ranges

    def _tpot_ms(self, left: Survivors, slots: int) -> dict[str, float]:
        """Milliseconds between two tokens, the ranks' or the front's, whichever are more: {low, mid, high}."""
        seconds = self.capacity_model.token_seconds(left, slots, self.terms.requests)
        front = own_range(self.losses.recovery.front.step_seconds(left.ranks, self.terms.requests))
        ranks = self.bands.band.around(seconds, "tpot")
        return {end: 1e3 * max(ranks[end], front[end]) for end in ENDS}


ENDS = ("low", "mid", "high")
UNSURVIVABLE = {"tpot_ms": inf, "stall_ms": inf, "moved_stall_ms": inf, "capacity": 0.0}


def _worst(rows: Iterable[Ranges]) -> dict[str, dict[str, float]]:
    """The worst of each figure, and of each end of its range."""
    rows = [row for row in rows if row]
    if not rows:
        return {}
    pick = {name: min if name == "capacity" else max for name in UNSURVIVABLE}
    return {name: {end: worse(row[name][end] for row in rows) for end in ENDS} for name, worse in pick.items()}


def _mid(ranges: Ranges) -> dict[str, float]:
    """The figures themselves."""
    return {name: each["mid"] for name, each in ranges.items()}


def _ranks(units: Sequence[Sequence[int]], chosen: Iterable[int]) -> tuple[int, ...]:
    """The ranks of the chosen units."""
    return tuple(sorted(rank for at in chosen for rank in units[at]))


def _name(losses: LossModel, kind: str, units: Sequence[Sequence[int]], chosen: Iterable[int]) -> str:
    """The names of the chosen units."""
    place = losses.capacity_model.place
    if kind == "rank":
        return ",".join(str(units[at][0]) for at in chosen)
    return ",".join(str(getattr(place[units[at][0]], kind)) for at in chosen)


def _largest(most: int, keeps: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which `keeps`, true at 0 and false from some number on."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle - 1)
    return low
