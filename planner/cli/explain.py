"""Explanations in words: one rank or one expert of a plan."""

from __future__ import annotations

import re

import numpy as np

from planner.errors import InputError
from planner.failures.loss_bands import LossBands, Ranges, range_cells
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.pool_losses import PoolLossModel
from planner.plan.deployment import Deployment
from planner.plan.plan import EXPERT_ROLES
from planner.plan.pools import AnyDeployment, PooledDeployment
from planner.solver.balance import relative_rank_loads

WORK = {"prompts": "computes prompts", "decode": "decodes"}
"""The verb of a pool's work."""


def explain(deployment: AnyDeployment, what: str) -> tuple[dict, str]:
    """Facts on `rank 3` (or `3`), `expert 17` or `expert 17 layer 4`, as data and as text; else InputError."""
    match = re.fullmatch(r"(?:(rank|expert)[ :]*)?(\d+)(?:[ ,@]*layer[ :]*(\d+))?", what.strip())
    if not match:
        raise InputError(f"cannot explain {what!r}; say `rank 3`, `expert 17` or `expert 17 layer 4`")
    kind, number, layer = match[1] or "rank", int(match[2]), match[3]
    layer_at = None if layer is None else int(layer)
    if isinstance(deployment, PooledDeployment):
        return _rank_of_pools(deployment, number) if kind == "rank" else _expert_of_pools(deployment, number, layer_at)
    return explain_rank(deployment, number) if kind == "rank" else explain_expert(deployment, number, layer_at)


def _rank_of_pools(pooled: PooledDeployment, rank: int) -> tuple[dict, str]:
    """A rank of a plan of pools: its pool, what it is there, and the cost of its loss to both sides."""
    losses, pools = PoolLossModel(pooled), pooled.pools()
    if rank not in losses.pool_of:
        raise InputError(f"rank {rank} is not in the plan, which has {min(losses.pool_of)}..{max(losses.pool_of)}")
    name = list(pools)[losses.pool_of[rank]]
    outcome = losses.outcome({rank})
    ranges, side = losses.ranges(outcome), losses.bands[losses.side({rank})]
    facts, lines = _place(pools[name], rank)
    facts |= {"pool": name, "loss": outcome.to_dict(), "ranges": ranges, "band": side.to_dict()}
    lines[0] += f", in the pool {name}, which {WORK[pools[name].work]}"
    others = "running streams" if name == "decode" else "running streams (which need no prompts)"
    lines.append("if it dies: " + outcome_sentence(outcome, ranges, others=others))
    return facts, "\n".join([*lines, side.source()] if ranges else lines)


def _expert_of_pools(pooled: PooledDeployment, expert: int, layer: int | None) -> tuple[dict, str]:
    """The ranks with copies of an expert in each pool; every pool holds all experts."""
    found = {name: explain_expert(pool, expert, layer) for name, pool in pooled.pools().items()}
    lines = {name: each.split("\n") for name, (_, each) in found.items()}
    text = "\n".join([lines["decode"][0], *(f"{name}, {line}" for name, each in lines.items() for line in each[1:])])
    return {"expert": expert, "pools": {name: facts["layers"] for name, (facts, _) in found.items()}}, text


def explain_rank(deployment: Deployment, rank: int) -> tuple[dict, str]:
    """The role, experts and traffic of a rank, and the cost of its loss."""
    facts, lines = _place(deployment, rank)
    losses = LossModel(deployment)
    outcome, bands = losses.outcome({rank}), LossBands(losses)
    ranges = bands.of(outcome)
    facts |= {"loss": outcome.to_dict(), "ranges": ranges, "band": bands.to_dict()}
    lines.append("if it dies: " + outcome_sentence(outcome, ranges))
    return facts, "\n".join([*lines, bands.source()] if ranges else lines)


