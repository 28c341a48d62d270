"""Which ranks serve under which plan: start, loss, rejoin, and getting ready for the next loss.

Every stage may be cut short by another loss: it is then done again with the union of the dead. Plans are all derived
from the base plan, so the ranks alive alone decide where an expert sits.
"""

import asyncio
import collections
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from planner.cluster import Cluster
from planner.errors import NoFeasiblePlan
from planner.lattice import Lattice, build_lattice
from planner.plan import Plan
from planner.solve import solve
from serving.config import Settings
from serving.errors import NoCapacity, StartError
from serving.links import Coordinator, RankLinks, RankLost, RankRefused
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2

MeshKey = tuple[tuple[int, ...], int]
"""Ranks of a mesh, and the slots on each."""

JOIN_TIMEOUT_S = 30.0
COLLECTIVE_TIMEOUT_S = 30


class Failover:
    """Keeps a set of ranks under a plan. Its methods are called by one task at a time, the engine's loop, but for
    `replace`, which only starts processes."""

    def __init__(self, settings: Settings, model: Prepared, links: RankLinks, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._model = model
        self._links = links
        self._say = say
        self._cluster = Cluster.local(settings.ranks)
        self._workload = model.workload(settings.page_size)
        self.base = solve(
            self._workload,
            self._cluster,
            slots_per_rank=settings.slots_per_rank,
            survive_ranks=min(settings.survive, settings.ranks - 1),
            pages_per_rank=pages_per_rank(settings, model.max_context),
        )
        depth = min(settings.lattice_depth, settings.ranks - 1)
        self.lattice: Lattice = build_lattice(self._workload, self._cluster, self.base, depth=depth)
        self.plan: Plan | None = None
        self.epoch = -1
        self.generation = 0
        self.broken = False
        """The communicators of this generation cannot be trusted: a new one is needed."""
        self.connected: set[MeshKey] = set()
        self.loaded: collections.deque[MeshKey] = collections.deque()
        """Meshes whose executables are loaded and whose communicator waits to be connected."""
        self.newcomers: set[int] = set()
        self.experts_loaded = 0
        self._coordinator: Coordinator | None = None
        self._preparing: asyncio.Task[None] | None = None

    @property
    def alive(self) -> tuple[int, ...]:
        """Ranks of the current plan."""
        return self.plan.rank_ids if self.plan is not None else ()

    def coverage(self) -> dict[str, float]:
        """Of all losses of 1, 2, ... ranks the current plan could suffer, the share that is compiled, loaded and
        connected."""
        if self.plan is None:
            return {}
        alive, depth = self.alive, min(self._settings.lattice_depth, len(self.alive) - 1)
        losses: dict[int, list[bool]] = {}
        for key in self._meshes_below(alive, depth):
            losses.setdefault(len(alive) - len(key[0]), []).append(key in self.connected)
        return {f"{n} rank{'s' if n > 1 else ''}": sum(ok) / len(ok) for n, ok in sorted(losses.items())}

    async def start(self) -> None:
        """From nothing to the base plan, with every single loss prepared; the deeper ones follow in the background.
        Raises StartError naming the rank."""
        ranks = self.base.rank_ids
        try:
            self._say(f"starting {len(ranks)} ranks")
            for rank in ranks:
                self._links.spawn(rank)
            await asyncio.gather(*(self._welcome(rank) for rank in ranks))
            await self._enter(ranks, {})
            await self._compile(ranks)
            meshes = [self._key(self.base), *self._meshes_below(ranks, min(1, len(ranks) - 1))]
            self._say(f"loading and connecting {len(meshes)} meshes")
            for key in meshes:
                await self._load(key)
            await self._adopt(self.base)
            for key in meshes:
                await self._connect(key)
            self._watch(ranks)
            self.foresee()
        except (RankLost, RankRefused) as error:
            process = self._links.get(error.rank)
            why = process.why() if process is not None else ""
            raise StartError(f"{error}. Its last words: {why}") from None

    def plan_for(self, alive: Collection[int]) -> Plan:
        """The plan for these ranks, foreseen or made now. Raises NoCapacity, saying what is missing."""
        alive = tuple(sorted(alive))
        if alive == self.base.rank_ids:
            return self.base
        foreseen = self.lattice.get(frozenset(self.base.rank_ids) - frozenset(alive))
        if foreseen is not None:
            return foreseen
        try:
            return solve(self._workload, self._cluster, alive=alive, previous=self.base)
        except NoFeasiblePlan as error:
            raise NoCapacity(str(error)) from None

    async def recover(self, lost: Callable[[], set[int]], pages_used: Callable[[], dict[int, int]]) -> dict[str, float]:
        """Go on without the ranks that `lost` names (asked again at each turn: more may die meanwhile). Returns
        milliseconds by phase. Raises NoCapacity when nobody is left."""
        phases: dict[str, float] = {}
        while True:
            with _timed(phases, "fence"):
                dead = lost()
                survivors = [rank for rank in self.alive if rank not in dead]
                await asyncio.gather(*(self._links.fenced(rank) for rank in self.alive if rank in dead))
                self._links.abort(survivors, self.epoch)
            if not survivors:
                self.plan = None
                raise NoCapacity("no rank is alive. Requests wait until one is back.")
            with _timed(phases, "plan"):
                plan = self.plan_for(survivors)
            try:
                if self.broken:
                    await self.regenerate(survivors, pages_used(), phases)
                else:
                    with _timed(phases, "adopt"):
                        await self._make_ready(self._key(plan))
                        await self._adopt(plan)
                    self.foresee()
                return phases
            except RankLost:
                continue
            except (RankRefused, TimeoutError):
                self.broken = True

    async def regenerate(
        self, ranks: Iterable[int], pages_used: dict[int, int], phases: dict[str, float] | None = None
    ) -> dict[str, float]:
        """A new generation of exactly these ranks, under their plan. Raises RankLost, RankRefused or TimeoutError,
        after which another generation must be made."""
        ranks, phases = tuple(sorted(ranks)), {} if phases is None else phases
        plan = self.plan_for(ranks)
        for rank in ranks:
            self._links.unwatch(rank)
        self.broken = True
        if self._preparing is not None:
            self._preparing.cancel()
        with _timed(phases, "join"):
            await self._enter(ranks, pages_used)
        with _timed(phases, "load"):
            await self._load(self._key(plan), urgent=True)
        with _timed(phases, "adopt"):
            await self._adopt(plan)
        with _timed(phases, "connect"):
            await self._connect(self._key(plan))
        self.broken = False
        self._watch(ranks)
        self.foresee()
        return phases

    def foresee(self) -> None:
        """Load the executables of the next losses in the background; `connect_next` finishes each."""
        if self._preparing is not None:
            self._preparing.cancel()
        self.loaded.clear()
        alive, depth = self.alive, min(self._settings.lattice_depth, len(self.alive) - 1)
        missing = [key for key in self._meshes_below(alive, depth) if key not in self.connected]
        self._preparing = asyncio.create_task(self._load_ahead(missing))

    async def connect_next(self) -> bool:
        """Connect one mesh that is loaded, between two steps. True when the lattice is complete with it."""
        key = self.loaded.popleft()
        if set(key[0]) <= set(self.alive):
            await self._connect(key)
        return not self.loaded and (self._preparing is None or self._preparing.done())

    async def replace(self, rank: int) -> None:
        """Start a rank anew until it is ready to join; raises RankLost or RankRefused when it cannot."""
        self._links.spawn(rank)
        await self._welcome(rank)
        self.newcomers.add(rank)

    async def close(self) -> None:
        """Stop the coordinator and what runs in the background."""
        if self._preparing is not None:
            self._preparing.cancel()
        if self._coordinator is not None:
            await self._coordinator.stop()

    async def _welcome(self, rank: int) -> None:
        model, settings = self._model, self._settings
        await self._links.attached(rank)
        configure = link_pb2.Configure(
            model_config=model.config,
            store=model.store,
            executables=model.executables,
            page_size=settings.page_size,
            pages=self.base.pages_per_rank,
            max_pages=-(-model.max_context // settings.page_size),
            buckets=[link_pb2.Bucket(decode=b, tiles=g) for b, g in settings.buckets],
            collective_timeout_s=COLLECTIVE_TIMEOUT_S,
        )
        await self._links.call(rank, "configure", configure)

    async def _enter(self, ranks: tuple[int, ...], pages_used: dict[int, int]) -> None:
        before = self._coordinator
        self._coordinator = await Coordinator.start(len(ranks))
        self.generation += 1
        self.newcomers -= set(ranks)
        self.connected.clear()
        self.loaded.clear()
        joins = {
            rank: link_pb2.Join(
                generation=self.generation,
                address=self._coordinator.address,
                members=ranks,
                pages_used=pages_used.get(rank, 0),
            )
            for rank in ranks
        }
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                await self._all("join", joins)
        except (RankLost, RankRefused, TimeoutError) as error:
            # Whoever waits for the others in there is let go by the end of the service.
            await self._coordinator.stop()
            if isinstance(error, TimeoutError):
                self._links.give_up(ranks, f"no answer to join within {JOIN_TIMEOUT_S:.0f} s")
            raise
        finally:
            if before is not None:
                await before.stop()

    async def _compile(self, ranks: tuple[int, ...]) -> None:
        """Compile what is missing, each mesh shape on one rank."""
        jobs: dict[tuple[int, int], MeshKey] = {}
        depth = min(self._settings.lattice_depth, len(ranks) - 1)
        for key in [self._key(self.base), *self._meshes_below(ranks, depth)]:
            jobs.setdefault((len(key[0]), key[1]), key)
        began = time.monotonic()
        queue = collections.deque(sorted(jobs.values(), key=lambda key: -len(key[0])))
        total, done = len(queue), 0
        busy: set[int] = set()
        self._say(f"compiling for {total} mesh shapes (found in the cache after the first start)")

        async def one(rank: int, key: MeshKey) -> None:
            nonlocal done
            answer = await self._links.call(rank, "compile", link_pb2.Compile(mesh=_mesh(key)))
            done += 1
            busy.discard(rank)
            if answer.compiled:
                self._say(
                    f"compiled {answer.compiled} programs for {len(key[0])} ranks x {key[1]} slots "
                    f"({done}/{total}, {time.monotonic() - began:.0f} s)"
                )

        running: set[asyncio.Task[None]] = set()
        while queue or running:
            for key in list(queue):
                rank = next((r for r in key[0] if r not in busy), None)
                if rank is not None:
                    queue.remove(key)
                    busy.add(rank)
                    running.add(asyncio.create_task(one(rank, key)))
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()

    async def _make_ready(self, key: MeshKey) -> None:
        """Nothing for a mesh that was foreseen; else compile, load and connect it now."""
        if key not in self.connected:
            await self._links.call(key[0][0], "compile", link_pb2.Compile(mesh=_mesh(key)))
            await self._load(key, urgent=True)
            await self._connect(key)

    async def _load(self, key: MeshKey, *, urgent: bool = False) -> None:
        await self._all("prepare", dict.fromkeys(key[0], link_pb2.Prepare(mesh=_mesh(key), urgent=urgent)))

    async def _load_ahead(self, keys: list[MeshKey]) -> None:
        assert self.plan is not None
        here = self._key(self.plan)
        for key in (here, *keys):
            try:
                await self._load(key)
            except (RankLost, RankRefused):
                continue
            if key != here:
                self.loaded.append(key)

    async def _connect(self, key: MeshKey) -> None:
        async with asyncio.timeout(COLLECTIVE_TIMEOUT_S):
            warm = self.plan is not None and key[1] == self.plan.slots_per_rank
            await self._all("connect", dict.fromkeys(key[0], link_pb2.Connect(mesh=_mesh(key), warm=warm)))
        self.connected.add(key)

    async def _adopt(self, plan: Plan) -> None:
        """Put `plan` into force, as a new epoch."""
        self.epoch += 1
        plan = plan.with_epoch(self.epoch)
        routes = plan.expert_to_slot()
        parts = {
            rank: link_pb2.Adopt(
                epoch=plan.epoch,
                mesh=_mesh(self._key(plan)),
                slots=plan.slots_of(rank).astype(np.int32).tobytes(),
                expert_to_slot=routes[i].astype(np.int32).tobytes(),
            )
            for i, rank in enumerate(plan.rank_ids)
        }
        answers = await self._all("adopt", parts)
        self.experts_loaded += sum(answer.experts_loaded for answer in answers)
        self.plan = plan

    async def _all(self, what: str, messages: dict[int, Any]) -> list[link_pb2.Done]:
        """The answers of all; when one is lost or refuses, the others are not waited for."""
        return await asyncio.gather(*(self._links.call(rank, what, message) for rank, message in messages.items()))

    def _watch(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._links.watch(rank)

    def _meshes_below(self, alive: Collection[int], depth: int) -> list[MeshKey]:
        """The meshes after each foreseen loss among `alive`, the likeliest first."""
        gone = frozenset(self.base.rank_ids) - frozenset(alive)
        keys = [
            self._key(plan)
            for dead, plan in self.lattice.plans.items()
            if gone < dead and len(dead) - len(gone) <= depth
        ]
        return sorted(dict.fromkeys(keys), key=lambda key: -len(key[0]))

    @staticmethod
    def _key(plan: Plan) -> MeshKey:
        return plan.rank_ids, plan.slots_per_rank


def pages_per_rank(settings: Settings, max_context: int) -> int:
    """Pages of a rank's cache: as set, or two contexts' worth."""
    return settings.pages_per_rank or 2 * -(-max_context // settings.page_size)


def _mesh(key: MeshKey) -> link_pb2.MeshShape:
    return link_pb2.MeshShape(ranks=key[0], slots=key[1])


class _timed:
    """Adds the milliseconds of a block to `phases[name]`."""

    def __init__(self, phases: dict[str, float], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_exc: object) -> None:
        took = 1e3 * (time.monotonic() - self._began)
        self._phases[self._name] = self._phases.get(self._name, 0.0) + took
