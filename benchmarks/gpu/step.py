"""A whole step of one rank: its programs compiled and stored in one process, loaded and run in another."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.models import layers_that_fit, memory, random_array, random_params, with_layers
from benchmarks.gpu.rows import Row, attention_work, moe_work, relative
from benchmarks.packed import packed
from benchmarks.timing import median_ms
from moejax.config.kv_cache import KVCache, cache_shapes
from moejax.config.mesh import global_array, make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import tensor_specs
from moejax.config.step_inputs import Bucket
from moejax.config.weight_formats import weight_shape
from moejax.model.decoder import StepOutputs
from moejax.ops import cpu
from moejax.runtime import steps
from moejax.runtime.executables import CompileCounter, ExecutableStore
from moejax.runtime.programs import (
    LocalPrograms,
    MeshPrograms,
    ModelShape,
    commit_lowerings,
    compile_missing,
    fill_lowerings,
    mesh_lowerings,
    sample_lowerings,
)
from planner.plan.step_layout import TILE
from serving.engine.batch import ScheduledRequest
from serving.engine.batch import StepBucket as Shape
from serving.protocol.sampling import ResolvedSampling

PAGE, ROUNDS = 32, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """A step: `decode` decode rows after `context` positions each, or `tiles` of one prompt from its beginning."""

    decode: int
    tiles: int
    context: int

    @property
    def name(self) -> str:
        return f"batch {self.decode} after {self.context}" if self.decode else f"{self.rows} rows of a prompt"

    @property
    def rows(self) -> int:
        return self.decode + TILE * self.tiles

    @property
    def pages(self) -> int:
        """Pages of its longest segment."""
        return -(-(self.context + 1 if self.decode else self.rows) // PAGE)

    def works(self, vocabulary: int) -> tuple[ScheduledRequest, ...]:
        """The packed inputs of its segments, with random tokens."""
        draw = np.random.default_rng(self.rows)
        segments = [(self.context, 1)] * self.decode + [(0, self.rows)] * (not self.decode)
        greedy = ResolvedSampling(max_tokens=1, seed=0, temperature=0.0)
        return tuple(
            ScheduledRequest(
                request_id=str(i),
                start=start,
                tokens=tuple(draw.integers(vocabulary, size=count).tolist()),
                pages=tuple(range(i * self.pages, (i + 1) * self.pages)),
                samples=True,
                sampling=greedy,
            )
            for i, (start, count) in enumerate(segments)
        )


def fitted(cfg: ModelConfig, cases: tuple[Case, ...], device: jax.Device) -> ModelShape:
    """The programs' shape: as many layers as fit beside a cache for the largest of these steps."""
    buckets = tuple(Bucket(decode=case.decode, tiles=case.tiles, max_pages=case.pages) for case in cases)
    pages = max(case.pages * max(case.decode, 1) for case in cases)
    cfg = with_layers(cfg, layers_that_fit(cfg, memory(device), pages * PAGE))
    return ModelShape(cfg=cfg, buckets=buckets, page_size=PAGE, pages=pages)


def compiled(shape: ModelShape, folder: Path, device: jax.Device) -> dict[str, Any]:
    """Compile and store everything that `run` needs; returns the number of programs and the seconds."""
    store, slots = ExecutableStore(folder), _slots(shape.cfg)
    began = time.perf_counter()
    lowerings = (mesh_lowerings(shape, [device], slots), sample_lowerings(shape, device))
    alone = (commit_lowerings(shape, device), fill_lowerings(shape, device, slots))
    count = sum(compile_missing(store, each, [device]) for each in (*lowerings, *alone))
    return {"layers": shape.cfg.n_layers, "programs": count, "seconds": time.perf_counter() - began}


class Rank:
    """A rank that is a mesh by itself: weights in slots, a cache, and its programs, loaded from a store."""

    def __init__(self, shape: ModelShape, folder: Path, device: jax.Device) -> None:
        self.shape, self.device = shape, device
        cfg, slots = shape.cfg, _slots(shape.cfg)
        self.params = random_params(cfg, device)
        self.cache = KVCache(*(random_array(size, jnp.float32, i, device) for i, size in enumerate(_sizes(shape))))
        self._routes = jax.device_put(_routes(cfg), device)
        self.compiles = CompileCounter()
        began = time.perf_counter()
        store = ExecutableStore(folder)
        self._mesh = MeshPrograms(shape, [device], slots, store)
        self._local = LocalPrograms(shape, device, slots, store)
        for index in range(len(shape.buckets)):
            self._mesh.step(index)
            self._local.after_step(index)
        self.load_s = time.perf_counter() - began
        self._spec = steps.partition(shape.step(shape.buckets[0], 1, slots))
        self._laid = jax.tree.map(self._over, self._spec.params, self.params)

    def _over(self, spec: jax.sharding.PartitionSpec, local: jax.Array) -> jax.Array:
        return global_array(self._mesh.mesh, spec, local)

    def step(self, index: int, inputs: jax.Array) -> tuple[StepOutputs, jax.Array]:
        """One step of the bucket of this index, as `serving.worker.steps` runs it: its outputs, and the tokens
        chosen."""
        sample, commit = self._local.after_step(index)
        arguments = steps.StepArguments(
            params=self._laid,
            cache=jax.tree.map(self._over, self._spec.cache, self.cache, is_leaf=_is_spec),
            expert_to_slot=self._over(self._spec.expert_to_slot, self._routes),
            packed=self._over(self._spec.packed, inputs),
        )
        out = self._mesh.step(index)(arguments)
        hidden, new = jax.tree.map(lambda a: a.addressable_data(0), (out.hidden, out.new_kv))
        tokens, _ = sample(self.params.logits, hidden, inputs)
        self.cache = commit(self.cache, new, inputs)
        return out, tokens


