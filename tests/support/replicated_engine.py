"""The engine on fake ranks whose caches are replicated, one step late, to real memory."""

from collections.abc import Callable, Collection

import numpy as np

from planner.plan.step_layout import DROPPED
from serving.engine.batch import Batch
from serving.engine.kv_restore import drop_recoverable, mark_restored, sequences_to_restore
from serving.engine.limits import Limits
from serving.engine.rank_changes import lose
from serving.engine.scheduler import reserve_for_restore
from serving.engine.sequence import Sequence
from serving.engine.state import EngineState
from serving.executor.kv_replica import entry_indices
from serving.recovery.kv_replicas import KVReplicas
from serving.worker.kv_replicator import KVReplicator
from simulation.hand_model import HandCache
from tests.support.fake_engine import FakeEngine

ENTRY_BYTES = 8
"""A fake entry is its token and position."""


class ReplicatedEngine(FakeEngine):
    """As FakeEngine. `piece` entries of a request are restored between two steps; `way` as in the settings."""

    def __init__(
        self,
        limits: Limits,
        pages: dict[int, int],
        *,
        way: str,
        most_pages: int,
        piece: int = 5,
        replicas: KVReplicas | None = None,
    ) -> None:
        super().__init__(EngineState.start(limits, pages))
        self.piece = piece
        self.restored = 0
        entries = most_pages * limits.page_size
        self.replicas = replicas or KVReplicas.create(way, len(pages), entries=entries, entry_bytes=ENTRY_BYTES)
        self.replicas.needs.append(self._needed)
        self.replicators: dict[int, KVReplicator] = {}
        self.uncopied: dict[int, tuple[int, np.ndarray]] = {}
        for rank, count in pages.items():
            self.ranks[rank] = HandCache(count, limits.page_size)
            self._protect(rank)

    def end(self, batch: Batch) -> None:
        for rank in list(self.uncopied):
            self.copy_now(rank)
        super().end(batch)
        self.replicas.record_step(batch)
        for rank in batch.scheduled:
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

    def finish(self) -> None:
        super().finish()
        self.close()

    def lose_protected(self, dead: Collection[int], *, part: int = 0, worth: Callable[[Sequence], bool]) -> None:
        """Ranks die when `part` of the entries of their last step have been copied; what is `worth` it is restored."""
        for rank in set(dead) & set(self.ranks):
            if rank in self.uncopied:
                self._copy(rank, self.uncopied.pop(rank)[1][:part])
            self.replicas.retire(rank)
            del self.ranks[rank], self.replicators[rank]
        size, found = self.state.limits.page_size, {}
        for sequence in map(Sequence.without_in_flight, self.state.running.values()):
            if sequence.rank in dead and not sequence.restoring and worth(sequence):
                found[sequence.id] = self.replicas.recoverable(sequence, size)
        self._move(lose(self.state, dead, {key: each for key, each in found.items() if each is not None}))

    def adopt(self, pages, *, fresh=(), masked=()) -> None:
        before = dict(self.ranks)
        super().adopt(pages, fresh=fresh, masked=masked)
        for rank, fake in self.ranks.items():
            if before.get(rank) is not fake:
                self.replicas.retire(rank)
                self._protect(rank)

    def restore(self) -> None:
        """Give places to what can be restored, and restore a piece of it on each rank."""
        gone = self.replicas.discard_except({number for needed in self.replicas.needs for number in needed()})
        lost = [
            each.id
            for each in sequences_to_restore(self.state)
            if each.recoverable and gone.intersection(each.recoverable.replicas)
        ]
        self._move(drop_recoverable(self.state, lost))
        self._move(reserve_for_restore(self.state))
        for sequence in [each for each in self.state.running.values() if each.restoring]:
            self._restore(sequence)

    def _needed(self) -> set[int]:
        wanted = (each.recoverable for each in sequences_to_restore(self.state))
        return {number for each in wanted if each is not None for number in each.replicas}

    def close(self) -> None:
        self.replicas.close()

    def copy_now(self, rank: int) -> None:
        """The rank copies what its last step wrote."""
        step, entries = self.uncopied.pop(rank)
        if rank in self.ranks:
            self._copy(rank, entries)
            self.replicators[rank].seal(step)
            self._tell(rank)

    def _restore(self, sequence: Sequence) -> None:
        recoverable, first = sequence.recoverable, sequence.computed
        assert recoverable is not None
        assert sequence.rank is not None
        count = max(0, min(self.piece, recoverable.count - first))
        if count:
            kept, size, fake = (
                self.replicas.replica(recoverable.replicas[0]),
                self.state.limits.page_size,
                self.ranks[sequence.rank],
            )
            assert kept is not None
            source = entry_indices(recoverable.pages, size, first, count)
            tokens = np.array(sequence.tokens(first, first + count))
            rows = kept.replica.read(source, tokens, np.arange(first, first + count)).view(np.int32).reshape(-1, 2)
            target = entry_indices(sequence.pages, size, first, count)
            fake.token[target], fake.position[target] = rows.T
            self._copy(sequence.rank, target)
            self.restored += count
        self._move(mark_restored(self.state, sequence.id, first + count))

    def _protect(self, rank: int) -> None:
        replicator = KVReplicator.of(self.replicas.assign(rank))
        assert replicator is not None
        self.replicators[rank] = replicator
        self.uncopied.pop(rank, None)

    def _copy(self, rank: int, entries: np.ndarray) -> None:
        fake, replicator = self.ranks[rank], self.replicators[rank]
        rows = np.stack([fake.token[entries], fake.position[entries]], axis=-1).astype(np.int32)
        replicator.copy(entries, rows[:, 0], rows[:, 1], rows[:, None])
        self._tell(rank)

    def _tell(self, rank: int) -> None:
        for message in self.replicators[rank].take_messages():
            self.replicas.receive(rank, message)
