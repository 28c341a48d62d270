"""The compiled programs a rank needs for one mesh, and those it needs for itself alone."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from moejax import steps
from moejax.cache import Cache, cache_shapes
from moejax.config import ModelConfig, in_slots
from moejax.disaggregated import RolesShape
from moejax.exchange import Exchange
from moejax.executables import ExecutableStore, executable_name
from moejax.inputs import TILE, Bucket, packed_size
from moejax.mesh import global_array, make_mesh
from moejax.model import StepOutputs, StepShape
from moejax.params import Head, is_spec, param_specs
from moejax.precision import held_shape
from moejax.shaping import Shaping, words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What is the same for every program of a server: the model, its buckets, and the size of a rank's cache."""

    cfg: ModelConfig
    buckets: tuple[Bucket, ...]
    page_size: int
    pages: int
    shared: bool = False
    """The ranks are processes of one machine, and exchange through memory they share."""

    @property
    def entries(self) -> int:
        """Cache entries of a rank: in a tensor group, of its heads, for every member."""
        return self.pages * self.page_size * self.cfg.tensor

    def step(self, bucket: Bucket, ranks: int, slots: int) -> StepShape:
        """The static shape of one step program."""
        return StepShape(
            cfg=self.cfg, bucket=bucket, ranks=ranks, slots=slots, page_size=self.page_size, shared=self.shared
        )

    def roles(self, bucket: Bucket, ranks: int, slots: int, attention: int) -> RolesShape:
        """The static shape of a step of `attention` ranks and of expert ranks."""
        return RolesShape(step=self.step(bucket, ranks, slots), attention=attention)

    def outbox_bytes(self, ranks: int, slots: int, attention: int = 0) -> int:
        """The most a rank of such a mesh sends at once; of `attention` ranks and expert ranks, or collocated if 0."""
        if attention:
            return max(self.roles(bucket, ranks, slots, attention).outbox_bytes for bucket in self.buckets)
        exchanges = ((self.step(bucket, ranks, slots).exchange, bucket.rows) for bucket in self.buckets)
        packed = 4 * ranks * max(map(packed_size, self.buckets)) if self.cfg.tensor > 1 else 0
        return max(packed, *(exchange.outbox_bytes(rows, self.cfg.d_model) for exchange, rows in exchanges))


Lowering = tuple[str, Callable[[], jax.stages.Lowered]]


class MeshPrograms:
    """The step of every bucket over one mesh, each loaded when first wanted, and the exchange that connects it."""

    def __init__(self, shape: ModelShape, devices: Sequence[jax.Device], slots: int, store: ExecutableStore) -> None:
        self.mesh = make_mesh(devices)
        self.slots = slots
        self._devices = tuple(devices)
        self._store = store
        connect, *self._lowerings = mesh_lowerings(shape, devices, slots)
        self._connect = load_program(store, connect, self._devices)
        self._steps: dict[int, Callable[..., StepOutputs]] = {}
        self._lock = threading.Lock()

    def step(self, bucket: int) -> Callable[..., StepOutputs]:
        """The step program of the bucket of this index. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                self._steps[bucket] = load_program(self._store, self._lowerings[bucket], self._devices)
            return self._steps[bucket]

    def connect(self, me: jax.Device) -> None:
        """Run the smallest exchange; every rank of the mesh must do so."""
        row = jax.device_put(np.zeros((1, self.mesh.size), np.float32), me)
        jax.block_until_ready(self._connect(global_array(self.mesh, jax.P(steps.RANKS), row)))


def mesh_lowerings(shape: ModelShape, devices: Sequence[jax.Device], slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a mesh: the connecting exchange, then a step per bucket."""
    mesh, n = make_mesh(devices), len(devices)
    yield connecting(shape, devices)
    for bucket in shape.buckets:
        step = shape.step(bucket, n, slots)
        local, spec = steps.local_shapes(step, shape.entries), steps.partition(step)
        arguments = jax.tree.map(lambda a, s: _over(mesh, s, a), local, spec)
        yield (
            executable_name("step", step, shape.entries),
            lambda a=arguments, s=step: steps.run_step.lower(a, shape=s, mesh=mesh),
        )


