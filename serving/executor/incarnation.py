"""A rank from the start of its process to its loss, as the front sees it."""

import asyncio
import collections
import dataclasses
from typing import Any

from serving.executor.failure_detector import Cause, failed_of_itself
from serving.executor.host_stream import HostStream
from serving.launch.rank_process import RankProcess, describe_exit
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock


@dataclasses.dataclass(frozen=True)
class Loss:
    """A rank that died or was declared dead. `evidence_at` is when the first sign of it was seen, `judged_at` when the
    failure detector decided; both on the monotonic clock."""

    rank: int
    cause: Cause
    evidence_at: float
    judged_at: float


LIMITED_BY_CALLER = frozenset({"ping", "join", "connect", "compile", "configure"})
"""Commands whose callers limit their time: they wait for other ranks, or may compile for minutes."""
BESIDE_MAIN_THREAD = frozenset({"prepare", "stage_weights"})
"""Commands that a rank obeys in threads of their own, however long they take."""


@dataclasses.dataclass(frozen=True)
class PendingCommand:
    """A command that a rank has not answered yet: its name, when it was sent, and the future of its answer."""

    what: str
    sent_at: float
    future: "asyncio.Future[link_pb2.Done]"


class Incarnation:
    """A rank from its start to its end: its process, its stream, and the futures of its answers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.process: RankProcess
        self.attached: asyncio.Future[link_pb2.Hello] = asyncio.get_running_loop().create_future()
        self.outbox: asyncio.Queue[link_pb2.Command | None] = asyncio.Queue()
        self.host_stream: HostStream | None = None
        """The stream of its host agent, for a rank that attached through it, with the number `link`."""
        self.link = 0
        self.pending_commands: dict[int, PendingCommand] = {}
        """The commands that it has not answered yet, in order; also those whose answer nobody waits for any more."""
        self.pending_steps: dict[int, asyncio.Future[Any]] = {}
        """The steps that it has not answered yet, in order; ranks of one host stream share the future of a step."""
        self.step_sent_at: float | None = None
        """When it could begin with the first pending step, on the monotonic clock."""
        self.answered_at = clock.now()
        """When its last answer came, to a command or a step."""
        self.last_heartbeat = clock.now()
        self.heartbeat_gaps: collections.deque[float] = collections.deque(maxlen=200)
        self.step_times: collections.deque[float] = collections.deque(maxlen=200)
        self.build = ""
        """The code that it runs, once it has attached."""
        self.link_version = 1
        """The version of the link protocol that it and the front speak, once it has attached."""
        self.in_plan = False
        """It was part of the last step."""
        self.compiles = 0
        self.monitored = False
        self.stream_error: str | None = None
        self.loss: Loss | None = None

    @property
    def relay(self) -> str:
        """The host whose agent passes on its stream; empty while it has a stream of its own, or none."""
        return self.host_stream.host if self.host_stream is not None and self.loss is None else ""

    def send(self, what: str, message: Any, number: int = 0) -> None:
        """Send a command; `what` is its name in the Command message."""
        if self.host_stream is not None:
            self.host_stream.send(self.link, what, message, number)
        else:
            self.outbox.put_nowait(link_pb2.Command(id=number, **{what: message}))

    def attach_through(self, stream: HostStream, link: int) -> None:
        """It has attached through its host agent: what was sent to it before goes there."""
        self.host_stream, self.link = stream, link
        stream.accept(link)
        while not self.outbox.empty():
            command = self.outbox.get_nowait()
            what = None if command is None else command.WhichOneof("what")
            if command is not None and what is not None:
                stream.send(link, what, getattr(command, what), command.id)

    def close_stream(self) -> None:
        """End its stream, after what was sent."""
        if self.host_stream is not None:
            self.host_stream.close_rank(self.link)
        self.outbox.put_nowait(None)

    def heard(self, now: float) -> None:
        """A report came from it."""
        self.heartbeat_gaps.append(now - self.last_heartbeat)
        self.last_heartbeat = now

    def take_pending_step(self, step: int, now: float) -> "asyncio.Future[Any] | None":
        """Take the future of the answer to this step, if it is still waited for."""
        waiting = self.pending_steps.pop(step, None)
        if waiting is None or waiting.done():
            return None
        if self.step_sent_at is not None:
            self.step_times.append(now - self.step_sent_at)
        self.step_sent_at = now if self.pending_steps else None
        return waiting

    def describe_exit(self) -> str:
        """How its process ended, or is just ending."""
        return describe_exit(self.process.exit_code, self.process.last_output())

    def leaves_unanswered(self, what: str) -> bool:
        """Whether it has not answered a command of this name, for which nobody waits any more."""
        return any(each.what == what and each.future.cancelled() for each in self.pending_commands.values())

    @property
    def command_since(self) -> float | None:
        """When it could begin with the command that its main thread obeys now, on the monotonic clock; None while it
        has none, one that the caller limits, or a step, which has a limit of its own."""
        if self.pending_steps or not self.pending_commands:
            return None
        first = next((each for each in self.pending_commands.values() if each.what not in BESIDE_MAIN_THREAD), None)
        if first is None or first.what in LIMITED_BY_CALLER:
            return None
        return max(first.sent_at, self.answered_at)

    @property
    def failed_of_itself(self) -> bool:
        """True once it was lost through an exception or a crash of its own."""
        return self.loss is not None and failed_of_itself(self.loss.cause, self.process.exit_code)
