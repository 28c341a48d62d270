"""Tensor groups: the ranks that share attention, and the shard of the heads that each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planner.inputs.cluster import Device
from planner.plan.plan import Plan


def tensor_groups(devices: Sequence[Device], tensor: int, previous: Plan | None = None) -> list[tuple[int, ...]]:
    """The groups of `tensor` ranks of one host, each as its ids in order of their shards, by lowest id.

    Groups of `previous` whose ranks are all left stay. The other ranks of a host regroup, each with its shard of before
    where possible; ranks that are too few for a group are in none.
    """
    alive = {device.id for device in devices}
    before = dict.fromkeys(previous.groups.values()) if previous is not None else {}
    groups = [ids for ids in before if alive.issuperset(ids) and len(ids) == tensor]
    shards = {rank: shard for ids in before for shard, rank in enumerate(ids)}
    grouped = {rank for ids in groups for rank in ids}
    hosts: dict[str, list[int]] = {}
    for device in devices:
        if device.id not in grouped:
            hosts.setdefault(device.host, []).append(device.id)
    for rest in hosts.values():
        while len(rest) >= tensor:
            groups.append(_form_group(rest, tensor, shards))
            rest[:] = [rank for rank in rest if rank not in groups[-1]]
    return sorted(groups, key=min)


def _form_group(ranks: Sequence[int], tensor: int, shards: Mapping[int, int]) -> tuple[int, ...]:
    """A group of `tensor` of these ranks, in order of their shards; ranks that have a shard already come first."""
    found = [next((rank for rank in ranks if shards.get(rank) == shard), None) for shard in range(tensor)]
    others = iter([rank for rank in ranks if rank not in found])
    return tuple(next(others) if rank is None else rank for rank in found)
