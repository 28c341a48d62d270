"""The programs of attention ranks and expert ranks, and a step as the host runs it: one program after the other, with
exchanges between them."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checkpoint.manifest import expert_position
from moejax.config.kv_cache import KVCache
from moejax.config.mesh import JaxDevice, global_array, make_mesh
from moejax.config.params import expert_positions, first_layer, map_experts
from moejax.config.step_inputs import packed_size
from moejax.model.decoder import StepOutputs
from moejax.model.disaggregated import PendingMicroBatch, StageInputs, StageOutputs
from moejax.model.feed_forward import LayerEnd
from moejax.model.stages import MicroBatch, RolesShape, Stage, stages
from moejax.runtime import steps
from moejax.runtime.executables import ExecutableStore, executable_name
from moejax.runtime.programs import (
    Lowering,
    ModelShape,
    cache_on_device,
    compile_missing,
    connect_lowering,
    load_program,
    shape_on_device,
)
from moejax.runtime.steps import RoleArguments

Program = Callable[..., Any]


class RolePrograms:
    """The steps of every bucket over a mesh of `attention` ranks followed by expert ranks, as the rank with device `me`
    runs them. Each is loaded at its first use, the exchange that connects the mesh at once."""

    def __init__(
        self,
        shape: ModelShape,
        devices: Sequence[JaxDevice],
        slots: int,
        attention: int,
        me: JaxDevice,
        store: ExecutableStore,
    ) -> None:
        self.mesh = make_mesh(devices)
        self.slots = slots
        self.attends = list(devices).index(me) < attention
        self._shape = shape
        self._devices = tuple(devices)
        self._me = me
        self._store = store
        self._attention = attention
        self._connect = load_program(store, connect_lowering(shape, devices), self._devices)
        self._steps: dict[int, Callable[[RoleArguments], StepOutputs | None]] = {}
        self._lock = threading.Lock()

    def step(self, bucket: int) -> Callable[[RoleArguments], StepOutputs | None]:
        """The step of the bucket of this index; an expert rank has no outputs. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                size = self._shape.buckets[bucket]
                roles = self._shape.roles(size, len(self._devices), self.slots, self._attention)
                exchange = self._exchange(roles)
                run = AttentionStep if self.attends else ExpertStep
                load = lambda lowering: load_program(self._store, lowering, [self._me])  # noqa: E731
                self._steps[bucket] = run(self._shape, roles, self._me, exchange, load).run
            return self._steps[bucket]

    def connect(self, me: JaxDevice) -> None:
        """Run the smallest exchange; every rank of the mesh must do so."""
        row = jax.device_put(np.zeros((1, self.mesh.size), np.float32), me)
        jax.block_until_ready(self._connect(global_array(self.mesh, steps.SHARDED, row)))

    def _exchange(self, roles: RolesShape) -> Program:
        """Outbox `[n, part]` to inbox, both on this device."""
        lowering = exchange_lowering(self._shape, roles, self._devices, self._me)
        if self._shape.shared_memory:
            return load_program(self._store, lowering, [self._me])
        program = load_program(self._store, lowering, self._devices)
        return lambda outbox: program(global_array(self.mesh, steps.SHARDED, outbox)).addressable_data(0)


class AttentionStep:
    """A step on an attention rank."""

    def __init__(
        self,
        shape: ModelShape,
        roles: RolesShape,
        me: JaxDevice,
        exchange: Program,
        load: Callable[[Lowering], Program],
    ) -> None:
        self._roles = roles
        self._exchange = exchange
        self._stages = stages(roles.step.cfg)
        self._repeats = [jax.device_put(np.int32(repeat), me) for _, repeat in self._stages]
        self._programs = {
            (stage, micro_batch): load(stage_lowering(shape, roles, stage, micro_batch, me))
            for stage in dict.fromkeys(stage for stage, _ in self._stages)
            for micro_batch in range(len(roles.micro_batches))
        }
        self._gather = load(gather_lowering(roles, me))

    def run(self, own: RoleArguments) -> StepOutputs:
        """The step's outputs; not ready yet when this returns."""
        micro_batches = len(self._roles.micro_batches)
        done: list[list[StageOutputs]] = [[] for _ in range(micro_batches)]
        inbox = None
        for tick in range(self._roles.ticks):
            layer, micro_batch = divmod(tick, 2)
            outbox = inbox  # for a tick that sends nothing: the exchanges stay in order
            if micro_batch < micro_batches:
                stage, _ = self._stages[layer]
                stage_inputs = StageInputs(
                    pending=done[micro_batch][-1].pending if layer else None,
                    inbox=inbox if layer else None,
                    other_kv=done[0][layer].new_kv if micro_batch else None,
                    repeat=self._repeats[layer],
                )
                made = self._programs[stage, micro_batch](own, stage_inputs)
                done[micro_batch].append(made)
                outbox = made.outbox if made.outbox is not None else inbox
            if tick < self._roles.ticks - 1:
                inbox = self._exchange(outbox)
        hidden = tuple(each[-1].hidden for each in done)
        new_kv = tuple(each.new_kv for each in done[-1] if each.new_kv is not None)
        loads = tuple(each.load for layer in zip(*done, strict=True) for each in layer if each.load is not None)
        return self._gather(hidden, new_kv, loads, own.packed)


