"""The transitions of a membership: total, and whatever happens in whatever order, each rank has one state and its
marks are those of this state."""

import dataclasses
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.executor.mesh_key import MeshKey
from serving.protocol.events import EventKind
from serving.protocol.weights import WeightsVersion
from serving.recovery.membership import INCOMING, Leaving, Membership, RankState
from serving.recovery.membership_events import (
    Activated,
    Adopted,
    AdoptionBegan,
    CommBroken,
    ConnectBegan,
    DropCache,
    DropRank,
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
    Seen,
    ServiceLost,
    StartAbandoned,
    Starting,
    Suspended,
    TakenOut,
    Wanted,
    WeightsDecided,
)
from serving.recovery.transitions import on
from tests.support.memberships import loss_of, mesh_of, plan_of

RANKS = range(4)
STAYS, GOES = Leaving("drain", True, 9.0, 1.0), Leaving("scale_down", False, 9.0, 1.0)

ranks = st.sampled_from(RANKS)
sets = st.sets(ranks, min_size=1).map(frozenset)
plans = sets.map(plan_of)
meshes = sets.map(mesh_of)
EVENTS: dict[type, st.SearchStrategy] = {
    Starting: st.builds(Starting, ranks),
    StartAbandoned: st.builds(StartAbandoned, ranks),
    Ready: st.builds(Ready, ranks),
    JoinBegan: st.just(JoinBegan()),
    Joined: st.builds(Joined, ranks, st.integers(1, 3)),
    Lost: st.builds(Lost, ranks.map(loss_of)),
    LeaveRequested: st.builds(LeaveRequested, ranks, st.sampled_from([STAYS, GOES])),
    LeaveRefused: st.builds(LeaveRefused, ranks),
    Released: st.builds(Released, ranks),
    TakenOut: st.builds(TakenOut, ranks),
    Wanted: st.builds(Wanted, ranks),
    Seen: st.builds(Seen, st.integers(0, 9), st.integers(0, 9)),
    GenerationOpened: st.builds(GenerationOpened, st.integers(1, 9), sets.map(lambda s: tuple(sorted(s)))),
    Activated: st.just(Activated()),
    GenerationFailed: st.just(GenerationFailed()),
    CommBroken: st.just(CommBroken()),
    ExchangeFailed: st.just(ExchangeFailed()),
    AdoptionBegan: st.builds(AdoptionBegan, plans),
    Adopted: plans.map(lambda plan: Adopted(plan, plan)),
    WeightsDecided: st.builds(WeightsDecided, st.builds(WeightsVersion, st.integers(0, 3))),
    PartPlanned: st.builds(PartPlanned, st.none() | plans),
    Suspended: st.builds(Suspended, sets, st.just("too few")),
    InvalidatedTaken: st.just(InvalidatedTaken()),
    MeshLoaded: st.builds(MeshLoaded, meshes),
    ConnectBegan: st.builds(ConnectBegan, meshes),
    MeshConnected: st.builds(MeshConnected, meshes),
    LoadedDropped: st.just(LoadedDropped()),
    ServiceLost: st.just(ServiceLost()),
}
histories = st.lists(st.one_of(*EVENTS.values()), max_size=40)


def after(*events: Event, m: Membership | None = None) -> Membership:
    m = m or Membership()
    for number, event in enumerate(events):
        m, _ = on(m, event, float(number))
    return m


def serving(*ids: int) -> Adopted:
    return Adopted(plan_of(ids), plan_of(ids))


def states(m: Membership) -> dict[int, RankState]:
    return {rank: m.state(rank) for rank in RANKS}


def test_every_event_has_an_example_here() -> None:
    assert set(EVENTS) == set(get_args(Event))


@given(histories)
def test_each_rank_has_one_state_and_the_marks_of_it(history: list[Event]) -> None:
    m = Membership()
    for number, event in enumerate(history):
        before = m
        m, effects = on(m, event, float(number))
        assert m.epoch >= before.epoch
        assert m.losses.keys() <= set(m.plan_ranks)
        assert m.joined_slots.keys() == m.joined
        assert (m.ready | m.joining | m.joined | m.starting).isdisjoint(m.plan_ranks)
        assert all(m.state(rank) in RankState for rank in RANKS)
        assert not any(m.is_out(rank) for rank in m.wanted)
        assert not any(m.state(rank) is RankState.STARTING for rank in m.leaving)
        dropped = {effect.rank for effect in effects if isinstance(effect, DropCache)}
        assert dropped == m.invalidated - before.invalidated


@given(histories, ranks)
def test_a_lost_rank_is_lost_until_it_is_started_again(history: list[Event], rank: int) -> None:
    m = after(*history)
    lost, effects = on(m, Lost(loss_of(rank)), 99.0)
    expected = {RankState.STARTING} if m.state(rank) is RankState.STARTING else {RankState.LOST, RankState.OUT}
    assert lost.state(rank) in expected
    assert DropRank(rank) in effects
    assert all(rank not in key.ranks for key in (*lost.connected, *lost.loaded))
    assert rank not in lost.leaving
    assert rank not in lost.suspended
    for other in set(RANKS) - {rank}:
        assert lost.state(other) is m.state(other)


@given(histories, ranks)
def test_a_loss_is_reported_once_and_only_of_ranks_that_served(history: list[Event], rank: int) -> None:
    m = after(*history)
    served = m.state(rank) in (RankState.SERVING, RankState.LEAVING) or rank in m.suspended
    lost, effects = on(m, Lost(loss_of(rank)), 99.0)
    reports = [e for e in effects if isinstance(e, Report) and e.kind is EventKind.RANK_LOST]
    assert len(reports) == served
    assert not any(isinstance(effect, Report) for effect in on(lost, Lost(loss_of(rank)), 100.0)[1])


