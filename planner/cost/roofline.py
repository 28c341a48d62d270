"""The roofline model of a step: the seconds of each part on a shape.

Every part takes the longer of moving its bytes and of doing its flops, at the engine's shares of the peaks
(`planner.inputs.engine`); exchanges take their bytes over links and network, and a latency each: over the network at
least the hardware's, since collectives inside a host, of which the engine's is, are quicker. Collocated parts
follow one another; disaggregated parts overlap as two micro-batches, so that the slowest part sets the pace and
weights are read twice. Engines that overlap the exchange between hosts do so with two batches, where that is faster:
while one batch computes attention or experts, the rows of the other are dispatched or combined, so that each such pair
takes the longer of both; links and network then carry bytes at the same time.
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


PARTS = ("attention", "experts", "exchange", "overhead")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step by part; `total` is the time between two tokens of a stream.

    `overlapped`: the slowest part sets the pace. `hidden`: the exchange takes place while experts and attention of
    another batch are computed; `dispatch` is the share of the exchange before the experts, the rest is after them.
    """

    attention: float
    experts: float
    exchange: float
    overhead: float
    overlapped: bool
    hidden: bool = False
    dispatch: float = 0.5

    @property
    def total(self) -> float:
        """Seconds from token to token."""
        if self.hidden:
            sent, back = self.exchange * self.dispatch, self.exchange * (1 - self.dispatch)
            pairs = [max(work, moved) for work in (self.attention, self.experts) for moved in (sent, back)]
            return self.overhead + sum(pairs) / 2
        parts = (self.attention, self.experts, self.exchange)
        return self.overhead + (max(parts) if self.overlapped else sum(parts))

    def parts(self) -> dict[str, float]:
        """Seconds by part, for tables."""
        return {k: v for k, v in asdict(self).items() if k in PARTS}


def step_time(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    tokens: float,
    context: float,
    *,
    requests: float | None = None,
    in_prompt: bool = False,
    peak: float = 1.0,
    overlap: bool = True,
) -> StepTime:
    """Seconds of a step; the other arguments are those of `step_work`. Without `overlap` no second batch hides the
    exchange."""
    engine = engine_of(cluster.hardware)
    work = step_work(
        workload,
        cluster,
        shape,
        tokens,
        context,
        requests=requests,
        in_prompt=in_prompt,
        peak=peak,
        reduces_experts=engine.mixed,
    )
    apart = shape.arch == "disaggregated"
    plain = _timed(work, engine, batches=2 if apart else 1, overlapped=apart)
    if apart or not (overlap and engine.overlaps and work.networked):
        return plain
    hidden = _timed(work, engine, batches=2, hidden=True)
    return min(plain, hidden, key=lambda step: step.total)


def _timed(work: StepWork, engine: Engine, *, batches: int, overlapped: bool = False, hidden: bool = False) -> StepTime:
    seconds = dict(zip(PARTS, map(float, part_seconds(work, engine, batches=batches)), strict=True))
    return StepTime(**seconds, overlapped=overlapped, hidden=hidden, dispatch=work.dispatch)


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
    share = share * w.inner / (w.inner + e.expert_width)
    experts = np.maximum(batches * w.expert_weights / bandwidth, w.expert_products / (w.flops * narrow * share))
    experts = experts + w.carried / (w.bandwidth * e.carried)
    linked, networked = w.linked / (w.link * e.links), w.networked / w.network
    exchange = np.maximum(linked, networked) if e.overlaps else linked + networked
    exchange = exchange + batches * w.exchanges * np.maximum(e.collective, w.latency)
    overhead = e.step + e.request * w.requests + batches * e.kernel * w.kernels
    return attention, experts, exchange, overhead


def prefill_time(
    workload: Workload, cluster: Cluster, shape: Shape, prompt: int, *, known: float = 0.0, peak: float = 1.0
) -> float:
    """Seconds to prefill one prompt on every tensor group at once, in chunks of CHUNK tokens, but for the first `known`
    tokens, which are in the cache already.

    With an engine that mixes prompts into the steps of running streams, only the work that the prompt adds counts.
    """
    engine = engine_of(cluster.hardware)
    seconds, done = 0.0, known
    while done < prompt:
        chunk = min(CHUNK, prompt - done)
        context = done + chunk / 2
        if engine.mixed:
            work = step_work(
                workload, cluster, shape, chunk, context, requests=1, in_prompt=True, peak=peak, reduces_experts=True
            )
            attention, experts, exchange, _ = part_seconds(work.added(), engine)
            seconds += float(attention + experts + exchange)
        else:
            step = step_time(workload, cluster, shape, chunk, context, requests=1, in_prompt=True, peak=peak)
            seconds += step.total
        done += chunk
    return seconds


def first_token_time(workload: Workload, cluster: Cluster, prefill: float, step: float, others: float = 0.0) -> float:
    """Seconds until the first token of a request: its `prefill`, and a `step` around it. It waits for the share of the
    prefills of `others` that running streams do not wait for (`Engine.interference`)."""
    engine = engine_of(cluster.hardware)
    waited = (1 - engine.interference) * max(0.0, others) * prefill
    return waited + prefill + step + engine.prompt + engine.prompt_kernel * workload.kernels
