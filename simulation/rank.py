"""A simulated rank: a process with a main thread that obeys commands in order, a receiver, a loader and heartbeats.

It follows `serving.worker.front_link` and `serving.worker.rank`; what it holds is `simulation.hand_rank`. Everything it
does is a callback of the event loop, so that it can be stopped and killed between any two of them.
"""

import asyncio
import collections
import contextvars
import dataclasses
import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from serving.executor.kv_replica import NotReplicated
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from simulation.exchange import Communicator, Coordinators, Gathering, Member
from simulation.hand_rank import HandRank
from simulation.link import Stream

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
COPY_S = 0.002
"""Most virtual seconds between the report of a step and the copy of what it wrote."""


class RankWorld(Protocol):
    """The surroundings of a rank."""

    coordinators: Coordinators
    shares_memory: bool

    def dial(self, rank: "SimulatedRank") -> Stream | None:
        """A stream to the front; None when there is none."""
        ...

    def connecting(self, key: object, mesh: MeshKey) -> Gathering:
        """Where the ranks of a mesh meet that a Connect command names."""
        ...

    def communicator(self, key: object) -> Communicator:
        """The communicator that was connected there."""
        ...

    def adopted(self, rank: "SimulatedRank", message: link_pb2.Adopt, front: object) -> None:
        """A rank has adopted a plan."""
        ...

    def violated(self, law: str) -> None:
        """Something happened that must not."""
        ...

    def note(self, text: str) -> None:
        """A line of the trace."""
        ...


@dataclasses.dataclass
class InjectedNonFinite:
    """Steps of a rank that come out without numbers: the next `steps` with work."""

    steps: int = 0
    made: int = 0


