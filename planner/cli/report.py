"""Reports: plans, transfers and buckets as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from planner.cli.table import table
from planner.cost.band import range_text
from planner.cost.design import Design
from planner.cost.throughput import Candidate, gb
from planner.inputs.cluster import Cluster
from planner.inputs.workload import Workload
from planner.plan.deployment import Deployment
from planner.plan.transfer import Transfer
from planner.solver.balance import relative_rank_loads
from planner.solver.shapes import memory_budget

BAR = 27  # characters of a full memory bar: lines of at most 80


def design_report(design: Design, *, runners_up: int = 8, width: int | None = None) -> str:
    """The chosen plan, memory of a device, and the shapes that lost with the reason."""
    d, best = design.deployment, design.chosen
    w = d.workload
    lines = [
        f"{w.name}: {w.total_parameters / 1e9:,.1f} B parameters, {_layers(w)}, {w.weight_format}",
        f"{d.cluster.name}: {len(d.cluster.devices)} devices on {len(d.cluster.domains('host'))} hosts, "
        f"{_memory_of(d.cluster)}",
        "",
        f"plan: {best.shape.describe()}",
        f"  {best.tokens_per_second:,.0f} tokens/s ({best.per_device():,.0f} a device), "
        f"{best.tokens_per_second_per_user:.1f} a user, "
        f"first token after {best.ttft_seconds:.2f} s  [estimate]",
        *_band_lines(design),
        f"  {best.requests_per_group} requests x {best.shape.data} groups, {best.pages_per_rank:,} cache pages a rank, "
        f"{w.cache_bytes_per_token:,} bytes a token in {w.cache_format}",
        *_kind_lines(design),
    ]
    if best.step:
        parts = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in best.step.parts().items())
        band = design.band(best)
        lines.append(f"  step {best.step.total * 1e3:.1f} ms: {parts}  [estimate]")
        lines.append(f"  {band.text(best.step.total * 1e3, 'tpot', 'ms')}, each part by the same factor")
    if w.experts:
        lines.append(
            f"  hottest rank {design.peak:.3f} x {share_of(d.cluster)}; {(d.plan.copies() >= 2).mean():.0%} of experts "
            f"have two copies or more, {len(d.plan.parity)} parity slots"
        )
    if d.traffic.rps:
        served = design.band(best).text(best.tokens_per_second / d.traffic.output, "rate", "requests/s")
        lines.append(f"  {served}, asked {d.traffic.rps:g}")
    for device, uses in best.memory_by_device().items():
        lines += ["", f"memory of {device}{smallest(d.cluster)}", *memory_bars(d, uses)]
    lines += ["", "shapes compared, best first"]
    rows = [_candidate_row(c, design) for c in design.candidates[:runners_up]]
    lines.append(table(["shape", "tokens/s", "a user", "TTFT s", "why not"], rows, width=width))
    left = len(design.candidates) - runners_up
    return "\n".join(lines + ([f"... and {left} more"] if left > 0 else []))


def _memory_of(cluster: Cluster) -> str:
    """The memory of a device, by kind where there are several."""
    counts = Counter(device.kind for device in cluster.devices)
    each = {f"{counts[kind]} {kind} of ": hardware for kind, hardware in cluster.kinds.items()}
    rows = each.items() if each else [("", cluster.hardware)]
    texts = [f"{of}{gb(h.memory_bytes) if h.memory_bytes else 'no limit'} each" for of, h in rows]
    return ", ".join(texts)


def smallest(cluster: Cluster) -> str:
    """Of which kind the device is whose memory is shown, where there are several."""
    return " of the smallest kind" if cluster.kinds else ""


def share_of(cluster: Cluster) -> str:
    """The load of a rank to which that of the hottest is compared: where devices are of several kinds, its share by
    speed."""
    return "its share by speed" if cluster.kinds else "the mean"


def _kind_lines(design: Design) -> list[str]:
    """The requests of a group of each kind of devices, and the expert traffic and the filled slots of its ranks."""
    d, best = design.deployment, design.chosen
    if not best.requests_by_kind:
        return []
    loads = relative_rank_loads(d.plan, d.load_array()).mean(axis=0) if d.plan.experts else []
    by_rank = dict(zip(d.plan.expert_rank_ids, loads, strict=False))
    held = (d.plan.slots_by_rank() >= 0).sum(axis=2).mean(axis=0) if d.plan.experts else []
    filled = dict(zip(d.plan.expert_rank_ids, held, strict=False))
    lines = []
    for kind, count in best.requests_by_kind:
        own = [device.id for device in d.cluster.devices if device.kind == kind and device.id in by_rank]
        load, slots = (sum(each[i] for i in own) / max(1, len(own)) for each in (by_rank, filled))
        traffic = f", {load:.2f} x the mean expert traffic a rank, in {slots:.1f} of its slots" if own else ""
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
