"""Where the time of a decode step goes, and what the machine would allow.

    python -m benchmarks.step [--model bench-mixtral] [--ranks 1] [--data-type float32] [--concurrency 32] [--json FILE]

First a real server decodes so many streams: the time of a step, from scheduling it to having delivered its tokens, is
that of the slowest rank's programs, of the rank around them, and of the front. Then, with the server gone, the parts
of one rank's programs run alone in this process, with as many rows and threads as that rank had. Each stands beside its
bytes and flops, and the time they take at the rates measured in the same run: reading memory, and multiplying matrices
(float32, by NumPy). With several ranks, `exchange` is what is left of the programs' time: the exchange itself and
waiting for the others, who share the cores.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads are this module's own

from benchmarks.launch import launched
from benchmarks.machine import machine
from benchmarks.streams import make_asks, play
from benchmarks.timing import median_ms
from serving.client import AsyncClient
from serving.config import DATA_TYPES, Settings

CONTEXT, PAGE = 160, 32
WATCHED_S = 6.0
ROUNDS = 21


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step over all layers: milliseconds, and the bytes and flops it cannot do without."""

    ms: float
    bytes: float = 0.0
    flops: float = 0.0


async def serve(address: str, concurrency: int) -> dict[str, float]:
    """Per step of a server that decodes so many streams: milliseconds in all, in the slowest rank's programs, in
    receiving and answering on that rank, and in the front."""
    async with AsyncClient(address) as client:
        asks = await make_asks(client, concurrency, 32, CONTEXT * 4)
        streams = [asyncio.create_task(play(client, ask)) for ask in asks]
        while (status := await client.status()).running < concurrency or status.waiting:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # the last prompts are through
        before = await client.status()
        await asyncio.sleep(WATCHED_S)
        after = await client.status()
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    steps = after.steps - before.steps
    whole, programs, ranks = (
        (getattr(after, name) - getattr(before, name)) / steps for name in ("step_ms", "program_ms", "rank_ms")
    )
    return {
        "steps": steps,
        "step_ms": whole,
        "programs_ms": programs,
        "rank_overhead_ms": ranks - programs,
        "front_overhead_ms": whole - ranks,
        "tokens_per_s": (after.tokens - before.tokens) / WATCHED_S,
    }


