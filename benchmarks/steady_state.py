"""Measures the cost of recoverability while nothing fails.

    python -m benchmarks.steady_state [--model smollm2-moe|tiny] [--rounds N] [--json FILE]

A step that may fail reads the cache, and a second program commits its results. This is compared, on one rank in this
process and alternately, with one program that donates the cache and writes into it, which a failure half-way would
leave inconsistent. Head and sampling are in neither. Epoch checks are an integer comparison on each side.
"""

import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command
from benchmarks.machine import machine
from benchmarks.packed import packed
from moejax.checkpoint.host_store import HostStore
from moejax.config.kv_cache import KVCache, commit, empty_cache
from moejax.config.mesh import make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import init_params
from moejax.config.step_inputs import Bucket, unpack
from moejax.model.step_shape import StepShape
from moejax.ops import cpu
from moejax.runtime import steps
from moejax.tools.resolve import ensure_model
from serving.engine.batch import ScheduledRequest
from serving.engine.batch import StepBucket as Shape
from serving.protocol.sampling import ResolvedSampling

PAGE, CONTEXT = 32, 256
BUCKETS = (Shape(2, 0), Shape(8, 0), Shape(8, 2))


def step_ms(cfg: ModelConfig, bucket: Shape, rounds: int) -> dict[str, float]:
    """Median milliseconds of both variants for a full bucket whose contexts are CONTEXT tokens long."""
    pages = -(-CONTEXT // PAGE) + 2
    static = Bucket(decode=bucket.decode, tiles=bucket.tiles, max_pages=pages)
    segments = bucket.decode + bucket.tiles
    experts = cfg.moe.experts if cfg.moe else 1
    shape = StepShape(cfg=cfg, bucket=static, ranks=1, slots=experts, page_size=PAGE)
    mesh = make_mesh(jax.devices()[:1])
    arguments = steps.StepArguments(
        params=init_params(cfg, jax.random.key(0)),
        cache=None,
        expert_to_slot=jnp.tile(jnp.arange(experts, dtype=jnp.int32), (1, cfg.n_moe_layers, 1)),
        packed=jnp.asarray(packed_inputs(bucket, pages)),
    )
    caches = [empty_cache(cfg, segments * pages * PAGE) for _ in range(2)]

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def in_place(arguments: steps.StepArguments, cache: KVCache) -> tuple[Any, KVCache]:
        out = steps.run_step(arguments.replace(cache=cache), shape=shape, mesh=mesh)
        return out.hidden, commit(cache, out.new_kv, unpack(arguments.packed, static).write)

    def recoverable() -> None:
        out = steps.run_step(arguments.replace(cache=caches[0]), shape=shape, mesh=mesh)
        jax.block_until_ready(out.hidden)
        caches[0] = jax.block_until_ready(steps.run_commit(caches[0], out.new_kv, arguments.packed, bucket=static))

    def destructive() -> None:
        _, caches[1] = jax.block_until_ready(in_place(arguments, caches[1]))

    took: dict[str, list[float]] = {"recoverable": [], "in_place": []}
    for turn in range(rounds + 1):
        for name, run in (("recoverable", recoverable), ("in_place", destructive)):
            began = time.perf_counter()
            run()
            if turn:
                took[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(times) for name, times in took.items()}


def packed_inputs(bucket: Shape, pages: int, context: int = CONTEXT) -> np.ndarray:
    """A full step after `context` tokens of each segment, which has `pages` pages of its own."""
    greedy = ResolvedSampling(max_tokens=1, seed=0, temperature=0.0)

    def work(segment: int, rows: int) -> ScheduledRequest:
        own = tuple(range(segment * pages, (segment + 1) * pages))
        return ScheduledRequest(
            request_id=str(segment), start=context, tokens=(5,) * rows, pages=own, samples=True, sampling=greedy
        )

    works = [work(i, 1) for i in range(bucket.decode)]
    works += [work(bucket.decode + i, 32) for i in range(bucket.tiles)]
    return packed(bucket, tuple(works), PAGE, pages)


def main() -> int:
    """Measure, print, and write JSON."""
    parser = command.parser("benchmarks.steady_state", __doc__)
    parser.add_argument("--model", default="smollm2-moe")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cpu.load()
    cfg = HostStore.create(ensure_model(options.model)).cfg
    runs = []
    for bucket in BUCKETS:
        ms = step_ms(cfg, bucket, options.rounds)
        cost = ms["recoverable"] / ms["in_place"] - 1
        runs.append({"decode": bucket.decode, "tiles": bucket.tiles, "cost": round(cost, 4)} | ms)
        print(
            f"{bucket.decode} decode rows, {bucket.tiles} prefill tiles: recoverable {ms['recoverable']:.2f} ms, "
            f"in place {ms['in_place']:.2f} ms, cost {cost:+.1%}",
            flush=True,
        )
    command.write_json(options.json, {"machine": machine(), "model": options.model, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
