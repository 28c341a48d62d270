"""What each command does: read its inputs, ask the planner, say it as data and as text."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from planner import explain as explanations
from planner.buckets import bucket_figures, choose, read_buckets, read_counts
from planner.calibration import calibrate, read_steps
from planner.cluster import Cluster, read_cluster
from planner.degrade import MEANS, REFUSABLE, Losses
from planner.deployment import Deployment, read_deployment, read_loads, read_survive, zipf_loads
from planner.design import design
from planner.diff import transfer
from planner.errors import InputError, unknown_key
from planner.export import export as export_plan
from planner.foresight import check_gate, foresee, summarise
from planner.huggingface import model_in_numbers, read_source
from planner.lattice import preparations
from planner.plan import Plan
from planner.rebalance import rebalance as rebalance_plan
from planner.recovery import Recovery, read_recovery
from planner.report import (
    buckets_report,
    degrade_report,
    design_report,
    preparation_report,
    simulate_report,
    transfer_report,
)
from planner.simulate import simulate as run_policies
from planner.simulate import timeline
from planner.solve import solve as solve_plan
from planner.throughput import Candidate, assess, pareto
from planner.traffic import read_traffic
from planner.verify import aot_figures, compile_ahead, verify_report


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command found: data for --json, text for people, and whether it is good news."""

    data: object
    text: str
    good: bool = True


def solve(options: Namespace) -> Answer:
    """`solve MODEL CLUSTER`."""
    name, config = read_source(options.model)
    workload = model_in_numbers(name, config, options.model, weights=options.weights, cache=options.cache)
    cluster = _cluster(options.cluster)
    loads = None
    if options.loads:
        loads = np.array(read_loads(options.loads, workload))
    elif options.skew is not None:
        loads = zipf_loads(workload, options.skew)
    found = design(
        workload,
        cluster,
        traffic=read_traffic(options.traffic),
        survive=read_survive(options.survive),
        arch=options.arch,
        loads=loads,
        standby=options.standby,
        slots=options.slots,
        protect=options.protect,
        tensor=options.tensor,
        dense=options.dense,
    )
    deployment = replace(found.deployment, config=config if "moe_layers" not in config else {})
    _write(options.out, deployment.to_json())
    lines = [design_report(found)]
    if options.pictures:
        lines += [
            f"drew {p}" for p in _pictures().draw_design(found, options.pictures, "svg" if options.svg else "png")
        ]
    shapes = [c.shape for c in found.candidates if c.step]
    front = pareto(workload, cluster, shapes, deployment.traffic, peak=found.peak)
    data = {
        "deployment": json.loads(deployment.to_json()),
        "candidates": [_candidate(c) for c in found.candidates],
        "pareto": front,
        "peak_load": found.peak,
    }
    return Answer(data=data, text="\n".join(lines))


def _cluster(text: str) -> Cluster:
    """A cluster as `read_cluster` takes it, or that of a plan file: `verify --measured --out` writes one calibrated."""
    return read_deployment(text).cluster if text.endswith(".json") else read_cluster(text)


def _candidate(c: Candidate) -> dict:
    return {
        "shape": c.shape.describe(),
        "reason": c.reason,
        "tokens_per_second": c.tokens_per_second,
        "tokens_per_second_per_device": c.per_device(),
        "tokens_per_second_per_user": c.tokens_per_second_per_user,
        "ttft_s": c.ttft_seconds,
        "requests_per_group": c.requests_per_group,
        "pages_per_rank": c.pages_per_rank,
        "step_s": c.step.parts() if c.step else {},
        "memory_bytes": dict(c.memory),
        "source": "estimate",
    }


def degrade(options: Namespace) -> Answer:
    """`degrade PLAN`."""
    deployment = read_deployment(options.plan)
    refused = _words(options.without, REFUSABLE, "--without")
    means = [m for m in MEANS if m not in refused and (m != "mask" or options.mask)]
    recovery = read_recovery(options.measured) if options.measured else Recovery()
    losses = Losses(deployment, recovery, means)
    kinds = [k for k in options.kinds.split(",") if k]
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}; it must be at least 0")
    outcomes, sampled = foresee(losses, kinds=kinds, pairs=_pairs(options.pairs), seed=options.seed)
    summary = summarise(outcomes)
    broken = check_gate(options.gate, summary) if options.gate else []
    ready = preparations(deployment.plan)
    lines = [degrade_report(summary, sampled, recovery.source), preparation_report(ready)]
    lines += [f"gate does not hold: {b}" for b in broken]
    if options.pictures:
        drawn = _pictures().draw_losses(losses, outcomes, options.pictures, "svg" if options.svg else "png")
        lines += [f"drew {p}" for p in drawn]
    data = {
        "summary": summary,
        "pairs_sampled_of": sampled,
        "losses": [o.to_dict() for o in outcomes],
        "gate_broken": broken,
        "preparation": {name: asdict(each) for name, each in ready.items()},
        "recovery": asdict(recovery),
    }
    survivable = all(r["survivable"] == r["cases"] for r in summary if r["kind"] == "rank")
    return Answer(data=data, text="\n".join(lines), good=not broken and (survivable or bool(options.gate)))


