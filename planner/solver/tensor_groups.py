"""Tensor groups: which of the ranks that attend do so together, and who of them has which share of the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.cluster import Device
from planner.plan import Plan


def tensor_groups(devices: Sequence[Device], tensor: int, previous: Plan | None = None) -> list[tuple[int, ...]]:
    """The groups of `tensor` ranks of one host, each as its ids in order of their shares, by lowest id.

    Groups of `previous` that are whole stay. The other ranks of a host are put together anew, each with the share that
    it had where that can be; those that are too few for a group are in none.
    """
    alive = {device.id for device in devices}
    before = dict.fromkeys(previous.groups.values()) if previous is not None else {}
    groups = [ids for ids in before if alive.issuperset(ids) and len(ids) == tensor]
    shares = {rank: shard for ids in before for shard, rank in enumerate(ids)}
    kept = {rank for ids in groups for rank in ids}
    hosts: dict[str, list[int]] = {}
    for device in devices:
        if device.id not in kept:
            hosts.setdefault(device.host, []).append(device.id)
    for rest in hosts.values():
        while len(rest) >= tensor:
            groups.append(_together(rest, tensor, shares))
            rest[:] = [rank for rank in rest if rank not in groups[-1]]
    return sorted(groups, key=min)


def _together(ranks: Sequence[int], tensor: int, shares: Mapping[int, int]) -> tuple[int, ...]:
    """As many of these ranks as make a group: those that have a share already first."""
    found = [next((rank for rank in ranks if shares.get(rank) == shard), None) for shard in range(tensor)]
    others = iter([rank for rank in ranks if rank not in found])
    return tuple(next(others) if rank is None else rank for rank in found)
