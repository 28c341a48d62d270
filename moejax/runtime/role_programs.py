"""The programs of a rank of one role, and a step as the host runs it: one program after the other, with exchanges."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import steps
from moejax.cache import Cache
from moejax.disaggregated import Attended, Pending, RolesShape, Stretch, stretches
from moejax.executables import ExecutableStore, executable_name
from moejax.inputs import packed_size
from moejax.manifest import expert_place
from moejax.mesh import global_array, make_mesh
from moejax.model import StepOutputs
from moejax.programs import (
    Lowering,
    ModelShape,
    cache_on,
    compile_missing,
    connecting,
    expert_positions,
    load_program,
    on_device,
)
from moejax.steps import RoleArguments

Program = Callable[..., Any]


class RolePrograms:
    """The step of every bucket over a mesh of `attention` ranks and then expert ranks, as the rank of `me` runs it:
    each loaded when first wanted, and the exchange that connects the mesh."""

    def __init__(
        self,
        shape: ModelShape,
        devices: Sequence[jax.Device],
        slots: int,
        attention: int,
        me: jax.Device,
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
        self._connect = load_program(store, connecting(shape, devices), self._devices)
        self._steps: dict[int, Callable[[RoleArguments], StepOutputs | None]] = {}
        self._lock = threading.Lock()

    def step(self, bucket: int) -> Callable[[RoleArguments], StepOutputs | None]:
        """The step of the bucket of this index; an expert rank has no outputs. From any thread."""
        with self._lock:
            if bucket not in self._steps:
                size = self._shape.buckets[bucket]
                roles = self._shape.roles(size, len(self._devices), self.slots, self._attention)
                exchange = self._exchange(roles)
                run = Attending if self.attends else Answering
                load = lambda lowering: load_program(self._store, lowering, [self._me])  # noqa: E731
                self._steps[bucket] = run(self._shape, roles, self._me, exchange, load).run
            return self._steps[bucket]

    def connect(self, me: jax.Device) -> None:
        """Run the smallest exchange; every rank of the mesh must do so."""
        row = jax.device_put(np.zeros((1, self.mesh.size), np.float32), me)
        jax.block_until_ready(self._connect(global_array(self.mesh, steps.IN_TURN, row)))

    def _exchange(self, roles: RolesShape) -> Program:
        """Outbox `[n, part]` to inbox, both on this device."""
        lowering = exchange_lowering(self._shape, roles, self._devices, self._me)
        if self._shape.shared:
            return load_program(self._store, lowering, [self._me])
        program = load_program(self._store, lowering, self._devices)
        return lambda outbox: program(global_array(self.mesh, steps.IN_TURN, outbox)).addressable_data(0)


class Attending:
    """A step on an attention rank."""

    def __init__(
        self,
        shape: ModelShape,
        roles: RolesShape,
        me: jax.Device,
        exchange: Program,
        load: Callable[[Lowering], Program],
    ) -> None:
        self._roles = roles
        self._exchange = exchange
        self._stretches = stretches(roles.step.cfg)
        self._repeats = [jax.device_put(np.int32(repeat), me) for _, repeat in self._stretches]
        self._programs = {
            (stretch, micro): load(stretch_lowering(shape, roles, stretch, micro, me))
            for stretch in dict.fromkeys(stretch for stretch, _ in self._stretches)
            for micro in range(len(roles.micros))
        }
        self._gather = load(gather_lowering(roles, me))

    def run(self, own: RoleArguments) -> StepOutputs:
        """The step's outputs; not ready yet when this returns."""
        micros = len(self._roles.micros)
        done: list[list[Attended]] = [[] for _ in range(micros)]
        inbox = None
        for turn in range(self._roles.turns):
            layer, micro = divmod(turn, 2)
            outbox = inbox  # for a turn that sends nothing: the exchanges stay in order
            if micro < micros:
                stretch, _ = self._stretches[layer]
                pending = done[micro][-1].pending if layer else None
                before = done[0][layer].new_kv if micro else None
                made = self._programs[stretch, micro](
                    own, pending, inbox if layer else None, before, self._repeats[layer]
                )
                done[micro].append(made)
                outbox = made.outbox if made.outbox is not None else inbox
            if turn < self._roles.turns - 1:
                inbox = self._exchange(outbox)
        hidden = tuple(each[-1].hidden for each in done)
        new_kv = tuple(each.new_kv for each in done[-1] if each.new_kv is not None)
        loads = tuple(each.load for layer in zip(*done, strict=True) for each in layer if each.load is not None)
        return self._gather(hidden, new_kv, loads, own.packed)


class Answering:
    """A step on an expert rank."""

    def __init__(
        self,
        shape: ModelShape,
        roles: RolesShape,
        me: jax.Device,
        exchange: Program,
        load: Callable[[Lowering], Program],
    ) -> None:
        self._roles = roles
        self._exchange = exchange
        cfg = roles.step.cfg
        self._places = [expert_place(cfg, layer) for layer in range(cfg.n_moe_layers)]
        self._repeats = [jax.device_put(np.int32(repeat), me) for _, _, repeat in self._places]
        self._programs = {
            (segment, position, micro): load(answer_lowering(shape, roles, (segment, position), micro, me))
            for segment, position in expert_positions(roles.step.cfg)
            for micro in range(len(roles.micros))
        }
        self._nothing = jax.device_put(np.zeros((roles.step.ranks, roles.part), np.float32), me)

    def run(self, own: RoleArguments) -> None:
        """Answer until the step is over. Raises what the exchange raised."""
        inbox = self._nothing
        for turn in range(self._roles.turns - 1):
            layer, micro = divmod(turn - 1, 2)
            outbox = inbox
            if turn and micro < len(self._roles.micros):
                segment, position, _ = self._places[layer]
                experts = own.experts[segment, position]
                outbox = self._programs[segment, position, micro](experts, inbox, self._repeats[layer])
            inbox = self._exchange(outbox)
        jax.block_until_ready(inbox)


