"""A simulated rank: a process with a main thread that obeys commands in order, a receiver, a loader and heartbeats.

It follows `serving.worker.front_link` and `serving.worker.rank`; what it holds is `simulation.hand_rank`. Everything it
does is a callback of the event loop, so that it can be stopped and killed between any two of them.
"""

import asyncio
import collections
import random
from collections.abc import Callable
from typing import Any, Protocol

from serving.executor.kv_replica import NotReplicated
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from simulation.exchange import ENTER_S, Communicator, Coordinators, Gathering, Member, SimulatedCoordinator
from simulation.hand_rank import HandRank
from simulation.link import Stream
from simulation.process import Process
from simulation.rank_steps import RankSteps

REDIAL_S = 0.05
"""As `serving.worker.front_link.REDIAL_S`."""
SECONDS: dict[str, tuple[float, float]] = {
    "configure": (0.02, 0.2),
    "join": (0.01, 0.05),
    "compile": (0.005, 0.05),
    "prepare": (0.005, 0.08),
    "connect": (0.002, 0.02),
    "adopt": (0.002, 0.02),
    "hold": (0.005, 0.05),
}
"""The least and the most virtual seconds that a command takes; any other takes OTHER_SECONDS."""
OTHER_SECONDS = (0.0005, 0.004)
STAGE_S = (0.01, 0.5)
"""The least and the most virtual seconds in which a rank loads other weights beside its steps."""
READ_EXPERT_S = 0.005
"""Virtual seconds to read an expert from the store."""


class RankWorld(Protocol):
    """The surroundings of a rank."""

    coordinators: Coordinators
    shares_memory: bool

    def dial(self, rank: "SimulatedRank") -> Stream | None:
        """A stream to the front; None when there is none."""
        ...

    def entering(self, rank: "SimulatedRank", service: SimulatedCoordinator) -> None:
        """A rank begins to enter a generation."""
        ...

    def connecting(self, key: object, mesh: MeshKey) -> Gathering:
        """Where the ranks of a mesh meet that a Connect command names."""
        ...

    def communicator(self, key: object) -> Communicator:
        """The communicator that was connected there."""
        ...

    def adopted(self, rank: "SimulatedRank", message: link_pb2.Adopt, stream: Stream) -> None:
        """A rank has adopted a plan that came in a stream."""
        ...

    def violated(self, law: str) -> None:
        """Something happened that must not."""
        ...

    def note(self, text: str) -> None:
        """A line of the trace."""
        ...


