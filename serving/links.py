"""The front's end of the rank processes: starts them, talks to them, sees them die.

Decides nothing about plans. A rank is lost once, for one cause, at one time; whoever waits for it then hears
RankLost instead of an answer.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hmac
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc

from serving.errors import StartError
from serving.health import Cause, HealthSettings, Observation, stuck, suspects
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc

MESSAGE_BYTES = 64 << 20
WATCH_S = 0.01
PF_EXITING = 0x4
"""Of the flags in /proc/PID/stat (linux/sched.h)."""
"""How often ranks are looked at: whether they are late, and whether the kernel has ended them (a pidfd tells only
when the last thread is gone)."""
POISONED_S = 1.0
"""How long the other ranks have to end a step that one has found to be no numbers."""
FENCE_POLL_S = 0.001


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


class RankProcess:
    """One incarnation of a rank on this machine, from its start to its end."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.rank = rank
        self.process = process
        self.log = log
        self.pidfd = os.pidfd_open(process.pid)
        self.token = ""
        self.attached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outbox: asyncio.Queue[link_pb2.Command | None] = asyncio.Queue()
        self.pending: dict[int, tuple[str, asyncio.Future[link_pb2.Done]]] = {}
        self.step: tuple[int, asyncio.Future[link_pb2.StepDone]] | None = None
        self.step_sent: float | None = None
        self.last_heartbeat = time.monotonic()
        self.gaps: collections.deque[float] = collections.deque(maxlen=200)
        self.step_times: collections.deque[float] = collections.deque(maxlen=200)
        self.compiles = 0
        self.watched = False
        self.stream_error: str | None = None
        self.loss: Loss | None = None

    def why(self) -> str:
        """The last lines the process wrote, for an error that names the cause."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        told = [line.strip() for line in lines if not line.startswith("[Gloo]")]
        return " | ".join(told[-8:])[-1000:] or "it wrote nothing"


class RankLinks(link_pb2_grpc.RankLinkServicer):
    """All ranks of this front."""

    def __init__(
        self, health: HealthSettings, on_loss: Callable[[Loss], None], folder: Path, *, threads: int = 1
    ) -> None:
        self._health = health
        self._threads = threads
        self._on_loss = on_loss
        self._folder = folder
        self._ranks: dict[int, RankProcess] = {}
        self._tokens: dict[str, RankProcess] = {}
        self._ids = 0
        self._server: grpc.aio.Server | None = None
        self._address = ""
        self._watcher: asyncio.Task[None] | None = None
        self.on_copied: Callable[[int, link_pb2.Copied], None] = lambda rank, copied: None
        """Hears what a rank wrote to its cache, where it cannot copy that itself."""
        self.front_lag_s = 0.0

    async def open(self) -> None:
        """Listen for ranks, on loopback, and watch over them."""
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_send_message_length", MESSAGE_BYTES)]
        self._server = grpc.aio.server(options=options)
        link_pb2_grpc.add_RankLinkServicer_to_server(self, self._server)
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End every rank and stop listening. No process is left."""
        if self._watcher is not None:
            self._watcher.cancel()
        for each in self._ranks.values():
            self._release(each)
            if each.process.poll() is None:
                each.process.kill()
            each.process.wait()
        if self._server is not None:
            await self._server.stop(0)

    def spawn(self, rank: int) -> RankProcess:
        """Start a rank process; it is one of the ranks from now on."""
        log = Path(tempfile.mkstemp(prefix=f"rank{rank}-", suffix=".log", dir=self._folder)[1])
        token = secrets.token_hex(16)
        environment = os.environ | {
            "MOEJAX_LINK_FRONT": self._address,
            "MOEJAX_LINK_RANK": str(rank),
            "MOEJAX_LINK_TOKEN": token,
            "NPROC": str(self._threads),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "GRPC_VERBOSITY": "NONE",
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.rank"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        each = RankProcess(rank, process, log)
        each.token = token
        self._ranks[rank] = each
        self._tokens[token] = each
        asyncio.get_running_loop().add_reader(each.pidfd, self._exited, each)
        return each

    async def attached(self, rank: int) -> None:
        """Wait until a started rank has dialled in. Raises RankLost."""
        await self._ranks[rank].attached

    def get(self, rank: int) -> RankProcess | None:
        """The process that is this rank now."""
        return self._ranks.get(rank)

    async def call(self, rank: int, what: str, message: Any) -> link_pb2.Done:
        """Tell a rank to do something and wait until it has. Raises RankLost or RankRefused."""
        each = self._alive(rank)
        self._ids += 1
        future: asyncio.Future[link_pb2.Done] = asyncio.get_running_loop().create_future()
        each.pending[self._ids] = (what, future)
        each.outbox.put_nowait(link_pb2.Command(id=self._ids, **{what: message}))
        return await future

    async def step(self, parts: dict[int, link_pb2.Step]) -> dict[int, link_pb2.StepDone]:
        """Run one step on all these ranks. Raises RankLost, Poisoned, or RankRefused when one failed and none is known
        dead."""
        now, ranks = time.monotonic(), [self._alive(rank) for rank in parts]
        futures: list[asyncio.Future[link_pb2.StepDone]] = []
        for each, part in zip(ranks, parts.values(), strict=True):
            futures.append(asyncio.get_running_loop().create_future())
            each.step, each.step_sent = (part.step, futures[-1]), now
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
            for each, future in zip(ranks, futures, strict=True):
                future.cancel()
                each.step, each.step_sent = None, None
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
        with contextlib.suppress(ProcessLookupError):
            each.process.send_signal(signal.SIGKILL)
        self._release(each)
        self._on_loss(each.loss)

    def give_up(self, ranks: Iterable[int], why: str) -> None:
        """Those of these ranks that still owe an answer are dead from now on."""
        for rank in ranks:
            each = self._ranks[rank]
            if any(not future.done() for _, future in each.pending.values()):
                self.declare(rank, Cause("error", why), each.last_heartbeat)

    async def fenced(self, rank: int) -> None:
        """Wait until the process of a lost rank runs no more of its program. The kernel may still be giving back its
        memory, which takes longer than all the rest of a recovery."""
        process = self._ranks[rank].process
        while process.poll() is None and _state(process.pid) not in ("Z", "X", ""):
            await asyncio.sleep(FENCE_POLL_S)

    def signal(self, rank: int, name: str) -> None:
        """Send a signal to a rank process, as chaos does."""
        self._ranks[rank].process.send_signal(getattr(signal, name))

    async def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """A rank dials in: what it reports is heard, what is put in its outbox is sent."""
        first = await anext(aiter(reports))
        each = self._tokens.pop(first.hello.token, None)
        if each is None or not hmac.compare_digest(each.token, first.hello.token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token was not given to a rank")
            return
        listener = asyncio.create_task(self._listen(each, reports))
        if not each.attached.done():
            each.attached.set_result(None)
        try:
            while (command := await each.outbox.get()) is not None:
                yield command
        finally:
            listener.cancel()

    async def _listen(self, each: RankProcess, reports: AsyncIterator[link_pb2.Report]) -> None:
        try:
            async for report in reports:
                self._hear(each, report)
            each.stream_error = "the rank closed its stream"
        except (grpc.RpcError, asyncio.CancelledError, StopAsyncIteration) as error:
            each.stream_error = f"its stream broke: {type(error).__name__}"

    def _hear(self, each: RankProcess, report: link_pb2.Report) -> None:
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
        elif what == "step_done" and (waiting := self._waits(each, report.step_done.step)):
            if each.step_sent is not None:
                each.step_times.append(now - each.step_sent)
            each.step_sent, each.compiles = None, report.step_done.compiles
            waiting.set_result(report.step_done)
        elif what == "step_failed" and (waiting := self._waits(each, report.step_failed.step)):
            each.step_sent = None
            failed = report.step_failed
            waiting.set_exception(RankRefused(each.rank, "step", failed.error, tuple(failed.poisoned_rows)))

    @staticmethod
    def _waits(each: RankProcess, step: int) -> "asyncio.Future[link_pb2.StepDone] | None":
        """Who waits for the answer to this step, if anybody still does."""
        if each.step is None or each.step[0] != step or each.step[1].done():
            return None
        return each.step[1]

    @staticmethod
    def _answer(each: RankProcess, command: int, answer: link_pb2.Done | link_pb2.Failed) -> None:
        what, future = each.pending.pop(command, ("", None))
        if future is None or future.done():
            return
        if isinstance(answer, link_pb2.Failed):
            future.set_exception(RankRefused(each.rank, what, answer.error))
        else:
            future.set_result(answer)

    def _alive(self, rank: int) -> RankProcess:
        each = self._ranks[rank]
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return each

    def _exited(self, each: RankProcess) -> None:
        now = time.monotonic()
        code = each.process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"code {code}"
        if self._ranks.get(each.rank) is each:
            said = "" if code == -signal.SIGKILL else f": {each.why()}"
            self.declare(each.rank, Cause("exited", f"process ended with {how}{said}"), now)
        self._release(each)

    def _release(self, each: RankProcess) -> None:
        """Forget what belongs to an incarnation that is over: waiters hear that it is lost."""
        cause = str(each.loss.cause) if each.loss else "the server stops"
        error = RankLost(each.rank, cause)
        futures: list[asyncio.Future[Any]] = [future for _, future in each.pending.values()]
        if each.step is not None:
            futures.append(each.step[1])
        for future in (*futures, each.attached):
            if not future.done():
                future.set_exception(error)
                future.exception()
        each.pending.clear()
        each.outbox.put_nowait(None)
        self._tokens.pop(each.token, None)
        if each.pidfd >= 0 and (each.process.poll() is not None or each.loss is None):
            asyncio.get_running_loop().remove_reader(each.pidfd)
            os.close(each.pidfd)
            each.pidfd = -1

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
            if each.step is not None and not each.step[1].done():
                each.step[1].set_exception(RankRefused(each.rank, "step", "every rank is late with it"))

    @staticmethod
    def _observe(each: RankProcess) -> Observation:
        return Observation(
            rank=each.rank,
            last_heartbeat=each.last_heartbeat,
            heartbeat_gaps=tuple(each.gaps),
            stream_error=each.stream_error,
            process_state=_state(each.process.pid),
            step_sent=each.step_sent,
            step_times=tuple(each.step_times),
        )


def _state(pid: int) -> str:
    """The kernel's letter for a process; X too when it has begun to end: its parent is told only when all its memory is
    given back, which takes longer than all the rest of a recovery."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return ""
    return "X" if int(fields[6]) & PF_EXITING else fields[0]


class Coordinator:
    """The process that hosts one generation's coordination service."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process = process
        self.address = address

    @classmethod
    async def start(cls, ranks: int, seats: int) -> "Coordinator":
        """Start the service for so many ranks, and seats in all. Raises StartError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "moejax.coordinator",
            str(ranks),
            str(seats),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line.strip().isdigit():
            raise StartError(f"the coordinator did not start: it ended with code {await process.wait()}")
        return cls(process, f"127.0.0.1:{int(line)}")

    async def stop(self) -> None:
        """End the service at once."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
