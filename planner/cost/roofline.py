"""The roofline model of a step: the seconds of each part on a shape.

Every part takes the longer of moving its bytes and of doing its flops, at the engine's shares of the peaks
(`planner.inputs.engine`); exchanges take their bytes over links and network, and a latency each. Collocated parts
follow one another; disaggregated parts overlap as two micro-batches, so that the slowest part sets the pace and
weights are read twice. Engines that overlap the exchange between hosts do so with two batches, where that is faster.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planner.cost.step_work import StepWork, step_work
from planner.inputs.cluster import Cluster
from planner.inputs.engine import Engine, engine_of
from planner.inputs.workload import Workload
from planner.plan.shape import Shape

CHUNK = 8192  # prompt tokens a group prefills at once
ROWS = 256
"""Rows of an expert for which `Engine.experts` is its share of the flop rate."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by part; `total` is the time between two tokens of a stream.

    `overlapped`: the slowest part sets the pace. `hidden`: the exchange takes place while experts and attention of
    another batch are computed.
    """

    attention: float
    experts: float
    exchange: float
    overhead: float
    overlapped: bool
    hidden: bool = False

    @property
    def total(self) -> float:
        """Seconds from token to token."""
        if self.hidden:
            return self.overhead + max(self.attention + self.experts, self.exchange)
        parts = (self.attention, self.experts, self.exchange)
        return self.overhead + (max(parts) if self.overlapped else sum(parts))

    def parts(self) -> dict[str, float]:
        """Seconds by part, for tables."""
        return {k: v for k, v in asdict(self).items() if k not in ("overlapped", "hidden")}


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

    `requests` is the number of requests that those tokens belong to (one for each token when None, as in decode);
    `peak` is the highest load of an expert rank over the mean.
    """
    engine, mixed = engine_of(cluster.hardware), engine_of(cluster.hardware).mixed
    work = step_work(workload, cluster, shape, tokens, context, requests=requests, peak=peak, reduces_experts=mixed)
    apart = shape.arch == "disaggregated"
    plain = _timed(work, engine, batches=2 if apart else 1, overlapped=apart)
    if apart or not engine.overlaps or not work.networked:
        return plain
    hidden = _timed(work, engine, batches=2, hidden=True)
    return min(plain, hidden, key=lambda step: step.total)


def _timed(work: StepWork, engine: Engine, *, batches: int, overlapped: bool = False, hidden: bool = False) -> StepTime:
    attention, experts, exchange, overhead = map(float, part_seconds(work, engine, batches=batches))
    return StepTime(
        attention=attention,
        experts=experts,
        exchange=exchange,
        overhead=overhead,
        overlapped=overlapped,
        hidden=hidden,
    )


def part_seconds(work: StepWork, engine: Engine, *, batches: int = 1) -> tuple[Any, Any, Any, Any]:
    """Seconds of attention (with the weights of everything but experts), experts, exchange, and overhead.

    With two `batches` weights are read and kernels launched twice. Fields of `work` may be arrays, and so may constants
    of the engine; the seconds then are arrays.
    """
    w, e = work, engine
    bandwidth = w.bandwidth * e.weights
    narrow = w.ratio**e.narrow
    attention = np.maximum(batches * w.weights / bandwidth, w.products / (w.flops * narrow * e.products))
    attention = attention + np.maximum(w.cache / (w.bandwidth * e.cache), w.context / (w.flops * e.context))
    attention = attention + w.reduced / (w.link * e.links) + w.reductions * e.collective
    share = np.minimum(e.experts * (np.maximum(w.rows / batches, 0.5) / ROWS) ** e.expert_slope, e.products)
    experts = np.maximum(batches * w.expert_weights / bandwidth, w.expert_products / (w.flops * narrow * share))
    exchange = w.linked / (w.link * e.links) + w.networked / w.network + batches * w.exchanges * e.collective
    overhead = e.step + e.request * w.requests + batches * e.kernel * w.kernels
    return attention, experts, exchange, overhead


def prefill_time(workload: Workload, cluster: Cluster, shape: Shape, prompt: int, *, peak: float = 1.0) -> float:
    """Seconds to prefill one prompt on every tensor group at once, in chunks of CHUNK tokens.

    With an engine that mixes prompts into the steps of running streams, only the work that the prompt adds counts.
    """
    engine = engine_of(cluster.hardware)
    seconds, done = 0.0, 0
    while done < prompt:
        chunk = min(CHUNK, prompt - done)
        context = done + chunk / 2
        if engine.mixed:
            work = step_work(
                workload, cluster, shape, chunk, context, requests=1, peak=peak, reduces_experts=True
            ).added()
            attention, experts, exchange, _ = part_seconds(work, engine)
            seconds += float(attention + experts + exchange)
        else:
            seconds += step_time(workload, cluster, shape, chunk, context, requests=1, peak=peak).total
        done += chunk
    return seconds


def first_token_time(workload: Workload, cluster: Cluster, prefill: float, step: float) -> float:
    """Seconds until the first token of a request that waits for no other: its `prefill`, and a `step` around it."""
    engine = engine_of(cluster.hardware)
    return prefill + step + engine.prompt + engine.prompt_kernel * workload.kernels
