"""The engine on fake ranks whose caches are copied, one step late, to real memory that outlives them."""

from collections.abc import Callable, Collection

import numpy as np

from serving.batch import DROPPED, Batch
from serving.cache_copies import CacheCopies
from serving.cache_copy import entries_of
from serving.engine import EngineState, Limits, lose
from serving.protector import Protector
from serving.salvage import forget, restored, salvaged
from serving.scheduler import reserve
from serving.sequence import Sequence
from tests.fakes import FakeRank, FakeServer

ENTRY_BYTES = 8
"""A fake entry is its token and position."""


class ProtectedServer(FakeServer):
    """As FakeServer. `piece` entries of a request are restored between two steps; `way` as in the settings."""

    def __init__(self, limits: Limits, pages: dict[int, int], *, way: str, most_pages: int, piece: int = 5) -> None:
        super().__init__(EngineState.start(limits, pages))
        self.piece = piece
        self.restored = 0
        entries = most_pages * limits.page_size
        self.copies = CacheCopies.of(way, len(pages), entries=entries, entry_bytes=ENTRY_BYTES)
        self.protectors: dict[int, Protector] = {}
        self.uncopied: dict[int, tuple[int, np.ndarray]] = {}
        for rank, count in pages.items():
            self.ranks[rank] = FakeRank(count, limits.page_size)
            self._protect(rank)

    def end(self, batch: Batch) -> None:
        for rank in list(self.uncopied):
            self.copy_now(rank)
        super().end(batch)
        self.copies.stepped(batch)
        for rank in batch.work:
            write = self.arrays(batch, rank)["write"]
            self.uncopied[rank] = batch.step, write[write != DROPPED]

    def step(self) -> Batch | None:
        self.restore()
        return super().step()

    def drain(self, most: int = 4000) -> None:
        while most and (self.state.running or self.state.waiting):
            self.step()
            most -= 1
        assert not self.state.waiting, f"{list(self.state.waiting)} wait for ever"
        assert not self.state.running, f"{list(self.state.running)} run for ever"

    def lose_protected(self, dead: Collection[int], *, part: int = 0, worth: Callable[[Sequence], bool]) -> None:
        """Ranks die when `part` of the entries of their last step have been copied; what is `worth` it is restored."""
        for rank in set(dead) & set(self.ranks):
            if rank in self.uncopied:
                self._copy(rank, self.uncopied.pop(rank)[1][:part])
            self.copies.lost(rank)
            del self.ranks[rank], self.protectors[rank]
        size, found = self.state.limits.page_size, {}
        for sequence in map(Sequence.withdrawn, self.state.running.values()):
            if sequence.rank in dead and not sequence.restoring and worth(sequence):
                found[sequence.id] = self.copies.salvage(sequence, size)
        self._move(lose(self.state, dead, {key: each for key, each in found.items() if each is not None}))

    def adopt(self, pages, *, fresh=(), masked=()) -> None:
        before = dict(self.ranks)
        super().adopt(pages, fresh=fresh, masked=masked)
        for rank, fake in self.ranks.items():
            if before.get(rank) is not fake:
                self.copies.lost(rank)
                self._protect(rank)

    def restore(self) -> None:
        """Give places to what can be restored, and restore a piece of it on each rank."""
        needed = {number for each in salvaged(self.state) if each.salvage for number in each.salvage.copies}
        gone = self.copies.keep_only(needed)
        lost = [each.id for each in salvaged(self.state) if each.salvage and gone.intersection(each.salvage.copies)]
        self._move(forget(self.state, lost))
        self._move(reserve(self.state))
        for sequence in [each for each in self.state.running.values() if each.restoring]:
            self._restore(sequence)

    def close(self) -> None:
        self.copies.close()

    def copy_now(self, rank: int) -> None:
        """The rank copies what its last step wrote."""
        step, entries = self.uncopied.pop(rank)
        if rank in self.ranks:
            self._copy(rank, entries)
            self.protectors[rank].seal(step)
            self._tell(rank)

    def _restore(self, sequence: Sequence) -> None:
        salvage, first = sequence.salvage, sequence.computed
        assert salvage is not None
        assert sequence.rank is not None
        count = max(0, min(self.piece, salvage.count - first))
        if count:
            kept, size, fake = (
                self.copies.find(salvage.copies[0]),
                self.state.limits.page_size,
                self.ranks[sequence.rank],
            )
            assert kept is not None
            source = entries_of(salvage.pages, size, first, count)
            tokens = np.array(sequence.tokens(first, first + count))
            rows = kept.copy.read(source, tokens, np.arange(first, first + count)).view(np.int32).reshape(-1, 2)
            target = entries_of(sequence.pages, size, first, count)
            fake.token[target], fake.position[target] = rows.T
            self._copy(sequence.rank, target)
            self.restored += count
        self._move(restored(self.state, sequence.id, first + count))

    def _protect(self, rank: int) -> None:
        protector = Protector.of(self.copies.fresh(rank))
        assert protector is not None
        self.protectors[rank] = protector
        self.uncopied.pop(rank, None)

    def _copy(self, rank: int, entries: np.ndarray) -> None:
        fake, protector = self.ranks[rank], self.protectors[rank]
        rows = np.stack([fake.token[entries], fake.position[entries]], axis=-1).astype(np.int32)
        protector.copy(entries, rows[:, 0], rows[:, 1], rows[:, None])
        self._tell(rank)

    def _tell(self, rank: int) -> None:
        for message in self.protectors[rank].told():
            self.copies.told(rank, message)
