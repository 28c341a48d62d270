"""Runs steps: schedules one, sends it to the ranks, and applies its results."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping

from serving.core.engine_shell import EngineShell
from serving.core.recovery_report import RecoveryReport
from serving.engine.batch import Batch
from serving.engine.draft_rows import stop_drafting
from serving.engine.rank_changes import lose
from serving.engine.scheduler import schedule
from serving.engine.step_results import apply
from serving.errors import MoejaxError
from serving.executor.host_steps import host_results
from serving.executor.rank_errors import CommandFailed, NonFiniteStep, RankLost
from serving.executor.step_messages import step_results
from serving.protocol import clock
from serving.protocol.events import EventKind

SETTLE_S = 2.0
"""Seconds to wait, after a rank failed a step, for the death that explains it, before a new generation is made."""
RECONNECT_SETTLE_S = 0.1
"""As SETTLE_S, before a mesh is connected again whose ranks share memory: a rank that dies meanwhile delays nobody."""


class StepRunner:
    """The steps of one server. `woken` is set whenever a rank is lost; `take_failures` returns the requests whose
    grammar failed when a step was made."""

    def __init__(
        self,
        engine: EngineShell,
        report: RecoveryReport,
        woken: asyncio.Event,
        take_failures: Callable[[], Mapping[str, MoejaxError]],
    ) -> None:
        self._take_failures = take_failures
        self._engine = engine
        self._report = report
        self._woken = woken
        self.before_step: Callable[[], None] = lambda: None
        """Called before a step is scheduled."""
        self._exchange_failed = False
        """Whether an exchange between ranks that live has failed since the last step that was done."""

    def send(self) -> bool:
        """Schedule a step and send it to the ranks. False when there is nothing to compute."""
        engine, failover = self._engine, self._engine.failover
        engine.expire()
        self.before_step()
        began = clock.now()
        plan, epoch = failover.plan, failover.epoch
        admitted, batch = engine.state.admitted, None
        if failover.adoption.can_step and not engine.maintenance.paused:
            before = engine.state
            engine.state, batch = schedule(before, serial_prefill=engine.restoration.serial_prefill)
            if batch is None and engine.state is not before:
                self.before_step()  # a prompt was found in the cache, and its request goes on in another pool
        left, queued = engine.state.admitted - admitted, bool(engine.state.waiting)
        engine.admission.record(began, left=left, queued=queued)
        if batch is None or plan is None:
            return False
        version = failover.membership.weights.label
        batch = dataclasses.replace(batch, degraded=bool(plan.masked), weights_version=version)
        scheduled = (work.request_id for part in batch.scheduled.values() for work in part)
        engine.output_streams.record_step(scheduled, began)
        engine.pipeline.send(batch, began, epoch=epoch, ranks=plan.rank_ids, state=engine.state)
        for request_id, error in self._take_failures().items():
            engine.fail_request(request_id, error)
        return True

    async def receive(self) -> None:
        """Apply the results of the step that was sent first, and send its tokens."""
        engine = self._engine
        flight = engine.pipeline.first
        batch, in_flight = flight.batch, engine.pipeline.batches
        try:
            answers = await engine.pipeline.receive()
        except RankLost:
            engine.suspects.note_losses(engine.failover.membership.losses, in_flight)
            return
        except CommandFailed as refusal:
            await self._await_loss(refusal, in_flight)
            return
        except NonFiniteStep as poison:
            engine.state = stop_drafting(lose(engine.state, ()), batch, poison.rows)
            with contextlib.suppress(RankLost, CommandFailed):
                await engine.maintenance.repair.on_non_finite(batch, poison.rows)
            return
        results = {}
        for rank, answer in answers.ranks.items():
            results |= step_results(batch, rank, answer)
            engine.step_stats.record_rank(rank, answer)
        for host in answers.hosts:
            results |= host_results(batch, host)
            engine.step_stats.record_host(host)
        self._exchange_failed = False
        state, outputs = apply(engine.state, batch, results)
        engine.failover.kv_replicas.record_step(batch)
        engine.put(state, outputs)
        engine.suspects.record_changes()
        self.end_recovery()
        self._report_slow_ranks()
        seconds = engine.step_stats.record_step(batch, flight.began, clock.now())
        engine.restoration.record_step(batch, seconds)

    def end_recovery(self) -> None:
        """The first step after a recovery is done, or there is none to make. Replacements start after it, not beside
        it."""
        self._engine.replacements.start_wanted()
        self._report.finish()

    async def _await_loss(self, refusal: CommandFailed, in_flight: tuple[Batch, ...]) -> None:
        """The first step in flight failed on a rank that lives. Wait for the loss that explains it. Else the
        communicators are broken: after the failure of an exchange alone the same work is done once more over new
        connections, and nobody is accused of it."""
        engine, failover = self._engine, self._engine.failover
        # Whichever exchange of the step the other ranks wait in, the rank that refused is not coming.
        engine.executor.abort(set(failover.plan_ranks).difference(failover.membership.losses), failover.epoch)
        again = refusal.exchange and not self._exchange_failed
        quick = again and failover.meshes.shares_memory
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RECONNECT_SETTLE_S if quick else SETTLE_S):
                while not engine.failover.membership.losses:
                    self._woken.clear()
                    await self._woken.wait()
                engine.suspects.note_losses(engine.failover.membership.losses, in_flight)
                return
        engine.events.emit(EventKind.STEP_FAILED, engine.failover.epoch, rank=refusal.rank, cause=refusal.error)
        if again:
            self._exchange_failed = True
            failover.mark_exchange_failed()
            return
        engine.suspects.judge_failed_step(refusal.rank, in_flight[0])
        failover.mark_comm_broken()

    def _report_slow_ranks(self) -> None:
        engine, stats = self._engine, self._engine.step_stats
        for rank, verdict in stats.judge_slowness(clock.now(), engine.failover.plan).items():
            cause = f"{stats.slowness[rank]:.1f} times as slow as the others"
            kind = EventKind.PACE_RECOVERED if verdict == "recovered" else EventKind.SLOW
            engine.events.emit(kind, engine.failover.epoch, rank=rank, cause=cause, message=verdict)
            if verdict == "drain" and engine.settings.drain_slow:
                engine.maintenance.leave(rank, f"slow: {cause}", replace=True)
