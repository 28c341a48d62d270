"""Mesh shapes to choose from, the slots of a rank, and the memory that weights and cache take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from planner.errors import InputError, NoFeasiblePlan
from planner.inputs.cluster import Cluster, Device
from planner.inputs.workload import Workload
from planner.plan.shape import Shape

MEMORY_SHARE = 0.92  # of device memory that weights and cache may take; the rest is for activations
COPIES_SHARE = 1 / 16  # of a rank's weights that slots for second copies may take, so that a loss reads no weights
ARCHITECTURES = ("collocated", "disaggregated")


def memory_budget(cluster: Cluster) -> int | None:
    """Bytes of a device that weights and cache may take, None without a limit."""
    memory = cluster.hardware.memory_bytes
    return None if memory is None else int(memory * MEMORY_SHARE)


def without_memory_limit(cluster: Cluster) -> Cluster:
    """The cluster with devices on which everything fits, to ask for a placement alone."""
    return replace(cluster, hardware=replace(cluster.hardware, memory_bytes=None))


def rest_bytes(workload: Workload, tensor: int, dense: int) -> int:
    """Bytes of everything but routed experts on a rank, with tensor groups of `tensor`, dense groups of `dense`."""
    without_dense = workload.rest_bytes - workload.dense_bytes
    return ceil(without_dense / tensor) + ceil(workload.dense_bytes / max(tensor, dense))


def most_slots(workload: Workload, cluster: Cluster, rest: int | None = None) -> int | None:
    """Slots per rank that fit next to `rest` bytes of weights and one cache page; None without a limit."""
    room = memory_budget(cluster)
    if room is None:
        return None
    rest = workload.rest_bytes if rest is None else rest
    return max(0, (room - rest - workload.page_bytes) // max(1, workload.slot_bytes))


def slots_per_rank(
    workload: Workload,
    cluster: Cluster,
    ranks: int,
    *,
    asked: int | None,
    before: int | None,
    survive_ranks: int,
    rest: int | None = None,
) -> int:
    """Slots per rank on `ranks` expert ranks: as `asked`, as `before` in the previous plan, or enough to lose some.

    The default is ceil(E / (n - survive_ranks)), less when memory is short, never below ceil(E / n); more where
    two copies of every expert cost little (`COPIES_SHARE`), so that any one loss is survived without reading weights.
    A dense model has none. NoFeasiblePlan, with the numbers and a way out, when the experts do not fit.
    """
    rest = workload.rest_bytes if rest is None else rest
    experts, most = workload.experts, most_slots(workload, cluster, rest)
    if ranks < 1:
        raise NoFeasiblePlan(f"0 ranks alive for {experts} experts. Bring a rank back.")
    if not experts:
        return _no_slots(workload, cluster, rest)
    least = ceil(experts / ranks)
    if asked is not None:
        if asked < least:
            raise NoFeasiblePlan(
                f"{experts} experts do not fit in {asked * ranks} slots "
                f"({ranks} ranks alive x {asked} slots). "
                f"Raise slots_per_rank to {least}, or bring a rank back."
            )
        chosen = asked
    elif before is not None and before >= least:
        return before
    elif before is not None:
        chosen = least
    else:
        spared = ranks - survive_ranks
        chosen = ceil(experts / spared) if spared >= 1 else least
        copied = min(experts, ceil(2 * experts / ranks)) if survive_ranks else 0
        if (copied - chosen) * workload.slot_bytes <= COPIES_SHARE * (rest + chosen * workload.slot_bytes):
            chosen = max(chosen, copied)
        chosen = max(chosen, least) if most is None else max(least, min(chosen, most))
    if most is not None and chosen > most:
        weights = rest + chosen * workload.slot_bytes
        raise NoFeasiblePlan(
            f"{chosen} slots per rank need {weights:,} bytes of weights on each of {ranks} ranks, which have "
            f"{memory_budget(cluster):,} bytes for weights and cache: room for {most} slots. "
            + (
                f"Add ranks: {ceil(experts / most)} would do."
                if most
                else f"Not even one slot of {workload.slot_bytes:,} bytes fits beside {rest:,} of the rest."
            )
        )
    return chosen


def _no_slots(workload: Workload, cluster: Cluster, rest: int) -> int:
    """0 slots for a dense model; NoFeasiblePlan when its weights and one cache page do not fit on a rank."""
    room = memory_budget(cluster)
    if room is not None and rest + workload.page_bytes > room:
        raise NoFeasiblePlan(
            f"{workload.name} needs {rest + workload.page_bytes:,} bytes on each rank for weights and one cache page; "
            f"ranks have {room:,} bytes for both. Divide the weights over wider tensor groups, or take larger devices."
        )
    return 0


def cache_pages(workload: Workload, cluster: Cluster, slots: int, *, tensor: int = 1, rest: int | None = None) -> int:
    """Cache pages that fit beside the weights of one rank; 0 when memory or cache size is not given."""
    room = memory_budget(cluster)
    if room is None or not workload.page_bytes:
        return 0
    page = ceil(workload.page_bytes / min(tensor, workload.cache_splits))
    rest = workload.rest_bytes if rest is None else rest
    return max(0, (room - rest - slots * workload.slot_bytes) // page)


def mesh_shapes(
    workload: Workload,
    cluster: Cluster,
    devices: Sequence[Device],
    *,
    arch: str = "collocated",
    lost: int = 1,
    standby: int = 0,
    slots: int | None = None,
    tensor: int | None = None,
    dense: int | None = None,
) -> Iterator[Shape]:
    """The shapes worth comparing on these devices, whether they fit in memory or not.

    `lost` is the number of expert ranks that may be lost before slots run out. Ranks of a host that fill no tensor
    group (the seventh of 7 with groups of 2) hold experts only. The last `standby` ranks wait for a loss.
    """
    _check_asked(workload, arch, slots, tensor, dense)
    active = devices[: len(devices) - standby]
    widest = max(Counter(d.host for d in active).values(), default=0)
    seen: set[Shape] = set()
    wide = [t for t in (1, 2, 4, 8) if t <= widest and workload.heads % t == 0]
    for width in (t for t in wide if tensor in (None, t)):
        for dense_width in (d for d in _dense_groups(workload, width, widest) if dense in (None, d)):
            for attention in _attention_ranks(active, arch):
                roles, groups = _group(active, attention, width, arch)
                expert_rank_count = sum(role in ("collocated", "expert") for role in roles)
                if max(groups, default=-1) < 0 or not expert_rank_count:
                    continue
                for count in _slot_counts(workload, expert_rank_count, lost, slots, _spread(cluster)):
                    shape = Shape(
                        arch=arch,
                        tensor=width,
                        dense=dense_width,
                        slots=count,
                        roles=(*roles, *["standby"] * standby),
                        groups=(*groups, *[-1] * standby),
                    )
                    if shape not in seen:
                        seen.add(shape)
                        yield shape


def _check_asked(workload: Workload, arch: str, slots: int | None, tensor: int | None, dense: int | None) -> None:
    """Raise InputError for options that no mesh of this model can have."""
    if arch not in ARCHITECTURES:
        raise InputError(f"architecture {arch!r} is none of {', '.join(ARCHITECTURES)}")
    if slots is not None and slots < 1:
        raise InputError(f"--slots is {slots}; a rank that holds experts has at least 1")
    if not workload.experts and (slots is not None or arch == "disaggregated"):
        what = f"--slots {slots}" if slots is not None else "--arch disaggregated"
        raise InputError(f"{what}: {workload.name} is a dense model, it has no experts to hold. Leave it out.")
    for name, width in (("tensor", tensor), ("dense", dense)):
        if width is not None and width not in (1, 2, 4, 8):
            raise InputError(f"--{name} is {width}; groups are 1, 2, 4 or 8 ranks wide")


def _dense_groups(workload: Workload, tensor: int, widest: int) -> list[int]:
    """Widths of dense FFN groups worth trying: that of tensor groups, or wider where the model has dense layers."""
    return [tensor] + [d for d in (4, 8) if workload.dense_bytes and tensor < d <= widest]


def _attention_ranks(devices: Sequence[Device], arch: str) -> list[int]:
    """Numbers of leading ranks to have attention: all, or several splits, at host boundaries when there are hosts."""
    n = len(devices)
    if arch == "collocated":
        return [n]
    ends = [i for i in range(1, n) if devices[i].host != devices[i - 1].host] or list(range(1, n))
    wanted = [n * part / 12 for part in (2, 3, 4, 5, 6, 7, 8, 9, 10)]
    return sorted({min(ends, key=lambda e: abs(e - w)) for w in wanted}) if ends else []


def _group(devices: Sequence[Device], attention: int, tensor: int, arch: str) -> tuple[list[str], list[int]]:
    """Role and tensor group of each device: groups are consecutive ranks of one host."""
    roles, groups, group = [], [], 0
    members: dict[str, list[int]] = {}
    for i, device in enumerate(devices[:attention]):
        members.setdefault(device.host, []).append(i)
    index = {}
    for ranks in members.values():
        for start in range(0, len(ranks) - tensor + 1, tensor):
            for i in ranks[start : start + tensor]:
                index[i] = group
            group += 1
    for i in range(len(devices)):
        attends = i in index
        groups.append(index.get(i, -1))
        roles.append("expert" if not attends else "collocated" if arch == "collocated" else "attention")
    return roles, groups


def _spread(cluster: Cluster) -> float:
    """The memory bandwidth of the fastest kind of device over the mean; 1 where all are of one kind."""
    rates = [cluster.kinds[device.kind].memory_bandwidth for device in cluster.devices] if cluster.kinds else [1.0]
    return max(rates) / (sum(rates) / len(rates))


def _slot_counts(
    workload: Workload, expert_rank_count: int, lost: int, asked: int | None, spread: float = 1.0
) -> list[int]:
    """Numbers of slots worth trying: enough to lose `lost` ranks, and enough for two copies of every expert; also
    `spread` times as many, with which the fastest ranks hold as many more experts as they are faster."""
    if asked is not None:
        return [asked]
    experts = workload.experts
    enough = ceil(experts / (expert_rank_count - lost)) if expert_rank_count > lost else experts
    twice = ceil(2 * experts / max(1, expert_rank_count - lost))
    wide = {ceil(enough * spread), ceil(twice * spread)} if spread > 1 else set()
    return sorted({min(experts, s) for s in (enough, enough + 1, twice, twice + 1, *wide)})
