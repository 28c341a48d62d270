"""One rank's live arrays, from one plan to the next and from one generation to the next.

Weights that every rank has stay host arrays that the device aliases; slots are filled from the host store, only
the bytes of the experts that are missing; the cache is kept. Nothing here waits for another rank.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from moejax import steps
from moejax.cache import Cache, empty_cache
from moejax.config import ModelConfig
from moejax.manifest import checksum, expert_place, named
from moejax.mesh import global_array
from moejax.params import FeedForward, Head, Params, ParamSpec, expert_bytes, is_spec, param_specs
from moejax.precision import held_shape, hold
from moejax.programs import LocalPrograms, MeshPrograms, ModelShape, expert_positions
from moejax.store import StoreError
from moejax.tensor import share_of

BATCH_BYTES = 64 << 20
"""Experts read at once when many slots are filled."""


class ExpertSource(Protocol):
    """Where lost experts come from: `moejax.store.HostStore`, or a fake."""

    def everything_but_experts(self) -> Params:
        """All other weights, as host arrays; expert leaves are None."""
        ...

    def read_experts(self, wanted: list[tuple[int, int]]) -> Mapping[tuple[int, int], tuple[np.ndarray, ...]]:
        """The parts of each (MoE layer, expert): gate_up `[2F, D]`, down `[D, F]`, their biases if it has any. Raises
        StoreError."""
        ...

    def is_intact(self, expert: tuple[int, int], *parts: np.ndarray) -> bool:
        """Whether these are, in every bit, the expert's weights."""
        ...

    def damaged(self, params: Params) -> list[str]:
        """Names of the other weights that are not what they should be."""
        ...


@dataclasses.dataclass(frozen=True)
class Filled:
    """How many experts were read, the (MoE layer, slot, expert) that could not be, why the first could not, and how
    many were given to the rank instead."""

    read: int
    missing: tuple[tuple[int, int, int], ...] = ()
    trouble: str = ""
    given: int = 0


