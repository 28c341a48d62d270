"""What the steps have told since the start: how many there were, what they took, and how each rank did in them."""

import collections
from collections.abc import Mapping

import numpy as np

from planner.buckets import Want
from planner.plan import Plan
from serving.batch import Batch
from serving.config import Settings
from serving.proto.moejax.v1 import link_pb2
from serving.slowness import Paces, SlownessSettings, Verdict, judge
from serving.status import ModelInfo


class Tally:
    """Counts of one server's steps. Times are in milliseconds, moments of the monotonic clock."""

    def __init__(self, settings: Settings, model: ModelInfo) -> None:
        self.steps = 0
        self.step_ms = 0.0
        """From making a step, or the end of the one before it if that was later, to having delivered its tokens."""
        self.rows = 0
        self.rows_filled = 0
        """Rows that steps computed on all ranks, and of these, those that were not padding."""
        self.wanted: dict[tuple[int, int], Want] = {}
        """What steps wanted since it was last taken from here."""
        self.expert_load = np.zeros((model.moe_layers, model.experts), np.int64)
        self.last_ms: dict[int, float] = {}
        """Of each rank, inside the compiled programs of its last step."""
        self.compiles: dict[int, int] = {}
        """Of the processes of the ranks that serve."""
        self._compiles_before: dict[int, int] = {}
        self._program_ms: dict[int, float] = collections.defaultdict(float)
        self._rank_ms: dict[int, float] = collections.defaultdict(float)
        self._settings = SlownessSettings(block_steps=settings.slow_block_steps, factor=settings.slow_factor)
        self._paces = Paces()
        self._own_ms: dict[int, float] = {}
        self._block = 0
        self._ended_at = 0.0

    @property
    def program_ms(self) -> float:
        """Inside the compiled programs, on the rank that spent most."""
        return max(self._program_ms.values(), default=0.0)

    @property
    def rank_ms(self) -> float:
        """From having a step to its results, on the rank that spent most."""
        return max(self._rank_ms.values(), default=0.0)

    @property
    def compiles_since(self) -> int:
        """By the ranks that serve, since each came."""
        return sum(n - self._compiles_before[rank] for rank, n in self.compiles.items())

    @property
    def slowness(self) -> Mapping[int, float]:
        """Each rank's own time over the median of the others', of late."""
        return self._paces.slowness

    def take_plan(self, compiles: Mapping[int, int]) -> None:
        """These ranks serve from now on; so many compiles they had when they came."""
        self.compiles = {rank: n for rank, n in self.compiles.items() if rank in compiles}
        for rank, n in compiles.items():
            if rank not in self.compiles:
                self.compiles[rank] = self._compiles_before[rank] = n
        self._own_ms, self._block = {}, 0

    def forget(self, rank: int) -> None:
        """The rank is another process now."""
        self.compiles.pop(rank, None)

    def answered(self, rank: int, answer: link_pb2.StepDone) -> None:
        """A rank's answer to a step."""
        self.compiles[rank] = answer.compiles
        self.last_ms[rank] = answer.program_ms
        self._own_ms[rank] = self._own_ms.get(rank, 0.0) + answer.own_ms
        self._program_ms[rank] += answer.program_ms
        self._rank_ms[rank] += answer.total_ms
        if answer.expert_load:
            self.expert_load += np.frombuffer(answer.expert_load, np.int32).reshape(self.expert_load.shape)

    def stepped(self, batch: Batch, began: float, now: float) -> float:
        """A step made at `began` is done; returns the seconds it took."""
        took, self._ended_at = now - max(began, self._ended_at), now
        self.steps += 1
        self.rows += batch.rows
        self.rows_filled += batch.filled
        want, one = batch.wanted, Want(1, len(batch.work), batch.filled)
        self.wanted[want] = one + self.wanted[want] if want in self.wanted else one
        self.step_ms += 1e3 * took
        return took

    def take_wanted(self) -> dict[tuple[int, int], Want]:
        """What steps wanted since this was last asked."""
        taken, self.wanted = self.wanted, {}
        return taken

    def judge(self, now: float, plan: Plan | None) -> dict[int, Verdict]:
        """Once in a block of steps: who is slow, and for so long that it should go."""
        self._block += 1
        if self._block < self._settings.block_steps:
            return {}
        roles = {place.id: place.role for place in plan.ranks} if plan is not None else {}
        self._paces, verdicts = judge(self._paces, self._own_ms, now, self._settings, roles)
        self._own_ms, self._block = {}, 0
        return verdicts