class ExpertStep:
    """A step on an expert rank."""

    def __init__(
        self,
        shape: ModelShape,
        roles: RolesShape,
        me: JaxDevice,
        exchange: Program,
        load: Callable[[Lowering], Program],
    ) -> None:
        self._roles = roles
        self._exchange = exchange
        cfg = roles.step.cfg
        self._places = [expert_position(cfg, layer) for layer in range(cfg.n_moe_layers)]
        self._repeats = [jax.device_put(np.int32(repeat), me) for _, _, repeat in self._places]
        self._programs = {
            (segment, position, micro_batch): load(answer_lowering(shape, roles, (segment, position), micro_batch, me))
            for segment, position in expert_positions(roles.step.cfg)
            for micro_batch in range(len(roles.micro_batches))
        }
        self._nothing = jax.device_put(np.zeros((roles.step.ranks, roles.part), np.float32), me)

    def run(self, own: RoleArguments) -> None:
        """Answer rows until the step is over. Raises the error of the exchange."""
        inbox = self._nothing
        for tick in range(self._roles.ticks - 1):
            layer, micro_batch = divmod(tick - 1, 2)
            outbox = inbox
            if tick and micro_batch < len(self._roles.micro_batches):
                segment, position, _ = self._places[layer]
                experts = own.experts[segment, position]
                outbox = self._programs[segment, position, micro_batch](experts, inbox, self._repeats[layer])
            inbox = self._exchange(outbox)
        jax.block_until_ready(inbox)


def compile_roles(
    store: ExecutableStore,
    shape: ModelShape,
    devices: Sequence[JaxDevice],
    slots: int,
    attention: int,
    me: JaxDevice,
) -> int:
    """Compile and store the programs of both roles of such a mesh that the store lacks; returns how many."""
    compiled = compile_missing(store, iter([connect_lowering(shape, devices)]), devices)
    for bucket in shape.buckets:
        roles = shape.roles(bucket, len(devices), slots, attention)
        exchange = iter([exchange_lowering(shape, roles, devices, me)])
        compiled += compile_missing(store, exchange, [me] if shape.shared_memory else devices)
        compiled += compile_missing(store, _own_lowerings(shape, roles, me), [me])
    return compiled


def _own_lowerings(shape: ModelShape, roles: RolesShape, me: JaxDevice) -> Iterator[Lowering]:
    for micro_batch in range(len(roles.micro_batches)):
        for stage in dict.fromkeys(stage for stage, _ in stages(roles.step.cfg)):
            yield stage_lowering(shape, roles, stage, micro_batch, me)
        for place in expert_positions(roles.step.cfg):
            yield answer_lowering(shape, roles, place, micro_batch, me)
    yield gather_lowering(roles, me)


def exchange_lowering(shape: ModelShape, roles: RolesShape, devices: Sequence[JaxDevice], me: JaxDevice) -> Lowering:
    """The exchange between two ticks: over the mesh, or on this device where ranks share memory."""
    n, part = roles.step.ranks, roles.part
    name = executable_name("exchange", n, part, shape.shared_memory)
    if shape.shared_memory:
        return name, lambda: steps.run_local_exchange.lower(shape_on_device(me, (n, part)))
    mesh = make_mesh(devices)
    over = jax.ShapeDtypeStruct((n * n, part), jnp.float32, sharding=jax.NamedSharding(mesh, steps.SHARDED))
    return name, lambda: steps.run_exchange.lower(over, mesh=mesh)