class LiveArrays:
    """What a rank holds: the common weights, experts in slots, and its cache."""

    def __init__(self, shape: ModelShape, source: ExpertSource, *, attends: bool = True, shard: int = 0) -> None:
        self.shape = shape
        self.source = source
        self.shard = shard
        """Which share of the heads, of a rank in a tensor group (`moejax.tensor`)."""
        self._places = [expert_place(shape.cfg, layer) for layer in range(shape.cfg.n_moe_layers)]
        self._sums = _Sums(shape.cfg, source)
        self._host_weights = self._common(shard) if attends else None
        self._host_cache: Cache | None = None
        self._host_experts: dict[tuple[int, int], FeedForward] = {}
        self._weights: Params | None = None
        self._experts: dict[tuple[int, int], FeedForward] = {}
        self._given: dict[tuple[int, int], FeedForward] = {}
        """Experts, by (MoE layer, expert), that the next fill need not read."""
        self.held = np.full((shape.cfg.n_moe_layers, 0), -1, np.int32)
        self.cache: Cache | None = None

    @property
    def routes_shape(self) -> tuple[int, int]:
        """[moe layers, experts], of this rank's row of a plan."""
        cfg = self.shape.cfg
        return cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 0

    @property
    def head(self) -> Head:
        """What makes logits of hidden rows."""
        assert self._weights is not None
        return self._weights.logits

    def leave_device(self, pages_used: int) -> None:
        """Copy to the host what a new generation must not lose: the experts, and the first pages of the cache."""
        if self.cache is not None:
            divided = self.shape.cfg.tensor > 1
            used = self.shape.entries if divided else pages_used * self.shape.page_size
            self._host_cache = jax.tree.map(lambda a: np.array(np.asarray(a)[:, :used]), self.cache)
        if self._experts:
            self._host_experts = jax.tree.map(np.array, self._experts)
        self.cache, self._weights, self._experts = None, None, {}

    def enter_device(self, device: jax.Device) -> None:
        """Put everything on the device of a new generation."""
        self._experts = jax.device_put(self._host_experts, device)
        self._host_experts = {}
        if self._host_weights is not None:
            self._attend(device)

    def attend(self, attends: bool, device: jax.Device, shard: int | None = None) -> None:
        """Have an empty cache and the weights that attending takes, or neither; what is there stays, unless `shard` is
        given and is another share of the heads. Raises StoreError, and then all is as before."""
        wanted = self.shard if shard is None else shard
        if not attends:
            self.cache, self._weights, self._host_weights = None, None, None
        elif self._host_weights is None or wanted != self.shard:
            weights = self._common(wanted)
            self.cache, self._weights = None, None
            self.shard, self._host_weights = wanted, weights
            self._attend(device)

    def _common(self, shard: int) -> Params:
        cfg, values = self.shape.cfg, self.source.everything_but_experts()
        if cfg.tensor > 1:
            values = share_of(values, shard, cfg)
        weights = _held(cfg, param_specs(cfg), values)
        self._sums.note_common(weights)
        return weights

    def _attend(self, device: jax.Device) -> None:
        self._weights = jax.device_put(self._host_weights, device)
        cache = empty_cache(self.shape.cfg, self.shape.entries)
        if self._host_cache is not None:
            for whole, used in zip(jax.tree.leaves(cache), jax.tree.leaves(self._host_cache), strict=True):
                whole[:, : used.shape[1]] = used
        self.cache = jax.device_put(cache, device, may_alias=False)
        self._host_cache = None

    def expert(self, layer: int, slot: int) -> FeedForward:
        """The weights in a slot, as host arrays (on a CPU, without a copy)."""
        i, j, repeat = self._places[layer]
        return jax.tree.map(lambda leaf: np.asarray(leaf)[repeat, slot], self._experts[i, j])

    def is_intact(self, layer: int, slot: int) -> bool:
        """Whether the weights in a slot that is held are, in every bit, what came from the source."""
        return self._sums.is_intact((layer, int(self.held[layer, slot])), self.expert(layer, slot))

    def damaged(self) -> list[str]:
        """Names of the weights that every rank has and that are not what came from the source."""
        return self._sums.damaged(self._weights) if self._weights is not None else []

    def checksums(self, expert: tuple[int, int]) -> tuple[int, ...]:
        """Of the weights of an expert that is held, unless the source knows them: it has those of float32."""
        return self._sums.of(expert)

    def give(self, expert: tuple[int, int], raw: np.ndarray, checksums: tuple[int, ...]) -> bool:
        """Have the next fill take these bytes (uint8, the leaves one after the other) for an expert and not read it.
        False, and nothing is taken, when they are not its weights; `checksums` are those of another rank."""
        i, j, _ = self._places[expert[0]]
        specs = param_specs(self.shape.cfg).segments[i][j].moe.experts
        forms, tree = jax.tree.flatten(jax.tree.map(lambda s: held_shape(self.shape.cfg, s), specs, is_leaf=is_spec))
        ends = np.cumsum([math.prod(form.shape[2:]) * form.dtype.itemsize for form in forms])
        if raw.size != ends[-1]:
            return False
        parts = (_aligned(part) for part in np.split(raw, ends[:-1]))
        leaves = [part.view(form.dtype).reshape(form.shape[2:]) for part, form in zip(parts, forms, strict=True)]
        weights = jax.tree.unflatten(tree, leaves)
        if not self._sums.vouch(expert, weights, checksums):
            return False
        self._given[expert] = weights
        return True

    def put_expert(self, layer: int, slot: int, weights: FeedForward, local: LocalPrograms, device: jax.Device) -> None:
        """Write weights into a slot, which donates the leaves: arrays laid over a mesh before are gone."""
        i, j, repeat = self._places[layer]
        arguments = jax.device_put((weights, np.int32(repeat), np.int32(slot)), device)
        self._experts[i, j] = local.fills[i, j](self._experts[i, j], *arguments)

    def fill(self, slots: np.ndarray, local: LocalPrograms | None, device: jax.Device) -> Filled:
        """Bring the slots `[moe layers, S]` to hold these experts; what is in place stays.

        `local` has the fill programs of this S; where S changes and experts are held, or without programs, the buffers
        are made anew on the host. Memory is that of the slots and of `BATCH_BYTES` of experts.
        A slot whose expert the store cannot give counts as empty. What was given and is not wanted is forgotten.
        """
        filled = self._fill(slots, local, device)
        self._given.clear()
        return filled

    def _fill(self, slots: np.ndarray, local: LocalPrograms | None, device: jax.Device) -> Filled:
        if not slots.shape[1]:
            self._experts, self.held = {}, np.array(slots, np.int32)
            return Filled(0)
        if local is None or (slots.shape != self.held.shape and self.held.size):
            return self._refill(slots, device)
        if slots.shape != self.held.shape:
            self._experts = jax.device_put(_empty_experts(self.shape.cfg, slots.shape[1]), device, may_alias=False)
            self.held = np.full(slots.shape, -1, np.int32)
        missing = np.argwhere((slots != self.held) & (slots >= 0))
        size = max(1, BATCH_BYTES // max(1, expert_bytes(self.shape.cfg)))
        unread, trouble = [], ""
        given = sum((int(layer), int(slots[layer, s])) in self._given for layer, s in missing)
        for first in range(0, len(missing), size):
            if first:
                jax.block_until_ready(self._experts)  # lets go of the experts of the batch before
            batch = missing[first : first + size]
            read, said = self._read([(int(layer), int(slots[layer, s])) for layer, s in batch])
            trouble = trouble or said
            for layer, s in batch:
                expert = int(slots[layer, s])
                if (int(layer), expert) in read:
                    self.put_expert(layer, s, read[int(layer), expert], local, device)
                    self.held[layer, s] = expert
                else:
                    self.held[layer, s] = -1
                    unread.append((int(layer), int(s), expert))
        return Filled(len(missing) - len(unread) - given, tuple(unread), trouble, given)

    def _read(self, wanted: list[tuple[int, int]]) -> tuple[dict[tuple[int, int], FeedForward], str]:
        """Those of the wanted experts that were given or that the store can give, and what it says of the first that it
        cannot."""
        given = {expert: self._given.pop(expert) for expert in wanted if expert in self._given}
        wanted = [expert for expert in wanted if expert not in given]
        found, trouble = self._read_store(wanted)
        return given | found, trouble

    def _read_store(self, wanted: list[tuple[int, int]]) -> tuple[dict[tuple[int, int], FeedForward], str]:
        try:
            found = {
                expert: self._held_expert(expert, parts) for expert, parts in self.source.read_experts(wanted).items()
            }
            return found, ""
        except StoreError as error:
            rest = [expert for expert in dict.fromkeys(wanted) if expert not in error.failed] if error.failed else []
            return (self._read_store(rest)[0] if rest else {}), str(error)

    def _held_expert(self, expert: tuple[int, int], parts: tuple[np.ndarray, ...]) -> FeedForward:
        i, j, _ = self._places[expert[0]]
        held = _held(self.shape.cfg, param_specs(self.shape.cfg).segments[i][j].moe.experts, FeedForward(*parts))
        self._sums.note(expert, held)
        return held

    def _refill(self, slots: np.ndarray, device: jax.Device) -> Filled:
        before = {place: jax.tree.map(np.asarray, leaves) for place, leaves in self._experts.items()}
        have = {(int(x), int(e)): s for x, row in enumerate(self.held) for s, e in enumerate(row) if e >= 0}
        wanted = sorted({(int(x), int(e)) for x, row in enumerate(slots) for e in row if e >= 0})
        absent = [each for each in wanted if each not in have]
        given = sum(each in self._given for each in absent)
        read, trouble = self._read(absent)
        unread = []
        after = _empty_experts(self.shape.cfg, slots.shape[1])
        for layer, row in enumerate(slots):
            i, j, repeat = self._places[layer]
            for s, expert in enumerate(row):
                key = (layer, int(expert))
                if key in have:
                    one = jax.tree.map(lambda leaf, at=(repeat, have[key]): leaf[at], before[i, j])
                elif key in read:
                    one = read[key]
                else:
                    if expert >= 0:
                        unread.append((layer, s, int(expert)))
                    continue
                jax.tree.map(lambda leaf, weight, at=(repeat, s): leaf.__setitem__(at, weight), after[i, j], one)
        self._experts = jax.device_put(after, device)
        self.held = np.array(slots, np.int32)
        for layer, s, _ in unread:
            self.held[layer, s] = -1
        return Filled(len(read) - given, tuple(unread), trouble, given)

    def lay_over(
        self, programs: MeshPrograms, expert_to_slot: np.ndarray, mates: Sequence[int] = ()
    ) -> Callable[[jax.Array], steps.StepArguments]:
        """The arguments of a step over a mesh, from this rank's shards and without a copy. The returned function adds
        the step's packed inputs (this rank's part, on the device) and the cache as it is then.
        `expert_to_slot` is `[moe layers, experts]`, `mates` where the members of its tensor group are in the mesh."""
        assert self._weights is not None
        mesh = programs.mesh
        spec = steps.partition(self.shape.step(self.shape.buckets[0], mesh.size, programs.slots))
        local = self._with_slots(self._weights)
        params = jax.tree.map(lambda s, a: global_array(mesh, s, a), spec.params, local)
        device = mesh.local_devices[0]
        routes = global_array(mesh, spec.expert_to_slot, jax.device_put(expert_to_slot[None].astype(np.int32), device))
        group, tensor = None, self.shape.cfg.tensor
        if tensor > 1:
            members = np.array([mates or (-1,) * tensor], np.int32)
            group = global_array(mesh, spec.mates, jax.device_put(members, device))

        def arguments(packed: jax.Array) -> steps.StepArguments:
            return steps.StepArguments(
                params=params,
                cache=jax.tree.map(lambda a: global_array(mesh, steps.SLOTS, a), self.cache),
                expert_to_slot=routes,
                packed=global_array(mesh, spec.packed, packed),
                mates=group,
            )

        return arguments

    def lay_here(self, expert_to_slot: np.ndarray, device: jax.Device) -> Callable[[jax.Array], steps.RoleArguments]:
        """The arguments of a step of a rank of one role, as `lay_over` gives them."""
        routes = jax.device_put(expert_to_slot.astype(np.int32), device)
        common = None if self._weights is None else steps.with_experts(self._weights, lambda _: None)

        def arguments(packed: jax.Array) -> steps.RoleArguments:
            if common is None:
                return steps.RoleArguments(params=None, cache=None, routes=None, experts=self._experts, packed=None)
            return steps.RoleArguments(params=common, cache=self.cache, routes=routes, experts=None, packed=packed)

        return arguments

    def _with_slots(self, weights: Params) -> Params:
        def layer(place: tuple[int, int], each):
            return each.replace(moe=each.moe.replace(experts=self._experts[place])) if each.moe else each

        return weights.replace(
            segments=tuple(
                tuple(layer((i, j), each) for j, each in enumerate(segment))
                for i, segment in enumerate(weights.segments)
            )
        )


class _Sums:
    """Checksums of weights as they are held. Of float32 weights the source has them; of others they are taken when the
    weights are made of the source's, and so of a share of the heads."""

    def __init__(self, cfg: ModelConfig, source: ExpertSource) -> None:
        self._cfg, self._source = cfg, source
        self._same = cfg.weights == "float32"
        self._same_common = self._same and cfg.tensor == 1
        self._experts: dict[tuple[int, int], tuple[int, ...]] = {}
        self._common: dict[str, int] = {}

    def note_common(self, weights: Params) -> None:
        if not self._same_common:
            self._common = {name: checksum(leaf) for name, leaf in named(weights).items()}

    def note(self, expert: tuple[int, int], weights: FeedForward) -> None:
        if not self._same:
            self._experts[expert] = _checksums(weights)

    def of(self, expert: tuple[int, int]) -> tuple[int, ...]:
        return self._experts.get(expert, ())

    def vouch(self, expert: tuple[int, int], weights: FeedForward, checksums: tuple[int, ...]) -> bool:
        """Whether weights that came from elsewhere are the expert's; `checksums` tell where none are known here."""
        if not self._same and checksums:
            self._experts.setdefault(expert, checksums)
        return self.is_intact(expert, weights)

    def is_intact(self, expert: tuple[int, int], weights: FeedForward) -> bool:
        if self._same:
            return self._source.is_intact(expert, *jax.tree.leaves(weights))
        return self._experts.get(expert) == _checksums(weights)

    def damaged(self, common: Params) -> list[str]:
        if self._same_common:
            return self._source.damaged(common)
        return [name for name, leaf in named(common).items() if checksum(np.asarray(leaf)) != self._common[name]]


def _checksums(weights: FeedForward) -> tuple[int, ...]:
    return tuple(map(checksum, jax.tree.leaves(weights)))


def _held(cfg: ModelConfig, specs: Any, values: Any) -> Any:
    """Float32 parameters in the form in which a rank holds them; None stays."""

    def leaf(spec: ParamSpec, value: np.ndarray | None) -> Any:
        return None if value is None else jax.tree.map(_aligned, hold(cfg, spec, value))

    return jax.tree.map(leaf, specs, values, is_leaf=is_spec)


def _aligned(value: np.ndarray) -> np.ndarray:
    """The array at an address that a CPU device can alias instead of copy."""
    value = np.ascontiguousarray(value)
    if value.ctypes.data % 64 == 0:
        return value
    room = np.empty(value.nbytes + 64, np.uint8)
    at = -room.ctypes.data % 64
    moved = room[at : at + value.nbytes].view(value.dtype).reshape(value.shape)
    moved[...] = value
    return moved


def _empty_experts(cfg: ModelConfig, slots: int) -> dict[tuple[int, int], FeedForward]:
    segments = param_specs(cfg).segments
    return {
        (i, j): jax.tree.map(
            lambda spec: jax.tree.map(
                lambda held: np.zeros((held.shape[0], slots, *held.shape[2:]), held.dtype), held_shape(cfg, spec)
            ),
            segments[i][j].moe.experts,
            is_leaf=is_spec,
        )
        for i, j in expert_positions(cfg)
    }
