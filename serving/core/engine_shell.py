"""Holds the engine's state: requests enter it, and what it puts out goes to their streams."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Mapping

from serving.config import Settings
from serving.core.admission import Admission
from serving.core.call_history import scored_count
from serving.core.canary import Canary
from serving.core.output_streams import OutputStreams
from serving.core.request_log import RequestLog, token_ids
from serving.core.step_stats import StepStats
from serving.core.suspects import Suspects
from serving.engine import migration
from serving.engine.lifecycle import cancel, expire, resubmit, submit
from serving.engine.limits import Limits
from serving.engine.rank_changes import adopt, lose
from serving.engine.sequence import RecoverableKV
from serving.engine.state import EngineState, Output
from serving.errors import MoejaxError
from serving.executor.executor import RankExecutor
from serving.executor.step_pipeline import StepPipeline
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.protocol.request import Finished, Request, Scored, Token
from serving.recovery.failover import Failover
from serving.recovery.kv_restoration import KVRestoration
from serving.recovery.maintenance import Maintenance
from serving.recovery.rebalancing import Rebalancing
from serving.recovery.replacements import Replacements


class EngineShell:
    """The mutable holder of the pure engine state of one mesh, with the parts that change it between steps. `wake`
    makes the loop check what is due; `output_streams` are those of another pool of the server."""

    def __init__(
        self,
        settings: Settings,
        limits: Limits,
        executor: RankExecutor,
        failover: Failover,
        pipeline: StepPipeline,
        request_log: RequestLog,
        *,
        events: EventLog,
        step_stats: StepStats,
        wake: asyncio.Event,
        output_streams: OutputStreams | None = None,
    ) -> None:
        self.settings = settings
        self.executor = executor
        self.failover = failover
        self.request_log = request_log
        self.events = events
        self.step_stats = step_stats
        self.pipeline = pipeline
        self.state = EngineState.start(limits, {})
        self.output_streams = output_streams or OutputStreams(request_log, self.cancel)
        self.admission = Admission()
        self.replacements = Replacements(failover.state, events, failover.rank_start.start)
        self.maintenance = Maintenance(self)
        self.rebalancing = Rebalancing(self, failover.adoption.routed_tokens, failover.plans.placement)
        self.restoration = KVRestoration(self, failover.kv_replicas)
        self.suspects = Suspects(self, settings.poison_limit)
        self.canary = Canary(self)
        self.drop_elsewhere: Callable[[str], None] = lambda _: None
        """Called with the id of a request that ends with an error, which another pool may have."""
        self._wake = wake

    @property
    def stepping(self) -> bool:
        """True while a step is in flight."""
        return bool(self.pipeline)

    def wake(self) -> None:
        """Make the loop check what is due."""
        self._wake.set()

    def call_later(self, delay_s: float, act: Callable[[], None]) -> object:
        """Call a function after so many seconds."""
        return asyncio.get_running_loop().call_later(delay_s, act)

    # -- Requests -----------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncGenerator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.stream`."""
        self.admission.check(request, self.state, clock.now())
        self.state = submit(self.state, request, retry_after_s=self.admission.retry_after_s(self.state))
        self.request_log.record_accepted(request.id)
        self.wake()
        async with contextlib.aclosing(self.output_streams.read(request.id, ())) as items:
            async for item in items:
                yield item

    async def replay(self, request_id: str, *, follow: bool = True) -> AsyncGenerator[Scored | Token | Finished]:
        """See `serving.protocol.backend.Backend.replay`."""
        recorded = self.request_log.items(request_id)
        if not follow:
            for item in recorded:
                if isinstance(item, MoejaxError):
                    raise item
                yield item
            return
        async with contextlib.aclosing(self.output_streams.read(request_id, recorded)) as items:
            async for item in items:
                yield item

    def put(self, state: EngineState, outputs: Iterable[Output]) -> None:
        """Take the state that a function of the engine returned, and send its outputs."""
        self.state = state
        self.output_streams.send(self.canary.take(outputs))

    def cancel(self, request_id: str) -> None:
        """Cancel a request."""
        self.put(*cancel(self.state, request_id))

    def expire(self) -> None:
        """End the requests whose deadline has passed."""
        self.put(*expire(self.state, clock.now()))

    def drop(self, request_id: str) -> None:
        """Compute a request no further; its stream is ended by the caller."""
        self.state, _ = cancel(self.state, request_id)

    def fail_request(self, request_id: str, error: MoejaxError) -> None:
        """End a request with an error."""
        self.drop(request_id)
        self.drop_elsewhere(request_id)
        self.output_streams.send(self.canary.take([(request_id, error)]))

    def fail_requests(self, request_ids: Collection[str], error: MoejaxError) -> None:
        """See `serving.protocol.backend.Backend.fail_requests`. One that was never accepted ends in the log alone."""
        for request_id in request_ids:
            if self.state.find(request_id) is not None:
                self.fail_request(request_id, error)
            else:
                self.request_log.record([(request_id, error)])

    def fail_all(self, error: MoejaxError) -> None:
        """End every request with an error, those of another pool too."""
        for request_id in self.output_streams.open_requests:
            self.fail_request(request_id, error)

    def resume_journaled_calls(self, check: Callable[[Request], Request]) -> None:
        """Resubmit the requests that the front before this one left in the journal, as `check` returns them. A request
        for which it raises MoejaxError ends with that."""
        calls = self.request_log.running()
        for request in (request for call in calls for request in call.requests):
            items = self.request_log.items(request.id)
            if not items or not isinstance(items[-1], (Finished, MoejaxError)):
                cached_tokens = next((item.cached_tokens for item in items if isinstance(item, Token)), None)
                try:
                    checked = check(request)
                except MoejaxError as error:
                    self.output_streams.send([(request.id, error)])
                    continue
                state, outputs = resubmit(
                    self.state,
                    checked,
                    generated=token_ids(items),
                    scored=scored_count(items),
                    cached_tokens=cached_tokens,
                )
                self.put(state, outputs)
        if calls:
            text = f"{len(self.state.waiting)} requests of {len(calls)} calls continue"
            self.events.emit(EventKind.RESTORED_CALLS, self.failover.epoch, message=text)

    # -- Plans --------------------------------------------------------------------------------------------------

    def replace(self, rank: int) -> None:
        """Start a replacement for a rank, beside the steps."""
        self.replacements.start(rank)

    def plan_adopted(self) -> None:
        """A plan has come into force; its ranks keep their KV caches."""
        self.apply_plan(())

    def pages_used(self) -> dict[int, int]:
        """By rank, the number of leading pages of its cache that include all pages in use or kept as prefixes."""
        return {rank: pool.extent for rank, pool in self.state.pools.items()}

    def apply_plan(self, fresh: Iterable[int], recoverable: Mapping[str, RecoverableKV] | None = None) -> None:
        """Make the engine's state that of the plan in force. Ranks in `fresh` have an empty KV cache; `recoverable` has
        what replicas hold of it, by request."""
        failover = self.failover
        invalidated = set(failover.adoption.take_invalidated())
        if invalidated and recoverable is None:
            recoverable, _ = self.restoration.recoverable_of(invalidated)
        fresh = {*fresh, *invalidated}
        self.state = lose(self.state, fresh & set(self.state.pools), recoverable) if fresh else self.state
        attending = failover.plan.attention_rank_ids if failover.plan is not None else ()
        pages = dict.fromkeys(attending, failover.plans.base.pages_per_rank)
        masked = failover.plan.masked if failover.plan is not None else ()
        state, outputs = adopt(
            self.state,
            pages,
            epoch=max(failover.epoch, 0),
            masked=masked,
            known=failover.take_over.take_known_pages(),
            known_snapshots=failover.take_over.take_known_snapshots(),
            weights=failover.membership.weights.number,
        )
        self.pipeline.forget_sent_pages()
        processes = {rank: self.executor.get(rank) for rank in failover.plan_ranks}
        self.step_stats.begin_plan(
            {rank: process.compiles for rank, process in processes.items() if process is not None}
        )
        self.put(migration.close_ranks(state, self.maintenance.closed_ranks), outputs)
        self.canary.on_plan()
