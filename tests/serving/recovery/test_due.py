"""The order of what is due between two steps is that of docs/decisions/0003, whatever else is due."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol.weights import WeightsVersion
from serving.recovery.due import GATHER_S, ONE_AT_A_TIME, DueWork, Pending, can_admit, can_rejoin, due_work
from serving.recovery.membership import Leaving, Membership, RankState
from tests.support.memberships import loss_of, mesh_of, plan_of

NOTHING = Pending(
    restoring=False,
    maintaining=False,
    spare_ids=0,
    loading=False,
    retry_preparation=True,
    feasible=lambda ranks: True,
    prepared=lambda ranks: False,
)
SERVING = Membership(plan=plan_of((0, 1)))
WITHOUT_A_PLAN = {DueWork.SWITCH_WEIGHTS, DueWork.EXPAND, DueWork.RECONCILE, DueWork.PREPARE_AHEAD, DueWork.CONNECT}


def due(m: Membership, now: float = 0.0, **facts) -> list[DueWork]:
    return list(due_work(m, dataclasses.replace(NOTHING, **facts), now))


def states(**ranks: RankState) -> dict[int, RankState]:
    return {int(name[1:]): state for name, state in ranks.items()}


READY, JOINED = states(r2=RankState.READY), states(r3=RankState.JOINED)
CASES = {
    DueWork.RECOVER: ({"losses": {1: loss_of(1)}}, {}),
    DueWork.RESTORE_KV: ({}, {"restoring": True}),
    DueWork.MAINTAIN: ({"leaving": {1: Leaving("drain", True, 1.0, 0.0)}}, {}),
    DueWork.SWITCH_WEIGHTS: ({"next_weights": WeightsVersion(1, "1")}, {}),
    DueWork.ADMIT: ({"states": READY}, {"spare_ids": 1}),
    DueWork.REJOIN: ({"states": READY}, {}),
    DueWork.EXPAND: ({"states": JOINED}, {"prepared": lambda ranks: True}),
    DueWork.RECONCILE: ({"next_part": plan_of((0, 1))}, {}),
    DueWork.PREPARE_AHEAD: ({"states": JOINED}, {}),
    DueWork.CONNECT: ({"loaded": (mesh_of((0, 1)),)}, {}),
}


@given(st.sets(st.sampled_from(list(DueWork))), st.booleans())
def test_what_is_due_comes_in_the_order_of_the_table(work: set[DueWork], served: bool) -> None:
    fields, facts, ranks = {}, {}, {}
    for each in work:
        ranks |= CASES[each][0].get("states", {})
        fields |= CASES[each][0]
        facts |= CASES[each][1]
    m = dataclasses.replace(SERVING if served else Membership(), **{**fields, "states": ranks})
    found = due(m, **facts)
    assert found == [each for each in DueWork if each in found]
    if served:
        prepared, loaded = DueWork.EXPAND in work, DueWork.CONNECT in work
        implied = {DueWork.REJOIN} if DueWork.ADMIT in work else set()
        hidden = {DueWork.PREPARE_AHEAD} if prepared or loaded else set()
        if DueWork.PREPARE_AHEAD in work and prepared:
            implied.add(DueWork.EXPAND)
        if DueWork.EXPAND in work:
            hidden.add(DueWork.PREPARE_AHEAD)
        assert set(found) == (work | implied) - hidden
    else:
        assert WITHOUT_A_PLAN.isdisjoint(found)


def test_broken_communicators_are_recovered_from_while_there_is_a_plan() -> None:
    broken = dataclasses.replace(SERVING, comm_broken=True)
    assert due(broken) == [DueWork.RECOVER]
    assert due(Membership(comm_broken=True)) == []


def test_a_failed_exchange_is_recovered_from_while_there_is_a_plan() -> None:
    assert due(dataclasses.replace(SERVING, exchange_failed=True)) == [DueWork.RECOVER]
    assert due(Membership(exchange_failed=True)) == []


def test_a_stalled_preparation_is_tried_again_from_time_to_time() -> None:
    m = dataclasses.replace(SERVING, states=JOINED)
    assert due(m) == [DueWork.PREPARE_AHEAD]
    assert due(m, retry_preparation=False) == []
    assert due(m, loading=True) == []
    assert due(dataclasses.replace(m, service_lost=True)) == [DueWork.REJOIN]


def test_ranks_are_admitted_only_while_no_other_is_and_with_a_process_id_for_each() -> None:
    m = dataclasses.replace(SERVING, states=states(r2=RankState.READY, r3=RankState.READY))
    assert [can_admit(m, spare) for spare in range(4)] == [False, False, True, True]
    assert not can_admit(dataclasses.replace(m, states={**m.states, 4: RankState.JOINING}), 9)
    assert not can_admit(dataclasses.replace(m, comm_broken=True), 9)
    assert not can_admit(dataclasses.replace(m, service_lost=True), 9)
    assert not can_admit(dataclasses.replace(m, plan=None), 9)


def test_ready_ranks_wait_for_those_that_start_but_not_for_long() -> None:
    m = Membership(states=READY, ready_since=5.0)
    assert can_rejoin(m, 5.0)
    waiting = dataclasses.replace(m, states={**READY, 3: RankState.STARTING})
    assert not can_rejoin(waiting, 5.0 + GATHER_S)
    assert can_rejoin(waiting, 5.1 + GATHER_S)
    assert not can_rejoin(Membership(), 5.0)


def test_no_generation_is_formed_of_ranks_that_cannot_serve_together() -> None:
    asked: list[set[int]] = []
    assert due(dataclasses.replace(SERVING, states=READY), feasible=lambda ranks: asked.append(set(ranks))) == []
    assert asked == [{0, 1, 2}]


def test_what_is_done_one_at_a_time_comes_after_all_that_is_always_done() -> None:
    assert list(DueWork)[-len(ONE_AT_A_TIME) :] == list(ONE_AT_A_TIME)


@pytest.mark.parametrize("work", DueWork)
def test_each_kind_of_work_says_why_it_is_due(work: DueWork) -> None:
    assert work.value[0].islower()
