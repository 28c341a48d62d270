"""What the loss of each rank, and of each host, would cost now: the planner's prediction, on what runs."""

from collections.abc import Callable, Collection, Iterable

from planner.degrade import SERVED, Losses
from planner.deployment import Deployment
from planner.errors import PlannerError
from planner.parity import KeptGroup
from planner.recovery import Recovery
from planner.traffic import Traffic
from serving.sequence import Sequence
from serving.status import Prospect

SECONDS = 1e-3


def traffic_now(running: Collection[Sequence], max_context: int) -> Traffic:
    """The mean lengths of the requests that run, without bounds on delays: nothing counts as too slow to be said."""
    count = max(len(running), 1)
    prompt = sum(len(sequence.request.prompt) for sequence in running) / count
    output = sum(min(sequence.request.max_tokens, max_context) for sequence in running) / count
    return Traffic(prompt=round(max(prompt, 1)), output=round(max(output, 1)), tpot_ms=1e9, ttft_ms=1e9)


def prospects(
    deployment: Deployment,
    recovery: Recovery | None,
    prepared: Callable[[frozenset[int]], bool],
    running: Collection[Sequence],
    *,
    protected: bool = False,
    kept: Iterable[KeptGroup] = (),
) -> tuple[Prospect, ...]:
    """One for each rank of the plan, then one for each host that has several of them. What is `protected` is restored
    from copies and not computed again; `kept` is the parity of experts that there is."""
    plan, losses = (
        deployment.plan,
        Losses(deployment, recovery, SERVED, recomputed=0.0 if protected else 1.0, kept=kept),
    )
    alive = set(plan.rank_ids)
    domains = [("rank", str(rank), (rank,)) for rank in plan.rank_ids]
    hosts = deployment.cluster.domains("host").items()
    shared = ((name, tuple(sorted(alive.intersection(ids)))) for name, ids in hosts)
    domains += [("host", name, ranks) for name, ranks in shared if len(ranks) > 1]
    return tuple(_prospect(losses, kind, name, ranks, prepared, running, protected) for kind, name, ranks in domains)


def _prospect(
    losses: Losses,
    kind: str,
    name: str,
    ranks: tuple[int, ...],
    prepared: Callable[[frozenset[int]], bool],
    running: Collection[Sequence],
    protected: bool,
) -> Prospect:
    groups = losses.deployment.plan.groups
    concerned = {mate for rank in ranks for mate in groups.get(rank, ())}
    moved = [sequence for sequence in running if sequence.rank in concerned]
    head = {"kind": kind, "name": name, "ranks": ranks, "requests_moved": len(moved)}
    head["tokens_recomputed"] = 0 if protected else sum(sequence.computed for sequence in moved)
    try:
        outcome = losses.outcome(ranks, kind=kind, name=name)
    except PlannerError as error:
        nothing = dict.fromkeys(("stall_ms", "moved_stall_ms", "capacity", "traffic_lost"), 0.0)
        return Prospect(**head, **nothing, survivable=False, reason=str(error), prepared=False, experts_loaded=0)
    return Prospect(
        **head,
        survivable=outcome.survivable,
        reason=outcome.reason,
        prepared=outcome.survivable and prepared(frozenset(ranks)),
        experts_loaded=outcome.means.get("store", 0),
        stall_ms=outcome.stall / SECONDS,
        moved_stall_ms=outcome.moved_stall / SECONDS,
        capacity=outcome.capacity,
        traffic_lost=outcome.traffic_lost,
    )
