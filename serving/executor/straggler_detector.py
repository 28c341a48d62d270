"""Which ranks are slow, judged from the time each takes for its own part of the steps. Pure: the time is an argument.

In a step all ranks wait for the slowest at every exchange, so the length of the step says nothing about who it is. A
rank's own part (taking the step in, its own programs, handing out the results) waits for nobody.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Literal

Verdict = Literal["probation", "recovered", "drain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlownessSettings:
    """A block is so many steps; a rank is slow in it when its own time is `factor` times the median of the others'.

    After `patience` slow blocks in a row it is on probation, after twice as many it is to be drained. It leaves
    probation with a block below `relief * factor`. After a drain, no other for `cool_off_s`, doubled each time up to
    `longest_cool_off_s`.
    """

    block_steps: int = 50
    factor: float = 3.0
    relief: float = 0.7
    patience: int = 4
    cool_off_s: float = 120.0
    longest_cool_off_s: float = 3600.0


@dataclasses.dataclass(frozen=True)
class Paces:
    """What is remembered between blocks: slow blocks in a row by rank, and when the next drain may be."""

    slow: Mapping[int, int] = dataclasses.field(default_factory=dict)
    slowness: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Of the last block, by rank: its own time over the median of the others'."""
    drains: int = 0
    not_before: float = 0.0


def slowness(own_ms: Mapping[int, float], roles: Mapping[int, str] | None = None) -> dict[int, float]:
    """Each rank's own time over the median of the others' of its role; nothing of a rank that is alone in it."""
    found, roles = {}, roles or {}
    for rank, own in own_ms.items():
        others = [ms for other, ms in own_ms.items() if other != rank and roles.get(other) == roles.get(rank)]
        if others:
            usual = statistics.median(others)
            found[rank] = own / usual if usual > 0 else 1.0
    return found


def judge(
    paces: Paces,
    own_ms: Mapping[int, float],
    now: float,
    settings: SlownessSettings,
    roles: Mapping[int, str] | None = None,
) -> tuple[Paces, dict[int, Verdict]]:
    """Take in a block: {rank: own milliseconds in it, together}. At most one rank is to be drained, the slowest. Ranks
    are compared with those that have the same work to do: of the same role.

    Ranks that are not in the block are forgotten.
    """
    found, verdicts, slow = slowness(own_ms, roles), {}, {}
    for rank, times in found.items():
        count = paces.slow.get(rank, 0)
        if times > settings.factor:
            count += 1
            if count == settings.patience:
                verdicts[rank] = "probation"
        elif times < settings.relief * settings.factor:
            if count >= settings.patience:
                verdicts[rank] = "recovered"
            count = 0
        slow[rank] = count
    paces = dataclasses.replace(paces, slow=slow, slowness=found)
    due = [rank for rank, count in slow.items() if count >= 2 * settings.patience]
    if not due or now < paces.not_before:
        return paces, verdicts
    worst = max(due, key=lambda rank: (found[rank], rank))
    verdicts[worst] = "drain"
    cool_off = min(settings.cool_off_s * 2**paces.drains, settings.longest_cool_off_s)
    slow[worst] = 0
    return dataclasses.replace(paces, drains=min(paces.drains + 1, 30), not_before=now + cool_off), verdicts
