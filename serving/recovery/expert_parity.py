"""Parity of experts: a rank keeps the XOR of experts of other ranks, from which a lost one is rebuilt
(docs/decisions/0009).

Of up to `members` experts on different ranks another rank keeps the XOR. When all copies of one expert are lost, it is
rebuilt from the XOR and the other experts; an expert that one rank holds and another is to have is moved. The bytes go
through the front: a piece from each rank, and their XOR to another. That is the same for ranks of this host and of
others, and no rank needs to know of another.
"""

import asyncio
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from planner.plan.plan import Plan
from planner.solver.parity_groups import (
    ExpertSource,
    HostParityGroup,
    expert_locations,
    expert_sources,
    host_parity_groups,
)
from serving.executor.executor import RankExecutor
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventKind

PIECE_BYTES = 1 << 20
"""Bytes of one expert in one message: a step queued behind it waits for less than a millisecond."""
POLL_S = 0.1
"""Seconds between two looks for another plan."""
RETRY_S = 5.0
"""Seconds after which groups that could not be made are tried again: a member was damaged, and a scrub reloads it."""


@dataclasses.dataclass(frozen=True)
class StoredParity:
    """The parity of a group on its rank: its size in bytes, and the checksums by member of experts that the store has
    in another format."""

    size: int
    checksums: Mapping[int, tuple[int, ...]]


