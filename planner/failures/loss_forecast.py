"""Forecasts over all losses of interest (ranks, hosts, racks, pairs): their outcomes, a summary, and gates on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from planner.errors import InputError, unknown_key
from planner.failures.loss_model import LossModel, LossOutcome

KINDS = ("rank", "host", "rack", "pair")


def forecast_losses(
    losses: LossModel, *, kinds: Sequence[str] = KINDS, pairs: int | None = 500, seed: int = 0
) -> tuple[list[LossOutcome], int]:
    """Outcomes of every loss of the `kinds`, and the number of all pairs when only `pairs` of them are sampled.

    `pairs` None takes all. Hosts and racks with a single rank are left out, and a domain that is the whole cluster,
    except for the rank of a plan with one.
    """
    cluster, plan = losses.deployment.cluster, losses.deployment.plan
    alive = set(plan.rank_ids)
    outcomes, sampled = [], 0
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_key(kind, KINDS, "--kinds")
        if kind == "pair":
            chosen, total = _pairs(plan.rank_ids, pairs, seed)
            sampled = total if len(chosen) < total else 0
            outcomes += [losses.outcome(p, kind="pair") for p in chosen]
            continue
        for name, ids in cluster.domains(kind).items():
            dead = alive.intersection(ids)
            if dead and (kind == "rank" or 1 < len(dead) < len(alive)):
                outcomes.append(losses.outcome(dead, kind=kind, name=name))
    return outcomes, sampled


def _pairs(ids: Sequence[int], most: int | None, seed: int) -> tuple[list[tuple[int, int]], int]:
    n = len(ids)
    total = n * (n - 1) // 2
    if n < 3:
        return [], 0
    if most is None or total <= most:
        return list(combinations(ids, 2)), total
    rng = np.random.default_rng(seed)
    chosen: set[tuple[int, int]] = set()
    while len(chosen) < most:
        a, b = sorted(rng.choice(n, 2, replace=False).tolist())
        chosen.add((ids[a], ids[b]))
    return sorted(chosen), total


def worst_by_kind(outcomes: Iterable[LossOutcome]) -> dict[str, LossOutcome]:
    """Of each kind of loss, the survivable one with the longest stall; the first of several."""
    worst: dict[str, LossOutcome] = {}
    for o in outcomes:
        if o.survivable and (o.kind not in worst or o.stall > worst[o.kind].stall):
            worst[o.kind] = o
    return worst


WORST = {
    "stall": lambda o: o.stall,
    "its own stall": lambda o: o.moved_stall,
    "moved": lambda o: o.bytes_moved,
    "capacity": lambda o: -o.capacity,
    "masked": lambda o: o.masked,
    "cache tokens": lambda o: o.cache_tokens,
    "expert traffic": lambda o: o.traffic_lost,
    "quality": lambda o: -o.score,
}
"""Figures of a loss, each larger where the loss is worse."""


def worst_losses(outcomes: Iterable[LossOutcome]) -> list[tuple[LossOutcome, list[str]]]:
    """The survivable losses that are the worst in a figure of WORST, each with those figures; as few as that takes.

    Figures in which all losses are alike are left out, but for the stall.
    """
    good = [o for o in outcomes if o.survivable]
    chosen: list[tuple[LossOutcome, list[str]]] = []
    for name, figure in WORST.items():
        values = [figure(o) for o in good]
        if not values or (min(values) == max(values) and name != "stall"):
            continue
        known = next((names for o, names in chosen if figure(o) == max(values)), None)
        if known is None:
            chosen.append((good[values.index(max(values))], known := []))
        known.append(name)
    return chosen


RangesOf = Callable[[LossOutcome], Mapping[str, Mapping[str, float]]]


def _figures_of(outcome: LossOutcome, worst_in: list[str], ranges: RangesOf) -> dict:
    """The figures of one loss, for a row of a table."""
    return {
        "ranges": ranges(outcome),
        "name": outcome.name,
        "worst_in": worst_in,
        "stall_ms": outcome.stall * 1e3,
        "moved_stall_ms": outcome.moved_stall * 1e3,
        "bytes": outcome.bytes_moved,
        "capacity": outcome.capacity,
        "masked": outcome.masked,
        "cache_tokens": outcome.cache_tokens,
        "traffic_lost": outcome.traffic_lost,
        "score": outcome.score,
        "means": outcome.means,
    }


def summarise(outcomes: Sequence[LossOutcome], ranges: RangesOf) -> list[dict]:
    """One row per kind of loss: cases, survivable cases, those from memory alone, and the worst of each figure, those
    of the longest stalls and of the least capacity with their `ranges` (`LossBands.of`).

    Figures named `worst_` or `most_` may be of different losses, as gates need them; `worst` has whole losses
    (`worst_losses`), each with its own figures.
    """
    rows: dict[str, list[LossOutcome]] = {}
    for o in outcomes:
        rows.setdefault(o.kind, []).append(o)
    longest = worst_by_kind(outcomes)
    result = []
    for kind, group in rows.items():
        good = [o for o in group if o.survivable]
        worst = longest.get(kind)
        own, least = (min(good, key=key, default=None) for key in (lambda o: -o.moved_stall, lambda o: o.capacity))
        result.append(
            {
                "kind": kind,
                "cases": len(group),
                "survivable": len(good),
                "from_memory": sum(o.from_memory for o in group),
                "worst_stall_ms": worst.stall * 1e3 if worst else 0.0,
                "worst_name": worst.name if worst else "",
                "worst_phases_ms": {name: 1e3 * s for name, s in worst.phases.items()} if worst else {},
                "worst_moved_stall_ms": max((o.moved_stall for o in good), default=0.0) * 1e3,
                "worst_ranges": {
                    name: ranges(each)[name]
                    for name, each in (("stall_ms", worst), ("moved_stall_ms", own), ("capacity", least))
                    if each
                },
                "worst_bytes": max((o.bytes_moved for o in good), default=0),
                "worst_capacity": min((o.capacity for o in good), default=0.0),
                "most_masked": max((o.masked for o in group), default=0),
                "most_cache_tokens": max((o.cache_tokens for o in group), default=0),
                "worst_traffic_lost": max((o.traffic_lost for o in group), default=0.0),
                "worst_score": min((o.score for o in good), default=0.0),
                "worst": [_figures_of(*each, ranges) for each in worst_losses(group)],
                "reasons": sorted({o.reason for o in group if o.reason})[:3],
            }
        )
    return result


GATES = {
    "survivable": lambda rows: sum(r["survivable"] for r in rows) / max(1, sum(r["cases"] for r in rows)),
    "from_memory": lambda rows: sum(r["from_memory"] for r in rows) / max(1, sum(r["cases"] for r in rows)),
    "worst_stall_ms": lambda rows: max((r["worst_stall_ms"] for r in rows), default=0.0),
    "worst_moved_stall_ms": lambda rows: max((r["worst_moved_stall_ms"] for r in rows), default=0.0),
    "capacity": lambda rows: min((r["worst_capacity"] for r in rows), default=0.0),
    "masked": lambda rows: max((r["most_masked"] for r in rows), default=0),
    "score": lambda rows: min((r["worst_score"] for r in rows), default=0.0),
}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_gate(text: str, summary: Sequence[dict]) -> list[str]:
    """The parts of a gate such as `survivable>=1.0, worst_stall_ms<=500` that do not hold, each with the value.

    Names are those of GATES, over all kinds of loss; `host.worst_stall_ms` is of one kind. InputError for a wrong gate.
    """
    broken = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(?:(\w+)\.)?(\w+)\s*(>=|<=)\s*([-+.\deE]+)", part)
        if not match:
            raise InputError(f"gate {part!r} is not NAME>=NUMBER or NAME<=NUMBER")
        kind, name, sign, bound = match.groups()
        limit = _number(bound)
        if limit is None:
            raise InputError(f"gate {part!r} is not NAME>=NUMBER or NAME<=NUMBER: {bound!r} is no number")
        if name not in GATES:
            raise unknown_key(name, GATES, "--gate")
        rows = [r for r in summary if kind in (None, r["kind"])]
        if kind is not None and not rows:
            raise unknown_key(kind, [r["kind"] for r in summary], "--gate (kind of loss)")
        value = GATES[name](rows)
        if not (value >= limit if sign == ">=" else value <= limit):
            broken.append(f"{part}: it is {value:.4g}")
    return broken
