"""Replacements for parts of the front that have no argument for it, while a run lasts."""

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planner.solver.lattice
import serving.core.background
import serving.core.journal
import serving.core.loop
import serving.core.start
import serving.executor.kv_replica
import serving.executor.rank_monitor
import serving.launch.weights_record
import serving.recovery.kv_restoration
import serving.recovery.plan_catalog
import serving.recovery.rendezvous
import serving.recovery.weights_update
from serving.protocol.prepared_model import PreparedModel
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer
from simulation.front import checked_engine, checked_executor
from simulation.quick_replace import quick_replace
from simulation.solved_plans import solve_once
from simulation.world import World

POLL_S = 0.05
"""Virtual seconds between two looks at the ranks: fewer looks, and a run takes less time."""
PREPARE_S = (0.01, 0.5)
"""The least and the most virtual seconds in which other weights are copied into the host store."""
PIECE_ENTRIES = 7
"""KV entries that are restored at once: few, so that much happens between two pieces."""


@functools.cache
def grammar_matcher(tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...]) -> GrammarMatcher:
    """Structured output over the one tokenizer of all fronts."""
    return GrammarMatcher(tokenizer, vocab_size, stop_tokens)


@contextlib.contextmanager
def substituted(world: World) -> Iterator[None]:
    """The coordination service, the disk, constants, plans solved once, and a quicker `dataclasses.replace`, until the
    block is left."""
    write_at: Callable[..., None] = serving.core.journal._write_at

    def write_with_room(file: int, data: bytes, at: int) -> None:
        if world.disk.full:
            write_at(file, data[: len(data) // 2], at)  # as far as there is room
        world.disk.check_room()
        write_at(file, data, at)

    write_whole = serving.launch.weights_record.write_whole

    def write_whole_with_room(path: Path, data: bytes) -> None:
        world.disk.check_room()
        write_whole(path, data)

    async def prepare_weights(model: str, like: PreparedModel, **_: Any) -> PreparedModel:
        await asyncio.sleep(world.random(f"prepare/{world.loop.time()}").uniform(*PREPARE_S))
        return dataclasses.replace(like, store=str(world.disk.folder))

    changes: list[tuple[Any, str, Any]] = [
        (serving.core.loop, "EngineShell", checked_engine(world)),
        (serving.core.start, "RankExecutor", checked_executor(world)),
        (serving.core.start, "GrammarMatcher", grammar_matcher),
        (serving.recovery.rendezvous, "Coordinator", world.coordinators),
        (serving.core.journal, "_write_at", write_with_room),
        (serving.launch.weights_record, "write_whole", write_whole_with_room),
        (serving.recovery.weights_update, "prepare_weights", prepare_weights),
        (serving.core.background, "COMPACTION_PAUSE_S", 0.0),
        (serving.executor.rank_monitor, "POLL_S", POLL_S),
        (serving.executor.kv_replica, "PIECE_ENTRIES", PIECE_ENTRIES),
        (dataclasses, "replace", quick_replace),
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
