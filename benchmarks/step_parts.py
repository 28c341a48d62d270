"""The parts of one rank's decode step, each run alone, and the rates of the machine that limit them.

JAX reads the number of threads when it is imported: `benchmarks.step` imports this module after it has set it.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.steady_state import packed_inputs
from benchmarks.timing import median_ms
from moejax.checkpoint.checkpoint import load_params
from moejax.config.config_values import ConfigError
from moejax.config.kv_cache import KVCache, empty_cache
from moejax.config.mesh import make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, is_spec, param_specs, tensor_specs
from moejax.config.step_inputs import Bucket, StepInputs, unpack
from moejax.config.weight_formats import to_weight_format, weight_shape
from moejax.model.decoder import StepContext, attend, layer_at
from moejax.model.experts import apply_experts, apply_shared_expert
from moejax.model.layers import norm, row_dot, swiglu
from moejax.model.router import route
from moejax.model.sampling import sample
from moejax.model.step_shape import StepShape
from moejax.ops import cpu
from moejax.runtime import steps
from moejax.tools.resolve import ensure_model
from serving.engine.batch import StepBucket

CONTEXT, PAGE = 160, 32
"""Tokens of context of each row, and entries of a page of the cache."""
ROUNDS = 21


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step over all layers: milliseconds, and the bytes and flops that it needs at least."""

    ms: float
    bytes: float = 0.0
    flops: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """A decode step of one rank that holds the whole model: its model, inputs and cache. `x` are rows of hidden
    values `[rows, d_model]`."""

    cfg: ModelConfig
    params: Params
    shape: StepShape
    cache: KVCache
    packed: jax.Array
    inputs: StepInputs
    x: jax.Array

    @property
    def rows(self) -> int:
        """Rows that are decoded."""
        return self.shape.bucket.decode

    @property
    def experts(self) -> int:
        """Experts of a layer; 1 without routed layers."""
        return self.cfg.moe.experts if self.cfg.moe else 1


def prepare_model(model: str, data_type: str, rows: int) -> DecodeStep:
    """A decode step of `rows` rows of a model. Raises ConfigError when its dense layers are sharded."""
    cpu.load()
    folder = ensure_model(model)
    cfg = dataclasses.replace(ModelConfig.load(folder), weights=data_type)
    if cfg.shard_dense:
        raise ConfigError(f"the dense layers of {folder} are sharded; measure the model from which it was made.")
    specs = param_specs(cfg)
    params = jax.device_put(
        jax.tree.map(lambda s, v: to_weight_format(cfg, s, v), specs, load_params(folder), is_leaf=is_spec)
    )
    pages = CONTEXT // PAGE + 2
    bucket = Bucket(decode=rows, tiles=0, max_pages=pages)
    experts = cfg.moe.experts if cfg.moe else 1
    random = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(random.standard_normal(size, np.float32))  # noqa: E731
    packed = jnp.asarray(packed_inputs(StepBucket(rows, 0), pages, CONTEXT))
    inputs = unpack(packed, bucket)
    return DecodeStep(
        cfg=cfg,
        params=params,
        shape=StepShape(cfg=cfg, bucket=bucket, ranks=1, slots=experts, page_size=PAGE),
        cache=jax.tree.map(lambda a: draw(*a.shape), empty_cache(cfg, rows * pages * PAGE)),
        packed=packed,
        inputs=inputs.replace(temperature=(jnp.arange(rows) % 2).astype(jnp.float32)),  # as of the served streams
        x=draw(rows, cfg.d_model),
    )


def time_over_layers(step: DecodeStep, kinds: str, body: Callable[..., jax.Array]) -> float:
    """Median milliseconds of `body(x, layer, index)` over all layers of these kinds, 0 without one."""
    index = 0
    chosen: list[tuple[Any, int, int]] = []
    for (pattern, repeats), segment in zip(step.cfg.segments, step.params.segments, strict=True):
        for position, (kind, layer) in enumerate(zip(pattern, segment, strict=True)):
            if kind in kinds:
                chosen.append((layer, index + position, len(pattern)))
        index += repeats * len(pattern)

    def run(x: jax.Array, layers: list[Any]) -> jax.Array:
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
    return median_ms(lambda: jax.block_until_ready(program(step.x, layers)), ROUNDS) if chosen else 0.0


def time_layers(step: DecodeStep) -> dict[str, float]:
    """Median milliseconds of attention, routing, experts and dense layers, each over all layers."""
    cfg, experts = step.cfg, step.experts

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
        if layer.moe is None or cfg.moe is None:
            return x + swiglu(h, layer.ffn.gate_up, layer.ffn.down)
        return x + apply_shared_expert(h, layer.moe, cfg.moe)

    context = StepContext(cache=step.cache, inputs=step.inputs, shape=step.shape)
    shared = cfg.moe is not None and cfg.moe.d_shared
    routing_ms = time_over_layers(step, "moe", routing) if cfg.moe else 0.0
    return {
        "attention": time_over_layers(step, "dense moe", lambda x, layer, i: attend(x, layer, i, context, cfg)[0]),
        "routing": routing_ms,
        "experts": max(0.0, time_over_layers(step, "moe", expert) - routing_ms) if cfg.moe else 0.0,
        "dense": time_over_layers(step, "dense moe" if shared else "dense", dense),
    }


