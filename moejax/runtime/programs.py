"""The compiled programs a rank needs for one mesh, and those it needs for itself alone."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from moejax.config.kv_cache import KVCache, cache_shapes
from moejax.config.mesh import JaxDevice, global_array, global_shape, make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import Head, expert_positions, is_spec, param_specs
from moejax.config.step_inputs import Bucket, packed_size
from moejax.config.weight_formats import weight_shape
from moejax.model.decoder import StepOutputs
from moejax.model.exchange import Exchange
from moejax.model.logits import LogitsAdjustments, mask_words
from moejax.model.mtp import DraftOutputs
from moejax.model.stages import RolesShape
from moejax.model.step_shape import StepShape
from moejax.runtime import steps
from moejax.runtime.executables import ExecutableStore, executable_name
from planner.inputs.layer_states import STATE_COPIES
from planner.plan.step_layout import TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The shape that all programs of a server share: the model, its buckets, and the size of a rank's cache."""

    cfg: ModelConfig
    buckets: tuple[Bucket, ...]
    page_size: int
    pages: int
    shared_memory: bool = False
    """The ranks are processes of one machine and exchange through memory that they share."""
    drafts: int = 1
    """Tokens that a layer of multi-token prediction drafts for each request in a step, if the model has one."""
    snapshots: int = 0
    """States that a rank keeps for later requests, if the model has layers with states."""

    @property
    def entries(self) -> int:
        """Cache entries of a rank; in a tensor group it has entries for every member, of its own heads."""
        return self.pages * self.page_size * self.cfg.tensor

    @property
    def states(self) -> int:
        """States in a rank's cache: STATE_COPIES for each of the most requests that it runs, then the snapshots; 0 for
        a model without layers that have them."""
        if not self.cfg.state_layers:
            return 0
        return STATE_COPIES * max(bucket.decode for bucket in self.buckets) + self.snapshots

    def step(self, bucket: Bucket, ranks: int, slots: int) -> StepShape:
        """The static shape of one step program."""
        return StepShape(
            cfg=self.cfg,
            bucket=bucket,
            ranks=ranks,
            slots=slots,
            page_size=self.page_size,
            shared_memory=self.shared_memory,
        )

    def roles(self, bucket: Bucket, ranks: int, slots: int, attention: int) -> RolesShape:
        """The static shape of a step of `attention` ranks and of expert ranks."""
        return RolesShape(step=self.step(bucket, ranks, slots), attention=attention)

    def outbox_bytes(self, ranks: int, slots: int, attention: int = 0) -> int:
        """The most bytes that a rank of such a mesh sends at once. The mesh has `attention` ranks and expert ranks, or
        collocated ranks if that is 0."""
        if attention:
            return max(self.roles(bucket, ranks, slots, attention).outbox_bytes for bucket in self.buckets)
        exchanges = ((self.step(bucket, ranks, slots).exchange, bucket.rows) for bucket in self.buckets)
        packed = 4 * ranks * max(map(packed_size, self.buckets)) if self.cfg.tensor > 1 else 0
        width = max(self.cfg.d_model, self.cfg.moe.d_latent if self.cfg.moe else 0)
        return max(packed, *(exchange.outbox_bytes(rows, width) for exchange, rows in exchanges))


COMPILE_S = 300.0
"""Seconds that another process may take for a program before this one compiles it, too."""
Lowering = tuple[str, Callable[[], jax.stages.Lowered]]


