"""What of a plan `moejax serve` runs."""

from __future__ import annotations

from planner.deployment import Deployment
from planner.errors import InputError
from planner.huggingface import whole_cache_elements
from planner.workload import Workload

FORMS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


def held_form(workload: Workload) -> str:
    """The form of `moejax serve --data-type` that comes nearest to the plan's weights."""
    return FORMS.get(workload.weight_format, "int8")


def served_pages(deployment: Deployment) -> int:
    """Pages of a rank's cache in the room that the plan has for them: `moejax serve` keeps float32."""
    d = deployment
    if "model_type" not in d.config or not d.workload.cache_bytes_per_token:
        return d.plan.pages_per_rank
    return int(d.plan.pages_per_rank * d.workload.cache_bytes_per_token / (4 * whole_cache_elements(d.config)))


def divides_dense(deployment: Deployment) -> bool:
    """Whether the plan divides dense layers. `moejax serve` divides them over all ranks that hold experts, as experts:
    a rank has as large a part of them as it has of those."""
    return dict(deployment.plan.axes).get("dense", 1) > 1


def check_served(deployment: Deployment) -> None:
    """InputError for a mesh that `moejax serve` does not make: its ranks attend alone, hold experts, or do both."""
    plan, axes = deployment.plan, dict(deployment.plan.axes)
    standby = sum(r.role == "standby" for r in plan.ranks)
    reasons = [f"{standby} ranks that stand by"] if standby else []
    reasons += [f"tensor groups of {axes['tensor']}"] if axes.get("tensor", 1) > 1 else []
    held, planned = plan.slots_per_rank / max(1, plan.experts), 1 / axes.get("dense", 1)
    if held > planned < 1:
        reasons.append(
            f"dense groups of {axes['dense']}: {planned:.3g} of each dense layer on a rank, whose slots take {held:.3g}"
        )
    if plan.parity:
        reasons.append(f"{len(plan.parity)} parity slots")
    if reasons:
        raise InputError(
            f"the plan has {' and '.join(reasons)}; ranks of `moejax serve` attend alone, hold experts, or do both. "
            "Solve with --tensor 1 --dense 1, without --standby, with --protect copies or none."
        )
