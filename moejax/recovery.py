"""One rank's live arrays, from one plan to the next and from one generation to the next.

Weights that every rank has stay host arrays that the device aliases; slots are filled from the host store, only
the bytes of the experts that are missing; the cache is kept. Nothing here waits for another rank.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import numpy as np

from moejax import steps
from moejax.cache import Cache
from moejax.config import ModelConfig
from moejax.manifest import expert_place
from moejax.mesh import global_array
from moejax.params import FeedForward, Params
from moejax.programs import LocalPrograms, MeshPrograms, ModelShape, expert_positions


class ExpertSource(Protocol):
    """Where lost experts come from: `moejax.store.HostStore`, or a fake."""

    def everything_but_experts(self) -> Params:
        """All other weights, as host arrays; expert leaves are None."""
        ...

    def read_experts(self, wanted: list[tuple[int, int]]) -> Mapping[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
        """(gate_up `[2F, D]`, down `[D, F]`) of each (MoE layer, expert)."""
        ...


class LiveArrays:
    """What a rank holds: the common weights, experts in slots, and its cache."""

    def __init__(self, shape: ModelShape, source: ExpertSource) -> None:
        self.shape = shape
        self._source = source
        self._places = [expert_place(shape.cfg, layer) for layer in range(shape.cfg.n_moe_layers)]
        self._host_weights = jax.tree.map(_aligned, source.everything_but_experts())
        self._host_cache: Cache | None = None
        self._host_experts: dict[tuple[int, int], FeedForward] = {}
        self._weights: Params | None = None
        self._experts: dict[tuple[int, int], FeedForward] = {}
        self.held = np.full((shape.cfg.n_moe_layers, 0), -1, np.int32)
        self.cache: Cache | None = None

    @property
    def routes_shape(self) -> tuple[int, int]:
        """[moe layers, experts], of this rank's row of a plan."""
        cfg = self.shape.cfg
        return cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 0

    def leave_device(self, pages_used: int) -> None:
        """Copy to the host what a new generation must not lose: the experts, and the first pages of the cache."""
        if self.cache is not None:
            used = pages_used * self.shape.page_size
            self._host_cache = jax.tree.map(lambda a: np.array(np.asarray(a)[:, :used]), self.cache)
            self._host_experts = jax.tree.map(np.array, self._experts)
        self.cache, self._weights, self._experts = None, None, {}

    def enter_device(self, device: jax.Device) -> None:
        """Put everything on the device of a new generation."""
        self._weights = jax.device_put(self._host_weights, device)
        self._experts = jax.device_put(self._host_experts, device)
        cache = _empty_cache(self.shape)
        if self._host_cache is not None:
            for whole, used in zip(jax.tree.leaves(cache), jax.tree.leaves(self._host_cache), strict=True):
                whole[:, : used.shape[1]] = used
        self.cache = jax.device_put(cache, device, may_alias=False)
        self._host_cache, self._host_experts = None, {}

    def fill(self, slots: np.ndarray, local: LocalPrograms | None, device: jax.Device) -> int:
        """Bring the slots `[moe layers, S]` to hold these experts; what is in place stays.

        `local` has the fill programs of this S; None where S changes, when the buffers are made anew on the host.
        Returns how many experts were read from the store.
        """
        if slots.shape != self.held.shape or local is None:
            return self._refill(slots, device)
        missing = np.argwhere((slots != self.held) & (slots >= 0))
        read = self._source.read_experts([(int(layer), int(slots[layer, s])) for layer, s in missing])
        for layer, s in missing:
            i, j, repeat = self._places[layer]
            gate_up, down = read[int(layer), int(slots[layer, s])]
            self._experts[i, j] = local.fills[i, j](
                self._experts[i, j],
                *jax.device_put((gate_up, down, np.int32(repeat), np.int32(s)), device),
            )
            self.held[layer, s] = slots[layer, s]
        return len(missing)

    def _refill(self, slots: np.ndarray, device: jax.Device) -> int:
        before = {place: jax.tree.map(np.asarray, leaves) for place, leaves in self._experts.items()}
        have = {(int(x), int(e)): s for x, row in enumerate(self.held) for s, e in enumerate(row) if e >= 0}
        wanted = sorted({(int(x), int(e)) for x, row in enumerate(slots) for e in row if e >= 0})
        read = self._source.read_experts([each for each in wanted if each not in have])
        after = _empty_experts(self.shape.cfg, slots.shape[1])
        for layer, row in enumerate(slots):
            i, j, repeat = self._places[layer]
            for s, expert in enumerate(row):
                key = (layer, int(expert))
                if key in have:
                    old = before[i, j]
                    gate_up, down = old.gate_up[repeat, have[key]], old.down[repeat, have[key]]
                elif expert >= 0:
                    gate_up, down = read[key]
                else:
                    continue
                after[i, j].gate_up[repeat, s], after[i, j].down[repeat, s] = gate_up, down
        self._experts = jax.device_put(after, device)
        self.held = np.array(slots, np.int32)
        return len(read)

    def lay_over(
        self, programs: MeshPrograms, expert_to_slot: np.ndarray
    ) -> Callable[[jax.Array], steps.StepArguments]:
        """The arguments of a step over a mesh, from this rank's shards and without a copy. The returned function adds
        the step's packed inputs (this rank's part, on the device) and the cache as it is then.
        `expert_to_slot` is `[moe layers, experts]`."""
        assert self._weights is not None
        mesh = programs.mesh
        spec = steps.partition(self.shape.step(self.shape.buckets[0], mesh.size, programs.slots))
        local = self._with_slots(self._weights)
        params = jax.tree.map(lambda s, a: global_array(mesh, s, a), spec.params, local)
        device = mesh.local_devices[0]
        routes = global_array(mesh, spec.expert_to_slot, jax.device_put(expert_to_slot[None].astype(np.int32), device))

        def arguments(packed: jax.Array) -> steps.StepArguments:
            return steps.StepArguments(
                params=params,
                cache=jax.tree.map(lambda a: global_array(mesh, steps.SLOTS, a), self.cache),
                expert_to_slot=routes,
                packed=global_array(mesh, spec.packed, packed),
            )

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


def _empty_cache(shape: ModelShape) -> Cache:
    size = (shape.cfg.n_layers, shape.entries, shape.cfg.n_kv_heads * shape.cfg.d_head)
    return Cache(k=np.zeros(size, np.float32), v=np.zeros(size, np.float32))


def _empty_experts(cfg: ModelConfig, slots: int) -> dict[tuple[int, int], FeedForward]:
    if cfg.moe is None:
        return {}
    D, F = cfg.d_model, cfg.moe.d_expert
    return {
        (i, j): FeedForward(
            gate_up=np.zeros((cfg.segments[i][1], slots, 2 * F, D), np.float32),
            down=np.zeros((cfg.segments[i][1], slots, D, F), np.float32),
        )
        for i, j in expert_positions(cfg)
    }
