"""The model of a recovery by the number of ranks, which docs/scale.md describes: one for the planner and the server.

Detection, abort and adoption take what they take on a small server, or what a server has measured. The front's messages
grow with the ranks, weights with the experts lost and with the store they are read from, and streams go on with the
first step.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost.front import FrontCost
from planner.inputs.cluster import Hardware
from planner.inputs.recovery_times import RecoveryTimes
from planner.inputs.workload import Workload

PHASES = ("detect", "abort", "messages", "adopt", "weights", "step")


@dataclass(frozen=True, kw_only=True)
class RecoveryModel:
    """Seconds of the phases of a recovery. Watching ranks is left out: it takes all of one front's core before the
    messages take long, which `planner.cost.front.pace` says."""

    times: RecoveryTimes
    front: FrontCost

    @classmethod
    def of(cls, workload: Workload, times: RecoveryTimes | None = None) -> RecoveryModel:
        """The model with the measured front, and with `times` (None: the estimates)."""
        return cls(times=times or RecoveryTimes(), front=FrontCost.measured(workload).unwatched())

    def abort_messages(self, left: int) -> float:
        """Seconds of the front's messages that abort the step on `left` ranks."""
        return self.front.busy(left, self.front.abort.at(left))

    def adopt_messages(self, left: int) -> float:
        """Seconds of the front's messages that adopt a plan on `left` ranks."""
        return self.front.busy(left, self.front.adopt.at(left))

    def messages(self, left: int) -> float:
        """Seconds of both rounds on `left` ranks, beyond those in phases that were measured."""
        measured = self.times.ranks
        own = self.abort_messages(measured) + self.adopt_messages(measured) if measured else 0.0
        return max(0.0, self.abort_messages(left) + self.adopt_messages(left) - own)

    def first_step(self, left: int, requests: float, ranks_step: float) -> float:
        """Seconds of the first step: the front makes it, and then the ranks run it in `ranks_step` seconds."""
        if self.times.first_step is not None:
            return self.times.first_step
        return ranks_step + self.front.step_seconds(left, requests)

    def phases(self, left: int, *, weights: float, requests: float, ranks_step: float) -> dict[str, float]:
        """Seconds by PHASES that streams of `left` surviving ranks wait; `weights` are those of loading weights."""
        times = self.times
        seconds = (
            times.detect,
            times.abort,
            self.messages(left),
            times.adopt,
            weights,
            self.first_step(left, requests, ranks_step),
        )
        return dict(zip(PHASES, seconds, strict=True))


def store_seconds(hardware: Hardware, rank: float, host: float, everywhere: float) -> float:
    """Seconds to read lost weights from the store: `rank` bytes at most on a rank, `host` on a host, `everywhere` all.

    Every byte passes a rank's bus and its host's memory. It comes from that memory, from the host's disk, or over the
    network from a store that all hosts share (`Hardware.store`).
    """
    seconds = max(rank / hardware.host_to_device_bandwidth, host / hardware.store_bandwidth)
    if hardware.store == "disk":
        return max(seconds, host / hardware.disk_bandwidth)
    if hardware.store == "network":
        return max(seconds, rank / hardware.network_bandwidth, everywhere / hardware.shared_store_bandwidth)
    return seconds
