"""Seconds and bytes by roofline: what a step costs on a shape, and where the time goes.

Every part takes the slower of moving its bytes and doing its flops, at `Hardware.efficiency` of peak;
exchanges take their bytes over links and network plus a latency each. Collocated parts follow one another;
disaggregated ones overlap as two micro-batches, so the slowest part sets the pace and weights are read twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp

from planner.cluster import Cluster, Hardware
from planner.shape import Shape, rest_bytes
from planner.workload import Workload

EIGHT_BIT = ("fp8", "int8")
CHUNK = 8192  # prompt tokens a group prefills at once


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by part; `total` is what a stream waits."""

    attention: float
    experts: float
    exchange: float
    overhead: float
    overlapped: bool

    @property
    def total(self) -> float:
        """Seconds from token to token."""
        parts = (self.attention, self.experts, self.exchange)
        return self.overhead + (max(parts) if self.overlapped else sum(parts))

    def parts(self) -> dict[str, float]:
        """Seconds by part, for tables."""
        return {k: v for k, v in asdict(self).items() if k != "overlapped"}


def flop_rate(workload: Workload, hardware: Hardware) -> float:
    """Flop/s that products with these weights reach."""
    eight = hardware.flops_8bit if workload.weight_format in EIGHT_BIT else None
    return (eight or hardware.flops) * hardware.efficiency


def step_time(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    tokens: float,
    context: float,
    *,
    requests: float | None = None,
    peak: float = 1.0,
) -> StepTime:
    """Seconds of a step in which every tensor group handles `tokens` tokens, each with `context` in cache.

    `requests` is how many requests those tokens belong to (each token its own when None, as in decode);
    `peak` is the hottest expert rank's load over the mean.
    """
    hardware = cluster.hardware
    requests = tokens if requests is None else requests
    overlapped = shape.arch == "disaggregated"
    reads = 2 if overlapped else 1
    bandwidth = hardware.memory_bandwidth * hardware.efficiency
    rate = flop_rate(workload, hardware)
    cache = requests * (context * workload.cache_bytes_per_token + workload.cache_bytes_per_request)
    cache /= min(shape.tensor, workload.cache_splits)
    weights = rest_bytes(workload, shape.tensor, shape.dense)
    flops = tokens * (workload.rest_flops + context * workload.context_flops) / shape.tensor
    attention = max((reads * weights + cache) / bandwidth, flops / rate)
    attention += _tensor_seconds(workload, hardware, shape, tokens)

    routed = tokens * shape.data * workload.experts_per_token / shape.holders
    touched = shape.slots * (1 - exp(-routed / shape.slots)) if shape.slots else 0.0
    expert_bytes = reads * touched * workload.slot_bytes
    expert_flops = routed * peak * workload.moe_layers * workload.expert_flops
    experts = max(expert_bytes / bandwidth, expert_flops / rate)
    exchange = _exchange_seconds(workload, cluster, shape, tokens, routed * peak, reads)
    return StepTime(
        attention=attention,
        experts=experts,
        exchange=exchange,
        overhead=hardware.step_overhead,
        overlapped=overlapped,
    )


def _tensor_seconds(workload: Workload, hardware: Hardware, shape: Shape, tokens: float) -> float:
    """All-reduces of tensor groups (two a layer) and of wider dense groups."""
    seconds = 0.0
    if shape.tensor > 1:
        moved = 2 * (shape.tensor - 1) / shape.tensor * tokens * workload.hidden_bytes
        seconds += 2 * workload.layers * (moved / hardware.link_bandwidth + hardware.collective_latency)
    if shape.dense > shape.tensor:
        moved = 2 * (shape.dense - 1) * tokens * workload.hidden_bytes
        dense_layers = workload.layers - workload.moe_layers
        seconds += 2 * dense_layers * (moved / hardware.link_bandwidth + hardware.collective_latency)
    return seconds


def _exchange_seconds(
    workload: Workload, cluster: Cluster, shape: Shape, tokens: float, routed: float, reads: int
) -> float:
    """Dispatch and combine of every MoE layer; the busier of a sending and a receiving rank counts."""
    if shape.holders == 1 and shape.arch == "collocated":
        return 0.0
    sent = tokens / shape.tensor * workload.experts_per_token
    wire = workload.hidden_bytes * (1.5 if workload.weight_format in EIGHT_BIT else 2.0)
    hardware, per_host = cluster.hardware, cluster.per_host
    inside = min(per_host, shape.holders) / shape.holders if shape.arch == "collocated" else 0.0
    if len(shape.roles) <= per_host:
        inside = 1.0
    moved = max(sent, routed) * wire
    seconds = moved * inside / hardware.link_bandwidth + moved * (1 - inside) / hardware.network_bandwidth
    return workload.moe_layers * (seconds + 2 * reads * hardware.collective_latency)


def prefill_time(workload: Workload, cluster: Cluster, shape: Shape, prompt: int, *, peak: float = 1.0) -> float:
    """Seconds to prefill one prompt on every tensor group at once, in chunks of CHUNK tokens."""
    seconds, done = 0.0, 0
    while done < prompt:
        chunk = min(CHUNK, prompt - done)
        context = done + chunk / 2
        seconds += step_time(workload, cluster, shape, chunk, context, requests=1, peak=peak).total
        done += chunk
    return seconds
