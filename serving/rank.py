"""One rank: a process with one device. It owns weights in slots, cache pages and executables, and decides nothing.

    python -m serving.rank        (started by the front, which tells it the rest by environment and stream)

The main thread obeys commands in order. Another thread receives them, so that an abort is taken while a step hangs
in a collective; a third sends heartbeats; a fourth loads executables beside the steps.
"""

import concurrent.futures
import ctypes
import dataclasses
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.executables import CompileCounter, ExecutableStore
from moejax.inputs import Bucket, idle
from moejax.programs import (
    LocalPrograms,
    MeshPrograms,
    ModelShape,
    compile_missing,
    local_lowerings,
    mesh_lowerings,
)
from moejax.recovery import LiveArrays
from moejax.store import HostStore
from moejax.world import World, configure_process
from serving.proto.moejax.v1 import link_pb2, link_pb2_grpc

FRONT, RANK, TOKEN = "MOEJAX_LINK_FRONT", "MOEJAX_LINK_RANK", "MOEJAX_LINK_TOKEN"
"""Environment variables that the front starts a rank with."""

HEARTBEAT_S = 0.05
MESSAGE_BYTES = 64 << 20
WARM_ROWS = 8
"""Steps of at most so many rows are loaded first, and run once before they are needed."""

MeshKey = tuple[tuple[int, ...], int]


@dataclasses.dataclass(frozen=True)
class Adopted:
    """The plan a rank is part of: its mesh, and how a step's arguments are made."""

    epoch: int
    mesh: MeshKey
    arguments: Callable[[jax.Array], Any]


