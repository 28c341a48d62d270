"""Compile the step a rank runs for devices that are not here, and say what it takes.

    python -m moejax.ahead < PROBLEM        (JSON in, JSON out; `planner.verify` asks)

A problem has a `topology` (`v5e:2x4`, which needs libtpu, or `cpu:4`), a model's `config` (as published, or ours) and
`name`, the form of its `weights`, whether `dense` layers are `whole` or `divided`, `page_tokens` and `pages` of a
rank's cache, `rows` decoded in a step, `longest` tokens of a sequence, and `meshes`: a `name`, positions of `devices`
in the topology, `slots` on each, and `tiles`, how many (slot, tile of rows) pairs a step multiplies. Each is compiled
as a server does, by `moejax.programs`. The answer for a mesh has bytes of a device, the compiler's own seconds by part,
or the `error` of a mesh that does not compile.
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

from moejax import kernels
from moejax.cache import bytes_per_token
from moejax.compiled_cost import read_cost
from moejax.config import ConfigError, ModelConfig
from moejax.divide import divided_config
from moejax.families import read_config
from moejax.inputs import Bucket
from moejax.programs import ModelShape, mesh_lowerings

Problem = Mapping[str, Any]


class NotHere(RuntimeError):
    """The compiler for a topology cannot be had on this machine; says what to install."""


def answer(problem: Problem) -> dict[str, Any]:
    """What compiling each mesh of a problem gives. Raises ConfigError for a model that is not served, NotHere when the
    topology's compiler is missing or does not know it."""
    cfg = model_of(problem)
    devices = topology_devices(problem["topology"])
    bucket = Bucket(decode=problem["rows"], tiles=0, max_pages=-(-problem["longest"] // problem["page_tokens"]))
    shape = ModelShape(cfg=cfg, buckets=(bucket,), page_size=problem["page_tokens"], pages=problem["pages"])
    rows = [compile_mesh(shape, devices, mesh) for mesh in problem["meshes"]]
    return {"meshes": rows, "weights": cfg.weights, "cache_bytes_per_token": bytes_per_token(cfg)}


def model_of(problem: Problem) -> ModelConfig:
    """The model in the form it is to be held in, its context at least as long as a problem's longest sequence."""
    config = problem["config"]
    if "model_type" in config:
        cfg = read_config(config, name=problem["name"])
    else:
        cfg = ModelConfig.from_json(json.dumps(config))
    if problem["dense"] == "divided":
        cfg = divided_config(cfg) or cfg
    return dataclasses.replace(cfg, weights=problem["weights"], max_context=max(cfg.max_context, problem["longest"]))


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, in its order."""
    if topology.startswith("cpu:"):
        with contextlib.suppress(kernels.KernelError):
            kernels.load()
        return jax.devices("cpu")[: int(topology.removeprefix("cpu:"))]
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise NotHere(
            f"no compiler for {topology!r} here: {why}. It takes `pip install moejax[tpu]` (libtpu)."
        ) from None


def compile_mesh(shape: ModelShape, devices: Sequence[jax.Device], mesh: Mapping[str, Any]) -> dict[str, Any]:
    """The step over some of the devices: bytes, the compiler's seconds by part, or why it does not compile."""
    chosen = [devices[i] for i in mesh["devices"]]
    row = {"name": mesh["name"], "devices": len(chosen), "slots": mesh["slots"]}
    _, (_, lower) = mesh_lowerings(shape, chosen, mesh["slots"])
    began = time.perf_counter()
    try:
        compiled = lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return row | {"error": " ".join(str(error).split())[:400]}
    memory = compiled.memory_analysis()
    runs = {"attention": shape.buckets[0].max_pages, "experts": mesh["tiles"]}
    cost = read_cost(compiled.as_text(), runs)
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
        result = answer(problem)
    except (ConfigError, NotHere) as error:
        result = {"refused": str(error), "unavailable": isinstance(error, NotHere)}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
