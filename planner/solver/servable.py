"""What of a plan `moejax serve` runs."""

from __future__ import annotations

from math import ceil

from planner.deployment import Deployment
from planner.errors import InputError
from planner.huggingface import whole_cache_elements
from planner.shape import budget, rest_bytes
from planner.workload import Workload

NORMS_ALL_HEADS = ("olmoe",)
FORMS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


def held_form(workload: Workload) -> str:
    """The form of `moejax serve --data-type` that comes nearest to the plan's weights."""
    return FORMS.get(workload.weight_format, "int8")


def served_pages(deployment: Deployment) -> int:
    """Pages for the requests of a rank in the room that the plan has for them: `moejax serve` keeps float32, and
    divides less over tensor groups. A rank of one has as many pages of each other member, of its share of the heads."""
    d, w, tensor = deployment, deployment.workload, tensor_of(deployment)
    if not w.cache_bytes_per_token:
        return d.plan.pages_per_rank // tensor
    whole = w.cache_bytes_per_token if "model_type" not in d.config else 4 * whole_cache_elements(d.config)
    room = d.plan.pages_per_rank * w.page_bytes / tensor
    if tensor > 1:
        room -= _undivided(d) - rest_bytes(w, tensor, d.shape.dense)
    return int(room / (w.page_tokens * whole))


def tensor_of(deployment: Deployment) -> int:
    """Ranks of a tensor group."""
    return dict(deployment.plan.axes).get("tensor", 1)


def divides_dense(deployment: Deployment) -> bool:
    """Whether the plan divides dense layers further than its tensor groups do. `moejax serve` divides them over all
    ranks that hold experts, as experts: a rank has as large a part of them as it has of those."""
    return dict(deployment.plan.axes).get("dense", 1) > 1


def check_served(deployment: Deployment) -> None:
    """InputError for a mesh that `moejax serve` does not make: its ranks attend, hold experts, or do both."""
    plan, axes = deployment.plan, dict(deployment.plan.axes)
    standby = sum(r.role == "standby" for r in plan.ranks)
    reasons = [f"{standby} ranks that stand by"] if standby else []
    reasons += _tensor_amiss(deployment)
    held, planned = plan.slots_per_rank / max(1, plan.experts), 1 / axes.get("dense", 1)
    if held > planned < 1:
        reasons.append(
            f"dense groups of {axes['dense']}: {planned:.3g} of each dense layer on a rank, whose slots take {held:.3g}"
        )
    if plan.parity:
        reasons.append(f"{len(plan.parity)} parity slots")
    if reasons:
        raise InputError(
            f"the plan has {' and '.join(reasons)}; ranks of `moejax serve` attend, hold experts, or do both. "
            "Solve with --tensor 1 --dense 1, without --standby, with --protect copies or none."
        )


def _tensor_amiss(deployment: Deployment) -> list[str]:
    """Why the plan's tensor groups are not served. `moejax serve` divides attention over them, and nothing else."""
    d, tensor = deployment, tensor_of(deployment)
    if tensor == 1:
        return []
    w, groups = d.workload, f"tensor groups of {tensor}"
    if d.shape.arch == "disaggregated":
        return [f"{groups} of ranks that attend only"]
    if w.cache_splits % tensor:
        return [f"{groups}, which cannot share {w.cache_splits} key/value heads"]
    if d.config.get("model_type") in NORMS_ALL_HEADS:
        return [f"{groups}, of a model that norms the queries of all heads at once"]
    if w.cache_bytes_per_token and served_pages(d) < 1:
        need, room = _undivided(d) + d.plan.slots_per_rank * w.slot_bytes, budget(d.cluster)
        return [
            f"{groups}, of which a rank holds {need:,} bytes of weights and leaves no cache of the {room:,} there are"
        ]
    return []


def _undivided(deployment: Deployment) -> int:
    """Bytes of all but experts that a rank of a tensor group holds: a share of attention, and the rest whole, but for
    dense layers where these are divided as experts are."""
    d, w = deployment, deployment.workload
    whole = w.rest_bytes - w.attention_bytes + ceil(w.attention_bytes / tensor_of(d))
    return whole - w.dense_bytes if divides_dense(d) else whole