def _place(deployment: Deployment, rank: int) -> tuple[dict, list[str]]:
    """The role, experts and traffic of a rank, as facts and as lines. InputError for a rank that the plan has not."""
    plan = deployment.plan
    if rank not in plan.rank_ids:
        raise InputError(f"rank {rank} is not in the plan, which has {plan.rank_ids[0]}..{plan.rank_ids[-1]}")
    place = plan.ranks[plan.rank_ids.index(rank)]
    facts = {"rank": rank, "host": place.host, "rack": place.rack, "role": place.role, "group": place.group}
    lines = [f"rank {rank} is {place.role} on {place.host} ({place.rack or 'no rack'})"]
    if place.group >= 0:
        peers = [r.id for r in plan.ranks if r.group == place.group and r.id != rank]
        lines.append(f"attends in group {place.group}" + (f" with ranks {peers}" if peers else " alone"))
    if plan.experts and place.role in EXPERT_ROLES:
        slots, copies = plan.slots_of(rank), plan.copies()
        held = [(layer, int(e)) for layer, row in enumerate(slots) for e in row if e >= 0]
        sole = [(layer, e) for layer, e in held if copies[layer, e] == 1]
        load = relative_rank_loads(plan, deployment.load_array())
        mine = load[:, plan.expert_rank_ids.index(rank)]
        facts |= {"slots": len(held), "sole_copies": len(sole), "mean_load": float(mine.mean())}
        facts["hottest_layer"] = int(mine.argmax())
        lines.append(
            f"holds {len(held)} expert copies in {plan.slots_per_rank} slots x {plan.moe_layers} layers, "
            f"{len(sole)} of them the only copy" + (f", e.g. (layer, expert) {sole[:3]}" if sole else "")
        )
        lines.append(
            f"serves {mine.mean():.2f} x the mean expert traffic, at most {mine.max():.2f} x on layer {mine.argmax()}"
        )
    return facts, lines


def explain_expert(deployment: Deployment, expert: int, layer: int | None) -> tuple[dict, str]:
    """The ranks with copies of an expert, on one MoE layer or on all of them."""
    plan = deployment.plan
    if not plan.experts:
        raise InputError(f"{deployment.workload.name} is a dense model: there is no expert {expert} to explain")
    if not 0 <= expert < plan.experts:
        raise InputError(f"expert {expert} is not in the model, which has 0..{plan.experts - 1}")
    if layer is not None and not 0 <= layer < plan.moe_layers:
        raise InputError(f"layer {layer} is not an MoE layer of the model, which has 0..{plan.moe_layers - 1}")
    layers = range(plan.moe_layers) if layer is None else [layer]
    loads, table = deployment.load_array(), plan.slot_table()
    rows, lines = [], [f"expert {expert} of {plan.experts}"]
    for at in layers:
        slots = np.flatnonzero(table[at] == expert)
        ranks = [plan.expert_ranks[int(s) // plan.slots_per_rank] for s in slots]
        group = next((g for g in plan.parity if g.layer == at and expert in g.members), None)
        hosts = sorted({r.host for r in ranks})
        rows.append(
            {
                "layer": at,
                "load": float(loads[at, expert]),
                "ranks": [r.id for r in ranks],
                "hosts": hosts,
                "parity_with": [m for m in group.members if m != expert] if group else [],
            }
        )
        fate = "survives any one host" if len(hosts) > 1 else "survives any one rank" if len(ranks) > 1 else ""
        if not fate:
            fate = "is rebuilt from its parity group" if group else "comes from the store"
            fate += f" when rank {ranks[0].id} dies" if ranks else ""
        lines.append(
            f"layer {at}: {loads[at, expert] * plan.experts:.2f} x the mean load, "
            f"copies on ranks {[r.id for r in ranks]} ({', '.join(hosts)}); {fate}"
        )
    return {"expert": expert, "layers": rows}, "\n".join(lines)


def outcome_sentence(outcome: LossOutcome, ranges: Ranges, *, others: str = "other streams") -> str:
    """One loss in one line, its figures as `ranges`; `others` are the streams that wait beside its own."""
    if not outcome.survivable:
        return f"not survivable: {outcome.reason}"
    means = ", ".join(f"{count} by {name}" for name, count in outcome.means.items()) or "nothing to restore"
    stall, moved, capacity = range_cells(ranges)
    return (
        f"survivable ({means}); {others} wait {stall} ms, its own {moved} ms; {outcome.bytes_moved / 1e9:.1f} GB "
        f"move, {outcome.cache_tokens:,} cache tokens are recomputed, {capacity} of capacity is left"
    )
