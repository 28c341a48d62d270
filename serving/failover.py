"""Which ranks serve under which plan: start, loss, rejoin, and getting ready for the next loss.

Every stage may be cut short by another loss: it is then done again with the union of the dead.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planner.cluster import Cluster
from planner.plan import Plan
from planner.recovery import Recovery
from serving.cache_copies import CacheCopies
from serving.config import Settings
from serving.coordination import LOOPBACK
from serving.errors import NoCapacity, StartError
from serving.health import Cause
from serving.links import RankLinks, RankLost, RankRefused
from serving.mesh_key import MeshKey
from serving.meshes import COLLECTIVE_TIMEOUT_S, Meshes
from serving.outlook import loss_costs
from serving.page_index import read
from serving.pages import Key
from serving.parity import Parity
from serving.places import placed
from serving.plans import Plans
from serving.policy import Slot, at_once, lost_share, may_serve, next_part, without
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2
from serving.rendezvous import JOIN_TIMEOUT_S, Rendezvous
from serving.status import LossCost

HEAL_SLOTS = 2
"""Experts that each rank loads at a time while steps go on."""
TAKE_OVER_S = 5.0
"""How long a rank of a front before this one may take to dial in."""


class Failover:
    """Keeps a set of ranks under a plan. Its methods are called by one task at a time, the engine's loop, but for
    `replace`, which only starts processes."""

    def __init__(
        self,
        settings: Settings,
        model: Prepared,
        links: RankLinks,
        say: Callable[[str], None],
        *,
        cluster: Cluster | None = None,
        host: str = LOOPBACK,
    ) -> None:
        self._settings = settings
        self._model = model
        self._links = links
        self._say = say
        self._one_machine = cluster is None
        hosts = [settings.host_of(rank) for rank in range(settings.ranks)]
        self.plans = Plans(settings, model, cluster or Cluster.local(settings.ranks, hosts=hosts))
        self.meshes = Meshes(links, say)
        self._rendezvous = Rendezvous(links, host, self._coordinator_ended)
        self.config: Mapping[str, Any] = json.loads(model.config)
        """The model's configuration, as a rank gets it."""
        self.plan: Plan | None = None
        self.epoch = -1
        self.broken = False
        """The communicators of this generation cannot be trusted: a new one is needed."""
        self.emptied: set[int] = set()
        """Ranks that were told to drop their cache, be it by a plan that never came into force."""
        self._groups: dict[int, tuple[int, ...]] = {}
        """The tensor group of each rank that attends, under the plan before or in force."""
        self.newcomers: set[int] = set()
        """Ranks that wait to be let in: replacements, and those that cannot serve without them."""
        self.waiting: set[int] = set()
        """Those of them that served before."""
        self.lacking = ""
        """Why no plan is in force."""
        self.entering: set[int] = set()
        """Replacements that are being let into the generation."""
        self.seated: dict[int, int] = {}
        """Replacements that are in the generation and not yet in the plan, and the slots each has filled."""
        self.taken_over = 0
        """How many ranks a front before this one had started."""
        self.known: dict[int, dict[int, Key]] = {}
        """What pages of these hold, by rank and page."""
        self._admitting: asyncio.Task[None] | None = None
        self.experts_loaded = 0
        self.goal: Plan | None = None
        """What the ranks alive should hold; `plan` may be a part of it while experts are loaded."""
        self._next: Plan | None = None
        self.unreadable: dict[tuple[int, int], str] = {}
        """(MoE layer, expert) that the store could not give, and why."""
        layers, experts = self.plans.workload.moe_layers, self.plans.workload.experts
        self._indispensable = frozenset(model.divided_layers)
        self.loads: Callable[[], np.ndarray] = lambda: np.zeros((layers, experts))
        """Measured traffic `[moe layers, experts]`."""
        self.on_trouble: Callable[[str], None] = lambda _: None
        """Hears how the coordinator ended."""
        here = self._one_machine or settings.protect_cache != "auto"
        self.copies = CacheCopies.of(
            settings.protect_cache if here else "off",
            settings.ranks,
            entries=self.plans.base.pages_per_rank * settings.page_size,
            entry_bytes=model.cache_bytes_per_token // settings.tensor,
            tensor=settings.tensor,
        )
        links.on_copied = self.copies.told
        self.parity = Parity(links, settings.parity)

    @property
    def alive(self) -> tuple[int, ...]:
        """Ranks of the current plan."""
        return self.plan.rank_ids if self.plan is not None else ()

    @property
    def generation(self) -> int:
        """How many times ranks came together anew."""
        return self._rendezvous.generation

    @property
    def growing(self) -> tuple[int, ...]:
        """The ranks of the plan once those seated are part of it."""
        return tuple(sorted({*self.alive, *self.seated}))

    @property
    def joining(self) -> set[int]:
        """Replacements on their way into the plan."""
        return {*self.newcomers, *self.entering, *self.seated}

    @property
    def may_admit(self) -> bool:
        """True when there are newcomers that can be let in without a new generation."""
        admitting = self._admitting is not None and not self._admitting.done()
        if self.plan is None or self.broken or self.meshes.torn or admitting:
            return False
        return 0 < len(self.newcomers) <= self._rendezvous.free

    @property
    def may_grow(self) -> bool:
        """True when the plan with those seated, and every single loss of it, is loaded and connected."""
        if not self.seated or self.broken or self.plan is None:
            return False
        singles = self.plans.meshes_below(self.growing, min(1, len(self.growing) - 1))
        return self.meshes.connected.issuperset((MeshKey.of(self.plans.of(self.growing)), *singles))

    @property
    def store(self) -> Path:
        """The folder of the host's copies of the weights."""
        return Path(self._model.store)

    @property
    def stuck(self) -> bool:
        """True when a mesh that those seated wait for could not be loaded or connected."""
        return bool(self.seated) and self.meshes.idle and not (self.meshes.torn or self.may_grow)

    @property
    def coordinator_pid(self) -> int | None:
        """The process that hosts the coordination service of this generation."""
        service = self._rendezvous.coordinator
        return service.process.pid if service is not None else None

    def coverage(self) -> dict[str, float]:
        """Of all losses of 1, 2, ... ranks that the current plan can survive, the share that is compiled, loaded and
        connected."""
        if self.plan is None:
            return {}
        alive, depth = self.alive, min(self._settings.lattice_depth, len(self.alive) - 1)
        losses: dict[int, list[bool]] = {}
        for key in self.plans.meshes_below(alive, depth):
            losses.setdefault(len(alive) - len(key.ranks), []).append(key in self.meshes.connected)
        return {f"{n} rank{'s' if n > 1 else ''}": sum(ok) / len(ok) for n, ok in sorted(losses.items())}

    def loss_costs(self, load: np.ndarray, recovery: Recovery) -> dict[int, LossCost]:
        """What the loss of each rank of the current plan would cost; `load` counts tokens int [moe_layers, experts]."""
        if self.plan is None:
            return {}
        foreseen = {rank: self.plans.foreseen(set(self.alive) - {rank}) for rank in self.alive}
        connected = self.meshes.connected
        prepared = [rank for rank, plan in foreseen.items() if plan is not None and MeshKey.of(plan) in connected]
        kept = self.parity.groups
        return loss_costs(self.plan, self.plans.workload, self.plans.cluster, load, recovery, prepared, kept=kept)

    async def start(self) -> None:
        """From nothing to the base plan, with every single loss prepared; the deeper ones follow in the background.
        Raises StartError naming the rank."""
        ranks = self.plans.base.rank_ids
        for warning in self.plans.warnings():
            self._say(warning)
        if await self._take_over():
            return
        try:
            self._say(f"starting {len(ranks)} ranks")
            for rank in ranks:
                self._links.spawn(rank)
            await asyncio.gather(*(self._welcome(rank) for rank in ranks))
            await self._enter(ranks, {})
            depth = min(self._settings.lattice_depth, len(ranks) - 1)
            await self.meshes.compile([MeshKey.of(self.plans.base), *self.plans.meshes_below(ranks, depth)])
            meshes = [MeshKey.of(self.plans.base), *self.plans.meshes_below(ranks, min(1, len(ranks) - 1))]
            self._say(f"loading and connecting {len(meshes)} meshes")
            for key in meshes:
                await self.meshes.load(key)
            await self._adopt(self.plans.base, self.plans.base)
            if self.unreadable:
                raise StartError(next(iter(self.unreadable.values())))
            for key in meshes:
                await self._connect(key)
            self._watch(ranks)
            self.foresee()
        except (RankLost, RankRefused) as error:
            process = self._links.get(error.rank)
            why = process.process.said() if process is not None else ""
            raise StartError(f"{str(error).removesuffix('.')}. Its last words: {why}") from None

    async def _take_over(self) -> bool:
        """Go on with the ranks that a front before this one left. What they hold stays, and what they know of their
        pages. Those that do not come are ended. False without any that had served."""
        there = self._links.inherit()
        if there:
            self._say(f"taking over {len(there)} ranks")
        hellos = [hello for hello in await asyncio.gather(*map(self._comes, there)) if hello is not None]
        came = {rank: hello for rank, hello in hellos if hello.generation}
        self.newcomers = {rank for rank, _ in hellos} - came.keys()
        known = {rank: read(hello.full) for rank, hello in came.items()}
        together = len({hello.generation for hello in came.values()}) == 1
        goes_on = self.meshes.shares_memory and together and all(hello.serves for hello in came.values())
        while came:
            pages = {rank: max(known[rank], default=-1) + 1 for rank in came}
            try:
                await (self._settle(came) if goes_on else self.regenerate(came, pages))
                self.taken_over = len(came)
                if self._settings.tensor == 1:  # a group may have changed while there was no front
                    self.known = {rank: known[rank] for rank in came}
                return True
            except (RankLost, RankRefused, TimeoutError) as error:
                self._say(str(error) or "the ranks did not come together in time")
            except NoCapacity as error:
                self.taken_over = len(came)
                self._wait(came, str(error))
                return True
            came = {rank: h for rank, h in came.items() if (each := self._links.get(rank)) and each.loss is None}
            goes_on = False
        for rank in self.newcomers:
            self._links.declare(rank, Cause("error", "nobody is left to join"), time.monotonic())
        self.newcomers.clear()
        return False

    async def _comes(self, rank: int) -> tuple[int, link_pb2.Hello] | None:
        """What a rank that was left says when it dials in; None if it does not, or cannot go on."""
        try:
            async with asyncio.timeout(TAKE_OVER_S):
                hello = await self._links.attached(rank)
            self.epoch = max(self.epoch, hello.epoch)
            self._rendezvous.generation = max(self.generation, hello.generation)
            await self._welcome(rank)
        except (RankLost, RankRefused, TimeoutError) as error:
            why = str(error) or f"did not come back within {TAKE_OVER_S:.0f} s"
            self._links.declare(rank, Cause("error", why), time.monotonic())
            return None
        return rank, hello

    async def recover(self, lost: Callable[[], set[int]], pages_used: Callable[[], dict[int, int]]) -> dict[str, float]:
        """Go on without the ranks that `lost` names (asked again at each turn: more may die meanwhile). Returns
        milliseconds by phase. Raises NoCapacity when those that are left cannot serve: they wait for others."""
        phases: dict[str, float] = {}
        while True:
            with _timed(phases, "fence"):
                dead = lost()
                survivors = [rank for rank in self.alive if rank not in dead]
                for rank in dead:
                    self.forget(rank)
                await asyncio.gather(*(self._links.fenced(rank) for rank in self.alive if rank in dead))
                self._links.abort(survivors, self.epoch)
            with _timed(phases, "plan"):
                try:
                    plan = self.plans.of(survivors)
                except NoCapacity as error:
                    self._wait(survivors, str(error))
                    raise
            try:
                if self.broken:
                    await self.regenerate(survivors, pages_used(), phases)
                else:
                    with _timed(phases, "adopt"):
                        await self._make_ready(MeshKey.of(plan))
                        await self._adopt_soon(plan)
                    self.foresee()
                return phases
            except RankLost:
                continue
            except (RankRefused, TimeoutError):
                self.broken = True

    def why_not(self, ranks: Collection[int]) -> str:
        """Why these ranks cannot serve without the others; "" if they can."""
        try:
            self.plans.of(ranks)
        except NoCapacity as error:
            return str(error)
        return ""

    def disturbed(self, going: Collection[int]) -> set[int]:
        """The ranks in force that run nothing any more once some are gone: these, and those that attend with others
        then."""
        if self.plan is None:
            return set(going)
        try:
            after = self.plans.of(set(self.alive).difference(going)).groups
        except NoCapacity:
            after = {}
        return {rank for rank, group in self.plan.groups.items() if after.get(rank) != group} | set(going)

    def _wait(self, ranks: Collection[int], why: str) -> None:
        """No plan is in force: these ranks, and those on their way, can serve only when others are back, in a new
        generation."""
        if self._admitting is not None:
            self._admitting.cancel()
        self.plan, self.lacking = None, why
        self._empty(ranks)
        self.waiting = set(ranks)
        self.newcomers |= self.waiting | self.entering | self.seated.keys()
        self.entering.clear()
        self.seated.clear()

    async def regenerate(
        self, ranks: Iterable[int], pages_used: dict[int, int], phases: dict[str, float] | None = None
    ) -> dict[str, float]:
        """A new generation of exactly these ranks, under their plan. Raises RankLost, RankRefused or TimeoutError,
        after which another generation must be made."""
        ranks, phases = tuple(sorted(ranks)), {} if phases is None else phases
        self.plans.of(ranks)  # what cannot be planned for need not be tried
        for rank in ranks:
            self._links.unwatch(rank)
        self.broken = True
        self._stop_preparing()
        with _timed(phases, "join"):
            await self._enter(ranks, pages_used)
        await self._settle(ranks, phases)
        self.waiting.clear()
        return phases

    async def _settle(self, ranks: Iterable[int], phases: dict[str, float] | None = None) -> None:
        """Put the plan of ranks that are in one generation into force, with nothing loaded or connected yet."""
        ranks, phases = tuple(sorted(ranks)), {} if phases is None else phases
        plan = self.plans.of(ranks)
        with _timed(phases, "load"):
            await self.meshes.load(MeshKey.of(plan), urgent=True)
        with _timed(phases, "adopt"):
            await self._adopt(plan, plan)
        with _timed(phases, "connect"):
            await self._connect(MeshKey.of(plan))
        self.broken = False
        self._watch(ranks)
        self.foresee()

    def is_ready_without(self, ranks: Collection[int]) -> bool:
        """Whether the mesh without these ranks is loaded and connected."""
        left = [rank for rank in self.alive if rank not in ranks]
        return not self.why_not(left) and MeshKey.of(self.plans.of(left)) in self.meshes.connected

    async def release(self, ranks: Collection[int]) -> dict[str, float]:
        """Go on without these ranks, which run nothing any more, between two steps. Returns milliseconds by phase.
        Raises RankLost, RankRefused or TimeoutError, after which a recovery is due."""
        phases: dict[str, float] = {}
        with _timed(phases, "plan"):
            plan = self.plans.of([rank for rank in self.alive if rank not in ranks])
        with _timed(phases, "adopt"):
            await self._make_ready(MeshKey.of(plan))
            await self._adopt_soon(plan)
        for rank in ranks:
            self.forget(rank)
        self.foresee()
        return phases

    async def readopt(self, damaged: Collection[Slot]) -> None:
        """Go on with these slots empty, and what they held loaded again. Raises as `release` does."""
        assert self.plan is not None
        slots, holders = self.plan.slots_per_rank, self.plan.holder_ids
        self.plan = without(self.plan, [each for each in damaged if each[0] in holders and each[2] < slots])
        await self._adopt_soon(self.plans.of(self.alive))

    @property
    def healing(self) -> bool:
        """Experts are missing from the plan in force that can be loaded."""
        return self._next is not None

    @property
    def can_step(self) -> bool:
        """There is a plan, and it has all shards of divided layers: a token needs every one of them."""
        return self.plan is not None and not self._shards_amiss(self.plan)

    def lost_share(self, plan: Plan) -> float:
        """The share of measured traffic that the experts had which a plan masks."""
        return lost_share(plan, self.routed_loads())

    def routed_loads(self) -> np.ndarray:
        """Measured traffic of what a router chooses, all alike before there is any; 0 of divided layers."""
        loads = np.array(self.loads(), float)
        loads = loads if loads.any() else np.ones_like(loads)
        loads[sorted(self._indispensable)] = 0.0
        return loads

    def _shards_amiss(self, plan: Plan) -> set[tuple[int, int]]:
        """Shards of divided layers, (layer, shard), that a plan has in no slot."""
        return {(layer, shard) for layer, shard in plan.masked if layer in self._indispensable}

    @property
    def settled(self) -> Plan | None:
        """The plan in force, if it is all that the ranks alive can hold now."""
        return None if self.healing or self.broken else self.plan

    async def heal(self) -> None:
        """Load some of the missing experts, between two steps. Raises as `release` does."""
        assert self.goal is not None
        if self._next is not None:
            await self._adopt(self._next, self.goal)

    def ask_again(self) -> None:
        """Experts that the store could not give may be there now."""
        self.unreadable.clear()
        self._look_on()

    def _look_on(self) -> None:
        self._next = None
        if self.plan is not None and self.goal is not None and self.plan.slots != self.goal.slots:
            part = next_part(self.plan, self.goal, HEAL_SLOTS, but=self._out_of_reach(self.goal))
            self._next = part if part.slots != self.plan.slots else None

    def _out_of_reach(self, plan: Plan) -> set[tuple[int, int]]:
        """Experts that neither the store can give to the ranks of a plan, nor parity."""
        return self.unreadable.keys() - self.parity.ways(self.plan, plan).keys()

    def foresee(self) -> None:
        """Load the executables of the next losses, and of the plan with those seated, in the background;
        `connect_next` finishes each."""
        if self.meshes.torn or self.plan is None:
            self.meshes.stop()
            return
        wanted = self.plans.meshes_below(self.alive, min(1, len(self.alive) - 1))
        if self.seated:
            wanted.append(MeshKey.of(self.plans.of(self.growing)))
        wanted += self.plans.meshes_below(self.growing, min(self._settings.lattice_depth, len(self.growing) - 1))
        missing = [key for key in dict.fromkeys(wanted) if key not in self.meshes.connected]
        self.meshes.load_ahead(MeshKey.of(self.plan), missing)

    async def connect_next(self) -> bool:
        """Connect one mesh that is loaded, between two steps. True when the lattice is complete with it."""
        key = self.meshes.loaded.popleft()
        if set(key.ranks) <= set(self.growing):
            await self._connect(key)
        return self.meshes.idle

    def admit(self) -> None:
        """Let the newcomers into the generation, beside the steps; `may_grow` tells when the plan can have them."""
        self.entering, self.newcomers = self.newcomers, set()
        self._admitting = asyncio.create_task(self._admit(sorted(self.entering)))

    async def grow(self) -> dict[str, float]:
        """Put the plan with those seated into force. Returns milliseconds by phase. Raises RankLost, RankRefused or
        TimeoutError when it could not be; unless that raised again, the plan before is then in force."""
        phases: dict[str, float] = {}
        seated, before = tuple(self.seated), self.alive
        with _timed(phases, "adopt"):
            try:
                plan = self.plans.of(self.growing)
                await self._adopt(plan, plan)
            except (RankLost, RankRefused):
                plan = self.plans.of(before)
                await self._adopt(plan, plan)
                raise
        for rank in seated:
            self.seated.pop(rank, None)
        self._watch(seated)
        self.foresee()
        return phases

    def mates(self, rank: int) -> tuple[int, ...]:
        """The tensor group of a rank in the plan in force; the rank alone if it is in none."""
        return self.plan.groups.get(rank, (rank,)) if self.plan is not None else (rank,)

    def places(self, rank: int, pages: Iterable[int]) -> list[tuple[int, list[int]]]:
        """Where the entries of a request of `rank` with these pages are: on the rank of each share of the heads, and
        the pages there. A rank of a tensor group has those of its members one after the other (`moejax.tensor`)."""
        group, pages = self.mates(rank), list(pages)
        first = group.index(rank) * self.plans.base.pages_per_rank
        return [(mate, [first + page for page in pages]) for mate in group]

    def forget(self, rank: int) -> None:
        """A rank is gone: so is every mesh with it, and what others had in their caches of its heads."""
        self._empty(set(self._groups.pop(rank, ())) - {rank})
        self.newcomers.discard(rank)
        self.waiting.discard(rank)
        self.entering.discard(rank)
        self.seated.pop(rank, None)
        self._rendezvous.forget(rank)
        self.meshes.forget(rank)
        self.parity.forget(rank)

    async def replace(self, rank: int) -> None:
        """Start a rank anew until it is ready to join; raises RankLost or RankRefused when it cannot."""
        self._links.spawn(rank)
        await self._welcome(rank)
        self.newcomers.add(rank)

    async def close(self) -> None:
        """Stop the coordinator and what runs in the background."""
        self._stop_preparing()
        await self._rendezvous.close()
        self.copies.close()

    async def _welcome(self, rank: int) -> None:
        model, settings = self._model, self._settings
        hello = await self._links.attached(rank)
        home = self._links.home(rank)
        if home is not None and home.host != self.plans.place_of(rank).host:
            self.plans.move(rank, home)
        configure = link_pb2.Configure(
            model_config=model.config,
            store=model.store if home is None else home.store,
            executables=model.executables if home is None else home.executables,
            page_size=settings.page_size,
            pages=self.plans.base.pages_per_rank,
            max_pages=-(-model.max_context // settings.page_size),
            buckets=[link_pb2.Bucket(decode=b, tiles=g) for b, g in settings.buckets],
            collective_timeout_s=COLLECTIVE_TIMEOUT_S,
            one_machine=self._one_machine,
            experts_only=not MeshKey.of(self.plans.base).attends(rank),
        )
        if settings.tensor > 1:
            configure.tensor = settings.tensor
            configure.shard = self.plans.base.groups.get(rank, (rank,)).index(rank)
        there = self.copies.taken_over(rank, hello.cache_copy)
        if there is not None:
            configure.MergeFrom(there)
        elif not configure.experts_only:
            configure.MergeFrom(self.copies.fresh(rank, here=home is None))
        self.meshes.shares_memory = (await self._links.call(rank, "configure", configure)).shares_memory
        if there is not None:
            self.copies.begun(rank)

    def _stop_preparing(self) -> None:
        self.meshes.stop()
        if self._admitting is not None:
            self._admitting.cancel()

    async def _admit(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if rank not in self.entering:
                continue
            try:
                async with asyncio.timeout(JOIN_TIMEOUT_S):
                    seat = await self._rendezvous.admit(rank)
                    slots = _slots(self.plans.of({*self.growing, rank}), rank)
                    hold = link_pb2.Hold(slots_per_rank=slots.shape[1], slots=slots.tobytes())
                    await self._links.call(rank, "hold", hold)
            except RankLost:
                continue
            except (RankRefused, TimeoutError) as error:
                why = str(error) or f"no answer to join within {JOIN_TIMEOUT_S:.0f} s"
                self._links.declare(rank, Cause("error", why), time.monotonic())
                continue
            await self._rendezvous.introduce(rank, seat, self.growing)
            self.entering.discard(rank)
            self.seated[rank] = slots.shape[1]
        self.foresee()

    async def _enter(self, ranks: tuple[int, ...], pages_used: dict[int, int]) -> None:
        await self._rendezvous.open(ranks)
        self.newcomers = self.joining - set(ranks)
        self.entering.clear()
        self.seated.clear()
        self.meshes.clear()
        await self._rendezvous.gather(pages_used)

    def _coordinator_ended(self, how: str) -> None:
        """The next replacement costs a new generation. Where ranks do not share memory this one connects no mesh
        either, and the next is due at once."""
        self.broken |= not self.meshes.shares_memory
        self.on_trouble(how)

    async def _make_ready(self, key: MeshKey) -> None:
        """Nothing for a mesh that was foreseen; else compile, load and connect it now."""
        if key not in self.meshes.connected:
            await self.meshes.make(key)
            await self._connect(key)

    async def _connect(self, key: MeshKey) -> None:
        warm = all(self._holds(rank) == (key.attends(rank), key.slots_of(rank)) for rank in key.ranks)
        await self.meshes.connect(key, self.epoch, warm=warm)

    async def _adopt_soon(self, goal: Plan) -> None:
        """Put into force what the ranks hold of `goal` already, if the policy lets the rest follow beside the steps;
        else all of it."""
        assert self.plan is not None
        part, settings = at_once(goal, self.plan), self._settings
        moved = {at for at, way in self.parity.ways(self.plan, goal).items() if way.group is None}
        first = moved | self._shards_amiss(part)  # nobody has lost the ones, and no step can be made without the others
        if first:
            part = next_part(part, goal, goal.moe_layers * goal.slots_per_rank, only=first)
        if not may_serve(part, settings.on_lost_expert, self.routed_loads(), settings.lost_expert_bound):
            part = next_part(part, goal, goal.moe_layers * goal.slots_per_rank, but=self._out_of_reach(goal))
        await self._adopt(part, goal)

    async def _adopt(self, plan: Plan, goal: Plan) -> None:
        """Put `plan` into force, as a new epoch; again without the experts that the store could not give."""
        self.goal = goal
        while True:
            missing = await self._adopt_once(plan)
            if not missing:
                self._look_on()
                return
            plan = without(plan, missing)

    async def _adopt_once(self, plan: Plan) -> list[Slot]:
        self.epoch += 1
        plan = placed(plan.with_epoch(self.epoch), self.plans.cluster)
        self._empty(set(plan.rank_ids) - set(plan.source_ids))
        self._empty(rank for rank, group in plan.groups.items() if self._groups.get(rank, group) != group)
        self._groups = dict(plan.groups)
        self.copies.grouped(plan.groups)
        routes = dict(zip(plan.source_ids, plan.expert_to_slot().astype(np.int32), strict=True))
        parts = {
            rank: link_pb2.Adopt(
                epoch=plan.epoch,
                mesh=MeshKey.of(plan).message(),
                slots=_slots(plan, rank).tobytes(),
                expert_to_slot=routes[rank].tobytes() if rank in routes else b"",
                mates=self._mates(plan, rank),
            )
            for rank in plan.rank_ids
        }
        for rank in plan.source_ids:
            if not self.copies.has(rank):
                here = self._links.home(rank) is None
                parts[rank].MergeFrom(self.copies.fresh(rank, link_pb2.Adopt, here=here))
        await self.parity.provide(self.plan, plan)
        answers = await self._links.call_all("adopt", parts)
        self.experts_loaded += sum(answer.experts_loaded for answer in answers)
        self.plan = plan
        for answer in answers:
            self.unreadable |= {(slot.layer, slot.expert): answer.trouble for slot in answer.missing}
        both = zip(plan.rank_ids, answers, strict=True)
        return [(rank, slot.layer, slot.slot) for rank, answer in both for slot in answer.missing]

    def _mates(self, plan: Plan, rank: int) -> list[int]:
        """Where the members of a rank's tensor group are in the mesh, if heads are divided."""
        group = plan.groups.get(rank, ()) if self._settings.tensor > 1 else ()
        return [plan.rank_ids.index(mate) for mate in group]

    def _empty(self, ranks: Iterable[int]) -> None:
        """Ranks that attend are to drop their caches: what is left of these is in the copies there are."""
        for rank in set(ranks) - self.emptied:
            self.copies.lost(rank)
            self.emptied.add(rank)

    def _holds(self, rank: int) -> tuple[bool, int]:
        """Whether a rank has what attending takes now, and the slots it has buffers for."""
        if rank in self.seated or self.plan is None:
            return MeshKey.of(self.plans.base).attends(rank), self.seated.get(rank, 0)
        key = MeshKey.of(self.plan)
        return key.attends(rank), key.slots_of(rank)

    def _watch(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._links.watch(rank)


class _timed:
    """Adds the milliseconds of a block to `phases[name]`."""

    def __init__(self, phases: dict[str, float], name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_exc: object) -> None:
        took = 1e3 * (time.monotonic() - self._began)
        self._phases[self._name] = self._phases.get(self._name, 0.0) + took


def _slots(plan: Plan, rank: int) -> np.ndarray:
    """The slots of a rank, int32 `[moe layers, slots]`; of a rank without experts `[moe layers, 0]`."""
    if rank not in plan.holder_ids:
        return np.zeros((plan.moe_layers, 0), np.int32)
    return plan.slots_of(rank).astype(np.int32)