def run(rank: Rank, index: int, case: Case, times: int) -> Row:
    """A step of a case, `times` in a row and alone."""
    cfg, bucket = rank.shape.cfg, Shape(case.decode, case.tiles)
    works = case.works(cfg.vocab_size)
    inputs = jax.device_put(packed(bucket, works, PAGE, rank.shape.buckets[index].max_pages), rank.device)

    def several() -> None:
        for _ in range(times):
            _, tokens = rank.step(index, inputs)
        jax.block_until_ready((tokens, rank.cache))

    def alone() -> None:
        out, tokens = rank.step(index, inputs)
        np.asarray(tokens)
        jax.block_until_ready((out, rank.cache))

    ms = median_ms(several, ROUNDS) / times
    out, _ = rank.step(index, inputs)
    size, flops = step_work(cfg, case, np.asarray(out.expert_load))
    whole = f"{cfg.n_layers} layers" + ("" if np.isfinite(np.asarray(out.hidden)).all() else ", NOT FINITE")
    return Row(
        part="decode" if case.decode else "prefill",
        model=cfg.name,
        case=case.name,
        ms=ms,
        alone_ms=median_ms(alone, ROUNDS),
        bytes=size,
        flops=flops,
        note=whole,
    )


def step_work(cfg: ModelConfig, case: Case, loads: np.ndarray) -> tuple[float, float]:
    """Bytes and flops of a step, its sampling and its commit, given how many rows were routed to each expert
    `[layers, E]`. In the last layer, rows that are neither sampled nor scored need only keys and values."""
    assert cfg.moe is not None
    rows, sampled = case.rows, max(case.decode, 1)
    used = [rows] * (cfg.n_layers - 1) + [sampled]
    held = {name: jax.tree.leaves(weight_shape(cfg, spec)) for name, spec in tensor_specs(cfg).items()}
    size, flops = 0.0, 0.0
    for name, leaves in held.items():
        bytes_, numbers = (
            sum(f(leaf) for leaf in leaves) for f in (lambda a: a.size * a.dtype.itemsize, lambda a: a.size)
        )
        if name == "embed" and not cfg.tied_head:
            size += rows * bytes_ / cfg.vocab_size
        elif name in ("embed", "head"):
            size, flops = size + bytes_, flops + 2.0 * sampled * numbers
        elif ".moe.experts." not in name:
            size += bytes_
            matrix = leaves[0].ndim >= 2 and ("qkv" in name or name.endswith((".out", "router")))
            each = numbers / cfg.n_layers
            flops += 2.0 * each * (rows * cfg.n_layers if "qkv" in name else sum(used)) if matrix else 0.0
    for layer, counts in enumerate(loads):
        more = moe_work(counts.tolist(), used[layer], cfg.d_model, cfg.moe.d_expert)
        size, flops = size + more[0], flops + more[1]
    contexts, new = ([case.context] * case.decode, 1) if case.decode else ([0], rows)
    bytes_, of_one = attention_work(contexts, new, cfg.n_heads, cfg.n_kv_heads, cfg.d_head)
    last = attention_work(contexts if case.decode else [rows - 1], 1, cfg.n_heads, cfg.n_kv_heads, cfg.d_head)[1]
    committed = 2 * 4.0 * rows * sum(cfg.cache_widths)
    return size + cfg.n_layers * (bytes_ + committed), flops + (cfg.n_layers - 1) * of_one + last


def checked(cfg: ModelConfig, case: Case, device: jax.Device) -> float:
    """The difference of the hidden rows of a step of the model's first two layers from those of the references on the
    CPU: the median over rows, since rounding may choose another expert for one of them."""
    shape = fitted(with_layers(cfg, 2), (case,), device)
    params = random_params(shape.cfg, device)
    inputs = packed(Shape(case.decode, case.tiles), case.works(cfg.vocab_size), PAGE, case.pages)
    slots = _slots(cfg)
    arguments = steps.StepArguments(
        params=params,
        cache=KVCache(*(random_array(size, jnp.float32, i, device) for i, size in enumerate(_sizes(shape)))),
        expert_to_slot=_routes(shape.cfg),
        packed=inputs,
    )
    static = shape.step(shape.buckets[0], 1, slots)

    def hidden(there: jax.Device) -> np.ndarray:
        mesh = make_mesh([there])
        return np.asarray(steps.run_step(jax.device_put(arguments, there), shape=static, mesh=mesh).hidden)

    ours = hidden(device)
    with cpu.disabled():
        theirs = hidden(jax.devices("cpu")[0])
    read = np.flatnonzero(np.abs(theirs).max(-1))
    return float(np.median([relative(ours[row], theirs[row]) for row in read]))


def _slots(cfg: ModelConfig) -> int:
    assert cfg.moe is not None
    return cfg.moe.experts


def _routes(cfg: ModelConfig) -> np.ndarray:
    """Every expert in the slot of its number."""
    return np.tile(np.arange(_slots(cfg), dtype=np.int32), (1, cfg.n_moe_layers, 1))


def _sizes(shape: ModelShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = cache_shapes(shape.cfg, shape.entries)
    return sizes.k.shape, sizes.v.shape


def _is_spec(x: Any) -> bool:
    return isinstance(x, jax.sharding.PartitionSpec)
