"""Simulated ranks without a model, many in one process: they attach to a front over the real protocol, and answer
at once.

    python -m benchmarks.simulated_ranks FRONT PER_HOST MOE_LAYERS EXPERTS SEGMENTS HEARTBEAT_S

is such a process: it reads `RANK TOKEN` lines, and simulates one rank for each. With PER_HOST 0 each has a connection
of its own, and its answer to a step has the size of a real one: tokens and log-probabilities of the largest bucket, and
the counts of the router. Else so many consecutive ranks are those of a host, whose agent answers for all of them.
Simulated ranks compute, load, connect and exchange nothing, and do not die.
"""

import asyncio
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import grpc
import numpy as np

from serving.executor.host_relay import LOAD_S
from serving.launch.rank_listener import GRPC_OPTIONS, SERVICE
from serving.launch.rank_process import HostPaths, OnExit, RankProcess
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.versions import HOST

OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Channel option without which all channels of a process share one connection."""


@dataclasses.dataclass
class SimulatedRank:
    """The process of a simulated rank as its front sees it. It ends at once."""

    token: str
    on_exit: OnExit
    pid: int | None = None
    state: str = ""
    host_paths: HostPaths | None = None
    exit_code: int | None = None

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`."""

    async def fenced(self) -> None:
        """See `RankProcess.fenced`."""

    def run_delay_s(self) -> float | None:
        """See `RankProcess.run_delay_s`."""

    def last_output(self) -> str:
        """See `RankProcess.last_output`."""
        return "nothing"

    def end(self) -> None:
        """See `RankProcess.end`."""


