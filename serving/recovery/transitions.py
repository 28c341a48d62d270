"""The transitions of a membership: pure and total. `on` has an answer to every event in every state.

What must be done between steps is due by the membership itself (`serving.recovery.due`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from serving.executor.mesh_key import MeshKey
from serving.protocol.events import EventKind
from serving.recovery.membership import INCOMING, Membership, RankState
from serving.recovery.membership_events import (
    Activated,
    Adopted,
    AdoptionBegan,
    CommBroken,
    ConnectBegan,
    DropCache,
    DropParity,
    DropRank,
    Effect,
    Event,
    ExchangeFailed,
    GenerationFailed,
    GenerationOpened,
    InvalidatedTaken,
    JoinBegan,
    Joined,
    LeaveRefused,
    LeaveRequested,
    LoadedDropped,
    Lost,
    MeshConnected,
    MeshLoaded,
    PartPlanned,
    Ready,
    Released,
    Report,
    ReportWeights,
    Seen,
    ServiceLost,
    StartAbandoned,
    Starting,
    Suspended,
    TakenOut,
    Wanted,
    WeightsDecided,
)

V = TypeVar("V")
Outcome = tuple[Membership, tuple[Effect, ...]]


def on(m: Membership, event: Event, now: float) -> Outcome:
    """The membership after an event, and what must be done at once. `now` is in seconds of the front's clock."""
    return _RULES[type(event)](m, event, now)


def _starting(m: Membership, event: Starting, now: float) -> Outcome:
    if not m.can_start(event.rank):
        return m, ()
    return replace(_with(m, [event.rank], RankState.STARTING), wanted=m.wanted - {event.rank}), ()


def _start_abandoned(m: Membership, event: StartAbandoned, now: float) -> Outcome:
    if m.states.get(event.rank) is not RankState.STARTING:
        return m, ()
    return _without(m, [event.rank]), ()


def _ready(m: Membership, event: Ready, now: float) -> Outcome:
    if event.rank in m.plan_ranks or m.states.get(event.rank) in INCOMING:
        return m, ()
    since = now if m.ready_since is None else m.ready_since
    return replace(_with(m, [event.rank], RankState.READY), ready_since=since), ()


def _join_began(m: Membership, event: JoinBegan, now: float) -> Outcome:
    return replace(_with(m, m.ready, RankState.JOINING), ready_since=None), ()


def _joined(m: Membership, event: Joined, now: float) -> Outcome:
    if m.states.get(event.rank) is not RankState.JOINING:
        return m, ()
    joined_slots = {**m.joined_slots, event.rank: event.slots}
    return replace(_with(m, [event.rank], RankState.JOINED), joined_slots=joined_slots), ()


def _lost(m: Membership, event: Lost, now: float) -> Outcome:
    rank, loss = event.loss.rank, event.loss
    effects: list[Effect] = [DropRank(rank)]
    served, waited = rank in m.plan_ranks, rank in m.suspended
    if (served and rank not in m.losses) or waited:
        effects.append(Report(EventKind.RANK_LOST, rank, str(loss.cause)))
    left = m.leaving.get(rank)
    out = m.is_out(rank) or (left is not None and not left.replace)
    incoming = m.states.get(rank) in INCOMING
    if out:
        m = _with(m, [rank], RankState.OUT)
    elif incoming:  # not one that is STARTING: whoever starts it starts it again
        m = _without(m, [rank])
    wanted = not out and ((served and m.restart) or (incoming and (m.restart or not waited)))
    peers = set(m.groups.get(rank, ())) - {rank}
    m = replace(
        m,
        losses={**m.losses, rank: loss} if served else m.losses,
        wanted=m.wanted | {rank} if wanted else m.wanted - {rank},
        leaving=_dropping(m.leaving, [rank]),
        joined_slots=_dropping(m.joined_slots, [rank]),
        suspended=m.suspended - {rank},
        connected=frozenset(key for key in m.connected if rank not in key.ranks),
        loaded=tuple(key for key in m.loaded if rank not in key.ranks),
        groups=_dropping(m.groups, [rank]),
    )
    m, dropped = _invalidate(m, peers)
    return m, (*effects, *dropped)


