"""Passes on what the front and the ranks of this host send each other: one stream to the front for all of them.

Ranks attach here, at a socket that only their user can open, as they would to the front. A step arrives once and is
laid out for each rank here (`serving.executor.host_steps`); answers to it and heartbeats are collected. Every other
report is sent at once, in order, behind the answers of the step that is being collected. When the front is gone, the
streams of the ranks are ended: they dial again, and are passed on to the next front.
"""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from serving.engine.batch import Batch
from serving.executor.host_steps import host_step_done, read_host_step, steps_of_ranks
from serving.launch.rank_channel import RankChannel
from serving.launch.rank_listener import HEARTBEAT_METADATA, HEARTBEAT_S, RankListener, first_report
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc
from serving.protocol.versions import HOST
from serving.version import build

REDIAL_S = 0.1
"""Seconds before the front is dialed again."""
COLLECT_S = 0.005
"""Most seconds that an answer to a step waits here for those of the other ranks."""
LOAD_S = 0.25
"""Least seconds between two reports of the counts of the routers."""
STEPS_KNOWN = 4
"""Steps that are known until they are answered: one runs, one is sent ahead, and steps that failed are left over."""
BULK_BYTES = 1 << 20
"""A report of this size is a message of its own."""


class AttachedRank:
    """The stream of one rank of this host."""

    def __init__(self, link: int, hello: link_pb2.Report) -> None:
        self.link = link
        self.hello = hello
        self.accepted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Once the front has decided: empty, or why it refuses the rank."""
        self.commands: asyncio.Queue[link_pb2.Command | None] = asyncio.Queue()

    def end(self, why: str = "") -> None:
        """End its stream, after the commands it has."""
        if not self.accepted.done():
            self.accepted.set_result(why)
        self.commands.put_nowait(None)


class StepReports:
    """The answers to steps that are collected: of each step until all its ranks have answered."""

    def __init__(self) -> None:
        self._batches: collections.OrderedDict[int, tuple[Batch, set[int]]] = collections.OrderedDict()
        """By step, and the links that have not answered."""
        self.step = 0
        """The step whose answers are held."""
        self._batch: Batch | None = None
        self.held: dict[int, link_pb2.StepDone] = {}

    def sent(self, batch: Batch, links: Collection[int]) -> None:
        """A step was sent to these links."""
        self._batches[batch.step] = batch, set(links)
        while len(self._batches) > STEPS_KNOWN:
            self._batches.popitem(last=False)

    def batch(self, step: int) -> Batch | None:
        """A step that was sent not long ago."""
        return self._batches[step][0] if step in self._batches else None

    def add(self, link: int, done: link_pb2.StepDone) -> bool:
        """Hold an answer to the step that is collected. True when it was the last one."""
        self.step = done.step
        self.held[link] = done
        self._batch, waiting = self._batches[done.step]
        waiting.discard(link)
        return not waiting

    def fail(self, link: int, step: int) -> None:
        """A rank has not done a step, and will not."""
        if step in self._batches:
            self._batches[step][1].discard(link)

    def take(self) -> link_pb2.HostStepDone:
        """The held answers."""
        assert self._batch is not None
        done = host_step_done(self._batch, self.held)
        self.held = {}
        return done


class HostRelay:
    """The relay of one host agent. `secret` is its join token. Ranks dial `address` with a token that `expect` was
    called with."""

    def __init__(
        self, channel: RankChannel, folder: Path, *, secret: str, host: str, log: Callable[[str], None]
    ) -> None:
        self.address = f"unix:{folder / 'ranks'}"
        self._channel = channel
        self._hello = link_pb2.HostHello(token=secret, host=host, build=build(), oldest=HOST.oldest, newest=HOST.newest)
        self._log = log
        self._tokens: set[str] = set()
        self._wanted = asyncio.Event()
        """Set while there are tokens: the front is dialed only then."""
        self._links = 0
        self._ranks: dict[int, AttachedRank] = {}
        self._steps = StepReports()
        self._items: list[link_pb2.HostItem] = []
        """Items to send behind the answers that are held."""
        self._beats: set[int] = set()
        self._load: np.ndarray | None = None
        self._reports: asyncio.Queue[link_pb2.HostReport | None] | None = None
        """The reports to the front; None while there is none."""
        self._connected = asyncio.Event()
        self._heartbeat_s = HEARTBEAT_S
        self._flushing: asyncio.TimerHandle | None = None

    def expect(self, token: str) -> None:
        """A rank with this token may attach."""
        self._tokens.add(token)
        self._wanted.set()

    def forget(self, token: str) -> None:
        """No rank with this token may attach any more."""
        self._tokens.discard(token)
        if not self._tokens:
            self._wanted.clear()

    async def run(self) -> None:
        """Serve the ranks, and keep a stream to the front, until cancelled."""
        server, _ = await RankListener(address=self.address).open(self)
        try:
            await self.pass_on()
        finally:
            await server.stop(0)

    async def pass_on(self) -> None:
        """Keep a stream to the front for the ranks that attach, until cancelled."""
        beating, refusal = asyncio.create_task(self._send_beats()), ""
        try:
            while True:
                await self._wanted.wait()
                try:
                    await self._dial()
                except (ValueError, KeyError, TypeError) as error:  # nothing else sends what cannot be read
                    self._log(f"{self._channel.front}: {type(error).__name__}: {error}")
                except grpc.RpcError as error:
                    why = error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
                    code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
                    if (
                        code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)
                        and why != refusal
                    ):
                        refusal = why
                        self._log(f"{self._channel.front}: {why}")
                self._front_lost()
                await asyncio.sleep(REDIAL_S)
        finally:
            beating.cancel()

    # -- Ranks --------------------------------------------------------------------------------------------------

    async def Attach(self, reports: AsyncIterator[link_pb2.Report], context: Any) -> AsyncIterator[link_pb2.Command]:
        """The RPC by which a rank of this host attaches."""
        hello = await first_report(reports, context)
        if hello.hello.token not in self._tokens:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token was not given to a rank of this host")
        await self._connected.wait()
        self._links += 1
        each = self._ranks[self._links] = AttachedRank(self._links, hello)
        self._add(link_pb2.HostItem(link=each.link, report=hello))
        reader: asyncio.Task[None] | None = None
        try:
            if refusal := await each.accepted:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)
            await context.send_initial_metadata(((HEARTBEAT_METADATA, str(self._heartbeat_s)),))
            reader = asyncio.create_task(self._read(each, reports))
            while (command := await each.commands.get()) is not None:
                yield command
        finally:
            if reader is not None:
                reader.cancel()
            self._rank_gone(each, "the rank closed its stream")

    async def _read(self, each: AttachedRank, reports: AsyncIterator[link_pb2.Report]) -> None:
        why = "the rank closed its stream"
        try:
            async for report in reports:
                self._receive(each.link, report)
        except grpc.RpcError as error:
            why = f"its stream broke: {type(error).__name__}"
        self._rank_gone(each, why)
        each.end()

    def _rank_gone(self, each: AttachedRank, why: str) -> None:
        if self._ranks.pop(each.link, None) is not None:
            self._add(link_pb2.HostItem(link=each.link, gone=why))

    def _receive(self, link: int, report: link_pb2.Report) -> None:
        what = report.WhichOneof("what")
        if what == "heartbeat":
            self._beats.add(link)
            return
        if what == "step_done" and self._steps.batch(report.step_done.step) is not None:
            self._collect(link, report.step_done)
            return
        if what == "step_failed":
            self._steps.fail(link, report.step_failed.step)
        self._add(link_pb2.HostItem(link=link, report=report))

    def _collect(self, link: int, done: link_pb2.StepDone) -> None:
        if self._steps.held and self._steps.step != done.step:
            self._flush()
        if done.expert_load:
            counts = np.frombuffer(done.expert_load, np.int32)
            self._load = counts.copy() if self._load is None or self._load.size != counts.size else self._load + counts
        if self._steps.add(link, done):
            self._flush()
        elif self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_later(COLLECT_S, self._flush)

    def _add(self, item: link_pb2.HostItem) -> None:
        """Send an item: behind the answers that are held now, when these are sent."""
        self._items.append(item)
        if not self._steps.held:
            self._flush()

    def _flush(self) -> None:
        """Send the answers that are held, then the other items."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        items, self._items = self._items, []
        if self._steps.held:
            items.insert(0, link_pb2.HostItem(step_done=self._steps.take()))
        if self._reports is None:
            return
        together: list[link_pb2.HostItem] = []
        for item in items:
            if item.ByteSize() < BULK_BYTES:
                together.append(item)
                continue
            if together:
                self._reports.put_nowait(link_pb2.HostReport(items=together))
                together = []
            self._reports.put_nowait(link_pb2.HostReport(items=[item]))
        if together:
            self._reports.put_nowait(link_pb2.HostReport(items=together))

    async def _send_beats(self) -> None:
        loop = asyncio.get_running_loop()
        sent_load_at = 0.0
        while True:
            await asyncio.sleep(self._heartbeat_s)
            if self._reports is None:
                continue
            report = link_pb2.HostReport(beats=self._beats)
            if self._load is not None and loop.time() - sent_load_at >= LOAD_S:
                report.expert_load, self._load, sent_load_at = self._load.tobytes(), None, loop.time()
            if report.beats or report.expert_load:
                self._reports.put_nowait(report)
            self._beats = set()

    # -- The front ----------------------------------------------------------------------------------------------

    async def _dial(self) -> None:
        """Dial the front, and pass on until it is gone."""
        reports: asyncio.Queue[link_pb2.HostReport | None] = asyncio.Queue()
        async with self._channel.open_aio() as connection:
            call = link_pb2_grpc.RankLinkStub(connection).Relay(self._outgoing(reports))
            try:
                metadata = dict(await call.initial_metadata())
                if HEARTBEAT_METADATA in metadata:  # else it was refused, and the status below says why
                    self._heartbeat_s = float(metadata[HEARTBEAT_METADATA])
                    self._reports = reports
                    self._connected.set()
                async for commands in call:
                    for item in commands.items:
                        self._obey(item)
            finally:
                reports.put_nowait(None)

    async def _outgoing(
        self, reports: "asyncio.Queue[link_pb2.HostReport | None]"
    ) -> AsyncIterator[link_pb2.HostReport]:
        yield link_pb2.HostReport(hello=self._hello)
        while (report := await reports.get()) is not None:
            yield report

    def _obey(self, item: link_pb2.HostCommand) -> None:
        what = item.WhichOneof("what")
        if what == "step":
            self._send_step(item)
        elif what == "command":
            for link, number in zip(item.links, item.ids, strict=True):
                if (each := self._ranks.get(link)) is not None:
                    command = link_pb2.Command()
                    command.CopyFrom(item.command)
                    command.id = number
                    each.commands.put_nowait(command)
        for each in [self._ranks[link] for link in item.links if link in self._ranks]:
            if what == "accepted" and not each.accepted.done():
                each.accepted.set_result("")
            elif what == "closed":
                del self._ranks[each.link]
                each.end(item.closed)

    def _send_step(self, item: link_pb2.HostCommand) -> None:
        step, links = item.step, list(item.links)
        batch = read_host_step(step, links)
        before = self._steps.batch(step.after) if step.after else None
        if step.after and before is None:
            raise ValueError(f"step {step.step} takes tokens of step {step.after}, which was not sent here")
        self._steps.sent(batch, links)
        for link, part in zip(links, steps_of_ranks(step, batch, links, before), strict=True):
            if (each := self._ranks.get(link)) is not None:
                each.commands.put_nowait(link_pb2.Command(step=part))

    def _front_lost(self) -> None:
        """End the streams of all ranks: they dial again, and wait here for the next front."""
        self._connected.clear()
        self._reports = None
        ranks, self._ranks = self._ranks, {}
        for each in ranks.values():
            each.end()
        self._items, self._beats, self._load, self._steps = [], set(), None, StepReports()
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None


@contextlib.asynccontextmanager
async def relaying(relay: HostRelay | None) -> AsyncIterator[None]:
    """A block beside which a relay runs, if there is one."""
    running = asyncio.create_task(relay.run()) if relay is not None else None
    try:
        yield
    finally:
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
