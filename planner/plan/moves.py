"""The moves between two plans: each slot that must be filled, and the source of its expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.errors import InputError
from planner.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Move:
    """Fill slot `slot` (0..slots_per_rank-1) of rank `rank` on MoE layer `layer` with `expert`.

    `source` is where the expert comes from: "local", another slot of the rank; "peer", rank `peer`; "store", the host
    store, when no rank alive holds it.
    """

    layer: int
    expert: int
    rank: int
    slot: int
    source: str
    peer: int | None = None


def moves(old: Plan | None, new: Plan) -> tuple[Move, ...]:
    """The moves that take ranks from `old` (None: empty ranks) to `new`, by layer, rank and slot.

    Slots that already hold the right expert are left out. A peer on the same host is preferred, then the one that has
    sent the fewest experts. Only ranks in both plans count as holding experts. InputError when the models differ.
    """
    table = new.slots_by_rank()
    if old is not None and (old.moe_layers, old.experts) != (new.moe_layers, new.experts):
        raise InputError(
            f"the plans are of different models: {old.moe_layers} layers x {old.experts} experts, "
            f"and {new.moe_layers} x {new.experts}"
        )
    ids = list(new.expert_rank_ids)
    width = max(new.slots_per_rank, old.slots_per_rank if old else 0)
    before = np.full((*table.shape[:2], width), -1, np.int32)
    if old is not None:
        held = old.slots_by_rank()
        where = {rank: at for at, rank in enumerate(old.expert_rank_ids)}
        for at, rank in enumerate(ids):
            if rank in where:
                before[:, at, : old.slots_per_rank] = held[:, where[rank]]
    hosts = [r.host for r in new.expert_ranks]
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


def _source(before: np.ndarray, at: int, expert: int, hosts: list[str], sent: np.ndarray) -> tuple[str, int | None]:
    """Source and peer of `expert` for the expert rank at position `at`.

    `before` [expert ranks, slots] is one layer before the moves, `sent` [expert ranks] counts the sends of each rank.
    """
    having = np.flatnonzero((before == expert).any(axis=1))
    if at in having:
        return "local", None
    if not len(having):
        return "store", None
    peer = min((int(h) for h in having), key=lambda h: (hosts[h] != hosts[at], sent[h], h))
    sent[peer] += 1
    return "peer", peer
