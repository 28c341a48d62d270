"""The plans that `moejax serve` can run, and its settings for them."""

from __future__ import annotations

from math import ceil

from planner.errors import InputError
from planner.inputs.cache_formats import CACHE_FORMATS
from planner.inputs.layer_states import STATES_PER_REQUEST
from planner.inputs.published import (
    BYTES,
    DRAFTS_SERVED,
    cache_number_bytes,
    published_model,
    unwindowed_cache_elements,
)
from planner.inputs.workload import MAX_DRAFTS
from planner.plan.deployment import PLANNED_ONLY, Deployment
from planner.solver.shapes import memory_budget, rest_bytes

NORMS_ALL_HEADS = ("olmoe",)
SERVED_WEIGHT_FORMATS = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
KEPT_FORMATS = ("int4", "mxfp4", "nvfp4", "fp8", "int8")
"""Forms that `moejax serve` holds as they are published."""
SERVED_REQUESTS = 32
"""The most requests that a rank of `moejax serve` runs with its default buckets."""


def served_weight_format(deployment: Deployment) -> str:
    """The weight format of `moejax serve` nearest to that of the plan: the value of `--data-type`, which is `published`
    for a model that is published in four or eight bits. `--data-type int4` or `int8` would round it once more."""
    if _keeps_form(deployment):
        return "published"
    return SERVED_WEIGHT_FORMATS.get(deployment.workload.weight_format, "int8")


def _keeps_form(deployment: Deployment) -> bool:
    """Whether ranks hold matrices as the model's own files have them, which dense shards are not read from."""
    d = deployment
    if d.workload.weight_format not in KEPT_FORMATS or "model_type" not in d.config or shards_dense(d):
        return False
    return published_model(d.config).form.format == d.workload.weight_format


def served_pages(deployment: Deployment) -> int:
    """Cache pages of a rank that fit in the memory that the plan has for them.

    `moejax serve` stores the whole context of layers with a window too, and shards only attention over tensor groups.
    A rank of a tensor group also holds the same number of pages of each other member, for its shard of the heads. A
    rank of a model whose layers have a state holds those of all requests that it can run, and snapshots.
    """
    d, w, tensor = deployment, deployment.workload, tensor_width(deployment)
    if not w.cache_bytes_per_token:
        return d.plan.pages_per_rank // tensor
    whole = w.cache_bytes_per_token if "model_type" not in d.config else _unwindowed_bytes(d)
    room = d.plan.pages_per_rank * w.page_bytes / tensor
    if tensor > 1:
        room -= _served_rest_bytes(d) - rest_bytes(w, tensor, d.shape.dense)
    room -= STATES_PER_REQUEST * w.state_bytes * SERVED_REQUESTS
    return int(room / (w.page_tokens * whole))


def served_cache_format(deployment: Deployment) -> str:
    """The format of the KV cache of `moejax serve` nearest to that of the plan: the value of `--kv-cache-type`. Of a
    model that drafts with a layer of its own, and on TPUs, whose kernels read no other, it is float32 as yet."""
    planned = deployment.workload.cache_format
    drafting = deployment.workload.drafts and deployment.workload.draft_layers
    if drafting or deployment.cluster.hardware.is_tpu:
        return "float32"
    return planned if planned in CACHE_FORMATS else "bfloat16" if BYTES.get(planned, 2.0) >= 2 else "int8"


def _unwindowed_bytes(deployment: Deployment) -> int:
    """Bytes of the cache of one token when layers with a window keep everything too, and a layer that drafts."""
    model, w = published_model(deployment.config, weights="bfloat16"), deployment.workload
    layers = 1 + (w.draft_layers / max(1, w.layers) if w.drafts else 0)
    number = cache_number_bytes(model, served_cache_format(deployment))
    return round(layers * unwindowed_cache_elements(model) * number)


def tensor_width(deployment: Deployment) -> int:
    """The number of ranks of a tensor group."""
    return dict(deployment.plan.axes).get("tensor", 1)


def shards_dense(deployment: Deployment) -> bool:
    """Whether the plan shards dense layers further than its tensor groups do.

    `moejax serve` shards them over all expert ranks, like experts: a rank has the same share of them as of the experts.
    """
    return dict(deployment.plan.axes).get("dense", 1) > 1


