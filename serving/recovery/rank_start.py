"""Starts the processes of ranks until they are READY, and has them load weights that are brought in meanwhile."""

import asyncio

from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.weights import WeightsVersion
from serving.recovery.adoption import weights_message
from serving.recovery.membership_events import Ready
from serving.recovery.mesh_pool import MeshPool
from serving.recovery.rank_configuration import RankConfiguration
from serving.recovery.recovery_state import RecoveryState


class RankStart:
    """The start of each rank of one server. One that is not READY within `timeout_s` seconds is lost."""

    def __init__(
        self,
        executor: RankExecutor,
        configuration: RankConfiguration,
        state: RecoveryState,
        meshes: MeshPool,
        *,
        timeout_s: float,
    ) -> None:
        self._executor = executor
        self._configuration = configuration
        self._state = state
        self._meshes = meshes
        self._timeout_s = timeout_s

    async def start(self, rank: int) -> None:
        """Start the process of a rank until it is READY, beside the steps. Raises RankLost: a rank that does
        not become READY has been declared dead."""
        self._executor.spawn(rank)
        try:
            async with asyncio.timeout(self._timeout_s):
                version = self._state.membership.next_weights
                await self.configure(rank)
                while version != (wanted := self._state.membership.next_weights):  # decided on meanwhile
                    version = wanted
                    await self.stage_weights(rank, version)  # so that no step waits for them
            self._executor.monitor(rank)
        except (CommandFailed, TimeoutError) as error:
            cause = Cause("error", str(error) or f"not ready within {self._timeout_s:g} s")
            self._executor.declare(rank, cause, clock.now())
            raise RankLost(rank, str(cause)) from None
        self._state.record(Ready(rank))

    async def configure(self, rank: int) -> link_pb2.Held:
        """Wait until a rank has attached, and configure it. Returns what it holds of an earlier front. Raises RankLost
        or CommandFailed."""
        answer = await self._configuration.configure(rank)
        self._meshes.on_configured(shares_memory=answer.shares_memory)
        return answer.held

    async def stage_weights(self, rank: int, version: WeightsVersion) -> None:
        """Have a rank load other weights into host memory, beside its steps; for the version that it has, drop what it
        has staged. Raises RankLost or CommandFailed."""
        message = weights_message(version, self._executor.host_paths(rank))
        await self._executor.call(rank, "stage_weights", link_pb2.StageWeights(version=message))
