"""Parity of the experts' weights, as the front has it made and used (docs/decisions/0009).

Of up to `members` experts on different ranks another rank keeps the XOR. When all copies of one of them are lost, it is
made again from that and the others; one that a rank holds and another is to have is moved. Bytes go through the front:
a piece from each rank, their XOR to another. That is the same for ranks of this machine and of others, and no rank
needs to know of any other.
"""

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from planner.parity import KeptGroup, Way, homes, kept_groups, ways
from planner.plan import Plan
from serving.links import RankLinks, RankLost, RankRefused
from serving.proto.moejax.v1 import link_pb2

PIECE_BYTES = 1 << 20
"""Of one expert in one message: a step that comes behind it waits for less than a millisecond."""
LOOK_S = 0.1
"""How often it is looked whether there is another plan."""
AGAIN_S = 5.0
"""How soon groups that could not be made are tried again: a member was not intact, and is put right by a scrub."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A group's parity as it was made: its bytes, and the checksums of members that the store has in another form."""

    size: int
    checksums: Mapping[int, tuple[int, ...]]


class Parity:
    """The parity of one server. With `members` 0 there is none."""

    def __init__(self, links: RankLinks, members: int) -> None:
        self._links = links
        self._members = members
        self._made: dict[KeptGroup, Made] = {}
        self._untidy: set[int] = set()
        """Layers of which ranks may keep something else, or half of it."""
        self._wanted: frozenset[KeptGroup] = frozenset()
        """Groups that the plan asks for which was last looked at; those made before may be others."""
        self.rebuilt = 0
        """Experts that were made again."""
        self.moved = 0
        """Experts that were given to a rank by another one that held them."""
        self.tell: Callable[[str, str], None] = lambda kind, message: None
        """Hears what has happened, and to what."""

    @property
    def groups(self) -> tuple[KeptGroup, ...]:
        """Those that are made."""
        return tuple(self._made)

    @property
    def progress(self) -> tuple[int, int]:
        """How many of the groups that are wanted are made, and how many are wanted."""
        return len(self._wanted.intersection(self._made)), len(self._wanted)

    @property
    def kept_bytes(self) -> int:
        """Host memory of ranks that they take."""
        return sum(made.size for made in self._made.values())

    def forget(self, rank: int) -> None:
        """A rank is gone, and what it kept."""
        self._made = {group: made for group, made in self._made.items() if group.keeper != rank}

    # -- Making it ----------------------------------------------------------------------------------------------

    async def keep(self, settled: Callable[[], Plan | None]) -> None:
        """Make the parity of each plan that `settled` names, beside its steps, until cancelled."""
        tried: Plan | None = None
        again = math.inf
        while True:
            plan = settled()
            if plan is None or (plan is tried and time.monotonic() < again):
                await asyncio.sleep(LOOK_S)
                continue
            whole = await self._make(plan, lambda plan=plan: settled() is plan)
            tried, again = plan, math.inf if whole else time.monotonic() + AGAIN_S

    async def _make(self, plan: Plan, holds: Callable[[], bool]) -> bool:
        """Make what a plan asks for and is not there, as long as the plan `holds`. Each layer's parity before it stays
        until the new one is there. True when nothing is left to be made."""
        wanted = await asyncio.to_thread(kept_groups, plan, self._members)
        self._wanted, here = frozenset(wanted), homes(plan, plan.rank_ids)
        whole, new = True, 0
        for layer in range(plan.moe_layers):
            groups = [group for group in wanted if group.layer == layer]
            for group in groups:
                if group in self._made:
                    continue
                self._untidy.add(layer)
                try:
                    made = await self._make_group(group, here[layer], holds)
                except (RankLost, RankRefused):
                    made = None
                if not holds():
                    return False
                if made is None:
                    whole = False
                    continue
                self._made[group] = made
                new += 1
            there = {group for group in self._made if group.layer == layer}
            if there.issuperset(groups) and (layer in self._untidy or there.difference(groups)):
                whole &= await self._keep_only(layer, groups, plan)
        if whole and new:
            self.tell("parity_ready", f"{len(wanted)} groups, {self.kept_bytes >> 20} MiB")
        return whole

    async def _make_group(self, group: KeptGroup, here: Mapping[int, int], holds: Callable[[], bool]) -> Made | None:
        """A group's parity on its keeper; None when the plan is another one before it is there. `here` is the rank that
        holds each expert."""
        sources = [(here[expert], _expert(group.layer, expert)) for expert in group.members]
        size, first, checksums = 1, 0, {}
        while first < size:
            began = time.monotonic()
            rows, answers = await self._read(sources, first)
            if first == 0:
                size = answers[0].size
                checksums = {m: tuple(a.checksums) for m, a in zip(group.members, answers, strict=True)}
            piece = link_pb2.WriteWeights(of=_parity(group), first=first, size=size, rows=rows)
            await self._links.call(group.keeper, "write_weights", piece)
            first += len(rows)
            if not holds():
                return None
            await asyncio.sleep(time.monotonic() - began)  # no more than half of the time: ranks have steps to make
        return Made(size, checksums)

    async def _keep_only(self, layer: int, groups: Collection[KeptGroup], plan: Plan) -> bool:
        """Have ranks forget what else they keep of a layer. False when one did not answer."""
        self._made = {group: made for group, made in self._made.items() if group.layer != layer or group in groups}
        keep = link_pb2.KeepParity(layer=layer, parities=map(_parity, groups))
        try:
            await asyncio.gather(*(self._links.call(rank, "keep_parity", keep) for rank in plan.rank_ids))
        except (RankLost, RankRefused):
            return False
        self._untidy.discard(layer)
        return True

    # -- Using it -----------------------------------------------------------------------------------------------

    def ways(self, held: Plan | None, plan: Plan) -> Mapping[tuple[int, int], Way]:
        """How what `plan` has in slots and no rank of it has in place under `held` can come from the ranks' memory, by
        (MoE layer, expert)."""
        return ways(self._made, held, plan) if self._members and held is not None else {}

    async def provide(self, held: Plan | None, plan: Plan) -> None:
        """Give the ranks of a plan what can come from the ranks' memory, before they adopt it. What cannot is left to
        the store. Raises RankLost."""
        found, before = self.ways(held, plan), (self.rebuilt, self.moved)
        wanted = {rank: plan.slots_of(rank) for rank in plan.holder_ids} if found else {}
        tasks = [
            asyncio.create_task(self._give(rank, {at: way for at, way in found.items() if at[1] in slots[at[0]]}))
            for rank, slots in wanted.items()
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        rebuilt, moved = self.rebuilt - before[0], self.moved - before[1]
        if rebuilt or moved:
            self.tell("rebuilt", f"{rebuilt} experts from parity, {moved} from ranks that hold them")

    async def _give(self, rank: int, wanted: Mapping[tuple[int, int], Way]) -> None:
        for (layer, expert), way in wanted.items():
            made = self._made.get(way.group) if way.group is not None else None
            try:
                await self._bring(rank, layer, expert, way, made.checksums[expert] if made is not None else ())
            except RankRefused as error:
                if way.group is not None:
                    self._made.pop(way.group, None)
                self.tell("rebuild_failed", str(error))
                continue
            self.rebuilt += way.group is not None
            self.moved += way.group is None

    async def _bring(self, rank: int, layer: int, expert: int, way: Way, checksums: tuple[int, ...]) -> None:
        sources = [(holder, _expert(layer, other)) for other, holder in way.held]
        if way.group is not None:
            sources.append((way.group.keeper, _parity(way.group)))
        size, first = 1, 0
        while first < size:
            rows, answers = await self._read(sources, first)
            size = answers[0].size
            if first == 0 and way.group is None:
                checksums = tuple(answers[0].checksums)
            piece = link_pb2.WriteWeights(of=_expert(layer, expert), first=first, size=size, rows=rows)
            piece.checksums.extend(checksums)
            await self._links.call(rank, "write_weights", piece)
            first += len(rows)

    async def _read(
        self, sources: Iterable[tuple[int, link_pb2.Weights]], first: int
    ) -> tuple[bytes, list[link_pb2.Done]]:
        """The XOR of a piece of each of the (rank, weights), and the answers."""
        reads = ((rank, link_pb2.ReadWeights(of=of, first=first, count=PIECE_BYTES)) for rank, of in sources)
        answers = await asyncio.gather(*(self._links.call(rank, "read_weights", read) for rank, read in reads))
        pieces = [np.frombuffer(answer.rows, np.uint8) for answer in answers]
        return functools.reduce(np.bitwise_xor, pieces).tobytes(), answers


def _expert(layer: int, expert: int) -> link_pb2.Weights:
    return link_pb2.Weights(layer=layer, experts=[expert])


def _parity(group: KeptGroup) -> link_pb2.Weights:
    return link_pb2.Weights(layer=group.layer, experts=group.members, parity=True)
