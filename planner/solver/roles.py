"""Who attends and who holds experts after a loss, where these are different ranks (ReviveMoE's role switch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

SWITCHES = ("auto", "always")


def roles_after(
    alive: Sequence[int],
    before: Mapping[int, str],
    *,
    experts: int,
    slots: int,
    switch: str = "auto",
) -> dict[int, str]:
    """The role of each rank alive, from those of all ranks of a disaggregated plan `before` some were lost.

    Ranks keep their roles unless one side would be too few: somebody must attend, and enough ranks must hold
    experts for `experts` to fit in `slots` on each, as long as two attend. Then the ranks of the other side with the
    highest ids take the lost ones' place; `switch` "always" makes up for every expert rank lost, as long as somebody
    attends. A last rank does both.
    """
    if len(alive) == 1:
        return {alive[0]: "collocated"}
    roles = {rank: before[rank] for rank in alive}
    attending = [rank for rank in alive if roles[rank] == "attention"]
    holding = [rank for rank in alive if roles[rank] == "expert"]
    needed = ceil(experts / max(1, slots))
    if switch == "always":
        needed = max(needed, sum(role == "expert" for role in before.values()))
    if not attending and len(holding) > 1:
        roles[holding[-1]] = "attention"
    elif len(holding) < needed and len(attending) > 1:
        for rank in attending[1:][::-1][: needed - len(holding)]:
            roles[rank] = "expert"
    return roles