def _leave_requested(m: Membership, event: LeaveRequested, now: float) -> Outcome:
    if event.rank in m.leaving or event.rank not in m.plan_ranks:
        return m, ()
    effect = Report(EventKind.LEAVING, event.rank, event.leaving.cause)
    return replace(m, leaving={**m.leaving, event.rank: event.leaving}), (effect,)


def _leave_refused(m: Membership, event: LeaveRefused, now: float) -> Outcome:
    return replace(m, leaving=_dropping(m.leaving, [event.rank])), ()


def _released(m: Membership, event: Released, now: float) -> Outcome:
    left = m.leaving.get(event.rank)
    m = replace(m, leaving=_dropping(m.leaving, [event.rank]))
    if left is not None and not left.replace:
        m = _with(m, [event.rank], RankState.OUT)
    return m, ()


def _taken_out(m: Membership, event: TakenOut, now: float) -> Outcome:
    if m.is_incoming(event.rank):
        return m, ()
    return replace(_with(m, [event.rank], RankState.OUT), wanted=m.wanted - {event.rank}), ()


def _wanted(m: Membership, event: Wanted, now: float) -> Outcome:
    if m.is_out(event.rank):
        m = _without(m, [event.rank])
    return (replace(m, wanted=m.wanted | {event.rank}) if m.can_start(event.rank) else m), ()


def _seen(m: Membership, event: Seen, now: float) -> Outcome:
    return replace(m, generation=max(m.generation, event.generation), epoch=max(m.epoch, event.epoch)), ()


def _generation_opened(m: Membership, event: GenerationOpened, now: float) -> Outcome:
    waiting = [rank for rank, state in m.states.items() if state in INCOMING and rank not in event.ranks]
    m = _with(m, waiting, RankState.READY)
    m = _with(m, set(event.ranks).difference(m.plan_ranks), RankState.JOINING)
    return replace(
        m,
        generation=event.number,
        comm_broken=True,
        exchange_failed=False,
        service_lost=False,
        joined_slots={},
        ready_since=None,
        connected=frozenset(),
        loaded=(),
    ), ()


def _activated(m: Membership, event: Activated, now: float) -> Outcome:
    return replace(m, comm_broken=False, suspended=frozenset()), ()


def _generation_failed(m: Membership, event: GenerationFailed, now: float) -> Outcome:
    return (m if m.plan is not None else _with(m, m.suspended, RankState.READY)), ()


def _comm_broken(m: Membership, event: CommBroken, now: float) -> Outcome:
    return replace(m, comm_broken=True), ()


def _exchange_failed(m: Membership, event: ExchangeFailed, now: float) -> Outcome:
    if m.plan is None:
        return m, ()
    return replace(m, exchange_failed=True, connected=m.connected - {MeshKey.of(m.plan)}), ()


def _adoption_began(m: Membership, event: AdoptionBegan, now: float) -> Outcome:
    plan = event.plan
    regrouped = {rank for rank, group in plan.groups.items() if m.groups.get(rank, group) != group}
    without_cache = set(plan.rank_ids) - set(plan.attention_rank_ids)
    m, effects = _invalidate(m, regrouped | without_cache)
    if m.next_weights != m.adopting_weights:
        effects = (*effects, DropParity())
    m = replace(m, epoch=max(m.epoch, plan.epoch), groups=dict(plan.groups))
    return replace(m, adopting_weights=m.next_weights, adopting_since=now), effects


def _adopted(m: Membership, event: Adopted, now: float) -> Outcome:
    ranks = set(event.plan.rank_ids)
    switched = m.adopting_weights != m.weights
    # Parity that was made while ranks adopted the plan is of both versions.
    effects = (DropParity(), ReportWeights(m.adopting_weights, now - m.adopting_since)) if switched else ()
    return replace(
        _without(m, [rank for rank in ranks if not m.is_out(rank)]),
        plan=event.plan,
        weights=m.adopting_weights,
        exchange_failed=False,
        desired=event.desired,
        losses={rank: loss for rank, loss in m.losses.items() if rank in ranks},
        joined_slots=_dropping(m.joined_slots, ranks),
        wanted=m.wanted - (ranks - m.losses.keys()),
    ), effects


