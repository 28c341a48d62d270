"""What a shape delivers under a traffic: requests that fit, tokens per second, delays, and the trade-off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.cluster import Cluster
from planner.cost import StepTime, prefill_time, step_time
from planner.shape import Shape, budget, cache_pages, rest_bytes
from planner.traffic import Traffic
from planner.workload import Workload

UNLIMITED = 256  # requests a group when neither memory nor delay limits them


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape and what is predicted for it; `reason` says why it is out, empty when it is feasible."""

    shape: Shape
    reason: str = ""
    requests_per_group: int = 0
    pages_per_rank: int = 0
    step: StepTime | None = None
    tokens_per_second: float = 0.0
    tokens_per_second_per_user: float = 0.0
    ttft_seconds: float = 0.0
    memory: tuple[tuple[str, int], ...] = ()

    def per_device(self) -> float:
        """Tokens per second and device, counting the ranks that only stand by."""
        return self.tokens_per_second / len(self.shape.roles)


def assess(workload: Workload, cluster: Cluster, shape: Shape, traffic: Traffic, *, peak: float = 1.0) -> Candidate:
    """What `shape` delivers with as many requests as memory and `traffic.tpot_ms` allow, or as `traffic.rps` needs."""
    room = budget(cluster)
    rest = rest_bytes(workload, shape.tensor, shape.dense)
    collocated = shape.arch == "collocated"
    attending = rest + (shape.slots * workload.slot_bytes if collocated else 0)
    if room is not None and max(attending, shape.slots * workload.slot_bytes) + workload.page_bytes > room:
        missing = max(attending, shape.slots * workload.slot_bytes) + workload.page_bytes - room
        return Candidate(shape=shape, reason=f"weights leave no room for cache: {gb(missing)} short per rank")
    slots = shape.slots if collocated else 0
    pages = cache_pages(workload, cluster, slots, tensor=shape.tensor, rest=rest)
    fits = _requests_that_fit(workload, pages, traffic)
    if fits < 1:
        tokens = pages * workload.page_tokens
        reason = f"{tokens:,} cache tokens a rank hold no request of {traffic.longest:,}"
        return Candidate(shape=shape, reason=reason)
    prefill = prefill_time(workload, cluster, shape, traffic.prompt, peak=peak)

    def busy_with(count: int) -> float:
        """Seconds per token of a stream: a step, and the prefill of the requests that begin in it."""
        step = step_time(workload, cluster, shape, count, traffic.context, peak=peak)
        return step.total + count / traffic.output * prefill

    requests = _most(fits, lambda count: busy_with(count) <= traffic.tpot_ms / 1e3)
    if requests < 1:
        reason = f"a token of a single request takes {busy_with(1) * 1e3:.0f} ms, asked {traffic.tpot_ms:g} ms"
        return Candidate(shape=shape, reason=reason)
    late = ""
    if traffic.rps is not None:
        wanted = traffic.rps * traffic.output

        def short(count: int) -> bool:
            return count * shape.data / busy_with(count) < wanted

        if short(requests):
            most = requests * shape.data / busy_with(requests) / traffic.output
            late = f"serves {most:.3g} requests/s, asked {traffic.rps:g}"
        else:
            requests = _most(requests - 1, short) + 1
    step = step_time(workload, cluster, shape, requests, traffic.context, peak=peak)
    busy = busy_with(requests)
    ttft = prefill + step.total
    if ttft * 1e3 > traffic.ttft_ms:
        late = f"first token after {ttft * 1e3:.0f} ms, asked {traffic.ttft_ms:g} ms"
    cache = requests * traffic.longest * workload.cache_bytes_per_token // min(shape.tensor, workload.cache_splits)
    return Candidate(
        shape=shape,
        reason=late,
        requests_per_group=requests,
        pages_per_rank=pages,
        step=step,
        tokens_per_second=requests * shape.data / busy,
        tokens_per_second_per_user=1 / busy,
        ttft_seconds=ttft,
        memory=(
            ("attention, shared, dense, embeddings", rest),
            ("expert slots", shape.slots * workload.slot_bytes),
            ("cache in use", cache),
        ),
    )


def _requests_that_fit(workload: Workload, pages: int, traffic: Traffic) -> int:
    if not pages:
        return UNLIMITED
    each = traffic.longest
    if workload.cache_bytes_per_token:
        each += workload.cache_bytes_per_request / workload.cache_bytes_per_token
    return int(pages * workload.page_tokens // each)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `limit` for which `fits`, which is false from some count on; 0 if none is."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def pareto(
    workload: Workload, cluster: Cluster, shapes: list[Shape], traffic: Traffic, *, peak: float = 1.0
) -> list[dict]:
    """Points that no other beats in both tokens/s/user and tokens/s/device, over shapes and batch sizes.

    Each is {shape, requests_per_group, per_user, per_device}, by falling speed per user.
    """
    points = []
    for shape in shapes:
        best = assess(workload, cluster, shape, traffic, peak=peak)
        most = best.requests_per_group if best.step is not None else 0
        for requests in sorted({min(most, 2**i) for i in range(most.bit_length() + 1)} - {0}):
            step = step_time(workload, cluster, shape, requests, traffic.context, peak=peak)
            points.append(
                {
                    "shape": shape.describe(),
                    "requests_per_group": requests,
                    "per_user": 1 / step.total,
                    "per_device": requests * shape.data / step.total / len(shape.roles),
                }
            )
    points.sort(key=lambda p: (-p["per_user"], -p["per_device"]))
    front, best_device = [], 0.0
    for point in points:
        if point["per_device"] > best_device * (1 + 1e-9):
            front.append(point)
            best_device = point["per_device"]
    return front


def gb(count: float) -> str:
    """Bytes as text in GB."""
    return f"{count / 1e9:,.1f} GB"
