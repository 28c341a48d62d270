"""Plans and forecasts as text tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.deployment import Deployment
from planner.design import Design
from planner.diff import Transfer
from planner.lattice import Preparation
from planner.plan import Plan
from planner.shape import budget
from planner.simulate import Account
from planner.throughput import Candidate, gb
from planner.workload import Workload

BAR = 40  # characters of a full memory bar


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns wide enough for their longest cell, numbers to the right."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [all(_numeric(row[i]) for row in cells[1:]) for i in range(len(head))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _numeric(text: str) -> bool:
    return text.strip()[:1].isdigit() or text.strip() in ("", "-")


def design_report(design: Design, *, runners_up: int = 8) -> str:
    """The chosen plan, memory of a device, and the shapes that lost with the reason."""
    d, best = design.deployment, design.chosen
    w, hardware = d.workload, d.cluster.hardware
    lines = [
        f"{w.name}: {w.total_parameters / 1e9:,.1f} B parameters, {_layers(w)}, {w.weight_format}",
        f"{d.cluster.name}: {len(d.cluster.devices)} devices on {len(d.cluster.domains('host'))} hosts, "
        f"{gb(hardware.memory_bytes) if hardware.memory_bytes else 'no limit'} each",
        "",
        f"plan: {best.shape.describe()}",
        f"  {best.tokens_per_second:,.0f} tokens/s ({best.per_device():,.0f} a device), "
        f"{best.tokens_per_second_per_user:.1f} a user, "
        f"first token after {best.ttft_seconds:.2f} s  [estimate]",
        f"  {best.requests_per_group} requests x {best.shape.data} groups, {best.pages_per_rank:,} cache pages a rank",
    ]
    if best.step:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in best.step.parts().items())
        lines.append(f"  step {best.step.total * 1e3:.1f} ms: {parts}  [estimate]")
    if w.experts:
        lines.append(
            f"  hottest rank {design.peak:.3f} x the mean; {(d.plan.copies() >= 2).mean():.0%} of experts have "
            f"two copies or more, {len(d.plan.parity)} parity slots"
        )
    if d.traffic.rps:
        lines.append(f"  {best.tokens_per_second / d.traffic.output:.3g} requests/s, asked {d.traffic.rps:g}")
    lines += ["", "memory of a device", *memory_bars(d, best), "", "shapes compared, best first"]
    rows = [_candidate_row(c, design.candidates[0], rps=d.traffic.rps) for c in design.candidates[:runners_up]]
    lines.append(table(["shape", "tokens/s", "a device", "a user", "TTFT s", "why not"], rows))
    left = len(design.candidates) - runners_up
    return "\n".join(lines + ([f"... and {left} more"] if left > 0 else []))


def _layers(w: Workload) -> str:
    if not w.experts:
        return f"{w.layers} dense layers"
    return f"{w.moe_layers} MoE layers x {w.experts} experts, top {w.experts_per_token}"


def _candidate_row(c: Candidate, best: Candidate, *, rps: float | None) -> list[str]:
    reason = c.reason
    if not reason and c is not best and rps:
        reason = f"{1 - c.tokens_per_second_per_user / best.tokens_per_second_per_user:.1%} slower for a user"
    elif not reason and c is not best:
        less = 1 - c.tokens_per_second / best.tokens_per_second
        reason = f"{less:.1%} fewer tokens/s" + _bottleneck(c, best)
        if less < 0:
            reason = f"{-less:.1%} more tokens/s if its experts balanced perfectly; not placed"
    figures = (c.tokens_per_second, c.per_device(), c.tokens_per_second_per_user, c.ttft_seconds)
    numbers = [f"{x:,.{p}f}" if c.step else "-" for x, p in zip(figures, (0, 0, 1, 2), strict=True)]
    return [c.shape.describe(), *numbers, "chosen" if c is best else reason]


def _bottleneck(c: Candidate, best: Candidate) -> str:
    """What the slower shape spends its step on that the best does not."""
    if c.step is None or best.step is None:
        return ""
    if c.requests_per_group * c.shape.data < best.requests_per_group * best.shape.data:
        fewer = best.requests_per_group * best.shape.data - c.requests_per_group * c.shape.data
        return f": room for {fewer} fewer requests"
    ours, theirs = c.step.parts(), best.step.parts()
    worst = max(ours, key=lambda name: ours[name] - theirs[name])
    return f": {worst} takes {(ours[worst] - theirs[worst]) * 1e3:.1f} ms more"


def memory_bars(deployment: Deployment, candidate: Candidate) -> list[str]:
    """One bar for each use of a device's memory, as text."""
    room = budget(deployment.cluster)
    total = room or max(1, sum(size for _, size in candidate.memory))
    lines = []
    for name, size in candidate.memory:
        bar = "#" * min(BAR, round(BAR * size / total))
        lines.append(f"  {name:<38} {gb(size):>10}  {bar}")
    if room:
        free = room - sum(size for _, size in candidate.memory)
        lines.append(f"  {'free':<38} {gb(free):>10}")
    return lines


