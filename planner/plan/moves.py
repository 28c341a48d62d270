"""What moves between two plans: for each slot that must be filled, from where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.errors import InputError
from planner.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Move:
    """Fill slot `slot` (0..slots_per_rank-1) of rank `rank` on MoE layer `layer` with `expert`.

    `source` says how: "local", the rank holds it in another slot; "peer", rank `peer` holds it;
    "store", nobody alive does, it is read from the host store.
    """

    layer: int
    expert: int
    rank: int
    slot: int
    source: str
    peer: int | None = None


def moves(old: Plan | None, new: Plan) -> tuple[Move, ...]:
    """Everything ranks must do to get from `old` (None: empty ranks) to `new`, by layer, rank and slot.

    Slots that already hold the right expert are left out. Peers are chosen on the same host when one is
    there, and so that no rank sends more than it must. Only ranks in both plans count as holding anything.
    """
    table = _by_rank(new)
    if old is not None and (old.moe_layers, old.experts) != (new.moe_layers, new.experts):
        raise InputError(
            f"the plans are of different models: {old.moe_layers} layers x {old.experts} experts, "
            f"and {new.moe_layers} x {new.experts}"
        )
    ids = list(new.holder_ids)
    width = max(new.slots_per_rank, old.slots_per_rank if old else 0)
    before = np.full((*table.shape[:2], width), -1, np.int32)
    if old is not None:
        held = _by_rank(old)
        where = {rank: at for at, rank in enumerate(old.holder_ids)}
        for at, rank in enumerate(ids):
            if rank in where:
                before[:, at, : old.slots_per_rank] = held[:, where[rank]]
    hosts = [r.host for r in new.holders]
    sent = np.zeros(len(ids), np.int64)
    result = []
    for layer, at, slot in np.argwhere((table != before[:, :, : new.slots_per_rank]) & (table >= 0)):
        expert = int(table[layer, at, slot])
        source, peer = _source(before[layer], int(at), expert, hosts, sent)
        result.append(
            Move(
                layer=int(layer),
                expert=expert,
                rank=ids[at],
                slot=int(slot),
                source=source,
                peer=None if peer is None else ids[peer],
            )
        )
    return tuple(result)


def _by_rank(plan: Plan) -> np.ndarray:
    return plan.slot_table().reshape(plan.moe_layers, len(plan.holders), plan.slots_per_rank)


def _source(before: np.ndarray, at: int, expert: int, hosts: list[str], sent: np.ndarray) -> tuple[str, int | None]:
    """Where holder `at` gets `expert` from; `before` [holders, slots] is one layer, `sent` counts sends."""
    having = np.flatnonzero((before == expert).any(axis=1))
    if at in having:
        return "local", None
    if not len(having):
        return "store", None
    peer = min((int(h) for h in having), key=lambda h: (hosts[h] != hosts[at], sent[h], h))
    sent[peer] += 1
    return "peer", peer
