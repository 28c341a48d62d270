"""Forms generations of ranks, each a process group of its own, and puts their plans into force."""

from collections.abc import Collection, Iterable

from serving.executor.executor import RankExecutor
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import RankLost
from serving.recovery.adoption import Adoption
from serving.recovery.joining import Joining
from serving.recovery.membership_events import Activated, CommBroken, GenerationOpened, Suspended
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.mesh_preparation import MeshPreparation
from serving.recovery.phase_times import PhaseTimes
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.rendezvous import Rendezvous


class Generations:
    """The generations of one server, one after the other."""

    def __init__(
        self,
        executor: RankExecutor,
        rendezvous: Rendezvous,
        plans: PlanCatalog,
        state: RecoveryState,
        meshes: MeshPool,
        adoption: Adoption,
        preparation: MeshPreparation,
        joining: Joining,
    ) -> None:
        self._executor = executor
        self._rendezvous = rendezvous
        self._plans = plans
        self._state = state
        self._meshes = meshes
        self._adoption = adoption
        self._preparation = preparation
        self._joining = joining

    async def start(
        self, ranks: Iterable[int], pages_used: dict[int, int], phases: PhaseTimes | None = None
    ) -> dict[str, float]:
        """Form a new generation of exactly these ranks, and put their plan into force. Returns milliseconds by phase.
        Raises RankLost, CommandFailed or TimeoutError, after which another generation must be formed."""
        ranks, phases = tuple(sorted(ranks)), PhaseTimes() if phases is None else phases
        self._plans.of(ranks)  # raises NoCapacity before any rank leaves the present generation
        for rank in ranks:
            self._executor.stop_monitoring(rank)
        self._state.record(CommBroken())
        self.stop_preparing()
        with phases.measure("join"):
            await self.open(ranks, pages_used)
        await self.activate(ranks, phases)
        return phases

    async def open(self, ranks: tuple[int, ...], pages_used: dict[int, int]) -> None:
        """Form a new generation of these ranks, which have no plan in it yet. Raises as `start` does. A rank is JOINING
        only once all have answered: until then none has left the present generation, or waits for another."""
        generation = self._state.membership.generation + 1
        processes = {rank: self._executor.get(rank) for rank in ranks}
        await self._rendezvous.open(ranks, generation)
        for rank, process in processes.items():  # one that was lost meanwhile may have been started again
            if process is None or process.loss is not None or self._executor.get(rank) is not process:
                await self._rendezvous.abandon()
                raise RankLost(rank, "it ended before its generation was opened")
        await self._rendezvous.ping_all()
        self._state.record(GenerationOpened(generation, ranks))
        await self._rendezvous.join_all(pages_used)

    async def activate(self, ranks: Iterable[int], phases: PhaseTimes | None = None) -> None:
        """Put the plan of ranks that are in one generation into force; nothing is loaded or connected yet. Raises as
        `start` does."""
        ranks, phases = tuple(sorted(ranks)), PhaseTimes() if phases is None else phases
        for rank in ranks:  # from here on one that hangs would hold up all others
            self._executor.monitor(rank)
        plan = self._plans.of(ranks)
        with phases.measure("load"):
            await self._meshes.load(MeshKey.of(plan), urgent=True)
        with phases.measure("adopt"):
            await self._adoption.adopt(plan, plan)
        with phases.measure("connect"):
            await self._preparation.connect(MeshKey.of(plan))
        self.serve(ranks)

    def serve(self, ranks: Iterable[int]) -> None:
        """The plan of these ranks is in force and connected: monitor them, and prepare for the next losses."""
        self._state.record(Activated())
        for rank in ranks:
            self._executor.monitor(rank)
        self._preparation.prepare_ahead()

    def stop_preparing(self) -> None:
        """Stop what runs beside the steps for the present generation."""
        self._meshes.stop()
        self._joining.cancel()

    def suspend(self, ranks: Collection[int], reason: str) -> None:
        """No plan is in force: these ranks, and those on their way, wait for others and a new generation."""
        self._joining.cancel()
        self._state.record(Suspended(frozenset(ranks), reason))
