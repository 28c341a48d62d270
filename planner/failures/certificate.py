"""Certificates: whether every loss that a plan must survive keeps its service levels, or the smallest that does not.

Losses are taken by their number of units: each rank, each host, and so on up to those asked for. Where they are few,
each is priced. Where they are many, one loss of each type is priced as if it took no expert with it (`loss_types`),
weights are added for the most experts that any loss of this size can take (`lost_copies`,
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

from planner.errors import InputError
from planner.failures.certified_losses import CertifiedLosses
from planner.failures.certified_mesh import CertifiedMesh
from planner.failures.certified_pools import CertifiedPools
from planner.failures.loss_bands import Ranges, worst_ranges
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.loss_types import examples
from planner.failures.pool_losses import PoolLossModel
from planner.inputs.traffic import read_pairs
from planner.plan.deployment import FaultTolerance

EACH = 4096
"""Losses of one size up to which each is priced."""
MOST_PRICED = 50_000
"""Losses of one size that are priced one by one beyond what the bound proves."""
MOST_TYPES = 256
"""Types of losses of one size up to which the bound is tried."""


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
            if name == "capacity" and value > 1:
                raise InputError(f"--slo capacity is {value!r}; it is the share of the tokens/s left, up to 1")

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


def certify(
    losses: LossModel | PoolLossModel, terms: Terms, *, each: int = EACH, most_priced: int = MOST_PRICED
) -> Verdict:
    """Whether every loss that `terms` name keeps their service levels.

    Losses of ranks, of hosts and of racks are each taken by themselves, as `solve --survive` does, of pools in all
    combinations over both sides. Sizes with more than `each` losses are proven by the bound where it can; at most
    `most_priced` losses of a size are priced besides.
    """
    of = CertifiedPools(losses) if isinstance(losses, PoolLossModel) else CertifiedMesh(losses)
    return _Certification(of, terms, each, most_priced).run()


class _Certification:
    """One run: the losses, the terms, and what both say of the ranks left of a loss."""

    def __init__(self, losses: CertifiedLosses, terms: Terms, each: int, most_priced: int) -> None:
        self.losses, self.terms, self.each, self.most_priced = losses, terms, each, most_priced

    def run(self) -> Verdict:
        """Check size after size. Stop where a loss fails and no later size has a smaller one; leave a kind at the size
        that has more losses than can be checked."""
        missed, done, smallest, unfinished = self._missed_whole(), [], inf, set()
        for least, kind, lost, units in self._sizes():
            if missed or least >= smallest:
                break
            if kind in unfinished:  # larger losses of the kind are more still
                continue
            done.append(self._check(kind, lost, units))
            if done[-1].failing:
                smallest = min(smallest, len(done[-1].failing.dead))
            if done[-1].unfinished:
                unfinished.add(kind)
        return Verdict(sizes=tuple(done), missed=missed, unsure="" if missed else self._unsure(done))

    def _unsure(self, done: Sequence[LossesOfASize]) -> str:
        """The first service levels that are missed at the worse ends of the ranges; empty when none are."""
        for size in done:
            ends = {name: each["low" if name == "capacity" else "high"] for name, each in size.ranges.items()}
            if ends and not size.failing and (missed := self.terms.levels.missed(ends)):
                return f"{size.lost} {size.kind}: {missed}"
        return ""

    def _sizes(self) -> list[tuple[int, str, int, _Units]]:
        """Each kind and number of units to lose, with the units, by the fewest ranks that such a loss takes."""
        found, survive = [], self.terms.survive
        for kind, most in (("rank", survive.ranks), ("host", survive.hosts), ("rack", survive.racks)):
            units = _Units(self.losses.domains(kind))
            sizes = sorted(map(len, units.ranks))
            found += [(sum(sizes[:lost]), kind, lost, units) for lost in range(1, min(most, len(sizes)) + 1)]
        return sorted(found, key=lambda each: each[0])

    def _missed_whole(self) -> str:
        """The service levels that the plan misses before any loss; empty when it keeps all."""
        tpot = self.losses.whole_tpot(self.terms.requests)["mid"]
        figures = {"tpot_ms": tpot, "stall_ms": 0.0, "moved_stall_ms": 0.0, "capacity": 1.0}
        missed = self.terms.levels.missed(figures)
        return f"before any loss: {missed}" if missed else ""

    def _check(self, kind: str, lost: int, units: _Units) -> LossesOfASize:
        """All losses of `lost` of the `units`."""
        count = comb(len(units.ranks), lost)
        every = combinations(range(len(units.ranks)), lost)
        if count <= self.each or not self.losses.exact:
            return self._priced(kind, lost, count, units, every)
        chosen = examples(units.ranks, lost, self.losses.type_of, MOST_TYPES)
        if chosen is None:
            return self._priced(kind, lost, count, units, every, most=MOST_TYPES)
        dead_of = [units.dead(each) for each in chosen]
        refused = [each for each, dead in zip(chosen, dead_of, strict=True) if self._bound(dead, 0) is None]
        if refused:
            found = self._priced(kind, lost, count, units, refused)
            return found if found.failing else self._priced(kind, lost, count, units, every)
        copies = self.losses.copies(units.ranks, lost)
        kept = _largest(copies.most(), lambda few: all(self._bound(dead, few) for dead in dead_of))
        bounds = [bound for dead in dead_of if (bound := self._bound(dead, kept))]
        above = copies.sets_above(kept) if kept < copies.most() else ()
        found = self._priced(kind, lost, count, units, above)
        ranges = worst_ranges([*bounds, found.ranges])
        return replace(found, worst=_mid(ranges), ranges=ranges)

    def _priced(
        self,
        kind: str,
        lost: int,
        count: int,
        units: _Units,
        sets: Iterable[tuple[int, ...]],
        most: int | None = None,
    ) -> LossesOfASize:
        """Losses priced one by one, those of the fewest ranks first, up to the first that fails; `most` of them, or as
        many as may be priced."""
        most = self.most_priced if most is None else most
        chosen = list(islice(sets, most + 1))
        more, chosen = len(chosen) > most, chosen[:most]
        chosen.sort(key=lambda each: sum(len(units.ranks[at]) for at in each))
        rows: list[Ranges] = []
        for at, each in enumerate(chosen):
            name = ",".join(self.losses.label(units.names[one], units.ranks[one]) for one in each)
            outcome, ranges = self.losses.priced(units.dead(each), kind, name, self.terms.requests)
            missed = self.terms.levels.missed(_mid(ranges)) if outcome.survivable else outcome.reason
            rows.append(ranges if outcome.survivable else UNSURVIVABLE)
            if missed:
                worst = worst_ranges(rows)
                head = {"kind": kind, "lost": lost, "losses": count, "priced": at + 1}
                return LossesOfASize(**head, worst=_mid(worst), ranges=worst, failing=outcome, missed=missed)
        worst, head = worst_ranges(rows), {"kind": kind, "lost": lost, "losses": count, "priced": len(chosen)}
        return LossesOfASize(**head, worst=_mid(worst), ranges=worst, unfinished=more)

    def _bound(self, dead: tuple[int, ...], lost: int) -> Ranges | None:
        """Bounds on the figures of every loss of the type of `dead` that takes at most `lost` pairs; None when they
        miss the service levels, or when such a loss may not be survivable."""
        ranges = self.losses.bound(dead, lost, self.terms.requests)
        return None if ranges is None or self.terms.levels.missed(_mid(ranges)) else ranges


class _Units:
    """The ranks, hosts or racks of which some are lost."""

    def __init__(self, domains: Mapping[str, tuple[int, ...]]) -> None:
        self.names, self.ranks = list(domains), list(domains.values())

    def dead(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """The ranks of the chosen units."""
        return tuple(sorted(rank for at in chosen for rank in self.ranks[at]))


ENDS: tuple[str, ...] = ("low", "mid", "high")
UNSURVIVABLE: Ranges = {
    **{name: dict.fromkeys(ENDS, inf) for name in ("tpot_ms", "stall_ms", "moved_stall_ms")},
    "capacity": dict.fromkeys(ENDS, 0.0),
}


def _mid(ranges: Ranges) -> dict[str, float]:
    """The figures themselves."""
    return {name: each["mid"] for name, each in ranges.items()}


def _largest(most: int, keeps: Callable[[int], bool]) -> int:
    """The largest number up to `most` for which `keeps`, true at 0 and false from some number on."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle - 1)
    return low
