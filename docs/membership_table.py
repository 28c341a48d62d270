"""Writes the table of what becomes of a rank: `python -m docs.membership_table > docs/membership.md`."""

from collections.abc import Mapping

from planner.plan.plan import Plan, PlannedRank
from serving.executor.failure_detector import Cause
from serving.executor.incarnation import Loss
from serving.recovery.due import DueWork
from serving.recovery.membership import Leaving, Membership, RankState
from serving.recovery.membership_events import (
    Adopted,
    Event,
    GenerationFailed,
    GenerationOpened,
    JoinBegan,
    Joined,
    LeaveRefused,
    LeaveRequested,
    Lost,
    Ready,
    Released,
    StartAbandoned,
    Starting,
    Suspended,
    TakenOut,
    Wanted,
)
from serving.recovery.transitions import on

_HEAD = """\
# What becomes of a rank

Every change of the ranks of a server is an event, and `serving.recovery.transitions.on` has an answer to every event in
every state. This table is computed by it: a column for each state of a rank, a row for each event that concerns the
rank; an empty cell leaves the state as it is. A rank that is lost is in the plan in force until another one is adopted.

"""
_DUE = """
# What is due between two steps

In this order (`serving.recovery.due`); after each piece of work the loop looks again from the top.

"""
_RANK, _OTHER = 1, 0
_LEAVING = Leaving("drain", True, 1.0, 0.0)


def _plan(*ranks: int) -> Plan:
    placed = tuple(PlannedRank(id=rank, host=f"host{rank}") for rank in ranks)
    return Plan(epoch=0, ranks=placed, slots_per_rank=1, slots=((0,) * len(placed),), experts=1)


_LOSS = Loss(_RANK, Cause("exited", "killed"), 0.0, 0.0)
_ALONE, _BOTH = _plan(_OTHER), _plan(_OTHER, _RANK)
_STATES: Mapping[RankState, Membership] = {
    state: Membership(plan=_ALONE, states={_RANK: state})
    for state in (RankState.STARTING, RankState.READY, RankState.JOINING, RankState.JOINED, RankState.OUT)
} | {
    RankState.SERVING: Membership(plan=_BOTH),
    RankState.LEAVING: Membership(plan=_BOTH, leaving={_RANK: _LEAVING}),
    RankState.LOST: Membership(plan=_ALONE),
}
_EVENTS: Mapping[str, Event] = {
    "its process is started": Starting(_RANK),
    "its start is given up": StartAbandoned(_RANK),
    "it is configured": Ready(_RANK),
    "ready ranks begin to join": JoinBegan(),
    "it has joined": Joined(_RANK, 1),
    "a generation with it is formed": GenerationOpened(2, (_OTHER, _RANK)),
    "one without it": GenerationOpened(2, (_OTHER,)),
    "forming it failed": GenerationFailed(),
    "a plan with it is adopted": Adopted(_BOTH, _BOTH),
    "one without it ": Adopted(_ALONE, _ALONE),
    "no plan is possible": Suspended(frozenset({_OTHER, _RANK}), ""),
    "it is to leave": LeaveRequested(_RANK, _LEAVING),
    "it cannot leave": LeaveRefused(_RANK),
    "it has left": Released(_RANK),
    "it is taken out": TakenOut(_RANK),
    "it is wanted": Wanted(_RANK),
    "it dies": Lost(_LOSS),
}


def page() -> str:
    """The page in Markdown."""
    head = f"| | {' | '.join(state.name for state in RankState)} |\n|---|{'---|' * len(RankState)}\n"
    rows = "".join(_row(title.strip(), event) for title, event in _EVENTS.items())
    due = "".join(f"{number}. {work.value[0].upper()}{work.value[1:]}.\n" for number, work in enumerate(DueWork, 1))
    return _HEAD + head + rows + _DUE + due


def _row(title: str, event: Event) -> str:
    after = {state: on(_STATES[state], event, 0.0)[0].state(_RANK) for state in RankState}
    cells = ("" if after[state] is state else after[state].name for state in RankState)
    return f"| {title} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(page(), end="")
