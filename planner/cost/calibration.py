"""Calibration: the cost model fitted to measured steps, and the error of its predictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from planner.cost.roofline import step_time
from planner.errors import InputError
from planner.inputs.cluster import Cluster
from planner.inputs.file_kinds import FileKind
from planner.plan.deployment import Deployment

RESULT = FileKind(
    no="no result of benchmarks.throughput", way_out="Give the file of `python -m benchmarks.throughput --json FILE`."
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds per token of a stream at one concurrency.

    `described` is predicted from the hardware as described, `fitted` from a fit to the other measurements.
    """

    concurrency: int
    measured: float
    described: float
    fitted: float

    @property
    def error(self) -> float:
        """Relative error of `fitted`, the prediction made without this measurement."""
        return self.fitted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A cluster with hardware fitted to the measurements, and the comparison of predictions with them."""

    cluster: Cluster
    rows: tuple[Comparison, ...]


def read_steps(path: str | Path) -> list[tuple[int, float]]:
    """(concurrency, seconds per token) from `python -m benchmarks.throughput --json FILE`."""
    runs = RESULT.read(path, _steps)
    if len(runs) < 2 or min(seconds for _, seconds in runs) <= 0:
        raise InputError(f"{path} has {len(runs)} runs with a positive itl_ms; two at least are needed")
    return runs


def _steps(text: str) -> list[tuple[int, float]]:
    """The same of the text of such a result."""
    data, runs = RESULT.parse_object(text, "runs"), []
    try:
        for run in data["runs"]:
            if run.get("surface", "grpc") != "grpc":  # the same steps once more, seen through HTTP
                continue
            itl = run["itl_ms"]
            runs.append((int(run["concurrency"]), float(itl["median"] if isinstance(itl, dict) else itl) / 1e3))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RESULT.wrong(error) from None
    return runs


def calibrate(deployment: Deployment, runs: list[tuple[int, float]]) -> Calibration:
    """Latencies and efficiency scaled so that predicted steps fit `runs` of (concurrency, seconds per token).

    Two factors are fitted by least squares on relative errors: one on the fixed cost of a step (overhead and collective
    latency), one on the cost that grows with its bytes and flops. Each row of the comparison is predicted by a fit to
    the other rows.
    """
    parts = np.array([_parts(deployment, c) for c, _ in runs])
    measured = np.array([seconds for _, seconds in runs])
    fixed, growing = _fit(parts, measured)
    rows = []
    for i, (concurrency, seconds) in enumerate(runs):
        others = [j for j in range(len(runs)) if j != i]
        a, b = _fit(parts[others], measured[others])
        rows.append(
            Comparison(
                concurrency=concurrency,
                measured=seconds,
                described=float(parts[i].sum()),
                fitted=float(a * parts[i, 0] + b * parts[i, 1]),
            )
        )
    hardware = deployment.cluster.hardware
    hardware = replace(
        hardware,
        step_overhead=hardware.step_overhead * fixed,
        collective_latency=hardware.collective_latency * fixed,
        efficiency=hardware.efficiency / growing,
    )
    return Calibration(cluster=replace(deployment.cluster, hardware=hardware), rows=tuple(rows))


def _parts(deployment: Deployment, concurrency: int) -> tuple[float, float]:
    """The fixed seconds of a step, and the seconds that grow with its size."""
    d, shape = deployment, deployment.shape
    requests = max(1, -(-concurrency // shape.data))
    step = step_time(d.workload, d.cluster, shape, requests, d.traffic.context)
    latency = 2 * d.workload.moe_layers * d.cluster.hardware.collective_latency * (shape.expert_rank_count > 1)
    return step.overhead + latency, step.total - step.overhead - latency


def _fit(parts: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Factors of both parts, above 0: a part with a negative factor in the fit gets 0.05 instead."""
    scaled = parts / measured[:, None]
    if len(parts) == 1:
        factor = float(1 / scaled.sum())
        return factor, factor
    solution = np.linalg.lstsq(scaled, np.ones(len(parts)), rcond=None)[0]
    for i in (0, 1):
        if solution[i] < 0.05:
            rest = 1 - 0.05 * scaled[:, i]
            solution[i] = 0.05
            solution[1 - i] = max(0.05, float(scaled[:, 1 - i] @ rest / (scaled[:, 1 - i] @ scaled[:, 1 - i])))
            break
    return float(solution[0]), float(solution[1])
