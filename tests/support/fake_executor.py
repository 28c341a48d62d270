"""Ranks that answer the front's messages without processes, and die at the message a test names.

The real loop and the real failover run on them; their model is that of `tests.fakes`. A step checks what a wrong
recovery would break: that all ranks of it are in one epoch, and that every route leads to a slot with its expert.
"""

import asyncio
import dataclasses
from collections.abc import Callable

import numpy as np

from serving.batch import DROPPED, Bucket, _padding
from serving.cache_copy import NotCopied
from serving.health import Cause
from serving.links import Loss, RankLost, RankRefused
from serving.mesh_key import MeshKey
from serving.page_index import PageIndex
from serving.protector import Protector, restored_rows
from serving.proto.moejax.v1 import link_pb2
from tests.fakes import FakeRank


@dataclasses.dataclass
class Process:
    """What the loop looks at of a rank's process."""

    pid: int
    home: None = None

    def said(self) -> str:
        return "nothing"


def weights_of(layer: int, expert: int) -> bytes:
    """The weights of an expert."""
    return np.random.default_rng((layer, expert)).bytes(100)


class FakeProcess:
    """One incarnation of a rank."""

    def __init__(self, pid: int) -> None:
        self.process = Process(pid)
        self.loss: Loss | None = None
        self.compiles = 0
        self.cache: FakeRank | None = None
        self.held: np.ndarray | None = None
        self.doubted: set[tuple[int, int]] = set()
        """Slots found damaged: the next plan that wants something in them has it read again."""
        self.parity: dict[tuple[int, tuple[int, ...]], bytearray] = {}
        self.arriving = bytearray()
        self.given: set[tuple[int, int]] = set()
        """Experts that the next plan need not read."""
        self.routes: np.ndarray | None = None
        self.mesh: MeshKey | None = None
        self.epoch = -1
        self.generation = 0
        self.index = PageIndex()
        self.last = 0
        self.chosen: np.ndarray | None = None
        self.protector: Protector | None = None
        self.uncopied: tuple[int, np.ndarray] | None = None
        """The last step and the entries it wrote, until they are copied: when the next message comes."""


class FakeCoordinator:
    """A coordination service that never ends by itself."""

    address = "nowhere"

    def __init__(self) -> None:
        self.process = self
        self.pid = 0
        self._ended = asyncio.Event()

    @classmethod
    async def start(cls, ranks: int, seats: int, host: str = "") -> "FakeCoordinator":
        return cls()

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def stop(self) -> None:
        self._ended.set()