class MeshPrograms:
    """The step programs of every bucket over one mesh, each loaded at its first use, with its drafting programs if the
    model has a layer for it, and the exchange that connects it."""

    def __init__(self, shape: ModelShape, devices: Sequence[JaxDevice], slots: int, store: ExecutableStore) -> None:
        self.mesh = make_mesh(devices)
        self.slots = slots
        self._devices = tuple(devices)
        self._store = store
        connect, *self._lowerings = mesh_lowerings(shape, devices, slots)
        self._connect = load_program(store, connect, self._devices)
        self._drafts: dict[int, Callable[..., DraftOutputs]] = {}
        self._steps: dict[int, Callable[..., StepOutputs]] = {}
        self._lock = threading.Lock()

    def step(self, bucket: int) -> Callable[..., StepOutputs]:
        """The step program of the bucket of this index. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                self._steps[bucket] = load_program(self._store, self._lowerings[bucket], self._devices)
            return self._steps[bucket]

    def draft(self, bucket: int) -> Callable[..., DraftOutputs]:
        """The program of the bucket of this index that drafts, from a step's arguments, its outputs and the tokens that
        this rank sampled `[Z]`. From any thread."""
        with self._lock:
            if bucket not in self._drafts:
                lowering = self._lowerings[len(self._lowerings) // 2 + bucket]
                self._drafts[bucket] = load_program(self._store, lowering, self._devices)
            program = self._drafts[bucket]

        def run(arguments: steps.StepArguments, outputs: StepOutputs, tokens: jax.Array) -> DraftOutputs:
            return program(arguments, outputs, global_array(self.mesh, steps.SHARDED, tokens))

        return run

    def connect(self, me: JaxDevice) -> None:
        """Run the smallest exchange; every rank of the mesh must do so."""
        row = jax.device_put(np.zeros((1, self.mesh.size), np.float32), me)
        jax.block_until_ready(self._connect(global_array(self.mesh, jax.P(steps.RANKS), row)))


def mesh_lowerings(shape: ModelShape, devices: Sequence[JaxDevice], slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a mesh: the connecting exchange, then a step per bucket, then, with a layer
    of multi-token prediction, drafts per bucket."""
    mesh, n = make_mesh(devices), len(devices)
    yield connect_lowering(shape, devices)
    for bucket in shape.buckets:
        step = shape.step(bucket, n, slots)
        local, spec = steps.local_shapes(step, shape.entries, shape.states), steps.partition(step)
        arguments = jax.tree.map(lambda a, s: _global_shape(mesh, s, a), local, spec)
        yield (
            executable_name("step", step, shape.entries, shape.states),
            lambda a=arguments, s=step: steps.run_step.lower(a, shape=s, mesh=mesh),
        )
    if shape.cfg.mtp:
        yield from draft_lowerings(shape, devices, slots)


def draft_lowerings(shape: ModelShape, devices: Sequence[JaxDevice], slots: int) -> Iterator[Lowering]:
    """Name and lowering of the drafts after a step, per bucket."""
    mesh, n = make_mesh(devices), len(devices)
    for bucket in shape.buckets:
        step = shape.step(bucket, n, slots)
        spec, on_mesh = steps.partition(step), lambda a, s: _global_shape(mesh, s, a)
        arguments = jax.tree.map(on_mesh, steps.local_shapes(step, shape.entries), spec)
        outputs = steps.draft_shapes(step)
        specs = dataclasses.replace(outputs, hidden=steps.SHARDED, new_kv=spec.cache, expert_load=steps.SHARDED)
        outputs = jax.tree.map(on_mesh, outputs, specs)
        tokens = on_mesh(jax.ShapeDtypeStruct((bucket.segments,), jnp.int32), steps.SHARDED)
        yield (
            executable_name("draft", step, shape.entries, shape.drafts),
            lambda a=arguments, o=outputs, t=tokens, s=step: steps.run_draft.lower(
                a, o, t, shape=s, mesh=mesh, drafts=shape.drafts
            ),
        )


def connect_lowering(shape: ModelShape, devices: Sequence[JaxDevice]) -> Lowering:
    """Name and lowering of the smallest exchange of a mesh, collocated or not."""
    mesh, n = make_mesh(devices), len(devices)
    row = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, jax.P(steps.RANKS)))
    exchange = Exchange(ranks=n, slots=1, experts_per_token=1, shared_memory=shape.shared_memory)
    return (
        executable_name("connect", n, shape.shared_memory),
        lambda: steps.run_connect.lower(row, mesh=mesh, exchange=exchange),
    )


