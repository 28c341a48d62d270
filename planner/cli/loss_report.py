"""Reports of losses: forecasts of recovery, of its preparation, and of months under each policy, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf, log10
from typing import Any

from planner.cli.table import table
from planner.cost.band import own_range, range_text
from planner.cost.front import Pace
from planner.cost.throughput import gb
from planner.failures.loss_bands import LossBands, range_cells
from planner.failures.loss_model import LossOutcome
from planner.failures.simulate import PolicyResult
from planner.solver.lattice import Preparation

LONG = 100_000
"""Seconds of stalls from which on they are hours."""


def degrade_report(summary: Sequence[dict], sampled: int, phases: str, source: str, *, width: int | None = None) -> str:
    """A few lines for each kind of loss, and a table of the worst losses, each with its own figures as ranges.

    `phases` is the source of the phases of a recovery, `source` that of the ranges; `width` is that of the table, None
    without a limit.
    """
    lines = []
    for r in summary:
        of = f" (a sample of {sampled:,})" if r["kind"] == "pair" and sampled else ""
        name = "1-rank" if r["kind"] == "rank" else r["kind"]
        line = f"{name} losses{of}: {r['survivable']}/{r['cases']} survivable"
        if r["survivable"]:
            stall, own, _ = range_cells(r["worst_ranges"])
            line += (
                f", {r['from_memory']} of them without the store, worst stall {r['worst_stall_ms']:,.0f} ms ({stall}), "
                f"of streams of dead ranks {r['worst_moved_stall_ms']:,.0f} ms ({own})"
            )
        lines.append(line)
        if r["worst_phases_ms"]:
            worst = " + ".join(f"{name} {ms:,.0f}" for name, ms in r["worst_phases_ms"].items())
            lines.append(f"  worst {r['worst_name']}: {worst} ms")
        lines += [f"  {reason}" for reason in r["reasons"]]
    worst = [(f"{r['kind'].replace('_', ' ')} {w['name']}", w) for r in summary for w in r["worst"]]
    if worst:
        masked = any(w["masked"] for _, w in worst)
        more = ["masked", "quality"] if masked else []
        head = ["loss", "stall ms", "its own", "moved", "capacity", *more]
        rows = [[name, *_loss_cells(w, masked=masked), ", ".join(w["worst_in"])] for name, w in worst]
        lines += ["", table([*head, "the worst in"], rows, width=width), ""]
        for name, w in worst:
            means = ", ".join(f"{means} {count:,}" for means, count in w["means"].items())
            lines.append(
                f"{name}: {means or 'nothing to restore'}; {w['cache_tokens']:,} cache tokens, "
                f"{w['traffic_lost']:.2%} of expert traffic"
            )
    messages = "messages [measured on simulated ranks, docs/scale.md]"
    return "\n".join(
        [*lines, "", f"detection, abort and adoption [{phases}], {messages}, all else [estimate]", source, ""]
    )


def _loss_cells(loss: Mapping[str, Any], *, masked: bool) -> list[str]:
    """The figures of one loss as cells of a table, those of masking only where some loss masks experts."""
    quality = [str(loss["masked"]), f"{loss['score']:.1%}"] if masked else []
    stall, own, capacity = range_cells(loss["ranges"])
    return [
        stall,
        own,
        gb(loss["bytes"]),
        capacity,
        *quality,
    ]


def preparation_report(ready: Mapping[str, Preparation], *, width: int | None = None) -> str:
    """A table of the cost of preparing losses, for lattices of growing size."""
    head = ["to prepare", "sets of survivors", "compiles", "meshes of ranks", "moving executables", "slot tables"]
    rows = [
        [
            name,
            f"{r.sets:,}",
            r.compiles,
            ", ".join(map(str, r.mesh_sizes[:3])) + (", ..." if len(r.mesh_sizes) > 3 else ""),
            f"{r.move_seconds:,.1f} s",
            f"{r.table_bytes / 1e6:,.0f} MB",
        ]
        for name, r in ready.items()
    ]
    return table(head, rows, width=width)


def pace_line(pace: Pace | None) -> str:
    """Whether one front keeps pace with the ranks of a plan, and where not how far it would; empty without a step."""
    if pace is None:
        return ""
    ranks = pace.ranks_step * 1e3
    need = (
        f"{range_text(own_range(pace.front_step * 1e3))} ms"
        if pace.front_step < inf
        else "all its time to watch the ranks"
    )
    if pace.kept:
        return f"one front keeps pace: a step takes it {need}, the ranks {ranks:,.1f} ms"
    each = pace.requests / pace.ranks
    return (
        f"beyond what one front can pace: a step with {pace.requests:,} requests takes it {need}, "
        f"the ranks {ranks:,.1f} ms; it paces {pace.most_ranks:,} ranks with {each:.3g} requests each (docs/scale.md)\n"
        f"  {_fronts_needed(pace)}"
    )


def _fronts_needed(pace: Pace) -> str:
    """How many fronts a plan beyond the pace of one would take, or why no number of them will do."""
    if pace.fronts:
        return (
            f"{pace.fronts:,} servers of at most {pace.most_ranks:,} ranks, each with a front and an edge of its own, "
            f"would keep pace"
        )
    if pace.fewest_ranks:
        return f"no server of so few ranks holds the model: it takes {pace.fewest_ranks:,}"
    return "several servers would do no better"


def stall_line(outcome: LossOutcome, bands: LossBands) -> str:
    """How long the loss of a rank stalls the streams of others, by phase, and the range of the sum."""
    if not outcome.survivable:
        return f"the loss of rank {outcome.name} is not survivable: {outcome.reason}"
    phases = " + ".join(f"{name} {seconds * 1e3:,.0f}" for name, seconds in outcome.phases.items())
    stall, own, capacity = range_cells(bands.of(outcome))
    return (
        f"the loss of rank {outcome.name} stalls other streams {outcome.stall * 1e3:,.0f} ms: {phases}  [estimate]\n"
        f"  {stall} ms, its own streams {own} ms, {capacity} of tokens/s left\n"
        f"  {bands.source()}"
    )


def simulate_report(accounts: Sequence[PolicyResult], days: float, *, width: int | None = None) -> str:
    """A table of policies side by side; of a plan of pools one for the whole plan and one for either side."""
    sides: dict[str, list[PolicyResult]] = {}
    for each in accounts:
        sides.setdefault(each.side, []).append(each)
    texts = []
    for side, rows in sides.items():
        first = rows[0]
        title = f"{side}: " if len(sides) > 1 else ""
        title += f"{days:g} days [estimate], {first.failures} failures, at most {first.most_dead} devices down at once"
        texts.append("\n".join([title, _policies_table(rows, width), *_policies_notes(rows)]))
    return "\n\n".join(texts)


def _policies_table(rows: Sequence[PolicyResult], width: int | None) -> str:
    """The policies of one side, figures as ranges."""
    long = max(each.stall_high for each in rows) >= LONG
    unit, seconds = ("h", 3600) if long else ("s", 1)
    head = ["policy", "availability", "goodput lost", "outage h", "masked h", "reduced h", f"stall {unit}"]
    cells = [
        [
            a.policy,
            share_range(*a.availability_range),
            share_range(a.goodput_low, a.goodput_high),
            f"{a.outage_hours:,.1f}",
            f"{a.degraded_hours:,.1f}",
            f"{a.reduced_hours:,.1f}",
            range_text({"low": a.stall_low / seconds, "high": a.stall_high / seconds}),
        ]
        for a in rows
    ]
    return table(head, cells, width=width)


def _policies_notes(rows: Sequence[PolicyResult]) -> list[str]:
    """The tokens that are computed again under each policy, and the hours in which roles had switched."""
    again = ", ".join(f"{a.policy} {a.tokens_recomputed / 1e6:,.1f}" for a in rows)
    notes = [f"million tokens computed again: {again}"]
    if any(a.switched_hours for a in rows):
        hours = ", ".join(f"{a.policy} {a.switched_hours:,.1f} h" for a in rows if a.switched_hours)
        notes.append(f"one side does the work of both: {hours}")
    return notes


def share_range(low: float, high: float) -> str:
    """Two shares as "99.95-99.98%", with two digits of what the farther one lacks of 0 % or 100 %; once where
    both look alike."""
    near = min((min(share, 1 - share) for share in (low, high) if 0 < share < 1), default=1.0)
    digits = min(6, max(1, ceil(-log10(near)) - 1))
    ends = dict.fromkeys(f"{100 * share:.{digits}f}" for share in (low, high))
    return "-".join(ends) + "%"
