"""The front's end of the rank processes: starts them, sends them commands and steps, and notices when they die.

It decides nothing about plans. A rank is lost once, for one cause, at one time; whoever waits for its answer then gets
RankLost.
"""

import asyncio
import contextlib
import hmac
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
from typing import Any

import grpc

from serving.executor.failure_detector import Cause, FailureDetectorSettings
from serving.executor.host_service import HostService
from serving.executor.host_steps import StepAnswers
from serving.executor.host_stream import HostStream
from serving.executor.incarnation import Incarnation, Loss, PendingCommand
from serving.executor.late_steps import LateSteps
from serving.executor.rank_errors import CommandFailed, NonFiniteStep, RankLost
from serving.executor.rank_monitor import RankMonitor
from serving.executor.sent_step import SentStep
from serving.launch.rank_listener import ListeningServer, RankListener, first_report
from serving.launch.rank_process import HostPaths, RankStarter
from serving.launch.shared_listener import SharedListener
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.versions import LINK, VersionRange

NON_FINITE_WAIT_S = 1.0
"""Seconds that the other ranks have to end a step in which one rank found values that are not finite."""


class RankExecutor:
    """All ranks of this front. `on_loss` is called once for each rank that is lost, `on_copied` with the KV entries
    that a rank streams to its replica, `on_starved`, at most once a minute for each rank, with one that is late because
    its process waits for a processor, and with the evidence; `on_expert_load` with counts of the routers of a host's
    ranks, int32 [moe layers, experts]."""

    def __init__(
        self,
        detector: FailureDetectorSettings,
        on_loss: Callable[[Loss], None],
        starter: RankStarter,
        *,
        on_copied: Callable[[int, link_pb2.Copied], None] = lambda rank, copied: None,
        on_starved: Callable[[int, str], None] = lambda rank, evidence: None,
        on_expert_load: Callable[[bytes], None] = lambda load: None,
    ) -> None:
        self._on_loss = on_loss
        self._on_copied = on_copied
        self._starter = starter
        self._ranks: dict[int, Incarnation] = {}
        self._tokens: dict[str, Incarnation] = {}
        self._command_ids = 0
        self._server: ListeningServer | None = None
        self._stream_metadata: tuple[tuple[str, str], ...] = ()
        self._hosts = HostService(self._let_in, self._receive, on_expert_load)
        self._tokens_known = asyncio.Event()
        """Set once all tokens of ranks are known, also those of ranks that an earlier front left."""
        self.address = ""
        """The host:port that ranks of this host dial."""
        self._monitor = RankMonitor(detector, declare=self.declare, fail_step=self._fail_step, on_starved=on_starved)
        self._monitoring: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None
        self._step_epoch = 0
        """The epoch of the last step that was sent."""

    async def open(self, listener: RankListener | SharedListener | None = None) -> None:
        """Listen for ranks, on loopback unless `listener` says otherwise, and begin to monitor them. Raises
        StartError."""
        listener = listener or RankListener()
        self._stream_metadata = listener.stream_metadata
        self._hosts.open(listener)
        self._server, self.address = await listener.open(self, self._hosts.relay)
        self._monitoring = asyncio.create_task(self._monitor.run(self._ranks.values))

    async def close(self) -> None:
        """End every rank and stop listening. No process is left."""
        for task in (self._monitoring, self._aborting):
            if task is not None:
                task.cancel()
        for each in self._ranks.values():
            self._release(each)
            each.process.end()
        await asyncio.gather(*(each.process.fenced() for each in self._ranks.values()))
        if self._server is not None:
            await self._server.stop(0)

    def spawn(self, rank: int) -> Incarnation:
        """Start the process of a rank."""
        each = Incarnation(rank)
        each.process = self._starter.start(rank, self.address, lambda how: self._exited(each, how))
        self._ranks[rank] = self._tokens[each.process.token] = each
        self._tokens_known.set()
        return each

    def adopt_left_ranks(self) -> tuple[int, ...]:
        """Take over the ranks that an earlier front left; they attach by themselves. Returns their numbers."""
        left = self._starter.orphans()
        for rank, take_over in left.items():
            each = Incarnation(rank)
            each.process = take_over(lambda how, each=each: self._exited(each, how))
            self._ranks[rank] = self._tokens[each.process.token] = each
        self._tokens_known.set()
        return tuple(left)

    async def wait_attached(self, rank: int) -> link_pb2.Hello:
        """Wait until a rank has attached. Returns its first message. Raises RankLost."""
        return await self._ranks[rank].attached

    def get(self, rank: int) -> Incarnation | None:
        """The present incarnation of a rank."""
        return self._ranks.get(rank)

    def host_paths(self, rank: int) -> HostPaths | None:
        """The paths of the host that a rank is on; None on the front's host."""
        return self._ranks[rank].process.host_paths if rank in self._ranks else None

    async def call_all(self, what: str, messages: Mapping[int, Any]) -> list[link_pb2.Done]:
        """Call each of these ranks. Raises RankLost or CommandFailed at the first one, without waiting for the
        others. The answer of a rank that was lost before the others had answered does not count."""
        ranks = [self._alive(rank) for rank in messages]
        answers = await asyncio.gather(*(self.call(rank, what, message) for rank, message in messages.items()))
        for each in ranks:
            if each.loss is not None:
                raise RankLost(each.rank, str(each.loss.cause))
        return answers

    async def call(self, rank: int, what: str, message: Any) -> link_pb2.Done:
        """Send a rank a command, and wait for its answer. `what` is the name of the command in the Command message.
        Raises RankLost or CommandFailed. The answer of a rank that was lost since does not count."""
        each = self._alive(rank)
        self._command_ids += 1
        future: asyncio.Future[link_pb2.Done] = asyncio.get_running_loop().create_future()
        each.pending_commands[self._command_ids] = PendingCommand(what, clock.now(), future)
        each.send(what, message, self._command_ids)
        answer = await future
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return answer

    def by_host(self, ranks: Iterable[int]) -> tuple[list[int], dict[HostStream, list[int]]]:
        """These ranks: those with streams of their own, and the others by the stream of their host."""
        own: list[int] = []
        hosts: dict[HostStream, list[int]] = {}
        for rank in ranks:
            each = self._ranks.get(rank)
            if each is None or each.host_stream is None:
                own.append(rank)
            elif each.host_stream in hosts:
                hosts[each.host_stream].append(rank)
            else:
                hosts[each.host_stream] = [rank]
        return own, hosts

    def link_version(self, ranks: Iterable[int]) -> int:
        """The newest version of the link protocol that all these ranks and the front speak."""
        known = (self._ranks.get(rank) for rank in ranks)
        return min((each.link_version for each in known if each is not None), default=LINK.newest)

    async def step(
        self, parts: Mapping[int, link_pb2.Step], hosts: Mapping[HostStream, tuple[list[int], link_pb2.HostStep]]
    ) -> StepAnswers:
        """Run one step on all these ranks, after the steps they have already: `parts` by rank, and for the ranks of a
        host one message. Raises RankLost, NonFiniteStep, or CommandFailed when one failed and none is known to be
        dead."""
        sent = SentStep(self._alive, self._ranks, parts, hosts)
        self._step_epoch = sent.epoch
        try:
            return await sent.answers()
        except CommandFailed as error:
            if not error.non_finite_rows:
                raise
            raise NonFiniteStep(await sent.non_finite_rows(NON_FINITE_WAIT_S)) from None
        finally:
            sent.forget()

    def abort(self, ranks: Iterable[int], epoch: int, *, connecting: int = 0) -> None:
        """Have ranks abort the collectives of an epoch at once; or, with `connecting`, only the connection of meshes up
        to this number."""
        abort = link_pb2.Abort(epoch=epoch, connecting=connecting)
        for rank in ranks:
            each = self._ranks[rank]
            if each.loss is None:
                each.send("abort", abort)

    def cut_links(self, rank: int) -> None:
        """Have a rank cut its connections in the mesh in force, for fault injection."""
        self._alive(rank).send("abort", link_pb2.Abort(links=True))

    def monitor(self, rank: int) -> None:
        """Judge the heartbeats of a rank from now on, if that is not done yet; until now it was busy starting, or
        joining a generation."""
        each = self._ranks[rank]
        if each.monitored:
            return
        each.monitored, each.last_heartbeat = True, clock.now()
        each.heartbeat_gaps.clear()

    def stop_monitoring(self, rank: int) -> None:
        """Stop judging the heartbeats of a rank, for work that delays them."""
        self._ranks[rank].monitored = False

    def declare(self, rank: int, cause: Cause, evidence_at: float) -> None:
        """Declare a rank dead: its process is killed (the fence), and whoever waits for it gets RankLost."""
        each = self._ranks[rank]
        if each.loss is not None:
            return
        each.loss = Loss(rank, cause, evidence_at, clock.now())
        each.process.signal("SIGKILL")
        self._release(each)
        self._on_loss(each.loss)

    def lose_unanswered(self, ranks: Collection[int], what: str, why: str, *, unless_all: bool = False) -> None:
        """Declare those of these ranks dead that have not answered a command of this name, for which nobody waits any
        more; with `unless_all` none if none has answered."""
        called = [self._ranks[rank] for rank in ranks]
        silent = [each for each in called if each.leaves_unanswered(what)]
        if unless_all and len(silent) == len(called) > 1:
            return
        for each in silent:
            self.declare(each.rank, Cause("error", why), each.last_heartbeat)

    async def fenced(self, rank: int) -> None:
        """Wait until the process of a lost rank runs no more of its program."""
        await self._ranks[rank].process.fenced()

    def signal(self, rank: int, name: str) -> None:
        """Send a signal to the process of a rank, for fault injection."""
        self._ranks[rank].process.signal(name)

    @property
    def knows_tokens(self) -> bool:
        """Whether all tokens of ranks are known, also those of ranks that an earlier front left."""
        return self._tokens_known.is_set()

    def expects(self, token: str) -> bool:
        """Whether a rank with this token may attach."""
        return token in self._tokens

    async def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """The RPC by which a rank attaches: receives its reports, and sends it the commands in its outbox."""
        hello = (await first_report(reports, context)).hello
        await self._tokens_known.wait()
        async with contextlib.aclosing(self.attach(hello, reports, context)) as commands:
            async for command in commands:
                yield command

    async def attach(
        self, hello: link_pb2.Hello, reports: AsyncIterator[link_pb2.Report], context: Any
    ) -> AsyncGenerator[link_pb2.Command]:
        """The same for a rank that has said who it is."""
        each = await self._let_in(hello)
        if isinstance(each, str):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, each)
            return
        await context.send_initial_metadata(self._stream_metadata)
        listener = asyncio.create_task(self._read_reports(each, reports))
        if not each.attached.done():
            each.attached.set_result(hello)
        try:
            while (command := await each.outbox.get()) is not None:
                yield command
        finally:
            listener.cancel()

    async def _let_in(self, hello: link_pb2.Hello) -> Incarnation | str:
        """The rank that attaches with this message; or why it is refused."""
        await self._tokens_known.wait()
        each = self._tokens.pop(hello.token, None)
        if each is None or not hmac.compare_digest(each.process.token, hello.token):
            return "this token was not given to a rank"
        theirs = VersionRange(hello.oldest, hello.newest) if hello.HasField("newest") else VersionRange(1, 1)
        version = LINK.common_with(theirs)
        if version is None:
            text = f"rank {each.rank} speaks version {theirs} of the link protocol, and the front version {LINK}"
            self.declare(each.rank, Cause("error", text), clock.now())
            return text
        each.build, each.link_version = hello.build, version
        return each

    async def _read_reports(self, each: Incarnation, reports: AsyncIterator[link_pb2.Report]) -> None:
        try:
            async for report in reports:
                self._receive(each, report)
            each.stream_error = "the rank closed its stream"
        except (grpc.RpcError, asyncio.CancelledError, StopAsyncIteration) as error:
            each.stream_error = f"its stream broke: {type(error).__name__}"

    def _receive(self, each: Incarnation, report: link_pb2.Report) -> None:
        now = clock.now()
        each.heard(now)
        what = report.WhichOneof("what")
        if what in ("done", "failed", "step_done", "step_failed"):
            each.answered_at = now
        if what == "done":
            each.compiles = report.done.compiles
            self._resolve(each, report.done.id, report.done)
        elif what == "failed":
            self._resolve(each, report.failed.id, report.failed)
        elif what == "copied" and each.loss is None:
            self._on_copied(each.rank, report.copied)
        elif what == "step_done" and (waiting := each.take_pending_step(report.step_done.step, now)):
            each.compiles = report.step_done.compiles
            waiting.set_result(report.step_done)
        elif what == "step_failed" and (waiting := each.take_pending_step(report.step_failed.step, now)):
            failed = report.step_failed
            rows, exchange = tuple(failed.non_finite_rows), failed.exchange
            error = CommandFailed(each.rank, "step", failed.error, rows, exchange=exchange)
            if each.host_stream is not None:
                each.host_stream.fail_step(failed.step, error)
            else:
                waiting.set_exception(error)
        elif what == "raised":
            self.declare(each.rank, Cause("raised", f"{report.raised.error} | {report.raised.trace}"), now)

    @staticmethod
    def _resolve(each: Incarnation, command: int, answer: link_pb2.Done | link_pb2.Failed) -> None:
        pending = each.pending_commands.pop(command, None)
        if pending is None or pending.future.done():
            return
        if isinstance(answer, link_pb2.Failed):
            pending.future.set_exception(CommandFailed(each.rank, pending.what, answer.error))
        else:
            pending.future.set_result(answer)

    def _alive(self, rank: int) -> Incarnation:
        each = self._ranks[rank]
        if each.loss is not None:
            raise RankLost(rank, str(each.loss.cause))
        return each

    def _exited(self, each: Incarnation, how: str) -> None:
        if self._ranks.get(each.rank) is each:
            self.declare(each.rank, Cause("exited", how), clock.now())
        self._release(each)

    def _release(self, each: Incarnation) -> None:
        """Release an incarnation that has ended: whoever waits for it gets RankLost."""
        cause = str(each.loss.cause) if each.loss else "the server stops"
        error = RankLost(each.rank, cause)
        futures: list[asyncio.Future[Any]] = [command.future for command in each.pending_commands.values()]
        futures += each.pending_steps.values()
        for future in (*futures, each.attached):
            if not future.done():
                future.set_exception(error)
                future.exception()
        each.pending_commands.clear()
        each.close_stream()
        self._tokens.pop(each.process.token, None)

    def _fail_step(self) -> None:
        """All ranks are late, and none counts as failed: abort the exchange of their steps, and see who answers."""
        late = [each for each in self._ranks.values() if each.pending_steps and each.loss is None]
        steps = LateSteps(late)
        self.abort((each.rank for each in late), self._step_epoch)
        self._aborting = asyncio.create_task(steps.judge(clock.now(), self.declare))