def degrade_report(summary: Sequence[dict], sampled: int, phases: str) -> str:
    """One line per kind of loss and a table of worst cases; `phases` says where those of a recovery come from."""
    lines = []
    for r in summary:
        of = f" (a sample of {sampled:,})" if r["kind"] == "pair" and sampled else ""
        name = "1-rank" if r["kind"] == "rank" else r["kind"]
        line = f"{name} losses{of}: {r['survivable']}/{r['cases']} survivable"
        if r["survivable"]:
            line += (
                f", {r['from_memory']} of them without the store, worst stall {r['worst_stall_ms']:.0f} ms "
                f"(streams of dead ranks {r['worst_moved_stall_ms']:,.0f} ms)"
            )
        lines.append(line)
        if r["worst_phases_ms"]:
            worst = " + ".join(f"{name} {ms:.0f}" for name, ms in r["worst_phases_ms"].items())
            lines.append(f"  worst {r['worst_name']}: {worst} ms")
        lines += [f"  {reason}" for reason in r["reasons"]]
    head = ["loss", "worst", "moved", "capacity", "masked", "quality", "cache tokens", "expert traffic", "means"]
    rows = [
        [
            r["kind"],
            r["worst_name"],
            gb(r["worst_bytes"]),
            f"{r['worst_capacity']:.1%}",
            r["most_masked"],
            f"{r['worst_score']:.1%}",
            f"{r['most_cache_tokens']:,}",
            f"{r['worst_traffic_lost']:.2%}",
            ", ".join(f"{k} {v:,}" for k, v in r["means"].items()),
        ]
        for r in summary
    ]
    return "\n".join(
        [*lines, "", table(head, rows), "", f"detection, abort and adoption [{phases}], all else [estimate]", ""]
    )


def preparation_report(ready: Mapping[str, Preparation]) -> str:
    """What it takes to have losses prepared, for more and more of them."""
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
    return table(head, rows)


def simulate_report(accounts: Sequence[Account], days: float) -> str:
    """Policies side by side."""
    head = [
        "policy",
        "availability",
        "goodput lost",
        "outage h",
        "masked h",
        "reduced h",
        "stall s",
        "recomputed",
    ]
    rows = [
        [
            a.policy,
            f"{a.availability:.5%}",
            f"{a.goodput_lost:.3%}",
            f"{a.outage_hours:,.1f}",
            f"{a.degraded_hours:,.1f}",
            f"{a.reduced_hours:,.1f}",
            f"{a.stall_seconds:,.1f}",
            f"{a.tokens_recomputed / 1e6:,.1f} M",
        ]
        for a in accounts
    ]
    first = accounts[0]
    title = f"{days:g} days [estimate], {first.failures} failures, at most {first.most_dead} devices down at once"
    return f"{title}\n{table(head, rows)}"


def transfer_report(transfer: Transfer, *, most: int = 20) -> str:
    """What moves, in rounds, with the first moves listed."""
    links = ", ".join(f"{link} {gb(size)}" for link, size in transfer.bytes_by_link.items() if size) or "nothing"
    lines = [
        f"{len(transfer.moves)} experts move in {len(transfer.rounds)} rounds, "
        f"{transfer.seconds * 1e3:.1f} ms: {links}",
        f"placing everything anew would move {transfer.naive_moves}",
    ]
    rows = [
        [m.layer, m.expert, m.rank, m.slot, m.source if m.peer is None else f"rank {m.peer}"]
        for m in transfer.moves[:most]
    ]
    if rows:
        lines += ["", table(["layer", "expert", "to rank", "slot", "from"], rows)]
    if len(transfer.moves) > most:
        lines.append(f"... and {len(transfer.moves) - most} more (--json has all)")
    return "\n".join(lines)


def slot_report(plan: Plan, *, layers: int = 4, ranks: int = 16) -> str:
    """The slot table as text: a line per rank, the experts of each layer in its columns."""
    lines = [f"{len(plan.ranks)} ranks, {plan.slots_per_rank} slots, {plan.experts} experts, epoch {plan.epoch}"]
    for r in plan.holders[:ranks]:
        slots = plan.slots_of(r.id)[:layers]
        cells = " | ".join(" ".join(f"{e:>3}" for e in row) for row in slots)
        lines.append(f"rank {r.id:>4} {r.host:<10} {cells}")
    hidden = max(0, len(plan.holders) - ranks)
    return "\n".join(lines + ([f"... and {hidden} more ranks"] if hidden else []))


def buckets_report(data: Mapping[str, Any]) -> str:
    """The buckets there are beside those proposed, and what each of them is used for."""
    about = ", ".join(f"{name} {value}" for name, value in data["about"].items() if name != "content")
    how = "no others are better" if data["exact"] else "found by search"
    lines = [f"{data['steps']:,} steps ({about})" if about else f"{data['steps']:,} steps"]
    for name in ("current", "proposed"):
        found = data[name]
        note = f" ({how})" if name == "proposed" else ""
        rows = [
            (each["bucket"][0], each["bucket"][1], f"{each['steps']:,}", f"{each['padding']:.1%}")
            for each in found["buckets"]
        ]
        lines += ["", f"{name}: {found['padding']:.1%} of {found['rows']:,} rows are padding{note}"]
        lines.append(table(("decode rows", "tiles", "steps", "padding"), rows))
    shapes = ";".join(f"{each['bucket'][0]},{each['bucket'][1]}" for each in data["proposed"]["buckets"])
    lines += ["", f"moejax serve --buckets '{shapes}'"]
    return "\n".join(lines)
