"""The front's work for a step, for its messages to all ranks and for watching them, by the number of ranks.

The constants (`configs/front.json`) are fitted by `python -m benchmarks.scale --fit FILE` to measurements of a real
front on simulated ranks, for the messages of two models; docs/scale.md has the measurements and what they leave out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil, inf
from typing import Any

from planner.cost.throughput import Candidate
from planner.inputs.cluster import Cluster
from planner.inputs.shipped import shipped
from planner.inputs.workload import Workload
from planner.plan.shape import Shape
from planner.solver.shapes import memory_budget, rest_bytes

MOST_RANKS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CostCurve:
    """Seconds for n ranks: `fixed + each * n + pair * n * n`."""

    fixed: float = 0.0
    each: float = 0.0
    pair: float = 0.0

    def at(self, n: int) -> float:
        """Seconds for `n` ranks."""
        return self.fixed + self.each * n + self.pair * n * n


@dataclass(frozen=True, kw_only=True)
class FrontCost:
    """Seconds of the front's core: for a step (and `row` for each token of it), for messages to all ranks to abort, to
    prepare a mesh and to adopt a plan, for receiving one heartbeat (`beat`), and for one check of a rank (`look`).

    A rank sends a heartbeat every `beat_s`, and is checked every `look_s`; each of more than `many_ranks` every
    `look_many_s`. The intervals are those of the front that was measured; without constants it watches nothing.
    """

    step: CostCurve = CostCurve()
    row: float = 0.0
    abort: CostCurve = CostCurve()
    prepare: CostCurve = CostCurve()
    adopt: CostCurve = CostCurve()
    beat: float = 0.0
    look: float = 0.0
    beat_s: float = inf
    look_s: float = inf
    look_many_s: float = inf
    many_ranks: int = 0

    @classmethod
    def measured(cls, workload: Workload) -> FrontCost:
        """The front as it was measured, with messages of this model's size.

        Their size follows the (layer, expert) pairs, which routes and router counts name: each constant is the line
        through its two measurements. Where the larger model's is the lower, which is the error of measurement, that
        one holds for all larger models.
        """
        small, large = measured_fronts()
        pairs = workload.moe_layers * workload.experts
        at = max(0.0, (pairs - small.pairs) / (large.pairs - small.pairs))
        return from_constants(_between(small.constants, large.constants, at))

    def unwatched(self) -> FrontCost:
        """The front as if watching ranks took no time."""
        return replace(self, beat=0.0, look=0.0)

    def watch_share(self, n: int) -> float:
        """The share of the core that watching `n` ranks takes, without any step."""
        look_s = self.look_s if n <= self.many_ranks else self.look_many_s
        return n * (self.beat / self.beat_s + self.look / look_s)

    def busy(self, n: int, work: float) -> float:
        """Seconds that `work` takes while the core also watches `n` ranks; infinite when watching takes all of it."""
        left = 1 - self.watch_share(n)
        return work / left if left > 0 else inf

    def step_seconds(self, n: int, rows: float) -> float:
        """Seconds to make a step of `rows` tokens on `n` ranks, send it, and receive its results."""
        return self.busy(n, self.step.at(n) + self.row * rows)

    def preparing(self, n: int, losses: int) -> float:
        """Seconds until about `n` ranks have loaded and then connected the mesh of each of `losses` losses."""
        return self.busy(n, 2 * losses * self.prepare.at(n))


@dataclass(frozen=True, kw_only=True)
class MeasuredFront:
    """The constants of a front whose messages are those of a model with `pairs` (layer, expert) pairs."""

    model: str
    pairs: int
    constants: Mapping[str, Any]


@cache
def measured_fronts() -> tuple[MeasuredFront, MeasuredFront]:
    """The shipped measurements: of a small model, then of a large one."""
    data = json.loads(shipped("configs/front.json").read_text())
    small, large = sorted((MeasuredFront(**row) for row in data["fronts"]), key=lambda each: each.pairs)
    return small, large


def from_constants(constants: Mapping[str, Any]) -> FrontCost:
    """A front from its constants, as JSON has them."""
    values: dict[str, Any] = {
        name: CostCurve(**value) if isinstance(value, Mapping) else value for name, value in constants.items()
    }
    return FrontCost(**values)


def constants_of(front: FrontCost) -> dict[str, Any]:
    """The constants of a front for JSON."""
    return asdict(front)


def _between(small: Any, large: Any, at: float) -> Any:
    """Constants on the line through `small` (at 0) and `large` (at 1)."""
    if isinstance(small, Mapping):
        return {name: _between(small[name], large[name], at) for name in small}
    return small + (large - small) * (at if large >= small else min(at, 1.0))


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Whether one front can pace a plan: its seconds for a step beside those of the ranks.

    `requests` run on all `ranks` ranks together. `watching` is the share of the front's core that watching them takes.
    `most_ranks` is the largest number of ranks, with as many requests on each, that one front paces, and
    `fewest_ranks` the number on which the model fits at all (0 where that is not known).
    """

    ranks: int
    requests: int
    ranks_step: float
    front_step: float
    watching: float
    most_ranks: int
    fewest_ranks: int = 0

    @property
    def fronts(self) -> int:
        """The number of fronts that would pace all ranks, each of a server of its own with at most `most_ranks` of
        them; 0 where no server of so few ranks holds the model. Edges of a server hold the connections of clients, and
        add nothing to its step."""
        if not self.most_ranks or self.most_ranks < self.fewest_ranks:
            return 0
        return ceil(self.ranks / self.most_ranks)

    @property
    def kept(self) -> bool:
        """True when the front makes the next step in the time of one."""
        return self.front_step <= self.ranks_step

    def to_dict(self) -> dict:
        """For JSON: infinite seconds, of a front that only watches, are None."""
        seconds = self.front_step if self.front_step < inf else None
        return {**asdict(self), "front_step": seconds, "kept": self.kept, "fronts": self.fronts}


