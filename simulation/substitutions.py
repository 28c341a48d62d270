"""Replacements for parts of the front that have no argument for it, while a run lasts."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import planner.solver.lattice
import serving.core.background
import serving.core.journal
import serving.core.loop
import serving.executor.kv_replica
import serving.executor.rank_monitor
import serving.recovery.kv_restoration
import serving.recovery.plan_catalog
import serving.recovery.rendezvous
from simulation.front import checked_engine
from simulation.solved_plans import solve_once
from simulation.world import World

POLL_S = 0.05
"""Virtual seconds between two looks at the ranks: fewer looks, and a run takes less time."""
PIECE_ENTRIES = 7
"""KV entries that are restored at once: few, so that much happens between two pieces."""


@contextlib.contextmanager
def substituted(world: World) -> Iterator[None]:
    """The coordination service, the disk, constants, and plans solved once, until the block is left."""
    write_at: Callable[..., None] = serving.core.journal._write_at

    def write_with_room(file: int, data: bytes, at: int) -> None:
        if world.disk.full:
            write_at(file, data[: len(data) // 2], at)  # as far as there is room
        world.disk.check_room()
        write_at(file, data, at)

    changes: list[tuple[Any, str, Any]] = [
        (serving.core.loop, "EngineShell", checked_engine(world)),
        (serving.recovery.rendezvous, "Coordinator", world.coordinators),
        (serving.core.journal, "_write_at", write_with_room),
        (serving.core.background, "COMPACTION_PAUSE_S", 0.0),
        (serving.executor.rank_monitor, "POLL_S", POLL_S),
        (serving.executor.kv_replica, "PIECE_ENTRIES", PIECE_ENTRIES),
        (serving.recovery.plan_catalog, "solve", solve_once),
        (planner.solver.lattice, "solve", solve_once),
    ]
    if world.scenario.restores_always:
        changes.append((serving.recovery.kv_restoration, "should_restore", lambda *_, **__: True))
    with replaced(changes):
        yield


@contextlib.contextmanager
def replaced(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes, (object, name, value), with other values until the block is left."""
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
