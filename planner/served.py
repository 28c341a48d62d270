"""What of a plan `moejax serve` runs."""

from __future__ import annotations

from planner.deployment import Deployment
from planner.errors import InputError


def check_served(deployment: Deployment) -> None:
    """InputError for a mesh that `moejax serve` does not make: it attends data-parallel on every rank, and every rank
    holds experts."""
    plan, axes = deployment.plan, dict(deployment.plan.axes)
    other = {role: [r.role for r in plan.ranks].count(role) for role in ("attention", "expert", "standby")}
    reasons = [f"{count} ranks that are {role} only" for role, count in other.items() if count]
    reasons += [f"{name} groups of {axes[name]}" for name in ("tensor", "dense") if axes.get(name, 1) > 1]
    if plan.parity:
        reasons.append(f"{len(plan.parity)} parity slots")
    if reasons:
        raise InputError(
            f"the plan has {' and '.join(reasons)}; ranks of `moejax serve` all attend alone and hold experts. "
            "Solve with --arch collocated --tensor 1 --dense 1, without --standby, with --protect copies or none."
        )
