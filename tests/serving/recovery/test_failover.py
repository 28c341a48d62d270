"""The state machine of recovery (docs/decisions/0003): a second failure at every message of every stage.

Each case is first run to learn its messages; then once for every message and every rank, which dies at that message.
"""

import itertools

import pytest

from tests.support.recovery_machine import (
    APART,
    STATES,
    at_every_message,
    coordinator,
    drain_one,
    lose_attention,
    lose_experts,
    lose_one,
    lose_two,
    rebalance,
    scale,
    spoil,
    switch_weights,
)

pytestmark = pytest.mark.usefixtures("no_processes")

CASES = (lose_one, lose_two, drain_one, scale, spoil, coordinator, rebalance, switch_weights)

EVERY = 4
"""Of the messages of a case, every run of the tests has one in so many; the soak has all."""
SHORT = (
    (lose_one, "mask", "memory"),
    (lose_two, "wait", "stream"),
    (drain_one, "wait", "memory"),
    (spoil, "wait", "off"),
    (rebalance, "wait", "memory"),
)
"""Cases that every run of the tests has."""


@pytest.mark.parametrize(("act", "policy", "replication"), SHORT)
def test_a_failure_at_some_message_of_any_stage_changes_no_token(act, policy, replication) -> None:
    at_every_message(act, {"on_lost_expert": policy, "kv_replication": replication}, every=EVERY)


def test_nor_does_one_where_experts_are_apart() -> None:
    at_every_message(lose_experts, {"on_lost_expert": "wait", "kv_replication": "memory", **APART}, every=EVERY)


@pytest.mark.parametrize("act", [lose_one, drain_one])
def test_nor_does_one_of_a_model_whose_layers_have_states(act) -> None:
    at_every_message(act, {"on_lost_expert": "wait", "kv_replication": "off"}, every=4 * EVERY, model=STATES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "policy", "replication"),
    list(itertools.product(CASES, ("wait", "mask"), ("memory", "stream", "off"))),
)
def test_a_failure_at_any_message_of_any_stage_changes_no_token(act, policy, replication) -> None:
    at_every_message(act, {"on_lost_expert": policy, "kv_replication": replication})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "policy", "replication"),
    list(
        itertools.product(
            (lose_experts, lose_attention, lose_one, drain_one, coordinator), ("wait", "mask"), ("memory", "off")
        )
    ),
)
def test_nor_does_one_among_attention_ranks_and_expert_ranks(act, policy, replication) -> None:
    at_every_message(act, {"on_lost_expert": policy, "kv_replication": replication, **APART})