def time_ends(step: DecodeStep) -> dict[str, float]:
    """Median milliseconds of the step's program as a whole, and of what follows its layers: the head, sampling and
    the commit."""
    arguments = steps.StepArguments(
        params=step.params,
        cache=step.cache,
        expert_to_slot=jnp.tile(jnp.arange(step.experts, dtype=jnp.int32), (1, step.cfg.n_moe_layers, 1)),
        packed=step.packed,
    )
    mesh = make_mesh(jax.devices()[:1])
    out = steps.run_step(arguments, shape=step.shape, mesh=mesh)
    head = step.params.logits
    logits_of = jax.jit(lambda head, x: row_dot(x, head.weight))
    logits = logits_of(head, step.x)
    choose = jax.jit(sample)
    kept = [step.cache]

    def commit() -> None:
        kept[0] = jax.block_until_ready(steps.run_commit(kept[0], out.new_kv, step.packed, bucket=step.shape.bucket))

    whole = median_ms(lambda: jax.block_until_ready(steps.run_step(arguments, shape=step.shape, mesh=mesh)), ROUNDS)
    return {
        "whole": whole,
        "head": median_ms(lambda: jax.block_until_ready(logits_of(head, step.x)), ROUNDS),
        "sampling": median_ms(lambda: jax.block_until_ready(choose(logits, step.inputs)), ROUNDS),
        "commit": median_ms(commit, ROUNDS),  # the last one: it donates the cache
    }


def weights_of(cfg: ModelConfig, chosen: Callable[[str], bool]) -> tuple[float, float]:
    """Bytes as held, and numbers, of the parameters of the names that are chosen."""
    found = [spec for name, spec in tensor_specs(cfg).items() if chosen(name)]
    held = [leaf for spec in found for leaf in jax.tree.leaves(weight_shape(cfg, spec))]
    return float(sum(h.size * h.dtype.itemsize for h in held)), float(sum(s.size for s in found))


def parts(model: str, data_type: str, rows: int) -> dict[str, Part]:
    """The parts of one rank's decode step of `rows` rows on one rank."""
    step = prepare_model(model, data_type, rows)
    cfg, layers = step.cfg, time_layers(step)
    ends = time_ends(step)
    cached = rows * CONTEXT * cfg.n_layers * sum(cfg.cache_widths)
    touched = 1 - (1 - cfg.moe.experts_per_token / step.experts) ** rows if cfg.moe else 0.0
    share = cfg.moe.experts_per_token / step.experts if cfg.moe else 0.0
    attention = weights_of(cfg, lambda n: any(k in n for k in (".qkv", ".out", ".latent.")))
    experts = weights_of(cfg, lambda n: ".moe.experts." in n)
    dense = weights_of(cfg, lambda n: ".ffn." in n or ".moe.shared." in n)
    head = weights_of(cfg, lambda n: n == ("embed" if cfg.tied_head else "head"))
    router = weights_of(cfg, lambda n: n.endswith("moe.router"))
    return {
        "attention": Part(
            layers["attention"],
            attention[0] + 4 * cached,
            rows * 2 * attention[1] + 2 * 2 * cached * cfg.n_heads / cfg.n_kv_heads / 2,
        ),
        "routing": Part(layers["routing"], *_read_once(router, rows)),
        "experts": Part(layers["experts"], touched * experts[0], rows * share * 2 * experts[1]),
        "dense": Part(layers["dense"], *_read_once(dense, rows)),
        "between": Part(max(0.0, ends["whole"] - sum(layers.values()))),
        "head": Part(ends["head"], *_read_once(head, rows)),
        "sampling": Part(ends["sampling"], 4.0 * rows * cfg.vocab_size),
        "commit": Part(ends["commit"], 2 * 4.0 * rows * cfg.n_layers * sum(cfg.cache_widths)),
    }


def _read_once(weights: tuple[float, float], rows: int) -> tuple[float, float]:
    """Bytes and flops of multiplying every row by weights of so many bytes and numbers."""
    return weights[0], 2 * rows * weights[1]


def machine_rates() -> tuple[float, float]:
    """Bytes read and flops per millisecond, on all threads of this process."""
    threads = int(os.environ["NPROC"])
    blocks = [np.ones(32 << 20, np.float32) for _ in range(threads)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        read = median_ms(lambda: list(pool.map(np.add.reduce, blocks)), 7)
        a, b = np.ones((threads, 768, 768), np.float32), np.ones((768, 768), np.float32)
        product = median_ms(lambda: list(pool.map(lambda rows: rows @ b, a)), 15)
    return threads * blocks[0].nbytes / read, threads * 2 * 768**3 / product
