"""A model of step time and recovery time against the number of ranks of one front.

The ranks' part of a step is `planner.cost.roofline`, the front's is `planner.cost.front`, a recovery is that of
`planner.cost.recovery_model`. This module puts them side by side for one rank lost of an even placement, without making
a plan, and adds ranks that share the cores of one machine. All times are in seconds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil

from planner.cost.front import FrontCost
from planner.cost.recovery_model import RecoveryModel, store_seconds
from planner.cost.roofline import StepTime
from planner.inputs.cluster import Cluster
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.workload import Workload
from planner.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class ScaledStep:
    """The seconds of a step: the ranks' part and the front's part."""

    ranks: StepTime
    front: float

    @property
    def ahead(self) -> float:
        """Seconds from token to token while the front makes the next step during one: the slower part sets the pace."""
        return max(self.ranks.total, self.front)

    @property
    def in_turn(self) -> float:
        """Seconds from token to token when the next step waits for the results of the one before."""
        return self.ranks.total + self.front

    @property
    def share(self) -> float:
        """The front's part divided by the ranks' part."""
        return self.front / self.ranks.total


@dataclass(frozen=True, kw_only=True)
class ScaledRecovery:
    """Seconds of a recovery by phase. `*_messages` is the front's part, the others are the ranks' part."""

    detect: float
    abort: float
    abort_messages: float
    adopt: float
    adopt_messages: float
    weights: float
    resume: float
    replay: float

    @property
    def stall(self) -> float:
        """Seconds that streams of surviving ranks wait: all phases but the replay."""
        return self.moved_stall - self.replay

    @property
    def moved_stall(self) -> float:
        """Seconds that streams of the dead rank wait."""
        return sum(asdict(self).values())


def scaled_recovery(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    front: FrontCost,
    recovery: RecoveryTimes,
    *,
    step: float,
    requests: float = 0.0,
    prefill: float = 0.0,
) -> ScaledRecovery:
    """The recovery from the loss of one rank of `shape` with `requests` running, each recomputed in `prefill` seconds.

    A step takes `step` seconds. `recovery` are the phases of a server so small that the front's messages take no time.
    """
    left = len(shape.roles) - 1
    model = RecoveryModel(times=recovery, front=front)
    rounds = ceil(requests / max(1, shape.data - 1))
    return ScaledRecovery(
        detect=recovery.detect,
        abort=recovery.abort,
        abort_messages=model.abort_messages(left),
        adopt=recovery.adopt,
        adopt_messages=model.adopt_messages(left),
        weights=weights_seconds(workload, cluster, shape),
        resume=step,
        replay=rounds * prefill,
    )


def lost_experts(workload: Workload, shape: Shape) -> int:
    """(layer, expert) pairs that the loss of one rank leaves without a copy, when copies are spread evenly."""
    if not workload.experts:
        return 0
    spare = shape.expert_rank_count * shape.slots - workload.experts
    single = max(0.0, 1 - spare / workload.experts)
    return ceil(single * workload.experts / shape.expert_rank_count) * workload.moe_layers


def weights_seconds(workload: Workload, cluster: Cluster, shape: Shape) -> float:
    """Seconds until the survivors of one loss have read, in equal parts, the experts without a copy from the store."""
    lost, hardware = lost_experts(workload, shape), cluster.hardware
    if not lost or shape.expert_rank_count < 2:
        return 0.0
    rank = ceil(lost / (shape.expert_rank_count - 1))
    host = min(lost, rank * cluster.per_host)
    return store_seconds(hardware, *(count * workload.expert_bytes for count in (rank, host, lost)))


def shared_step(step: StepTime, front: float, beside: float, ranks: int, cores: int, *, factor: float = 1.0) -> float:
    """Seconds from token to token of `ranks` ranks that share `cores` cores with their front and with other work.

    `beside` are the seconds of other work of the machine for a step. All of a rank's step but the exchange is work of a
    core, times `factor`; the front works while the ranks run.
    """
    work = factor * (step.total - step.exchange)
    spread = (ranks * work + front + beside) / cores
    alone = work if ranks > 1 else work / cores  # a rank that is alone computes on all cores
    return max(alone, spread) + step.exchange


def shared_recovery(small: float, rounds: float, step: float, survivors: int, cores: int) -> float:
    """Seconds from the detection of a loss to the end of the first step after it.

    `small` are the seconds that a survivor needs with a core of its own, `rounds` those of the front's messages, `step`
    those of the first step.
    """
    return small * max(1.0, survivors / cores) + rounds + step
