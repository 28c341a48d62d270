"""The replicas of the ranks' KV caches on the front's host: one for each attention rank, and those of lost ranks while
a request needs them (docs/decisions/0006).

A rank of this host maps its replica and writes it itself; the front writes what another rank streams to it. Either way
the memory outlives the rank and its host. When the front dies, the next one takes over the replicas that ranks map.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from planner.plan.shape import POOLS
from serving.config import Settings
from serving.engine.batch import Batch
from serving.engine.kv_restore import replicated_entries, written_since
from serving.engine.sequence import RecoverableKV, Sequence
from serving.errors import StartError
from serving.executor.kv_replica import UNSEALED, KVReplica, NotReplicated, replica_bytes
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import PreparedModel

STEPS_KEPT = 8
"""Steps that are remembered, for entries that were not replicated yet when a rank died: those of the last step."""
AUTO_MEMORY_SHARE = 0.25
"""The part of the memory that is free at the start which the replicas of all caches may take with `auto`. The caches
themselves are as large, replicas of lost ranks come on top, and so do the weights."""

STATES_NOT_KEPT = (
    "{name} has layers whose context is a state: no replica of it is kept, and nothing is drafted. Requests of a lost "
    "rank are computed again from their tokens; a drain moves their states."
)
"""The line for whoever serves a model of which a part of the cache cannot be replicated."""


@dataclasses.dataclass
class RankReplica:
    """The replica of one rank, whether the rank streams its entries instead of writing them, and whether the entries
    that the rank wrote for an earlier front are in it."""

    number: int
    replica: KVReplica
    streamed: bool
    reopened: bool = False


class KVReplicas:
    """All KV replicas of a server. `channel` is memory, stream or off; `reason` says why it is off although it was not
    asked to be. A replica has `entries` of a rank's own requests and, in a tensor group, as many of each other member
    (`moejax.model.tensor_parallel`); `entry_bytes` are those of one entry on one rank; replicas of at most `most_lost`
    lost ranks are kept."""

    def __init__(
        self, channel: str, *, entries: int, entry_bytes: int, most_lost: int, tensor: int = 1, reason: str = ""
    ) -> None:
        self.channel = channel
        self.reason = reason
        self.entry_bytes = entry_bytes
        self._entries = entries
        self._all_entries = entries * tensor
        self._groups: dict[int, tuple[int, ...]] = {}
        self._group_at_loss: dict[int, tuple[int, ...]] = {}
        """The tensor group of each lost rank when it was lost."""
        self._most_lost = most_lost
        self._numbers = 0
        self._live: dict[int, RankReplica] = {}
        self._lost: dict[int, RankReplica] = {}
        self._last_lost: dict[int, int] = {}
        self._steps: dict[int, collections.deque[Batch]] = {}
        """The last steps that each rank had a part in."""
        self.needs: list[Callable[[], Collection[int]]] = []
        """Of whoever restores from these replicas, functions that return the numbers that requests wait for."""

    @classmethod
    def of_server(cls, settings: Settings, model: PreparedModel, pages_per_rank: int, *, single_host: bool) -> Self:
        """The replicas of a server, whose ranks have caches of so many pages. Raises StartError where they are asked
        for and cannot be kept."""
        wanted = settings.kv_replication
        if model.state_bytes and wanted in ("memory", "stream"):
            raise StartError(
                f"kv_replication is {wanted!r}, but {model.name} has layers whose context is a state, of which no "
                "replica is kept yet. Leave it out: requests of a lost rank are computed again from their tokens."
            )
        off = model.state_bytes or (wanted == "auto" and not single_host and settings.arch != POOLS)
        return cls.create(
            "off" if off else wanted,
            settings.ranks,
            automatic="memory" if single_host else "stream",
            reason=STATES_NOT_KEPT.format(name=model.name) if model.state_bytes else "",
            entries=pages_per_rank * settings.page_size,
            entry_bytes=model.cache_bytes_per_token // settings.tensor,
            tensor=settings.tensor,
        )

    @classmethod
    def create(
        cls,
        wanted: str,
        ranks: int,
        *,
        automatic: str = "memory",
        entries: int,
        entry_bytes: int,
        tensor: int = 1,
        free: int | None = None,
        reason: str = "",
    ) -> Self:
        """The replicas for a setting: memory, stream, off, or auto, which is `automatic` where the replicas of all full
        caches take no more than AUTO_MEMORY_SHARE of the `free` bytes, and else off. `entry_bytes` are those of a
        rank's shard of the heads, `reason` says why `wanted` is off although it was not asked to be."""
        channel = wanted
        if wanted == "auto":
            need, free = ranks * replica_bytes(entries * tensor, entry_bytes), free_bytes() if free is None else free
            channel = automatic if need <= AUTO_MEMORY_SHARE * free else "off"
            if channel == "off":
                reason = (
                    f"copies of the caches may take {need >> 20} MiB, more than a quarter of the {free >> 20} MiB "
                    "free: not made. Lower --pages-per-rank or give --kv-replication {automatic}."
                )
        return cls(channel, entries=entries, entry_bytes=entry_bytes, most_lost=ranks, tensor=tensor, reason=reason)

    @property
    def on(self) -> bool:
        """True when caches are replicated."""
        return self.channel != "off"

    @property
    def bytes(self) -> int:
        """Bytes of memory that all replicas take now."""
        return sum(held.replica.bytes for held in (*self._live.values(), *self._lost.values()))

    def take_warning(self) -> str:
        """Why caches are not replicated although they should be; "" after the first call, and if they are."""
        taken, self.reason = self.reason, ""
        return taken

    def has(self, rank: int) -> bool:
        """Whether an attention rank has a replica, or needs none."""
        return not self.on or rank in self._live

    def assign(self, rank: int, kind: type[Any] = link_pb2.Configure, *, on_front_host: bool = True) -> Any:
        """Make an empty replica for a rank that becomes an attention rank. Returns the fields of its Configure, or
        Adopt, message that say where it is. A rank that is not `on_front_host` cannot open it and streams its entries.
        When there is no memory for a replica the rank serves without one, and `reason` says so."""
        if not self.on:
            return kind()
        before = self._live.pop(rank, None)
        if before is not None:
            before.replica.close()
        try:
            replica = _new_replica(self._all_entries, self.entry_bytes)
        except OSError as error:
            self.reason = f"rank {rank} has no copy of its cache: {error}"
            return kind()
        streamed = self.channel == "stream" or not on_front_host
        self._assign(rank, replica, streamed=streamed)
        return kind(tell_copies=True) if streamed else kind(cache_copy=replica.path)

    def reopen(self, rank: int, path: str) -> link_pb2.Configure | None:
        """Open the replica that a rank of an earlier front writes, with the entries in it. Returns the fields of its
        Configure message that say where it is; None if the rank has none, or one of another shape."""
        if not path or self.channel != "memory":
            return None
        try:
            replica = KVReplica.open(Path(path))
        except (OSError, NotReplicated):
            return None
        if (replica.entries, replica.entry_bytes) != (self._all_entries, self.entry_bytes):
            replica.close()
            return None
        self._assign(rank, replica, streamed=False)
        self._live[rank].reopened = True
        return link_pb2.Configure(cache_copy=replica.path)

    def is_reopened(self, rank: int) -> bool:
        """Whether a rank's replica has the entries that the rank wrote for an earlier front."""
        return rank in self._live and self._live[rank].reopened

    def unseal(self, rank: int) -> None:
        """A rank writes no more for an earlier front: the seal of its replica, a step of that front, is reset."""
        if rank in self._live:
            self._live[rank].replica.seal(UNSEALED)

    def _assign(self, rank: int, replica: KVReplica, *, streamed: bool) -> None:
        self._numbers += 1
        self._steps.pop(rank, None)
        self._live[rank] = RankReplica(self._numbers, replica, streamed)

    def receive(self, rank: int, message: link_pb2.Copied) -> None:
        """Write the entries that a rank streams into its replica."""
        held = self._live.get(rank)
        if held is None:
            return
        held.streamed = True
        entries, tokens, positions = (
            np.frombuffer(field, np.int32) for field in (message.entries, message.tokens, message.positions)
        )
        if len(entries):
            rows = np.frombuffer(message.rows, np.uint8).reshape(len(entries), -1)
            held.replica.write(entries, tokens, positions, rows)
        if message.HasField("sealed"):
            held.replica.seal(message.sealed)

    def can_map(self, rank: int) -> bool:
        """Whether a rank can open replicas itself, as far as is known."""
        held = self._live.get(rank)
        return self.channel == "memory" and (held is None or not held.streamed)

    def record_step(self, batch: Batch) -> None:
        """Remember a step whose results were applied."""
        for rank in batch.scheduled if self.on else ():
            self._steps.setdefault(rank, collections.deque(maxlen=STEPS_KEPT)).append(batch)

    def set_groups(self, groups: Mapping[int, tuple[int, ...]]) -> None:
        """A plan with these tensor groups is being adopted."""
        self._groups = dict(groups)

    def retire(self, rank: int) -> None:
        """A rank was lost, or its cache is invalidated: its replica has what is left of its requests' entries."""
        held = self._live.pop(rank, None)
        if held is not None:
            self._lost[held.number], self._last_lost[rank] = held, held.number
            self._group_at_loss[rank] = self._groups.get(rank, (rank,))

    def recoverable(self, sequence: Sequence, page_size: int) -> RecoverableKV | None:
        """The KV entries of a request that the replicas of its lost rank, and of its tensor group, have; None if there
        are none."""
        rank = sequence.rank
        assert rank is not None
        group = self._group_at_loss.get(rank, (rank,))
        held = [self._lost.get(self._last_lost.get(peer, 0)) for peer in group]
        replicas = [each for each in held if each is not None]
        if len(replicas) < len(group):
            return None
        count = self._replicated(sequence, replicas, page_size)
        if count == 0:
            return None
        page_keys = None if sequence.page_keys is None else sequence.page_keys[: count // page_size]
        first = group.index(rank) * (self._entries // page_size)
        pages = tuple(first + page for page in sequence.pages[: -(-count // page_size)])
        return RecoverableKV(tuple(each.number for each in replicas), pages, count, page_keys)

    def to_send(self, sequence: Sequence, page_size: int) -> RecoverableKV | None:
        """All KV entries of a request, which another pool goes on with, in the replica of its living rank; None until
        they are there. Tensor groups have none."""
        held = self._live.get(-1 if sequence.rank is None else sequence.rank)
        if held is None or self._replicated(sequence, [held], page_size) < sequence.computed:
            return None
        pages = sequence.pages[: -(-sequence.computed // page_size)]
        page_keys = None if sequence.page_keys is None else sequence.page_keys[: sequence.computed // page_size]
        return RecoverableKV((held.number,), pages, sequence.computed, page_keys, sent=True)

    def _replicated(self, sequence: Sequence, replicas: list[RankReplica], page_size: int) -> int:
        """The number of leading entries of a request that all these replicas of its rank have."""
        sealed, rank = min(each.replica.sealed for each in replicas), sequence.rank
        assert rank is not None
        steps = self._steps.get(rank, ())
        if len(steps) == STEPS_KEPT and steps[0].step > sealed:
            return 0  # it is further behind than steps are remembered
        return replicated_entries(sequence, written_since(sealed, rank, steps, page_size), page_size)

    def replica(self, number: int) -> RankReplica | None:
        """The replica of a lost rank, or of a rank whose requests go on in another pool, by its number."""
        return self._lost.get(number) or next((each for each in self._live.values() if each.number == number), None)

    def discard_except(self, numbers: Collection[int]) -> set[int]:
        """Close the replicas of lost ranks but for these. Returns the numbers of replicas that are closed although
        they are needed: the oldest, when there are more than `most_lost`."""
        for number in [number for number in self._lost if number not in numbers]:
            self._lost.pop(number).replica.close()
        over = sorted(self._lost)[: max(0, len(self._lost) - self._most_lost)]
        for number in over:
            self._lost.pop(number).replica.close()
        return set(over)

    def close(self) -> None:
        """Free all memory."""
        for held in (*self._live.values(), *self._lost.values()):
            held.replica.close()
        self._live.clear()
        self._lost.clear()


def _new_replica(entries: int, entry_bytes: int) -> KVReplica:
    file = os.memfd_create("moejax-cache")
    try:
        return KVReplica.create(file, entries, entry_bytes)
    finally:
        os.close(file)


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take: of the machine, and of its control group where that has a
    bound."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    group = root / "sys/fs/cgroup"
    try:
        bound = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return max(0, min(free, bound))
