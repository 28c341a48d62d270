"""The first start of a server: all ranks under the base plan, with every single loss prepared."""

import asyncio
from collections.abc import Callable

from serving.errors import StartError
from serving.executor.executor import RankExecutor
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.recovery.adoption import Adoption
from serving.recovery.generations import Generations
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.mesh_preparation import MeshPreparation
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.rank_start import RankStart


class FirstStart:
    """The start of a server whose ranks no earlier front has left. `log` takes lines for whoever starts it."""

    def __init__(
        self,
        executor: RankExecutor,
        plans: PlanCatalog,
        meshes: MeshPool,
        adoption: Adoption,
        preparation: MeshPreparation,
        generations: Generations,
        rank_start: RankStart,
        log: Callable[[str], None],
    ) -> None:
        self._executor = executor
        self._plans = plans
        self._meshes = meshes
        self._adoption = adoption
        self._preparation = preparation
        self._generations = generations
        self._rank_start = rank_start
        self._log = log

    async def run(self) -> None:
        """Start the ranks, and put the base plan into force; losses of several ranks are prepared beside the steps.
        Raises StartError naming the rank."""
        try:
            await self._start(self._plans.base.rank_ids)
        except (RankLost, CommandFailed) as error:
            incarnation = self._executor.get(error.rank)
            output = incarnation.process.last_output() if incarnation is not None else ""
            raise StartError(f"{str(error).removesuffix('.')}. Its last words: {output}") from None

    async def _start(self, ranks: tuple[int, ...]) -> None:
        self._log(f"starting {len(ranks)} ranks")
        for rank in ranks:
            self._executor.spawn(rank)
        await asyncio.gather(*(self._rank_start.configure(rank) for rank in ranks))
        await self._generations.open(ranks, {})
        compiled, connected = self._preparation.start_meshes()
        await self._meshes.compile(compiled)
        self._log(f"loading and connecting {len(connected)} meshes")
        for key in connected:
            await self._meshes.load(key)
        await self._adoption.adopt(self._plans.base, self._plans.base)
        if self._adoption.unreadable:
            raise StartError(next(iter(self._adoption.unreadable.values())))
        for key in connected:
            await self._preparation.connect(key)
        self._generations.serve(ranks)
