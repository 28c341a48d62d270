"""Ranks without a model, many in one process: they attach to a front over the real protocol and answer at once.

    python -m benchmarks.stand_ins FRONT MOE_LAYERS EXPERTS SEGMENTS BEAT_S

is such a process: it reads `RANK TOKEN` lines, and plays one rank for each, on a connection of its own. An answer to a
step has the size of a real one: tokens and log-probabilities of the largest bucket, and the counts of the router.
Left out is all that a rank does: compute, load, connect, exchange, and die.
"""

import asyncio
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import grpc

from serving.proto.moejax.v1 import link_pb2
from serving.rank_listener import OPTIONS, SERVICE
from serving.rank_process import Ended, Home, RankProcess

OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Without it all channels of a process share one connection."""


@dataclasses.dataclass
class StandIn:
    """One such rank, as its front sees a process. It ends when it is told to, and at once."""

    token: str
    ended: Ended
    pid: int | None = None
    state: str = ""
    home: Home | None = None

    def signal(self, name: str) -> None:
        """See `RankProcess.signal`."""

    async def fenced(self) -> None:
        """See `RankProcess.fenced`."""

    def said(self) -> str:
        """See `RankProcess.said`."""
        return "nothing"

    def end(self) -> None:
        """See `RankProcess.end`."""


class StandIns:
    """A launcher of such ranks, dealt out to a few processes; see `serving.rank_process.Launcher`."""

    def __init__(self, processes: int, *, moe_layers: int, experts: int, segments: int, beat_s: float) -> None:
        self._told = [str(moe_layers), str(experts), str(segments), str(beat_s)]
        self._count = processes
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, front: str, ended: Ended) -> RankProcess:
        """See `Launcher.start`."""
        if not self._processes:
            command = [sys.executable, "-m", "benchmarks.stand_ins", front, *self._told]
            quiet = os.environ | {"GRPC_VERBOSITY": "NONE"}
            self._processes = [
                subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=quiet) for _ in range(self._count)
            ]
        token = f"stand-in-{rank}"
        process = self._processes[rank % self._count]
        assert process.stdin is not None
        process.stdin.write(f"{rank} {token}\n")
        process.stdin.flush()
        return StandIn(token, ended)

    def left(self) -> Mapping[int, Callable[[Ended], RankProcess]]:
        """See `Launcher.left`."""
        return {}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()


class Answers:
    """What stand-ins say, made once."""

    def __init__(self, moe_layers: int, experts: int, segments: int) -> None:
        self._row = bytes(4 * segments)
        self._load = bytes(4 * moe_layers * experts)

    def to(self, rank: int, command: link_pb2.Command) -> link_pb2.Report | None:
        """The answer to a command, if it has one."""
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
            expert_load=self._load,
            own_ms=1.0,
        )
        return link_pb2.Report(rank=rank, step_done=done)


async def play(front: str, rank: int, token: str, answers: Answers, beat_s: float) -> None:
    """One rank, until the front ends its stream."""
    async with grpc.aio.insecure_channel(front, options=(*OPTIONS, OWN_CONNECTION)) as channel:
        attach = channel.stream_stream(
            f"/{SERVICE}/Attach",
            request_serializer=link_pb2.Report.SerializeToString,
            response_deserializer=link_pb2.Command.FromString,
        )
        stream, turn = attach(), asyncio.Lock()

        async def say(report: link_pb2.Report) -> None:
            async with turn:  # a stream takes one message at a time
                await stream.write(report)

        await say(link_pb2.Report(rank=rank, hello=link_pb2.Hello(pid=os.getpid(), token=token)))
        beating = asyncio.create_task(_beat(say, rank, beat_s)) if beat_s else None
        try:
            while isinstance(command := await stream.read(), link_pb2.Command):
                answer = answers.to(rank, command)
                if answer is not None:
                    await say(answer)
        finally:
            if beating is not None:
                beating.cancel()


async def _beat(say: Callable[[link_pb2.Report], Awaitable[None]], rank: int, beat_s: float) -> None:
    began = time.monotonic()
    for number in itertools.count(1):
        await asyncio.sleep(max(0.0, began + number * beat_s - time.monotonic()))
        await say(link_pb2.Report(rank=rank, heartbeat=link_pb2.Heartbeat()))


async def main() -> None:
    """Play the ranks named on standard input until the front is gone."""
    front, *numbers, beat_s = sys.argv[1:]
    answers = Answers(*map(int, numbers))
    ranks = []
    while line := await asyncio.to_thread(sys.stdin.readline):
        rank, token = line.split()
        ranks.append(asyncio.create_task(play(front, int(rank), token, answers, float(beat_s))))
    await asyncio.gather(*ranks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main())
