"""The trade-off of a plan on its page: of decode, and of the ranks that compute prompts in a plan of pools."""

from __future__ import annotations

from collections.abc import Mapping

from planner.cli.html_page import curve, prose, section
from planner.cost.band import Band, deployment_band
from planner.cost.mixed import assess_kinds
from planner.cost.throughput import Candidate
from planner.cost.trade_off import decode_speed, pareto, prompts_pareto
from planner.plan.deployment import Deployment
from planner.plan.shape import Shape
from planner.solver.shapes import mesh_shapes


def trade_off(pools: Mapping[str, Deployment]) -> str:
    """Speed for a user against work of a device, over shapes and batches, with the band of both; a picture for each
    kind of pool (one for a plan of one mesh)."""
    drawn = []
    for name, d in pools.items():
        best = assessed(d)
        band = deployment_band(d, d.shape, best.requests_per_group)
        picture = _prompts(d, best, band) if d.work == "prompts" else _decode(d, best, band)
        drawn.append((f"<p>{prose(f'{name}: the band is {band.source()}')}</p>" if name else "") + picture)
    text = "Decode alone, over shapes and batches"
    if "" in pools:
        d = pools[""]
        text += f"; the band is {deployment_band(d, d.shape, assessed(d).requests_per_group).source()}"
    else:
        text += "; of the ranks that compute prompts, the wait for a prompt against the prompts of a device"
    return section("What speed for a user costs", text, *drawn)


def assessed(d: Deployment) -> Candidate:
    """The prediction for a deployment as it is placed."""
    return assess_kinds(d.workload, d.cluster, d.shape, d.traffic, peak=d.plan.figure("peak_load", 1.0), work=d.work)


def _shapes(d: Deployment) -> list[Shape]:
    lost = d.survive.most_lost(d.cluster)
    return list(mesh_shapes(d.workload, d.cluster, d.cluster.devices, arch=d.shape.arch, lost=lost))


def _decode(d: Deployment, best: Candidate, band: Band) -> str:
    """Tokens/s a device against tokens/s a user."""
    front = pareto(d.workload, d.cluster, _shapes(d), d.traffic, peak=d.plan.figure("peak_load", 1.0), work=d.work)
    points = [(p["per_user"], p["per_device"]) for p in front]
    low, high = ([(x / f, y / f) for x, y in points] for f in (band.tpot, 1 / band.tpot))
    mark = None
    if best.step:
        own = decode_speed(d.shape, best.requests_per_group, best.step, d.workload.kept)
        mark = own["per_user"], own["per_device"]
    return curve(points, low, high, "tokens/s a user", "tokens/s a device", mark)


def _prompts(d: Deployment, best: Candidate, band: Band) -> str:
    """Prompts/s a device against the seconds of a prompt."""
    front = prompts_pareto(d.workload, d.cluster, _shapes(d), d.traffic, peak=d.plan.figure("peak_load", 1.0))
    points = [(p["seconds"], p["per_device"]) for p in front]
    low, high = ([(x * f, y / f) for x, y in points] for f in (band.ttft, 1 / band.ttft))
    mark = None
    if best.step:
        rate = best.tokens_per_second / d.traffic.output / len(d.shape.roles)
        mark = best.ttft_seconds, rate
    return curve(points, low, high, "seconds until a prompt is sent on", "prompts/s a device", mark)
