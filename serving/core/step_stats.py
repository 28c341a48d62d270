"""Counts and durations of steps since the start, in total and by rank; and which ranks are slow."""

import collections
from collections.abc import Mapping

import numpy as np

from planner.cost.buckets import StepDemand
from planner.plan.plan import Plan
from serving.config import DetectionSettings
from serving.engine.batch import Batch
from serving.executor.host_steps import HostAnswer
from serving.executor.straggler_detector import StragglerSettings, StragglerState, Verdict, judge
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import ModelInfo


class StepStats:
    """Statistics of one server's steps. Durations are in milliseconds, moments in seconds of the monotonic clock."""

    def __init__(self, settings: DetectionSettings, model: ModelInfo) -> None:
        self.steps = 0
        self.step_ms = 0.0
        """Total of all steps: each from its scheduling, or from the end of the step before it if that is later, until
        its tokens are sent."""
        self.rows = 0
        self.rows_filled = 0
        """Rows that steps computed on all ranks, and the number of these that were not padding."""
        self.demand: dict[tuple[int, int], StepDemand] = {}
        """By smallest sufficient step shape (rows, tiles): the steps since the last `take_demand`."""
        self.expert_load = np.zeros((model.moe_layers, model.experts), np.int64)
        self.last_ms: dict[int, float] = {}
        """By rank, the time inside the compiled programs in its last step."""
        self.compiles: dict[int, int] = {}
        """By rank of the plan, the number of compilations in its process."""
        self._compiles_before: dict[int, int] = {}
        self._program_ms: dict[int, float] = collections.defaultdict(float)
        self._rank_ms: dict[int, float] = collections.defaultdict(float)
        self._settings = StragglerSettings(block_steps=settings.slow_block_steps, factor=settings.slow_factor)
        self._stragglers = StragglerState()
        self._own_ms: dict[int, float] = {}
        self._block = 0
        self._ended_at = 0.0

    @property
    def program_ms(self) -> float:
        """Total time inside the compiled programs, of the rank with most."""
        return max(self._program_ms.values(), default=0.0)

    @property
    def rank_ms(self) -> float:
        """Total time from receiving a step to its results, of the rank with most."""
        return max(self._rank_ms.values(), default=0.0)

    @property
    def compiles_after_start(self) -> int:
        """Number of compilations in the ranks of the plan since each became part of it."""
        return sum(n - self._compiles_before[rank] for rank, n in self.compiles.items())

    @property
    def slowness(self) -> Mapping[int, float]:
        """By rank, its own time in the last block over the median of the others."""
        return self._stragglers.slowness

    def begin_plan(self, compiles: Mapping[int, int]) -> None:
        """A plan has come into force. `compiles`: by rank of the plan, the compilations in its process so far."""
        self.compiles = {rank: n for rank, n in self.compiles.items() if rank in compiles}
        for rank, n in compiles.items():
            if rank not in self.compiles:
                self.compiles[rank] = self._compiles_before[rank] = n
        self._own_ms, self._block = {}, 0

    def forget_rank(self, rank: int) -> None:
        """A rank has a new process: its compilations count from the next plan on."""
        self.compiles.pop(rank, None)

    def record_rank(self, rank: int, answer: link_pb2.StepDone) -> None:
        """Take in what a rank reported of a step."""
        self.compiles[rank] = answer.compiles
        self.last_ms[rank] = answer.program_ms
        self._own_ms[rank] = self._own_ms.get(rank, 0.0) + answer.own_ms
        self._program_ms[rank] += answer.program_ms
        self._rank_ms[rank] += answer.total_ms
        if answer.expert_load:
            self.expert_load += np.frombuffer(answer.expert_load, np.int32).reshape(self.expert_load.shape)

    def record_host(self, answer: HostAnswer) -> None:
        """Take in what the ranks of a host reported of a step, but for the counts of their routers."""
        times = np.frombuffer(answer.done.times, np.float32).reshape(-1, 3).tolist()
        own, program, total = self._own_ms, self._program_ms, self._rank_ms
        for rank, compiles, (program_ms, total_ms, own_ms) in zip(
            answer.ranks, answer.done.compiles, times, strict=True
        ):
            self.compiles[rank] = compiles
            self.last_ms[rank] = program_ms
            own[rank] = own.get(rank, 0.0) + own_ms
            program[rank] += program_ms
            total[rank] += total_ms

    def record_expert_load(self, load: bytes) -> None:
        """Take in counts of the routers of a host's ranks, int32 `[moe layers, experts]`."""
        counts = np.frombuffer(load, np.int32)
        if counts.size == self.expert_load.size:
            self.expert_load += counts.reshape(self.expert_load.shape)

    def record_step(self, batch: Batch, began: float, now: float) -> float:
        """Take in a step that was scheduled at `began` and is done `now`; returns its duration in seconds."""
        took, self._ended_at = now - max(began, self._ended_at), now
        self.steps += 1
        self.rows += batch.rows
        self.rows_filled += batch.rows_filled
        want, one = batch.required_bucket, StepDemand(1, len(batch.scheduled), batch.rows_filled)
        self.demand[want] = one + self.demand[want] if want in self.demand else one
        self.step_ms += 1e3 * took
        return took

    def take_demand(self) -> dict[tuple[int, int], StepDemand]:
        """The demand since the last call of this method."""
        taken, self.demand = self.demand, {}
        return taken

    def judge_slowness(self, now: float, plan: Plan | None) -> dict[int, Verdict]:
        """At the end of a block of steps: verdicts on ranks that became slow, recovered, or should be drained. Else
        nothing."""
        self._block += 1
        if self._block < self._settings.block_steps:
            return {}
        roles = {place.id: place.role for place in plan.ranks} if plan is not None else {}
        self._stragglers, verdicts = judge(self._stragglers, self._own_ms, now, self._settings, roles)
        self._own_ms, self._block = {}, 0
        return verdicts
