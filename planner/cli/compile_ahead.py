"""Predictions held against the compiler and against measurements.

The compiler runs in a process of its own (`moejax.ahead`), since the planner does not import JAX. What it compiles is
the step that `moejax serve` runs, over the whole mesh and over those that are left after the losses of the lattice.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil, exp
from typing import Any

from planner.calibration import Calibration
from planner.cost import step_time
from planner.deployment import Deployment
from planner.errors import InputError, NoFeasiblePlan, PlannerError
from planner.lattice import losses
from planner.plan import Figure
from planner.report import table
from planner.served import check_served, divides_dense, held_form, tensor_of
from planner.shape import Shape, rest_bytes, slots_per_rank
from planner.throughput import Candidate, assess

PROGRAM = "moejax.ahead"
TILE = 32  # rows that a slot multiplies at a time (moejax.experts)


class CompilerUnavailable(PlannerError):
    """The ahead-of-time compiler cannot be had here; the text says what to install."""

    status = "UNAVAILABLE"


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A mesh to compile: positions of its devices in the topology, slots on each, and the losses it is left by.

    `reason` says why there is nothing to compile: the experts do not fit. `planned` are the planner's seconds by part.
    """

    name: str
    devices: tuple[int, ...]
    slots: int
    tiles: float
    planned: dict[str, float]
    planned_bytes: int
    reason: str = ""


def topology_devices(topology: str) -> int:
    """Devices of a topology such as `v5e:2x4`, or `cpu:4`."""
    match = re.fullmatch(r"[\w-]+:(\d+(?:x\d+)*)", topology)
    if not match:
        raise InputError(f"topology {topology!r} is not of the form v5e:2x4")
    count = 1
    for side in match[1].split("x"):
        count *= int(side)
    if not count:
        raise InputError(f"topology {topology!r} has no devices")
    return count


def meshes(deployment: Deployment, topology: str, best: Candidate, *, each_loss: bool = False) -> list[Mesh]:
    """The meshes of a plan on a topology: the whole, and what each loss of a rank or host leaves, those of one size and
    with the same slots once unless `each_loss`. A topology smaller than the plan stands for a part of it: the slots and
    requests of a rank stay, and one device is lost.
    """
    n, there = len(deployment.plan.ranks), topology_devices(topology)
    whole = tuple(range(min(n, there)))
    found = [_mesh(deployment, best, "all", whole)]
    if there < n:
        return found + ([_mesh(deployment, best, "without one", whole[:-1])] if there > 1 else [])
    at = {rank: i for i, rank in enumerate(deployment.plan.rank_ids)}
    alike: dict[tuple[int, str], int] = {}
    for name, dead in _named_losses(deployment):
        left = tuple(i for i in whole if i not in {at[rank] for rank in dead})
        mesh = _mesh(deployment, best, f"without {name}", left)
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
    for dead in losses(deployment.plan, 1):
        first = places[min(dead)]
        yield (f"rank {first.id}" if len(dead) == 1 else first.host), dead


def _mesh(deployment: Deployment, best: Candidate, name: str, devices: tuple[int, ...]) -> Mesh:
    d, n, reason = deployment, len(devices), ""
    slots = d.plan.slots_per_rank
    if n < len(d.plan.ranks) <= n + max(map(len, d.cluster.domains("host").values())):
        try:
            slots = slots_per_rank(d.workload, d.cluster, n, asked=None, before=slots, survive_ranks=0)
        except NoFeasiblePlan as error:
            reason = str(error)
    dense, roles = d.shape.dense if divides_dense(d) else 1, ("collocated",) * n
    shape = Shape(arch="collocated", tensor=1, dense=dense, slots=slots, roles=roles, groups=tuple(range(n)))
    requests = best.requests_per_group
    step = step_time(d.workload, d.cluster, shape, requests, d.traffic.context)
    cache = requests * d.traffic.longest * d.workload.cache_bytes_per_token
    return Mesh(
        name=name,
        devices=devices,
        slots=slots,
        tiles=_tiles(requests * d.workload.experts_per_token, slots),
        planned=step.parts(),
        planned_bytes=rest_bytes(d.workload, 1, dense) + slots * d.workload.slot_bytes + cache,
        reason=reason,
    )


def _tiles(items: float, slots: int) -> float:
    """(slot, tile of rows) pairs that `items` rows on `slots` slots make: each slot hit has one or more."""
    if not slots:
        return 0.0
    hit = slots * (1 - exp(-items / slots))
    return hit * ceil(items / hit / TILE) if hit else 0.0


