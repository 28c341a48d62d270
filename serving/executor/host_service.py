"""The streams of host agents that pass on what the ranks of their hosts and the front send each other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from serving.executor.host_steps import HostAnswer
from serving.executor.host_stream import HostStream
from serving.executor.incarnation import Incarnation
from serving.launch.rank_listener import RankListener, first_report
from serving.launch.shared_listener import SharedListener
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock


class _Host:
    """A host agent that is connected: its stream, and by link the ranks that have attached through it."""

    def __init__(self, stream: HostStream) -> None:
        self.stream = stream
        self.ranks: dict[int, Incarnation] = {}


class HostService:
    """Receives what host agents report. `let_in` returns the rank that attaches with its first message, or why it is
    refused; `receive` takes any other report of a rank, `on_expert_load` counts of the routers of a host's ranks, int32
    [moe layers, experts]."""

    def __init__(
        self,
        let_in: Callable[[link_pb2.Hello], Awaitable[Incarnation | str]],
        receive: Callable[[Incarnation, link_pb2.Report], None],
        on_expert_load: Callable[[bytes], None],
    ) -> None:
        self._let_in = let_in
        self._receive = receive
        self._on_expert_load = on_expert_load
        self._listener: RankListener | SharedListener = RankListener()

    def open(self, listener: RankListener | SharedListener) -> None:
        """Begin to serve for a listener, whose host pool says which agents may connect."""
        self._listener = listener

    async def relay(
        self, reports: AsyncIterator[link_pb2.HostReport], context: Any
    ) -> AsyncIterator[link_pb2.HostCommands]:
        """The stream of one host agent."""
        hello, listener = (await first_report(reports, context)).hello, self._listener
        assert isinstance(listener, RankListener)
        assert listener.host_pool is not None, "without host agents this RPC is not served"
        refusal = listener.host_pool.refusal_of(hello, context.peer())
        if refusal is not None:
            await context.abort(*refusal)
        await context.send_initial_metadata(listener.stream_metadata)
        host = _Host(HostStream(hello.host))
        reader = asyncio.create_task(self._read(host, reports))
        try:
            async for message in host.stream.messages():
                yield message
        finally:
            reader.cancel()

    async def _read(self, host: "_Host", reports: AsyncIterator[link_pb2.HostReport]) -> None:
        why = "the host agent closed its stream"
        letting_in: set[asyncio.Task[None]] = set()
        try:
            async for report in reports:
                for item in report.items:
                    if item.WhichOneof("what") == "report" and item.report.WhichOneof("what") == "hello":
                        task = asyncio.create_task(self._attach(host, item.link, item.report.hello))
                        letting_in.add(task)
                        task.add_done_callback(letting_in.discard)
                    else:
                        self._take(host, item)
                self._take_beats(host, report)
        except (grpc.RpcError, asyncio.CancelledError, StopAsyncIteration) as error:
            why = f"the stream of its host agent broke: {type(error).__name__}"
        for task in letting_in:
            task.cancel()
        for each in host.ranks.values():
            each.stream_error = why
        host.stream.end()

    async def _attach(self, host: "_Host", link: int, hello: link_pb2.Hello) -> None:
        each = await self._let_in(hello)
        if isinstance(each, str):
            host.stream.close_rank(link, each)
            return
        host.ranks[link] = each
        each.attach_through(host.stream, link)
        if not each.attached.done():
            each.attached.set_result(hello)

    def _take(self, host: "_Host", item: link_pb2.HostItem) -> None:
        what, each = item.WhichOneof("what"), host.ranks.get(item.link)
        if what == "step_done":
            self._take_answers(host, item.step_done)
        elif what == "report" and each is not None:
            self._receive(each, item.report)
        elif what == "gone" and each is not None:
            del host.ranks[item.link]
            each.stream_error = item.gone

    @staticmethod
    def _take_answers(host: "_Host", done: link_pb2.HostStepDone) -> None:
        now, ranks = clock.now(), list[int]()
        for link, compiles in zip(done.links, done.compiles, strict=True):
            each = host.ranks.get(link)
            if each is not None and each.loss is None:
                each.heard(now)
                each.answered_at, each.compiles = now, compiles
                each.take_pending_step(done.step, now)
                ranks.append(each.rank)
        waiting = host.stream.pending_steps.get(done.step)
        if waiting is not None and len(ranks) == len(done.links):  # else a rank was lost, and with it the step
            waiting.take(HostAnswer(ranks, done))

    def _take_beats(self, host: "_Host", report: link_pb2.HostReport) -> None:
        now = clock.now()
        for link in report.beats:
            if (each := host.ranks.get(link)) is not None:
                each.heard(now)
        if report.expert_load:
            self._on_expert_load(report.expert_load)