@given(histories, ranks, st.booleans())
def test_a_lost_rank_is_wanted_back_unless_it_was_to_go(history: list[Event], rank: int, restart: bool) -> None:
    m = dataclasses.replace(after(*history), restart=restart)
    counts = m.state(rank) in {RankState.SERVING, RankState.LEAVING, *INCOMING}
    goes = m.is_out(rank) or (rank in m.leaving and not m.leaving[rank].replace)
    lost = after(Lost(loss_of(rank)), m=m)
    if counts and restart:
        assert (rank in lost.wanted) == (not goes)
    assert lost.is_out(rank) == goes or m.state(rank) is RankState.STARTING


@given(histories, sets)
def test_a_new_generation_has_no_mesh_and_all_others_wait_for_the_next(
    history: list[Event], members: frozenset
) -> None:
    before = after(*history)
    m = after(GenerationOpened(7, tuple(sorted(members))), m=before)
    assert (m.connected, m.loaded, m.comm_broken, m.service_lost) == (frozenset(), (), True, False)
    assert m.joining == members.difference(m.plan_ranks)
    assert m.ready == {r for r in RANKS if before.states.get(r) in INCOMING} - members


@given(histories)
def test_after_a_failed_exchange_the_mesh_in_force_is_connected_again_and_no_rank_is_lost(history: list[Event]) -> None:
    before = after(*history)
    m = after(ExchangeFailed(), m=before)
    assert states(m) == states(before)
    assert m.exchange_failed == (m.plan is not None)
    if m.plan is not None:
        mesh = MeshKey.of(m.plan)
        assert m.connected == before.connected - {mesh}
        again = after(MeshConnected(mesh), Adopted(m.plan, m.plan), m=m)
        assert not again.exchange_failed
        assert mesh in again.connected
    for event in (GenerationOpened(7, (0, 1)), Suspended(frozenset({0}), "too few")):
        assert not after(event, m=m).exchange_failed


@given(histories, sets)
def test_without_a_plan_the_ranks_left_and_those_on_their_way_wait(history: list[Event], left: frozenset) -> None:
    before = after(*history)
    m = after(Suspended(left, "too few"), m=before)
    assert (m.plan, m.losses, m.suspended, m.plan_ranks) == (None, {}, left, ())
    assert m.ready == left | {r for r in RANKS if before.states.get(r) in INCOMING}
    assert left <= m.invalidated
    failed = after(GenerationOpened(3, (0, 1, 2, 3)), GenerationFailed(), m=m)
    assert failed.ready == left


def test_a_replacement_passes_ready_joining_and_joined_before_it_serves() -> None:
    m, seen = after(serving(0, 1), Wanted(2)), []
    for event in (Starting(2), Ready(2), JoinBegan(), Joined(2, 3), serving(0, 1, 2)):
        m = after(event, m=m)
        seen.append(m.state(2))
        assert m.members == ((0, 1, 2) if m.state(2) in (RankState.JOINED, RankState.SERVING) else (0, 1))
    assert seen == [RankState.STARTING, RankState.READY, RankState.JOINING, RankState.JOINED, RankState.SERVING]
    assert not m.joined_slots


def test_a_rank_that_serves_leaves_and_is_out_unless_it_is_replaced() -> None:
    m = after(serving(0, 1, 2), LeaveRequested(1, GOES), LeaveRequested(2, STAYS))
    assert states(m)[1] is states(m)[2] is RankState.LEAVING
    m = after(serving(0), Released(1), Released(2), m=m)
    assert (m.state(1), m.state(2), m.leaving) == (RankState.OUT, RankState.LOST, {})
    assert after(Wanted(1), m=m).wanted == {1}


@pytest.mark.parametrize(("leaving", "state"), [(STAYS, RankState.LOST), (GOES, RankState.OUT)])
def test_a_rank_that_dies_while_it_leaves_has_left(leaving: Leaving, state: RankState) -> None:
    m = after(serving(0, 1), LeaveRequested(1, leaving), Lost(loss_of(1)), serving(0))
    assert m.state(1) is state
    assert m.leaving == {}


def test_with_a_rank_its_tensor_group_loses_what_it_has_cached() -> None:
    m = dataclasses.replace(after(serving(0, 1, 2)), groups={0: (0, 1), 1: (0, 1), 2: (2,)})
    m, effects = on(m, Lost(loss_of(0)), 5.0)
    assert m.invalidated == {1}
    assert DropCache(1) in effects


def test_ranks_that_only_hold_experts_or_are_regrouped_drop_their_caches() -> None:
    m = dataclasses.replace(after(serving(0, 1)), groups={0: (0, 1), 1: (0, 1)})
    regrouped = plan_of((0, 1), epoch=4)
    vars(regrouped)["groups"] = {0: (0,), 1: (1,)}
    m, effects = on(m, AdoptionBegan(regrouped), 5.0)
    assert (m.epoch, m.invalidated) == (4, {0, 1})
    assert set(effects) == {DropCache(0), DropCache(1)}


@pytest.mark.parametrize("event", [GenerationOpened(2, (0,)), Suspended(frozenset({0}), "too few"), Lost(loss_of(2))])
def test_a_joined_rank_that_must_join_again_has_no_slots(event: Event) -> None:
    m = after(serving(0), Ready(2), JoinBegan(), Joined(2, 3))
    assert m.joined_slots == {2: 3}
    assert after(event, m=m).joined_slots == {}