def compile_roles(
    store: ExecutableStore,
    shape: ModelShape,
    devices: Sequence[jax.Device],
    slots: int,
    attention: int,
    me: jax.Device,
) -> int:
    """Compile and store what both roles of such a mesh need and the store lacks; how many that was."""
    compiled = compile_missing(store, iter([connecting(shape, devices)]), devices)
    for bucket in shape.buckets:
        roles = shape.roles(bucket, len(devices), slots, attention)
        exchange = iter([exchange_lowering(shape, roles, devices, me)])
        compiled += compile_missing(store, exchange, [me] if shape.shared else devices)
        compiled += compile_missing(store, _own_lowerings(shape, roles, me), [me])
    return compiled


def _own_lowerings(shape: ModelShape, roles: RolesShape, me: jax.Device) -> Iterator[Lowering]:
    for micro in range(len(roles.micros)):
        for stretch in dict.fromkeys(stretch for stretch, _ in stretches(roles.step.cfg)):
            yield stretch_lowering(shape, roles, stretch, micro, me)
        for place in expert_positions(roles.step.cfg):
            yield answer_lowering(shape, roles, place, micro, me)
    yield gather_lowering(roles, me)


def exchange_lowering(shape: ModelShape, roles: RolesShape, devices: Sequence[jax.Device], me: jax.Device) -> Lowering:
    """The exchange between two turns: over the mesh, or on this device where ranks share memory."""
    n, part = roles.step.ranks, roles.part
    name = executable_name("exchange", n, part, shape.shared)
    if shape.shared:
        return name, lambda: steps.run_exchange_here.lower(on_device(me, (n, part)))
    mesh = make_mesh(devices)
    over = jax.ShapeDtypeStruct((n * n, part), jnp.float32, sharding=jax.NamedSharding(mesh, steps.IN_TURN))
    return name, lambda: steps.run_exchange.lower(over, mesh=mesh)


def stretch_lowering(shape: ModelShape, roles: RolesShape, stretch: Stretch, micro: int, me: jax.Device) -> Lowering:
    """A stretch of attention ranks."""
    cfg, bucket = roles.step.cfg, roles.step.bucket
    moe = cfg.experts_of(stretch.after or "moe")
    T, X, D = roles.micros[micro].rows, moe.experts_per_token, cfg.d_model
    local = steps.local_shapes(roles.step, shape.entries)
    own = RoleArguments(
        params=jax.tree.map(
            lambda s: on_device(me, s.shape, s.dtype), steps.with_experts(local.params, lambda _: None)
        ),
        cache=cache_on(me, cfg, shape.entries),
        routes=on_device(me, (cfg.n_moe_layers, moe.experts), jnp.int32),
        experts=None,
        packed=on_device(me, (packed_size(bucket),), jnp.int32),
    )
    pending = Pending(
        x=on_device(me, (T, D)),
        always=on_device(me, (T, D)) if moe.d_shared else None,
        rank=on_device(me, (T, X), jnp.int32),
        nth=on_device(me, (T, X), jnp.int32),
        gates=on_device(me, (T, X)),
    )
    inbox = on_device(me, (roles.step.ranks, roles.part))
    rows = cache_on(me, cfg, bucket.rows)
    count = len(stretch.layers)
    before = Cache(*(on_device(me, (count, *part.shape[1:])) for part in (rows.k, rows.v))) if micro and count else None
    between = (pending, inbox) if stretch.after else (None, None)
    return (
        executable_name("stretch", roles, stretch, micro, shape.entries),
        lambda: steps.run_stretch.lower(
            own, *between, before, on_device(me, (), jnp.int32), shape=roles, stretch=stretch, micro=micro
        ),
    )


def answer_lowering(
    shape: ModelShape, roles: RolesShape, place: tuple[int, int], micro: int, me: jax.Device
) -> Lowering:
    """The experts of one (segment, position)."""
    local = steps.local_shapes(roles.step, shape.entries).params.segments[place[0]][place[1]].moe.experts
    experts = jax.tree.map(lambda s: on_device(me, s.shape, s.dtype), local)
    inbox, repeat = on_device(me, (roles.step.ranks, roles.part)), on_device(me, (), jnp.int32)
    kind = roles.step.cfg.segments[place[0]][0][place[1]]
    return (
        executable_name("answer", roles, place, micro),
        lambda: steps.run_answer.lower(experts, inbox, repeat, shape=roles, kind=kind, micro=micro),
    )


def gather_lowering(roles: RolesShape, me: jax.Device) -> Lowering:
    """What puts the outputs of a step together."""
    cfg, moe = roles.step.cfg, roles.step.cfg.moe
    assert moe is not None
    hidden = tuple(on_device(me, (micro.rows, cfg.d_model)) for micro in roles.micros)
    rows = cache_on(me, cfg, roles.step.bucket.rows)
    new_kv = tuple(
        Cache(*(on_device(me, (len(stretch.layers), *part.shape[1:])) for part in (rows.k, rows.v)))
        for stretch, _ in stretches(cfg)
        if stretch.layers
    )
    loads = (on_device(me, (moe.experts,), jnp.int32),) * (cfg.n_moe_layers * len(roles.micros))
    packed = on_device(me, (packed_size(roles.step.bucket),), jnp.int32)
    return (
        executable_name("gather", roles),
        lambda: steps.run_gather.lower(hidden, new_kv, loads, packed, shape=roles),
    )
