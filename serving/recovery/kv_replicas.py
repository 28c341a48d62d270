"""The copies of the ranks' caches, kept by the front: one for each rank, and those of ranks that died until nobody
needs them any more (docs/decisions/0006).

A rank of this machine maps its copy and writes it itself; what another one tells of is written here. Either way it is
memory of the front's machine, which does not go when a rank or its machine does. When the front dies, the next one
takes over the copies that ranks map.
"""

import collections
import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from serving.batch import Batch
from serving.cache_copy import NOTHING, CacheCopy, NotCopied, size_of
from serving.proto.moejax.v1 import link_pb2
from serving.salvage import copied, written_since
from serving.sequence import Salvage, Sequence

STEPS_KEPT = 8
"""Steps whose work is remembered, for what was not copied yet when a rank died: it is the last one or none."""
SHARE = 0.25
"""Of the memory that is free at the start, what copies of all caches may take with `auto`: the caches themselves are
as large, copies of dead ranks come on top, and so do the weights."""


@dataclasses.dataclass
class Kept:
    """One copy, and whether the rank tells what belongs there instead of writing it."""

    number: int
    copy: CacheCopy
    told: bool


class CacheCopies:
    """All copies of a server. `way` is memory, stream or off; `reason` says why, where it was not asked for. A copy has
    `entries` of a rank's own requests and, in a tensor group, as many of each other member (`moejax.tensor`)."""

    def __init__(
        self, way: str, *, entries: int, entry_bytes: int, most_lost: int, tensor: int = 1, reason: str = ""
    ) -> None:
        self.way = way
        self.reason = reason
        self.entry_bytes = entry_bytes
        self._entries = entries
        self._all_entries = entries * tensor
        self._groups: dict[int, tuple[int, ...]] = {}
        self._fell: dict[int, tuple[int, ...]] = {}
        """The tensor group that each rank was in when it was lost."""
        self._most_lost = most_lost
        self._numbers = 0
        self._of: dict[int, Kept] = {}
        self._lost: dict[int, Kept] = {}
        self._last: dict[int, int] = {}
        self._steps: collections.deque[Batch] = collections.deque(maxlen=STEPS_KEPT)

    @classmethod
    def of(
        cls, wanted: str, ranks: int, *, entries: int, entry_bytes: int, tensor: int = 1, free: int | None = None
    ) -> Self:
        """As the setting wants it: `auto` is `memory` where copies of all ranks' caches, when they are full, are no
        more than a share of the memory that is free. `entry_bytes` are those of a rank's share of the heads."""
        way, reason = wanted, ""
        if wanted == "auto":
            need, free = ranks * size_of(entries * tensor, entry_bytes), free_bytes() if free is None else free
            way = "memory" if need <= SHARE * free else "off"
            if way == "off":
                reason = (
                    f"copies of the caches may take {need >> 20} MiB, more than a quarter of the {free >> 20} MiB "
                    "free: not made. Lower --pages-per-rank or give --protect-cache memory."
                )
        return cls(way, entries=entries, entry_bytes=entry_bytes, most_lost=ranks, tensor=tensor, reason=reason)

    @property
    def on(self) -> bool:
        """Caches are copied."""
        return self.way != "off"

    @property
    def bytes(self) -> int:
        """Memory that all copies take now."""
        return sum(kept.copy.bytes for kept in (*self._of.values(), *self._lost.values()))

    def has(self, rank: int) -> bool:
        """A rank that attends has been told of a copy, or need not be."""
        return not self.on or rank in self._of

    def fresh(self, rank: int, kind: type[Any] = link_pb2.Configure, *, here: bool = True) -> Any:
        """An empty copy for a rank that begins to attend: the part of its configuration, or of a plan, that tells it.
        A path means nothing to one that is not `here`, on the front's machine: it tells what belongs there. Without
        memory for a copy the rank serves all the same, and `reason` says so."""
        if not self.on:
            return kind()
        before = self._of.pop(rank, None)
        if before is not None:
            before.copy.close()
        try:
            copy = _made(self._all_entries, self.entry_bytes)
        except OSError as error:
            self.reason = f"rank {rank} has no copy of its cache: {error}"
            return kind()
        told = self.way == "stream" or not here
        self._keep(rank, copy, told=told)
        return kind(tell_copies=True) if told else kind(cache_copy=copy.path)

    def taken_over(self, rank: int, path: str) -> link_pb2.Configure | None:
        """The copy that a rank of a front before this one writes, with what is in it: the part of its configuration
        that tells it. None if it writes none, or one that is of no use here."""
        if not path or self.way != "memory":
            return None
        try:
            copy = CacheCopy.open(Path(path))
        except (OSError, NotCopied):
            return None
        if (copy.entries, copy.entry_bytes) != (self._all_entries, self.entry_bytes):
            copy.close()
            return None
        self._keep(rank, copy, told=False)
        return link_pb2.Configure(cache_copy=copy.path)

    def begun(self, rank: int) -> None:
        """A rank will write nothing more for a front before this one, whose steps had other numbers."""
        if rank in self._of:
            self._of[rank].copy.seal(NOTHING)

    def _keep(self, rank: int, copy: CacheCopy, *, told: bool) -> None:
        self._numbers += 1
        self._of[rank] = Kept(self._numbers, copy, told)

    def told(self, rank: int, message: link_pb2.Copied) -> None:
        """A rank that cannot reach its copy tells what belongs there."""
        kept = self._of.get(rank)
        if kept is None:
            return
        kept.told = True
        entries, tokens, positions = (
            np.frombuffer(field, np.int32) for field in (message.entries, message.tokens, message.positions)
        )
        if len(entries):
            rows = np.frombuffer(message.rows, np.uint8).reshape(len(entries), -1)
            kept.copy.write(entries, tokens, positions, rows)
        if message.HasField("sealed"):
            kept.copy.seal(message.sealed)

    def maps(self, rank: int) -> bool:
        """A rank can open copies itself, as far as is known."""
        kept = self._of.get(rank)
        return self.way == "memory" and (kept is None or not kept.told)

    def stepped(self, batch: Batch) -> None:
        """The results of a step are in."""
        if self.on:
            self._steps.append(batch)

    def grouped(self, groups: Mapping[int, tuple[int, ...]]) -> None:
        """A plan is put into force, with these tensor groups."""
        self._groups = dict(groups)

    def lost(self, rank: int) -> None:
        """The process that was this rank has ended, or will, or its group is no more: its copy is that of the requests
        there were."""
        kept = self._of.pop(rank, None)
        if kept is not None:
            self._lost[kept.number], self._last[rank] = kept, kept.number
            self._fell[rank] = self._groups.get(rank, (rank,))

    def salvage(self, sequence: Sequence, page_size: int) -> Salvage | None:
        """What the copies of the rank that a request ran on, and of its group, have of it after the rank was lost."""
        rank = sequence.rank
        assert rank is not None
        group = self._fell.get(rank, (rank,))
        kept = [self._lost.get(self._last.get(mate, 0)) for mate in group]
        copies = [each for each in kept if each is not None]
        if len(copies) < len(group):
            return None
        sealed = min(each.copy.sealed for each in copies)
        if len(self._steps) == STEPS_KEPT and self._steps[0].step > sealed:
            return None  # it fell behind further than is remembered
        count = copied(sequence, written_since(sealed, rank, self._steps, page_size), page_size)
        if count == 0:
            return None
        chain = None if sequence.chain is None else sequence.chain[: count // page_size]
        first = group.index(rank) * (self._entries // page_size)
        pages = tuple(first + page for page in sequence.pages[: -(-count // page_size)])
        return Salvage(tuple(each.number for each in copies), pages, count, chain)

    def find(self, number: int) -> Kept | None:
        """A copy of a rank that died."""
        return self._lost.get(number)

    def keep_only(self, numbers: Collection[int]) -> set[int]:
        """Close the copies of dead ranks that nobody needs. Returns the numbers of those that had to go although
        somebody does: the oldest, when there are more than there are ranks."""
        for number in [number for number in self._lost if number not in numbers]:
            self._lost.pop(number).copy.close()
        over = sorted(self._lost)[: max(0, len(self._lost) - self._most_lost)]
        for number in over:
            self._lost.pop(number).copy.close()
        return set(over)

    def close(self) -> None:
        """Give all memory back."""
        for kept in (*self._of.values(), *self._lost.values()):
            kept.copy.close()
        self._of.clear()
        self._lost.clear()


def _made(entries: int, entry_bytes: int) -> CacheCopy:
    file = os.memfd_create("moejax-cache")
    try:
        return CacheCopy.create(file, entries, entry_bytes)
    finally:
        os.close(file)


def free_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: of the machine, and of its control group where that has a bound."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    group = root / "sys/fs/cgroup"
    try:
        bound = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return max(0, min(free, bound))