class SimulatedRanks:
    """Starts simulated ranks, spread over a few processes; see `serving.launch.rank_process.RankStarter`."""

    def __init__(
        self, processes: int, *, per_host: int, moe_layers: int, experts: int, segments: int, heartbeat_s: float
    ) -> None:
        self._per_host = per_host
        self._arguments = [str(per_host), str(moe_layers), str(experts), str(segments), str(heartbeat_s)]
        self._count = processes
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, front: str, on_exit: OnExit) -> RankProcess:
        """See `RankStarter.start`."""
        if not self._processes:
            command = [sys.executable, "-m", "benchmarks.simulated_ranks", front, *self._arguments]
            quiet = os.environ | {"GRPC_VERBOSITY": "NONE"}
            self._processes = [
                subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=quiet) for _ in range(self._count)
            ]
        token = f"stand-in-{rank}"
        process = self._processes[rank // max(1, self._per_host) % self._count]
        assert process.stdin is not None
        process.stdin.write(f"{rank} {token}\n")
        process.stdin.flush()
        return SimulatedRank(token, on_exit)

    def orphans(self) -> Mapping[int, Callable[[OnExit], RankProcess]]:
        """See `RankStarter.orphans`."""
        return {}

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


class SimulatedAnswers:
    """The answers of simulated ranks, made once."""

    def __init__(self, moe_layers: int, experts: int, segments: int) -> None:
        self._row = bytes(4 * segments)
        self.load = bytes(4 * moe_layers * experts)
        """Counts of the router."""

    def to(self, rank: int, command: link_pb2.Command) -> link_pb2.Report | None:
        """The answer of a rank to a command; None for a command that has none."""
        what = command.WhichOneof("what")
        if what == "abort":
            return None
        if what != "step":
            return link_pb2.Report(rank=rank, done=link_pb2.Done(id=command.id, shares_memory=True))
        done = link_pb2.StepDone(
            epoch=command.step.epoch,
            step=command.step.step,
            tokens=self._row,
            logprobs=self._row,
            expert_load=self.load,
            own_ms=1.0,
        )
        return link_pb2.Report(rank=rank, step_done=done)


async def simulate(front: str, rank: int, token: str, answers: SimulatedAnswers, heartbeat_s: float) -> None:
    """Simulate one rank until the front ends its stream."""
    async with grpc.aio.insecure_channel(front, options=(*GRPC_OPTIONS, OWN_CONNECTION)) as channel:
        attach = channel.stream_stream(
            f"/{SERVICE}/Attach",
            request_serializer=link_pb2.Report.SerializeToString,
            response_deserializer=link_pb2.Command.FromString,
        )
        stream, write_lock = attach(), asyncio.Lock()

        async def send(report: link_pb2.Report) -> None:
            async with write_lock:  # a stream takes one message at a time
                await stream.write(report)

        await send(link_pb2.Report(rank=rank, hello=link_pb2.Hello(pid=os.getpid(), token=token)))
        heartbeats = asyncio.create_task(_send_heartbeats(send, rank, heartbeat_s)) if heartbeat_s else None
        try:
            while isinstance(command := await stream.read(), link_pb2.Command):
                answer = answers.to(rank, command)
                if answer is not None:
                    await send(answer)
        finally:
            if heartbeats is not None:
                heartbeats.cancel()


class SimulatedHost:
    """An agent whose ranks answer at once: it collects nothing, as nothing is late."""

    def __init__(self, front: str, ranks: Mapping[int, str], answers: SimulatedAnswers, heartbeat_s: float) -> None:
        self._front = front
        self._ranks = ranks
        self._answers = answers
        self._heartbeat_s = heartbeat_s
        self._reports: asyncio.Queue[link_pb2.HostReport] = asyncio.Queue()

    async def run(self) -> None:
        """Simulate the ranks of the host until the front ends its stream."""
        async with grpc.aio.insecure_channel(self._front, options=(*GRPC_OPTIONS, OWN_CONNECTION)) as channel:
            relay = channel.stream_stream(
                f"/{SERVICE}/Relay",
                request_serializer=link_pb2.HostReport.SerializeToString,
                response_deserializer=link_pb2.HostCommands.FromString,
            )
            hello = link_pb2.HostHello(oldest=HOST.oldest, newest=HOST.newest)
            self._reports.put_nowait(link_pb2.HostReport(hello=hello))
            call = relay(self._outgoing())
            await call.initial_metadata()
            for rank, token in self._ranks.items():
                hello = link_pb2.Report(rank=rank, hello=link_pb2.Hello(pid=os.getpid(), token=token))
                self._reports.put_nowait(link_pb2.HostReport(items=[link_pb2.HostItem(link=rank, report=hello)]))
            beats = asyncio.create_task(self._send_heartbeats()) if self._heartbeat_s else None
            try:
                async for commands in call:
                    for item in commands.items:
                        self._answer(item)
            finally:
                if beats is not None:
                    beats.cancel()

    def _answer(self, item: link_pb2.HostCommand) -> None:
        what, items = item.WhichOneof("what"), []
        if what == "step":
            counts = np.frombuffer(item.step.counts, np.int32)
            row = bytes(4 * int(counts.sum()))
            done = link_pb2.HostStepDone(
                epoch=item.step.epoch, step=item.step.step, links=item.links, tokens=row, logprobs=row
            )
            done.compiles.extend([0] * len(item.links))
            done.times = np.ones(3 * len(item.links), np.float32).tobytes()
            items.append(link_pb2.HostItem(step_done=done))
        elif what == "command":
            for link, number in zip(item.links, item.ids, strict=True):
                item.command.id = number
                if (report := self._answers.to(link, item.command)) is not None:
                    items.append(link_pb2.HostItem(link=link, report=report))
        if items:
            self._reports.put_nowait(link_pb2.HostReport(items=items))

    async def _send_heartbeats(self) -> None:
        began, load = time.monotonic(), self._answers.load
        for number in itertools.count(1):
            await asyncio.sleep(max(0.0, began + number * self._heartbeat_s - time.monotonic()))
            report = link_pb2.HostReport(beats=self._ranks)
            if number * self._heartbeat_s % LOAD_S < self._heartbeat_s:
                report.expert_load = load
            self._reports.put_nowait(report)

    async def _outgoing(self) -> AsyncIterator[link_pb2.HostReport]:
        while True:
            yield await self._reports.get()


async def _send_heartbeats(send: Callable[[link_pb2.Report], Awaitable[None]], rank: int, heartbeat_s: float) -> None:
    began = time.monotonic()
    for number in itertools.count(1):
        await asyncio.sleep(max(0.0, began + number * heartbeat_s - time.monotonic()))
        await send(link_pb2.Report(rank=rank, heartbeat=link_pb2.Heartbeat()))


async def main() -> None:
    """Simulate the ranks named on standard input until the front is gone."""
    front, per_host, *numbers, heartbeat_s = sys.argv[1:]
    answers = SimulatedAnswers(*map(int, numbers))
    running, on_host = [], dict[int, str]()
    while line := await asyncio.to_thread(sys.stdin.readline):
        rank, token = line.split()
        if per_host == "0":
            running.append(asyncio.create_task(simulate(front, int(rank), token, answers, float(heartbeat_s))))
            continue
        on_host[int(rank)] = token
        if len(on_host) == int(per_host):
            host = SimulatedHost(front, on_host, answers, float(heartbeat_s))
            running.append(asyncio.create_task(host.run()))
            on_host = {}
    await asyncio.gather(*running, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
