"""The commands: each reads its inputs, calls the planner, and returns the result as data and as text."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict, replace

from planner.cli import explain as explanations
from planner.cli.command import CommandResult, pictures, read_losses, read_words, with_store, write_text
from planner.cli.compile_ahead import aot_figures, compile_ahead
from planner.cli.diff import transfer_to
from planner.cli.kubernetes import export as export_plan
from planner.cli.loss_report import degrade_report, pace_line, preparation_report, simulate_report
from planner.cli.report import buckets_report, share_of, transfer_report
from planner.cli.table import terminal_width
from planner.cli.verify import verify_report
from planner.cost.band import deployment_band
from planner.cost.buckets import bucket_figures, choose_buckets, read_buckets, read_counts
from planner.cost.calibration import calibrate, read_steps
from planner.cost.front import pace_of
from planner.cost.mixed import assess_kinds, placement_speeds
from planner.errors import InputError
from planner.failures.loss_bands import LossBands
from planner.failures.loss_forecast import check_gate, forecast_losses, summarise, worst_by_kind
from planner.failures.loss_model import MEANS, OPTIONAL_MEANS
from planner.failures.pool_losses import PoolLossModel, forecast_pool_losses
from planner.failures.simulate import simulate as run_policies
from planner.failures.timeline import timeline
from planner.inputs.recovery_times import read_recovery_times
from planner.plan.deployment import read_deployment
from planner.plan.expert_loads import read_loads
from planner.plan.pools import PooledDeployment, read_any_deployment
from planner.solver.lattice import preparations
from planner.solver.rebalance import rebalance as rebalance_plan


def degrade(options: Namespace) -> CommandResult:
    """`degrade PLAN`."""
    refused = read_words(options.without, OPTIONAL_MEANS, "--without")
    means = [m for m in MEANS if m not in refused and (m != "mask" or options.mask)]
    losses = read_losses(options, means)
    if isinstance(losses, PoolLossModel):
        return _degrade_pools(losses, options)
    deployment = losses.deployment
    recovery, kept = (
        losses.recovery.times,
        pace_of(deployment.workload, losses.capacity_model.whole, deployment.cluster),
    )
    kinds = [k for k in options.kinds.split(",") if k]
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be at least 0")
    outcomes, sampled = forecast_losses(losses, kinds=kinds, pairs=_pairs(options.pairs), seed=options.seed)
    bands = LossBands(losses)
    summary = summarise(outcomes, bands.of)
    broken = check_gate(options.gate, summary) if options.gate else []
    ready = preparations(deployment.plan)
    width = terminal_width()
    lines = [
        degrade_report(summary, sampled, recovery.source, bands.source(), width=width),
        preparation_report(ready, width=width),
        pace_line(kept),
    ]
    lines += [f"gate does not hold: {b}" for b in broken]
    if options.pictures:
        drawn = pictures().draw_losses(losses, outcomes, options.pictures, "svg" if options.svg else "png")
        lines += [f"drew {p}" for p in drawn]
    data = {
        "summary": summary,
        "pairs_sampled_of": sampled,
        "losses": [{**o.to_dict(), "ranges": bands.of(o)} for o in outcomes],
        "ranges": {kind: bands.of(o) for kind, o in worst_by_kind(outcomes).items()},
        "band": bands.to_dict(),
        "gate_broken": broken,
        "preparation": {name: asdict(each) for name, each in ready.items()},
        "recovery": asdict(recovery),
        "front": kept.to_dict() if kept else None,
    }
    survivable = all(r["survivable"] == r["cases"] for r in summary if r["kind"] == "rank")
    return CommandResult(data=data, text="\n".join(lines), good=not broken and (survivable or bool(options.gate)))


def _degrade_pools(losses: PoolLossModel, options: Namespace) -> CommandResult:
    """The losses of a plan of pools; pairs are left out."""
    kinds = [kind for kind in options.kinds.split(",") if kind and kind != "pair"]
    outcomes = forecast_pool_losses(losses, kinds=kinds)
    summary = summarise(outcomes, losses.ranges)
    broken = check_gate(options.gate, summary) if options.gate else []
    lines = [
        degrade_report(summary, 0, losses.recovery.times.source, losses.source(), width=terminal_width()),
        f"pools for prompts and decode: {losses.deployment.service}",
    ]
    lines += [f"gate does not hold: {b}" for b in broken]
    data = {
        "summary": summary,
        "losses": [{**o.to_dict(), "ranges": losses.ranges(o)} for o in outcomes],
        "band": {name: each.to_dict() for name, each in losses.bands.items()},
        "gate_broken": broken,
    }
    survivable = all(row["survivable"] == row["cases"] for row in summary if row["kind"].endswith("_rank"))
    return CommandResult(data=data, text="\n".join(lines), good=not broken and (survivable or bool(options.gate)))


def simulate(options: Namespace) -> CommandResult:
    """`simulate PLAN`."""
    found = read_any_deployment(options.plan)
    if isinstance(found, PooledDeployment):
        found = found.each(lambda pool: with_store(pool, options.store))
    else:
        found = with_store(found, options.store)
    events = timeline(
        found,
        days=options.days,
        mtbf_hours=options.mtbf,
        host_mtbf_hours=options.host_mtbf,
        repair_hours=options.repair,
        seed=options.seed,
    )
    accounts = run_policies(
        found,
        events,
        days=options.days,
        policies=tuple(options.policies.split(",")) if options.policies else None,
        recovery=read_recovery_times(options.measured) if options.measured else None,
        spares=options.spares,
        without=read_words(options.without, OPTIONAL_MEANS, "--without"),
    )
    data = {"days": options.days, "seed": options.seed, "policies": [a.to_dict() for a in accounts]}
    return CommandResult(data=data, text=simulate_report(accounts, options.days, width=terminal_width()))


def rebalance(options: Namespace) -> CommandResult:
    """`rebalance PLAN LOADS`."""
    deployment = read_deployment(options.plan)
    rows = read_loads(options.loads, deployment.workload) if deployment.workload.experts else ()
    deployment = replace(deployment, loads=rows)
    d = deployment
    serving = replace(d.cluster, devices=d.cluster.alive(d.plan.rank_ids))
    speed = placement_speeds(d.workload, serving, d.shape, d.traffic.context)
    done = rebalance_plan(d.plan, d.load_array(), mode=options.mode, moves_per_layer=options.moves, speed=speed)
    after = replace(deployment, plan=done.plan)
    write_text(options.out, after.to_json())
    moved = transfer_to(after, deployment.plan)
    head = (
        f"hottest rank {done.before.max():.3f} -> {done.after.max():.3f} x {share_of(d.cluster)} on the worst layer, "
        f"{done.before.mean():.3f} -> {done.after.mean():.3f} on average"
    )
    data = {
        "peak_before": done.before.tolist(),
        "peak_after": done.after.tolist(),
        "mode": options.mode,
        "transfer": moved.to_dict(),
        "deployment": json.loads(after.to_json()),
    }
    return CommandResult(data=data, text=f"{head}\n{transfer_report(moved)}")


def verify(options: Namespace) -> CommandResult:
    """`verify PLAN`."""
    if not options.aot and not options.measured:
        raise InputError("verify against what? Give --aot TOPOLOGY, --measured FILE, or both.")
    deployment = read_deployment(options.plan)
    d = deployment
    best = assess_kinds(d.workload, d.cluster, d.shape, d.traffic)
    calibration = calibrate(d, read_steps(options.measured)) if options.measured else None
    compiled = compile_ahead(d, options.aot, each_loss=options.each_loss) if options.aot else {}
    figures = (*d.plan.cost, *(aot_figures(compiled) if compiled else ()))
    cluster = calibration.cluster if calibration is not None else d.cluster
    write_text(options.out, replace(d, cluster=cluster, plan=replace(d.plan, cost=figures)).to_json())
    band = deployment_band(d, d.shape, best.requests_per_group)
    data, text = verify_report(compiled, calibration, best.step.total if best.step else 0.0, band)
    return CommandResult(data=data, text=text, good=not any(row.get("error") for row in compiled.get("meshes", ())))


def buckets(options: Namespace) -> CommandResult:
    """`buckets COUNTS`."""
    counts = read_counts(options.counts)
    current = read_buckets(options.current) if options.current else counts.served
    if not current:
        raise InputError(f"{options.counts} does not say which buckets are served; give --current")
    proposed = choose_buckets(counts, current, options.count)
    sets = {"current": current, "proposed": proposed.buckets}
    data = {
        "about": dict(counts.about),
        "steps": counts.steps,
        "exact": proposed.exact,
        **{name: bucket_figures(counts, each) for name, each in sets.items()},
    }
    return CommandResult(data=data, text=buckets_report(data))


def export(options: Namespace) -> CommandResult:
    """`export PLAN --to FORMAT`."""
    text = export_plan(read_any_deployment(options.plan), options.to, image=options.image, name=options.name)
    return CommandResult(data={"to": options.to, "text": text}, text=text.rstrip("\n"), verbatim=True)


def explain(options: Namespace) -> CommandResult:
    """`explain PLAN WHAT`."""
    data, text = explanations.explain(read_any_deployment(options.plan), " ".join(options.what))
    return CommandResult(data=data, text=text)


def _pairs(text: str) -> int | None:
    """The number of pairs to sample, None for all of them."""
    if text == "all":
        return None
    if not text.isdigit():
        raise InputError(f"--pairs is {text!r}; give a number of at least 0, or all")
    return int(text)
