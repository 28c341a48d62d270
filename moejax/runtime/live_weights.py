"""One rank's live arrays, from one plan to the next and from one generation to the next.

Weights that every rank has stay host arrays that the device aliases. Slots are filled from the host store, reading only
the experts that are missing. The cache is kept. Nothing here waits for another rank.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from moejax.checkpoint.checksums import aligned_array
from moejax.checkpoint.host_store import StoreError
from moejax.checkpoint.manifest import expert_position
from moejax.config.kv_cache import KVCache, empty_cache
from moejax.config.mesh import JaxDevice
from moejax.config.model_config import ModelConfig
from moejax.config.parameter_counts import expert_bytes
from moejax.config.params import (
    FeedForward,
    Head,
    Params,
    Position,
    expert_specs,
    param_specs,
    without_mtp,
)
from moejax.model.tensor_parallel import tp_shard_of
from moejax.runtime.host_weights import empty_slots, expert_from_bytes, to_host_weights
from moejax.runtime.programs import ModelShape
from moejax.runtime.weight_checksums import WeightChecksums, WeightSource

BATCH_BYTES = 64 << 20
"""Experts read at once when many slots are filled."""


@runtime_checkable
class FillPrograms(Protocol):
    """The fill programs of a rank: `moejax.runtime.programs.LocalPrograms`, or a fake."""

    @property
    def fills(self) -> Mapping[Position, Callable[..., Any]]:
        """The program that writes one expert into a slot, by position."""
        ...


@dataclasses.dataclass(frozen=True)
class Filled:
    """The result of filling slots: how many experts were read, the (MoE layer, slot, expert) that could not be read,
    the error of the first of them, and how many experts were injected instead of read."""

    read: int
    missing: tuple[tuple[int, int, int], ...] = ()
    trouble: str = ""
    injected: int = 0


@dataclasses.dataclass(frozen=True)
class StagedWeights:
    """Other weights of the same model in host memory, for one rank: their source and checksums, the common weights with
    their tp shard (None on a rank that does not attend), and the experts by position, for the slots `slot_experts`
    `[moe layers, P]`."""

    source: WeightSource
    sums: WeightChecksums
    shard: int
    common: Params | None
    experts: dict[Position, FeedForward]
    slot_experts: np.ndarray


class LiveArrays:
    """The arrays of a rank: the common weights, experts in slots, and its cache."""

    def __init__(self, shape: ModelShape, source: WeightSource, *, attends: bool = True, shard: int = 0) -> None:
        self.shape = shape
        self.source = source
        self.shard = shard
        """The tp shard of a rank in a tensor group (`moejax.model.tensor_parallel`)."""
        self._places = [expert_position(shape.cfg, layer) for layer in range(shape.cfg.n_moe_layers)]
        self._sums = WeightChecksums(shape.cfg, source)
        self._host_weights = self._common(shard) if attends else None
        self._host_cache: KVCache | None = None
        self._host_experts: dict[tuple[int, int], FeedForward] = {}
        self._weights: Params | None = None
        self._experts: dict[tuple[int, int], FeedForward] = {}
        self._injected: dict[tuple[int, int], FeedForward] = {}
        """Experts that were rebuilt or moved here, by (MoE layer, expert); the next fill does not read them."""
        self.slot_experts: np.ndarray = np.full((shape.cfg.n_moe_layers, 0), -1, np.int32)
        """The expert in each slot `[moe layers, P]`, -1 for none."""
        self.cache: KVCache | None = None

    @property
    def routes_shape(self) -> tuple[int, int]:
        """Shape `[moe layers, experts]` of this rank's row of a plan."""
        cfg = self.shape.cfg
        return cfg.n_moe_layers, cfg.moe.experts if cfg.moe else 0

    @property
    def weights(self) -> Params | None:
        """The common weights on the device, None on a rank that does not attend."""
        return self._weights

    @property
    def experts(self) -> dict[Position, FeedForward]:
        """The slots on the device, by position."""
        return self._experts

    @property
    def head(self) -> Head:
        """The language-model head."""
        assert self._weights is not None
        return self._weights.logits

    def leave_device(self, pages_used: int) -> None:
        """Copy to the host the arrays that a new generation must not lose: the experts, the first pages of the cache,
        and all states."""
        if self.cache is not None:
            in_group = self.shape.cfg.tensor > 1
            used = self.shape.entries if in_group else pages_used * self.shape.page_size
            held = jax.tree.map(np.asarray, self.cache)
            k, v = jax.tree.map(lambda rows: rows[:, :used], (held.k, held.v))
            self._host_cache = jax.tree.map(np.array, held.replace(k=k, v=v))
        if self._experts:
            self._host_experts = jax.tree.map(np.array, self._experts)
        self.cache, self._weights, self._experts = None, None, {}

    def enter_device(self, device: JaxDevice) -> None:
        """Put all arrays on the device of a new generation."""
        self._experts = jax.device_put(self._host_experts, device)
        self._host_experts = {}
        if self._host_weights is not None:
            self._attend(device)

    def attend(self, attends: bool, device: JaxDevice, shard: int | None = None) -> None:
        """Make an empty cache and load the weights of attention, or drop both. What is loaded stays, unless `shard` is
        given and is another tp shard. Raises StoreError, after which nothing has changed."""
        wanted = self.shard if shard is None else shard
        if not attends:
            self.cache, self._weights, self._host_weights = None, None, None
        elif self._host_weights is None or wanted != self.shard:
            weights = self._common(wanted)
            self.cache, self._weights = None, None
            self.shard, self._host_weights = wanted, weights
            self._attend(device)

    def stage(self, source: WeightSource) -> StagedWeights:
        """Load other weights of the same model into host memory: the common weights, and the experts that are in slots
        now. Everything is compared with its checksums. Safe beside steps. Raises StoreError."""
        cfg, sums, shard = self.shape.cfg, WeightChecksums(self.shape.cfg, source), self.shard
        common = _read_common(cfg, source, sums, shard) if self._host_weights is not None else None
        slots = np.array(self.slot_experts)
        experts = empty_slots(cfg, slots.shape[1]) if slots.shape[1] else {}
        filled = [(int(layer), int(slot)) for layer, slot in np.argwhere(slots >= 0)]
        size = max(1, BATCH_BYTES // max(1, expert_bytes(cfg)))
        for first in range(0, len(filled), size):
            batch = filled[first : first + size]
            read = source.read_experts(list(dict.fromkeys((layer, int(slots[layer, slot])) for layer, slot in batch)))
            for layer, slot in batch:
                i, j, repeat = self._places[layer]
                expert = (layer, int(slots[layer, slot]))
                one = to_host_weights(cfg, expert_specs(cfg, (i, j)), FeedForward(*read[expert]))
                sums.note(expert, one)
                jax.tree.map(lambda leaf, weight, at=(repeat, slot): leaf.__setitem__(at, weight), experts[i, j], one)
        return StagedWeights(source, sums, shard, common, jax.tree.map(_aligned, experts), slots)

    def switch(self, staged: StagedWeights, device: JaxDevice) -> None:
        """Have the staged weights instead of the present ones. No argument of a step made before may be used any more;
        the cache keeps its entries, which are of the former weights. Raises StoreError, after which nothing has
        changed."""
        common = staged.common
        if self._host_weights is not None and (common is None or staged.shard != self.shard):
            common = _read_common(self.shape.cfg, staged.source, staged.sums, self.shard)
        self.source, self._sums = staged.source, staged.sums
        self._injected.clear()
        self._weights, self._experts = None, {}
        if self._host_weights is not None:
            self._host_weights = common
            self._weights = jax.device_put(common, device)
        self._experts, self.slot_experts = jax.device_put(staged.experts, device), staged.slot_experts

    def _common(self, shard: int) -> Params:
        return _read_common(self.shape.cfg, self.source, self._sums, shard)

    def _attend(self, device: JaxDevice) -> None:
        self._weights = jax.device_put(self._host_weights, device)
        cache = empty_cache(self.shape.cfg, self.shape.entries, self.shape.states)
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
        """True when the weights in a filled slot equal the source in every bit."""
        return self._sums.is_intact((layer, int(self.slot_experts[layer, slot])), self.expert(layer, slot))

    def damaged(self) -> list[str]:
        """Names of the common weights that differ from the source."""
        return self._sums.damaged(self._weights) if self._weights is not None else []

    def checksums(self, expert: tuple[int, int]) -> tuple[int, ...]:
        """Checksums of an expert in the rank's weight format; empty for float32, whose checksums the source has."""
        return self._sums.of(expert)

    def inject(self, expert: tuple[int, int], raw: np.ndarray, checksums: tuple[int, ...]) -> bool:
        """Keep the bytes of an expert (uint8, its leaves one after the other) for the next fill, which then does not
        read it.

        Returns False and keeps nothing when they are not its weights; `checksums` are those of another rank.
        """
        i, j, _ = self._places[expert[0]]
        weights = expert_from_bytes(self.shape.cfg, (i, j), raw)
        if weights is None or not self._sums.verify(expert, weights, checksums):
            return False
        self._injected[expert] = weights
        return True

    def put_expert(self, layer: int, slot: int, weights: FeedForward, local: FillPrograms, device: JaxDevice) -> None:
        """Write weights into a slot. Donates the leaves: arguments made for a mesh before are invalid."""
        i, j, repeat = self._places[layer]
        arguments = jax.device_put((weights, np.int32(repeat), np.int32(slot)), device)
        self._experts[i, j] = local.fills[i, j](self._experts[i, j], *arguments)

    def fill(self, slots: np.ndarray, local: FillPrograms | None, device: JaxDevice) -> Filled:
        """Fill the slots `[moe layers, P]` with these experts; experts in place stay.

        `local` has the fill programs of this P. Where P changes and slots are filled, or without programs, the buffers
        are rebuilt on the host. Memory is that of the slots and of `BATCH_BYTES` of experts. A slot whose expert the
        store cannot read counts as empty. Injected experts that are not wanted are dropped.
        """
        filled = self._fill(slots, local, device)
        self._injected.clear()
        return filled

    def _fill(self, slots: np.ndarray, local: FillPrograms | None, device: JaxDevice) -> Filled:
        if not slots.shape[1]:
            self._experts, self.slot_experts = {}, np.array(slots, np.int32)
            return Filled(0)
        if local is None or (slots.shape != self.slot_experts.shape and self.slot_experts.size):
            return self._rebuild(slots, device)
        if slots.shape != self.slot_experts.shape:
            self._experts = jax.device_put(empty_slots(self.shape.cfg, slots.shape[1]), device, may_alias=False)
            self.slot_experts = np.full(slots.shape, -1, np.int32)
        missing = [(int(layer), int(slot)) for layer, slot in np.argwhere((slots != self.slot_experts) & (slots >= 0))]
        wanted = {(layer, slot): (layer, int(slots[layer, slot])) for layer, slot in missing}
        size = max(1, BATCH_BYTES // max(1, expert_bytes(self.shape.cfg)))
        unread, trouble = [], ""
        injected = sum(expert in self._injected for expert in wanted.values())
        for first in range(0, len(missing), size):
            if first:
                jax.block_until_ready(self._experts)  # frees the experts of the batch before
            batch = missing[first : first + size]
            read, error = self._read([wanted[place] for place in batch])
            trouble = trouble or error
            for layer, slot in batch:
                _, expert = wanted[layer, slot]
                if (layer, expert) in read:
                    self.put_expert(layer, slot, read[layer, expert], local, device)
                    self.slot_experts[layer, slot] = expert
                else:
                    self.slot_experts[layer, slot] = -1
                    unread.append((layer, slot, expert))
        return Filled(len(missing) - len(unread) - injected, tuple(unread), trouble, injected)

    def _read(self, wanted: list[tuple[int, int]]) -> tuple[dict[tuple[int, int], FeedForward], str]:
        """The wanted experts that were injected or that the store can read, and its error for the first that it
        cannot."""
        injected = {expert: self._injected.pop(expert) for expert in wanted if expert in self._injected}
        wanted = [expert for expert in wanted if expert not in injected]
        found, trouble = self._read_store(wanted)
        return injected | found, trouble

    def _read_store(self, wanted: list[tuple[int, int]]) -> tuple[dict[tuple[int, int], FeedForward], str]:
        try:
            found = {
                expert: self._host_expert(expert, parts) for expert, parts in self.source.read_experts(wanted).items()
            }
            return found, ""
        except StoreError as error:
            rest = [expert for expert in dict.fromkeys(wanted) if expert not in error.failed] if error.failed else []
            return (self._read_store(rest)[0] if rest else {}), str(error)

    def _host_expert(self, expert: tuple[int, int], parts: tuple[Any, ...]) -> FeedForward:
        i, j, _ = self._places[expert[0]]
        held = to_host_weights(self.shape.cfg, expert_specs(self.shape.cfg, (i, j)), FeedForward(*parts))
        self._sums.note(expert, held)
        return held

    def _rebuild(self, slots: np.ndarray, device: JaxDevice) -> Filled:
        before = {place: jax.tree.map(np.asarray, leaves) for place, leaves in self._experts.items()}
        have = {(int(x), int(e)): s for x, row in enumerate(self.slot_experts) for s, e in enumerate(row) if e >= 0}
        wanted = sorted({(int(x), int(e)) for x, row in enumerate(slots) for e in row if e >= 0})
        absent = [each for each in wanted if each not in have]
        injected = sum(each in self._injected for each in absent)
        read, trouble = self._read(absent)
        unread = []
        after = empty_slots(self.shape.cfg, slots.shape[1])
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
        self.slot_experts = np.array(slots, np.int32)
        for layer, s, _ in unread:
            self.slot_experts[layer, s] = -1
        return Filled(len(read) - injected, tuple(unread), trouble, injected)


def _read_common(cfg: ModelConfig, source: WeightSource, sums: WeightChecksums, shard: int) -> Params:
    """The weights that every rank has, or their tp shard, from a source; `sums` takes their checksums."""
    values = source.non_expert_params()
    values = values if cfg.mtp else without_mtp(values)
    if cfg.tensor > 1:
        values = tp_shard_of(values, shard, cfg)
    weights = to_host_weights(cfg, param_specs(cfg), values)
    sums.note_common(weights)
    return weights


def _aligned(leaf: np.ndarray) -> np.ndarray:
    """A host array that a CPU device takes without a copy."""
    return aligned_array(leaf, leaf.dtype)
