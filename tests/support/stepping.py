"""Runs step programs over meshes inside this process, through the same inputs the server sends."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.config.kv_cache import KVCache, empty_cache
from moejax.config.mesh import make_mesh
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, map_experts
from moejax.config.step_inputs import Bucket, idle_inputs
from moejax.model.step_shape import StepShape
from moejax.model.tensor_parallel import tp_shard_of
from moejax.runtime import steps
from planner.inputs.layer_states import STATE_COPIES
from serving.engine.batch import Batch, ScheduledRequest, prepare_inputs
from serving.engine.batch import StepBucket as Shape
from serving.protocol.sampling import ResolvedSampling

PAGE, PAGES, MAX_PAGES = 32, 16, 8
SLOTS_OF_STATES = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one step over all ranks: `sampled`, tokens and log-probabilities `[n*Z]` when they are asked for,
    `new_kv`, `expert_load`, and with a layer of multi-token prediction its drafts `[n*Z, drafts]`."""

    sampled: Callable[[], tuple[np.ndarray, np.ndarray]]
    new_kv: KVCache
    hidden: np.ndarray
    expert_load: np.ndarray
    drafts: np.ndarray | None = None


@dataclasses.dataclass
class Stepper:
    """A model on `ranks` devices with `slots` on each; `table[physical slot]` names the expert, on every layer."""

    cfg: ModelConfig
    params: Params
    ranks: int
    slots: int
    table: np.ndarray
    groups: tuple[tuple[int, ...], ...] = ()
    """Tensor groups, if `cfg` is that of a tp shard; `params` are those of the whole model."""
    drafts: int = 2
    """Tokens that a layer of multi-token prediction drafts for each request."""

    def __post_init__(self) -> None:
        self.mesh = make_mesh(jax.devices()[: self.ranks])
        shape = self._shape(Shape(2, 0))
        spec = steps.partition(shape)
        experts = map_experts(self.params, lambda leaf: leaf[:, self.table])
        self._params = jax.tree.map(lambda leaf, s: jax.device_put(leaf, self._on(s)), experts, spec.params)
        self._tp_peers = None
        if self.groups:
            self._params = self._with_tp_shards(self._params)
            tp_peers = np.full((self.ranks, self.cfg.tensor), -1, np.int32)
            for group in self.groups:
                tp_peers[list(group)] = group
            self._tp_peers = jax.device_put(tp_peers, self._on(spec.tp_peers))
        self._routes = jax.device_put(self._preferred(), self._on(spec.expert_to_slot))
        cache = empty_cache(self.cfg, self.ranks * self.entries, self.ranks * self.states)
        self.cache = jax.device_put(cache, self._on(steps.SHARDED_AXIS_1))
        self._turns: dict[tuple[int, tuple[int, ...]], list[int]] = {}

    @property
    def entries(self) -> int:
        """Cache entries of a rank."""
        return PAGE * PAGES * self.cfg.tensor

    @property
    def states(self) -> int:
        """States of a rank."""
        return STATE_COPIES * SLOTS_OF_STATES if self.cfg.state_layers else 0

    def run(
        self,
        bucket: Shape,
        work: dict[int, tuple[ScheduledRequest, ...]],
        *,
        all_read: bool = True,
        skip_drafts: bool = False,
    ) -> Outcome:
        """One step and its commit. Unless `all_read`, rows have a hidden state where the server reads it."""
        work = {rank: tuple(self._with_states(rank, each) for each in part) for rank, part in work.items()}
        batch = Batch(0, 0, bucket, {rank: work.get(rank, ()) for rank in range(self.ranks)})
        shape = self._shape(bucket)
        parts = packed_parts(batch, shape.bucket, all_read=all_read)
        packed = jax.device_put(np.concatenate(parts), self._on(steps.partition(shape).packed))
        arguments = steps.StepArguments(
            params=self._params, cache=self.cache, expert_to_slot=self._routes, packed=packed, tp_peers=self._tp_peers
        )
        outputs = steps.run_step(arguments, shape=shape, mesh=self.mesh)
        hidden = np.asarray(outputs.hidden)
        head, rows = self.params.logits, zip(np.split(hidden, self.ranks), parts, strict=True)

        @functools.cache
        def sampled() -> tuple[np.ndarray, np.ndarray]:
            of_ranks = [steps.run_sample(head, mine, part, bucket=shape.bucket) for mine, part in rows]
            tokens, logprobs = (np.concatenate(each) for each in zip(*of_ranks, strict=True))
            return tokens, logprobs

        drafts = None
        if self.cfg.mtp and not skip_drafts:
            chosen = jax.device_put(sampled()[0], self._on(steps.SHARDED))
            made = steps.run_draft(arguments, outputs, chosen, shape=shape, mesh=self.mesh, drafts=self.drafts)
            outputs = dataclasses.replace(outputs, new_kv=made.new_kv, expert_load=made.expert_load)
            drafts = np.asarray(made.drafts)
        new_kv = jax.tree.map(np.asarray, outputs.new_kv)
        written = parts if outputs.group_inputs is None else np.split(np.asarray(outputs.group_inputs), self.ranks)
        self.cache = self._committed(shape.bucket, new_kv, written)
        return Outcome(sampled, new_kv, hidden, np.asarray(outputs.expert_load), drafts)

    def segment(self, outputs: Outcome, bucket: Shape, rank: int, segment: int) -> tuple[int, float]:
        """Token and log-probability of one segment of a rank."""
        at = rank * bucket.segments + segment
        tokens, logprobs = outputs.sampled()
        return int(tokens[at]), float(logprobs[at])

    def logits(self, outputs: Outcome, bucket: Shape, rank: int, first: int, count: int) -> np.ndarray:
        """Logits of some rows of a rank, [rows, V]."""
        at = rank * bucket.rows + first
        head = self.params.logits
        logits = outputs.hidden[at : at + count] @ head.weight.T + (0 if head.bias is None else head.bias)
        return logits if head.cap is None else head.cap * np.tanh(logits / head.cap)

    def rows(self, outputs: Outcome, bucket: Shape, rank: int, first: int, count: int) -> np.ndarray:
        """New keys and values of some rows of a rank, next to each other [L, rows, widths]; of formats with scales the
        numbers as they are held, and the scales."""
        at, leaves = rank * bucket.rows + first, jax.tree.leaves((outputs.new_kv.k, outputs.new_kv.v))
        return np.concatenate([a[:, at : at + count].astype(np.float32) for a in leaves], axis=-1)

    def _with_states(self, rank: int, item: ScheduledRequest) -> ScheduledRequest:
        """The work with its states, in a slot for each rank and page table; from the same start the same states. Work
        that says where its states are has those."""
        if not self.states or item.states is not None:
            return item
        starts = self._turns.setdefault((rank, item.pages), [])
        starts[:] = [start for start in starts if start < item.start]
        slot, turn = [key for key in self._turns if key[0] == rank].index((rank, item.pages)), len(starts)
        starts.append(item.start)
        places = (slot * STATE_COPIES + (turn + later) % STATE_COPIES for later in (0, 1))
        return dataclasses.replace(item, states=tuple(places))

    def _committed(self, bucket: Bucket, new: KVCache, parts: list[np.ndarray]) -> KVCache:
        halves = []
        rows = bucket.rows * self.cfg.tensor
        for rank, packed in enumerate(parts):
            mine = _part(new, rank, rows, bucket.segments)
            before = jax.tree.map(
                np.array, _part(jax.tree.map(np.asarray, self.cache), rank, self.entries, self.states)
            )
            halves.append(steps.run_commit(jax.device_put(before), mine, packed, bucket=bucket))
        whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts], axis=1), *halves)
        return jax.device_put(whole, self._on(steps.SHARDED_AXIS_1))

    def _with_tp_shards(self, params: Params) -> Params:
        """Params with the tp shard of each rank in place of the weights that all ranks would have alike."""
        shares = {r: tp_shard_of(jax.tree.map(np.asarray, self.params), 0, self.cfg) for r in range(self.ranks)}
        for group in self.groups:
            for shard, rank in enumerate(group):
                shares[rank] = tp_shard_of(jax.tree.map(np.asarray, self.params), shard, self.cfg)

        def leaf(whole: jax.Array, *each: np.ndarray) -> jax.Array:
            if not whole.sharding.is_fully_replicated:
                return whole
            here = [jax.device_put(value, device) for value, device in zip(each, self.mesh.devices, strict=True)]
            return jax.make_array_from_single_device_arrays(each[0].shape, whole.sharding, here)

        return jax.tree.map(leaf, params, *shares.values())

    def _preferred(self) -> np.ndarray:
        experts = self.cfg.moe.experts if self.cfg.moe else 0
        routes = np.full((self.ranks, self.cfg.n_moe_layers, experts), -1, np.int32)
        for rank in range(self.ranks):
            for expert in range(experts):
                where = np.flatnonzero(self.table == expert)
                if len(where):
                    routes[rank, :, expert] = where[rank % len(where)]
        return routes

    def _shape(self, bucket: Shape) -> StepShape:
        static = Bucket(
            decode=bucket.decode, tiles=bucket.tiles, max_pages=MAX_PAGES, states=bool(self.cfg.state_layers)
        )
        return StepShape(cfg=self.cfg, bucket=static, ranks=self.ranks, slots=self.slots, page_size=PAGE)

    def _on(self, spec: jax.sharding.PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def _part(cache: KVCache, rank: int, entries: int, states: int) -> KVCache:
    """The part of a rank, which has so many entries and states."""
    k, v = jax.tree.map(lambda a: a[:, rank * entries : (rank + 1) * entries], (cache.k, cache.v))
    return KVCache(k, v, jax.tree.map(lambda a: a[:, rank * states : (rank + 1) * states], cache.states))


def packed_parts(batch: Batch, bucket: Bucket, *, all_read: bool) -> list[np.ndarray]:
    """The packed inputs of every rank of a batch; of all rows the hidden state is read, or as the server has it."""

    def packed(rank: int) -> np.ndarray:
        arrays = prepare_inputs(batch, rank, page_size=PAGE, max_pages=MAX_PAGES)
        if all_read:
            arrays["read"] = (arrays["positions"] >= 0).astype(np.int32)
        return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays.values()])

    return [packed(rank) if batch.scheduled[rank] else idle_inputs(bucket) for rank in sorted(batch.scheduled)]


def work(tokens: list[int], start: int, pages: tuple[int, ...], **fields: Any) -> ScheduledRequest:
    """Work on these tokens at positions from `start`, sampling the next one greedily unless `fields` say otherwise."""
    names = ("samples", "targets", "logits_params", "states", "snapshots")
    own = {name: fields.pop(name) for name in names if name in fields}
    sampling = ResolvedSampling(**{"max_tokens": 1, "seed": 0, "temperature": 0.0} | fields)
    values: dict[str, Any] = {"samples": True} | own
    return ScheduledRequest(request_id="r", start=start, tokens=tuple(tokens), pages=pages, sampling=sampling, **values)
