"""Ahead-of-time compilation of a plan's step: the meshes to compile, and the figures of the compiler.

The compiler runs in a process of its own (`moejax.runtime.aot`), since the planner does not import JAX. It compiles the
step that `moejax serve` runs, over the whole mesh and over the meshes left after the losses of the lattice.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, exp
from typing import Any

from planner.cost.roofline import step_time
from planner.cost.throughput import Candidate, assess
from planner.errors import InputError, NoFeasiblePlan, PlannerError
from planner.inputs.layer_states import STATES_PER_REQUEST
from planner.plan.deployment import Deployment
from planner.plan.plan import Figure
from planner.plan.shape import Shape
from planner.solver.lattice import loss_sets
from planner.solver.servable import (
    check_servable,
    served_cache_format,
    served_weight_format,
    shards_dense,
    tensor_width,
)
from planner.solver.shapes import rest_bytes, slots_per_rank

PROGRAM = "moejax.runtime.aot"
TILE = 32  # rows that a slot multiplies at a time (moejax.model.experts)


class CompilerUnavailable(PlannerError):
    """The ahead-of-time compiler is not available here; the text says what to install."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class MeshToCompile:
    """A mesh to compile: the positions of its devices in the topology, and the slots on each.

    `name` says which losses leave it. `reason` says why there is nothing to compile, when the experts do not fit.
    `planned` are the planner's seconds by part, `planned_bytes` its bytes on a device.
    """

    name: str
    devices: tuple[int, ...]
    slots: int
    tiles: float
    planned: dict[str, float]
    planned_bytes: int
    reason: str = ""


def topology_devices(topology: str) -> int:
    """The number of devices of a topology such as `v5e:2x4` or `cpu:4`. InputError for any other text."""
    match = re.fullmatch(r"[\w-]+:(\d+(?:x\d+)*)", topology)
    if not match:
        raise InputError(f"topology {topology!r} is not of the form v5e:2x4")
    count = 1
    for side in match[1].split("x"):
        count *= int(side)
    if not count:
        raise InputError(f"topology {topology!r} has no devices")
    return count


def meshes(deployment: Deployment, topology: str, best: Candidate, *, each_loss: bool = False) -> list[MeshToCompile]:
    """The meshes of a plan on a topology: the whole mesh, and the mesh that each loss of a rank or host leaves.

    Meshes of the same size and slots are compiled once, unless `each_loss`. A topology smaller than the plan stands for
    a part of it: the slots and requests of a rank stay, and one device is lost.
    """
    n, devices = len(deployment.plan.ranks), topology_devices(topology)
    whole = tuple(range(min(n, devices)))
    found = [_mesh_to_compile(deployment, best, "all", whole)]
    if devices < n:
        return found + ([_mesh_to_compile(deployment, best, "without one", whole[:-1])] if devices > 1 else [])
    at = {rank: i for i, rank in enumerate(deployment.plan.rank_ids)}
    alike: dict[tuple[int, str], int] = {}
    for name, dead in _named_losses(deployment):
        left = tuple(i for i in whole if i not in {at[rank] for rank in dead})
        mesh = _mesh_to_compile(deployment, best, f"without {name}", left)
        key = (len(left), mesh.reason)
        if each_loss or key not in alike:
            alike[key] = len(found)
            found.append(mesh)
        elif " and others" not in found[alike[key]].name:
            found[alike[key]] = replace(found[alike[key]], name=f"{found[alike[key]].name} and others alike")
    return found


def _named_losses(deployment: Deployment) -> Iterator[tuple[str, frozenset[int]]]:
    """The losses that the lattice prepares: every rank, then every host of several."""
    places = {r.id: r for r in deployment.plan.ranks}
    for dead in loss_sets(deployment.plan, 1):
        first = places[min(dead)]
        yield (f"rank {first.id}" if len(dead) == 1 else first.host), dead


def _mesh_to_compile(deployment: Deployment, best: Candidate, name: str, devices: tuple[int, ...]) -> MeshToCompile:
    """The mesh of these devices, with the slots and the predictions that the planner has for it."""
    d, n, reason = deployment, len(devices), ""
    slots = d.plan.slots_per_rank
    if n < len(d.plan.ranks) <= n + max(map(len, d.cluster.domains("host").values())):
        try:
            slots = slots_per_rank(d.workload, d.cluster, n, asked=None, before=slots, survive_ranks=0)
        except NoFeasiblePlan as error:
            reason = str(error)
    dense, roles = d.shape.dense if shards_dense(d) else 1, ("collocated",) * n
    shape = Shape(arch="collocated", tensor=1, dense=dense, slots=slots, roles=roles, groups=tuple(range(n)))
    requests = best.requests_per_group
    step = step_time(d.workload, d.cluster, shape, requests, d.traffic.context)
    states = STATES_PER_REQUEST * d.workload.state_bytes
    cache = requests * (d.traffic.longest * d.workload.cache_bytes_per_token + states)
    return MeshToCompile(
        name=name,
        devices=devices,
        slots=slots,
        tiles=_tiles(requests * d.workload.experts_per_token, slots),
        planned=step.parts(),
        planned_bytes=rest_bytes(d.workload, 1, dense) + slots * d.workload.slot_bytes + cache,
        reason=reason,
    )


def _tiles(items: float, slots: int) -> float:
    """The expected number of (slot, tile of rows) pairs of `items` rows spread over `slots` slots."""
    if not slots:
        return 0.0
    hit = slots * (1 - exp(-items / slots))
    return hit * ceil(items / hit / TILE) if hit else 0.0


