"""The snapshots of a step: where its states go, and what is known of them once its results are in. Pure functions."""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.engine.batch import ScheduledRequest
from serving.engine.limits import Limits
from serving.engine.page_pool import PagePool
from serving.engine.sequence import Sequence
from serving.engine.snapshots import Boundary, SnapshotWrite, boundaries


def add_snapshots(
    limits: Limits,
    ranks: Mapping[int, list[Sequence]],
    pools: Mapping[int, PagePool],
    work: Mapping[int, tuple[ScheduledRequest, ...]],
) -> tuple[dict[int, PagePool], dict[int, tuple[ScheduledRequest, ...]]]:
    """The pools, and the step's `work` by rank with the snapshots that it takes. `ranks` has the sequences of each, as
    they are before the step."""
    pools, with_snapshots = dict(pools), dict(work)
    for rank, items in work.items():
        by_id = {sequence.id: sequence for sequence in ranks[rank]} if items else {}
        of_items = [by_id[item.request_id] for item in items]
        wanted = [
            (at, boundary)
            for at, (sequence, item) in enumerate(zip(of_items, items, strict=True))
            for boundary in _boundaries(limits, sequence, item)
        ]
        if not wanted:
            continue
        pool, held = pools[rank], set().union(*(each.held_places for each in ranks[rank]))
        writes: dict[int, list[SnapshotWrite]] = {}
        for at, (position, optional) in wanted:
            snapshots, place = pool.snapshots.take(
                limits.snapshot_places, held, only_free=optional, before=of_items[at].answer_snapshot
            )
            if place is not None:
                pool = dataclasses.replace(pool, snapshots=snapshots)
                held.add(place)
                writes.setdefault(at, []).append(SnapshotWrite(position, place, optional))
        pools[rank] = pool
        with_snapshots[rank] = tuple(
            dataclasses.replace(item, snapshots=tuple(writes[at])) if at in writes else item
            for at, item in enumerate(items)
        )
    return pools, with_snapshots


def _boundaries(limits: Limits, sequence: Sequence, item: ScheduledRequest) -> Iterable[Boundary]:
    """The page boundaries at which a request's part of a step takes snapshots; none where others must not share its
    pages."""
    if item.states is None or sequence.page_keys is None:
        return ()
    return boundaries(
        item.start,
        item.start + len(item.tokens),
        page_size=limits.page_size,
        prompt=len(sequence.request.prompt),
        branch=sequence.branch,
    )


def keep_snapshots(
    sequence: Sequence, written: tuple[SnapshotWrite, ...], pool: PagePool, page_size: int
) -> tuple[Sequence, PagePool]:
    """The sequence and its rank's pool once a step that took these snapshots is done. Of the snapshots behind its
    prompt a request keeps the last."""
    keys, snapshots = sequence.page_keys or (), pool.snapshots
    for position, place, optional in written:
        key = keys[position // page_size - 1] if position <= len(keys) * page_size else None
        if key is None or key not in pool.index:
            continue
        snapshots = snapshots.add(key, place, first=optional)
        if position >= len(sequence.request.prompt):
            before = sequence.answer_snapshot
            if before is not None and before != key:
                snapshots = snapshots.without([before])
            sequence = dataclasses.replace(sequence, answer_snapshot=key)
    return sequence, dataclasses.replace(pool, snapshots=snapshots)
