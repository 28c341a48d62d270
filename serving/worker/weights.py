"""Command handlers for the expert weights of a rank: filling slots, moving experts and parity, and integrity checks."""

import dataclasses
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moejax.checkpoint.published_store import open_store
from moejax.runtime.expert_parity import WeightsKey
from moejax.runtime.live_weights import StagedWeights
from moejax.runtime.scrub import corrupt_slot, find_damaged_common, find_damaged_slots
from serving.proto.moejax.v1 import link_pb2
from serving.worker.meshes import RankMeshes
from serving.worker.state import DoneFields, WorkerState

NO_WEIGHTS = -1
"""The number of no version."""
MAX_DAMAGED_NAMES = 3
"""Most names of damaged weights in a report."""


class RankWeights:
    """Handlers of the commands about expert weights."""

    def __init__(self, state: WorkerState, meshes: RankMeshes) -> None:
        self._state = state
        self._meshes = meshes
        self._staging = threading.Lock()
        """Held while `staged` changes: weights are staged on a thread of their own."""

    def stage_weights(self, command: link_pb2.StageWeights) -> DoneFields:
        """Load other weights into host memory, while steps run. For a thread of its own. Raises StoreError when they
        cannot be read, and CheckpointError or ConfigError when they are not those of a model."""
        state, version = self._state, command.version
        voided = state.stagings_voided
        state.staged = {}
        if version.store and version.number != state.weights:
            staged = {version.number: self._load(version.store)}
            with self._staging:
                if state.stagings_voided == voided:
                    state.staged = staged
        return {}

    def keep_staged(self, number: int) -> None:
        """Drop other staged weights than those of this number, and what is being staged now."""
        state = self._state
        with self._staging:
            state.stagings_voided += 1
            state.staged = {each: weights for each, weights in state.staged.items() if each == number}

    def use(self, version: link_pb2.WeightsVersion) -> None:
        """Have the weights of this version from now on; this rank is part of no plan until it adopts the next one.
        Raises as `stage_weights` does."""
        state = self._state
        if version.number == state.weights:
            return
        arrays, staged = state.model.arrays, state.staged.get(version.number)
        if staged is None:
            staged = self._load(version.store)
        state.plan = None  # its arguments hold the arrays of the former weights
        arrays.switch(staged, state.device)
        state.model.expert_buffer.clear()
        state.weights = version.number
        self.keep_staged(NO_WEIGHTS)

    def _load(self, store: str) -> StagedWeights:
        """The weights of a store in host memory, in the form in which this rank holds its own."""
        model = self._state.model
        return model.arrays.stage(open_store(Path(store), held=model.shape.cfg.packed))

    def hold(self, command: link_pb2.Hold) -> DoneFields:
        """Fill the slots of a rank that is not part of a plan yet."""
        self.use(command.weights)
        model = self._state.model
        slots = np.frombuffer(command.slots, np.int32).reshape(model.shape.cfg.n_moe_layers, command.slots_per_rank)
        filled = model.arrays.fill(slots, self._meshes.find_local(command.slots_per_rank), self._state.device)
        return {"experts_loaded": filled.read}

    def read_weights(self, command: link_pb2.ReadWeights) -> DoneFields:
        """Send bytes of an expert's weights, or of a parity that this rank keeps."""
        piece = self._state.model.expert_buffer.read(_weights(command.of), command.first, command.count)
        return piece._asdict()

    def write_weights(self, command: link_pb2.WriteWeights) -> DoneFields:
        """Receive bytes of a parity, to keep it, or of a rebuilt expert, which the next plan places."""
        self._state.model.expert_buffer.write(
            _weights(command.of), command.first, command.size, command.rows, tuple(command.checksums)
        )
        return {}

    def keep_parity(self, command: link_pb2.KeepParity) -> DoneFields:
        """Drop every parity of a layer but these."""
        self._state.model.expert_buffer.keep_only(command.layer, [_weights(of) for of in command.parities])
        return {}

    def inspect(self, command: link_pb2.Inspect) -> DoneFields:
        """Compare weights with their checksums."""
        arrays = self._state.model.arrays
        damaged = find_damaged_slots(arrays, command.first, command.count)
        damaged_common = find_damaged_common(arrays) if command.count == 0 else []
        names = ", ".join(damaged_common[:MAX_DAMAGED_NAMES])
        return {"missing": expert_slots(damaged), "damaged": bool(damaged_common), "trouble": names}

    def damage(self, command: link_pb2.Damage) -> DoneFields:
        """Damage the weights in one slot, for tests. This donates the leaves that the plan in force was laid over its
        mesh with, so they are laid over it once more."""
        state, plan = self._state, self._state.plan
        assert plan is not None, "Adopt comes first"
        local = self._meshes.local(plan.mesh.slots)
        slot = corrupt_slot(state.model.arrays, command.layer, command.slot, local, state.device, nan=command.nan)
        arguments = self._meshes.step_arguments(plan.mesh, plan.routes, plan.tp_peers)
        state.plan = dataclasses.replace(plan, arguments=arguments)
        return {"missing": expert_slots([slot])}


def expert_slots(slots: Iterable[tuple[int, int, int]]) -> list[link_pb2.ExpertSlot]:
    """(MoE layer, slot, expert) as messages."""
    return [link_pb2.ExpertSlot(layer=layer, slot=slot, expert=expert) for layer, slot, expert in slots]


def _weights(of: link_pb2.Weights) -> WeightsKey:
    return WeightsKey(of.layer, tuple(of.experts), of.parity)
