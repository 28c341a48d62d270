"""Lets replacements enter the running generation beside the steps (docs/decisions/0004)."""

import asyncio
from collections.abc import Iterable

from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.recovery.adoption import slots_of, weights_message
from serving.recovery.membership_events import JoinBegan, Joined
from serving.recovery.mesh_preparation import MeshPreparation
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.recovery_state import RecoveryState
from serving.recovery.rendezvous import JOIN_TIMEOUT_S, Rendezvous


class Joining:
    """The ranks of one server that are JOINING the running generation."""

    def __init__(
        self,
        executor: RankExecutor,
        rendezvous: Rendezvous,
        plans: PlanCatalog,
        state: RecoveryState,
        preparation: MeshPreparation,
    ) -> None:
        self._executor = executor
        self._rendezvous = rendezvous
        self._plans = plans
        self._state = state
        self._preparation = preparation
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Let the READY ranks enter the running generation."""
        ranks = sorted(self._state.membership.ready)
        self._state.record(JoinBegan())
        self._task = asyncio.create_task(self._join(ranks))

    def cancel(self) -> None:
        """No rank enters this generation any more."""
        if self._task is not None:
            self._task.cancel()

    async def _join(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if rank not in self._state.membership.joining:
                continue
            self._executor.stop_monitoring(rank)
            try:
                async with asyncio.timeout(JOIN_TIMEOUT_S):
                    process_id = await self._rendezvous.join(rank)
                    slots = slots_of(self._plans.of({*self._state.membership.members, rank}), rank)
                    held = None
                    while held != self._state.membership.next_weights:  # which may change while they are loaded
                        held = self._state.membership.next_weights
                        weights = weights_message(held, self._executor.host_paths(rank))
                        hold = link_pb2.Hold(slots_per_rank=slots.shape[1], slots=slots.tobytes(), weights=weights)
                        await self._executor.call(rank, "hold", hold)
            except RankLost:
                continue
            except (CommandFailed, TimeoutError) as error:
                why = str(error) or f"no answer to join within {JOIN_TIMEOUT_S:.0f} s"
                self._executor.declare(rank, Cause("error", why), clock.now())
                continue
            self._executor.monitor(rank)
            await self._rendezvous.announce(rank, process_id, self._state.membership.members)
            self._state.record(Joined(rank, slots.shape[1]))
        self._preparation.prepare_ahead()
