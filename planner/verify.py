"""Predictions held against the compiler and against measurements.

The compiler runs in a process of its own (`benchmarks.planner_aot`), since the planner does not import JAX.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict

from planner.calibration import Calibration
from planner.deployment import Deployment
from planner.errors import InputError, PlannerError
from planner.shape import rest_bytes
from planner.throughput import assess

PROGRAM = "benchmarks.planner_aot"


class CompilerUnavailable(PlannerError):
    """The ahead-of-time compiler cannot be had here; the text says what to install."""

    status = "UNAVAILABLE"


def topology_devices(topology: str) -> int:
    """Devices of a topology such as `v5e:2x4`."""
    match = re.fullmatch(r"[\w-]+:(\d+(?:x\d+)*)", topology)
    if not match:
        raise InputError(f"topology {topology!r} is not of the form v5e:2x4")
    count = 1
    for side in match[1].split("x"):
        count *= int(side)
    return count


def aot_problems(deployment: Deployment, topology: str) -> list[dict]:
    """What to compile: the step of the plan's shape on the topology, and of the mesh with one rank less.

    A topology smaller than the plan stands for a part of it: the slots and requests of a rank stay.
    """
    d, shape, devices = deployment, deployment.shape, topology_devices(topology)
    best = assess(d.workload, d.cluster, shape, d.traffic)
    hidden = max(1, d.workload.hidden_bytes // 2)
    base = {
        "topology": topology,
        "layers": d.workload.moe_layers,
        "hidden": hidden,
        "width": max(1, round(d.workload.expert_flops / 6 / hidden)),
        "experts_per_token": d.workload.experts_per_token,
        "slots": shape.slots,
        "requests": max(1, best.requests_per_group // shape.tensor),
        "context": int(d.traffic.context),
        "cache_elements": d.workload.cache_bytes_per_token // 2 // max(1, d.workload.layers),
        "rest_elements": rest_bytes(d.workload, shape.tensor, shape.dense) // 2 // max(1, d.workload.layers),
    }
    return [{**base, "devices": devices}, *([{**base, "devices": devices - 1}] if devices > 1 else [])]


def compile_ahead(deployment: Deployment, topology: str, *, timeout: float = 900.0) -> list[dict]:
    """The compiler's figures for each of `aot_problems`, tagged "aot": bytes and its own seconds.

    Raises CompilerUnavailable when JAX, libtpu or the program are missing.
    """
    problems = aot_problems(deployment, topology)
    command = [sys.executable, "-m", PROGRAM]
    try:
        done = subprocess.run(
            command, input=json.dumps(problems), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise CompilerUnavailable(f"{PROGRAM} did not finish in {timeout:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompilerUnavailable(
            f"{PROGRAM} failed: {last}. It needs a checkout, jax and `pip install libtpu` for TPU topologies."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def verify_report(compiled: list[dict], calibration: Calibration | None, estimate: float) -> tuple[dict, str]:
    """Both comparisons as data and as text; `estimate` is the predicted step in seconds."""
    data: dict = {"estimate_step_s": estimate, "aot": compiled, "measured": []}
    lines = [f"step by roofline, as many requests as fit: {estimate * 1e3:.2f} ms   [estimate]"]
    for row in compiled:
        if row.get("error"):
            lines.append(f"{row['devices']} devices: does not compile: {row['error']}")
            continue
        own = f"step {row['optimal_s'] * 1e3:.2f} ms" if row["optimal_s"] else "no time from this compiler"
        lines.append(
            f"{row['devices']} devices of {row['topology']}: compiled in {row['compile_s']:.1f} s, "
            f"{row['device_bytes'] / 1e9:.2f} GB a device, {own}   [aot]"
        )
    if calibration is not None:
        data["measured"] = [{**asdict(r), "error": r.error} for r in calibration.rows]
        data["hardware"] = asdict(calibration.cluster.hardware)
        for r in calibration.rows:
            lines.append(
                f"concurrency {r.concurrency:>3}: measured {r.measured * 1e3:8.2f} ms, as described "
                f"{r.described * 1e3:8.2f} ms, fitted to the others {r.fitted * 1e3:8.2f} ms ({r.error:+.0%})"
            )
    return data, "\n".join(lines)