class FakeLinks:
    """As `serving.links.RankLinks`. `fails(number, rank, what)` is asked at every message: the rank it names dies
    before the message is answered, in the middle of copying its cache. `log` has all messages."""

    front_lag_s = 0.0

    def __init__(self, buckets: tuple[Bucket, ...], *, max_pages: int, layers: int = 2) -> None:
        self.fails: Callable[[int, int, str], int | None] = lambda number, rank, what: None
        self.log: list[tuple[int, str]] = []
        self.damaged: set[tuple[int, int, int]] = set()
        self.on_loss: Callable[[Loss], object] = lambda loss: None
        self.store = True
        """Experts can be read from the store."""
        self.masked_in_steps: set[tuple[int, int]] = set()
        self.masked_in_plans: set[tuple[int, int]] = set()
        """Experts, (layer, expert), that some step, or some plan, had to do without."""
        self._buckets = buckets
        self._max_pages = max_pages
        self._layers = layers
        self._ranks: dict[int, FakeProcess] = {}
        self._pids = 100
        self._page_size = 0
        self.shares_memory = False
        self._turn = asyncio.Lock()
        self.looked_ahead = 0
        """Steps that were sent while another was in flight."""
        self.on_copied: Callable[[int, link_pb2.Copied], None] = lambda rank, copied: None

    def spawn(self, rank: int) -> FakeProcess:
        self._pids += 1
        self._ranks[rank] = FakeProcess(self._pids)
        return self._ranks[rank]

    def inherit(self) -> tuple[int, ...]:
        return tuple(rank for rank, each in self._ranks.items() if each.loss is None)

    async def attached(self, rank: int) -> link_pb2.Hello:
        await asyncio.sleep(0)
        each = self._ranks[rank]
        return link_pb2.Hello(
            epoch=max(each.epoch, 0),
            generation=each.generation,
            full=each.index.hello(),
            serves=each.epoch >= 0,
            cache_copy=each.protector.path if each.protector is not None else "",
        )

    def get(self, rank: int) -> FakeProcess | None:
        return self._ranks.get(rank)

    def home(self, rank: int) -> None:
        return self._ranks[rank].process.home if rank in self._ranks else None

    async def call_all(self, what: str, messages) -> list[link_pb2.Done]:
        return await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))

    def watch(self, rank: int) -> None: ...

    def unwatch(self, rank: int) -> None: ...

    def abort(self, ranks, epoch: int, *, connecting: int = 0) -> None:
        self.log += [(rank, "abort") for rank in ranks]

    async def fenced(self, rank: int) -> None:
        assert self._ranks[rank].loss is not None, f"rank {rank} is waited for and lives"

    def give_up(self, ranks, why: str) -> None:
        for rank in ranks:
            self.declare(rank, Cause("error", why), 0.0)

    def declare(self, rank: int, cause: Cause, evidence_at: float) -> None:
        each = self._ranks[rank]
        if each.loss is None:
            each.loss = Loss(rank, cause, evidence_at, evidence_at)
            self.on_loss(each.loss)

    def kill(self, rank: int) -> None:
        """The process of a rank ends."""
        self.declare(rank, Cause("exited", "process ended with signal 9"), 0.0)

    async def call(self, rank: int, what: str, message) -> link_pb2.Done:
        each = self._alive(rank)
        await self._heard(rank, what)
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        try:
            return link_pb2.Done(**(getattr(self, f"_{what}", lambda *_: None)(rank, each, message) or {}))
        except (NotCopied, LookupError) as error:
            raise RankRefused(rank, what, str(error)) from None

    async def step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        self.looked_ahead += any(part.after for part in parts.values())
        async with self._turn:  # ranks do one step after the other
            return await self._step(parts)

    async def _step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        for rank in parts:
            await self._heard(rank, "step")
        ranks = {rank: self._alive(rank) for rank in parts}
        self._check(ranks, parts)
        answers = {}
        for rank, each in ranks.items():
            arrays = self._arrays(parts[rank])
            assert each.cache is not None
            assert each.held is not None
            if each.routes is not None:
                self.masked_in_steps |= {(int(layer), int(e)) for layer, e in np.argwhere(each.routes < 0)}
            each.index.note(parts[rank].full)
            for row, source in enumerate(np.frombuffer(parts[rank].sources, np.int32)):
                if source >= 0:
                    arrays["tokens"][row] = each.chosen[source]
            tokens, logprobs = each.cache.step(arrays, {})
            wrote = arrays["write"][arrays["write"] != DROPPED]
            each.index.wrote(wrote // self._page_size)
            each.cache.commit(arrays)
            each.uncopied, each.last, each.chosen = (parts[rank].step, wrote), parts[rank].step, tokens
            load = np.zeros(each.routes.shape, np.int32)
            answers[rank] = link_pb2.StepDone(
                tokens=tokens.tobytes(), logprobs=logprobs.tobytes(), expert_load=load.tobytes(), own_ms=1.0
            )
        return answers

    # -- What ranks do ------------------------------------------------------------------------------------------

    def _configure(self, rank: int, each: FakeProcess, m: link_pb2.Configure) -> dict:
        self._page_size = m.page_size
        each.cache = each.cache or FakeRank(m.pages, m.page_size)
        each.protector, each.uncopied = Protector.of(m), None
        return {"shares_memory": self.shares_memory}

    def _join(self, rank: int, each: FakeProcess, m: link_pb2.Join) -> None:
        used = m.pages_used * self._page_size
        assert each.cache is not None
        each.cache.token[used:] = each.cache.position[used:] = -1
        each.epoch, each.generation = -1, m.generation
        each.index.keep(m.pages_used)

    def _adopt(self, rank: int, each: FakeProcess, m: link_pb2.Adopt) -> dict:
        key = MeshKey.read(m.mesh)
        wanted = np.frombuffer(m.slots, np.int32).reshape(self._layers, key.slots_of(rank))
        each.index.keep(0)
        if m.WhichOneof("protection") is not None:
            each.protector = Protector.of(m)
        if not key.attends(rank):
            each.cache.token[:] = each.cache.position[:] = -1
        before, read, missing = self._experts(each), 0, []
        grown = each.held is None or each.held.shape != wanted.shape
        if grown:
            each.held = np.full(wanted.shape, -1, np.int32)
        for layer, slot in np.argwhere(wanted >= 0).tolist():
            expert, doubted = int(wanted[layer, slot]), (layer, slot) in each.doubted
            there = (layer, expert) in before if grown else each.held[layer, slot] == expert and not doubted
            if there or (layer, expert) in each.given:
                continue
            if self.store:
                read += 1
            else:
                missing.append(link_pb2.ExpertSlot(layer=layer, slot=slot, expert=expert))
        each.doubted = {(layer, slot) for layer, slot in each.doubted if wanted[layer, slot] < 0}
        each.held = np.where(wanted >= 0, wanted, each.held)
        for lost in missing:
            each.held[lost.layer, lost.slot] = -1
        each.given.clear()
        each.routes = np.frombuffer(m.expert_to_slot, np.int32).reshape(self._layers, -1)
        self.masked_in_plans |= {(int(layer), int(e)) for layer, e in np.argwhere(each.routes < 0)}
        each.mesh, each.epoch = key, m.epoch
        return {"experts_loaded": read, "missing": missing, "trouble": "gone"}

    def _read_weights(self, rank: int, each: FakeProcess, m: link_pb2.ReadWeights) -> dict:
        if m.of.parity:
            whole = bytes(each.parity[m.of.layer, tuple(m.of.experts)])
        else:
            layer, (expert,) = m.of.layer, m.of.experts
            if (layer, expert) not in self._experts(each):
                raise LookupError(f"expert {expert} of layer {layer} is not on rank {rank}")
            whole = weights_of(layer, expert)
        return {"rows": whole[m.first : m.first + m.count], "size": len(whole)}

    def _write_weights(self, rank: int, each: FakeProcess, m: link_pb2.WriteWeights) -> None:
        key = m.of.layer, tuple(m.of.experts)
        if m.of.parity and m.first == 0:
            each.parity[key] = bytearray()
        elif m.first == 0:
            each.arriving = bytearray()
        whole = each.parity[key] if m.of.parity else each.arriving
        assert len(whole) == m.first
        whole += m.rows
        if len(whole) == m.size and not m.of.parity:
            layer, (expert,) = key
            if whole != weights_of(layer, expert):
                raise LookupError(f"expert {expert} of layer {layer} was made again with other weights")
            each.given.add((layer, expert))

    def _keep_parity(self, rank: int, each: FakeProcess, m: link_pb2.KeepParity) -> None:
        kept = [(m.layer, tuple(of.experts)) for of in m.parities]
        each.parity = {key: whole for key, whole in each.parity.items() if key[0] != m.layer or key in kept}

    def _read_cache(self, rank: int, each: FakeProcess, m: link_pb2.ReadCache) -> dict:
        entries = self._entries(m)
        return {"rows": np.stack([each.cache.token[entries], each.cache.position[entries]]).tobytes()}

    def _write_cache(self, rank: int, each: FakeProcess, m: link_pb2.WriteCache) -> None:
        rows = np.frombuffer(m.rows, np.int64).reshape(2, -1)
        entries = self._entries(m)
        each.index.wrote(entries // self._page_size)
        each.cache.token[entries], each.cache.position[entries] = rows
        assert rows[0].tolist() == np.frombuffer(m.tokens, np.int32).tolist()
        self._copy(rank, each, entries)

    def _restore_cache(self, rank: int, each: FakeProcess, m: link_pb2.RestoreCache) -> None:
        rows = restored_rows(m, self._page_size).view(np.int32).reshape(-1, 2)
        entries = self._entries(m)
        each.index.wrote(entries // self._page_size)
        each.cache.token[entries], each.cache.position[entries] = rows.T
        self._copy(rank, each, entries)

    def _inspect(self, rank: int, each: FakeProcess, m: link_pb2.Inspect) -> dict:
        found = [slot for slot in sorted(self.damaged) if slot[0] == rank]
        self.damaged -= set(found)
        missing = []
        for _, layer, slot in found:
            missing.append(link_pb2.ExpertSlot(layer=layer, slot=slot, expert=int(each.held[layer, slot])))
            each.doubted.add((layer, slot))
        return {"missing": missing}

    # -- Behind it ----------------------------------------------------------------------------------------------

    def _experts(self, each: FakeProcess) -> set[tuple[int, int]]:
        """The (MoE layer, expert) that are in slots of a rank, intact."""
        held = each.held if each.held is not None else np.zeros((0, 0))
        return {(int(x), int(held[x, s])) for x, s in np.argwhere(held >= 0) if (int(x), int(s)) not in each.doubted}

    async def _heard(self, rank: int, what: str) -> None:
        victim = self.fails(len(self.log), rank, what)
        self.log.append((rank, what))
        if victim is not None and self._ranks[victim].loss is None:
            dying = self._ranks[victim]
            if dying.uncopied is not None:
                self._copy(victim, dying, dying.uncopied[1][::2])
            self.kill(victim)
        each = self._ranks[rank]
        if each.uncopied is not None and each.loss is None:
            (step, entries), each.uncopied = each.uncopied, None
            self._copy(rank, each, entries, step)
        await asyncio.sleep(0)

    def _copy(self, rank: int, each: FakeProcess, entries: np.ndarray, step: int | None = None) -> None:
        """Copy entries, and seal the step that they are all of."""
        if each.protector is None:
            return
        assert each.cache is not None
        rows = np.stack([each.cache.token[entries], each.cache.position[entries]], axis=-1).astype(np.int32)
        each.protector.copy(entries, rows[:, 0], rows[:, 1], rows[:, None])
        if step is not None:
            each.protector.seal(step)
        for message in each.protector.told():
            self.on_copied(rank, message)

    def _alive(self, rank: int) -> FakeProcess:
        each = self._ranks[rank]
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return each

    def _check(self, ranks: dict[int, FakeProcess], parts: dict[int, link_pb2.Step]) -> None:
        for rank, each in ranks.items():
            if each.epoch != parts[rank].epoch:
                raise RankRefused(rank, "step", f"epoch {parts[rank].epoch} is not {each.epoch}")
            assert parts[rank].after in (0, each.last), f"a step after {parts[rank].after}, not {each.last}"
            assert set(each.mesh.ranks) == set(ranks), f"rank {rank} is in {each.mesh}, the step in {tuple(ranks)}"
            assert each.mesh.attends(rank) or not parts[rank].inputs, f"rank {rank} holds experts and was given work"
        for rank, each in ranks.items():
            for layer, expert in np.argwhere(each.routes >= 0):
                holder, slot = divmod(int(each.routes[layer, expert]), each.mesh.slots)
                held = ranks[each.mesh.holders[holder]].held[layer, slot]
                assert held == expert, f"rank {rank} sends expert {expert} of layer {layer} to a slot with {held}"

    def _entries(self, m) -> np.ndarray:
        at = np.arange(m.first, m.first + m.count)
        return np.array(m.pages)[at // self._page_size] * self._page_size + at % self._page_size

    def _arrays(self, part: link_pb2.Step) -> dict[str, np.ndarray]:
        padding = _padding(self._buckets[part.bucket], self._max_pages)
        if not part.inputs:
            return padding
        packed, at, arrays = np.frombuffer(part.inputs, np.int32), 0, {}
        for name, like in padding.items():
            arrays[name] = packed[at : at + like.size].view(like.dtype).reshape(like.shape).copy()
            at += like.size
        return arrays
