"""Compile a decode step for a topology without its hardware, and say what the compiler thinks of it.

Reads a list of problems as JSON (see `planner.verify.aot_problems`), prints a list of answers. The step is
written from the model's sizes: per layer the weights outside the experts, attention over a latent or grouped
cache as one product with it, dispatch by `all_to_all`, the experts in their slots, combine by `all_to_all`.
TPU topologies need libtpu; `cpu:N` compiles for N devices of this machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial


def compile_step(problem: dict) -> dict:
    """One answer: bytes a device holds, the compiler's own seconds for the step, seconds to compile.

    The compiler counts the body of a loop once, so its seconds and flops are multiplied by the layers.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    ranks, slots = problem["devices"], problem["slots"]
    if problem["topology"].startswith("cpu"):
        devices = np.array(jax.devices("cpu")[:ranks])
    else:
        topology = topologies.get_topology_desc(problem["topology"], platform="tpu")
        devices = np.array(topology.devices[:ranks])
    mesh = Mesh(devices, ("expert",), axis_types=(AxisType.Auto,))
    hidden, width, requests = problem["hidden"], problem["width"], problem["requests"]
    capacity = max(1, -(-requests * problem["experts_per_token"] // slots // ranks)) * slots

    def layer(x_TD, weights):
        rest, cache, up, down = weights
        x_TD = x_TD + (x_TD @ rest) @ rest.T
        scores = jnp.einsum("td,tsk->ts", x_TD, cache)
        x_TD = x_TD + jnp.einsum("ts,tsk->t", jax.nn.softmax(scores), cache)[:, None]
        sent = jnp.broadcast_to(x_TD[:1], (ranks * capacity, hidden))
        got = jax.lax.all_to_all(sent, "expert", 0, 0, tiled=True).reshape(slots, -1, hidden)
        done = jnp.einsum("pcf,pfd->pcd", jax.nn.silu(jnp.einsum("pcd,pdf->pcf", got, up)), down)
        back = jax.lax.all_to_all(done.reshape(-1, hidden), "expert", 0, 0, tiled=True)
        return x_TD + back[: x_TD.shape[0]].sum() / hidden, None

    @partial(jax.jit)
    @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def step(x_TD, rest, cache, up, down):
        return jax.lax.scan(layer, x_TD, (rest[0], cache[0], up[0], down[0]))[0]

    split = NamedSharding(mesh, P("expert"))

    def array(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)

    layers = problem["layers"]
    inner = max(1, problem["rest_elements"] // hidden)
    wide = max(1, problem["cache_elements"])
    arguments = (
        array(ranks * requests, hidden),
        array(ranks, layers, hidden, inner),
        array(ranks, layers, requests, problem["context"], wide),
        array(ranks, layers, slots, hidden, 2 * width),
        array(ranks, layers, slots, 2 * width, hidden),
    )
    start = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    return {
        "topology": problem["topology"],
        "devices": ranks,
        "compile_s": time.perf_counter() - start,
        "device_bytes": held,
        "optimal_s": float(cost.get("optimal_seconds", 0.0)) * layers,
        "flops": float(cost.get("flops", 0.0)) * layers,
        "source": "aot",
    }


def main() -> None:
    """Answer every problem on standard input; a problem that does not compile gets an "error"."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    problems = json.load(sys.stdin)
    cpus = max((p["devices"] for p in problems if p["topology"].startswith("cpu")), default=1)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={cpus}"
    answers = []
    for problem in problems:
        try:
            answers.append(compile_step(problem))
        except Exception as error:  # the compiler's refusals have no common class
            if "libtpu" in str(error) or isinstance(error, ImportError):
                raise
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            answers.append({"topology": problem["topology"], "devices": problem["devices"], "error": line[:300]})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
