"""Decides which ranks are slow, from the time each takes for its own part of the steps. Pure: the time is an argument.

In a step all ranks wait for the slowest at every exchange, so that the length of the step does not say which one is
slow. A rank's own part (taking the step, its own programs, sending the results) waits for no other rank.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Literal

Verdict = Literal["probation", "recovered", "drain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StragglerSettings:
    """A block is `block_steps` steps. A rank is slow in it when its own time is more than `factor` times the median of
    the others'.

    After `patience` slow blocks in a row it is on probation, after twice as many it is to be drained. It leaves
    probation with a block below `recovery_factor * factor`. After a drain there is no other for `cool_off_s`, doubled
    each time up to `longest_cool_off_s`.
    """

    block_steps: int = 50
    factor: float = 3.0
    recovery_factor: float = 0.7
    patience: int = 4
    cool_off_s: float = 120.0
    longest_cool_off_s: float = 3600.0


@dataclasses.dataclass(frozen=True)
class StragglerState:
    """The state between blocks: slow blocks in a row by rank, and the earliest time of the next drain."""

    slow: Mapping[int, int] = dataclasses.field(default_factory=dict)
    slowness: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Each rank's own time in the last block over the median of the others'."""
    drains: int = 0
    not_before: float = 0.0


def slowness(own_ms: Mapping[int, float], roles: Mapping[int, str] | None = None) -> dict[int, float]:
    """Each rank's own time over the median of the others of its role; a rank that is alone in its role is left out."""
    found, roles = {}, roles or {}
    for rank, own in own_ms.items():
        others = [ms for other, ms in own_ms.items() if other != rank and roles.get(other) == roles.get(rank)]
        if others:
            usual = statistics.median(others)
            found[rank] = own / usual if usual > 0 else 1.0
    return found


def judge(
    state: StragglerState,
    own_ms: Mapping[int, float],
    now: float,
    settings: StragglerSettings,
    roles: Mapping[int, str] | None = None,
) -> tuple[StragglerState, dict[int, Verdict]]:
    """Judge a block of {rank: its own milliseconds in all steps}. Returns the next state, and the verdicts by rank. At
    most one rank is to be drained, the slowest. Ranks are compared with others of the same role, which do the same
    work.

    Ranks that are not in the block are forgotten.
    """
    found, verdicts, slow = slowness(own_ms, roles), {}, {}
    for rank, times in found.items():
        count = state.slow.get(rank, 0)
        if times > settings.factor:
            count += 1
            if count == settings.patience:
                verdicts[rank] = "probation"
        elif times < settings.recovery_factor * settings.factor:
            if count >= settings.patience:
                verdicts[rank] = "recovered"
            count = 0
        slow[rank] = count
    state = dataclasses.replace(state, slow=slow, slowness=found)
    due = [rank for rank, count in slow.items() if count >= 2 * settings.patience]
    if not due or now < state.not_before:
        return state, verdicts
    worst = max(due, key=lambda rank: (found[rank], rank))
    verdicts[worst] = "drain"
    cool_off = min(settings.cool_off_s * 2**state.drains, settings.longest_cool_off_s)
    slow[worst] = 0
    return dataclasses.replace(state, drains=min(state.drains + 1, 30), not_before=now + cool_off), verdicts
