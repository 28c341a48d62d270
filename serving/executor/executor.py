"""The front's end of the rank processes: starts them, talks to them, sees them die.

Decides nothing about plans. A rank is lost once, for one cause, at one time; whoever waits for it then hears
RankLost instead of an answer.
"""

import asyncio
import collections
import dataclasses
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import grpc

from serving.health import Cause, HealthSettings, Observation, stuck, suspects
from serving.proto.moejax.v1 import link_pb2
from serving.rank_listener import RankListener, first_report
from serving.rank_process import Home, Launcher, RankProcess

WATCH_S = 0.01
"""How often ranks are looked at: whether they are late, and whether the kernel has ended them (a pidfd tells only
when the last thread is gone)."""
POISONED_S = 1.0
"""How long the other ranks have to end a step that one has found to be no numbers."""


class RankLost(Exception):
    """The rank will not answer: it is dead, or was declared so."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(f"rank {rank} is lost: {cause}")
        self.rank = rank


class RankRefused(Exception):
    """The rank is alive and could not do what it was told."""

    def __init__(self, rank: int, what: str, error: str, poisoned: tuple[int, ...] = ()) -> None:
        super().__init__(f"rank {rank} could not {what}: {error}")
        self.rank = rank
        self.error = error
        self.poisoned = poisoned
        """Rows of a step that came out as no numbers."""


class Poisoned(Exception):
    """A step gave rows that are no numbers: `rows` by rank. All ranks have ended it, and it must not be applied."""

    def __init__(self, rows: dict[int, tuple[int, ...]]) -> None:
        super().__init__(f"rows that are no numbers on ranks {sorted(rows)}")
        self.rows = rows


@dataclasses.dataclass(frozen=True)
class Loss:
    """A rank that died or was declared dead. `evidence_at` is when it first showed, `seen_at` when it was judged, both
    on the monotonic clock."""

    rank: int
    cause: Cause
    evidence_at: float
    seen_at: float


class Incarnation:
    """A rank from its start to its end: its process, its stream, and what waits for its answers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.process: RankProcess
        self.attached: asyncio.Future[link_pb2.Hello] = asyncio.get_running_loop().create_future()
        self.outbox: asyncio.Queue[link_pb2.Command | None] = asyncio.Queue()
        self.pending: dict[int, tuple[str, asyncio.Future[link_pb2.Done]]] = {}
        self.steps: dict[int, asyncio.Future[link_pb2.StepDone]] = {}
        """Those it has not answered yet, in order."""
        self.step_sent: float | None = None
        """When it could begin with the first of them."""
        self.last_heartbeat = time.monotonic()
        self.gaps: collections.deque[float] = collections.deque(maxlen=200)
        self.step_times: collections.deque[float] = collections.deque(maxlen=200)
        self.compiles = 0
        self.watched = False
        self.stream_error: str | None = None
        self.loss: Loss | None = None


