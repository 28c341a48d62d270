"""One rank: a process with one device. It holds weights in slots, cache pages and executables, and decides nothing.

The main thread obeys commands in order (`serving.worker.front_link`). A second thread receives them, so that an abort
is obeyed while a step hangs in a collective; a third sends heartbeats; a fourth loads executables beside the steps.
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax.checkpoint.published_store import open_store
from moejax.config.model_config import ModelConfig
from moejax.config.step_inputs import Bucket, idle_inputs
from moejax.ops import cpu
from moejax.runtime.distributed import configure_process
from moejax.runtime.executables import ExecutableStore
from moejax.runtime.expert_parity import HostExpertBuffer
from moejax.runtime.kv_transfer import EntryWriter
from moejax.runtime.live_weights import LiveArrays
from moejax.runtime.programs import ModelShape
from serving.executor.mesh_key import MeshKey
from serving.launch.rank_channel import RankChannel
from serving.proto.moejax.v1 import link_pb2
from serving.protocol.versions import LINK
from serving.version import build
from serving.worker.kv_cache import RankKVCache
from serving.worker.meshes import EVERY_CONNECT, RankMeshes
from serving.worker.state import AdoptedPlan, ConfiguredModel, DoneFields, WorkerState
from serving.worker.steps import RankSteps
from serving.worker.weights import RankWeights, expert_slots

Handler = Callable[[Any], DoneFields]


class RankWorker:
    """A rank: its state, and a handler for each command that is answered by Done or Failed."""

    def __init__(self, rank: int, channel: RankChannel) -> None:
        self.state = WorkerState(rank, channel)
        self.meshes = RankMeshes(self.state)
        self.weights = RankWeights(self.state, self.meshes)
        self.kv_cache = RankKVCache(self.state, self.meshes)
        self.steps = RankSteps(self.state, self.meshes, self.kv_cache)
        self._configured: link_pb2.Configure | None = None
        self.handlers: Mapping[str, Handler] = {
            "configure": self.configure,
            "ping": self.ping,
            "join": self.meshes.join,
            "seat": self.meshes.seat,
            "compile": self.meshes.compile,
            "prepare": self.meshes.prepare,
            "connect": self.connect,
            "adopt": self.adopt,
            "hold": self.weights.hold,
            "stage_weights": self.weights.stage_weights,
            "read_weights": self.weights.read_weights,
            "write_weights": self.weights.write_weights,
            "keep_parity": self.weights.keep_parity,
            "inspect": self.weights.inspect,
            "damage": self.weights.damage,
            "read_cache": self.kv_cache.read_cache,
            "write_cache": self.kv_cache.write_cache,
            "restore_cache": self.kv_cache.restore_cache,
        }
        """By the name of the command in `Command.what`."""

    def ping(self, _: link_pb2.Ping) -> dict[str, Any]:
        """Answer, which says that the main thread is free."""
        return {}

    def hello(self, token: str) -> link_pb2.Report:
        """The first report to a front: who this is."""
        hello = link_pb2.Hello(
            pid=os.getpid(),
            token=token,
            cache_copy=self.kv_cache.replica_path,
            build=build(),
            oldest=LINK.oldest,
            newest=LINK.newest,
        )
        return link_pb2.Report(rank=self.state.rank, hello=hello)

    def held(self) -> link_pb2.Held:
        """The state that the front before left. For the main thread: commands of that front, which may be under way for
        a while after its end, change it."""
        state = self.state
        return link_pb2.Held(
            epoch=max(state.last_epoch, state.aborted_epoch),
            generation=state.generation,
            full=state.prefix_index.message(),
            serves=state.plan is not None,
            weights=state.weights,
        )

    def abort(self, epoch: int, connecting: int, *, links: bool = False) -> None:
        """Cut the collectives of an epoch, and a communicator that is being connected. With `connecting` not 0 the
        epoch goes on, and only Connect commands up to this number are void; with `links` only the connections of the
        mesh in force are cut. Safe from any thread."""
        state, plan = self.state, self.state.plan
        if links:
            if plan is not None:
                state.world.abort(plan.mesh.ranks)
            return
        self.meshes.void_connects(connecting)
        state.world.abort_connecting()
        if connecting:
            return
        state.aborted_epoch = max(state.aborted_epoch, epoch)
        if plan is not None and plan.epoch <= epoch:
            state.world.abort(plan.mesh.ranks)

    def front_lost(self) -> None:
        """Wait for nothing that the lost front began, until the next front configures this rank. Safe from any
        thread."""
        plan = self.state.plan
        self.meshes.void_connects(EVERY_CONNECT)
        self.abort(plan.epoch if plan is not None else 0, 0)

    def configure(self, command: link_pb2.Configure) -> DoneFields:
        """Fix the shapes and read the common weights into host memory. A rank that is configured already only checks
        that its new front asks for the same, and drops what an update that ended with the front before has staged.
        Raises RuntimeError if it does not ask for the same."""
        wanted = link_pb2.Configure()
        wanted.CopyFrom(command)
        wanted.ClearField("protection")
        for given_again in ("shard", "store", "weights"):  # those of a new front's first plan: each Adopt has them
            wanted.ClearField(given_again)
        if self._configured is None:
            self.state.configured = self._load_model(command)
            self._configured, self.state.weights = wanted, command.weights
        elif wanted != self._configured:
            raise RuntimeError("this rank serves another model, or other shapes, than its new front asks for")
        self.weights.keep_staged(command.weights)
        self.kv_cache.set_replication(command)
        self.kv_cache.note_committed(None)
        self.meshes.allow_connects()
        return {"shares_memory": self.state.model.shape.shared_memory, "held": self.held()}

    def connect(self, command: link_pb2.Connect) -> DoneFields:
        """Connect the communicator of a mesh, and warm up what its first step would run for the first time."""
        key = MeshKey.read(command.mesh)
        self.meshes.connect(key, command.number, command.exchange)
        if command.warm:
            self.steps.warm_up(key)
            self.kv_cache.warm_up(key)
        return {}

    def adopt(self, command: link_pb2.Adopt) -> DoneFields:
        """Become part of a plan: hold what this rank's role needs, fill the slots and lay the arrays over the mesh."""
        state, model, key = self.state, self.state.model, MeshKey.read(command.mesh)
        state.last_epoch = max(state.last_epoch, command.epoch)
        self.weights.use(command.weights)
        slots = np.frombuffer(command.slots, np.int32)
        slots = slots.reshape(model.shape.cfg.n_moe_layers, key.slots_of(state.rank))
        routes = np.full(model.arrays.routes_shape, -1, np.int32)
        if command.expert_to_slot:
            routes = np.frombuffer(command.expert_to_slot, np.int32).reshape(routes.shape)
        tp_peers = tuple(command.mates)
        tp_shard = tp_peers.index(key.ranks.index(state.rank)) if tp_peers else None
        model.arrays.attend(key.has_attention(state.rank), state.device, tp_shard)
        state.prefix_index.truncate(0)
        if command.WhichOneof("protection") is not None:
            self.kv_cache.set_replication(command)
        filled = model.arrays.fill(slots, self.meshes.local(key.slots), state.device)
        arguments = self.meshes.step_arguments(key, routes, tp_peers)
        state.plan = AdoptedPlan(command.epoch, key, arguments, routes, tp_peers)
        return {"experts_loaded": filled.read, "missing": expert_slots(filled.missing), "trouble": filled.trouble}

    def _load_model(self, command: link_pb2.Configure) -> ConfiguredModel:
        configure_process(command.collective_timeout_s, self.state.channel.address)
        if not any(platform in os.environ.get("JAX_PLATFORMS", "") for platform in ("cuda", "tpu")):
            try:
                cpu.load()
            except cpu.KernelError as error:
                print(f"rank {self.state.rank}: {error}", file=sys.stderr, flush=True)
        cfg = ModelConfig.from_json(command.model_config).tp_shard(max(1, command.tensor))
        size = {"max_pages": command.max_pages, "states": bool(cfg.state_layers)}
        buckets = tuple(Bucket(decode=b.decode, tiles=b.tiles, **size) for b in command.buckets)
        shape = ModelShape(
            cfg=cfg,
            buckets=buckets,
            page_size=command.page_size,
            pages=command.pages,
            shared_memory=command.one_machine and cpu.active(),
            drafts=max(1, command.drafts),
            snapshots=command.snapshots,
        )
        executables = ExecutableStore(Path(command.executables))
        store = open_store(Path(command.store), held=shape.cfg.packed)
        arrays = LiveArrays(shape, store, attends=not command.experts_only, shard=command.shard)
        return ConfiguredModel(
            shape=shape,
            executables=executables,
            arrays=arrays,
            expert_buffer=HostExpertBuffer(arrays),
            entry_writer=EntryWriter(shape.cfg, buckets),
            idle_inputs=tuple(idle_inputs(bucket) for bucket in buckets),
            collective_timeout_s=command.collective_timeout_s,
        )