class LocalPrograms:
    """The programs that a rank runs on its own device: sample and commit per bucket, each loaded at its first use, and
    fill per position of experts."""

    def __init__(self, shape: ModelShape, device: JaxDevice, slots: int, store: ExecutableStore) -> None:
        self._device = device
        self._store = store
        self._samples = list(sample_lowerings(shape, device))
        self._commits = list(commit_lowerings(shape, device))
        self._adjusted_samples = dict(adjusted_sample_lowerings(shape, device))
        self._scores = dict(score_lowerings(shape, device))
        self._after_step: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._loaded_samples: dict[int, Callable[..., Any]] = {}
        self._loaded_scores: dict[int, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        fills = (load_program(store, each, [device]) for each in fill_lowerings(shape, device, slots))
        self.fills = dict(zip(expert_positions(shape.cfg), fills, strict=True))

    def after_step(self, bucket: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The sample and commit programs of the bucket of this index. From any thread."""
        with self._lock:
            if bucket not in self._after_step:
                sample, commit = (
                    load_program(self._store, each[bucket], [self._device]) for each in (self._samples, self._commits)
                )
                self._after_step[bucket] = sample, commit
            return self._after_step[bucket]

    def sample_adjusted(self, bucket: int) -> Callable[..., Any]:
        """The sample program of penalties, biases, masks and alternatives of the bucket of this index."""
        return self._load(self._loaded_samples, self._adjusted_samples, bucket)

    def score(self, bucket: int) -> Callable[..., Any]:
        """The scoring program of a tile of the bucket of this index, which must have tiles."""
        return self._load(self._loaded_scores, self._scores, bucket)

    def _load(
        self, loaded: dict[int, Callable[..., Any]], lowerings: Mapping[int, Lowering], bucket: int
    ) -> Callable[..., Any]:
        """The program of a bucket, loaded at its first use."""
        with self._lock:
            if bucket not in loaded:
                loaded[bucket] = load_program(self._store, lowerings[bucket], [self._device])
            return loaded[bucket]


def local_lowerings(shape: ModelShape, device: JaxDevice, slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a rank alone. These depend on the shapes of their arguments alone, so that
    models and formats which have those in common share them."""
    yield from sample_lowerings(shape, device)
    yield from (lowering for _, lowering in adjusted_sample_lowerings(shape, device))
    yield from (lowering for _, lowering in score_lowerings(shape, device))
    yield from commit_lowerings(shape, device)
    yield from fill_lowerings(shape, device, slots)


def _hidden_and_packed(
    device: JaxDevice, cfg: ModelConfig, bucket: Bucket
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The shapes of what a step leaves on a device: the last hidden rows, and its packed inputs."""
    hidden = shape_on_device(device, (bucket.rows, cfg.d_model))
    return hidden, shape_on_device(device, (packed_size(bucket),), jnp.int32)


def sample_lowerings(shape: ModelShape, device: JaxDevice) -> Iterator[Lowering]:
    """Head and sampling, per bucket."""
    cfg = shape.cfg
    head = _head(device, cfg)
    for bucket in shape.buckets:
        hidden, packed = _hidden_and_packed(device, cfg, bucket)
        yield (
            executable_name("sample", _shapes(head, hidden), bucket),
            lambda b=bucket, h=hidden, p=packed: steps.run_sample.lower(head, h, p, bucket=b),
        )


def adjusted_sample_lowerings(shape: ModelShape, device: JaxDevice) -> Iterator[tuple[int, Lowering]]:
    """Head and sampling with logits adjustments, by index of bucket."""
    cfg = shape.cfg
    head = _head(device, cfg)
    for index, bucket in enumerate(shape.buckets):
        hidden, packed = _hidden_and_packed(device, cfg, bucket)
        mask = shape_on_device(device, (bucket.segments, mask_words(cfg.vocab_size)), jnp.uint32)
        adjustments = LogitsAdjustments(
            add=shape_on_device(device, (bucket.segments, cfg.vocab_size)),
            seen=mask,
            allowed=mask,
            repetition=shape_on_device(device, (bucket.segments,)),
        )
        yield (
            index,
            (
                executable_name("sample-adjusted", _shapes(head, hidden), bucket),
                lambda b=bucket, h=hidden, p=packed, s=adjustments: steps.run_sample_adjusted.lower(
                    head, h, p, s, bucket=b
                ),
            ),
        )


def score_lowerings(shape: ModelShape, device: JaxDevice) -> Iterator[tuple[int, Lowering]]:
    """Head and log-probabilities of given tokens for one tile, by index of the buckets that have tiles."""
    cfg = shape.cfg
    head, row = _head(device, cfg), shape_on_device(device, (), jnp.int32)
    targets = shape_on_device(device, (TILE,), jnp.int32)
    for index, bucket in enumerate(shape.buckets):
        if bucket.tiles:
            hidden = shape_on_device(device, (bucket.rows, cfg.d_model))
            yield (
                index,
                (
                    executable_name("score", _shapes(head, hidden)),
                    lambda h=hidden: steps.run_score.lower(head, h, row, targets),
                ),
            )


def commit_lowerings(shape: ModelShape, device: JaxDevice) -> Iterator[Lowering]:
    """The write of a step's keys and values, per bucket."""
    cfg = shape.cfg
    cache = cache_on_device(device, cfg, shape.entries, shape.states)
    for bucket in shape.buckets:
        new = cache_on_device(device, cfg, bucket.rows * cfg.tensor, bucket.segments)
        packed = shape_on_device(device, (packed_size(bucket) * cfg.tensor,), jnp.int32)
        yield (
            executable_name("commit", _shapes(cache, new, packed), bucket),
            lambda b=bucket, n=new, p=packed: steps.run_commit.lower(cache, n, p, bucket=b),
        )


def fill_lowerings(shape: ModelShape, device: JaxDevice, slots: int) -> Iterator[Lowering]:
    """One expert's weights into a slot, per expert position."""
    cfg = shape.cfg
    local = steps.local_shapes(shape.step(shape.buckets[0], 1, slots), shape.entries).params
    index = shape_on_device(device, (), jnp.int32)
    for i, j in expert_positions(cfg):
        experts = jax.tree.map(lambda s: shape_on_device(device, s.shape, s.dtype), local.segments[i][j].moe.experts)
        one = jax.tree.map(lambda s: shape_on_device(device, s.shape[2:], s.dtype), experts)
        yield (
            executable_name("fill", _shapes(experts, one)),
            lambda e=experts, o=one: steps.run_fill.lower(e, o, index, index),
        )


def compile_missing(store: ExecutableStore, lowerings: Iterator[Lowering], devices: Sequence[JaxDevice]) -> int:
    """Compile and store the programs that the store lacks; returns how many. Runs no collective. Of the processes of a
    host that lack the same programs, each compiles other ones, and then waits for those of the others."""
    compiled, others = 0, []
    for lowering in lowerings:
        if not store.has(lowering[0]):
            with store.claim(lowering[0], 0) as mine:
                if mine:
                    compiled += _compile(store, lowering, devices)
                else:
                    others.append(lowering)
    return compiled + sum(_compile_alone(store, lowering, devices) for lowering in others)


def _compile_alone(store: ExecutableStore, lowering: Lowering, devices: Sequence[JaxDevice]) -> bool:
    """Compile and store a program unless the store has it, or gets it meanwhile from another process."""
    if store.has(lowering[0]):
        return False
    with store.claim(lowering[0], COMPILE_S):
        return _compile(store, lowering, devices)


def _compile(store: ExecutableStore, lowering: Lowering, devices: Sequence[JaxDevice]) -> bool:
    name, lower = lowering
    missing = not store.has(name)
    if missing:
        store.put(name, lower().compile(), devices)
    return missing


def load_program(store: ExecutableStore, lowering: Lowering, devices: Sequence[JaxDevice]) -> Callable[..., Any]:
    """Load a program from the store; compile it first, which is counted, if the store lacks it."""
    _compile_alone(store, lowering, devices)
    return store.load(lowering[0], devices)


def shape_on_device(device: JaxDevice, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def _shapes(*arguments: Any) -> str:
    """The tree of a program's arguments, with shapes and dtypes."""
    return str(jax.tree.map(lambda each: f"{each.dtype}{list(each.shape)}", arguments))


def _head(device: JaxDevice, cfg: ModelConfig) -> Head:
    held = jax.tree.map(lambda spec: weight_shape(cfg, spec), param_specs(cfg).logits, is_leaf=is_spec)
    return jax.tree.map(lambda s: shape_on_device(device, s.shape, s.dtype), held)


def cache_on_device(device: JaxDevice, cfg: ModelConfig, entries: int, states: int = 0) -> KVCache:
    return jax.tree.map(
        lambda each: shape_on_device(device, each.shape, each.dtype), cache_shapes(cfg, entries, states)
    )


def _global_shape(mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec, local: jax.ShapeDtypeStruct) -> Any:
    shape = global_shape(mesh, spec, local.shape)
    return jax.ShapeDtypeStruct(shape, local.dtype, sharding=NamedSharding(mesh, spec))