def aot_problem(deployment: Deployment, topology: str, best: Candidate, chosen: list[MeshToCompile]) -> dict:
    """The input of `moejax.runtime.aot`. Raises InputError for a plan that moejax cannot run, or without a model."""
    check_servable(deployment)
    d = deployment
    if d.shape.arch == "disaggregated":
        raise InputError(
            "ranks that attend and ranks that hold experts run programs of their own, which only their hosts put in "
            "order (docs/decisions/0007); --aot compiles the one program of collocated ranks."
        )
    if tensor_width(d) > 1:
        raise InputError(
            f"tensor groups of {tensor_width(d)}: --aot compiles the step of ranks that attend alone. "
            "Solve with --tensor 1."
        )
    if not d.config:
        raise InputError(
            "the plan was made from numbers: there is no model to compile. Solve from a config.json or a preset, "
            "which the plan file keeps, or take the plan of a running server (`moejax status --plan`)."
        )
    longest = ceil(d.traffic.longest)
    return {
        "topology": topology,
        "config": dict(d.config),
        "name": d.workload.name,
        "weights": served_weight_format(d),
        "published": d.workload.weight_format,
        "cache": served_cache_format(d),
        "dense": "sharded" if shards_dense(d) else "replicated",
        "page_tokens": d.workload.page_tokens,
        "pages": best.requests_per_group * -(-longest // d.workload.page_tokens),
        "rows": best.requests_per_group,
        "longest": longest,
        "meshes": [
            {"name": m.name, "devices": m.devices, "slots": m.slots, "tiles": m.tiles} for m in chosen if not m.reason
        ],
    }


def compile_ahead(
    deployment: Deployment, topology: str, *, each_loss: bool = False, timeout: float = 3600.0
) -> dict[str, Any]:
    """The compiler's figures for each mesh beside the planner's: {"topology": ..., "meshes": [...], "notes": [...]}.

    Raises InputError for a plan that moejax cannot run, CompilerUnavailable when JAX or libtpu is missing.
    """
    d = deployment
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    if best.requests_per_group < 1:
        raise NoFeasiblePlan(f"there is no step to compile: {best.reason}")
    chosen = meshes(d, topology, best, each_loss=each_loss)
    problem = aot_problem(d, topology, best, chosen)
    answer = _run_compiler(problem, timeout)
    compiled = {row["name"]: row for row in answer["meshes"]}
    rows = []
    for mesh in chosen:
        row = compiled.get(mesh.name) or {"name": mesh.name, "devices": len(mesh.devices), "slots": mesh.slots}
        error = {"error": mesh.reason} if mesh.reason else {}
        rows.append(row | error | {"planned_s": mesh.planned, "planned_bytes": mesh.planned_bytes})
    return {"topology": topology, "meshes": rows, "notes": _notes(d, topology, best, problem, answer)}


def _run_compiler(problem: dict, timeout: float) -> dict:
    """The answer of `moejax.runtime.aot`, run in a process of its own for at most `timeout` seconds."""
    cpus = problem["topology"].removeprefix("cpu:") if problem["topology"].startswith("cpu:") else "1"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpus}"
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", PROGRAM],
            input=json.dumps(problem),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env={**os.environ, **quiet},
        )
    except subprocess.TimeoutExpired:
        raise CompilerUnavailable(f"{PROGRAM} did not finish in {timeout:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompilerUnavailable(
            f"{PROGRAM} failed: {last}. It needs jax, and for TPUs libtpu. Run in the checkout of moejax: "
            ".venv/bin/pip install -e '.[tpu]'"
        )
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "refused" in answer:
        raise (CompilerUnavailable if answer["unavailable"] else InputError)(answer["refused"])
    return answer


def _notes(d: Deployment, topology: str, best: Candidate, problem: dict, answer: dict) -> list[str]:
    """Notes for the comparison: the batch, the formats, and where the topology is smaller than the plan."""
    n, devices = len(d.plan.ranks), topology_devices(topology)
    notes = [
        f"a step of {best.requests_per_group} requests a rank, each up to {d.traffic.longest:g} tokens long; "
        f"weights held as {answer['weights']}"
    ]
    if devices < n:
        notes.append(
            f"{topology} stands for {devices} of the plan's {n} ranks: slots and requests of a rank are the same"
        )
    if answer["cache_bytes_per_token"] != d.workload.cache_bytes_per_token:
        notes.append(
            f"moejax keeps {answer['cache_bytes_per_token']:,} bytes of cache a token, in {problem['cache']} and "
            f"without windows, the plan counts {d.workload.cache_bytes_per_token:,} in {d.workload.cache_format}"
        )
    if problem["weights"] != d.workload.weight_format:
        notes.append(f"the plan's weights are {d.workload.weight_format}, which moejax does not hold")
    return notes


def aot_figures(compiled: dict) -> tuple[Figure, ...]:
    """The compiler's figures for the whole mesh, as figures of a plan."""
    whole = compiled["meshes"][0]
    if whole.get("error"):
        return ()
    found = [Figure(name="memory_of_a_device", value=whole["device_bytes"], unit="bytes", source="aot")]
    if whole["seconds"]:
        value = sum(whole["seconds"].values())
        found.append(Figure(name="step_without_exchange", value=value, unit="s", source="aot"))
    return tuple(found)
