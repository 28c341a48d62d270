"""Compiles the step of a rank for devices that this machine does not have, and reports memory and estimated time.

    python -m moejax.runtime.aot < PROBLEM        (JSON in, JSON out; `planner.cli.compile_ahead` asks)

A problem has a `topology` (`v5e:2x4`, which needs libtpu, or `cpu:4`), a model's `config` (as published, or ours) and
`name`, the format of its `weights` and of its `cache`, whether `dense` layers are `replicated` or `sharded`,
`page_tokens` and `pages` of a rank's cache, `rows` decoded in a step, `longest` tokens of a sequence, and `meshes`: a
`name`, positions of `devices` in the topology, `slots` on each, and `tiles`, the number of (slot, tile of rows) pairs
that a step multiplies. Each mesh is compiled as a server does, by `moejax.runtime.programs`. The answer for a mesh
has the bytes of a device and the compiler's own seconds by part, or the `error` of a mesh that does not compile.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from moejax.checkpoint.families import read_config
from moejax.checkpoint.shard_dense import sharded_dense_config
from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import bytes_per_token
from moejax.config.mesh import JaxDevice
from moejax.config.model_config import ModelConfig
from moejax.config.step_inputs import Bucket
from moejax.config.weight_formats import usual_form
from moejax.ops import cpu
from moejax.runtime.compiled_cost import read_cost
from moejax.runtime.programs import ModelShape, mesh_lowerings
from planner.inputs.layer_states import SNAPSHOTS_PER_REQUEST

Problem = Mapping[str, Any]


class CompilerMissing(RuntimeError):
    """The compiler for a topology is missing on this machine; says what to install."""


def compile_problem(problem: Problem) -> dict[str, Any]:
    """The result of compiling each mesh of a problem. Raises ConfigError for a model that is not served, NotHere when
    the topology's compiler is missing or does not know it."""
    cfg = problem_config(problem)
    devices = topology_devices(problem["topology"])
    pages = -(-problem["longest"] // problem["page_tokens"])
    bucket = Bucket(decode=problem["rows"], tiles=0, max_pages=pages, states=bool(cfg.state_layers))
    shape = ModelShape(
        cfg=cfg,
        buckets=(bucket,),
        page_size=problem["page_tokens"],
        pages=problem["pages"],
        snapshots=SNAPSHOTS_PER_REQUEST * bucket.decode,
    )
    rows = [compile_mesh(shape, devices, mesh) for mesh in problem["meshes"]]
    return {"meshes": rows, "weights": cfg.weights, "cache_bytes_per_token": bytes_per_token(cfg)}


def problem_config(problem: Problem) -> ModelConfig:
    """The model in its weight format, with a context at least as long as the problem's longest sequence."""
    config = problem["config"]
    if "model_type" in config:
        cfg = read_config(config, name=problem["name"])
    else:
        cfg = ModelConfig.from_json(json.dumps(config))
    if problem["dense"] == "sharded":
        cfg = sharded_dense_config(cfg) or cfg
    context = max(cfg.max_context, problem["longest"])
    cfg = dataclasses.replace(cfg, cache_format=problem["cache"], max_context=context)
    if problem["weights"] != "published":
        return dataclasses.replace(cfg, weights=problem["weights"])
    return cfg.with_packed(usual_form(cfg, problem["published"]))


def topology_devices(topology: str) -> Sequence[JaxDevice]:
    """The devices of a topology, in its order."""
    if topology.startswith("cpu:"):
        with contextlib.suppress(cpu.KernelError):
            cpu.load()
        return jax.devices("cpu")[: int(topology.removeprefix("cpu:"))]
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise CompilerMissing(
            f"no compiler for {topology!r} here: {why}. It takes libtpu. Run in the checkout of moejax: "
            ".venv/bin/pip install -e '.[tpu]'"
        ) from None


def compile_mesh(shape: ModelShape, devices: Sequence[JaxDevice], mesh: Mapping[str, Any]) -> dict[str, Any]:
    """The step over some of the devices: bytes, the compiler's seconds by part, or why it does not compile."""
    chosen = [devices[i] for i in mesh["devices"]]
    row = {"name": mesh["name"], "devices": len(chosen), "slots": mesh["slots"]}
    _, (_, lower) = mesh_lowerings(shape, chosen, mesh["slots"])
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return row | {"error": " ".join(str(error).split())[:400]}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "XLA's compilers for CPU and TPU report memory"
    assert text is not None, "XLA's compilers for CPU and TPU give the compiled text"
    trip_counts = {"attention": shape.buckets[0].max_pages, "experts": mesh["tiles"]}
    cost = read_cost(text, trip_counts)
    return row | {
        "compile_s": time.perf_counter() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "device_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "seconds": cost.seconds(chosen[0].device_kind),
        "exchanges": cost.exchanges,
        "exchange_bytes": cost.exchange_bytes,
        "kernels": cost.kernels,
        "unknown_loops": cost.unknown_loops,
        "source": "aot",
    }


def main() -> None:
    """Answer the problem on standard input."""
    problem = json.load(sys.stdin)
    try:
        result = compile_problem(problem)
    except (ConfigError, CompilerMissing) as error:
        result = {"refused": str(error), "unavailable": isinstance(error, CompilerMissing)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
