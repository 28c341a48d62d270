"""All losses worth asking about: every rank, host and rack, and pairs; their summary; and gates on it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np

from planner.degrade import Losses, Outcome
from planner.errors import InputError, unknown_key

KINDS = ("rank", "host", "rack", "pair")


def foresee(
    losses: Losses, *, kinds: Sequence[str] = KINDS, pairs: int | None = 500, seed: int = 0
) -> tuple[list[Outcome], int]:
    """Outcomes of every loss of the `kinds`, and how many pairs there are when only `pairs` were sampled (None: all).

    Hosts and racks of one rank are left out, and a domain that is the whole cluster too.
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
            if dead and len(dead) < len(alive) and (kind == "rank" or len(dead) > 1):
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


def summarise(outcomes: Iterable[Outcome]) -> list[dict]:
    """One row per kind of loss: cases, survivable, from memory alone, worst figures, pairs by means."""
    rows: dict[str, list[Outcome]] = {}
    for o in outcomes:
        rows.setdefault(o.kind, []).append(o)
    result = []
    for kind, group in rows.items():
        good = [o for o in group if o.survivable]
        worst = max(good, key=lambda o: o.stall, default=None)
        means: dict[str, int] = {}
        for o in group:
            for name, count in o.means.items():
                means[name] = means.get(name, 0) + count
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
                "worst_bytes": max((o.bytes_moved for o in good), default=0),
                "worst_capacity": min((o.capacity for o in good), default=0.0),
                "most_masked": max((o.masked for o in group), default=0),
                "most_cache_tokens": max((o.cache_tokens for o in group), default=0),
                "worst_traffic_lost": max((o.traffic_lost for o in group), default=0.0),
                "worst_score": min((o.score for o in good), default=0.0),
                "means": means,
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
    """What of a gate such as `survivable>=1.0, worst_stall_ms<=500` does not hold; empty when all does.

    Names are those of GATES, over all kinds of loss; `host.worst_stall_ms` looks at one kind only.
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