class Rank:
    """The state of a rank between commands."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.compiles = CompileCounter()
        self.world = World()
        self._shape: ModelShape | None = None
        self._executables: ExecutableStore | None = None
        self._arrays: LiveArrays | None = None
        self._meshes: dict[MeshKey, MeshPrograms] = {}
        self._local: dict[int, LocalPrograms] = {}
        self._adopted: Adopted | None = None
        self._aborted = -1
        self._generation = 0
        self._backend = threading.Lock()
        """Held by whoever loads onto the backend, or makes another of it."""
        self._idle: list[np.ndarray] = []

    def abort(self, epoch: int) -> None:
        """Cut the collectives of an epoch. From any thread."""
        self._aborted = max(self._aborted, epoch)
        adopted = self._adopted
        if adopted is not None and adopted.epoch <= epoch:
            self.world.abort(adopted.mesh[0])

    def configure(self, command: link_pb2.Configure) -> dict[str, int]:
        """Fix the shapes and read the common weights into host memory."""
        configure_process(command.collective_timeout_s)
        buckets = tuple(Bucket(decode=b.decode, tiles=b.tiles, max_pages=command.max_pages) for b in command.buckets)
        self._shape = ModelShape(
            cfg=ModelConfig.from_json(command.model_config),
            buckets=buckets,
            page_size=command.page_size,
            pages=command.pages,
        )
        self._executables = ExecutableStore(Path(command.executables))
        self._arrays = LiveArrays(self._shape, HostStore.open(Path(command.store)))
        self._idle = [idle(bucket) for bucket in buckets]
        return {}

    def join(self, command: link_pb2.Join) -> dict[str, int]:
        """Enter a generation with everything held."""
        with self._backend:
            self.arrays.leave_device(command.pages_used)
            self._meshes, self._local, self._adopted = {}, {}, None
            self.world.join(command.address, self.rank, list(command.members))
            self.arrays.enter_device(self.device)
            self._generation = command.generation
        return {}

    def compile(self, command: link_pb2.Compile) -> dict[str, int]:
        """Compile what a mesh shape needs and the store lacks."""
        devices, slots = self.world.devices(command.mesh.ranks), command.mesh.slots
        compiled = compile_missing(self.executables, mesh_lowerings(self.shape, devices, slots), devices)
        here = [self.device]
        compiled += compile_missing(self.executables, local_lowerings(self.shape, self.device, slots), here)
        return {"compiled": compiled}

    def prepare(self, command: link_pb2.Prepare) -> dict[str, int]:
        """Load the executables of a mesh: all, or if urgent those of small steps; the others follow on demand."""
        key = _key(command.mesh)
        wanted = [i for i, bucket in enumerate(self.shape.buckets) if bucket.rows <= WARM_ROWS or not command.urgent]
        with self._backend:
            generation, devices = self._generation, self.world.devices(key[0])
            if key[1] not in self._local:
                self._local[key[1]] = LocalPrograms(self.shape, self.device, key[1], self.executables)
            if key not in self._meshes:
                self._meshes[key] = MeshPrograms(self.shape, devices, key[1], self.executables)
        for index in wanted:
            with self._backend:
                if generation == self._generation:
                    self._meshes[key].step(index)
        return {}

    def connect(self, command: link_pb2.Connect) -> dict[str, int]:
        """Connect a mesh's communicator, and note which sockets it is made of. Run its small steps once on nothing:
        the first run of a program takes several times as long as the next, and should not be the one after a loss."""
        key = _key(command.mesh)
        programs = self._meshes[key]
        with self.world.connecting(key[0]):
            programs.connect(self.device)
        if command.warm:
            arguments = self.arrays.lay_over(programs, np.full(self.arrays.routes_shape, -1, np.int32))
            for index, bucket in enumerate(self.shape.buckets):
                if bucket.rows <= WARM_ROWS:
                    packed = jax.device_put(self._idle[index], self.device)
                    jax.block_until_ready(programs.step(index)(arguments(packed)))
        return {}

    def adopt(self, command: link_pb2.Adopt) -> dict[str, int]:
        """Take one's part in a plan: fill the slots and lay the arrays over its mesh."""
        key, cfg = _key(command.mesh), self.shape.cfg
        slots = np.frombuffer(command.slots, np.int32).reshape(cfg.n_moe_layers, key[1])
        routes = np.frombuffer(command.expert_to_slot, np.int32).reshape(self.arrays.routes_shape)
        loaded = self.arrays.fill(slots, self._local[key[1]], self.device)
        arguments = self.arrays.lay_over(self._meshes[key], routes)
        self._adopted = Adopted(command.epoch, key, arguments)
        return {"experts_loaded": loaded}

    def step(self, command: link_pb2.Step, received: float) -> link_pb2.Report:
        """Run one step and commit it; the report is StepDone, or StepFailed with nothing changed."""
        adopted = self._adopted
        try:
            if adopted is None or adopted.epoch != command.epoch or command.epoch <= self._aborted:
                has = adopted.epoch if adopted else None
                raise StaleEpoch(f"step {command.step} is of epoch {command.epoch}; this rank is in {has}")
            programs = self._meshes[adopted.mesh]
            inputs = np.frombuffer(command.inputs, np.int32) if command.inputs else self._idle[command.bucket]
            packed = jax.device_put(inputs, self.device)
            began = time.perf_counter()
            outputs = programs.step(command.bucket)(adopted.arguments(packed))
            tokens, logprobs, load = (
                np.asarray(a.addressable_data(0)) for a in (outputs.tokens, outputs.logprobs, outputs.expert_load)
            )
            commit = self._local[adopted.mesh[1]].commits[command.bucket]
            self.arrays.cache = commit(self.arrays.cache, outputs.new_kv.addressable_data(0), packed)
            ended = time.perf_counter()
        except (jax.errors.JaxRuntimeError, ValueError, StaleEpoch) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:500]
            failed = link_pb2.StepFailed(epoch=command.epoch, step=command.step, error=text)
            return link_pb2.Report(rank=self.rank, step_failed=failed)
        done = link_pb2.StepDone(
            epoch=command.epoch,
            step=command.step,
            tokens=tokens.tobytes(),
            logprobs=logprobs.tobytes(),
            expert_load=load.tobytes(),
            program_ms=1e3 * (ended - began),
            total_ms=1e3 * (time.perf_counter() - received),
            compiles=self.compiles.count,
        )
        return link_pb2.Report(rank=self.rank, step_done=done)

    @property
    def shape(self) -> ModelShape:
        assert self._shape is not None, "Configure comes first"
        return self._shape

    @property
    def executables(self) -> ExecutableStore:
        assert self._executables is not None, "Configure comes first"
        return self._executables

    @property
    def arrays(self) -> LiveArrays:
        assert self._arrays is not None, "Configure comes first"
        return self._arrays

    @property
    def device(self) -> jax.Device:
        return self.world.devices([self.rank])[0]


