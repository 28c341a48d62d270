"""The work of a step in numbers that no constant of an engine is in: bytes, flops, kernels and collectives of a
rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp
from typing import Any

from planner.inputs.cluster import Cluster, Hardware
from planner.inputs.workload import Workload
from planner.plan.shape import Shape
from planner.solver.shapes import rest_bytes

EIGHT_BIT = ("fp8", "int8")
FOUR_BIT = ("mxfp4", "nvfp4")
NARROW = 0.5
"""Numbers of two bytes that a number of a token's hidden state takes in dispatch when it is sent in 8 bits; in combine
it is always one."""


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of the busiest rank in a step. Each field is a number, or an array with a number for each of many steps.

    Bytes read of weights, of cache and of experts; flops of products with weights, of attention over the cache, and of
    experts, whose products have `rows` rows each and are `inner` wide on a rank; bytes of rows that are `carried`
    between the kernels of experts; `kernels` launched; `requests` of a tensor group; reductions within tensor groups
    and the bytes that a rank moves in them; exchanges with other ranks and their bytes over links and over the network,
    `dispatch` the share of these before the experts. `bandwidth`, `flops`, `ratio` (of the rate of narrow numbers to
    `flops`), `link` and `network` are the hardware's peaks, `latency` the least seconds of an exchange over the
    network.
    """

    weights: Any
    cache: Any
    products: Any
    context: Any
    expert_weights: Any
    expert_products: Any
    rows: Any
    carried: Any
    inner: Any
    kernels: Any
    requests: Any
    reductions: Any
    reduced: Any
    exchanges: Any
    linked: Any
    networked: Any
    dispatch: Any
    bandwidth: Any
    flops: Any
    ratio: Any
    link: Any
    network: Any
    latency: Any

    def added(self) -> StepWork:
        """The work that these tokens add to a step that is made anyway: its weights are read and its kernels
        launched."""
        none = {"weights": 0.0, "cache": 0.0, "expert_weights": 0.0, "kernels": 0.0, "requests": 0.0}
        return replace(self, **none, reductions=0.0, exchanges=0.0)


def rate_ratio(workload: Workload, hardware: Hardware) -> float:
    """The rate of products with these weights over that with 16-bit numbers, by the hardware's description."""
    narrow = None
    if workload.weight_format in FOUR_BIT:
        narrow = hardware.flops_4bit
    elif workload.weight_format in EIGHT_BIT:
        narrow = hardware.flops_8bit
    return (narrow or hardware.flops) / hardware.flops


def step_work(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    tokens: float,
    context: float,
    *,
    requests: float | None = None,
    in_prompt: bool = False,
    peak: float = 1.0,
    reduces_experts: bool = False,
    expert_tensor: int = 1,
) -> StepWork:
    """The work of a step in which every tensor group handles `tokens` tokens, each with `context` in cache.

    `requests` is the number of requests that those tokens belong to: one for each token when None, fewer in prompts
    (`in_prompt`). Drafts are verified with each token of a request; a model that drafts makes the next with one more
    layer. `peak` is the highest load of an expert rank over the mean. With `reduces_experts` the experts of a
    single tensor group are one more reduction, since its ranks hold the same tokens, and no exchange. `expert_tensor`
    ranks share each expert.
    """
    hardware, w = cluster.hardware, workload
    requests = tokens if requests is None else requests
    drafts = 0 if in_prompt else w.drafts
    tokens *= 1 + drafts
    own = drafts * w.draft_layers  # drafts that the model's own layer makes
    passes = 1 + own / max(1, w.layers)  # of kernels and weights, where the draft layer runs once for each draft
    drafting = min(w.draft_layers, w.drafts)
    layers = 1 + (1 if in_prompt else drafts / (1 + drafts)) * drafting / max(1, w.layers)  # for each token
    cache = requests * w.cache_bytes(context) / min(shape.tensor, w.cache_splits)
    per_context = w.prompt_context_flops if in_prompt and w.prompt_context_flops else w.context_flops
    heads = requests if in_prompt else tokens + own * requests
    products = layers * tokens * (w.rest_flops - w.head_flops) + heads * w.head_flops
    routed = tokens * shape.data * w.experts_per_token / max(1, shape.expert_rank_count)
    touched = shape.slots * (1 - exp(-routed / shape.slots)) if shape.slots else 0.0
    alone = reduces_experts and shape.data == 1 and shape.arch == "collocated"
    sent = (0.0, 0.0, 0.0) if alone else _exchange(w, cluster, shape, tokens, routed * peak, in_prompt=in_prompt)
    reductions, reduced = _reductions(w, shape, tokens)
    redrafted = own * w.head_bytes + max(0, own - 1) * w.layer_bytes
    return StepWork(
        weights=rest_bytes(w, shape.tensor, shape.dense) - w.lookup_bytes / shape.tensor + redrafted / shape.tensor,
        cache=cache,
        products=products / shape.tensor,
        context=layers * tokens * w.seen(context) * per_context / shape.tensor,
        expert_weights=touched * passes * w.moe_layers * w.expert_bytes,
        expert_products=layers * routed * peak * w.moe_layers * w.expert_flops,
        rows=routed * peak / shape.slots if shape.slots else 1.0,
        carried=layers * _carried(w, routed * peak, expert_tensor),
        inner=max(1.0, _inner(w) / expert_tensor),
        kernels=passes * w.kernels,
        requests=requests,
        reductions=passes * reductions,
        reduced=layers * reduced,
        exchanges=passes * sent[0],
        linked=layers * sent[1],
        networked=layers * sent[2],
        dispatch=_dispatched(w) / (1 + _dispatched(w)),
        bandwidth=hardware.memory_bandwidth,
        flops=hardware.flops,
        ratio=rate_ratio(w, hardware),
        link=hardware.link_bandwidth,
        network=hardware.network_bandwidth,
        latency=hardware.collective_latency if sent[2] else 0.0,
    )


