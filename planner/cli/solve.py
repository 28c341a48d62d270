"""`moejax plan solve`: reads the inputs, finds the best plan of each architecture asked for, and reports the best."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from planner.cli.command import CommandResult, pictures, write_text
from planner.cli.loss_report import pace_line, stall_line
from planner.cli.pools_report import architectures_report, pools_report
from planner.cli.report import design_report
from planner.cli.table import terminal_width
from planner.cost.design import Design, design
from planner.cost.front import pace_of
from planner.cost.pools import PooledDesign, design_pools
from planner.errors import InputError, NoFeasiblePlan, PlannerError
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import LossModel
from planner.inputs.cluster import Cluster, read_cluster
from planner.inputs.published import draft_layers, find_published, is_published, workload_from
from planner.inputs.traffic import read_pairs, read_traffic
from planner.inputs.workload import Workload
from planner.plan.deployment import read_deployment, read_fault_tolerance
from planner.plan.expert_loads import read_loads, zipf_loads
from planner.plan.shape import POOLS
from planner.solver.shapes import ARCHITECTURES

AUTO = "auto"
ARCHS = (*ARCHITECTURES, POOLS, AUTO)


def solve(options: Namespace) -> CommandResult:
    """`solve MODEL CLUSTER`."""
    name, config = find_published(options.model)
    workload = workload_from(config, name=name, where=options.model, weights=options.weights, cache=options.cache)
    workload = _drafting(workload, config, options)
    cluster = _cluster(options.cluster)
    if options.engine:
        kinds = {name: replace(each, engine=options.engine) for name, each in cluster.kinds.items()}
        cluster = replace(cluster, hardware=replace(cluster.hardware, engine=options.engine), kinds=kinds)
    found, failed = _designs(workload, cluster, options)
    best = max(found, key=lambda arch: _merit(found[arch], options)) if options.arch == AUTO else options.arch
    config = config if is_published(config) else {}
    chosen = found[best]
    data, text = (
        _pooled_result(chosen, config, options)
        if isinstance(chosen, PooledDesign)
        else _result(chosen, config, options)
    )
    if len(found) + len(failed) > 1:
        data["architectures"] = {
            arch: {
                "tokens_per_second": _rate(each),
                "tokens_per_second_per_user": _per_user(each),
                **(each.ranges() if isinstance(each, PooledDesign) else each.ranges(each.chosen)),
            }
            for arch, each in found.items()
        } | {arch: {"reason": reason} for arch, reason in failed.items()}
        text += "\n\n" + architectures_report(found, failed, best, width=terminal_width())
    return CommandResult(data=data, text=text)


def _designs(
    workload: Workload, cluster: Cluster, options: Namespace
) -> tuple[dict[str, Design | PooledDesign], dict[str, str]]:
    """The best design of each architecture: that asked for, the collocated one beside pools, or all of them; and why
    others, beside the one asked for, are out."""
    loads = None
    if options.loads:
        loads = np.array(read_loads(options.loads, workload))
    elif options.skew is not None:
        loads = zipf_loads(workload, options.skew)
    given = {
        "traffic": read_traffic(options.traffic),
        "survive": read_fault_tolerance(options.survive),
        "loads": loads,
        "slots": options.slots,
        "protect": options.protect,
        "tensor": options.tensor,
        "dense": options.dense,
    }
    archs = (*ARCHITECTURES, POOLS) if options.arch == AUTO else (options.arch,)
    archs = ("collocated", POOLS) if options.arch == POOLS else archs
    if options.standby and options.arch == POOLS:
        raise InputError(f"--standby {options.standby}: no rank stands by in pools. Leave it out.")
    found: dict[str, Design | PooledDesign] = {}
    failed: dict[str, str] = {}
    for arch in archs:
        try:
            if arch == POOLS:
                found[arch] = design_pools(workload, cluster, **given)
            else:
                found[arch] = design(workload, cluster, arch=arch, standby=options.standby, **given)
        except PlannerError as error:
            if arch == options.arch or (not found and arch == archs[-1]):
                raise
            if not isinstance(error, NoFeasiblePlan) and arch == "collocated":
                raise
            failed[arch] = str(error)
    return found, failed


def _rate(found: Design | PooledDesign) -> float:
    return found.tokens_per_second if isinstance(found, PooledDesign) else found.chosen.tokens_per_second


def _per_user(found: Design | PooledDesign) -> float:
    if isinstance(found, PooledDesign):
        return found.tokens_per_second_per_user
    return found.chosen.tokens_per_second_per_user


def _merit(found: Design | PooledDesign, options: Namespace) -> float:
    return _per_user(found) if read_traffic(options.traffic).rps else _rate(found)


def _result(found: Design, config: Mapping[str, Any], options: Namespace) -> tuple[dict, str]:
    """The result of a design of one mesh, as data and as text; writes the plan file and the pictures."""
    deployment = replace(found.deployment, config=config)
    write_text(options.out, deployment.to_json())
    losses = LossModel(deployment)
    first, bands = losses.outcome(deployment.plan.rank_ids[:1]), LossBands(losses)
    kept = pace_of(deployment.workload, found.chosen, deployment.cluster)
    lines = [design_report(found, width=terminal_width()), "", stall_line(first, bands), pace_line(kept)]
    if options.pictures:
        kind = "svg" if options.svg else "png"
        lines += [f"drew {p}" for p in pictures().draw_design(found, options.pictures, kind)]
    data = {
        "arch": found.chosen.shape.arch,
        "deployment": json.loads(deployment.to_json()),
        "candidates": [{**c.to_dict(), **found.ranges(c)} for c in found.candidates],
        "pareto": found.pareto,
        "peak_load": found.peak,
        "first_loss": {**first.to_dict(), "band": bands.to_dict(), "ranges": bands.of(first)},
        "front": kept.to_dict() if kept else None,
    }
    return data, "\n".join(lines)


def _pooled_result(found: PooledDesign, config: Mapping[str, Any], options: Namespace) -> tuple[dict, str]:
    """The result of a design of pools, as data and as text; writes the plan file."""
    if options.pictures:
        raise InputError("--pictures draws plans of one mesh; `moejax plan report` draws those of pools")
    pooled = replace(
        found.deployment,
        prefill=tuple(replace(each, config=config) for each in found.deployment.prefill),
        decode=replace(found.deployment.decode, config=config),
    )
    write_text(options.out, pooled.to_json())
    data = {
        "arch": POOLS,
        "deployment": json.loads(pooled.to_json()),
        "pools": {**asdict(found.rates), "rate": found.rates.rate, "instances": found.instances},
        **found.ranges(),
        "prefill": {**found.prefill.chosen.to_dict(), **found.prefill.ranges(found.prefill.chosen)},
        "decode": {**found.decode.chosen.to_dict(), **found.decode.ranges(found.decode.chosen)},
        "splits": [
            {
                "hosts_of_an_instance": size,
                "instances": count,
                "hosts_for_decode": rest,
                **asdict(rates),
                **found.ranges(rates),
            }
            for size, count, rest, rates in found.splits
        ],
    }
    return data, pools_report(found, width=terminal_width())


def _drafting(workload: Workload, config: Mapping[str, Any], options: Namespace) -> Workload:
    """The workload with the drafts of `--mtp` or `--ngram`. InputError for both, and for `--mtp` with a model without a
    layer that drafts."""
    if options.mtp and options.ngram:
        raise InputError("--mtp and --ngram: a step takes the drafts of one of them. Leave the other out.")
    if not (text := options.mtp or options.ngram):
        return workload
    flag = "--mtp" if options.mtp else "--ngram"
    if options.mtp and is_published(config) and not draft_layers(config):
        raise InputError(f"--mtp {text}: the configuration of {workload.name} has no layer that drafts tokens")
    given = {"drafts": 1, **read_pairs(text, {"drafts": int, "accepted": float}, flag)}
    if "accepted" not in given:
        raise InputError(f"{flag} {text}: which share of the drafts is kept? Give accepted=0.8, as measured.")
    return workload.with_drafts(given["drafts"], given["accepted"], layers=1 if options.mtp else 0)


def _cluster(text: str) -> Cluster:
    """A cluster as `read_cluster` takes it, or that of a plan file (`verify --measured --out` calibrates it)."""
    return read_deployment(text).cluster if text.endswith(".json") else read_cluster(text)
