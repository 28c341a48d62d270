"""Step time and recovery time against the number of ranks, with the one front that tells them all what to do.

What ranks need for a step is `planner.cost`; what a recovery needs whatever its size is `planner.recovery`. Added here
is what grows with the ranks: the front's work for a step, for messages to all ranks and for watching them
(`Front`, measured by `python -m benchmarks.scale`), and ranks that share the cores of one machine. All in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, inf

from planner.cluster import Cluster
from planner.cost import StepTime
from planner.recovery import Recovery
from planner.shape import Shape
from planner.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Line:
    """Seconds for n ranks: `fixed + each * n + pair * n * n`."""

    fixed: float = 0.0
    each: float = 0.0
    pair: float = 0.0

    def at(self, n: int) -> float:
        """Seconds for `n` ranks."""
        return self.fixed + self.each * n + self.pair * n * n


@dataclass(frozen=True, kw_only=True)
class Front:
    """What a front's core spends: on a step (`row` for each token of it besides), on telling all ranks to abort, to
    prepare a mesh and to adopt a plan, on hearing a heartbeat, and on looking once at a rank. A rank's heart beats each
    `beat_s`, and it is looked at each `look_s`."""

    step: Line = Line()
    row: float = 0.0
    abort: Line = Line()
    prepare: Line = Line()
    adopt: Line = Line()
    beat: float = 0.0
    look: float = 0.0
    beat_s: float = 0.05
    look_s: float = 0.01

    def standing(self, n: int) -> float:
        """The part of a core that `n` ranks take without any step."""
        return n * (self.beat / self.beat_s + self.look / self.look_s)

    def busy(self, n: int, work: float) -> float:
        """Seconds that `work` takes beside what `n` ranks take anyway; infinite when they take all."""
        left = 1 - self.standing(n)
        return work / left if left > 0 else inf

    def step_seconds(self, n: int, rows: float) -> float:
        """For making a step of `rows` tokens on `n` ranks, sending it, and taking in its results."""
        return self.busy(n, self.step.at(n) + self.row * rows)

    def preparing(self, n: int, losses: int) -> float:
        """For having the mesh of each of so many losses loaded, then connected, by about `n` ranks."""
        return self.busy(n, 2 * losses * self.prepare.at(n))


@dataclass(frozen=True, kw_only=True)
class ScaledStep:
    """A step: what the ranks need, and what the front needs."""

    ranks: StepTime
    front: float

    @property
    def ahead(self) -> float:
        """Seconds from token to token when the next step is made while one runs: the slower of both sets the pace."""
        return max(self.ranks.total, self.front)

    @property
    def in_turn(self) -> float:
        """Seconds from token to token when the next step waits for the results of the one before."""
        return self.ranks.total + self.front

    @property
    def share(self) -> float:
        """The front's part over the ranks'."""
        return self.front / self.ranks.total


@dataclass(frozen=True, kw_only=True)
class RecoveryTime:
    """Seconds of a recovery by phase. `*_messages` are the front's rounds to all ranks, the others what ranks need."""

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
        """What streams of surviving ranks wait: all but the replay."""
        return self.moved_stall - self.replay

    @property
    def moved_stall(self) -> float:
        """What streams of the dead rank wait."""
        return sum(asdict(self).values())


def recovery_time(
    workload: Workload,
    cluster: Cluster,
    shape: Shape,
    front: Front,
    recovery: Recovery,
    *,
    step: float,
    requests: float = 0.0,
    prefill: float = 0.0,
) -> RecoveryTime:
    """The loss of one rank of `shape`, on which `requests` ran, each of which takes `prefill` to be computed again on
    its new rank; a step takes `step`. `recovery` is that of a server so small that the front's rounds do not show."""
    left = len(shape.roles) - 1
    rounds = ceil(requests / max(1, shape.data - 1))
    return RecoveryTime(
        detect=recovery.detect,
        abort=recovery.abort,
        abort_messages=front.busy(left, front.abort.at(left)),
        adopt=recovery.adopt,
        adopt_messages=front.busy(left, front.adopt.at(left)),
        weights=weights_seconds(workload, cluster, shape),
        resume=step,
        replay=rounds * prefill,
    )


def lost_experts(workload: Workload, shape: Shape) -> int:
    """(layer, expert) pairs that the loss of one rank leaves without a copy, when copies are spread evenly."""
    if not workload.experts:
        return 0
    spare = shape.holders * shape.slots - workload.experts
    single = max(0.0, 1 - spare / workload.experts)
    return ceil(single * workload.experts / shape.holders) * workload.moe_layers


def weights_seconds(workload: Workload, cluster: Cluster, shape: Shape) -> float:
    """Seconds in which the survivors of one loss read the experts that have no copy left from their hosts' stores,
    each as many as the others."""
    lost, hardware = lost_experts(workload, shape), cluster.hardware
    if not lost or shape.holders < 2:
        return 0.0
    rank = ceil(lost / (shape.holders - 1))
    host = min(lost, rank * cluster.per_host)
    seconds = max(rank / hardware.host_to_device_bandwidth, host / hardware.store_bandwidth)
    return seconds * workload.expert_bytes


def shared_step(step: StepTime, front: float, beside: float, ranks: int, cores: int, *, factor: float = 1.0) -> float:
    """Seconds from token to token of `ranks` ranks that share `cores` cores with their front and with `beside`, what
    else the machine does for a step. Of a rank's step all but the exchange is work of a core, times `factor`; the
    front's is done while the ranks run."""
    work = factor * (step.total - step.exchange)
    spread = (ranks * work + front + beside) / cores
    alone = work if ranks > 1 else work / cores  # a rank that is alone computes on all cores
    return max(alone, spread) + step.exchange


def shared_recovery(small: float, rounds: float, step: float, survivors: int, cores: int) -> float:
    """Seconds until the first step after a loss is in, detection aside. `small` is what a survivor needs with a core of
    its own, `rounds` the front's messages, `step` that first step."""
    return small * max(1.0, survivors / cores) + rounds + step


def most_ranks(fits: Callable[[int], bool], most: int = 1 << 20) -> int:
    """The largest number of ranks up to `most` that `fits`, which holds up to some number and not beyond; 0 when one
    is too many already."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
