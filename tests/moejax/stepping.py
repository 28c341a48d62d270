"""Runs step programs over meshes inside this process, through the same inputs the server sends."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax import steps
from moejax.cache import Cache, empty_cache
from moejax.config import ModelConfig
from moejax.inputs import Bucket, idle
from moejax.mesh import make_mesh
from moejax.model import StepShape
from moejax.params import Params
from serving.batch import Batch, Work, assemble
from serving.batch import Bucket as Shape

PAGE, PAGES, MAX_PAGES = 32, 16, 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one step, over all ranks: sampled tokens and log-probabilities `[n*Z]`, `new_kv`, `expert_load`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    new_kv: Cache
    hidden: np.ndarray
    expert_load: np.ndarray


@dataclasses.dataclass
class Stepper:
    """A model on `ranks` devices with `slots` on each; `table[physical slot]` names the expert, on every layer."""

    cfg: ModelConfig
    params: Params
    ranks: int
    slots: int
    table: np.ndarray

    def __post_init__(self) -> None:
        self.mesh = make_mesh(jax.devices()[: self.ranks])
        shape = self._shape(Shape(2, 0))
        spec = steps.partition(shape)
        experts = steps.with_experts(self.params, lambda leaf: leaf[:, self.table])
        self._params = jax.tree.map(lambda leaf, s: jax.device_put(leaf, self._on(s)), experts, spec.params)
        self._routes = jax.device_put(self._preferred(), self._on(spec.expert_to_slot))
        self.cache = jax.device_put(empty_cache(self.cfg, self.ranks * PAGE * PAGES), self._on(steps.SLOTS))

    def run(self, bucket: Shape, work: dict[int, tuple[Work, ...]], *, all_read: bool = True) -> Outcome:
        """One step and its commit. Unless `all_read`, rows have a hidden state where the server reads it."""
        batch = Batch(0, 0, bucket, {rank: work.get(rank, ()) for rank in range(self.ranks)})
        shape = self._shape(bucket)
        parts = packed_parts(batch, shape.bucket, all_read=all_read)
        packed = jax.device_put(np.concatenate(parts), self._on(steps.partition(shape).packed))
        arguments = steps.StepArguments(
            params=self._params, cache=self.cache, expert_to_slot=self._routes, packed=packed
        )
        outputs = steps.run_step(arguments, shape=shape, mesh=self.mesh)
        new_kv, hidden = jax.tree.map(np.asarray, outputs.new_kv), np.asarray(outputs.hidden)
        self.cache = self._committed(shape.bucket, new_kv, parts)
        sampled = [
            steps.run_sample(self.params.logits, rows, part, bucket=shape.bucket)
            for rows, part in zip(np.split(hidden, self.ranks), parts, strict=True)
        ]
        tokens, logprobs = (np.concatenate(each) for each in zip(*sampled, strict=True))
        return Outcome(tokens, logprobs, new_kv, hidden, np.asarray(outputs.expert_load))

    def segment(self, outputs: Outcome, bucket: Shape, rank: int, segment: int) -> tuple[int, float]:
        """Token and log-probability of one segment of a rank."""
        at = rank * bucket.segments + segment
        return int(outputs.tokens[at]), float(outputs.logprobs[at])

    def logits(self, outputs: Outcome, bucket: Shape, rank: int, first: int, count: int) -> np.ndarray:
        """Logits of some rows of a rank, [rows, V]."""
        at = rank * bucket.rows + first
        head = self.params.logits
        return outputs.hidden[at : at + count] @ head.weight.T + (0 if head.bias is None else head.bias)

    def rows(self, outputs: Outcome, bucket: Shape, rank: int, first: int, count: int) -> np.ndarray:
        """New keys and values of some rows of a rank, next to each other [L, rows, widths]."""
        at = rank * bucket.rows + first
        return np.concatenate([a[:, at : at + count] for a in (outputs.new_kv.k, outputs.new_kv.v)], axis=-1)

    def _committed(self, bucket: Bucket, new: Cache, parts: list[np.ndarray]) -> Cache:
        halves = []
        for rank, packed in enumerate(parts):
            mine = jax.tree.map(lambda a, r=rank: a[:, r * bucket.rows : (r + 1) * bucket.rows], new)
            before = jax.tree.map(
                lambda a, r=rank: np.array(np.asarray(a)[:, r * PAGE * PAGES : (r + 1) * PAGE * PAGES]), self.cache
            )
            halves.append(steps.run_commit(jax.device_put(before), mine, packed, bucket=bucket))
        whole = jax.tree.map(lambda *parts: np.concatenate([np.asarray(p) for p in parts], axis=1), *halves)
        return jax.device_put(whole, self._on(steps.SLOTS))

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
        static = Bucket(decode=bucket.decode, tiles=bucket.tiles, max_pages=MAX_PAGES)
        return StepShape(cfg=self.cfg, bucket=static, ranks=self.ranks, slots=self.slots, page_size=PAGE)

    def _on(self, spec: jax.sharding.PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def packed_parts(batch: Batch, bucket: Bucket, *, all_read: bool) -> list[np.ndarray]:
    """The packed inputs of every rank of a batch; of all rows the hidden state is read, or as the server has it."""

    def packed(rank: int) -> np.ndarray:
        arrays = assemble(batch, rank, page_size=PAGE, max_pages=MAX_PAGES)
        if all_read:
            arrays["read"] = (arrays["positions"] >= 0).astype(np.int32)
        return np.concatenate([array.reshape(-1).view(np.int32) for array in arrays.values()])

    return [packed(rank) if batch.work[rank] else idle(bucket) for rank in sorted(batch.work)]


def work(tokens: list[int], start: int, pages: tuple[int, ...], **fields: Any) -> Work:
    """Work on these tokens at positions from `start`, sampling the next one greedily unless told otherwise."""
    values = {"samples": True, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | fields
    return Work(request_id="r", start=start, tokens=tuple(tokens), pages=pages, **values)
