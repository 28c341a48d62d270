"""The meshes of a rank: joining a generation, and the compiled programs of every mesh it can be part of."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config.step_inputs import Bucket
from moejax.model.shared_memory import Arena
from moejax.runtime.programs import LocalPrograms, MeshPrograms, compile_missing, local_lowerings, mesh_lowerings
from moejax.runtime.relay import check_service
from moejax.runtime.role_programs import RolePrograms, compile_roles
from moejax.runtime.step_arguments import local_arguments, mesh_arguments
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.state import DoneFields, WorkerState

SMALL_STEP_ROWS = 8
"""Buckets of at most so many rows, or else the smallest, are loaded first and run once before they are needed."""
EVERY_CONNECT = 1 << 62
"""A number above that of any Connect command."""


class RankMeshes:
    """The programs of each mesh and of this rank alone (by slots per rank). `prepare` runs on the loader thread, and
    `void_connects` may be called from any; everything else runs on the main thread."""

    def __init__(self, state: WorkerState) -> None:
        self._state = state
        self._meshes: dict[MeshKey, MeshPrograms | RolePrograms] = {}
        self._local: dict[int, LocalPrograms] = {}
        self._backend_lock = threading.Lock()
        """Held while programs are loaded onto the JAX backend, and while the backend is replaced."""
        self._void_connects = 0

    def join(self, command: link_pb2.Join) -> DoneFields:
        """Enter a generation and carry over the weights and the first `pages_used` pages of the cache. Raises OSError,
        and stays in the present one, when the coordination service is gone."""
        state, arrays = self._state, self._state.model.arrays
        address = state.channel.with_host(command.address)
        check_service(address)
        with self._backend_lock:
            arrays.leave_device(command.pages_used)
            state.prefix_index.truncate(command.pages_used)
            self._meshes, self._local, state.plan = {}, {}, None
            process_ids = dict(zip(command.members, command.seats, strict=True))
            state.world.join(address, state.rank, process_ids, command.processes)
            arrays.enter_device(state.device)
            state.generation = command.generation
        return {}

    def seat(self, command: link_pb2.Seat) -> DoneFields:
        """Note that another rank is a new process from now on; every mesh with its predecessor is void."""
        with self._backend_lock:
            self._meshes = {key: mesh for key, mesh in self._meshes.items() if command.rank not in key.ranks}
            self._state.world.set_process_id(command.rank, command.process)
        return {}

    def compile(self, command: link_pb2.Compile) -> DoneFields:
        """Compile the programs of a mesh shape that the executable store lacks."""
        state, model = self._state, self._state.model
        devices, slots = state.world.devices(MeshKey.read(command.mesh).ranks), command.mesh.slots
        if attention := command.mesh.attention:
            compiled = compile_roles(model.executables, model.shape, devices, slots, attention, state.device)
        else:
            compiled = compile_missing(model.executables, mesh_lowerings(model.shape, devices, slots), devices)
        lowerings = local_lowerings(model.shape, state.device, slots)
        compiled += compile_missing(model.executables, lowerings, [state.device])
        return {"compiled": compiled}

    def prepare(self, command: link_pb2.Prepare) -> DoneFields:
        """Load the executables of a mesh: all, or if urgent those of small steps; the others are loaded on demand."""
        state, model, key = self._state, self._state.model, MeshKey.read(command.mesh)
        wanted = [i for i, bucket in enumerate(model.shape.buckets) if self.is_small(bucket) or not command.urgent]
        with self._backend_lock:
            generation = state.generation
            if key.slots not in self._local:
                self._local[key.slots] = LocalPrograms(model.shape, state.device, key.slots, model.executables)
            if key not in self._meshes:
                self._meshes[key] = self._load(key)
        for index in wanted:
            with self._backend_lock:
                if generation == state.generation:
                    self._load_bucket(key, index)
                    if key.has_attention(state.rank):
                        self._local[key.slots].after_step(index)
        return {}

    def connect(self, key: MeshKey, number: int, exchange_file: str) -> None:
        """Connect the communicator of a mesh, as Connect command `number`. Raises RuntimeError for a void number."""
        programs = self._meshes[key]
        with self._state.world.connecting(key.ranks, self._arena(key, exchange_file)):
            if number <= self._void_connects:
                raise RuntimeError(f"mesh {key.ranks} was given up before its turn: one of its ranks is lost")
            programs.connect(self._state.device)

    def void_connects(self, number: int) -> None:
        """Void all Connect commands up to this number, also commands that have not begun: a member of their mesh is
        dead. Safe from any thread."""
        self._void_connects = max(self._void_connects, number)

    def allow_connects(self) -> None:
        """Begin with no Connect command void, as a new front counts its own."""
        self._void_connects = 0

    def programs(self, key: MeshKey) -> MeshPrograms | RolePrograms:
        """The step programs of a prepared mesh."""
        return self._meshes[key]

    def local(self, slots: int) -> LocalPrograms:
        """The programs that a rank of so many slots runs on its own device, once a mesh with so many is prepared."""
        return self._local[slots]

    def find_local(self, slots: int) -> LocalPrograms | None:
        """As `local`; None when no mesh with so many slots has been prepared."""
        return self._local.get(slots)

    def commit_programs(self, slots: int) -> Callable[[int], Callable[..., Any]]:
        """A function from a bucket's index to its commit program."""
        return lambda index: self._local[slots].after_step(index)[1]

    def step_arguments(
        self, key: MeshKey, routes: np.ndarray | None = None, tp_peers: Sequence[int] = ()
    ) -> Callable[[jax.Array], Any]:
        """Lay this rank's arrays over a mesh. Returns what makes a step program's arguments of its packed inputs.
        `routes` is `[moe layers, experts]`, the slot for each expert's tokens; without it every expert is masked."""
        arrays, programs = self._state.model.arrays, self._meshes[key]
        if routes is None:
            routes = np.full(arrays.routes_shape, -1, np.int32)
        if isinstance(programs, RolePrograms):
            return local_arguments(arrays, routes, self._state.device)
        return mesh_arguments(arrays, programs, routes, tp_peers)

    def is_small(self, bucket: Bucket) -> bool:
        """True for buckets that are loaded first and warmed up when a mesh is connected."""
        return bucket.rows <= max(SMALL_STEP_ROWS, min(each.rows for each in self._state.model.shape.buckets))

    def _load_bucket(self, key: MeshKey, index: int) -> None:
        """Load the programs of one bucket of a mesh."""
        programs = self._meshes[key]
        programs.step(index)
        if isinstance(programs, MeshPrograms) and self._state.model.shape.cfg.mtp:
            programs.draft(index)

    def _load(self, key: MeshKey) -> MeshPrograms | RolePrograms:
        state, model = self._state, self._state.model
        devices = state.world.devices(key.ranks)
        if not key.attention:
            return MeshPrograms(model.shape, devices, key.slots, model.executables)
        return RolePrograms(model.shape, devices, key.slots, key.attention, state.device, model.executables)

    def _arena(self, key: MeshKey, path: str) -> Arena | None:
        state, model = self._state, self._state.model
        if not model.shape.shared_memory:
            return None
        ranks, me = len(key.ranks), key.ranks.index(state.rank)
        outbox_bytes = model.shape.outbox_bytes(ranks, key.slots, key.attention)
        return Arena(path, ranks=ranks, me=me, outbox_bytes=outbox_bytes, timeout_s=model.collective_timeout_s)