def _carried(w: Workload, routed: float, expert_tensor: int) -> float:
    """Bytes that kernels move for the `routed` rows of a rank's experts. Each of the `expert_tensor` ranks that share
    an expert reads a row of 16-bit numbers, writes it as the products take it, reads it again, and writes and sums the
    result; between both products it writes and reads its share of the inner numbers, gated ones twice."""
    narrow = 1.0 if w.weight_format in EIGHT_BIT + FOUR_BIT else 2.0
    hidden = (3 * 2 + 2 * narrow) * w.hidden_bytes / 2
    return routed * w.moe_layers * (hidden * expert_tensor + (4 * 2 + 2 * narrow) * _inner(w))


def _dispatched(w: Workload) -> float:
    return NARROW if w.weight_format in EIGHT_BIT + FOUR_BIT else 1.0


def _inner(w: Workload) -> float:
    """Inner width of an expert, whose three matrices take two flops for each weight."""
    return w.expert_flops / (3 * w.hidden_bytes) if w.hidden_bytes else 0.0


def _reductions(workload: Workload, shape: Shape, tokens: float) -> tuple[float, float]:
    """The all-reduces of tensor groups (two a layer) and of wider dense groups, and the bytes that a rank moves in
    them."""
    count, moved = 0.0, 0.0
    if shape.tensor > 1:
        count += 2 * workload.layers
        moved += 2 * workload.layers * 2 * (shape.tensor - 1) / shape.tensor * tokens * workload.hidden_bytes
    if shape.dense > shape.tensor:
        dense_layers = workload.layers - workload.moe_layers
        count += 2 * dense_layers
        moved += 2 * dense_layers * 2 * (shape.dense - 1) * tokens * workload.hidden_bytes
    return count, moved


def _exchange(
    workload: Workload, cluster: Cluster, shape: Shape, tokens: float, routed: float, *, in_prompt: bool
) -> tuple[float, float, float]:
    """Dispatches and combines of all MoE layers, and their bytes over links and network of the busier of a sending and
    a receiving rank. In prompts a token is sent once to each host with experts for it, of at most `groups_used` groups,
    and from there over links; in decode, where latency counts, once to each expert."""
    if not workload.moe_layers or (shape.expert_rank_count == 1 and shape.arch == "collocated"):
        return 0.0, 0.0, 0.0
    w, per_host = workload, cluster.per_host
    wire = w.hidden_bytes * (1 + _dispatched(w))
    sent = tokens / shape.tensor * w.experts_per_token
    inside = min(per_host, shape.expert_rank_count) / shape.expert_rank_count if shape.arch == "collocated" else 0.0
    active = shape.expert_rank_count + (shape.data * shape.tensor if shape.arch == "disaggregated" else 0)
    if active <= per_host:  # ranks that stand by send nothing
        inside = 1.0
    moved = max(sent, routed)
    linked, networked = moved * inside, moved * (1 - inside)
    if in_prompt and inside < 1:
        hosts = shape.expert_rank_count / per_host
        reached = hosts * (1 - (1 - 1 / hosts) ** w.experts_per_token) if hosts > 1 else 1.0
        reached = min(reached, w.groups_used or reached)
        linked, networked = moved, networked * min(1.0, reached / w.experts_per_token)
    return 2.0 * w.moe_layers, w.moe_layers * linked * wire, w.moe_layers * networked * wire
