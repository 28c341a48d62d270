"""Attention ranks and expert ranks inside this process: a thread each, which exchange at a barrier."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.config.kv_cache import empty_cache
from moejax.config.model_config import ModelConfig
from moejax.config.params import Params, expert_positions, map_experts
from moejax.config.step_inputs import Bucket
from moejax.model.decoder import StepOutputs
from moejax.runtime import steps
from moejax.runtime.programs import Lowering, ModelShape
from moejax.runtime.role_programs import AttentionStep, ExpertStep
from serving.engine.batch import Batch, ScheduledRequest
from serving.engine.batch import StepBucket as Shape
from tests.support.stepping import MAX_PAGES, PAGE, PAGES, packed_parts


class RoleStepper:
    """A model on `attention` ranks and on expert ranks with `slots` each; `table[physical slot]` names the expert."""

    def __init__(self, cfg: ModelConfig, params: Params, attention: int, slots: int, table: np.ndarray) -> None:
        self.cfg, self.params, self.table = cfg, params, table
        self.attention, self.slots, self.ranks = attention, slots, attention + len(table) // slots
        self.caches = [empty_cache(cfg, PAGE * PAGES) for _ in range(attention)]
        self._programs: dict[str, Callable[..., Any]] = {}
        self._compiling = threading.Lock()
        self._boxes: dict[int, np.ndarray] = {}
        self._barrier = threading.Barrier(self.ranks, timeout=120)

    def run(
        self, bucket: Shape, work: dict[int, tuple[ScheduledRequest, ...]], *, all_read: bool = True
    ) -> list[StepOutputs]:
        """One step and its commit: the outputs of each attention rank. `all_read` as in `Stepper.run`."""
        static = Bucket(decode=bucket.decode, tiles=bucket.tiles, max_pages=MAX_PAGES)
        shape = ModelShape(cfg=self.cfg, buckets=(static,), page_size=PAGE, pages=PAGES)
        roles = shape.roles(static, self.ranks, self.slots, self.attention)
        me = jax.devices()[0]
        batch = Batch(0, 0, bucket, {rank: work.get(rank, ()) for rank in range(self.attention)})
        parts = packed_parts(batch, static, all_read=all_read)

        def one(rank: int) -> StepOutputs | None:
            run = AttentionStep if rank < self.attention else ExpertStep
            return run(shape, roles, me, lambda outbox: self._exchange(rank, outbox), self._load).run(
                self._own(rank, parts)
            )

        with concurrent.futures.ThreadPoolExecutor(self.ranks) as pool:
            outputs = list(pool.map(one, range(self.ranks)))[: self.attention]
        for rank, made in enumerate(outputs):
            self.caches[rank] = steps.run_commit(
                jax.device_put(self.caches[rank]), made.new_kv, parts[rank], bucket=static
            )
        return outputs

    def _load(self, lowering: Lowering) -> Callable[..., Any]:
        name, lower = lowering
        with self._compiling:
            if name not in self._programs:
                self._programs[name] = lower().compile()
            return self._programs[name]

    def _own(self, rank: int, parts: list[np.ndarray]) -> steps.RoleArguments:
        if rank < self.attention:
            routes = np.full((self.cfg.n_moe_layers, self.cfg.moe.experts), -1, np.int32)
            for expert in range(self.cfg.moe.experts):
                where = np.flatnonzero(self.table == expert)
                if len(where):
                    routes[:, expert] = where[rank % len(where)]
            common = map_experts(self.params, lambda _: None)
            return steps.RoleArguments(
                params=common, cache=self.caches[rank], routes=routes, experts=None, packed=parts[rank]
            )
        first = (rank - self.attention) * self.slots
        here = self.table[first : first + self.slots]
        experts = {
            (i, j): jax.tree.map(lambda leaf: leaf[:, here], self.params.segments[i][j].moe.experts)
            for i, j in expert_positions(self.cfg)
        }
        return steps.RoleArguments(params=None, cache=None, routes=None, experts=experts, packed=None)

    def _exchange(self, rank: int, outbox: jax.Array) -> np.ndarray:
        self._boxes[rank] = np.asarray(outbox)
        self._barrier.wait()
        inbox = np.stack([self._boxes[other][rank] for other in range(self.ranks)])
        self._barrier.wait()
        return inbox
