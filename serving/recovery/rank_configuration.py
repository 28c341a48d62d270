"""Configures a rank that has attached: its model, the shape of its KV cache, and its KV replica."""

from serving.config import Settings
from serving.engine.limits import snapshots_per_rank
from serving.executor.executor import RankExecutor
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.versions import KEEPS_SNAPSHOTS
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.mesh_pool import COLLECTIVE_TIMEOUT_S
from serving.recovery.plan_catalog import PlanCatalog
from serving.recovery.recovery_state import RecoveryState


class RankConfiguration:
    """The configuration of every rank of one server. `single_host` is true when all ranks run on the front's
    host."""

    def __init__(
        self,
        settings: Settings,
        model: PreparedModel,
        executor: RankExecutor,
        plans: PlanCatalog,
        kv_replicas: KVReplicas,
        state: RecoveryState,
        *,
        single_host: bool,
    ) -> None:
        self._settings = settings
        self._model = model
        self._executor = executor
        self._plans = plans
        self._kv_replicas = kv_replicas
        self._state = state
        self._single_host = single_host

    async def configure(self, rank: int) -> link_pb2.Done:
        """Wait until a rank has attached, and configure it. Returns its answer: whether ranks exchange through shared
        memory, and what it holds of an earlier front. Raises RankLost or CommandFailed."""
        hello = await self._executor.wait_attached(rank)
        host_paths = self._executor.host_paths(rank)
        if host_paths is not None and host_paths.host != self._plans.device_of(rank).host:
            self._plans.move(rank, host_paths)
        message = self._message(rank)
        if message.snapshots and self._executor.link_version([rank]) < KEEPS_SNAPSHOTS:
            raise CommandFailed(
                rank,
                "configure",
                f"it runs code that keeps no snapshots of states, and the front wants {message.snapshots}: start the "
                "agent of its host with the code of the front, or the server with --state-snapshots 0",
            )
        reopened = self._kv_replicas.reopen(rank, hello.cache_copy)
        if reopened is not None:
            message.MergeFrom(reopened)
        elif not message.experts_only:
            message.MergeFrom(self._kv_replicas.assign(rank, on_front_host=host_paths is None))
        answer = await self._executor.call(rank, "configure", message)
        if reopened is not None:
            self._kv_replicas.unseal(rank)
        return answer

    def _message(self, rank: int) -> link_pb2.Configure:
        """The configuration of a rank but for its KV replica."""
        model, settings, base = self._model, self._settings, self._plans.base
        version = self._state.membership.next_weights
        host_paths = self._executor.host_paths(rank)
        message = link_pb2.Configure(
            model_config=model.config,
            store=host_paths.store if host_paths is not None else version.store or model.store,
            weights=version.number,
            executables=model.executables if host_paths is None else host_paths.executables,
            page_size=settings.page_size,
            pages=base.pages_per_rank,
            max_pages=-(-model.max_context // settings.page_size),
            buckets=[link_pb2.Bucket(decode=rows, tiles=tiles) for rows, tiles in settings.buckets],
            collective_timeout_s=COLLECTIVE_TIMEOUT_S,
            one_machine=self._single_host,
            experts_only=not MeshKey.of(base).has_attention(rank),
            drafts=settings.model_drafts,
            snapshots=snapshots_per_rank(settings) if model.state_bytes else 0,
        )
        if settings.tensor > 1:
            message.tensor = settings.tensor
            message.shard = base.groups.get(rank, (rank,)).index(rank)
        return message
