"""Random timelines of failures: devices and hosts fail independently and come back after a repair, both exponential."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.errors import InputError
from planner.plan.pools import AnyDeployment, PooledDeployment


@dataclass(frozen=True, kw_only=True)
class FailureEvent:
    """At `hour` the ranks `ids` die (`up` False) or come back (`up` True)."""

    hour: float
    ids: tuple[int, ...]
    up: bool


def timeline(
    deployment: AnyDeployment,
    *,
    days: float,
    mtbf_hours: float | None = None,
    host_mtbf_hours: float | None = None,
    repair_hours: float | None = None,
    seed: int = 0,
) -> list[FailureEvent]:
    """Failures and repairs in order of time over `days`, of the single ranks of a plan and of whole hosts, which may
    have ranks of several pools."""
    pools = tuple(deployment.pools().values()) if isinstance(deployment, PooledDeployment) else (deployment,)
    hardware = pools[0].cluster.hardware
    device = hardware.device_mtbf_hours if mtbf_hours is None else mtbf_hours
    host = hardware.host_mtbf_hours if host_mtbf_hours is None else host_mtbf_hours
    repair = hardware.repair_hours if repair_hours is None else repair_hours
    for name, value in (("days", days), ("mtbf", device), ("host-mtbf", host), ("repair", repair)):
        if not 0 < value < float("inf"):
            raise InputError(f"--{name} is {value:g}; it must be a number above 0")
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must be at least 0")
    rng = np.random.default_rng(seed)
    hours = days * 24
    ranks = sorted((r.id, r.host) for pool in pools for r in pool.plan.ranks)
    hosts: dict[str, list[int]] = {}
    for rank, name in ranks:
        hosts.setdefault(name, []).append(rank)
    singles, whole = [(rank,) for rank, _ in ranks], [tuple(ids) for ids in hosts.values() if len(ids) > 1]
    events = []
    for units, mtbf in ((singles, device), (whole, host)):
        count = rng.poisson(len(units) * hours / mtbf)
        for start, unit in zip(rng.uniform(0, hours, count), rng.integers(0, max(1, len(units)), count), strict=True):
            end = start + rng.exponential(repair)
            events.append(FailureEvent(hour=float(start), ids=tuple(units[unit]), up=False))
            events.append(FailureEvent(hour=float(end), ids=tuple(units[unit]), up=True))
    return sorted((e for e in events if e.hour < hours), key=lambda e: (e.hour, e.up, e.ids))