class StaleEpoch(RuntimeError):
    """A step of an epoch that this rank is not in."""


class Link:
    """The stream to the front: receives on a thread of its own, obeys on the main one."""

    def __init__(self, rank: Rank, front: str, token: str) -> None:
        self._rank = rank
        self._orders: queue.Queue[tuple[link_pb2.Command, float] | None] = queue.Queue()
        self._reports: queue.Queue[link_pb2.Report | None] = queue.Queue()
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "loader")
        self._reports.put(link_pb2.Report(rank=rank.rank, hello=link_pb2.Hello(pid=os.getpid(), token=token)))
        channel = grpc.insecure_channel(
            front,
            options=[(f"grpc.max_{way}_message_length", MESSAGE_BYTES) for way in ("receive", "send")],
        )
        self._commands = link_pb2_grpc.RankLinkStub(channel).Attach(self._sent())

    def run(self) -> None:
        """Obey until the front says stop or is gone."""
        threading.Thread(target=self._receive, daemon=True, name="receiver").start()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        while (order := self._orders.get()) is not None:
            command, received = order
            what = command.WhichOneof("what")
            if what == "step":
                self._reports.put(self._rank.step(command.step, received))
            elif what == "prepare":
                self._loader.submit(self._obey, command, what)
            else:
                self._obey(command, what)

    def _obey(self, command: link_pb2.Command, what: str) -> None:
        began = time.perf_counter()
        try:
            result = getattr(self._rank, what)(getattr(command, what))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            print(f"rank {self._rank.rank}: {what} failed: {text}", file=sys.stderr, flush=True)
            self._reports.put(
                link_pb2.Report(rank=self._rank.rank, failed=link_pb2.Failed(id=command.id, error=text[:2000]))
            )
            return
        done = link_pb2.Done(
            id=command.id,
            milliseconds=1e3 * (time.perf_counter() - began),
            compiles=self._rank.compiles.count,
            **result,
        )
        self._reports.put(link_pb2.Report(rank=self._rank.rank, done=done))

    def _receive(self) -> None:
        try:
            for command in self._commands:
                what = command.WhichOneof("what")
                if what == "abort":
                    self._rank.abort(command.abort.epoch)
                elif what == "stop":
                    break
                else:
                    self._orders.put((command, time.perf_counter()))
        except grpc.RpcError as error:
            print(f"rank {self._rank.rank}: the front is gone: {error.code().name}", file=sys.stderr, flush=True)
        # Nothing here is worth an orderly end: a rank may be killed at any time, and a collective may hang.
        os._exit(0)

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            self._reports.put(link_pb2.Report(rank=self._rank.rank, heartbeat=link_pb2.Heartbeat()))

    def _sent(self) -> Iterator[link_pb2.Report]:
        while (report := self._reports.get()) is not None:
            yield report


def _key(mesh: link_pb2.MeshShape) -> MeshKey:
    return tuple(mesh.ranks), mesh.slots


def _die_with_parent() -> None:
    """A rank that this host's front started must not outlive it."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    """Attach to the front named in the environment and obey."""
    _die_with_parent()
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a terminal or systemd tells the whole group; the front drains
    rank = int(os.environ[RANK])
    Link(Rank(rank), os.environ[FRONT], os.environ[TOKEN]).run()


if __name__ == "__main__":
    main()