def connecting(shape: ModelShape, devices: Sequence[jax.Device]) -> Lowering:
    """The smallest exchange of a mesh, whatever its ranks do."""
    mesh, n = make_mesh(devices), len(devices)
    row = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, jax.P(steps.RANKS)))
    exchange = Exchange(ranks=n, slots=1, experts_per_token=1, shared=shape.shared)
    return (
        executable_name("connect", n, shape.shared),
        lambda: steps.run_connect.lower(row, mesh=mesh, exchange=exchange),
    )


class LocalPrograms:
    """What a rank runs on its own device: sample and commit per bucket, each loaded when first wanted, and fill per
    position of the experts."""

    def __init__(self, shape: ModelShape, device: jax.Device, slots: int, store: ExecutableStore) -> None:
        self._device = device
        self._store = store
        self._samples = list(sample_lowerings(shape, device))
        self._commits = list(commit_lowerings(shape, device))
        self._steps: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self._extras = (dict(shaped_lowerings(shape, device)), dict(score_lowerings(shape, device)))
        self._wanted: dict[tuple[int, int], Callable[..., Any]] = {}
        self._lock = threading.Lock()
        fills = (load_program(store, each, [device]) for each in fill_lowerings(shape, device, slots))
        self.fills = dict(zip(expert_positions(shape.cfg), fills, strict=True))

    def after_step(self, bucket: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The sample and commit programs of the bucket of this index. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                sample, commit = (
                    load_program(self._store, each[bucket], [self._device]) for each in (self._samples, self._commits)
                )
                self._steps[bucket] = sample, commit
            return self._steps[bucket]

    def sample_shaped(self, bucket: int) -> Callable[..., Any]:
        """The sample program of penalties, biases, masks and alternatives of the bucket of this index."""
        return self._extra(0, bucket)

    def score(self, bucket: int) -> Callable[..., Any]:
        """The scoring program of a tile of the bucket of this index, which must have tiles."""
        return self._extra(1, bucket)

    def _extra(self, kind: int, bucket: int) -> Callable[..., Any]:
        with self._lock:
            if (kind, bucket) not in self._wanted:
                self._wanted[kind, bucket] = load_program(self._store, self._extras[kind][bucket], [self._device])
            return self._wanted[kind, bucket]


def local_lowerings(shape: ModelShape, device: jax.Device, slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a rank alone."""
    yield from sample_lowerings(shape, device)
    yield from (lowering for _, lowering in shaped_lowerings(shape, device))
    yield from (lowering for _, lowering in score_lowerings(shape, device))
    yield from commit_lowerings(shape, device)
    yield from fill_lowerings(shape, device, slots)


def sample_lowerings(shape: ModelShape, device: jax.Device) -> Iterator[Lowering]:
    """Head and sampling, per bucket."""
    cfg = shape.cfg
    head = _head(device, cfg)
    for bucket in shape.buckets:
        hidden, packed = (
            on_device(device, (bucket.rows, cfg.d_model)),
            on_device(device, (packed_size(bucket),), jnp.int32),
        )
        yield (
            executable_name("sample", cfg, bucket),
            lambda b=bucket, h=hidden, p=packed: steps.run_sample.lower(head, h, p, bucket=b),
        )


def shaped_lowerings(shape: ModelShape, device: jax.Device) -> Iterator[tuple[int, Lowering]]:
    """Head and shaped sampling, by index of bucket."""
    cfg = shape.cfg
    head = _head(device, cfg)
    for index, bucket in enumerate(shape.buckets):
        hidden, packed = (
            on_device(device, (bucket.rows, cfg.d_model)),
            on_device(device, (packed_size(bucket),), jnp.int32),
        )
        mask = on_device(device, (bucket.segments, words(cfg.vocab_size)), jnp.uint32)
        shaping = Shaping(
            add=on_device(device, (bucket.segments, cfg.vocab_size)),
            seen=mask,
            allowed=mask,
            repetition=on_device(device, (bucket.segments,)),
        )
        yield (
            index,
            (
                executable_name("sample-shaped", cfg, bucket),
                lambda b=bucket, h=hidden, p=packed, s=shaping: steps.run_sample_shaped.lower(head, h, p, s, bucket=b),
            ),
        )


def score_lowerings(shape: ModelShape, device: jax.Device) -> Iterator[tuple[int, Lowering]]:
    """Head and log-probabilities of given tokens for one tile, by index of the buckets that have tiles."""
    cfg = shape.cfg
    head, row = _head(device, cfg), on_device(device, (), jnp.int32)
    targets = on_device(device, (TILE,), jnp.int32)
    for index, bucket in enumerate(shape.buckets):
        if bucket.tiles:
            hidden = on_device(device, (bucket.rows, cfg.d_model))
            yield (
                index,
                (
                    executable_name("score", cfg, bucket.rows),
                    lambda h=hidden: steps.run_score.lower(head, h, row, targets),
                ),
            )


def commit_lowerings(shape: ModelShape, device: jax.Device) -> Iterator[Lowering]:
    """The write of a step's keys and values, per bucket."""
    cfg = shape.cfg
    cache = cache_on(device, cfg, shape.entries)
    for bucket in shape.buckets:
        new = cache_on(device, cfg, bucket.rows * cfg.tensor)
        packed = on_device(device, (packed_size(bucket) * cfg.tensor,), jnp.int32)
        yield (
            executable_name("commit", cfg, bucket, shape.entries),
            lambda b=bucket, n=new, p=packed: steps.run_commit.lower(cache, n, p, bucket=b),
        )


def fill_lowerings(shape: ModelShape, device: jax.Device, slots: int) -> Iterator[Lowering]:
    """One expert's weights into a slot, per expert position."""
    cfg = shape.cfg
    local = steps.local_shapes(shape.step(shape.buckets[0], 1, slots), shape.entries).params
    index = on_device(device, (), jnp.int32)
    for i, j in expert_positions(cfg):
        experts = jax.tree.map(lambda s: on_device(device, s.shape, s.dtype), local.segments[i][j].moe.experts)
        one = jax.tree.map(lambda s: on_device(device, s.shape[2:], s.dtype), experts)
        yield (
            executable_name("fill", cfg, (i, j), slots),
            lambda e=experts, o=one: steps.run_fill.lower(e, o, index, index),
        )


def expert_positions(cfg: ModelConfig) -> list[tuple[int, int]]:
    """(segment, position in its pattern) of everything that has experts."""
    return [(i, j) for i, (pattern, _) in enumerate(cfg.segments) for j, kind in enumerate(pattern) if in_slots(kind)]


def compile_missing(store: ExecutableStore, lowerings: Iterator[Lowering], devices: Sequence[jax.Device]) -> int:
    """Compile and store what the store lacks; how many that was. No collective is run."""
    return sum(_compile(store, lowering, devices) for lowering in lowerings)


def _compile(store: ExecutableStore, lowering: Lowering, devices: Sequence[jax.Device]) -> bool:
    name, lower = lowering
    missing = not store.has(name)
    if missing:
        store.put(name, lower().compile(), devices)
    return missing


def load_program(store: ExecutableStore, lowering: Lowering, devices: Sequence[jax.Device]) -> Callable[..., Any]:
    """The program from the store; compiled now, and counted, when it has gone from there."""
    _compile(store, lowering, devices)
    return store.load(lowering[0], devices)


def on_device(device: jax.Device, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def _head(device: jax.Device, cfg: ModelConfig) -> Head:
    held = jax.tree.map(lambda spec: held_shape(cfg, spec), param_specs(cfg).logits, is_leaf=is_spec)
    return jax.tree.map(lambda s: on_device(device, s.shape, s.dtype), held)


def cache_on(device: jax.Device, cfg: ModelConfig, entries: int) -> Cache:
    sizes = cache_shapes(cfg, entries)
    return Cache(k=on_device(device, sizes.k), v=on_device(device, sizes.v))


def _over(mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec, local: jax.ShapeDtypeStruct) -> Any:
    whole = tuple(
        size * (mesh.size if axis < len(spec) and spec[axis] == steps.RANKS else 1)
        for axis, size in enumerate(local.shape)
    )
    return jax.ShapeDtypeStruct(whole, local.dtype, sharding=NamedSharding(mesh, spec))