def _weights_decided(m: Membership, event: WeightsDecided, now: float) -> Outcome:
    return replace(m, next_weights=event.version), ()


def _part_planned(m: Membership, event: PartPlanned, now: float) -> Outcome:
    return replace(m, next_part=event.part), ()


def _suspended(m: Membership, event: Suspended, now: float) -> Outcome:
    incoming = {rank for rank, state in m.states.items() if state in INCOMING}
    m = _with(m, incoming | event.ranks, RankState.READY)
    m = replace(
        m,
        plan=None,
        exchange_failed=False,
        next_part=None,
        no_plan_reason=event.reason,
        losses={},
        suspended=event.ranks,
        joined_slots={},
        ready_since=now if m.ready_since is None else m.ready_since,
    )
    return _invalidate(m, event.ranks)


def _invalidated_taken(m: Membership, event: InvalidatedTaken, now: float) -> Outcome:
    return replace(m, invalidated=frozenset()), ()


def _mesh_loaded(m: Membership, event: MeshLoaded, now: float) -> Outcome:
    return replace(m, loaded=(*m.loaded, event.mesh)), ()


def _connect_began(m: Membership, event: ConnectBegan, now: float) -> Outcome:
    return replace(m, loaded=tuple(key for key in m.loaded if key != event.mesh)), ()


def _mesh_connected(m: Membership, event: MeshConnected, now: float) -> Outcome:
    return replace(m, connected=m.connected | {event.mesh}), ()


def _loaded_dropped(m: Membership, event: LoadedDropped, now: float) -> Outcome:
    return replace(m, loaded=()), ()


def _service_lost(m: Membership, event: ServiceLost, now: float) -> Outcome:
    return replace(m, service_lost=True), ()


_RULES: Mapping[type, Callable[[Membership, Any, float], Outcome]] = {
    Starting: _starting,
    StartAbandoned: _start_abandoned,
    Ready: _ready,
    JoinBegan: _join_began,
    Joined: _joined,
    Lost: _lost,
    LeaveRequested: _leave_requested,
    LeaveRefused: _leave_refused,
    Released: _released,
    TakenOut: _taken_out,
    Wanted: _wanted,
    Seen: _seen,
    GenerationOpened: _generation_opened,
    Activated: _activated,
    GenerationFailed: _generation_failed,
    CommBroken: _comm_broken,
    ExchangeFailed: _exchange_failed,
    AdoptionBegan: _adoption_began,
    Adopted: _adopted,
    WeightsDecided: _weights_decided,
    PartPlanned: _part_planned,
    Suspended: _suspended,
    InvalidatedTaken: _invalidated_taken,
    MeshLoaded: _mesh_loaded,
    ConnectBegan: _connect_began,
    MeshConnected: _mesh_connected,
    LoadedDropped: _loaded_dropped,
    ServiceLost: _service_lost,
}


def _with(m: Membership, ranks: Iterable[int], state: RankState) -> Membership:
    return replace(m, states={**m.states, **dict.fromkeys(ranks, state)})


def _without(m: Membership, ranks: Iterable[int]) -> Membership:
    return replace(m, states=_dropping(m.states, ranks))


def _dropping(values: Mapping[int, V], ranks: Iterable[int]) -> dict[int, V]:
    gone = set(ranks)
    return {rank: value for rank, value in values.items() if rank not in gone}


def _invalidate(m: Membership, ranks: Iterable[int]) -> Outcome:
    """These ranks drop their caches; the KV replicas keep the entries of their requests."""
    fresh = frozenset(ranks) - m.invalidated
    return replace(m, invalidated=m.invalidated | fresh), tuple(DropCache(rank) for rank in sorted(fresh))
