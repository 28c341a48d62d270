"""Reports: plans and forecasts as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from planner.cli.table import table
from planner.cost.band import own_range, range_text
from planner.cost.design import Design
from planner.cost.front import Pace
from planner.cost.throughput import Candidate, gb
from planner.failures.loss_bands import LossBands, range_cells
from planner.failures.loss_model import LossOutcome
from planner.failures.simulate import PolicyResult
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from planner.plan.transfer import Transfer
from planner.solver.balance import relative_rank_loads
from planner.solver.lattice import Preparation
from planner.solver.shapes import memory_budget

BAR = 40  # characters of a full memory bar


def design_report(design: Design, *, runners_up: int = 8, width: int | None = None) -> str:
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
        *_band_lines(design),
        f"  {best.requests_per_group} requests x {best.shape.data} groups, {best.pages_per_rank:,} cache pages a rank",
        *_kind_lines(design),
    ]
    if best.step:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in best.step.parts().items())
        band = design.band(best)
        lines.append(f"  step {best.step.total * 1e3:.1f} ms: {parts}  [estimate]")
        lines.append(f"  {band.text(best.step.total * 1e3, 'tpot', 'ms')}, each part by the same factor")
    if w.experts:
        lines.append(
            f"  hottest rank {design.peak:.3f} x the mean; {(d.plan.copies() >= 2).mean():.0%} of experts have "
            f"two copies or more, {len(d.plan.parity)} parity slots"
        )
    if d.traffic.rps:
        served = design.band(best).text(best.tokens_per_second / d.traffic.output, "rate", "requests/s")
        lines.append(f"  {served}, asked {d.traffic.rps:g}")
    for device, uses in best.memory_by_device().items():
        lines += ["", f"memory of {device}", *memory_bars(d, uses)]
    lines += ["", "shapes compared, best first"]
    rows = [_candidate_row(c, design) for c in design.candidates[:runners_up]]
    lines.append(table(["shape", "tokens/s", "a user", "TTFT s", "why not"], rows, width=width))
    left = len(design.candidates) - runners_up
    return "\n".join(lines + ([f"... and {left} more"] if left > 0 else []))


def _kind_lines(design: Design) -> list[str]:
    """The requests of a group of each kind of devices, and the expert traffic of its ranks."""
    d, best = design.deployment, design.chosen
    if not best.requests_by_kind:
        return []
    loads = relative_rank_loads(d.plan, d.load_array()).mean(axis=0) if d.plan.experts else []
    by_rank = dict(zip(d.plan.expert_rank_ids, loads, strict=False))
    lines = []
    for kind, count in best.requests_by_kind:
        own = [by_rank[device.id] for device in d.cluster.devices if device.kind == kind and device.id in by_rank]
        traffic = f", {sum(own) / len(own):.2f} x the mean expert traffic a rank" if own else ""
        lines.append(f"  {kind}: {count} requests a group{traffic}")
    return lines


def _band_lines(design: Design) -> list[str]:
    """The figures of the chosen shape as ranges, and why they are as wide."""
    best, band = design.chosen, design.band(design.chosen)
    if best.step is None:
        return []
    return [
        f"  {band.text(best.tokens_per_second, 'rate', 'tokens/s')} "
        f"({band.text(best.per_device(), 'rate', 'a device')}), "
        f"{band.text(best.tokens_per_second_per_user, 'tpot', 'a user')}, "
        f"a token every {band.text(1e3 / best.tokens_per_second_per_user, 'tpot', 'ms')}, "
        f"the first after {band.text(best.ttft_seconds, 'ttft', 's')}",
        f"  {band.source()}",
    ]


def _layers(w: Workload) -> str:
    if not w.experts:
        return f"{w.layers} dense layers"
    return f"{w.moe_layers} MoE layers x {w.experts} experts, top {w.experts_per_token}"


def _candidate_row(c: Candidate, design: Design) -> list[str]:
    """A shape compared: its figures as ranges, and why it was not chosen."""
    reason, best, rps = c.reason, design.candidates[0], design.deployment.traffic.rps
    if not reason and c is not best and rps:
        reason = f"{1 - c.tokens_per_second_per_user / best.tokens_per_second_per_user:.1%} slower for a user"
    elif not reason and c is not best:
        less = 1 - c.tokens_per_second / best.tokens_per_second
        reason = f"{less:.1%} fewer tokens/s" + _bottleneck(c, best)
        if less < 0:
            reason = f"{-less:.1%} more tokens/s if its experts balanced perfectly; not placed"
    ranges = design.ranges(c).get("ranges", {})
    names = ("tokens_per_second", "tokens_per_second_per_user", "ttft_s")
    numbers = [range_text(ranges[name]) if ranges else "-" for name in names]
    return [c.shape.describe(), *numbers, "chosen" if c is best else reason]


def _bottleneck(c: Candidate, best: Candidate) -> str:
    """The part of a step that the slower shape `c` spends most extra time on, or its lack of room for requests."""
    if c.step is None or best.step is None:
        return ""
    if c.requests_per_group * c.shape.data < best.requests_per_group * best.shape.data:
        fewer = best.requests_per_group * best.shape.data - c.requests_per_group * c.shape.data
        return f": room for {fewer} fewer requests"
    ours, theirs = c.step.parts(), best.step.parts()
    worst = max(ours, key=lambda name: ours[name] - theirs[name])
    return f": {worst} takes {(ours[worst] - theirs[worst]) * 1e3:.1f} ms more"


def memory_bars(deployment: Deployment, uses: Sequence[tuple[str, int]]) -> list[str]:
    """A bar of text for each use of the memory of a device, as (name, bytes)."""
    room = memory_budget(deployment.cluster)
    total = room or max(1, sum(size for _, size in uses))
    lines = []
    for name, size in uses:
        bar = "#" * min(BAR, round(BAR * size / total))
        lines.append(f"  {name:<38} {gb(size):>10}  {bar}")
    if room:
        free = room - sum(size for _, size in uses)
        lines.append(f"  {'free':<38} {gb(free):>10}")
    return lines


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
        f"the ranks {ranks:,.1f} ms; it paces {pace.most_ranks:,} ranks with {each:.3g} requests each (docs/scale.md)"
    )


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
    """A table of policies side by side."""
    head = [
        "policy",
        "availability",
        "goodput lost",
        "outage h",
        "masked h",
        "reduced h",
        "stall s",
        "tokens again, M",
    ]
    rows = [
        [
            a.policy,
            "-".join(dict.fromkeys(f"{100 * share:.4f}" for share in a.availability_range)) + "%",
            f"{a.goodput_lost:.3%}",
            f"{a.outage_hours:,.1f}",
            f"{a.degraded_hours:,.1f}",
            f"{a.reduced_hours:,.1f}",
            range_text({"low": a.stall_low, "high": a.stall_high}),
            f"{a.tokens_recomputed / 1e6:,.1f}",
        ]
        for a in accounts
    ]
    first = accounts[0]
    title = f"{days:g} days [estimate], {first.failures} failures, at most {first.most_dead} devices down at once"
    return f"{title}\n{table(head, rows, width=width)}"


def transfer_report(transfer: Transfer, *, most: int = 20) -> str:
    """The rounds, seconds and bytes of a transfer, and its first moves."""
    links = ", ".join(f"{link} {gb(size)}" for link, size in transfer.bytes_by_link.items() if size) or "nothing"
    lines = [
        f"{len(transfer.moves)} experts move in {len(transfer.rounds)} rounds, "
        f"{transfer.seconds * 1e3:.1f} ms: {links}",
        f"a fresh placement would move {transfer.naive_moves}",
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


def buckets_report(data: Mapping[str, Any]) -> str:
    """The current buckets beside those proposed, with the steps and the padding of each."""
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
