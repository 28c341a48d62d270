"""A server of two pools: ranks that compute prompts, and ranks that decode (docs/decisions/0025).

Each pool is a loop of its own, with its membership, generation, plans, lattice, executables and steps: no step and no
recovery of one waits for the other. A request moves between them (serving/core/hand_over.py).

It implements `serving.protocol.backend.FrontBackend`.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

from planner.cost.pools import design_pools
from planner.errors import PlannerError
from planner.inputs.cluster import Cluster
from planner.plan.deployment import FaultTolerance
from planner.plan.pools import AnyDeployment
from serving.config import Settings
from serving.core.hand_over import HandOver
from serving.core.loop import Loop
from serving.core.pool_plans import in_force, joint_deployment
from serving.core.pool_status import joint_forecasts, joint_status
from serving.core.start import ServerParts, start_loop
from serving.core.step_stats import StepStats
from serving.errors import InvalidRequest, MoejaxError, StartError, UnknownRequest
from serving.launch.pool_hosts import PoolHosts
from serving.protocol.events import Event
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import EdgeStatus, LossForecast, Status
from serving.protocol.tensors import TensorTarget, TensorUpdate
from serving.recovery.certificate_watch import CertificateWatch
from serving.recovery.failover import Failover
from serving.recovery.kv_replicas import KVReplicas
from serving.recovery.loss_forecast import measured_recovery
from serving.recovery.plan_catalog import pages_per_rank

DRAIN_POLL_S = 0.02
"""Seconds between two looks whether all requests have ended."""

OF_ONE_POOL = ("drain", "scale_down", "scale_up")
"""Instructions about ranks of one pool, given by their numbers."""


async def start_pools(stack: contextlib.AsyncExitStack, parts: ServerParts) -> "Pools":
    """The pools of a server, with all ranks under their first plans; they do not run yet. `stack` ends what was
    started. Raises StartError, also for a model whose requests cannot be sent."""
    if parts.model.state_bytes:
        raise StartError(
            f"{parts.model.name} has layers whose context is a state, which is not sent between pools yet. Leave arch "
            "out."
        )
    settings = with_pool_sizes(parts.settings, parts.model)
    parts.log(f"{settings.prefill} ranks compute prompts, {settings.decode} decode")
    parts = dataclasses.replace(parts, settings=settings)
    pages = pages_per_rank(settings, parts.model.max_context, parts.model.cache_bytes_per_token)
    replicas = KVReplicas.of_server(settings, parts.model, pages, single_host=settings.launcher == "local")
    stack.callback(replicas.close)
    if not replicas.on:
        raise StartError(
            f"with arch pd requests go to the decode pool by the replicas of KV caches, and {replicas.take_warning()} "
            "Or leave arch out."
        )
    if settings.launcher != "local":
        hosts = PoolHosts(settings, parts.launcher(settings, parts.model, Path(), parts.run))
        stack.push_async_callback(hosts.close)
        parts = dataclasses.replace(parts, launcher=hosts.launcher)
    prefill = await start_loop(stack, parts, pool="prefill", kv_replicas=replicas)
    streams = prefill.engine.output_streams
    decode = await start_loop(stack, parts, pool="decode", kv_replicas=replicas, output_streams=streams)
    return Pools(prefill, decode, CertificateWatch(settings))


def with_pool_sizes(settings: Settings, model: PreparedModel) -> Settings:
    """The settings with the number of ranks of each pool: as given, or the planner's for its default traffic; equal
    halves where it has none."""
    if settings.prefill is not None:
        return settings
    prefill, cluster = settings.ranks // 2, Cluster.local(settings.ranks)
    with contextlib.suppress(PlannerError):
        workload = model.workload(settings.page_size)
        found = design_pools(workload, cluster, survive=FaultTolerance(ranks=0)).deployment
        prefill = sum(len(pool.plan.ranks) for pool in found.prefill)
    return dataclasses.replace(settings, prefill=prefill, decode=settings.ranks - prefill)


class Pools:
    """The two loops of one server as one backend."""

    def __init__(self, prefill: Loop, decode: Loop, certificate: CertificateWatch) -> None:
        self.prefill = prefill
        self.decode = decode
        self.model = prefill.model
        self.grammar_matcher = prefill.grammar_matcher
        self.hand_over = HandOver(prefill.engine, decode.engine)
        self._certificate = certificate
        self.connected_edges: Callable[[], tuple[EdgeStatus, ...]] = tuple
        """The status of the edges that are connected."""
        for each, other in ((prefill, decode), (decode, prefill)):
            each.before_steps(self.hand_over.run)
            suspected = other.engine
            each.engine.suspects.elsewhere = lambda of=suspected: of.state.suspicion.incidents
            each.engine.drop_elsewhere = suspected.drop
        decode.engine.restoration.prompts_go_elsewhere = lambda: prefill.failover.plan is not None
        prefill.engine.output_streams.on_abandoned = self._cancel

    @property
    def loops(self) -> tuple[Loop, Loop]:
        """The loop that computes prompts, and the one that decodes."""
        return self.prefill, self.decode

    @property
    def failover(self) -> Failover:
        """The ranks of the decode pool."""
        return self.decode.failover

    @property
    def step_stats(self) -> tuple[StepStats, ...]:
        """See `Loop.step_stats`."""
        return tuple(each.engine.step_stats for each in self.loops)

    def start(self) -> None:
        """Begin to serve. The ranks must be under their first plans."""
        self.decode.start(keeps_log=False)
        self.prefill.start()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, give running ones `grace_s` seconds to end, then end the loops and what is left."""
        self.prefill.refuse_requests()
        self.decode.refuse_requests(reports=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(each.engine.state.running or each.engine.state.waiting for each in self.loops):
                    await asyncio.sleep(DRAIN_POLL_S)
        for each in self.loops:
            await each.drain(0.0)

    @property
    def _ended(self) -> MoejaxError | None:
        """Why a loop has stopped by itself, if one has: the server then serves no request any more."""
        return next((each.ended for each in self.loops if each.ended is not None), None)

    # -- Requests -----------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncIterator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.stream`."""
        if self._ended is not None:
            raise self._ended
        loop = self.decode if self.decode.serves and not self.prefill.serves else self.prefill
        if any(each.engine.state.find(request.id) for each in self.loops):
            raise InvalidRequest(f"request id {request.id!r} is in use. Choose another.", param="request_id")
        self.hand_over.count_arrivals()
        async with contextlib.aclosing(loop.stream(request)) as items:
            async for item in items:
                yield item

    def replay(self, request_id: str, *, follow: bool = True) -> AsyncIterator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.replay`."""
        return self.prefill.replay(request_id, follow=follow)

    @property
    def resumable(self) -> bool:
        """See `serving.protocol.backend.Backend.resumable`."""
        return self.prefill.resumable

    @property
    def recovering(self) -> bool:
        """See `serving.protocol.backend.Backend.recovering`."""
        return False

    def has_begun(self, request_id: str) -> bool:
        """See `serving.protocol.backend.FrontBackend.has_begun`."""
        return any(each.has_begun(request_id) for each in self.loops)

    def register_call(self, call: Call) -> None:
        """See `serving.protocol.backend.Backend.register_call`."""
        self.prefill.register_call(call)

    def close_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.close_call`."""
        self.prefill.close_call(call_id)

    def forget_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.forget_call`."""
        self.prefill.forget_call(call_id)

    def find_call(self, call_id: str, owner: str) -> Call:
        """See `serving.protocol.backend.Backend.find_call`."""
        return self.prefill.find_call(call_id, owner)

    def abort(self, request_id: str) -> bool:
        """See `serving.protocol.backend.Backend.abort`."""
        return self.prefill.abort(request_id) or self.decode.abort(request_id)

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        """See `serving.protocol.backend.Backend.fail_requests`."""
        here = [key for key in request_ids if self.decode.engine.state.find(key) is not None]
        self.decode.fail_requests(here, error)
        self.prefill.fail_requests([key for key in request_ids if key not in here], error)

    def first_step_at(self, request_id: str) -> float | None:
        """See `serving.protocol.backend.Backend.first_step_at`."""
        return self.prefill.first_step_at(request_id)

    def _cancel(self, request_id: str) -> None:
        for each in self.loops:
            each.engine.cancel(request_id)

    # -- Edges, status and operations ---------------------------------------------------------------------------

    def edge_started(self, edge: EdgeStatus) -> None:
        """See `Loop.edge_started`."""
        self.prefill.edge_started(edge)

    def edge_lost(self, edge: EdgeStatus, announced: bool) -> None:
        """See `Loop.edge_lost`."""
        self.prefill.edge_lost(edge, announced)

    def status(self) -> Status:
        """See `serving.protocol.backend.Backend.status`."""
        both, edges = (self.prefill.status(), self.decode.status()), self.connected_edges()
        key = tuple((each.epoch, bool(each.axes), each.recoveries) for each in both)
        certificate = self._certificate.state(key, lambda: in_force(*self.loops))
        return dataclasses.replace(
            joint_status(*both, self.hand_over, edges, ended=self._ended is not None),
            certificate=certificate.state,
            certificate_reason=certificate.reason,
            certificate_repair=certificate.repair,
        )

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """See `serving.protocol.backend.Backend.watch`."""
        return self.prefill.watch(after)

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """See `serving.protocol.backend.Backend.kill`."""
        if not host:
            await self._of(rank).kill(rank, signal)
            return
        with_host = [each for each in self.loops if any(rank.host == host for rank in each.status().ranks)]
        for each in with_host or self.loops[:1]:
            await each.kill(rank, signal, host)

    def what_if(self) -> tuple[LossForecast, ...]:
        """See `serving.protocol.backend.Backend.what_if`."""
        both = {"prefill": self.prefill, "decode": self.decode}
        times = measured_recovery(self.decode.events.retained(), 1)
        return joint_forecasts(
            {name: each.what_if() for name, each in both.items()},
            ranks={name: len(each.failover.plan_ranks) if each.serves else 0 for name, each in both.items()},
            take_over_ms=1e3 * (times.detect + times.abort + (times.first_step or 0.0)),
        )

    def deployment(self) -> AnyDeployment | None:
        """See `serving.protocol.backend.Backend.deployment`. Of one pool while the other is lost."""
        return joint_deployment(self.prefill, self.decode)

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply`."""
        if instruction.action == "upgrade":
            raise InvalidRequest(
                "action is 'upgrade' with arch 'pd', whose front holds the connections of its clients and cannot be "
                "replaced under them. Stop the server, and start it with the new version.",
                param="action",
            )
        if instruction.action == "weights":
            raise _no_new_weights()
        concerned = self.loops
        if instruction.action in OF_ONE_POOL and instruction.to is None and not (instruction.ranks or instruction.host):
            raise InvalidRequest(
                f"{instruction.action} names no ranks, and this server has two pools. Give the numbers of ranks of one "
                "of them (`moejax status` lists them).",
                param="ranks",
            )
        if instruction.ranks:
            concerned = (self._of(instruction.ranks[0]),)
            other = [rank for rank in instruction.ranks if self._of(rank) is not concerned[0]]
            if other:
                raise InvalidRequest(
                    f"ranks {sorted(instruction.ranks)} are of both pools; give those of one at a time.", param="ranks"
                )
        elif instruction.to is not None or instruction.host:
            raise InvalidRequest(
                f"{instruction.action} by {'host' if instruction.host else 'to'} is about one mesh, and this server "
                "has two pools. Give ranks.",
                param="host" if instruction.host else "to",
            )
        await asyncio.gather(*(each.apply(instruction) for each in concerned))
        return tuple(rank for each in self.loops for rank in each.failover.plan_ranks)

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """See `serving.protocol.backend.Backend.begin_tensors`. Raises InvalidRequest."""
        raise _no_new_weights()

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply_tensors`. Raises InvalidRequest."""
        raise _no_new_weights()

    def report(self, error: DeviceError) -> ErrorResponse:
        """See `serving.protocol.backend.Backend.report`."""
        return self._of(error.rank).report(error)

    def _of(self, rank: int) -> Loop:
        """The loop of a rank. Raises UnknownRequest."""
        for each in self.loops:
            if rank in each.failover.plans.base.rank_ids:
                return each
        known = [each for loop in self.loops for each in loop.failover.plans.base.rank_ids]
        raise UnknownRequest(f"there is no rank {rank}; ranks are {known}.", param="rank")


def _no_new_weights() -> InvalidRequest:
    return InvalidRequest(
        "action is 'weights' with arch 'pd': both pools would have to switch between two steps, which they do not yet. "
        "Restart the server with the new --model.",
        param="action",
    )
