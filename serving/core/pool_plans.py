"""The plan in force of a server with two pools, and what it would be with lost ranks back."""

import dataclasses
from collections.abc import Collection

from planner.cost.pools import with_figures
from planner.plan.deployment import Deployment
from planner.plan.pools import AnyDeployment, PooledDeployment
from serving.core.loop import Loop
from serving.errors import NoCapacity
from serving.recovery.certificate_watch import InForce
from serving.recovery.loss_forecast import current_traffic


def joint_deployment(prefill: Loop, decode: Loop) -> AnyDeployment | None:
    """The plans in force of both pools as one, for the traffic of both; that of one pool while the other is lost, and
    None while both are."""
    found = _joint(prefill.deployment(), decode.deployment())
    if not isinstance(found, PooledDeployment):
        return found
    running = [each for loop in (prefill, decode) for each in loop.engine.state.running.values()]
    traffic = current_traffic(running, decode.model.max_context)
    return with_figures(found.each(lambda pool: dataclasses.replace(pool, traffic=traffic)))


def in_force(prefill: Loop, decode: Loop) -> InForce | None:
    """The plans in force as a certificate is checked on them; None while no rank is alive."""
    now = prefill.deployment(), decode.deployment()
    joint = _joint(*now)
    if joint is None:
        return None
    form = next(each for each in now if each is not None)
    alive = [() if each is None else each.plan.rank_ids for each in now]
    plans = [loop.engine.failover.plans for loop in (prefill, decode)]

    def with_back(back: Collection[int]) -> AnyDeployment:
        found: list[Deployment | None] = []
        for own, catalog in zip(alive, plans, strict=True):
            ranks = (*own, *(rank for rank in back if rank in catalog.base.rank_ids))
            try:
                plan = catalog.of(ranks)
            except NoCapacity:
                found.append(None)
            else:
                found.append(dataclasses.replace(form, plan=plan, cluster=catalog.cluster))
        then = _joint(*found)
        if then is None:
            raise NoCapacity("neither pool serves with these ranks back")
        return then

    lost = [rank for own, each in zip(alive, plans, strict=True) for rank in each.base.rank_ids if rank not in own]
    return InForce(deployment=joint, lost=tuple(lost), with_back=with_back)


def _joint(prefill: Deployment | None, decode: Deployment | None) -> AnyDeployment | None:
    """Both pools as one plan, or the one that serves, which then does the work of both."""
    if prefill is None or decode is None:
        return decode or prefill
    return PooledDeployment(
        prefill=(dataclasses.replace(prefill, work="prompts"),), decode=dataclasses.replace(decode, work="decode")
    )