def check_servable(deployment: Deployment) -> None:
    """Raise InputError for a mesh that `moejax serve` cannot make, with all reasons."""
    plan, axes = deployment.plan, dict(deployment.plan.axes)
    standby = sum(r.role == "standby" for r in plan.ranks)
    reasons = [f"{standby} ranks that stand by"] if standby else []
    reasons += _tensor_group_problems(deployment)
    states = deployment.workload.state_bytes
    if states and deployment.shape.arch == "disaggregated":
        reasons.append("ranks that attend only, of a model with layers whose context is a state")
    if states and plan.pages_per_rank and served_pages(deployment) < 1:
        reasons.append(f"no room for cache beside the states of {SERVED_REQUESTS} requests on a rank")
    if deployment.workload.drafts:
        reasons += _draft_problems(deployment)
    if deployment.work != "all":
        reasons.append(f"a pool for {deployment.work} alone ({PLANNED_ONLY})")
    held, planned = plan.slots_per_rank / max(1, plan.experts), 1 / axes.get("dense", 1)
    if held > planned < 1:
        reasons.append(
            f"dense groups of {axes['dense']}: {planned:.3g} of each dense layer on a rank, whose slots take {held:.3g}"
        )
    if plan.parity:
        reasons.append(f"{len(plan.parity)} parity slots")
    if reasons:
        drafting = " and --mtp" if deployment.workload.drafts and deployment.workload.draft_layers else ""
        raise InputError(
            f"the plan has {' and '.join(reasons)}; ranks of `moejax serve` attend, hold experts, or do both. "
            f"Solve with --tensor 1 --dense 1, without --standby{drafting}, with --protect copies or none."
        )


def _draft_problems(deployment: Deployment) -> list[str]:
    """The reasons why `moejax serve` cannot draft so."""
    w, drafted = deployment.workload, f"{deployment.workload.drafts} drafted tokens a step"
    if w.state_bytes:
        return [f"{drafted}, of a model with layers whose context is a state"]
    if not w.draft_layers:
        return []
    if deployment.shape.arch == "disaggregated" or tensor_width(deployment) > 1:
        return [f"{drafted} of a layer of the model, on ranks that attend only or in tensor groups ({PLANNED_ONLY})"]
    kind = deployment.config.get("model_type")
    if kind not in DRAFTS_SERVED:
        return [f"{drafted} of the layer of model_type {kind!r} ({PLANNED_ONLY})"]
    if w.drafts > MAX_DRAFTS:
        return [f"{drafted}, of which `moejax serve` takes {MAX_DRAFTS}"]
    return []


def _tensor_group_problems(deployment: Deployment) -> list[str]:
    """The reasons why `moejax serve` cannot run the plan's tensor groups; it shards attention alone over them."""
    d, tensor = deployment, tensor_width(deployment)
    if tensor == 1:
        return []
    w, groups = d.workload, f"tensor groups of {tensor}"
    if d.shape.arch == "disaggregated":
        return [f"{groups} of ranks that attend only"]
    if w.state_bytes:
        return [f"{groups}, of a model with layers whose context is a state"]
    if w.cache_splits % tensor:
        return [f"{groups}, which cannot share {w.cache_splits} key/value heads"]
    if d.config.get("model_type") in NORMS_ALL_HEADS:
        return [f"{groups}, of a model that norms the queries of all heads at once"]
    if w.cache_bytes_per_token and served_pages(d) < 1:
        need, room = _served_rest_bytes(d) + d.plan.slots_per_rank * w.slot_bytes, memory_budget(d.cluster)
        return [
            f"{groups}, of which a rank holds {need:,} bytes of weights and leaves no cache of the {room:,} there are"
        ]
    return []


def _served_rest_bytes(deployment: Deployment) -> int:
    """Bytes of everything but experts on a rank of a tensor group.

    That is its shard of attention and all of the rest, without dense layers where these are sharded as experts.
    """
    d, w = deployment, deployment.workload
    whole = w.rest_bytes - w.attention_bytes + ceil(w.attention_bytes / tensor_width(d))
    return whole - w.dense_bytes if shards_dense(d) else whole
