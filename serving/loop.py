"""The engine's loop: schedule, run, apply, deliver, and between two steps whatever the ranks' state asks for.

The only place that holds the engine's state. It implements `serving.status.Backend`.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable

import numpy as np

from serving.batch import Batch, assemble, harvest
from serving.config import Settings
from serving.engine import EngineState, Limits, Output, adopt, apply, cancel, expire, lose, submit
from serving.errors import Draining, Internal, MoejaxError, NoCapacity, NotPermitted, UnknownRequest
from serving.events import EventLog
from serving.failover import Failover
from serving.health import Cause
from serving.links import Loss, RankLinks, RankLost, RankRefused
from serving.proto.moejax.v1 import link_pb2
from serving.request import Finished, Request, Token
from serving.scheduler import schedule
from serving.status import Event, ModelInfo, RankStatus, Status

SETTLE_S = 2.0
"""After a rank failed a step, how long to wait for the death that explains it before a new generation is made."""
IDLE_S = 0.25
"""How often deadlines are looked at while nothing runs."""
GATHER_S = 2.0
"""How long a rank that is ready to join waits for others that are about to be."""
RESTARTS = 5
"""Attempts to replace a rank before it is given up, each after twice the pause."""


@dataclasses.dataclass
class Counts:
    """What has been counted since the start."""

    finished: int = 0
    failed: int = 0
    recoveries: int = 0
    tokens: int = 0
    steps: int = 0
    program_ms: float = 0.0
    """Of the slowest rank of each step, inside the compiled programs."""
    step_ms: float = 0.0
    """From scheduling a step to having delivered its tokens."""


@dataclasses.dataclass(frozen=True)
class _Resuming:
    """A recovery whose first step is not in yet. Times are of the monotonic clock."""

    rank: int | None
    cause: str
    phases: dict[str, float]
    evidence_at: float
    adopted_at: float


class Loop:
    """Serves requests on the ranks of a `Failover` until it is stopped."""

    def __init__(
        self, settings: Settings, model: ModelInfo, limits: Limits, links: RankLinks, failover: Failover
    ) -> None:
        self.model = model
        self.counts = Counts()
        self.events = EventLog()
        self._settings = settings
        self._links = links
        self._failover = failover
        self._state = EngineState.start(limits, {})
        self._streams: dict[str, asyncio.Queue[Token | Finished | MoejaxError]] = {}
        self._losses: dict[int, Loss] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._replacing: dict[int, asyncio.Task[None]] = {}
        self._resuming: _Resuming | None = None
        self._ready_since: float | None = None
        self._compiles: dict[int, int] = {}
        self._compiles_before: dict[int, int] = {}
        self._draining = False
        self._ended: MoejaxError | None = None
        self._started_at = time.time()
        self._rank_ms: dict[int, float] = {}
        self.expert_load = np.zeros((model.moe_layers, model.experts), np.int64)

    def start(self) -> None:
        """Begin to serve; the ranks are under their first plan."""
        self._take_plan(())
        self.events.add("ready", self._failover.epoch, message=f"{len(self._failover.alive)} ranks")
        self._task = asyncio.create_task(self._run())

    async def drain(self, grace_s: float) -> None:
        """Take no new requests, let the running ones end for `grace_s` seconds, then end the loop."""
        self._draining = True
        self.events.add("draining", self._failover.epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._state.running or self._state.waiting:
                    await asyncio.sleep(0.02)
        for task in (self._task, *self._replacing.values()):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        self._end_all(Draining("the server shut down before the request was done."))

    def lost(self, loss: Loss) -> None:
        """A rank died: what runs on it is void from now on."""
        if loss.rank in self._failover.alive:
            self._losses[loss.rank] = loss
            self.events.add("rank_lost", self._failover.epoch, rank=loss.rank, cause=str(loss.cause))
        self._failover.newcomers.discard(loss.rank)
        self._wake.set()

    # -- Backend ------------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncIterator[Token | Finished]:
        """See `serving.status.Backend.stream`."""
        if self._ended is not None:
            raise self._ended
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests.")
        if self._failover.plan is None:
            raise NoCapacity("no rank is alive to serve the request. Try again later.", retry_after_s=2.0)
        self._state = submit(self._state, request)
        queue: asyncio.Queue[Token | Finished | MoejaxError] = asyncio.Queue()
        self._streams[request.id] = queue
        self._wake.set()
        try:
            while True:
                item = await queue.get()
                if isinstance(item, MoejaxError):
                    raise item
                yield item
                if isinstance(item, Finished):
                    return
        finally:
            if self._streams.get(request.id) is queue:
                self._deliver(self._cancelled(request.id))

    def abort(self, request_id: str) -> bool:
        """See `serving.status.Backend.abort`."""
        if self._state.find(request_id) is None:
            return False
        self._deliver(self._cancelled(request_id))
        return True

    def status(self) -> Status:
        """See `serving.status.Backend.status`."""
        failover, plan, state = self._failover, self._failover.plan, self._state
        return Status(
            epoch=max(failover.epoch, 0),
            generation=failover.generation,
            ready=plan is not None and not self._draining and self._ended is None,
            draining=self._draining,
            chaos=self._settings.chaos,
            ranks=tuple(self._rank_status(rank) for rank in failover.base.rank_ids),
            axes=dict(plan.axes) if plan is not None else {},
            slots_per_rank=plan.slots_per_rank if plan is not None else 0,
            masked=plan.masked if plan is not None else (),
            lattice=failover.coverage(),
            running=len(state.running),
            waiting=len(state.waiting),
            finished=self.counts.finished,
            failed=self.counts.failed,
            recoveries=self.counts.recoveries,
            tokens=self.counts.tokens,
            steps=self.counts.steps,
            step_ms=self.counts.step_ms,
            program_ms=self.counts.program_ms,
            preemptions=state.preemptions,
            compiles_after_ready=sum(n - self._compiles_before[r] for r, n in self._compiles.items()),
            started_at=self._started_at,
        )

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """See `serving.status.Backend.watch`."""
        return self.events.watch(after)

    async def kill(self, rank: int, signal: str = "SIGKILL") -> None:
        """See `serving.status.Backend.kill`."""
        if not self._settings.chaos:
            raise NotPermitted("this server does not let its ranks be killed. Start it with --chaos.")
        if rank not in self._failover.alive:
            raise UnknownRequest(f"rank {rank} is not alive; the ranks alive are {list(self._failover.alive)}.")
        if signal not in ("SIGKILL", "SIGSTOP"):
            raise UnknownRequest(f"signal {signal!r} is none of SIGKILL, SIGSTOP.", param="signal")
        self._links.signal(rank, signal)

    # -- The loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                await self._tend()
                self._state, outputs = expire(self._state, time.monotonic())
                self._deliver(outputs)
                began = time.monotonic()
                self._state, batch = schedule(self._state) if self._failover.plan else (self._state, None)
                if batch is None:
                    self._resumed()
                    await self._sleep()
                    continue
                await self._step(batch, began)
        except Exception as error:
            self._ended = Internal(f"the engine stopped: {type(error).__name__}: {error}")
            self._end_all(self._ended)
            raise

    async def _step(self, batch: Batch, began: float) -> None:
        epoch, plan = self._failover.epoch, self._failover.plan
        assert plan is not None
        index = self._settings.buckets.index(tuple(batch.bucket))
        parts = {
            rank: link_pb2.Step(epoch=epoch, step=batch.step, bucket=index, inputs=self._packed(batch, rank))
            for rank in plan.rank_ids
        }
        try:
            answers = await self._links.step(parts)
        except RankLost:
            return
        except RankRefused as refusal:
            await self._explain(refusal)
            return
        results = {}
        for rank, answer in answers.items():
            if batch.work.get(rank):
                tokens, logprobs = np.frombuffer(answer.tokens, np.int32), np.frombuffer(answer.logprobs, np.float32)
                results |= harvest(batch, rank, tokens, logprobs)
            self._compiles[rank] = answer.compiles
            self._rank_ms[rank] = answer.program_ms
            self.expert_load += np.frombuffer(answer.expert_load, np.int32).reshape(self.expert_load.shape)
        self._state, outputs = apply(self._state, batch, results)
        self._deliver(outputs)
        self._resumed()
        self.counts.steps += 1
        self.counts.program_ms += max(answer.program_ms for answer in answers.values())
        self.counts.step_ms += 1e3 * (time.monotonic() - began)

    def _packed(self, batch: Batch, rank: int) -> bytes:
        if not batch.work.get(rank):
            return b""
        limits = self._state.limits
        arrays = assemble(batch, rank, page_size=limits.page_size, max_pages=limits.max_pages)
        return b"".join(array.tobytes() for array in arrays.values())

    async def _explain(self, refusal: RankRefused) -> None:
        """A step failed on a rank that lives: the death that explains it shows soon, or the mesh is broken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while not self._losses:
                    self._wake.clear()
                    await self._wake.wait()
                return
        self.events.add("step_failed", self._failover.epoch, rank=refusal.rank, cause=refusal.error)
        self._failover.broken = True

    async def _tend(self) -> None:
        """What the ranks' state asks for before the next step."""
        failover = self._failover
        while self._losses or (failover.broken and failover.plan is not None):
            await self._recover()
        if self._may_join():
            await self._rejoin()
        elif failover.loaded:
            with contextlib.suppress(RankLost, RankRefused, TimeoutError):
                if await failover.connect_next():
                    self.events.add("lattice_ready", failover.epoch, message=f"{len(failover.connected)} meshes")

    async def _sleep(self) -> None:
        self._wake.clear()
        if self._losses or self._failover.loaded or self._may_join():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await self._wake.wait()

    async def _recover(self) -> None:
        failover, began = self._failover, time.monotonic()
        losses: dict[int, Loss] = {}

        def lost() -> set[int]:
            losses.update(self._losses)
            return set(losses)

        try:
            phases = await failover.recover(lost, self._pages_used)
        except NoCapacity as error:
            phases = None
            self.events.add("no_capacity", failover.epoch, message=str(error))
        lost()
        self._losses = {rank: loss for rank, loss in self._losses.items() if rank in failover.alive}
        self._take_plan(losses)
        if phases is not None:
            self.counts.recoveries += 1
            first = min((loss.evidence_at for loss in losses.values()), default=began)
            judged = max((loss.seen_at for loss in losses.values()), default=began)
            cause = "; ".join(f"rank {rank} {loss.cause}" for rank, loss in sorted(losses.items()))
            phases = {"detect": 1e3 * (judged - first)} | phases
            self._resuming = _Resuming(min(losses, default=None), cause, phases, first, time.monotonic())
        if self._settings.restart:
            for rank in losses:
                self._replacing[rank] = asyncio.create_task(self._replace(rank))

    def _resumed(self) -> None:
        """The first step after a recovery is in, or there is none to make."""
        if self._resuming is not None:
            r, now, self._resuming = self._resuming, time.monotonic(), None
            ends = {"resume": 1e3 * (now - r.adopted_at), "total": 1e3 * (now - r.evidence_at)}
            self.events.add("recovered", self._failover.epoch, rank=r.rank, cause=r.cause, phases=r.phases | ends)

    async def _replace(self, rank: int) -> None:
        """Start a lost rank again, until it is ready to join."""
        for attempt in range(RESTARTS):
            try:
                await self._failover.replace(rank)
            except (RankLost, RankRefused) as error:
                self.events.add("restart_failed", self._failover.epoch, rank=rank, cause=str(error))
                await asyncio.sleep(2**attempt)
                continue
            self._ready_since = self._ready_since or time.monotonic()
            self._wake.set()
            return

    def _may_join(self) -> bool:
        """Replacements are ready, and nothing is gained by waiting for the others."""
        if not self._failover.newcomers or self._ready_since is None:
            return False
        coming = any(not task.done() for task in self._replacing.values())
        return not coming or time.monotonic() - self._ready_since > GATHER_S

    async def _rejoin(self) -> None:
        failover, began = self._failover, time.monotonic()
        newcomers = set(failover.newcomers)
        self._ready_since = None
        try:
            phases = await failover.regenerate((*failover.alive, *newcomers), self._pages_used())
        except (RankLost, RankRefused, TimeoutError) as error:
            self.events.add("rejoin_failed", failover.epoch, cause=str(error) or type(error).__name__)
            for rank in newcomers - failover.newcomers:
                self._links.declare(rank, Cause("error", "could not join"), time.monotonic())
                self._replacing[rank] = asyncio.create_task(self._replace(rank))
            return
        for rank in newcomers:
            self._compiles.pop(rank, None)
            self._replacing.pop(rank, None)
        self._take_plan(newcomers)
        phases["total"] = 1e3 * (time.monotonic() - began)
        for rank in sorted(newcomers):
            self.events.add("rejoined", failover.epoch, rank=rank, phases=phases)

    def _pages_used(self) -> dict[int, int]:
        """How many pages from the first on hold all that is in use, by rank."""
        used: dict[int, int] = {}
        for sequence in self._state.running.values():
            assert sequence.rank is not None
            used[sequence.rank] = max(used.get(sequence.rank, 0), max(sequence.pages, default=-1) + 1)
        return used

    def _take_plan(self, fresh: Iterable[int]) -> None:
        """The engine's view of the plan in force; ranks in `fresh` have an empty cache."""
        fresh, failover = set(fresh), self._failover
        self._state = lose(self._state, fresh & set(self._state.pools)) if fresh else self._state
        pages = dict.fromkeys(failover.alive, failover.base.pages_per_rank)
        self._state, outputs = adopt(self._state, pages, epoch=max(failover.epoch, 0), fresh=())
        self._compiles = {rank: n for rank, n in self._compiles.items() if rank in failover.alive}
        for rank in failover.alive:
            process = self._links.get(rank)
            if process is not None and rank not in self._compiles:
                self._compiles[rank] = self._compiles_before[rank] = process.compiles
        self._deliver(outputs)

    def _deliver(self, outputs: Iterable[Output]) -> None:
        for request_id, item in outputs:
            queue = self._streams.get(request_id)
            if isinstance(item, Token):
                self.counts.tokens += 1
            else:
                self._streams.pop(request_id, None)
                self.counts.finished += isinstance(item, Finished)
                self.counts.failed += isinstance(item, MoejaxError)
            if queue is not None:
                queue.put_nowait(item)

    def _cancelled(self, request_id: str) -> tuple[Output, ...]:
        self._state, outputs = cancel(self._state, request_id)
        self._streams.pop(request_id, None)
        return outputs

    def _end_all(self, error: MoejaxError) -> None:
        for request_id in list(self._streams):
            self._state, _ = cancel(self._state, request_id)
            self._deliver([(request_id, error)])

    def _rank_status(self, rank: int) -> RankStatus:
        plan, pool, process = self._failover.plan, self._state.pools.get(rank), self._links.get(rank)
        serving = plan is not None and rank in plan.rank_ids and rank not in self._losses
        starting = rank in self._replacing and not self._replacing[rank].done()
        state = (
            "serving"
            if serving
            else "joining"
            if rank in self._failover.newcomers
            else "starting"
            if starting
            else "dead"
        )
        return RankStatus(
            id=rank,
            pid=process.process.pid if process is not None and process.loss is None else None,
            host="localhost",
            state=state,
            slots=tuple(map(tuple, plan.slots_of(rank).tolist())) if serving and plan is not None else (),
            pages=pool.total if pool else 0,
            pages_used=pool.used if pool else 0,
            running=sum(s.rank == rank for s in self._state.running.values()),
            compiles=self._compiles.get(rank, 0),
            step_ms=self._rank_ms.get(rank, 0.0),
        )