def parts(model: str, data_type: str, rows: int) -> tuple[dict[str, Part], float, float]:
    """The parts of one rank's decode step of `rows` rows on one rank, and bytes and flops per millisecond that the
    machine reached."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.steady_state import packed_inputs
    from moejax import kernels, steps
    from moejax.assets import ensure_model
    from moejax.cache import empty_cache
    from moejax.checkpoint import load_params
    from moejax.config import ConfigError, ModelConfig
    from moejax.experts import always_on, apply_experts
    from moejax.inputs import Bucket, unpack
    from moejax.layers import norm, row_dot, swiglu
    from moejax.mesh import make_mesh
    from moejax.model import StepShape, attend, layer_at
    from moejax.params import is_spec, param_specs
    from moejax.precision import held_shape, hold
    from moejax.router import route
    from moejax.sampling import sample
    from serving.batch import Bucket as Shape

    kernels.load()
    folder = ensure_model(model)
    cfg = dataclasses.replace(ModelConfig.load(folder), weights=data_type)
    if cfg.divide_dense:
        raise ConfigError(f"the dense layers of {folder} are divided; measure the model they are of.")
    specs = param_specs(cfg)
    params = jax.device_put(jax.tree.map(lambda s, v: hold(cfg, s, v), specs, load_params(folder), is_leaf=is_spec))
    pages = CONTEXT // PAGE + 2
    bucket = Bucket(decode=rows, tiles=0, max_pages=pages)
    experts = cfg.moe.experts if cfg.moe else 1
    shape = StepShape(cfg=cfg, bucket=bucket, ranks=1, slots=experts, page_size=PAGE)
    random = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(random.standard_normal(size, np.float32))  # noqa: E731
    cache = jax.tree.map(lambda a: draw(*a.shape), empty_cache(cfg, rows * pages * PAGE))
    packed = jnp.asarray(packed_inputs(Shape(rows, 0), pages, CONTEXT))
    inputs = unpack(packed, bucket)
    inputs = inputs.replace(temperature=(jnp.arange(rows) % 2).astype(jnp.float32))  # as of the streams above
    arguments = steps.StepArguments(
        params=params,
        cache=cache,
        expert_to_slot=jnp.tile(jnp.arange(experts, dtype=jnp.int32), (1, cfg.n_moe_layers, 1)),
        packed=packed,
    )
    x = draw(rows, cfg.d_model)

    def over_layers(kinds: str, body: Callable[..., jax.Array]) -> float:
        """Median milliseconds of `body(x, layer, index)` over all layers of these kinds."""
        index = 0
        chosen: list[tuple[Any, int, int]] = []
        for (pattern, repeats), segment in zip(cfg.segments, params.segments, strict=True):
            for position, (kind, layer) in enumerate(zip(pattern, segment, strict=True)):
                if kind in kinds:
                    chosen.append((layer, index + position, len(pattern)))
            index += repeats * len(pattern)

        def run(x, layers):
            for stack, (_, first, stride) in zip(layers, chosen, strict=True):
                repeats = len(stack.attention_norm)
                x, _ = jax.lax.scan(
                    lambda x, r, s=stack, f=first, n=stride: (body(x, layer_at(s, r), f + r * n), None),
                    x,
                    jnp.arange(repeats),
                )
            return x

        program = jax.jit(run)
        layers = [layer for layer, _, _ in chosen]
        return median_ms(lambda: jax.block_until_ready(program(x, layers)), ROUNDS) if chosen else 0.0

    def routed(x, layer):
        h = norm(x, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
        return h, route(h, layer.moe.router, layer.moe.bias, jnp.ones(experts, bool), cfg.moe)

    def routing(x, layer, _):
        _, (chosen, gates) = routed(x, layer)
        return x + 0 * (chosen.sum() + gates.sum())

    def expert(x, layer, _):
        h, (chosen, gates) = routed(x, layer)
        return x + (apply_experts(h, chosen, layer.moe.experts, experts, cfg.moe) * gates[..., None]).sum(1)

    def dense(x, layer, _):
        h = norm(x, layer.ffn_norm, layer.ffn_norm_bias, cfg.norm_eps)
        return x + (swiglu(h, layer.ffn.gate_up, layer.ffn.down) if layer.moe is None else always_on(h, layer.moe))

    out = steps.run_step(arguments, shape=shape, mesh=make_mesh(jax.devices()[:1]))
    mesh = make_mesh(jax.devices()[:1])
    whole = median_ms(lambda: jax.block_until_ready(steps.run_step(arguments, shape=shape, mesh=mesh)), ROUNDS)
    head = params.logits
    logits_of = jax.jit(lambda head, x: row_dot(x, head.weight))
    logits = logits_of(head, x)
    choose = jax.jit(sample)
    kept = [cache]

    def commit() -> None:
        kept[0] = jax.block_until_ready(steps.run_commit(kept[0], out.new_kv, packed, bucket=bucket))

    def size(of: Callable[[str], bool]) -> tuple[float, float]:
        """Bytes as held, and numbers, of the parameters of these names."""
        from moejax.manifest import tensor_specs

        found = [spec for name, spec in tensor_specs(cfg).items() if of(name)]
        held = [leaf for spec in found for leaf in jax.tree.leaves(held_shape(cfg, spec))]
        return float(sum(h.size * h.dtype.itemsize for h in held)), float(sum(s.size for s in found))

    routing_ms = over_layers("moe", routing) if cfg.moe else 0.0
    attention_weights = size(lambda n: any(k in n for k in (".qkv", ".out", ".latent.")))
    cached = rows * CONTEXT * cfg.n_layers * sum(cfg.cache_widths)
    expert_weights = size(lambda n: ".moe.experts." in n)
    touched = 1 - (1 - cfg.moe.experts_per_token / experts) ** rows if cfg.moe else 0.0
    share = cfg.moe.experts_per_token / experts if cfg.moe else 0.0
    dense_weights = size(lambda n: ".ffn." in n or ".moe.shared." in n)
    head_weights = size(lambda n: n == ("embed" if cfg.tied_head else "head"))
    attention_ms = over_layers("dense moe", lambda x, layer, i: attend(x, layer, cache, i, inputs, shape)[0])
    expert_ms = max(0.0, over_layers("moe", expert) - routing_ms) if cfg.moe else 0.0
    shared = cfg.moe is not None and cfg.moe.d_shared
    dense_ms = over_layers("dense moe" if shared else "dense", dense)
    found = {
        "attention": Part(
            attention_ms,
            attention_weights[0] + 4 * cached,
            rows * 2 * attention_weights[1] + 2 * 2 * cached * cfg.n_heads / cfg.n_kv_heads / 2,
        ),
        "routing": Part(routing_ms, *_twice(size(lambda n: n.endswith("moe.router")), rows)),
        "experts": Part(expert_ms, touched * expert_weights[0], rows * share * 2 * expert_weights[1]),
        "dense": Part(dense_ms, *_twice(dense_weights, rows)),
        "between": Part(max(0.0, whole - attention_ms - routing_ms - expert_ms - dense_ms)),
        "head": Part(median_ms(lambda: jax.block_until_ready(logits_of(head, x)), ROUNDS), *_twice(head_weights, rows)),
        "sampling": Part(
            median_ms(lambda: jax.block_until_ready(choose(logits, inputs)), ROUNDS), 4.0 * rows * cfg.vocab_size
        ),
        "commit": Part(median_ms(commit, ROUNDS), 2 * 4.0 * rows * cfg.n_layers * sum(cfg.cache_widths)),
    }
    return found, *_rates()


def _twice(weights: tuple[float, float], rows: int) -> tuple[float, float]:
    return weights[0], 2 * rows * weights[1]


def _rates() -> tuple[float, float]:
    """Bytes read and flops per millisecond, on all threads of this process."""
    import concurrent.futures

    import numpy as np

    threads = int(os.environ["NPROC"])
    blocks = [np.ones(32 << 20, np.float32) for _ in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        read = median_ms(lambda: list(pool.map(np.add.reduce, blocks)), 7)
        a, b = np.ones((threads, 768, 768), np.float32), np.ones((768, 768), np.float32)
        product = median_ms(lambda: list(pool.map(lambda rows: rows @ b, a)), 15)
    return threads * blocks[0].nbytes / read, threads * 2 * 768**3 / product


def lines(served: dict[str, float], found: dict[str, Part], ranks: int, rates: tuple[float, float]) -> Iterator[dict]:
    """One row per part of a step: its time, its share of the step, and its limit."""
    total = served["step_ms"]
    alone = sum(part.ms for part in found.values())
    timed = {name: dataclasses.asdict(part) for name, part in found.items()}
    if ranks > 1:
        timed["exchange"] = {"ms": max(0.0, served["programs_ms"] - alone)}
    for name in ("rank_overhead", "front_overhead"):
        timed[name] = {"ms": served[f"{name}_ms"]}
    for name, row in timed.items():
        bytes_, flops = row.get("bytes", 0.0), row.get("flops", 0.0)
        limit = max(bytes_ / rates[0], flops / rates[1])
        yield {
            "part": name,
            "ms": round(row["ms"], 3),
            "share": round(row["ms"] / total, 4),
            "mb": round(bytes_ / 1e6, 2),
            "gflop": round(flops / 1e9, 4),
            "limit_ms": round(limit, 3),
        }


def main() -> int:
    """Measure, print, and write JSON."""
    options, where = parse(), machine()
    chosen = ("--data-type", options.data_type, "--max-queue", "4096")
    with launched(options.model, options.ranks, options=chosen) as server:
        served = asyncio.run(serve(server.address, options.concurrency))
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    os.environ["NPROC"] = str(threads)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    wanted = -(-options.concurrency // options.ranks)
    rows = min(decode for decode, tiles in Settings().buckets if not tiles and decode >= wanted)
    found, *rates = parts(options.model, options.data_type, rows)
    table = list(lines(served, found, options.ranks, (rates[0], rates[1])))
    print(f"{options.concurrency} streams, {served['tokens_per_s']:.0f} tokens/s, step {served['step_ms']:.2f} ms")
    print(f"reads {rates[0] / 1e6:.1f} GB/s, multiplies {rates[1] / 1e6:.0f} GFLOP/s on {threads} threads")
    for row in table:
        print(
            f"{row['part']:15} {row['ms']:8.2f} ms {row['share']:7.1%}   limit {row['limit_ms']:7.2f} ms "
            f"({row['mb']:.1f} MB, {row['gflop']:.3f} GFLOP)"
        )
    if options.json is not None:
        result = {
            "machine": where,
            "model": options.model,
            "ranks": options.ranks,
            "data_type": options.data_type,
            "concurrency": options.concurrency,
            "rows_per_rank": rows,
            "gb_per_s": round(rates[0] / 1e6, 2),
            "gflop_per_s": round(rates[1] / 1e6, 1),
            "served": {name: round(value, 3) for name, value in served.items()},
            "parts": table,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=about,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="bench-mixtral", help="a model's name or folder")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--data-type", choices=DATA_TYPES, default="float32")
    parser.add_argument("--concurrency", type=int, default=32, help="streams that decode at once")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
