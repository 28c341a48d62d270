"""The trade-off between speed for a user and work of a device, over shapes and batch sizes: of decode, and of prompts
where these are computed in pools of their own."""

from __future__ import annotations

from planner.cost.mixed import decode_steps
from planner.cost.roofline import StepTime
from planner.cost.throughput import assess_prompts, cache_transfer_seconds, prompts_time
from planner.inputs.cluster import Cluster
from planner.inputs.traffic import Traffic
from planner.inputs.workload import Workload
from planner.plan.shape import Shape


def decode_speed(shape: Shape, requests: int, step: StepTime, kept: float) -> dict[str, float]:
    """Tokens per second of decoding alone, `requests` on every group, each with `kept` tokens of a step: {per_user,
    per_device}."""
    per_user = kept / step.total
    return {"per_user": per_user, "per_device": requests * shape.data * per_user / len(shape.roles)}


def pareto(
    workload: Workload,
    cluster: Cluster,
    shapes: list[Shape],
    traffic: Traffic,
    *,
    peak: float = 1.0,
    work: str = "all",
) -> list[dict]:
    """Points that no other beats in both tokens/s/user and tokens/s/device, over shapes and batch sizes.

    Each is {shape, requests_per_group, per_user, per_device}, by descending speed per user. `work` is "all", or
    "decode" where prompts are computed elsewhere.
    """
    points = []
    for shape in shapes:
        for requests, step in decode_steps(workload, cluster, shape, traffic, peak=peak, work=work):
            speed = decode_speed(shape, requests, step, workload.kept)
            points.append({"shape": shape.describe(), "requests_per_group": requests, **speed})
    points.sort(key=lambda p: (-p["per_user"], -p["per_device"]))
    return _front(points)


def prompts_pareto(
    workload: Workload, cluster: Cluster, shapes: list[Shape], traffic: Traffic, *, peak: float = 1.0
) -> list[dict]:
    """The same for ranks that compute prompts alone: {shape, requests_per_group, seconds, per_device}, by ascending
    seconds from the beginning of a step until the caches of its prompts have been sent; `per_device` are prompts/s."""
    points = []
    sent = cache_transfer_seconds(workload, cluster, traffic.prompt)
    for shape in shapes:
        best = assess_prompts(workload, cluster, shape, traffic, peak=peak)
        if best.step is None:
            continue
        most = best.requests_per_group
        for count in sorted({*(2**i for i in range((most - 1).bit_length())), most}):
            seconds = prompts_time(workload, cluster, shape, traffic, count, peak)[1]
            speed = {"seconds": seconds + sent, "per_device": count * shape.data / seconds / len(shape.roles)}
            points.append({"shape": shape.describe(), "requests_per_group": count, **speed})
    points.sort(key=lambda p: (p["seconds"], -p["per_device"]))
    return _front(points)


def _front(points: list[dict]) -> list[dict]:
    """The points with more work of a device than all before them."""
    front, best_device = [], 0.0
    for point in points:
        if point["per_device"] > best_device * (1 + 1e-9):
            front.append(point)
            best_device = point["per_device"]
    return front