class ExpertParity:
    """The parity groups of one server; with `members` 0 there are none. `on_event` is called with the kind and the text
    of each event."""

    def __init__(
        self,
        executor: RankExecutor,
        members: int,
        on_event: Callable[[EventKind, str], None] = lambda kind, message: None,
    ) -> None:
        self._executor = executor
        self._members = members
        self._on_event = on_event
        self._stored: dict[HostParityGroup, StoredParity] = {}
        self._stale_layers: set[int] = set()
        """Layers of which ranks may keep other parity, or a part of one."""
        self._wanted: frozenset[HostParityGroup] = frozenset()
        """The groups of the plan that was looked at last; groups made before may differ."""
        self.rebuilt = 0
        """Experts rebuilt from parity."""
        self.moved = 0
        """Experts moved to a rank from another one that held them."""

    @property
    def groups(self) -> tuple[HostParityGroup, ...]:
        """The groups whose parity is stored."""
        return tuple(self._stored)

    @property
    def progress(self) -> tuple[int, int]:
        """How many of the groups of the plan are made, and how many it has."""
        return len(self._wanted.intersection(self._stored)), len(self._wanted)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the parity takes on all ranks."""
        return sum(stored.size for stored in self._stored.values())

    def forget(self, rank: int) -> None:
        """A rank was lost, and the parity it kept."""
        self._stored = {group: stored for group, stored in self._stored.items() if group.rank != rank}

    def forget_all(self) -> None:
        """The weights change: what ranks keep is of no use, and is dropped when the next parity is made."""
        self._stale_layers.update(group.layer for group in self._stored)
        self._stored = {}

    # -- Making it ----------------------------------------------------------------------------------------------

    async def maintain(self, settled: Callable[[], Plan | None]) -> None:
        """Make the parity of each plan that `settled` returns, beside the steps, until cancelled."""
        tried: Plan | None = None
        again = math.inf
        while True:
            plan = settled()
            if plan is None or (plan is tried and clock.now() < again):
                await asyncio.sleep(POLL_S)
                continue
            whole = await self._build(plan, lambda plan=plan: settled() is plan)
            tried, again = plan, math.inf if whole else clock.now() + RETRY_S

    async def _build(self, plan: Plan, still_settled: Callable[[], bool]) -> bool:
        """Make the groups of a plan that are missing, while the plan is `still_settled`. The former parity of a layer
        stays until the new one is made. True when no group is left to be made."""
        wanted = await asyncio.to_thread(host_parity_groups, plan, self._members)
        self._wanted, holders = frozenset(wanted), expert_locations(plan, plan.rank_ids)
        whole, new = True, 0
        for layer in range(plan.moe_layers):
            groups = [group for group in wanted if group.layer == layer]
            for group in groups:
                if group in self._stored:
                    continue
                self._stale_layers.add(layer)
                try:
                    stored = await self._build_group(group, holders[layer], still_settled)
                except (RankLost, CommandFailed):
                    stored = None
                if not still_settled():
                    return False
                if stored is None:
                    whole = False
                    continue
                self._stored[group] = stored
                new += 1
            made = {group for group in self._stored if group.layer == layer}
            if made.issuperset(groups) and (layer in self._stale_layers or made.difference(groups)):
                whole &= await self._drop_others(layer, groups, plan)
        if whole and new:
            self._on_event(EventKind.PARITY_READY, f"{len(wanted)} groups, {self.host_bytes >> 20} MiB")
        return whole

    async def _build_group(
        self, group: HostParityGroup, holders: Mapping[int, int], still_settled: Callable[[], bool]
    ) -> StoredParity | None:
        """Make the parity of a group on its rank; None when another plan came before it was made. `holders` has the
        rank of each expert."""
        sources = [(holders[expert], _expert(group.layer, expert)) for expert in group.members]
        size, first, checksums = 1, 0, {}
        while first < size:
            began = clock.now()
            rows, answers = await self._read(sources, first)
            if first == 0:
                size = answers[0].size
                checksums = {m: tuple(a.checksums) for m, a in zip(group.members, answers, strict=True)}
            piece = link_pb2.WriteWeights(of=_parity(group), first=first, size=size, rows=rows)
            await self._executor.call(group.rank, "write_weights", piece)
            first += len(rows)
            if not still_settled():
                return None
            await asyncio.sleep(clock.now() - began)  # at most half of the time: ranks have steps to run
        return StoredParity(size, checksums)

    async def _drop_others(self, layer: int, groups: Collection[HostParityGroup], plan: Plan) -> bool:
        """Have the ranks drop all other parity of a layer. False when one did not answer."""
        self._stored = {
            group: stored for group, stored in self._stored.items() if group.layer != layer or group in groups
        }
        keep = link_pb2.KeepParity(layer=layer, parities=map(_parity, groups))
        try:
            await asyncio.gather(*(self._executor.call(rank, "keep_parity", keep) for rank in plan.rank_ids))
        except (RankLost, CommandFailed):
            return False
        self._stale_layers.discard(layer)
        return True

    # -- Using it -----------------------------------------------------------------------------------------------

    def sources(self, held: Plan | None, plan: Plan) -> Mapping[tuple[int, int], ExpertSource]:
        """The sources in the memory of ranks for experts that `plan` has in slots and no rank of it has in place under
        `held`, by (MoE layer, expert)."""
        return expert_sources(self._stored, held, plan) if self._members and held is not None else {}

    async def supply(self, held: Plan | None, plan: Plan) -> None:
        """Send the ranks of a plan the experts that come from the memory of ranks, before they adopt it. The others are
        read from the store. Raises RankLost."""
        found, before = self.sources(held, plan), (self.rebuilt, self.moved)
        wanted = {rank: plan.slots_of(rank) for rank in plan.expert_rank_ids} if found else {}
        tasks = [
            asyncio.create_task(
                self._inject(rank, {at: source for at, source in found.items() if at[1] in slots[at[0]]})
            )
            for rank, slots in wanted.items()
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        rebuilt, moved = self.rebuilt - before[0], self.moved - before[1]
        if rebuilt or moved:
            self._on_event(EventKind.REBUILT, f"{rebuilt} experts from parity, {moved} from ranks that hold them")

    async def _inject(self, rank: int, wanted: Mapping[tuple[int, int], ExpertSource]) -> None:
        for (layer, expert), source in wanted.items():
            stored = self._stored.get(source.group) if source.group is not None else None
            try:
                await self._transfer(
                    rank, layer, expert, source, stored.checksums[expert] if stored is not None else ()
                )
            except CommandFailed as error:
                if source.group is not None:
                    self._stored.pop(source.group, None)
                self._on_event(EventKind.REBUILD_FAILED, str(error))
                continue
            self.rebuilt += source.group is not None
            self.moved += source.group is None

    async def _transfer(
        self, rank: int, layer: int, expert: int, source: ExpertSource, checksums: tuple[int, ...]
    ) -> None:
        sources = [(holder, _expert(layer, other)) for other, holder in source.experts]
        if source.group is not None:
            sources.append((source.group.rank, _parity(source.group)))
        size, first = 1, 0
        while first < size:
            rows, answers = await self._read(sources, first)
            size = answers[0].size
            if first == 0 and source.group is None:
                checksums = tuple(answers[0].checksums)
            piece = link_pb2.WriteWeights(of=_expert(layer, expert), first=first, size=size, rows=rows)
            piece.checksums.extend(checksums)
            await self._executor.call(rank, "write_weights", piece)
            first += len(rows)

    async def _read(
        self, sources: Iterable[tuple[int, link_pb2.Weights]], first: int
    ) -> tuple[bytes, list[link_pb2.Done]]:
        """The XOR of a piece of each of the (rank, weights), from byte `first` on, and the answers."""
        reads = ((rank, link_pb2.ReadWeights(of=of, first=first, count=PIECE_BYTES)) for rank, of in sources)
        answers = await asyncio.gather(*(self._executor.call(rank, "read_weights", read) for rank, read in reads))
        pieces = [np.frombuffer(answer.rows, np.uint8) for answer in answers]
        return functools.reduce(np.bitwise_xor, pieces).tobytes(), answers


def _expert(layer: int, expert: int) -> link_pb2.Weights:
    return link_pb2.Weights(layer=layer, experts=[expert])


def _parity(group: HostParityGroup) -> link_pb2.Weights:
    return link_pb2.Weights(layer=group.layer, experts=group.members, parity=True)
