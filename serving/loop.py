"""The engine's loop: schedule, run, apply, deliver, and between two steps whatever the ranks' state asks for.

The only place that holds the engine's state. It implements `serving.status.Backend`.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

from planner.deployment import Deployment
from serving import drain
from serving.backlog import Backlog
from serving.config import Settings
from serving.delivery import Delivery
from serving.engine import (
    EngineState,
    Limits,
    adopt,
    apply,
    cancel,
    expire,
    is_foreseeable,
    lose,
    resubmit,
    submit,
)
from serving.errors import (
    DeadlineExceeded,
    Draining,
    Internal,
    MoejaxError,
    NoCapacity,
    NotPermitted,
    QueueFull,
    UnknownRequest,
)
from serving.events import EventLog
from serving.failover import Failover
from serving.fairness import ahead
from serving.faults import DeviceError, Instruction, Response
from serving.flights import Flights
from serving.guided import Guides
from serving.health import Cause
from serving.ledger import Call, Ledger, scored, tokens
from serving.links import Loss, Poisoned, RankLinks, RankLost, RankRefused
from serving.operations import Operations
from serving.policy import hottest
from serving.proto.moejax.v1 import link_pb2
from serving.replacements import Replacements
from serving.request import Finished, Request, Scored, Token
from serving.restoration import Restoration
from serving.scheduler import schedule
from serving.sequence import Salvage
from serving.standing import Standing
from serving.status import SIGNALS, SIGNALS_TO_WEIGHTS, Event, ModelInfo, Prospect, Status
from serving.step_wire import step_results
from serving.tally import Tally
from serving.watchers import follow_errors, keep_journal, scrub

SETTLE_S = 2.0
"""After a rank failed a step, how long to wait for the death that explains it before a new generation is made."""
IDLE_S = 0.25
"""How often deadlines are looked at while nothing runs."""
PENDING_S = 0.005
"""How often an operation that waits for something is looked at while nothing runs."""
UNREADABLE_S = 5.0
"""How often experts that the store could not give are asked for again."""
FORESEE_S = 1.0
"""How soon what could not be prepared for a replacement is tried again."""
TEND_S = 0.25
"""How often it is looked what is due between two steps."""


@dataclasses.dataclass(frozen=True)
class _Resuming:
    """A recovery whose first step is not in yet. Times are of the monotonic clock. `tokens` says what becomes of the
    cache entries of the requests concerned."""

    rank: int | None
    cause: str
    tokens: str
    phases: dict[str, float]
    evidence_at: float
    adopted_at: float


class Loop:
    """Serves requests on the ranks of a `Failover` until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        model: ModelInfo,
        limits: Limits,
        links: RankLinks,
        failover: Failover,
        guides: Guides,
        ledger: Ledger | None = None,
    ) -> None:
        self.model = model
        self.ledger = ledger or Ledger(None)
        self.recoveries = 0
        self.events = EventLog()
        self.settings = settings
        self.links = links
        self.failover = failover
        self.state = EngineState.start(limits, {})
        self.delivery = Delivery(self.ledger, self._abandon)
        self._backlog = Backlog()
        self._losses: dict[int, Loss] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.replacements = Replacements(failover, self.events, self._wake.set)
        self._resuming: _Resuming | None = None
        self._admitted_at = 0.0
        self._foreseen_at = 0.0
        self._draining = False
        self._ended: MoejaxError | None = None
        self.tally = Tally(settings, model)
        self.operations = Operations(self)
        self.restoration = Restoration(self, failover.copies)
        self._standing = Standing(self)
        self._flights = Flights(settings, links, guides.mask)
        self._tended_at = 0.0
        self._watchers: list[asyncio.Task[None]] = []
        self._unreadable: set[tuple[int, int]] = set()
        self._ask_again = 0.0
        failover.loads = lambda: self.tally.expert_load
        failover.on_trouble = self._trouble

    def start(self) -> None:
        """Begin to serve; the ranks are under their first plan."""
        self._take_plan(())
        self._restore()
        taken = f", {n} of them taken over" if (n := self.failover.taken_over) else ""
        self.events.add("ready", self.failover.epoch, message=f"{len(self.failover.alive)} ranks{taken}")
        self._tell_unprotected()
        self._task = asyncio.create_task(self._run())
        settings = self.settings
        if settings.restart:  # a front that takes over ranks may lack some
            for rank in self.failover.plans.base.rank_ids:
                self.replace(rank)
        if self.ledger.keeps:
            watch = keep_journal(self.ledger, self._tell_of_journal, settings.journal_sync_s)
            self._watchers.append(asyncio.create_task(watch))
        if settings.scrub_s:
            watch = scrub(self._slots, self.operations.inspect_next, settings.scrub_s)
            self._watchers.append(asyncio.create_task(watch))
        if settings.device_errors:
            watch = follow_errors(Path(settings.device_errors), self.report, self._misread)
            self._watchers.append(asyncio.create_task(watch))
        if settings.parity:
            self.failover.parity.tell = self._tell_of_parity
            keep = self.failover.parity.keep(lambda: None if self._losses else self.failover.settled)
            self._watchers.append(asyncio.create_task(keep))

    async def drain(self, grace_s: float) -> None:
        """Take no new requests, let the running ones end for `grace_s` seconds, then end the loop."""
        self._draining = True
        self.events.add("draining", self.failover.epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.state.running or self.state.waiting:
                    await asyncio.sleep(0.02)
        for task in (self._task, *self._watchers, *self.replacements.tasks):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
        self._flights.ground()
        self._end_all(Draining("the server shut down before the request was done."))

    def lost(self, loss: Loss) -> None:
        """A rank died: what runs on it is void from now on."""
        self.failover.copies.lost(loss.rank)
        if loss.rank in self.failover.alive:
            self._losses[loss.rank] = loss
            self.events.add("rank_lost", self.failover.epoch, rank=loss.rank, cause=str(loss.cause))
        joining, waited = loss.rank in self.failover.joining, loss.rank in self.failover.waiting
        if waited:
            self.events.add("rank_lost", self.failover.epoch, rank=loss.rank, cause=str(loss.cause))
        self.failover.forget(loss.rank)
        if joining and not self._draining and (self.settings.restart or not waited):
            self.replace(loss.rank)
        self._wake.set()

    # -- Backend ------------------------------------------------------------------------------------------------

    async def stream(self, request: Request) -> AsyncIterator[Scored | Token | Finished]:
        """See `serving.status.Backend.stream`."""
        if self._ended is not None:
            raise self._ended
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests.")
        if self.failover.plan is None:
            raise NoCapacity(f"no request can be served now: {self.failover.lacking}", retry_after_s=2.0)
        self._check_wait(request)
        self.state = submit(self.state, request, retry_after_s=self._backlog.retry_s(len(self.state.waiting)))
        self.ledger.accepted(request.id)
        self._wake.set()
        async with contextlib.aclosing(self.delivery.read(request.id, ())) as items:
            async for item in items:
                yield item

    async def replay(self, request_id: str) -> AsyncIterator[Scored | Token | Finished]:
        """See `serving.status.Backend.replay`."""
        async with contextlib.aclosing(self.delivery.read(request_id, self.ledger.items(request_id))) as items:
            async for item in items:
                yield item

    @property
    def resumable(self) -> bool:
        """See `serving.status.Backend.resumable`."""
        return self.ledger.keeps

    def remember(self, call: Call) -> None:
        """See `serving.status.Backend.remember`."""
        self.ledger.remember(call)

    def left(self, call_id: str) -> None:
        """See `serving.status.Backend.left`."""
        self.ledger.left(call_id)

    def recall(self, call_id: str, owner: str) -> Call:
        """See `serving.status.Backend.recall`."""
        return self.ledger.recall(call_id, owner)

    def _check_wait(self, request: Request) -> None:
        """Refuse now what could only end late. Raises DeadlineExceeded or QueueFull."""
        if request.deadline is None:
            return
        left = request.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the deadline had passed when the request came.")
        wait = self._backlog.wait_s(ahead(self.state.waiting.values(), request.owner, request.priority))
        if wait is not None and wait > left:
            raise QueueFull(
                f"the request would wait {wait:.1f} s for its turn, and its deadline is in {left:.1f} s. "
                "Try again later, or give it more time.",
                retry_after_s=self._backlog.retry_s(len(self.state.waiting)),
            )

    def abort(self, request_id: str) -> bool:
        """See `serving.status.Backend.abort`."""
        if self.state.find(request_id) is None:
            return False
        self._abandon(request_id)
        return True

    def status(self) -> Status:
        """See `serving.status.Backend.status`."""
        return self._standing.status(draining=self._draining, ended=self._ended is not None, lost=self._losses.keys())

    def watch(self, after: int = 0) -> AsyncIterator[Event]:
        """See `serving.status.Backend.watch`."""
        return self.events.watch(after)

    async def kill(self, rank: int, signal: str = "SIGKILL", host: str = "") -> None:
        """See `serving.status.Backend.kill`."""
        alive, hosts = self.failover.alive, self._hosts()
        if not self.settings.chaos:
            raise NotPermitted("this server does not let its ranks be killed. Start it with --chaos.")
        ranks = [rank for rank in alive if hosts[rank] == host] if host else [rank]
        if not ranks or not set(ranks) <= set(alive):
            raise UnknownRequest(f"{host or f'rank {rank}'} is not alive; the ranks alive are {list(alive)}.")
        if signal not in SIGNALS + SIGNALS_TO_WEIGHTS:
            known = ", ".join(SIGNALS + SIGNALS_TO_WEIGHTS)
            raise UnknownRequest(f"signal {signal!r} is none of {known}.", param="signal")
        for victim in ranks:
            if signal in SIGNALS:
                self.links.signal(victim, signal)
            elif not self.model.experts:
                raise UnknownRequest(f"{self.model.name} has no experts whose weights could be spoilt.", param="signal")
            elif self.failover.plan is not None:
                if victim not in self.failover.plan.holder_ids:
                    raise UnknownRequest(f"rank {victim} holds no experts whose weights could be spoilt.", param="rank")
                layer, slot = hottest(self.failover.plan, victim, self.failover.routed_loads())
                damage = link_pb2.Damage(layer=layer, slot=slot, nan=signal == "NAN")
                await self.links.call(victim, "damage", damage)

    def what_if(self) -> tuple[Prospect, ...]:
        """See `serving.status.Backend.what_if`."""
        return self._standing.what_if()

    def deployment(self) -> Deployment | None:
        """See `serving.status.Backend.deployment`."""
        return self._standing.deployment()

    async def apply(self, instruction: Instruction) -> tuple[int, ...]:
        """See `serving.status.Backend.apply`."""
        await self.operations.apply(instruction, self._hosts())
        return self.failover.alive

    def report(self, error: DeviceError) -> Response:
        """See `serving.status.Backend.report`."""
        if error.rank not in self._hosts():
            known = sorted(self._hosts())
            raise UnknownRequest(f"there is no rank {error.rank}; ranks are {known}.", param="rank")
        return self.operations.report(error)

    # -- What operations need of it -----------------------------------------------------------------------------

    @property
    def stepping(self) -> bool:
        """Results of a step are still to come."""
        return bool(self._flights)

    def wake(self) -> None:
        """Look again at what is to be done."""
        self._wake.set()

    def replace(self, rank: int) -> None:
        """Start a rank anew beside the steps."""
        self.replacements.start(rank)

    def is_coming(self, rank: int) -> bool:
        """A rank is being started, or waits to join."""
        return self.replacements.is_coming(rank)

    def taken(self) -> None:
        """A plan has come into force; the caches of its ranks are kept."""
        self._take_plan(())

    def end(self, request_id: str, error: MoejaxError) -> None:
        """End a request with an error."""
        self.state, _ = cancel(self.state, request_id)
        self.delivery.tell([(request_id, error)])

    def _hosts(self) -> dict[int, str]:
        return {rank: self.failover.plans.place_of(rank).host for rank in self.failover.plans.base.rank_ids}

    def _slots(self) -> int:
        plan = self.failover.plan
        return plan.moe_layers * plan.slots_per_rank if plan is not None else 0

    def _misread(self, text: str) -> None:
        self.events.add("device_error", self.failover.epoch, message=f"not understood: {text}")

    def _tell_of_parity(self, kind: str, message: str) -> None:
        self.events.add(kind, self.failover.epoch, message=message)

    def _trouble(self, text: str) -> None:
        self.events.add("coordinator_lost", self.failover.epoch, cause=text)
        self._wake.set()

    # -- The loop -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                if not self._flights:
                    await self._tend()
                    self._tended_at = time.monotonic()
                    if not self._launch():
                        self._resumed()
                        await self._sleep()
                        continue
                if self.settings.lookahead:
                    await self._flights.half()
                if self._may_look_ahead():
                    self._launch()
                await self._land()
        except Exception as error:
            self._ended = Internal(f"the engine stopped: {type(error).__name__}: {error}")
            self._flights.ground()
            self._end_all(self._ended)
            raise

    def _may_look_ahead(self) -> bool:
        """Whether another step may be made while one is in flight: nothing is due that is done between steps, and now
        and then it is looked what is."""
        failover = self.failover
        if not self.settings.lookahead or len(self._flights) > 1 or not is_foreseeable(self.state):
            return False
        lost = bool(self._losses) or failover.broken or failover.plan is None
        coming = failover.may_admit or failover.may_grow or self.replacements.may_join
        due = self.operations.pending or self.restoration.pending or failover.healing or failover.meshes.loaded
        return not (lost or coming or due) and time.monotonic() - self._tended_at < TEND_S

    def _launch(self) -> bool:
        """Make a step and send it. False when there is nothing to do."""
        self.state, outputs = expire(self.state, time.monotonic())
        self.delivery.tell(outputs)
        began = time.monotonic()
        failover = self.failover
        plan, epoch = failover.plan, failover.epoch
        admitted, batch = self.state.admitted, None
        if failover.can_step and not self.operations.paused:
            self.state, batch = schedule(self.state, in_turn=self.restoration.in_turn)
        left, queued = self.state.admitted - admitted, bool(self.state.waiting)
        self._backlog = self._backlog.looked(began, left=left, queued=queued)
        if batch is None or plan is None:
            return False
        batch = dataclasses.replace(batch, degraded=bool(plan.masked))
        self._flights.send(batch, began, epoch=epoch, ranks=plan.rank_ids, state=self.state)
        return True

    async def _land(self) -> None:
        """Take in the results of the step that was sent first."""
        flight = self._flights.first
        batch = flight.batch
        try:
            answers = await self._flights.land()
        except RankLost:
            return
        except RankRefused as refusal:
            await self._explain(refusal)
            return
        except Poisoned as poison:
            self.state = lose(self.state, ())
            with contextlib.suppress(RankLost, RankRefused):
                await self.operations.poisoned(batch, poison.rows)
            return
        results = {}
        for rank, answer in answers.items():
            results |= step_results(batch, rank, answer)
            self.tally.answered(rank, answer)
        self.state, outputs = apply(self.state, batch, results)
        self.failover.copies.stepped(batch)
        self.delivery.tell(outputs)
        self._resumed()
        self._judge_paces()
        self.restoration.stepped(batch, self.tally.stepped(batch, flight.began, time.monotonic()))

    async def _explain(self, refusal: RankRefused) -> None:
        """A step failed on a rank that lives: the death that explains it shows soon, or the mesh is broken."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while not self._losses:
                    self._wake.clear()
                    await self._wake.wait()
                return
        self.events.add("step_failed", self.failover.epoch, rank=refusal.rank, cause=refusal.error)
        self.failover.broken = True

    async def _tend(self) -> None:
        """What the ranks' state asks for before the next step."""
        failover = self.failover
        while True:
            while self._losses or (failover.broken and failover.plan is not None):
                await self._recover()
            try:
                await self._between_steps()
                if failover.plan is None or not (self._losses or failover.broken):
                    return
            except RankLost as error:
                failover.broken |= not self._losses
                self.events.add("interrupted", failover.epoch, rank=error.rank, cause=str(error))
            except (RankRefused, TimeoutError) as error:
                failover.broken = True
                self.events.add("broken", failover.epoch, cause=str(error) or type(error).__name__)

    async def _between_steps(self) -> None:
        """What can be done while no rank is missing. Raises RankLost, RankRefused or TimeoutError."""
        failover = self.failover
        if failover.plan is not None:
            await self.restoration.tend()
        if self.operations.pending and failover.plan is not None:
            await self.operations.tend()
        if failover.may_admit:
            self._admitted_at = time.monotonic()
            self.replacements.let_in()
            failover.admit()
        elif self.replacements.may_join:
            await self._rejoin()
        elif failover.plan is None:
            return
        elif failover.may_grow:
            await self._grow()
        elif failover.healing:
            await failover.heal()
            self._take_plan(())
            if not failover.healing:
                self.events.add("healed", failover.epoch, message=f"{len(failover.plan.masked)} experts masked")
        elif failover.stuck and time.monotonic() - self._foreseen_at > FORESEE_S:
            self._foreseen_at = time.monotonic()
            failover.foresee()
        elif failover.meshes.loaded:
            with contextlib.suppress(RankLost, RankRefused, TimeoutError):
                if await failover.connect_next():
                    self.events.add("lattice_ready", failover.epoch, message=f"{len(failover.meshes.connected)} meshes")
        self._ask_for_unreadable()

    def _ask_for_unreadable(self) -> None:
        """Tell of experts that the store could not give, and let them be asked for again from time to time."""
        failover, now = self.failover, time.monotonic()
        new = failover.unreadable.keys() - self._unreadable
        if new:
            self._unreadable |= new
            why, masked = failover.unreadable[min(new)], len(failover.plan.masked) if failover.plan else 0
            what = f"{masked} experts masked" if failover.can_step else f"no step is made without all {masked} of them"
            self.events.add("store_unreadable", failover.epoch, cause=why, message=what)
            self._ask_again = now + UNREADABLE_S
        elif failover.unreadable and now > self._ask_again:
            failover.ask_again()
            self._ask_again = now + UNREADABLE_S

    def _judge_paces(self) -> None:
        for rank, verdict in self.tally.judge(time.monotonic(), self.failover.plan).items():
            cause = f"{self.tally.slowness[rank]:.1f} times as slow as the others"
            kind = "pace_recovered" if verdict == "recovered" else "slow"
            self.events.add(kind, self.failover.epoch, rank=rank, cause=cause, message=verdict)
            if verdict == "drain" and self.settings.drain_slow:
                self.operations.leave(rank, f"slow: {cause}", replace=True)

    async def _sleep(self) -> None:
        self._wake.clear()
        failover = self.failover
        healing = failover.plan is not None and failover.healing
        joining = self.replacements.may_join or failover.may_admit or failover.may_grow
        if self.restoration.underway and not failover.broken:
            await asyncio.sleep(0)
            return
        if self._losses or failover.meshes.loaded or joining or (self.operations.pending and not failover.broken):
            await asyncio.sleep(PENDING_S if self.operations.pending else 0)
            return
        if healing:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_S):
                await self._wake.wait()

    async def _recover(self) -> None:
        failover, began = self.failover, time.monotonic()
        losses: dict[int, Loss] = {}

        def lost() -> set[int]:
            losses.update(self._losses)
            return set(losses)

        try:
            phases = await failover.recover(lost, self._pages_used)
        except NoCapacity as error:
            phases = None
            lost()
            self.events.add("no_capacity", failover.epoch, cause=_causes(losses), message=str(error))
        lost()
        self.operations.lost(set(losses))
        self._losses = {rank: loss for rank, loss in self._losses.items() if rank in failover.alive}
        salvage, again = self.restoration.of_lost({*losses, *failover.emptied})
        self._take_plan(losses, salvage)
        if phases is not None:
            self.recoveries += 1
            first = min((loss.evidence_at for loss in losses.values()), default=began)
            judged = max((loss.seen_at for loss in losses.values()), default=began)
            cause = _causes(losses)
            phases = {"detect": 1e3 * (judged - first)} | phases
            tokens = (
                f"{sum(each.count for each in salvage.values())} cache entries to restore, {again} to compute again"
            )
            self._resuming = _Resuming(min(losses, default=None), cause, tokens, phases, first, time.monotonic())
        if self.settings.restart:
            self.replacements.postpone(losses.keys() - self.operations.out)

    def _resumed(self) -> None:
        """The first step after a recovery is in, or there is none to make. Replacements start now: not beside it."""
        self.replacements.resume()
        if self._resuming is not None and self.failover.can_step:
            r, now, self._resuming = self._resuming, time.monotonic(), None
            ends = {"resume": 1e3 * (now - r.adopted_at), "total": 1e3 * (now - r.evidence_at)}
            self.events.add(
                "recovered", self.failover.epoch, rank=r.rank, cause=r.cause, phases=r.phases | ends, message=r.tokens
            )
            plan = self.failover.plan
            if plan is not None and plan.masked:
                share = self.failover.lost_share(plan)
                text = f"{len(plan.masked)} experts with {share:.1%} of the traffic"
                self.events.add("masked", self.failover.epoch, message=text)

    async def _grow(self) -> None:
        """Those seated become part of the plan."""
        failover, seated = self.failover, set(self.failover.seated)
        try:
            phases = await failover.grow()
        except (RankLost, RankRefused) as error:
            self.events.add("rejoin_failed", failover.epoch, cause=str(error))
            self._take_plan(())
            return
        self._joined(seated, phases | {"total": 1e3 * (time.monotonic() - self._admitted_at)})

    async def _rejoin(self) -> None:
        """All ranks enter a new generation, replacements among them."""
        failover, began = self.failover, time.monotonic()
        newcomers, waited = {*failover.newcomers, *failover.seated}, set(failover.waiting)
        self.replacements.let_in(newcomers)
        try:
            phases = await failover.regenerate((*failover.alive, *newcomers), self._pages_used())
        except (RankLost, RankRefused, TimeoutError) as error:
            self.events.add("rejoin_failed", failover.epoch, cause=str(error) or type(error).__name__)
            self.replacements.entered()
            for rank in newcomers - failover.newcomers - failover.waiting:
                self.links.declare(rank, Cause("error", "could not join"), time.monotonic())
                if rank not in failover.alive:  # else the recovery that follows replaces it, once it is fenced
                    self.replace(rank)
            if failover.plan is None:
                failover.newcomers |= failover.waiting
            return
        finally:
            self.replacements.entered()
        self._joined(newcomers - waited, phases | {"total": 1e3 * (time.monotonic() - began)})

    def _joined(self, newcomers: set[int], phases: dict[str, float]) -> None:
        for rank in newcomers:
            self.tally.forget(rank)
            self.replacements.joined(rank)
        self._take_plan(newcomers)
        for rank in sorted(newcomers):
            self.events.add("rejoined", self.failover.epoch, rank=rank, phases=phases)
        self._tell_unprotected()

    def _tell_unprotected(self) -> None:
        """Caches that are not copied although they were to be, each reason once."""
        copies = self.failover.copies
        if copies.reason:
            self.events.add("unprotected", self.failover.epoch, message=copies.reason)
            copies.reason = ""

    def _pages_used(self) -> dict[int, int]:
        """How many pages from the first on hold all that is in use or kept for later, by rank."""
        return {rank: pool.extent for rank, pool in self.state.pools.items()}

    def _take_plan(self, fresh: Iterable[int], salvage: Mapping[str, Salvage] | None = None) -> None:
        """The engine's view of the plan in force; ranks in `fresh` have an empty cache, of which `salvage` is left."""
        failover = self.failover
        if failover.emptied and salvage is None:
            salvage, _ = self.restoration.of_lost(set(failover.emptied))
        fresh = {*fresh, *failover.emptied}
        failover.emptied.clear()
        self.state = lose(self.state, fresh & set(self.state.pools), salvage) if fresh else self.state
        attending = failover.plan.source_ids if failover.plan is not None else ()
        pages = dict.fromkeys(attending, failover.plans.base.pages_per_rank)
        masked = failover.plan.masked if failover.plan is not None else ()
        known, failover.known = failover.known, {}
        self.state, outputs = adopt(self.state, pages, epoch=max(failover.epoch, 0), masked=masked, known=known)
        self._flights.take_plan()
        processes = {rank: self.links.get(rank) for rank in failover.alive}
        self.tally.take_plan({rank: process.compiles for rank, process in processes.items() if process is not None})
        self.state = drain.close(self.state, self.operations.closed)
        self.delivery.tell(outputs)

    def _abandon(self, request_id: str) -> None:
        self.state, outputs = cancel(self.state, request_id)
        self.delivery.tell(outputs)

    def _restore(self) -> None:
        """Take up the requests that a front before this one left in the journal."""
        calls = self.ledger.running()
        for request in (request for call in calls for request in call.requests):
            items = self.ledger.items(request.id)
            if not items or not isinstance(items[-1], (Finished, MoejaxError)):
                reused = next((item.reused for item in items if isinstance(item, Token)), None)
                said, told = tokens(items), scored(items)
                self.state, outputs = resubmit(self.state, request, generated=said, scored=told, reused=reused)
                self.delivery.tell(outputs)
        if calls:
            text = f"{len(self.state.waiting)} requests of {len(calls)} calls go on"
            self.events.add("restored_calls", self.failover.epoch, message=text)

    def _tell_of_journal(self, trouble: str | None) -> None:
        kind = "journal_back" if trouble is None else "journal_failed"
        self.events.add(kind, self.failover.epoch, cause=trouble or "")

    def _end_all(self, error: MoejaxError) -> None:
        for request_id in self.delivery.awaited:
            self.end(request_id, error)


def _causes(losses: dict[int, Loss]) -> str:
    return "; ".join(f"rank {rank} {loss.cause}" for rank, loss in sorted(losses.items()))
