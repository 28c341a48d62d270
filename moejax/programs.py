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
from moejax.cache import Cache
from moejax.config import ModelConfig
from moejax.executables import ExecutableStore, executable_name
from moejax.inputs import Bucket, packed_size
from moejax.mesh import global_array, make_mesh
from moejax.model import StepOutputs, StepShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What is the same for every program of a server: the model, its buckets, and the size of a rank's cache."""

    cfg: ModelConfig
    buckets: tuple[Bucket, ...]
    page_size: int
    pages: int

    @property
    def entries(self) -> int:
        """Cache entries of a rank."""
        return self.pages * self.page_size

    def step(self, bucket: Bucket, ranks: int, slots: int) -> StepShape:
        """The static shape of one step program."""
        return StepShape(cfg=self.cfg, bucket=bucket, ranks=ranks, slots=slots, page_size=self.page_size)


Lowering = tuple[str, Callable[[], jax.stages.Lowered]]


class MeshPrograms:
    """The step of every bucket over one mesh, each loaded when first wanted, and the exchange that connects it."""

    def __init__(self, shape: ModelShape, devices: Sequence[jax.Device], slots: int, store: ExecutableStore) -> None:
        self.mesh = make_mesh(devices)
        self.slots = slots
        self._devices = tuple(devices)
        self._store = store
        connect, *self._lowerings = mesh_lowerings(shape, devices, slots)
        self._connect = _load(store, connect, self._devices)
        self._steps: dict[int, Callable[..., StepOutputs]] = {}
        self._lock = threading.Lock()

    def step(self, bucket: int) -> Callable[..., StepOutputs]:
        """The step program of the bucket of this index. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                self._steps[bucket] = _load(self._store, self._lowerings[bucket], self._devices)
            return self._steps[bucket]

    def connect(self, me: jax.Device) -> None:
        """Run the smallest exchange; every rank of the mesh must do so."""
        row = jax.device_put(np.zeros((1, self.mesh.size), np.float32), me)
        jax.block_until_ready(self._connect(global_array(self.mesh, jax.P(steps.RANKS), row)))


def mesh_lowerings(shape: ModelShape, devices: Sequence[jax.Device], slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a mesh: the connecting exchange, then a step per bucket."""
    mesh, n = make_mesh(devices), len(devices)
    row = jax.ShapeDtypeStruct((n, n), jnp.float32, sharding=NamedSharding(mesh, jax.P(steps.RANKS)))
    yield executable_name("connect", n), lambda: steps.run_connect.lower(row, mesh=mesh)
    for bucket in shape.buckets:
        step = shape.step(bucket, n, slots)
        local, spec = steps.local_shapes(step, shape.entries), steps.partition(step)
        arguments = jax.tree.map(lambda a, s: _over(mesh, s, a), local, spec)
        yield (
            executable_name("step", step, shape.entries),
            lambda a=arguments, s=step: steps.run_step.lower(a, shape=s, mesh=mesh),
        )


class LocalPrograms:
    """What a rank runs on its own device: commit per bucket, and fill per position of the experts."""

    def __init__(self, shape: ModelShape, device: jax.Device, slots: int, store: ExecutableStore) -> None:
        loaded = [_load(store, each, [device]) for each in local_lowerings(shape, device, slots)]
        self.commits = loaded[: len(shape.buckets)]
        self.fills = dict(zip(expert_positions(shape.cfg), loaded[len(shape.buckets) :], strict=True))


def local_lowerings(shape: ModelShape, device: jax.Device, slots: int) -> Iterator[Lowering]:
    """Name and lowering of each program of a rank alone: a commit per bucket, a fill per expert position."""
    here = SingleDeviceSharding(device)
    cfg = shape.cfg

    def array(shape_: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape_, dtype, sharding=here)

    width = cfg.n_kv_heads * cfg.d_head
    kv = array((cfg.n_layers, shape.entries, width))
    for bucket in shape.buckets:
        new = array((cfg.n_layers, 2, bucket.rows, width))
        packed = array((packed_size(bucket),), jnp.int32)
        yield (
            executable_name("commit", cfg, bucket, shape.entries),
            lambda b=bucket, n=new, p=packed: steps.run_commit.lower(Cache(k=kv, v=kv), n, p, bucket=b),
        )
    local = steps.local_shapes(shape.step(shape.buckets[0], 1, slots), shape.entries).params
    index = array((), jnp.int32)
    for i, j in expert_positions(cfg):
        experts = jax.tree.map(lambda s: array(s.shape), local.segments[i][j].moe.experts)
        one = jax.tree.map(lambda s: array(s.shape[2:]), experts)
        yield (
            executable_name("fill", cfg, (i, j), slots),
            lambda e=experts, o=one: steps.run_fill.lower(e, o.gate_up, o.down, index, index),
        )


def expert_positions(cfg: ModelConfig) -> list[tuple[int, int]]:
    """(segment, position in its pattern) of everything that has experts."""
    return [(i, j) for i, (pattern, _) in enumerate(cfg.segments) for j, kind in enumerate(pattern) if kind == "moe"]


def compile_missing(store: ExecutableStore, lowerings: Iterator[Lowering], devices: Sequence[jax.Device]) -> int:
    """Compile and store what the store lacks; how many that was. No collective is run."""
    return sum(_compile(store, lowering, devices) for lowering in lowerings)


def _compile(store: ExecutableStore, lowering: Lowering, devices: Sequence[jax.Device]) -> bool:
    name, lower = lowering
    missing = not store.has(name)
    if missing:
        store.put(name, lower().compile(), devices)
    return missing


def _load(store: ExecutableStore, lowering: Lowering, devices: Sequence[jax.Device]) -> Callable[..., Any]:
    """The program from the store; compiled now, and counted, when it has gone from there."""
    _compile(store, lowering, devices)
    return store.load(lowering[0], devices)


def _over(mesh: jax.sharding.Mesh, spec: jax.sharding.PartitionSpec, local: jax.ShapeDtypeStruct) -> Any:
    whole = tuple(
        size * (mesh.size if axis < len(spec) and spec[axis] == steps.RANKS else 1)
        for axis, size in enumerate(local.shape)
    )
    return jax.ShapeDtypeStruct(whole, local.dtype, sharding=NamedSharding(mesh, spec))
