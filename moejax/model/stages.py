"""The cut of a step of attention ranks and expert ranks: into micro-batches, and at every layer with experts.

    attention  | embed, attend, route | combine, attend, route | ... | combine, last norm
    exchange          rows -> <- answers    rows ->
    expert     |                      | experts                | ...

Large steps are cut into two micro-batches in counter-phase: while attention ranks work on one, expert ranks work on the
other, and each exchange takes rows of the one to the experts and brings answers of the other back.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from moejax.config.model_config import LayerKind, ModelConfig, in_slots
from moejax.config.step_inputs import Bucket
from moejax.model.exchange import Exchange
from moejax.model.step_shape import StepShape
from planner.plan.step_layout import TILE

MIN_ROWS_TO_SPLIT = 32
"""Rows of a step below which two micro-batches cost more than they overlap: each reads all weights."""

MicroBatch = int
"""Number of a micro-batch of a step: 0 or 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolesShape:
    """Everything static about a step of attention ranks and expert ranks.

    The mesh has the attention ranks first; `step.ranks` counts all ranks.
    """

    step: StepShape
    attention: int

    @property
    def experts(self) -> int:
        """Ranks that hold experts."""
        return self.step.ranks - self.attention

    def exchange_of(self, kind: LayerKind) -> Exchange:
        """Sizes of what goes to the expert ranks for a layer of this kind."""
        return dataclasses.replace(self.step.exchange_of(kind), ranks=self.experts)

    @functools.cached_property
    def micro_batches(self) -> tuple[Bucket, ...]:
        """The micro-batches of the step: one, or two halves where both have rows."""
        whole = self.step.bucket
        if whole.rows < MIN_ROWS_TO_SPLIT:
            return (whole,)
        later = dataclasses.replace(whole, decode=whole.decode // 2, tiles=whole.tiles // 2)
        if not later.rows:
            return (whole,)
        return dataclasses.replace(whole, decode=whole.decode - later.decode, tiles=whole.tiles - later.tiles), later

    @property
    def part(self) -> int:
        """Numbers that a rank sends to one other rank in an exchange: rows and the slots they want, or answers."""
        answers, width = self.step.exchange.answers, self.step.cfg.d_model
        return max(each.rows for each in self.micro_batches) * max(width + answers, width * answers)

    @property
    def outbox_bytes(self) -> int:
        """The most bytes that a rank sends at once."""
        return 4 * self.step.ranks * self.part

    @property
    def ticks(self) -> int:
        """Ticks of a step; between two ticks is an exchange.

        In tick t attention ranks compute micro-batch `t % 2` up to MoE layer `t // 2`, and expert ranks answer the rows
        that were sent to them in the tick before.
        """
        return 2 * self.step.cfg.n_moe_layers + len(self.micro_batches)

    def micro_batch_shape(self, micro_batch: MicroBatch) -> StepShape:
        """The shape of the rows of one micro-batch."""
        return dataclasses.replace(self.step, bucket=self.micro_batches[micro_batch])

    def row_indices(self, micro_batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the segments of the step that are in a micro-batch, in its own order."""
        whole, (first, *_) = self.step.bucket, self.micro_batches
        size = self.micro_batches[micro_batch]
        decode = np.arange(size.decode) + (first.decode if micro_batch else 0)
        tiles = np.arange(size.tiles) + (first.tiles if micro_batch else 0)
        rows = whole.decode + TILE * tiles[:, None] + np.arange(TILE)
        return np.concatenate([decode, rows.reshape(-1)]), np.concatenate([decode, whole.decode + tiles])


@dataclasses.dataclass(frozen=True)
class StageLayer:
    """A layer of a stage: its segment, its position in the segment's pattern, and its repeat."""

    segment: int
    position: int
    repeat: int
    relative: bool
    """True when `repeat` is counted from the repeat of the stage's last layer."""

    def kind(self, cfg: ModelConfig) -> LayerKind:
        """The kind of the layer."""
        return cfg.segments[self.segment][0][self.position]

    def depth(self, cfg: ModelConfig, repeat: Any) -> Any:
        """Number of the layer among all, at this repeat of its segment (an int, or an int32 array)."""
        before = sum(len(pattern) * repeats for pattern, repeats in cfg.segments[: self.segment])
        return before + repeat * len(cfg.segments[self.segment][0]) + self.position

    def moe_depth(self, cfg: ModelConfig, repeat: Any) -> Any:
        """Number of the layer among those with experts in slots, at this repeat of its segment."""
        count = lambda kinds: sum(map(in_slots, kinds))  # noqa: E731
        before = sum(count(pattern) * repeats for pattern, repeats in cfg.segments[: self.segment])
        pattern = cfg.segments[self.segment][0]
        return before + repeat * count(pattern) + count(pattern[: self.position])


@dataclasses.dataclass(frozen=True)
class Stage:
    """The layers that attention ranks compute between two exchanges.

    Equal stages are one program; the repeat of its last segment at which a stage stands is an argument. The first stage
    begins with the tokens, each other one with the answers to a layer of kind `after`. The `last` stage ends with the
    last norm, all others with the routing of their last layer.
    """

    layers: tuple[StageLayer, ...]
    after: LayerKind | None
    last: bool


def stages(cfg: ModelConfig) -> tuple[tuple[Stage, int], ...]:
    """The stages of a step, one more than there are MoE layers, and the repeat at which each stands."""
    found: list[tuple[Stage, int]] = []
    layers: list[tuple[int, int, int]] = []
    after: LayerKind | None = None
    for i, (pattern, repeats) in enumerate(cfg.segments):
        for r in range(repeats):
            for j, kind in enumerate(pattern):
                layers.append((i, j, r))
                if in_slots(kind):
                    stage_layers = (StageLayer(a, b, c - r if a == i else c, a == i) for a, b, c in layers)
                    found.append((Stage(tuple(stage_layers), after, False), r))
                    layers, after = [], kind
    rest = tuple(StageLayer(a, b, c, False) for a, b, c in layers)
    return (*found, (Stage(rest, after, True), 0))
