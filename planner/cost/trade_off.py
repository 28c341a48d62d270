"""The trade-off between tokens per second for a user and for a device, over shapes and batch sizes."""

from __future__ import annotations

from planner.cost.mixed import decode_steps
from planner.cost.roofline import StepTime
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
    workload: Workload, cluster: Cluster, shapes: list[Shape], traffic: Traffic, *, peak: float = 1.0
) -> list[dict]:
    """Points that no other beats in both tokens/s/user and tokens/s/device, over shapes and batch sizes.

    Each is {shape, requests_per_group, per_user, per_device}, by descending speed per user.
    """
    points = []
    for shape in shapes:
        for requests, step in decode_steps(workload, cluster, shape, traffic, peak=peak):
            speed = decode_speed(shape, requests, step, workload.kept)
            points.append({"shape": shape.describe(), "requests_per_group": requests, **speed})
    points.sort(key=lambda p: (-p["per_user"], -p["per_device"]))
    front, best_device = [], 0.0
    for point in points:
        if point["per_device"] > best_device * (1 + 1e-9):
            front.append(point)
            best_device = point["per_device"]
    return front