def simulate(options: Namespace) -> Answer:
    """`simulate PLAN`."""
    deployment = read_deployment(options.plan)
    events = timeline(
        deployment,
        days=options.days,
        mtbf_hours=options.mtbf,
        host_mtbf_hours=options.host_mtbf,
        repair_hours=options.repair,
        seed=options.seed,
    )
    accounts = run_policies(
        deployment,
        events,
        days=options.days,
        policies=tuple(options.policies.split(",")) if options.policies else None,
        recovery=read_recovery(options.measured) if options.measured else None,
        spares=options.spares,
        seed=options.seed,
    )
    data = {"days": options.days, "seed": options.seed, "policies": [a.to_dict() for a in accounts]}
    return Answer(data=data, text=simulate_report(accounts, options.days))


def diff(options: Namespace) -> Answer:
    """`diff PLAN_A PLAN_B`."""
    a, b = read_deployment(options.plan_a), read_deployment(options.plan_b)
    moved = _transfer(b, a.plan, b.plan)
    return Answer(data=moved.to_dict(), text=transfer_report(moved))


def _transfer(deployment: Deployment, old: Plan, new: Plan):
    d = deployment
    roles = {r.id: r.role for r in new.ranks}
    unlimited = replace(d.cluster, hardware=replace(d.cluster.hardware, memory_bytes=None))
    naive = solve_plan(
        d.workload,
        unlimited,
        alive=new.rank_ids,
        slots_per_rank=new.slots_per_rank,
        roles=roles,
        loads=d.load_array(),
    )
    return transfer(old, new, expert_bytes=d.workload.expert_bytes, hardware=d.cluster.hardware, naive=naive)


def rebalance(options: Namespace) -> Answer:
    """`rebalance PLAN LOADS`."""
    deployment = read_deployment(options.plan)
    rows = read_loads(options.loads, deployment.workload) if deployment.workload.experts else ()
    deployment = replace(deployment, loads=rows)
    done = rebalance_plan(deployment.plan, deployment.load_array(), mode=options.mode, moves_per_layer=options.moves)
    after = replace(deployment, plan=done.plan)
    _write(options.out, after.to_json())
    moved = _transfer(after, deployment.plan, done.plan)
    head = (
        f"hottest rank {done.before.max():.3f} -> {done.after.max():.3f} x the mean on the worst layer, "
        f"{done.before.mean():.3f} -> {done.after.mean():.3f} on average"
    )
    data = {
        "peak_before": done.before.tolist(),
        "peak_after": done.after.tolist(),
        "mode": options.mode,
        "transfer": moved.to_dict(),
        "deployment": json.loads(after.to_json()),
    }
    return Answer(data=data, text=f"{head}\n{transfer_report(moved)}")


def verify(options: Namespace) -> Answer:
    """`verify PLAN`."""
    if not options.aot and not options.measured:
        raise InputError("verify against what? Give --aot TOPOLOGY, --measured FILE, or both.")
    deployment = read_deployment(options.plan)
    d = deployment
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    calibration = calibrate(d, read_steps(options.measured)) if options.measured else None
    compiled = compile_ahead(d, options.aot, each_loss=options.each_loss) if options.aot else {}
    figures = (*d.plan.cost, *(aot_figures(compiled) if compiled else ()))
    cluster = calibration.cluster if calibration is not None else d.cluster
    _write(options.out, replace(d, cluster=cluster, plan=replace(d.plan, cost=figures)).to_json())
    data, text = verify_report(compiled, calibration, best.step.total if best.step else 0.0)
    return Answer(data=data, text=text, good=not any(row.get("error") for row in compiled.get("meshes", ())))


def buckets(options: Namespace) -> Answer:
    """`buckets COUNTS`."""
    counts = read_counts(options.counts)
    current = read_buckets(options.current) if options.current else counts.served
    if not current:
        raise InputError(f"{options.counts} does not say which buckets are served; give --current")
    proposed = choose(counts, current, options.count)
    sets = {"current": current, "proposed": proposed.buckets}
    data = {
        "about": dict(counts.about),
        "steps": counts.steps,
        "exact": proposed.exact,
        **{name: bucket_figures(counts, each) for name, each in sets.items()},
    }
    return Answer(data=data, text=buckets_report(data))


def export(options: Namespace) -> Answer:
    """`export PLAN --to FORMAT`."""
    text = export_plan(read_deployment(options.plan), options.to, image=options.image, name=options.name)
    return Answer(data={"to": options.to, "text": text}, text=text.rstrip("\n"))


def explain(options: Namespace) -> Answer:
    """`explain PLAN WHAT`."""
    data, text = explanations.explain(read_deployment(options.plan), " ".join(options.what))
    return Answer(data=data, text=text)


def _pictures() -> ModuleType:
    """The module that draws, which needs a library the other commands do not."""
    try:
        return importlib.import_module("planner.pictures")
    except ModuleNotFoundError as error:
        raise InputError(f"--pictures needs {error.name}: pip install matplotlib") from None


def _pairs(text: str) -> int | None:
    """How many pairs to look at, None for all of them."""
    if text == "all":
        return None
    if not text.isdigit():
        raise InputError(f"--pairs is {text!r}; give a number of at least 0, or all")
    return int(text)


def _words(text: str, known: tuple[str, ...], where: str) -> list[str]:
    words = [w.strip() for w in text.split(",") if w.strip()]
    for word in words:
        if word not in known:
            raise unknown_key(word, known, where)
    return words


def _write(path: str | None, text: str) -> None:
    if path:
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