class SimulatedRank:
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
        self.world = world
        self.hand = hand
        self.rank = hand.rank
        self.pid = pid
        self.token = token
        self.stays = stays
        self.alive = True
        self.doomed = False
        """It was sent SIGKILL."""
        self.joins = False
        """It is a replacement that has not adopted a plan yet."""
        self.stopped = False
        self.starved_since: float | None = None
        """Since when its process waits for a processor; None while it has one."""
        self._starved_until = self._starved_s = 0.0
        self.stuck = False
        """The main thread hangs; heartbeats go on."""
        self.slowness = 1.0
        self.non_finite = InjectedNonFinite()
        self._draw = draw
        self._ended = ended
        self._context = contextvars.Context()
        self._deferred: list[Callable[[], None]] = []
        self._inbox: collections.deque[tuple[Stream, link_pb2.Command]] = collections.deque()
        self._loading: collections.deque[tuple[Stream, link_pb2.Command]] = collections.deque()
        self._busy = False
        self._loader_busy = False
        self._stream: Stream | None = None
        self._void_connects = 0
        self._loaded: set[MeshKey] = set()
        self._communicators: dict[MeshKey, Communicator] = {}
        self._connecting: Gathering | None = None
        self.exchanged_with: list[Member] = []
        """The processes that took part in its last step."""
        self.exited = asyncio.Event()
        self.later(self._draw.uniform(0.05, 0.5), self._dial)
        self.later(0.2, self._heartbeat)

    # -- The process --------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The kernel's letter for the process."""
        if not self.alive:
            return "X"
        return "T" if self.stopped else "S" if self.starved_since is None else "R"

    @property
    def held(self) -> bool:
        """It runs nothing: it is stopped, or waits for a processor."""
        return self.stopped or self.starved_since is not None

    def run_delay_s(self) -> float:
        """Seconds for which it has waited for a processor since its start."""
        now = asyncio.get_running_loop().time()
        return self._starved_s + (0.0 if self.starved_since is None else now - self.starved_since)

    def starve(self, seconds: float) -> None:
        """Its process gets no processor for a while."""
        loop = asyncio.get_running_loop()
        if self.starved_since is None:
            self.starved_since = loop.time()
        self._starved_until = max(self._starved_until, loop.time() + seconds)
        loop.call_later(seconds, lambda: loop.time() < self._starved_until or self.feed())

    def feed(self) -> None:
        """Its process gets a processor."""
        self._starved_s, self.starved_since = self.run_delay_s(), None
        self._resume()

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something in a while, if this process runs then; once it goes on, if it is held then."""

        def due() -> None:
            if not self.alive:
                return
            if self.held:
                self._deferred.append(act)
            else:
                act()

        asyncio.get_running_loop().call_later(seconds, due, context=self._context)

    def stick(self) -> None:
        """The main thread obeys nothing more after what it does now; receiver, loader and heartbeats go on."""
        self.stuck = True

    def unstick(self) -> None:
        """The main thread goes on."""
        self.stuck = False
        self._next()

    def signal(self, name: str) -> None:
        """A signal arrives."""
        if name == "SIGSTOP":
            self.stopped = True
        elif name == "SIGCONT" and self.stopped:
            self.stopped = False
            self._resume()
        elif name == "SIGKILL":
            self.die("signal 9")

    def _resume(self) -> None:
        deferred, self._deferred = self._deferred, []
        for act in deferred:
            self.later(0.0, act)

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
            self._replicate(stream)
            if name == "step":
                self._step(stream, command.step)
            elif name == "join":
                service = self.world.coordinators.services.get(command.join.address)
                if service is None:
                    self._fail(stream, command.id, "there is no coordination service")
                else:
                    service.join(self, lambda why, at=(stream, command): self._entered(*at, why))
            elif name == "connect":
                self._connect(stream, command)
            else:
                self._work(stream, command, name)

    def _work(self, stream: Stream, command: link_pb2.Command, name: str) -> None:
        least, most = SECONDS.get(name, OTHER_SECONDS)
        self.later(self.slowness * self._draw.uniform(least, most), lambda: self._obey(stream, command, name))

    def _entered(self, stream: Stream, command: link_pb2.Command, why: str) -> None:
        """All ranks have come to the coordination service, or JAX's client ends this process."""
        if why:
            self.later(0.0, lambda: self.die(f"signal 6: {why}"))
        else:
            self._work(stream, command, "join")

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
            self._communicators.clear()
            self._loaded.clear()
        elif name == "seat":
            self._communicators = {k: c for k, c in self._communicators.items() if message.rank not in k.ranks}
            self._loaded = {key for key in self._loaded if message.rank not in key.ranks}
        elif name == "adopt":
            self.world.adopted(self, message, stream.front)
            extra = READ_EXPERT_S * fields["experts_loaded"]
        done = link_pb2.Done(id=command.id, compiles=0, **fields)
        self.later(self.slowness * extra, lambda: self._done(stream, done))

    def _done(self, stream: Stream, done: link_pb2.Done) -> None:
        self._send_copied(stream)
        stream.report(link_pb2.Report(rank=self.rank, done=done))
        self._free()

    def _fail(self, stream: Stream, command_id: int, why: str) -> None:
        stream.report(link_pb2.Report(rank=self.rank, failed=link_pb2.Failed(id=command_id, error=why)))
        self._free()

    def _free(self) -> None:
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

        self.later(self.slowness * self._draw.uniform(*SECONDS["prepare"]), loaded)

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

        self.later(self.slowness * self._draw.uniform(*STAGE_S), staged)

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
        at = (stream.executor, message.number)
        self._connecting = gathering = self.world.connecting(at, key)

        def connected(why: str) -> None:
            self._connecting = None
            if not why:
                self._communicators[key] = self.world.communicator(at)
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
            communicator = self._communicators.get(self.hand.mesh)
            if communicator is not None:
                communicator.abort(self.rank, "aborted")

    # -- Steps --------------------------------------------------------------------------------------------------

    def _step(self, stream: Stream, part: link_pb2.Step) -> None:
        why = self.hand.why_stale(part)
        if not why and part.epoch <= self.hand.aborted_epoch:
            why = f"epoch {part.epoch} was aborted"
        communicator = self._communicators.get(self.hand.mesh) if self.hand.mesh is not None else None
        if not why and communicator is None:
            why = f"mesh {self.hand.mesh} is not connected"
        if why or communicator is None:
            self.later(0.0, lambda: self._step_failed(stream, part, why))
            return
        began = asyncio.get_running_loop().time()

        def exchanged(why: str) -> None:
            if why:
                self.later(0.0, lambda: self._step_failed(stream, part, why, exchange=True))
            else:
                self.exchanged_with = list(communicator.members.values())
                delay = self.slowness * self._draw.uniform(0.0, 0.002)
                self.later(delay, lambda: self._exchanged(stream, part, began))

        communicator.exchange(self, part, exchanged)

    def _exchanged(self, stream: Stream, part: link_pb2.Step, began: float) -> None:
        arrays = self.hand.inputs(part)
        rows = np.flatnonzero(arrays["positions"] >= 0)
        void = bool(part.after) and self.hand.chosen is None
        non_finite = len(rows) > 0 and self._is_non_finite()
        if non_finite or void:
            self.hand.last, self.hand.chosen = part.step, None
            bad = [int(row) for row in rows[: self._draw.randint(1, len(rows))]] if non_finite else []
            self._step_failed(stream, part, f"{len(bad)} rows came out as not-a-number or infinite", bad)
            return
        try:
            fields = self.hand.run(part, arrays)
        except AssertionError as error:
            self.world.violated(f"rank {self.rank} runs step {part.step} of epoch {part.epoch}: {error}")
            self._step_failed(stream, part, "a law was broken")
            return
        milliseconds = 1e3 * (asyncio.get_running_loop().time() - began)
        own_ms = self.slowness * self._draw.uniform(0.5, 1.0)
        done: dict[str, Any] = {"program_ms": milliseconds, "total_ms": milliseconds, "own_ms": own_ms}
        report = link_pb2.StepDone(epoch=part.epoch, step=part.step, **fields, **done)
        stream.report(link_pb2.Report(rank=self.rank, step_done=report))
        self.later(self._draw.uniform(0.0, COPY_S), lambda: self._copied(stream))

    def _copied(self, stream: Stream) -> None:
        self._replicate(stream)
        self._free()

    def _step_failed(
        self, stream: Stream, part: link_pb2.Step, why: str, rows: list[int] | None = None, *, exchange: bool = False
    ) -> None:
        failed = link_pb2.StepFailed(
            epoch=part.epoch, step=part.step, error=why, non_finite_rows=rows or [], exchange=exchange
        )
        stream.report(link_pb2.Report(rank=self.rank, step_failed=failed))
        self._free()

    def _is_non_finite(self) -> bool:
        """Whether this step of this rank comes out without numbers."""
        if self.non_finite.steps:
            self.non_finite.steps -= 1
            self.non_finite.made += 1
            return True
        mesh, routes = self.hand.mesh, self.hand.routes
        communicator = self._communicators.get(mesh) if mesh is not None else None
        if mesh is None or routes is None or communicator is None:
            return False
        for at, rank in enumerate(mesh.expert_ranks):
            for (layer, slot), damage in communicator.members[rank].hand.damaged.items():
                if damage == "nan" and at * mesh.slots + slot in routes[layer]:
                    self.non_finite.made += 1
                    return True
        return False

    def _replicate(self, stream: Stream) -> None:
        for message in self.hand.copy_last():
            stream.report(link_pb2.Report(rank=self.rank, copied=message))

    def _send_copied(self, stream: Stream) -> None:
        for message in self.hand.take_messages():
            stream.report(link_pb2.Report(rank=self.rank, copied=message))
