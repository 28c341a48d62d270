"""The state of one rank that its command handlers share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moejax.model.decoder import StepOutputs
from moejax.runtime.distributed import World
from moejax.runtime.executables import CompileCounter, ExecutableStore
from moejax.runtime.expert_parity import HostExpertBuffer
from moejax.runtime.kv_transfer import EntryWriter, WrittenRows
from moejax.runtime.live_weights import LiveArrays, StagedWeights
from moejax.runtime.programs import ModelShape
from serving.executor.mesh_key import MeshKey
from serving.executor.prefix_index import PrefixIndex
from serving.launch.rank_channel import RankChannel

DoneFields = dict[str, Any]
"""Fields of the `Done` report that a command handler returns, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfiguredModel:
    """The model from `Configure` on: its static shapes, and what this rank holds of it. `idle_inputs[bucket]` are the
    packed inputs of a step in which this rank has nothing to do."""

    shape: ModelShape
    executables: ExecutableStore
    arrays: LiveArrays
    expert_buffer: HostExpertBuffer
    entry_writer: EntryWriter
    idle_inputs: tuple[np.ndarray, ...]
    collective_timeout_s: int


@dataclasses.dataclass(frozen=True)
class AdoptedPlan:
    """The plan this rank is part of. `arguments` makes a step program's arguments of the step's packed inputs, `routes`
    is `[moe layers, experts]`, and `tp_peers` are the mesh positions of the rank's tensor group."""

    epoch: int
    mesh: MeshKey
    arguments: Callable[[jax.Array], Any]
    routes: np.ndarray
    tp_peers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class CommittedStep:
    """A step that is in the cache: its number, its bucket, and what it wrote there."""

    step: int
    bucket: int
    written_rows: WrittenRows
    outputs: StepOutputs


class WorkerState:
    """State that the handlers of one rank share. The main thread changes it; the receiver thread reads `plan` and
    changes `aborted_epoch`."""

    def __init__(self, rank: int, channel: RankChannel) -> None:
        self.rank = rank
        self.channel = channel
        self.world = World()
        self.compiles = CompileCounter()
        self.prefix_index = PrefixIndex()
        self.generation = 0
        self.plan: AdoptedPlan | None = None
        self.last_epoch = 0
        """The highest epoch of a plan that this rank was part of, in any generation."""
        self.aborted_epoch = -1
        """Steps of this epoch and of earlier ones are refused."""
        self.configured: ConfiguredModel | None = None
        self.weights = 0
        """The number of the weights that this rank has."""
        self.staged: dict[int, StagedWeights] = {}
        """Other weights in host memory, by their number: at most one version."""
        self.stagings_voided = 0
        """How often what was being staged became of no use: a front configured this rank, or it took other weights."""

    @property
    def model(self) -> ConfiguredModel:
        """The model. The front sends `Configure` before anything that needs it."""
        assert self.configured is not None, "Configure comes first"
        return self.configured

    @property
    def device(self) -> jax.Device:  # pyright: ignore[reportInvalidTypeForm]  (jax declares it as a variable)
        """This rank's only device, in the generation it has joined."""
        return self.world.devices([self.rank])[0]
