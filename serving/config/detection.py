"""Settings of how failures, slow ranks and damaged weights are detected."""

import dataclasses
from typing import ClassVar

from serving.config.field import SettingsGroup, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionSettings(SettingsGroup):
    """When a rank counts as failed or slow, and how weights are checked."""

    title: ClassVar[str] = "Failure detection"

    heartbeat_s: float = setting(0.05, "Seconds between two heartbeats of a rank.")
    heartbeat_floor_s: float = setting(
        0.6, "Fewest seconds without a heartbeat before a rank counts as failed; more after irregular heartbeats."
    )
    network_heartbeat_floor_s: float = setting(
        1.5,
        "Fewest seconds without a heartbeat after which a rank on another host counts as failed. TCP sends again after "
        "0.2, 0.6 and 1.4 s, so a link that is down for 0.3 s is silent for twice as long.",
    )
    step_floor_s: float = setting(
        10.0, "Fewest seconds that a step may take before its rank counts as failed; more after long steps."
    )
    command_limit_s: float = setting(
        120.0,
        "Seconds that a rank has to obey a command between steps, such as loading experts, before it counts as failed. "
        "Raise it where a rank reads its experts from slow storage.",
        at_least=1.0,
    )
    starved_factor: float = setting(
        2.0,
        "Most times the limits above for a rank whose process is ready to run and waits for a processor, and as "
        "much again where the front itself stood still; 1 gives it no longer than others.",
        at_least=1.0,
    )
    slow_factor: float = setting(
        3.0,
        "A rank is slow in a block of steps if its own work takes this many times the median of the other ranks.",
        at_least=1.1,
    )
    slow_block_steps: int = setting(
        50,
        "Number of steps in a block. A rank that is slow in four blocks in a row is reported, in eight it is drained "
        "if --drain-slow is set.",
        at_least=1,
    )
    drain_slow: bool = setting(False, "Drain and replace ranks that stay slow, instead of only reporting them.")
    scrub_s: float = setting(
        300.0, "Seconds in which every expert is compared with its checksum once; 0 turns this off.", at_least=0.0
    )
    device_errors: str | None = setting(
        None, "File to which a device plugin appends device errors, one JSON object in each line."
    )