def pace_of(workload: Workload, best: Candidate, cluster: Cluster) -> Pace | None:
    """The pace of one front for the requests of a prediction on a cluster; None where no step was predicted."""
    if best.step is None:
        return None
    requests = best.requests_per_group * best.shape.data
    kept = pace(FrontCost.measured(workload), len(best.shape.roles), requests, best.step.total)
    return replace(kept, fewest_ranks=fewest_ranks(workload, cluster, best.shape))


def fewest_ranks(workload: Workload, cluster: Cluster, shape: Shape) -> int:
    """The fewest ranks on which the model fits with groups as wide as those of `shape`, each with a page of the cache;
    0 where not even a rank's share of the weights beside the experts does."""
    room = memory_budget(cluster)
    left = None if room is None else room - rest_bytes(workload, shape.tensor, shape.dense) - workload.page_bytes
    if left is not None and left < 0:
        return 0
    groups = max(shape.tensor, shape.dense)
    if left is None or not workload.experts:
        return groups
    slots = min(workload.experts, left // workload.slot_bytes)
    return groups * ceil(workload.experts / slots / groups) if slots else 0


def pace(front: FrontCost, ranks: int, requests: int, ranks_step: float) -> Pace:
    """The pace of one front for `requests` requests on `ranks` ranks whose step takes `ranks_step` seconds."""
    each = requests / ranks
    return Pace(
        ranks=ranks,
        requests=requests,
        ranks_step=ranks_step,
        front_step=front.step_seconds(ranks, requests),
        watching=front.watch_share(ranks),
        most_ranks=most_ranks(lambda n: front.step_seconds(n, n * each) <= ranks_step),
    )


def most_ranks(fits: Callable[[int], bool], most: int = MOST_RANKS) -> int:
    """The largest number of ranks up to `most` for which `fits`, false from some number on; 0 if none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