class RankLinks:
    """All ranks of this front."""

    def __init__(self, health: HealthSettings, on_loss: Callable[[Loss], None], launcher: Launcher) -> None:
        self._health = health
        self._on_loss = on_loss
        self._launcher = launcher
        self._ranks: dict[int, Incarnation] = {}
        self._tokens: dict[str, Incarnation] = {}
        self._ids = 0
        self._server: grpc.aio.Server | None = None
        self._known = asyncio.Event()
        """Whose tokens count is known: those of ranks that the last front has left, too."""
        self.address = ""
        """host:port that ranks of this machine dial."""
        self._watcher: asyncio.Task[None] | None = None
        self.on_copied: Callable[[int, link_pb2.Copied], None] = lambda rank, copied: None
        """Hears what a rank wrote to its cache, where it cannot copy that itself."""
        self.front_lag_s = 0.0

    async def open(self, listener: RankListener | None = None) -> None:
        """Listen for ranks, on loopback unless told otherwise, and watch over them. Raises StartError."""
        self._server, self.address = await (listener or RankListener()).open(self)
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End every rank and stop listening. No process is left."""
        if self._watcher is not None:
            self._watcher.cancel()
        for each in self._ranks.values():
            self._release(each)
            each.process.end()
        await asyncio.gather(*(each.process.fenced() for each in self._ranks.values()))
        if self._server is not None:
            await self._server.stop(0)

    def spawn(self, rank: int) -> Incarnation:
        """Start a rank process; it is one of the ranks from now on."""
        each = Incarnation(rank)
        each.process = self._launcher.start(rank, self.address, lambda how: self._exited(each, how))
        self._ranks[rank] = self._tokens[each.process.token] = each
        self._known.set()
        return each

    def inherit(self) -> tuple[int, ...]:
        """Take over the ranks that a front before this one left; they dial in by themselves. Which they are."""
        left = self._launcher.left()
        for rank, take_over in left.items():
            each = Incarnation(rank)
            each.process = take_over(lambda how, each=each: self._exited(each, how))
            self._ranks[rank] = self._tokens[each.process.token] = each
        self._known.set()
        return tuple(left)

    async def attached(self, rank: int) -> link_pb2.Hello:
        """What a rank says when it dials in, once it has. Raises RankLost."""
        return await self._ranks[rank].attached

    def get(self, rank: int) -> Incarnation | None:
        """The incarnation that is this rank now."""
        return self._ranks.get(rank)

    def home(self, rank: int) -> Home | None:
        """The host that the rank is on now; None on the front's."""
        return self._ranks[rank].process.home if rank in self._ranks else None

    async def call_all(self, what: str, messages: Mapping[int, Any]) -> list[link_pb2.Done]:
        """`call` each; when one is lost or refuses, the others are not waited for."""
        return await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))

    async def call(self, rank: int, what: str, message: Any) -> link_pb2.Done:
        """Tell a rank to do something and wait until it has. Raises RankLost or RankRefused."""
        each = self._alive(rank)
        self._ids += 1
        future: asyncio.Future[link_pb2.Done] = asyncio.get_running_loop().create_future()
        each.pending[self._ids] = (what, future)
        each.outbox.put_nowait(link_pb2.Command(id=self._ids, **{what: message}))
        return await future

    async def step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        """Run one step on all these ranks, after those they were given before. Raises RankLost, Poisoned, or
        RankRefused when one failed and none is known dead."""
        now, ranks = time.monotonic(), [self._alive(rank) for rank in parts]
        futures: list[asyncio.Future[link_pb2.StepDone]] = []
        for each, part in zip(ranks, parts.values(), strict=True):
            futures.append(asyncio.get_running_loop().create_future())
            each.steps[part.step] = futures[-1]
            each.step_sent = each.step_sent or now
            each.outbox.put_nowait(link_pb2.Command(step=part))
        try:
            answers = await asyncio.gather(*futures)
        except RankRefused as refusal:
            if not refusal.poisoned:
                raise
            await asyncio.wait(futures, timeout=POISONED_S)
            errors = [f.exception() for f in futures if f.done() and not f.cancelled()]
            raise Poisoned({e.rank: e.poisoned for e in errors if isinstance(e, RankRefused) and e.poisoned}) from None
        finally:
            for each, part, future in zip(ranks, parts.values(), futures, strict=True):
                future.cancel()
                each.steps.pop(part.step, None)
                each.step_sent = each.step_sent if each.steps else None
        return dict(zip(parts, answers, strict=True))

    def abort(self, ranks: Iterable[int], epoch: int, *, connecting: int = 0) -> None:
        """Tell ranks to cut the collectives of an epoch, out of turn; or only to connect no mesh up to this number."""
        for rank in ranks:
            each = self._ranks[rank]
            if each.loss is None:
                each.outbox.put_nowait(link_pb2.Command(abort=link_pb2.Abort(epoch=epoch, connecting=connecting)))

    def watch(self, rank: int) -> None:
        """Judge this rank's heartbeats from now on (before, it is busy starting)."""
        each = self._ranks[rank]
        each.watched, each.last_heartbeat = True, time.monotonic()
        each.gaps.clear()

    def unwatch(self, rank: int) -> None:
        """Stop judging heartbeats, for work that is known to hold them up."""
        self._ranks[rank].watched = False

    def declare(self, rank: int, cause: Cause, evidence_at: float) -> None:
        """A rank is dead from now on: whoever waits for it hears so, and it is killed for certain (the fence)."""
        each = self._ranks[rank]
        if each.loss is not None:
            return
        each.loss = Loss(rank, cause, evidence_at, time.monotonic())
        each.process.signal("SIGKILL")
        self._release(each)
        self._on_loss(each.loss)

    def give_up(self, ranks: Iterable[int], why: str) -> None:
        """Those of these ranks that still owe an answer are dead from now on."""
        for rank in ranks:
            each = self._ranks[rank]
            if any(not future.done() for _, future in each.pending.values()):
                self.declare(rank, Cause("error", why), each.last_heartbeat)

    async def fenced(self, rank: int) -> None:
        """Wait until the process of a lost rank runs no more of its program."""
        await self._ranks[rank].process.fenced()

    def signal(self, rank: int, name: str) -> None:
        """Send a signal to a rank process, as chaos does."""
        self._ranks[rank].process.signal(name)

    async def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """A rank dials in: what it reports is heard, what is put in its outbox is sent."""
        hello = (await first_report(reports, context)).hello
        token = hello.token
        await self._known.wait()
        each = self._tokens.pop(token, None)
        if each is None or not hmac.compare_digest(each.process.token, token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token was not given to a rank")
            return
        listener = asyncio.create_task(self._listen(each, reports))
        if not each.attached.done():
            each.attached.set_result(hello)
        try:
            while (command := await each.outbox.get()) is not None:
                yield command
        finally:
            listener.cancel()

    async def _listen(self, each: Incarnation, reports: AsyncIterator[link_pb2.Report]) -> None:
        try:
            async for report in reports:
                self._hear(each, report)
            each.stream_error = "the rank closed its stream"
        except (grpc.RpcError, asyncio.CancelledError, StopAsyncIteration) as error:
            each.stream_error = f"its stream broke: {type(error).__name__}"

    def _hear(self, each: Incarnation, report: link_pb2.Report) -> None:
        now = time.monotonic()
        each.gaps.append(now - each.last_heartbeat)
        each.last_heartbeat = now
        what = report.WhichOneof("what")
        if what == "done":
            each.compiles = report.done.compiles
            self._answer(each, report.done.id, report.done)
        elif what == "failed":
            self._answer(each, report.failed.id, report.failed)
        elif what == "copied" and each.loss is None:
            self.on_copied(each.rank, report.copied)
        elif what == "step_done" and (waiting := self._answered(each, report.step_done.step, now)):
            each.compiles = report.step_done.compiles
            waiting.set_result(report.step_done)
        elif what == "step_failed" and (waiting := self._answered(each, report.step_failed.step, now)):
            failed = report.step_failed
            waiting.set_exception(RankRefused(each.rank, "step", failed.error, tuple(failed.poisoned_rows)))

    @staticmethod
    def _answered(each: Incarnation, step: int, now: float) -> "asyncio.Future[link_pb2.StepDone] | None":
        """Who waits for the answer to this step, if anybody still does."""
        waiting = each.steps.pop(step, None)
        if waiting is None or waiting.done():
            return None
        if each.step_sent is not None:
            each.step_times.append(now - each.step_sent)
        each.step_sent = now if each.steps else None
        return waiting

    @staticmethod
    def _answer(each: Incarnation, command: int, answer: link_pb2.Done | link_pb2.Failed) -> None:
        what, future = each.pending.pop(command, ("", None))
        if future is None or future.done():
            return
        if isinstance(answer, link_pb2.Failed):
            future.set_exception(RankRefused(each.rank, what, answer.error))
        else:
            future.set_result(answer)

    def _alive(self, rank: int) -> Incarnation:
        each = self._ranks[rank]
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return each

    def _exited(self, each: Incarnation, how: str) -> None:
        if self._ranks.get(each.rank) is each:
            self.declare(each.rank, Cause("exited", how), time.monotonic())
        self._release(each)

    def _release(self, each: Incarnation) -> None:
        """Forget what belongs to an incarnation that is over: waiters hear that it is lost."""
        cause = str(each.loss.cause) if each.loss else "the server stops"
        error = RankLost(each.rank, cause)
        futures: list[asyncio.Future[Any]] = [future for _, future in each.pending.values()]
        futures += each.steps.values()
        for future in (*futures, each.attached):
            if not future.done():
                future.set_exception(error)
                future.exception()
        each.pending.clear()
        each.outbox.put_nowait(None)
        self._tokens.pop(each.process.token, None)

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            self.front_lag_s = max(now - last - WATCH_S, 0.9 * self.front_lag_s if self.front_lag_s > WATCH_S else 0.0)
            last = now
            observed = [self._observe(each) for each in self._ranks.values() if each.watched and each.loss is None]
            for rank, cause in suspects(observed, now, self._health, front_lag_s=self.front_lag_s).items():
                self.declare(rank, cause, now if cause.kind == "exited" else self._ranks[rank].last_heartbeat)
            if observed and stuck(observed, now, self._health, front_lag_s=self.front_lag_s):
                self._give_up_step()

    def _give_up_step(self) -> None:
        """All ranks are late and none can be named: the step has failed, and whoever asked for it makes the mesh anew.
        A rank that hangs is then the one that does not come along."""
        for each in self._ranks.values():
            for waiting in each.steps.values():
                if not waiting.done():
                    waiting.set_exception(RankRefused(each.rank, "step", "every rank is late with it"))

    @staticmethod
    def _observe(each: Incarnation) -> Observation:
        return Observation(
            rank=each.rank,
            last_heartbeat=each.last_heartbeat,
            heartbeat_gaps=each.gaps,
            stream_error=each.stream_error,
            process_state=each.process.state,
            step_sent=each.step_sent,
            step_times=each.step_times,
        )