class SimulatedRank(Process):
    """One process of a rank. `stays`: it dials the next front when its front has gone."""

    def __init__(
        self,
        world: RankWorld,
        hand: HandRank,
        *,
        pid: int,
        token: str,
        stays: bool,
        draw: random.Random,
        ended: Callable[["SimulatedRank", str], None],
    ) -> None:
        super().__init__()
        self.world = world
        self.hand = hand
        self.rank = hand.rank
        self.pid = pid
        self.token = token
        self.stays = stays
        self.joins = False
        """It is a replacement that has not adopted a plan yet."""
        self.stuck = False
        """The main thread hangs; heartbeats go on."""
        self.slowness = 1.0
        self.steps = RankSteps(self)
        self.draw = draw
        self._ended = ended
        self._inbox: collections.deque[tuple[Stream, link_pb2.Command]] = collections.deque()
        self._loading: collections.deque[tuple[Stream, link_pb2.Command]] = collections.deque()
        self._busy = False
        self._loader_busy = False
        self._stream: Stream | None = None
        self._void_connects = 0
        self._loaded: set[MeshKey] = set()
        self.communicators: dict[MeshKey, Communicator] = {}
        self._connecting: Gathering | None = None
        self.exchanged_with: list[Member] = []
        """The processes that took part in its last step."""
        self.exited = asyncio.Event()
        self.later(self.draw.uniform(0.05, 0.5), self._dial)
        self.later(0.2, self._heartbeat)

    # -- The process --------------------------------------------------------------------------------------------

    def stick(self) -> None:
        """The main thread obeys nothing more after what it does now; receiver, loader and heartbeats go on."""
        self.stuck = True

    def unstick(self) -> None:
        """The main thread goes on."""
        self.stuck = False
        self._next()

    def die(self, how: str) -> None:
        """The process ends."""
        if not self.alive:
            return
        copied = self.hand.copy_last(part=True)
        self.alive = False
        self.world.note(f"rank {self.rank} (process {self.pid}) ends: {how}")
        if self._stream is not None:
            for message in copied:
                self._stream.report(link_pb2.Report(rank=self.rank, copied=message))
            self._stream.close("the process has ended")
        self.hand.close()
        self.exited.set()
        self._ended(self, how)

    # -- The link -----------------------------------------------------------------------------------------------

    def _dial(self) -> None:
        stream = self.world.dial(self)
        if stream is None:
            self.later(REDIAL_S, self._dial)
            return
        self._stream = stream
        stream.report(link_pb2.Report(rank=self.rank, hello=self.hand.hello(self.token, self.pid)))

    def receive(self, stream: Stream, command: link_pb2.Command) -> None:
        """A command has arrived."""
        self.later(0.0, lambda: self._received(stream, command))

    def stream_ended(self, stream: Stream, *, refused: bool) -> None:
        """A stream has ended."""
        self.later(0.0, lambda: self._front_gone(stream, refused=refused))

    def _received(self, stream: Stream, command: link_pb2.Command) -> None:
        name = command.WhichOneof("what")
        if name == "abort":
            self._abort(command.abort.epoch, command.abort.connecting)
        elif name == "stop":
            self.die("stopped by its front")
        else:
            self._inbox.append((stream, command))
            self._next()

    def _front_gone(self, stream: Stream, *, refused: bool) -> None:
        if stream is not self._stream:
            return
        if refused or not self.stays:
            self.die("its front is gone")
            return
        self._void_connects = 1 << 62
        self._abort(max(self.hand.epoch, 0), 0)
        self.later(REDIAL_S, self._dial)

    def _heartbeat(self) -> None:
        if self._stream is not None:
            self._stream.report(link_pb2.Report(rank=self.rank, heartbeat=link_pb2.Heartbeat()))
        self.later(self._stream.heartbeat_s if self._stream is not None else 0.2, self._heartbeat)

    # -- Commands -----------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """The main thread takes the next command."""
        while self._inbox and not self._busy and not self.stuck:
            stream, command = self._inbox.popleft()
            name = command.WhichOneof("what")
            if stream.closed or name is None:
                continue
            if name == "prepare":
                self._loading.append((stream, command))
                self._load_next()
                continue
            if name == "stage_weights":
                self._stage(stream, command)
                continue
            self._busy = True
            self.replicate(stream)
            if name == "step":
                self.steps.run(stream, command.step)
            elif name == "join":
                self._join(stream, command)
            elif name == "connect":
                self._connect(stream, command)
            else:
                self._work(stream, command, name)

    def _work(self, stream: Stream, command: link_pb2.Command, name: str) -> None:
        least, most = SECONDS.get(name, OTHER_SECONDS)
        self.later(self.slowness * self.draw.uniform(least, most), lambda: self._obey(stream, command, name))

    def _join(self, stream: Stream, command: link_pb2.Command) -> None:
        """Enter a generation: an error when its coordination service has ended; JAX's client ends the process when it
        ends meanwhile."""
        service = self.world.coordinators.services[command.join.address]
        if service.returncode is not None:
            self.later(0.0, lambda: self._fail(stream, command.id, "ConnectionRefusedError: nobody listens"))
            return
        self.world.entering(self, service)

        def entered() -> None:
            if service.returncode is None:
                self._obey(stream, command, "join")
            else:
                self.later(ENTER_S, lambda: self.die("code 1: the coordination service has ended"))

        self.later(self.slowness * self.draw.uniform(*SECONDS["join"]), entered)

    def _gathered(self, stream: Stream, command: link_pb2.Command, name: str, why: str) -> None:
        """All ranks have come, or waiting for them has failed."""
        if why:
            self.later(0.0, lambda: self._fail(stream, command.id, why))
        else:
            self._work(stream, command, name)

    def _obey(self, stream: Stream, command: link_pb2.Command, name: str) -> None:
        message = getattr(command, name)
        try:
            fields: dict[str, Any] = getattr(self.hand, name, lambda _: {})(message)
        except (NotReplicated, LookupError, OSError) as error:
            self._fail(stream, command.id, f"{type(error).__name__}: {error}")
            return
        except AssertionError as error:
            self.world.violated(f"rank {self.rank} obeys {name}: {error}")
            fields = {}
        extra = 0.0
        if name == "configure":
            fields["shares_memory"] = self.world.shares_memory
            self._void_connects = 0
        elif name == "join":
            self.communicators.clear()
            self._loaded.clear()
        elif name == "seat":
            self.communicators = {k: c for k, c in self.communicators.items() if message.rank not in k.ranks}
            self._loaded = {key for key in self._loaded if message.rank not in key.ranks}
        elif name == "adopt":
            self.world.adopted(self, message, stream)
            extra = READ_EXPERT_S * fields["experts_loaded"]
        done = link_pb2.Done(id=command.id, compiles=0, **fields)
        self.later(self.slowness * extra, lambda: self._done(stream, done))

    def _done(self, stream: Stream, done: link_pb2.Done) -> None:
        self._send_copied(stream)
        stream.report(link_pb2.Report(rank=self.rank, done=done))
        self.free()

    def _fail(self, stream: Stream, command_id: int, why: str) -> None:
        stream.report(link_pb2.Report(rank=self.rank, failed=link_pb2.Failed(id=command_id, error=why)))
        self.free()

    def free(self) -> None:
        """The main thread has done what it did."""
        self._busy = False
        self._next()

    def _load_next(self) -> None:
        if not self._loading or self._loader_busy:
            return
        self._loader_busy = True
        stream, command = self._loading.popleft()

        def loaded() -> None:
            self._loader_busy = False
            self._loaded.add(MeshKey.read(command.prepare.mesh))
            stream.report(link_pb2.Report(rank=self.rank, done=link_pb2.Done(id=command.id)))
            self._load_next()

        self.later(self.slowness * self.draw.uniform(*SECONDS["prepare"]), loaded)

    def _stage(self, stream: Stream, command: link_pb2.Command) -> None:
        """Load other weights, on a thread of its own."""
        voided = self.hand.stagings_voided

        def staged() -> None:
            try:
                self.hand.stage_weights(command.stage_weights, voided)
            except LookupError as error:
                why = link_pb2.Failed(id=command.id, error=str(error))
                stream.report(link_pb2.Report(rank=self.rank, failed=why))
                return
            stream.report(link_pb2.Report(rank=self.rank, done=link_pb2.Done(id=command.id)))

        self.later(self.slowness * self.draw.uniform(*STAGE_S), staged)

    # -- Meshes -------------------------------------------------------------------------------------------------

    def _connect(self, stream: Stream, command: link_pb2.Command) -> None:
        message, key = command.connect, MeshKey.read(command.connect.mesh)
        if message.number <= self._void_connects:
            why = f"mesh {key.ranks} was given up before its turn: one of its ranks is lost"
            self.later(0.0, lambda: self._fail(stream, command.id, why))
            return
        if key not in self._loaded:
            self.later(0.0, lambda: self._fail(stream, command.id, f"KeyError: mesh {key.ranks} is not loaded"))
            return
        at = (stream.origin.executor, message.number)
        self._connecting = gathering = self.world.connecting(at, key)

        def connected(why: str) -> None:
            self._connecting = None
            if not why:
                self.communicators[key] = self.world.communicator(at)
            self._gathered(stream, command, "connect", why)

        gathering.come(self, connected)

    def _abort(self, epoch: int, connecting: int) -> None:
        self._void_connects = max(self._void_connects, connecting)
        if self._connecting is not None:
            self._connecting.leave(self.rank, "aborted")
        if connecting:
            return
        self.hand.aborted_epoch = max(self.hand.aborted_epoch, epoch)
        if self.hand.mesh is not None and self.hand.epoch <= epoch:
            communicator = self.communicators.get(self.hand.mesh)
            if communicator is not None:
                communicator.abort(self.rank, "aborted")

    def replicate(self, stream: Stream) -> None:
        """Copy what the last step wrote."""
        for message in self.hand.copy_last():
            stream.report(link_pb2.Report(rank=self.rank, copied=message))

    def _send_copied(self, stream: Stream) -> None:
        for message in self.hand.take_messages():
            stream.report(link_pb2.Report(rank=self.rank, copied=message))
