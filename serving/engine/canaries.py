"""Canaries: requests whose tokens are known, which run while no other request does (docs/decisions/0026). Pure.

A rank that runs other code computes them before it computes anything for a client. Each is pinned to a rank; a rank
without room for it preempts its youngest request.
"""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.engine.sequence import Sequence
from serving.engine.state import EngineState, remove_requests
from serving.protocol.request import Request


def submit_canaries(state: EngineState, canaries: Iterable[tuple[Request, int]]) -> EngineState:
    """Accept canaries, each with its rank, in the place of earlier ones. From now on no other request is in a
    step, until `end_canaries`. No step may be in flight."""
    assert not state.in_flight, "a step in flight may have other requests"
    state = end_canaries(state)
    waiting, pinned = dict(state.waiting), dict[str, int]()
    for request, rank in canaries:
        waiting[request.id] = Sequence(request, state.arrivals + len(pinned))
        pinned[request.id] = rank
    return dataclasses.replace(state, waiting=waiting, arrivals=state.arrivals + len(pinned), canaries=pinned)


def end_canaries(state: EngineState) -> EngineState:
    """The state without canaries: all other requests run again."""
    if not state.canaries:
        return state
    is_open = [request_id for request_id in state.canaries if state.find(request_id) is not None]
    return dataclasses.replace(remove_requests(state, is_open), canaries={})


def others(state: EngineState) -> frozenset[str]:
    """The open requests that are no canaries."""
    return frozenset(key for mapping in (state.running, state.waiting) for key in mapping if key not in state.canaries)


def preempted_for(sequences: Iterable[Sequence], canaries: Mapping[str, int]) -> Sequence | None:
    """The youngest of the sequences of a rank that is no canary; None when there is none."""
    return max((each for each in sequences if each.id not in canaries), key=lambda each: each.arrival, default=None)
