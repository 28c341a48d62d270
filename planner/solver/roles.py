"""Roles after a loss in a disaggregated plan: which ranks are attention ranks and which expert ranks.

The role switch is ReviveMoE's (arXiv 2602.21140).
"""

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
    """The role of each rank alive; `before` has the roles of all ranks of a disaggregated plan before the loss.

    Ranks keep their roles unless one side would be too small: at least one attention rank is needed, and enough expert
    ranks for `experts` to fit in `slots` slots each, as long as two attention ranks are left. Then ranks of the other
    side with the highest ids replace the lost ones. With `switch` "always" every lost expert rank is replaced, as long
    as one attention rank is left. A single rank left takes both roles.
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