def stage_lowering(
    shape: ModelShape, roles: RolesShape, stage: Stage, micro_batch: MicroBatch, me: JaxDevice
) -> Lowering:
    """Name and lowering of a stage of attention ranks."""
    cfg, bucket = roles.step.cfg, roles.step.bucket
    moe = cfg.experts_of(stage.after or "moe")
    T, X, D = roles.micro_batches[micro_batch].rows, moe.experts_per_token, cfg.d_model
    local = steps.local_shapes(roles.step, shape.entries)
    own = RoleArguments(
        params=jax.tree.map(lambda s: shape_on_device(me, s.shape, s.dtype), map_experts(local.params, lambda _: None)),
        cache=cache_on_device(me, cfg, shape.entries),
        routes=shape_on_device(me, (cfg.n_moe_layers, moe.experts), jnp.int32),
        experts=None,
        packed=shape_on_device(me, (packed_size(bucket),), jnp.int32),
    )
    pending = PendingMicroBatch(
        x=shape_on_device(me, (T, D)),
        shared_expert=shape_on_device(me, (T, D)) if moe.d_shared else None,
        rank=shape_on_device(me, (T, X), jnp.int32),
        nth=shape_on_device(me, (T, X), jnp.int32),
        gates=shape_on_device(me, (T, X)),
        end=LayerEnd(
            experts_norm=shape_on_device(me, (D,)) if moe.own_norms else None,
            post_norm=shape_on_device(me, (D,)) if cfg.post_norms else None,
            scale=shape_on_device(me, (1,)) if cfg.layer_scales else None,
        ),
    )
    rows = cache_on_device(me, cfg, bucket.rows)
    count = len(stage.layers)
    other_kv = _of_layers(me, rows, count)
    stage_inputs = StageInputs(
        pending=pending if stage.after else None,
        inbox=shape_on_device(me, (roles.step.ranks, roles.part)) if stage.after else None,
        other_kv=other_kv if micro_batch and count else None,
        repeat=shape_on_device(me, (), jnp.int32),
    )
    return (
        executable_name("stage", roles, stage, micro_batch, shape.entries),
        lambda: steps.run_stage.lower(own, stage_inputs, shape=roles, stage=stage, micro_batch=micro_batch),
    )


def answer_lowering(
    shape: ModelShape, roles: RolesShape, place: tuple[int, int], micro_batch: MicroBatch, me: JaxDevice
) -> Lowering:
    """Name and lowering of the answers of the experts at one position."""
    local = steps.local_shapes(roles.step, shape.entries).params.segments[place[0]][place[1]].moe.experts
    experts = jax.tree.map(lambda s: shape_on_device(me, s.shape, s.dtype), local)
    inbox, repeat = shape_on_device(me, (roles.step.ranks, roles.part)), shape_on_device(me, (), jnp.int32)
    cfg = roles.step.cfg
    kind = cfg.segments[place[0]][0][place[1]]
    own = dataclasses.replace(roles, step=dataclasses.replace(roles.step, cfg=cfg.of_layer(first_layer(cfg, place))))
    return (
        executable_name("answer", roles, place, micro_batch),
        lambda: steps.run_answer_rows.lower(experts, inbox, repeat, shape=own, kind=kind, micro_batch=micro_batch),
    )


def gather_lowering(roles: RolesShape, me: JaxDevice) -> Lowering:
    """Name and lowering of the program that puts the outputs of a step together."""
    cfg, moe = roles.step.cfg, roles.step.cfg.moe
    assert moe is not None
    hidden = tuple(shape_on_device(me, (micro_batch.rows, cfg.d_model)) for micro_batch in roles.micro_batches)
    rows = cache_on_device(me, cfg, roles.step.bucket.rows)
    new_kv = tuple(_of_layers(me, rows, len(stage.layers)) for stage, _ in stages(cfg) if stage.layers)
    loads = (shape_on_device(me, (moe.experts,), jnp.int32),) * (cfg.n_moe_layers * len(roles.micro_batches))
    packed = shape_on_device(me, (packed_size(roles.step.bucket),), jnp.int32)
    return (
        executable_name("gather", roles),
        lambda: steps.run_gather.lower(hidden, new_kv, loads, packed, shape=roles),
    )


def _of_layers(me: JaxDevice, rows: KVCache, count: int) -> KVCache:
    """Shapes of the new keys and values of so many layers; `rows` has those of all."""
    return jax.tree.map(lambda part: shape_on_device(me, (count, *part.shape[1:]), part.dtype), rows)