def aot_problem(deployment: Deployment, topology: str, best: Candidate, chosen: list[Mesh]) -> dict:
    """What `moejax.ahead` is asked. Raises InputError for a plan that moejax does not run, or without a model."""
    check_served(deployment)
    d = deployment
    if d.shape.arch == "disaggregated":
        raise InputError(
            "ranks that attend and ranks that hold experts run programs of their own, which only their hosts put in "
            "order (docs/decisions/0007); --aot compiles the one program of collocated ranks."
        )
    if tensor_of(d) > 1:
        raise InputError(
            f"tensor groups of {tensor_of(d)}: --aot compiles the step of ranks that attend alone. "
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
        "weights": held_form(d.workload),
        "dense": "divided" if divides_dense(d) else "whole",
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
    """The compiler's figures for each mesh, tagged "aot", beside the planner's: {"meshes": [...], "notes": [...]}.

    Raises InputError for what moejax does not run, CompilerUnavailable when JAX or libtpu are missing.
    """
    d = deployment
    best = assess(d.workload, d.cluster, d.shape, d.traffic)
    if best.requests_per_group < 1:
        raise NoFeasiblePlan(f"there is no step to compile: {best.reason}")
    chosen = meshes(d, topology, best, each_loss=each_loss)
    problem = aot_problem(d, topology, best, chosen)
    answer = _ask(problem, timeout)
    compiled = {row["name"]: row for row in answer["meshes"]}
    rows = []
    for mesh in chosen:
        row = compiled.get(mesh.name) or {"name": mesh.name, "devices": len(mesh.devices), "slots": mesh.slots}
        error = {"error": mesh.reason} if mesh.reason else {}
        rows.append(row | error | {"planned_s": mesh.planned, "planned_bytes": mesh.planned_bytes})
    return {"topology": topology, "meshes": rows, "notes": _notes(d, topology, best, problem, answer)}


def _ask(problem: dict, timeout: float) -> dict:
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
        raise CompilerUnavailable(f"{PROGRAM} failed: {last}. It needs jax, and `pip install moejax[tpu]` for TPUs.")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "refused" in answer:
        raise (CompilerUnavailable if answer["unavailable"] else InputError)(answer["refused"])
    return answer


def _notes(d: Deployment, topology: str, best: Candidate, problem: dict, answer: dict) -> list[str]:
    """What must be known to compare the two."""
    n, there = len(d.plan.ranks), topology_devices(topology)
    notes = [
        f"a step of {best.requests_per_group} requests a rank, each up to {d.traffic.longest:g} tokens long; "
        f"weights held as {answer['weights']}"
    ]
    if there < n:
        notes.append(
            f"{topology} stands for {there} of the plan's {n} ranks: slots and requests of a rank are the same"
        )
    if answer["cache_bytes_per_token"] != d.workload.cache_bytes_per_token:
        notes.append(
            f"moejax keeps {answer['cache_bytes_per_token']:,} bytes of cache a token, the plan counts "
            f"{d.workload.cache_bytes_per_token:,}: solve with --cache float32 to compare memory"
        )
    if problem["weights"] != d.workload.weight_format:
        notes.append(f"the plan's weights are {d.workload.weight_format}, which moejax does not hold")
    return notes


def aot_figures(compiled: dict) -> tuple[Figure, ...]:
    """What the compiler said of the whole mesh, as figures of a plan."""
    whole = compiled["meshes"][0]
    if whole.get("error"):
        return ()
    found = [Figure(name="memory_of_a_device", value=whole["device_bytes"], unit="bytes", source="aot")]
    if whole["seconds"]:
        value = sum(whole["seconds"].values())
        found.append(Figure(name="step_without_exchange", value=value, unit="s", source="aot"))
    return tuple(found)


def verify_report(compiled: dict, calibration: Calibration | None, estimate: float) -> tuple[dict, str]:
    """Both comparisons as data and as text; `estimate` is the predicted step in seconds."""
    data: dict = {"estimate_step_s": estimate, "aot": compiled, "measured": []}
    lines = [f"step by roofline, as many requests as fit: {estimate * 1e3:.2f} ms   [estimate]"]
    if compiled:
        lines += _aot_lines(compiled)
    if calibration is not None:
        data["measured"] = [{**asdict(r), "error": r.error} for r in calibration.rows]
        data["hardware"] = asdict(calibration.cluster.hardware)
        for r in calibration.rows:
            lines.append(
                f"concurrency {r.concurrency:>3}: measured {r.measured * 1e3:8.2f} ms, as described "
                f"{r.described * 1e3:8.2f} ms, fitted to the others {r.fitted * 1e3:8.2f} ms ({r.error:+.0%})"
            )
    return data, "\n".join(lines)


def _aot_lines(compiled: dict) -> list[str]:
    head = ["mesh", "devices", "slots", "memory", "planned", "compiled in", "step ms", "attention", "experts", "rest"]
    rows, worse = [], []
    for row in compiled["meshes"]:
        if row.get("error"):
            worse.append(f"{row['name']} ({row['devices']} devices) does not compile: {row['error']}")
            continue
        planned = row["planned_s"]
        seconds = dict(row["seconds"])
        total, parts = sum(seconds.values()), [seconds.pop("attention", 0.0), seconds.pop("experts", 0.0)]
        parts.append(sum(seconds.values()))
        mine = [planned["attention"] + planned["experts"], planned["attention"], planned["experts"], 0.0]
        both = [f"{_ms(a) if total else '-'} ({_ms(b)})" for a, b in zip([total, *parts], mine, strict=True)]
        memory = [f"{row['device_bytes'] / 1e9:.2f} GB", f"{row['planned_bytes'] / 1e9:.2f} GB"]
        rows.append([row["name"], row["devices"], row["slots"], *memory, f"{row['compile_s']:.1f} s", *both])
    lines = [f"{compiled['topology']}: {compiled['notes'][0]}", *compiled["notes"][1:]]
    if rows:
        lines += ["", table(head, rows), "", "[aot] the compiler's milliseconds, in brackets the planner's [estimate]"]
        lines += _exchange_line(compiled["meshes"]) + _kernel_line(compiled["meshes"])
    return lines + worse


def _exchange_line(rows: list[dict]) -> list[str]:
    whole = next(row for row in rows if not row.get("error"))
    if not whole["exchanges"]:
        return []
    planned = whole["planned_s"]["exchange"]
    return [
        f"the compiler prices no exchange: {whole['exchanges']:.0f} of them, {whole['exchange_bytes'] / 1e6:,.1f} MB a "
        f"device in all; {_ms(planned)} ms by the planner [estimate]"
    ]


def _kernel_line(rows: list[dict]) -> list[str]:
    kernels = next(row for row in rows if not row.get("error"))["kernels"]
    if not kernels:
        return []
    told = ", ".join(f"{count:.0f} in {part}" for part, count in kernels.items())
    return [f"nor kernels in Pallas ({told}): its milliseconds are of what is around them"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
