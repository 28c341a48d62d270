"""The loop of the engine: runs a step on the ranks, and what is due between two steps.

It implements `serving.protocol.backend.Backend`.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection

from planner.plan.deployment import Deployment
from serving.config import Settings
from serving.core.background import Background
from serving.core.control import Control
from serving.core.due_work import DueWorker
from serving.core.engine_shell import EngineShell
from serving.core.output_streams import OutputStreams
from serving.core.recovery_report import RecoveryReport
from serving.core.request_log import RequestLog
from serving.core.status_report import StatusReport
from serving.core.step_runner import StepRunner
from serving.core.step_stats import StepStats
from serving.core.upgrades import Upgrades
from serving.engine.limits import Limits
from serving.engine.step_results import can_look_ahead
from serving.errors import Conflict, Draining, Internal, InvalidRequest, MoejaxError, NoCapacity
from serving.executor.executor import RankExecutor
from serving.executor.step_pipeline import StepPipeline
from serving.protocol import clock
from serving.protocol.events import Event, EventKind, EventLog
from serving.protocol.instructions import DeviceError, ErrorResponse, Instruction
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.request import Call, Finished, Request, Scored, Token
from serving.protocol.status import EdgeStatus, LossForecast, Status
from serving.protocol.tensors import TensorTarget, TensorUpdate
from serving.recovery.due import BESIDE_A_STEP, URGENT, DueWork
from serving.recovery.failover import Failover
from serving.text.structured_output import GrammarMatcher
from serving.text.validation import check_resumed

IDLE_S = 0.25
"""Seconds between two checks of deadlines while no step runs."""
PENDING_S = 0.005
"""Seconds between two checks of maintenance that waits for something while no step runs."""
DUE_CHECK_S = 0.25
"""Most seconds for which steps are sent ahead before the loop pauses and checks all that is due between steps."""


class Loop:
    """Serves requests on the ranks of a `Failover` until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        model: ModelInfo,
        limits: Limits,
        executor: RankExecutor,
        failover: Failover,
        grammar_matcher: GrammarMatcher,
        request_log: RequestLog | None = None,
        *,
        events: EventLog,
        step_stats: StepStats,
        wake: asyncio.Event,
        output_streams: OutputStreams | None = None,
    ) -> None:
        self.model = model
        self.events = events
        self.settings = settings
        self.failover = failover
        pipeline = StepPipeline(settings, executor, grammar_matcher.mask)
        self.engine = EngineShell(
            settings,
            limits,
            executor,
            failover,
            pipeline,
            request_log or RequestLog(None),
            events=events,
            step_stats=step_stats,
            wake=wake,
            output_streams=output_streams,
        )
        report = RecoveryReport(failover, events)
        self.grammar_matcher = grammar_matcher
        self._pipeline = pipeline
        self._steps = StepRunner(self.engine, report, wake, grammar_matcher.take_failures)
        self._worker = DueWorker(self.engine, report)
        self._control = Control(settings, model, executor, failover, self.engine.maintenance, self.engine.rebalancing)
        self._status_report = StatusReport(self.engine, model, report)
        self._wake = wake
        self._draining = False
        self._ended: MoejaxError | None = None
        self._due_checked_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._background = Background(self.engine, self._control.report)
        self.upgrades: Upgrades | None = None
        """None where processes cannot be replaced under their clients: without a supervisor, or without edges."""
        self.connected_edges: Callable[[], tuple[EdgeStatus, ...]] = tuple
        """The status of the edges that are connected."""

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """All tasks of this loop."""
        main = [self._task] if self._task is not None else []
        return [*main, *self._background.tasks, *self.engine.replacements.tasks]

    @property
    def step_stats(self) -> tuple[StepStats, ...]:
        """The statistics of the steps of each mesh."""
        return (self.engine.step_stats,)

    @property
    def serves(self) -> bool:
        """Whether a plan is in force."""
        return self.failover.plan is not None

    def before_steps(self, act: Callable[[], None]) -> None:
        """Have a function called each time before a step is scheduled."""
        self._steps.before_step = act

    def start(self, *, keeps_log: bool = True) -> "asyncio.Future[str] | None":
        """Begin to serve. The ranks must be under their first plan. With `keeps_log` this loop takes up the calls of
        the journal, and keeps it. In an upgrade, this front computes its canaries before anything else: the future gets
        why it must not serve, empty when it may."""
        engine, failover, settings = self.engine, self.failover, self.settings
        engine.apply_plan(())
        tried = self.upgrades.try_front() if self.upgrades is not None else None
        engine.suspects.restore(recorded=keeps_log)
        if keeps_log:
            engine.resume_journaled_calls(self._check_resumed)
        taken = f", {n} of them taken over" if (n := failover.take_over.ranks_taken_over) else ""
        self.events.emit(EventKind.READY, failover.epoch, message=f"{len(failover.plan_ranks)} ranks{taken}")
        self._worker.report_missing_replicas()
        self._task = asyncio.create_task(self._run())
        if settings.restart:  # a front that takes over ranks may lack some
            for rank in failover.plans.base.rank_ids:
                engine.replace(rank)
        self._background.start(keeps_log=keeps_log)
        if self.upgrades is not None:
            self._background.begin(self.upgrades.follow())
        return tried

    def refuse_requests(self, *, reports: bool = True) -> None:
        """Take no new requests any more. The first time is an event, unless another pool `reports` it."""
        if self._draining:
            return
        self._draining = True
        if reports:
            self.events.emit(EventKind.DRAINING, self.failover.epoch)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, give running ones `grace_s` seconds to end, then end the loop and what is left."""
        self.refuse_requests()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.engine.state.running or self.engine.state.waiting:
                    await asyncio.sleep(0.02)
        for task in self.tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        self._pipeline.discard()
        self.engine.fail_all(Draining("the server shut down before the request was done."))

    # -- Backend ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> MoejaxError | None:
        """Why the loop has stopped by itself, if so."""
        return self._ended

    async def stream(self, request: Request) -> AsyncGenerator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.stream`."""
        if self._ended is not None:
            raise self._ended
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests.")
        if self.failover.plan is None:
            reason = self.failover.membership.no_plan_reason
            raise NoCapacity(f"no request can be served now: {reason}", retry_after_s=2.0)
        async with contextlib.aclosing(self.engine.stream(request)) as items:
            async for item in items:
                yield item

    def replay(self, request_id: str, *, follow: bool = True) -> AsyncIterator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.replay`."""
        return self.engine.replay(request_id, follow=follow)

    @property
    def resumable(self) -> bool:
        """See `serving.protocol.backend.Backend.resumable`."""
        return self.engine.request_log.enabled

    def edge_started(self, edge: EdgeStatus) -> None:
        """Clients can connect to an edge."""
        self.events.emit(EventKind.EDGE_STARTED, self.failover.epoch, message=f"{edge}")

    def edge_lost(self, edge: EdgeStatus, announced: bool) -> None:
        """An edge has gone, and has left its open calls behind; `announced`: it had said that it ends, on request."""
        replaced = not edge.host and self.upgrades is not None and self.upgrades.active
        kind = EventKind.EDGE_LOST
        if not edge.calls and (replaced or announced):
            kind = EventKind.EDGE_REPLACED if replaced else EventKind.EDGE_ENDED
        self.events.emit(kind, self.failover.epoch, message=f"{edge}, {edge.calls} calls open")

    @property
    def recovering(self) -> bool:
        """See `serving.protocol.backend.Backend.recovering`."""
        return False

    def has_begun(self, request_id: str) -> bool:
        """See `serving.protocol.backend.FrontBackend.has_begun`."""
        known = self.engine.request_log.items(request_id)
        return bool(known) or self.engine.state.find(request_id) is not None

    def register_call(self, call: Call) -> None:
        """See `serving.protocol.backend.Backend.register_call`."""
        self.engine.request_log.register_call(call)

    def close_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.close_call`."""
        self.engine.request_log.close_call(call_id)

    def forget_call(self, call_id: str) -> None:
        """See `serving.protocol.backend.Backend.forget_call`."""
        self.engine.request_log.forget_call(call_id)

    def find_call(self, call_id: str, owner: str) -> Call:
        """See `serving.protocol.backend.Backend.find_call`."""
        return self.engine.request_log.find_call(call_id, owner)

    def abort(self, request_id: str) -> bool:
        """See `serving.protocol.backend.Backend.abort`."""
        if self.engine.state.find(request_id) is None:
            return False
        self.engine.cancel(request_id)
        return True

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        """See `serving.protocol.backend.Backend.fail_requests`."""
        self.engine.fail_requests(request_ids, error)

    def first_step_at(self, request_id: str) -> float | None:
        """See `serving.protocol.backend.Backend.first_step_at`."""
        return self.engine.output_streams.first_step_at(request_id)

    def status(self) -> Status:
        """See `serving.protocol.backend.Backend.status`."""
        return self._status_report.status(
            draining=self._draining,
            ended=self._ended is not None,
            edges=self.connected_edges(),
            upgrade=self.upgrades.record if self.upgrades is not None else None,
        )

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """See `serving.protocol.backend.Backend.watch`."""
        return self.events.watch(after)

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """See `serving.protocol.backend.Backend.kill`."""
        await self._control.kill(rank, signal, host)

    def what_if(self) -> tuple[LossForecast, ...]:
        """See `serving.protocol.backend.Backend.what_if`."""
        return self._status_report.what_if()

    def deployment(self) -> Deployment | None:
        """See `serving.protocol.backend.Backend.deployment`."""
        return self._status_report.deployment()

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply`."""
        if instruction.action == "upgrade":
            if self.upgrades is None:
                raise InvalidRequest(
                    "an upgrade replaces the processes under their clients, which needs a supervisor and edges. Start "
                    "the server with --edges 1 or more, and without --no-supervise.",
                    param="action",
                )
            await self.upgrades.begin(instruction)
            return self.failover.plan_ranks
        if instruction.action != "retry":
            self._check_not_upgrading(instruction.action)
        return await self._control.apply(instruction)

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """See `serving.protocol.backend.Backend.begin_tensors`."""
        self._check_not_upgrading("weights")
        return await self._control.begin_tensors(update)

    async def apply_tensors(self, update: TensorUpdate, folder: str) -> tuple[int, ...]:
        """See `serving.protocol.backend.Backend.apply_tensors`."""
        self._check_not_upgrading("weights")
        return await self._control.apply_tensors(update, folder)

    def _check_not_upgrading(self, action: str) -> None:
        if self.upgrades is not None and self.upgrades.busy:
            raise Conflict(
                f"an upgrade is under way, which {action} would cross. Wait for it (`moejax status`), then try again."
            )

    def report(self, error: DeviceError) -> ErrorResponse:
        """See `serving.protocol.backend.Backend.report`."""
        return self._control.report(error)

    # -- The loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        pipeline, steps = self._pipeline, self._steps
        try:
            while True:
                if not pipeline:
                    await self._worker.run()
                    self._due_checked_at = clock.now()
                    if not steps.send():
                        steps.end_recovery()
                        await self._wait_for_work()
                        continue
                if self.settings.lookahead:
                    await pipeline.wait_half()
                if self._may_look_ahead():
                    steps.send()
                await steps.receive()
        except Exception as error:
            self._ended = Internal(f"the engine stopped: {type(error).__name__}: {error}")
            pipeline.discard()
            self.engine.fail_all(self._ended)
            raise

    def _may_look_ahead(self) -> bool:
        """True when another step may be sent while one is in flight: nothing is due that needs a pause between steps.
        False at least every DUE_CHECK_S seconds."""
        if not self.settings.lookahead or len(self._pipeline) > 1 or not can_look_ahead(self.engine.state):
            return False
        if self.failover.plan is None or any(due not in BESIDE_A_STEP for due in self._worker.due()):
            return False
        return clock.now() - self._due_checked_at < DUE_CHECK_S

    async def _wait_for_work(self) -> None:
        """With no step to send: wait until something is due, or a request or a rank needs the loop."""
        self._wake.clear()
        due, comm_broken = set(self._worker.due()), self.failover.membership.comm_broken
        if self.engine.restoration.in_progress and not comm_broken:
            await asyncio.sleep(0)
            return
        maintain = DueWork.MAINTAIN in due
        if due & URGENT or (maintain and not comm_broken):
            await asyncio.sleep(PENDING_S if maintain else 0)
            return
        if DueWork.RECONCILE in due:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await self._wake.wait()

    def _check_resumed(self, request: Request) -> Request:
        """A request of the journal as this server runs it. Raises InvalidRequest."""
        request = check_resumed(request, self.model.vocab_size)
        if (constraint := request.sampling.structured_outputs) is not None:
            self.grammar_matcher.check(constraint)
        return request
