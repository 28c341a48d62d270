"""A rank without a process, and all that it holds: slots, parity, a cache that can be worked out by hand, its replica.

Each method carries out one command of the front, as `serving.worker` does, and returns fields of `Done`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from planner.plan.step_layout import DROPPED
from serving.engine.batch import StepBucket, _padding
from serving.executor.kv_replica import entry_indices
from serving.executor.mesh_key import MeshKey
from serving.executor.prefix_index import PrefixIndex
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.versions import LINK
from serving.worker.kv_replicator import KVReplicator, restored_rows
from simulation.hand_model import HandCache

POSITIONS = 1 << 12
"""More than there are positions: in a replica an entry's second number is its position, and its version times this."""
Damage = str
"""The damage of the weights in a slot: "flip" (a bit), which only an inspection finds, or "nan"."""


@dataclasses.dataclass
class HandStore:
    """The store of the model's weights."""

    readable: bool = True


@functools.cache
def _shared_padding(bucket: StepBucket, max_pages: int, *, states: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a bucket without work, which nobody writes to."""
    return _padding(bucket, max_pages, states=states)


@functools.cache
def weights_of(layer: int, expert: int, version: int = 0) -> bytes:
    """A version of the weights of an expert."""
    return np.random.default_rng((layer, expert, version)).bytes(100)


class HandRank:
    """The state of one incarnation of a rank, whose model has `layers` MoE layers."""

    def __init__(
        self, rank: int, store: HandStore, buckets: tuple[StepBucket, ...], *, max_pages: int, layers: int = 2
    ) -> None:
        self.rank = rank
        self.store = store
        self._buckets = buckets
        self._max_pages = max_pages
        self._layers = layers
        self._page_size = 0
        self.configured: link_pb2.Configure | None = None
        self.cache: HandCache | None = None
        self.held: np.ndarray | None = None
        """The expert in each slot, int32 `[moe layers, slots]`, -1 for none."""
        self.doubted: set[tuple[int, int]] = set()
        """Slots found damaged: the next plan that wants something in them has it read again."""
        self.damaged: dict[tuple[int, int], Damage] = {}
        """Slots, (layer, slot), whose weights are damaged."""
        self.parity: dict[tuple[int, tuple[int, ...]], bytearray] = {}
        self._arriving = bytearray()
        self._given: set[tuple[int, int]] = set()
        """Experts that the next plan need not read."""
        self.routes: np.ndarray | None = None
        self.mesh: MeshKey | None = None
        self.weights = 0
        """The number of the weights that it has."""
        self.staged: int | None = None
        """The number of other weights in its host memory."""
        self.stagings_voided = 0
        """See `serving.worker.state.WorkerState`."""
        self.epoch = -1
        self.last_epoch = 0
        """The highest epoch that it has adopted."""
        self.aborted_epoch = -1
        """Steps of this epoch and of earlier ones are refused."""
        self.generation = 0
        self.index = PrefixIndex()
        self.last = 0
        """The last step that this rank has done."""
        self.chosen: np.ndarray | None = None
        """The tokens that it chose, by segment; None when they are void."""
        self.replicator: KVReplicator | None = None
        self.uncopied: tuple[int, np.ndarray] | None = None
        """The last step and the entries it wrote, until they are copied."""

    def hello(self, token: str = "", pid: int = 0) -> link_pb2.Hello:
        """The first message to a front."""
        return link_pb2.Hello(
            pid=pid,
            token=token,
            cache_copy=self.replicator.path if self.replicator is not None else "",
            oldest=LINK.oldest,
            newest=LINK.newest,
        )

    # -- Commands -----------------------------------------------------------------------------------------------

    def configure(self, m: link_pb2.Configure) -> dict[str, Any]:
        """See `serving.worker.rank.RankWorker.configure`."""
        self._page_size = m.page_size
        self.weights = m.weights if self.configured is None else self.weights
        self.configured = m
        self._keep_staged(m.weights)
        self.cache = self.cache or HandCache(m.pages, m.page_size)
        self.cache.weights = self.weights
        self._replicate_as(m)
        self.uncopied = None
        held = link_pb2.Held(
            epoch=max(self.last_epoch, self.aborted_epoch),
            generation=self.generation,
            full=self.index.message(),
            serves=self.epoch >= 0,
            weights=self.weights,
        )
        return {"held": held}

    def join(self, m: link_pb2.Join) -> dict[str, Any]:
        """See `serving.worker.meshes.RankMeshes.join`."""
        used = m.pages_used * self._page_size
        assert self.cache is not None
        self.cache.token[used:] = self.cache.position[used:] = -1
        self.epoch, self.generation, self.mesh = -1, m.generation, None
        self.index.truncate(m.pages_used)
        return {}

    def stage_weights(self, m: link_pb2.StageWeights, voided: int | None = None) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.stage_weights`; `voided` is `stagings_voided` when it began."""
        self.staged = None
        if m.version.store and m.version.number != self.weights:
            if not self.store.readable:
                raise LookupError("the store cannot be read")
            if voided in (None, self.stagings_voided):
                self.staged = m.version.number
        return {}

    def _keep_staged(self, number: int | None) -> None:
        """See `serving.worker.weights.RankWeights.keep_staged`."""
        self.stagings_voided += 1
        self.staged = self.staged if self.staged == number else None

    def use_weights(self, version: link_pb2.WeightsVersion) -> None:
        """See `serving.worker.weights.RankWeights.use`."""
        if version.number == self.weights:
            return
        if version.number != self.staged and not self.store.readable:
            raise LookupError("the store cannot be read")
        assert version.store, "the front names no store for weights that this rank does not have"
        assert self.cache is not None
        self.weights = self.cache.weights = version.number
        self._keep_staged(None)
        self.epoch = -1
        self.damaged.clear()
        self.doubted.clear()
        self.parity.clear()
        self._given.clear()

    def hold(self, m: link_pb2.Hold) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.hold`."""
        self.use_weights(m.weights)
        return {}

    def adopt(self, m: link_pb2.Adopt) -> dict[str, Any]:
        """See `serving.worker.rank.RankWorker.adopt`."""
        self.use_weights(m.weights)
        key = MeshKey.read(m.mesh)
        wanted = np.frombuffer(m.slots, np.int32).reshape(self._layers, key.slots_of(self.rank))
        self.index.truncate(0)
        if m.WhichOneof("protection") is not None:
            self._replicate_as(m)
        assert self.cache is not None
        if not key.has_attention(self.rank):
            self.cache.token[:] = self.cache.position[:] = -1
            self.cache.states.clear()
        before, read, missing = self.experts, 0, []
        held = self.held
        grown = held is None or held.shape != wanted.shape
        if grown:
            held = np.full(wanted.shape, -1, np.int32)
        assert held is not None
        for layer, slot in np.argwhere(wanted >= 0).tolist():
            expert, doubted = int(wanted[layer, slot]), (layer, slot) in self.doubted
            there = (layer, expert) in before if grown else held[layer, slot] == expert and not doubted
            if there:
                continue
            if (layer, expert) in self._given or self.store.readable:
                read += (layer, expert) not in self._given
                self.damaged.pop((layer, slot), None)
            else:
                missing.append(link_pb2.ExpertSlot(layer=layer, slot=slot, expert=expert))
        if grown:
            self.damaged.clear()
        self.doubted = {(layer, slot) for layer, slot in self.doubted if wanted[layer, slot] < 0}
        self.held = np.where(wanted >= 0, wanted, held)
        for lost in missing:
            self.held[lost.layer, lost.slot] = -1
        self._given.clear()
        self.routes = np.frombuffer(m.expert_to_slot, np.int32).reshape(self._layers, -1)
        self.mesh, self.epoch = key, m.epoch
        self.last_epoch = max(self.last_epoch, m.epoch)
        return {"experts_loaded": read, "missing": missing, "trouble": "gone" if missing else ""}

    def read_weights(self, m: link_pb2.ReadWeights) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.read_weights`."""
        if m.of.parity:
            whole = bytes(self.parity[m.of.layer, tuple(m.of.experts)])
        else:
            layer, (expert,) = m.of.layer, m.of.experts
            if (layer, expert) not in self.experts:
                raise LookupError(f"expert {expert} of layer {layer} is not on rank {self.rank}")
            whole = weights_of(layer, expert, self.weights)
        return {"rows": whole[m.first : m.first + m.count], "size": len(whole)}

    def write_weights(self, m: link_pb2.WriteWeights) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.write_weights`."""
        key = m.of.layer, tuple(m.of.experts)
        if m.of.parity and m.first == 0:
            self.parity[key] = bytearray()
        elif m.first == 0:
            self._arriving = bytearray()
        whole = self.parity[key] if m.of.parity else self._arriving
        assert len(whole) == m.first
        whole += m.rows
        if len(whole) == m.size and not m.of.parity:
            layer, (expert,) = key
            if whole != weights_of(layer, expert, self.weights):
                raise LookupError(f"expert {expert} of layer {layer} arrived with bytes that are not its weights")
            self._given.add((layer, expert))
        return {}

    def keep_parity(self, m: link_pb2.KeepParity) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.keep_parity`."""
        kept = [(m.layer, tuple(of.experts)) for of in m.parities]
        self.parity = {key: whole for key, whole in self.parity.items() if key[0] != m.layer or key in kept}
        return {}

    def read_cache(self, m: link_pb2.ReadCache) -> dict[str, Any]:
        """See `serving.worker.kv_cache.RankKVCache.read_cache`."""
        entries = entry_indices(m.pages, self._page_size, m.first, m.count)
        assert self.cache is not None
        if m.HasField("state"):
            return {"rows": np.array(self.cache.states[m.state], np.int32).tobytes()}
        cache = self.cache
        return {"rows": np.stack([cache.token[entries], cache.position[entries], cache.version[entries]]).tobytes()}

    def write_cache(self, m: link_pb2.WriteCache) -> dict[str, Any]:
        """See `serving.worker.kv_cache.RankKVCache.write_cache`."""
        if m.HasField("state"):
            assert self.cache is not None
            self.cache.states[m.state] = tuple(np.frombuffer(m.rows, np.int32).tolist())
            return {}
        rows = np.frombuffer(m.rows, np.int64).reshape(3, -1)
        assert rows[0].tolist() == np.frombuffer(m.tokens, np.int32).tolist(), "a request moves with another's entries"
        self._write(entry_indices(m.pages, self._page_size, m.first, m.count), rows)
        return {}

    def restore_cache(self, m: link_pb2.RestoreCache) -> dict[str, Any]:
        """See `serving.worker.kv_cache.RankKVCache.restore_cache`."""
        token, packed = restored_rows(m, self._page_size).view(np.int32).reshape(-1, 2).T
        rows = np.stack([token, packed % POSITIONS, packed // POSITIONS])
        self._write(entry_indices(m.pages, self._page_size, m.first, m.count), rows)
        return {}

    def inspect(self, m: link_pb2.Inspect) -> dict[str, Any]:
        """See `serving.worker.weights.RankWeights.inspect`."""
        held = self.held if self.held is not None else np.zeros((0, 0), np.int32)
        numbers = range(m.first, m.first + m.count) if m.count else range(held.size)
        missing = []
        for layer, slot in sorted(self.damaged):
            if layer * held.shape[1] + slot in numbers and held[layer, slot] >= 0:
                missing.append(link_pb2.ExpertSlot(layer=layer, slot=slot, expert=int(held[layer, slot])))
                self.doubted.add((layer, slot))
        return {"missing": missing}

    # -- Steps --------------------------------------------------------------------------------------------------

    def why_stale(self, part: link_pb2.Step) -> str:
        """Why this rank cannot take a step; "" if it can."""
        if self.epoch != part.epoch:
            return f"epoch {part.epoch} is not {self.epoch}"
        if part.after and part.after != self.last:
            return f"step {part.step} follows step {part.after}; the last one here was {self.last}"
        return ""

    def inputs(self, part: link_pb2.Step) -> dict[str, np.ndarray]:
        """The arrays of this rank's part, with tokens that the step before it chose."""
        padding = _shared_padding(self._buckets[part.bucket], self._max_pages)
        arrays: dict[str, np.ndarray] = {}
        if part.inputs:
            packed, at = np.frombuffer(part.inputs, np.int32).copy(), 0
            if len(packed) > sum(array.size for array in padding.values()):
                padding = _shared_padding(self._buckets[part.bucket], self._max_pages, states=True)
            for name, like in padding.items():
                arrays[name] = packed[at : at + like.size].view(like.dtype).reshape(like.shape)
                at += like.size
        else:
            arrays = {name: like.copy() for name, like in padding.items()}
        if self.chosen is not None:
            for row, source in enumerate(np.frombuffer(part.sources, np.int32)):
                if source >= 0:
                    arrays["tokens"][row] = self.chosen[source]
        return arrays

    def run(self, part: link_pb2.Step, arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """Run this rank's part, commit it, and return fields of StepDone."""
        assert self.cache is not None
        assert self.routes is not None
        self.index.add(part.full)
        tokens, logprobs = self.cache.step(arrays, {})
        drafts = self.configured.drafts if self.configured is not None and not part.skip_drafts else 0
        guesses = self.cache.guesses(arrays, tokens, drafts).tobytes() if drafts else b""
        write = arrays["write"]
        wrote = write[write != DROPPED]
        self.index.invalidate(wrote // self._page_size)
        if "state_write" in arrays:
            self.index.invalidate_snapshots(arrays["state_write"])
        self.cache.commit(arrays)
        self.uncopied, self.last, self.chosen = (part.step, wrote), part.step, tokens
        layers, experts = self.routes.shape
        load = [[0] * experts for _ in range(layers)]
        for token in arrays["tokens"][arrays["positions"] >= 0].tolist():
            for layer, row in enumerate(load):  # every other token goes to one expert
                row[(layer if token % 2 else token) % experts] += 1
        return {
            "tokens": tokens.tobytes(),
            "logprobs": logprobs.tobytes(),
            "expert_load": np.array(load, np.int32).tobytes(),
            "drafts": guesses,
        }

    def copy_last(self, *, part: bool = False) -> list[link_pb2.Copied]:
        """Copy what the last step wrote to the replica; with `part` only every other entry, because the rank dies
        meanwhile. Returns the messages to the front."""
        if self.uncopied is None:
            return []
        (step, entries), self.uncopied = self.uncopied, None
        self._copy(entries[::2] if part else entries)
        if self.replicator is None:
            return []
        if not part:
            self.replicator.seal(step)
        return self.replicator.take_messages()

    # -- Behind it ----------------------------------------------------------------------------------------------

    @property
    def experts(self) -> set[tuple[int, int]]:
        """The (MoE layer, expert) that are in slots of this rank and not known to be damaged."""
        held = self.held if self.held is not None else np.zeros((0, 0), np.int32)
        return {(int(x), int(held[x, s])) for x, s in np.argwhere(held >= 0) if (int(x), int(s)) not in self.doubted}

    @property
    def is_damaged(self) -> bool:
        """Whether the weights in a slot with an expert are damaged."""
        return self.held is not None and any(self.held[at] >= 0 for at in self.damaged)

    def take_messages(self) -> list[link_pb2.Copied]:
        """The messages that the replicator has for the front."""
        return self.replicator.take_messages() if self.replicator is not None else []

    def close(self) -> None:
        """The process has ended: its replica stays with whoever else has it open."""
        if self.replicator is not None:
            self.replicator.close()
            self.replicator = None

    def _replicate_as(self, m: link_pb2.Configure | link_pb2.Adopt) -> None:
        before, self.replicator = self.replicator, KVReplicator.of(m)
        if before is not None:
            before.close()

    def _write(self, entries: np.ndarray, rows: np.ndarray) -> None:
        assert self.cache is not None
        self.index.invalidate(entries // self._page_size)
        self.cache.token[entries], self.cache.position[entries], self.cache.version[entries] = rows
        self._copy(entries)

    def _copy(self, entries: np.ndarray) -> None:
        if self.replicator is None:
            return
        assert self.cache is not None
        token, position = self.cache.token[entries].astype(np.int32), self.cache.position[entries].astype(np.int32)
        packed = position + POSITIONS * self.cache.version[entries].astype(np.int32)
        self.replicator.copy(entries, token, position, np.stack([token, packed], axis=-1)[:, None])


def check_step(ranks: Mapping[int, HandRank], parts: Mapping[int, link_pb2.Step]) -> None:
    """Raise AssertionError unless all ranks of an exchange are in one step of one mesh, and every route leads to a slot
    with its expert."""
    steps = {(part.epoch, part.step, part.bucket, part.after) for part in parts.values()}
    assert len(steps) == 1, f"ranks of one exchange are in different steps (epoch, step, bucket, after): {steps}"
    for rank, each in ranks.items():
        assert each.mesh is not None
        assert set(each.mesh.ranks) == set(ranks), f"rank {rank} is in {each.mesh}, the step in {tuple(ranks)}"
        assert each.mesh.has_attention(rank) or not parts[rank].inputs, f"rank {rank} holds experts and was given work"
    weights = {rank: each.weights for rank, each in ranks.items()}
    assert len(set(weights.values())) == 1, f"ranks of one exchange have different weights: {weights}"
    slots = {rank: None if each.held is None else each.held.tolist() for rank, each in ranks.items()}
    for rank, each in ranks.items():
        assert each.mesh is not None
        assert each.routes is not None
        for layer, routes in enumerate(each.routes.tolist()):
            for expert, route in enumerate(routes):
                if route < 0:
                    continue
                holder, slot = divmod(route, each.mesh.slots)
                there = slots[each.mesh.expert_ranks[holder]]
                held = -1 if there is None else there[layer][slot]
                assert held == expert, f"rank {rank} sends expert {expert} of layer {layer} to a slot with {held}"
