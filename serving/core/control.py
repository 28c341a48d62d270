"""Instructions to a running server: kill a rank, carry out a planned change, take in a device error."""

from pathlib import Path

import numpy as np

from planner.plan.plan import Plan
from serving.config import SecuritySettings
from serving.errors import NotPermitted, UnknownRequest
from serving.executor.executor import RankExecutor
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.backend import CUT_LINKS, FAULTS, SIGNALS
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.tensors import TensorTarget, TensorUpdate
from serving.recovery.failover import Failover
from serving.recovery.maintenance import Maintenance
from serving.recovery.rebalancing import Rebalancing


class Control:
    """Checks the instructions of clients and operators against the ranks there are, and passes them on."""

    def __init__(
        self,
        settings: SecuritySettings,
        model: ModelInfo,
        executor: RankExecutor,
        failover: Failover,
        maintenance: Maintenance,
        rebalancing: Rebalancing,
    ) -> None:
        self._settings = settings
        self._model = model
        self._executor = executor
        self._failover = failover
        self._maintenance = maintenance
        self._rebalancing = rebalancing

    async def kill(self, rank: int, signal: str, host: str) -> None:
        """See `serving.protocol.backend.Backend.kill`."""
        alive, hosts = self._failover.plan_ranks, self._host_of_rank()
        if not self._settings.chaos:
            raise NotPermitted("this server does not let its ranks be killed. Start it with --chaos.")
        ranks = [rank for rank in alive if hosts[rank] == host] if host else [rank]
        if not ranks or not set(ranks) <= set(alive):
            raise UnknownRequest(f"{host or f'rank {rank}'} is not alive; the ranks alive are {list(alive)}.")
        if signal not in FAULTS:
            raise UnknownRequest(f"signal {signal!r} is none of {', '.join(FAULTS)}.", param="signal")
        for victim in ranks:
            if signal in SIGNALS:
                self._executor.signal(victim, signal)
            elif signal == CUT_LINKS:
                self._executor.cut_links(victim)
            else:
                await self._damage_weights(victim, nan=signal == "NAN")

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply`."""
        if instruction.action == "rebalance":
            await self._rebalancing.run()
        else:
            await self._maintenance.apply(instruction, self._host_of_rank())
        return self._failover.plan_ranks

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """See `serving.protocol.backend.Backend.begin_tensors`."""
        return await self._maintenance.weights.begin_tensors(update)

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply_tensors`."""
        await self._maintenance.weights.apply_tensors(update, Path(folder))
        return self._failover.plan_ranks

    def report(self, error: DeviceError) -> ErrorResponse:
        """See `serving.protocol.backend.Backend.report`."""
        known = sorted(self._host_of_rank())
        if error.rank not in known:
            raise UnknownRequest(f"there is no rank {error.rank}; ranks are {known}.", param="rank")
        return self._maintenance.report(error)

    async def _damage_weights(self, rank: int, *, nan: bool) -> None:
        """Damage the expert of a rank that has most of the traffic, in the rank's memory alone."""
        plan = self._failover.plan
        if not self._model.experts:
            raise UnknownRequest(f"{self._model.name} has no experts whose weights could be spoilt.", param="signal")
        if plan is None:
            return
        if rank not in plan.expert_rank_ids:
            raise UnknownRequest(f"rank {rank} holds no experts whose weights could be spoilt.", param="rank")
        layer, slot = hottest_slot(plan, rank, self._failover.adoption.routed_load())
        await self._executor.call(rank, "damage", link_pb2.Damage(layer=layer, slot=slot, nan=nan))

    def _host_of_rank(self) -> dict[int, str]:
        plans = self._failover.plans
        return {rank: plans.device_of(rank).host for rank in plans.base.rank_ids}


def hottest_slot(plan: Plan, rank: int, loads: np.ndarray) -> tuple[int, int]:
    """The (MoE layer, slot) of a rank with the most traffic, to be corrupted in tests and demonstrations. Each rank
    sends its tokens for an expert to one copy of it; some copies get none."""
    slots, routes = plan.slots_of(rank), plan.expert_to_slot()
    layers, first = np.arange(len(slots))[:, None], plan.expert_rank_ids.index(rank) * plan.slots_per_rank
    slot_ids = first + np.arange(plan.slots_per_rank)
    senders = (routes[:, layers, np.maximum(slots, 0)] == slot_ids).sum(0)
    traffic = np.where(slots >= 0, loads[layers, np.maximum(slots, 0)] * senders, -1)
    layer, slot = np.unravel_index(int(traffic.argmax()), traffic.shape)
    return int(layer), int(slot)
