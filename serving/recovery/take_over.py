"""The take-over: a new front goes on with the ranks that an earlier front left (docs/decisions/0010)."""

import asyncio
from collections.abc import Callable

from serving.engine.page_pool import PageKey
from serving.errors import NoCapacity
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.prefix_index import read_pages, read_snapshots
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.recovery.generations import Generations
from serving.recovery.membership_events import Ready, Seen
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.rank_start import RankStart
from serving.recovery.recovery_state import RecoveryState

TAKE_OVER_S = 5.0
"""How long a rank that an earlier front started may take to attach to this one."""
CONFIGURE_S = 30.0
"""How long it may take to end what it does for the earlier front, and to answer."""


class TakeOver:
    """The take-over of one front. `keeps_pages` returns whether the pages of a rank's prefix cache stay valid: with
    tensor groups these may have changed while there was no front, and no other pool can go on from entries that the
    rank has and its replica has not."""

    def __init__(
        self,
        executor: RankExecutor,
        state: RecoveryState,
        meshes: MeshPool,
        generations: Generations,
        rank_start: RankStart,
        log: Callable[[str], None],
        *,
        keeps_pages: Callable[[int], bool],
    ) -> None:
        self._executor = executor
        self._state = state
        self._meshes = meshes
        self._generations = generations
        self._rank_start = rank_start
        self._log = log
        self._keeps_pages = keeps_pages
        self._known_pages: dict[int, dict[int, PageKey]] = {}
        self._known_snapshots: dict[int, dict[int, PageKey]] = {}
        self.ranks_taken_over = 0
        """How many ranks an earlier front had started."""

    async def run(self) -> bool:
        """Go on with the ranks that an earlier front left, with their weights, their caches and what they know of their
        pages. Ranks that do not attach in time are ended. False when none of them had served."""
        left = self._executor.adopt_left_ranks()
        if left:
            self._log(f"taking over {len(left)} ranks")
        found = [each for each in await asyncio.gather(*map(self._reattach, left)) if each is not None]
        attached = [(rank, held) for rank, held in found if not self._is_lost(rank)]
        served = {rank: held for rank, held in attached if held.generation}
        for rank in sorted({rank for rank, _ in attached} - served.keys()):
            self._state.record(Ready(rank))
        known = {rank: read_pages(held.full) for rank, held in served.items()}
        one_generation = len({held.generation for held in served.values()}) == 1
        goes_on = self._meshes.shares_memory and one_generation and all(held.serves for held in served.values())
        while served:
            pages = {rank: max(known[rank], default=-1) + 1 for rank in served}
            try:
                await (self._generations.activate(served) if goes_on else self._generations.start(served, pages))
                self.ranks_taken_over = len(served)
                kept = [rank for rank in served if self._keeps_pages(rank)]
                self._known_pages = {rank: known[rank] for rank in kept}
                self._known_snapshots = {rank: read_snapshots(served[rank].full) for rank in kept}
                return True
            except (RankLost, CommandFailed, TimeoutError) as error:
                self._log(str(error) or "the ranks did not come together in time")
            except NoCapacity as error:
                self.ranks_taken_over = len(served)
                self._generations.suspend(served, str(error))
                return True
            lost = [rank for rank in served if self._is_lost(rank)]
            await asyncio.gather(*map(self._executor.fenced, lost))
            served = {rank: held for rank, held in served.items() if rank not in lost}
            goes_on = False
        self._generations.suspend((), "nobody is left to join")  # a plan may have come into force before they died
        ready = sorted(self._state.membership.ready)
        for rank in ready:
            self._executor.declare(rank, Cause("error", "nobody is left to join"), clock.now())
        await asyncio.gather(*map(self._executor.fenced, ready))  # they are started again
        return False

    def take_known_pages(self) -> dict[int, dict[int, PageKey]]:
        """The full pages that ranks of an earlier front still hold, {rank: {page: key}}; empty after the first call."""
        taken, self._known_pages = self._known_pages, {}
        return taken

    def take_known_snapshots(self) -> dict[int, dict[int, PageKey]]:
        """The snapshots of states that these ranks hold, {rank: {place: key}}; empty after the first call."""
        taken, self._known_snapshots = self._known_snapshots, {}
        return taken

    def _is_lost(self, rank: int) -> bool:
        each = self._executor.get(rank)
        return each is None or each.loss is not None

    async def _reattach(self, rank: int) -> tuple[int, link_pb2.Held] | None:
        """The state of a rank that an earlier front left, once it is configured; None if it cannot go on. It comes as
        the answer to a command, since a rank may obey the earlier front for a while after it has attached."""
        try:
            async with asyncio.timeout(TAKE_OVER_S):
                await self._executor.wait_attached(rank)
            async with asyncio.timeout(CONFIGURE_S):
                held = await self._rank_start.configure(rank)
            newest = self._state.membership.weights
            if held.weights > newest.number:  # no plan can name what it is to have: its store is known to nobody
                raise CommandFailed(
                    rank, "configure", f"has weights number {held.weights}, and those in force are {newest.number}"
                )
            self._executor.monitor(rank)
            self._state.record(Seen(held.generation, held.epoch))
        except (RankLost, CommandFailed, TimeoutError) as error:
            why = str(error) or "did not come back in time"
            self._executor.declare(rank, Cause("error", why), clock.now())
            await self._executor.fenced(rank)  # no plan comes into force before the process has ended
            return None
        return rank, held
