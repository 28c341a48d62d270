"""Command handlers for the KV cache of a rank: moving entries of a sequence, and the replica of the cache."""

import sys

import jax
import numpy as np

from moejax.config.kv_cache import bytes_per_token
from moejax.runtime.kv_transfer import entry_indices, read_entries, read_state, rows_by_entry, written_rows
from serving.executor.kv_replica import piece_entries
from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from serving.worker.kv_replicator import KVReplicator, restored_rows
from serving.worker.meshes import RankMeshes
from serving.worker.state import CommittedStep, DoneFields, WorkerState


class RankKVCache:
    """Handlers of the commands about cache entries, and the replication of what each step writes."""

    def __init__(self, state: WorkerState, meshes: RankMeshes) -> None:
        self._state = state
        self._meshes = meshes
        self._replicator: KVReplicator | None = None
        self._restore_buffer = np.zeros((0, 0), np.uint8)
        """Memory for the entries of one RestoreCache, bytes `[entries, entry bytes]`. It is touched in advance, since
        the first use of memory takes longer than the copy."""
        self._unreplicated: CommittedStep | None = None

    def read_cache(self, command: link_pb2.ReadCache) -> DoneFields:
        """Send cache entries of a sequence, or one of its states."""
        model = self._state.model
        assert model.arrays.cache is not None, "Join comes first"
        if command.HasField("state"):
            return {"rows": read_state(model.arrays.cache, command.state).tobytes()}
        entries = entry_indices(command.pages, model.shape.page_size, command.first, command.count)
        return {"rows": read_entries(model.arrays.cache, entries).tobytes()}

    def write_cache(self, command: link_pb2.WriteCache) -> DoneFields:
        """Receive cache entries of a sequence, or one of its states."""
        if command.HasField("state"):
            state, model, plan = self._state, self._state.model, self._state.plan
            assert model.arrays.cache is not None, "Join comes first"
            assert plan is not None, "Adopt comes first"
            commits = self._meshes.commit_programs(plan.mesh.slots)
            numbers = np.frombuffer(command.rows, np.float32)
            model.arrays.cache = model.entry_writer.write_state(
                model.arrays.cache, command.state, numbers, commits, state.device
            )
            return {}
        layers = len(self._state.model.shape.cfg.attention_layers)
        self._write(command, np.frombuffer(command.rows, np.uint8).reshape(layers, command.count, -1))
        return {}

    def restore_cache(self, command: link_pb2.RestoreCache) -> DoneFields:
        """Receive cache entries of a sequence whose rank died, from the replica of that rank's cache."""
        shape = self._state.model.shape
        buffer = self._restore_buffer if len(self._restore_buffer) >= command.count else None
        rows = restored_rows(command, shape.page_size, buffer)
        self._write(command, rows.reshape(command.count, len(shape.cfg.attention_layers), -1).swapaxes(0, 1))
        return {}

    def warm_up(self, key: MeshKey) -> None:
        """Run the commit program of a restore once on nothing: its first run takes longest."""
        state, arrays = self._state, self._state.model.arrays
        if arrays.cache is not None and len(self._restore_buffer):
            commits = self._meshes.commit_programs(key.slots)
            count = len(self._restore_buffer)
            arrays.cache = state.model.entry_writer.warm(arrays.cache, count, commits, state.device)

    def set_replication(self, command: link_pb2.Configure | link_pb2.Adopt) -> None:
        """Replicate the cache from now on as the front wants it."""
        before, self._replicator = self._replicator, KVReplicator.of(command)
        if self._replicator is not None and not len(self._restore_buffer):
            entry_bytes = bytes_per_token(self._state.model.shape.cfg)
            self._restore_buffer = np.full((piece_entries(entry_bytes), entry_bytes), 0, np.uint8)
        if before is not None:
            before.close()

    @property
    def replica_path(self) -> str:
        """Where the next front can open the replica that this rank writes itself; "" without one."""
        return self._replicator.path if self._replicator is not None else ""

    def note_committed(self, step: CommittedStep | None) -> None:
        """Remember what the last step wrote until `replicate` copies it; None when there is nothing to copy."""
        self._unreplicated = step

    def replicate(self) -> None:
        """Copy what the last step wrote to memory that outlives this rank. Called after the report of the step, and
        beside the next step if that has arrived, so that nobody waits for the copy. A rank that cannot copy goes on
        without a replica; the seal of the replica shows how far it is good."""
        step, self._unreplicated = self._unreplicated, None
        if step is None or self._replicator is None:
            return
        try:
            self._copy(self._replicator, step)
        except Exception as error:
            self._replicator = None
            text = f"rank {self._state.rank}: the cache is not copied any more: {type(error).__name__}: {error}"
            print(text, file=sys.stderr, flush=True)

    def take_reports(self) -> list[link_pb2.Report]:
        """Copied entries that were not sent to the front yet, in order; each is returned once."""
        messages = self._replicator.take_messages() if self._replicator is not None else []
        return [link_pb2.Report(rank=self._state.rank, copied=message) for message in messages]

    def _write(self, command: link_pb2.WriteCache | link_pb2.RestoreCache, rows: np.ndarray) -> None:
        """Write `rows`, bytes `[L, count, bytes of a layer]`, into the cache and into its replica."""
        state, model, plan = self._state, self._state.model, self._state.plan
        cache = model.arrays.cache
        assert cache is not None, "Join comes first"
        assert plan is not None, "Adopt comes first"
        entries = entry_indices(command.pages, model.shape.page_size, command.first, command.count)
        state.prefix_index.invalidate(entries // model.shape.page_size)
        commits = self._meshes.commit_programs(plan.mesh.slots)
        model.arrays.cache = model.entry_writer.write(cache, entries, rows, commits, state.device)
        if self._replicator is not None:
            tokens = np.frombuffer(command.tokens, np.int32)
            positions = np.arange(command.first, command.first + command.count, dtype=np.int32)
            self._replicator.copy(entries, tokens, positions, rows.swapaxes(0, 1))

    def _copy(self, replicator: KVReplicator, step: CommittedStep) -> None:
        new, wrote = jax.tree.map(lambda a: a.addressable_data(0), step.outputs.new_kv), step.written_rows
        if step.outputs.group_inputs is not None:
            packed, shape = np.asarray(step.outputs.group_inputs.addressable_data(0)), self._state.model.shape
            wrote = written_rows(packed, shape.buckets[step.bucket], shape.pages * shape.page_size)
        replicator.copy(wrote.entries, wrote.tokens, wrote.positions, rows_by_entry(new, wrote.rows))
        replicator.seal(step.step)
