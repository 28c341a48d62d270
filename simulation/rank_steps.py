"""The steps of a simulated rank: the exchange with the others, the results, and their copies in the replica."""

import asyncio
import dataclasses
import random
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from serving.executor.mesh_key import MeshKey
from serving.proto.moejax.v1 import link_pb2
from simulation.exchange import Communicator, Member
from simulation.link import Stream

COPY_S = 0.002
"""Most virtual seconds between the report of a step and the copy of what it wrote."""


@dataclasses.dataclass
class InjectedNonFinite:
    """Steps of a rank that come out without numbers: the next `steps` with work."""

    steps: int = 0
    made: int = 0


class Violated(Protocol):
    """Whoever notes that a law is broken."""

    def violated(self, law: str) -> None:
        """Something happened that must not."""
        ...


class SteppingRank(Member, Protocol):
    """The parts of a rank that its steps use."""

    draw: random.Random
    communicators: dict[MeshKey, Communicator]
    exchanged_with: list[Member]

    @property
    def world(self) -> Violated:
        """The surroundings of the rank."""
        ...

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something in a while."""
        ...

    def free(self) -> None:
        """The main thread has done what it did."""
        ...

    def replicate(self, stream: Stream) -> None:
        """Copy what the last step wrote."""
        ...


class RankSteps:
    """The steps of one rank, one after the other, on its main thread."""

    def __init__(self, rank: SteppingRank) -> None:
        self._rank = rank
        self.non_finite = InjectedNonFinite()

    def run(self, stream: Stream, part: link_pb2.Step) -> None:
        """Take part in a step, unless it is stale."""
        why = self._rank.hand.why_stale(part)
        if not why and part.epoch <= self._rank.hand.aborted_epoch:
            why = f"epoch {part.epoch} was aborted"
        communicator = self._rank.communicators.get(self._rank.hand.mesh) if self._rank.hand.mesh is not None else None
        if not why and communicator is None:
            why = f"mesh {self._rank.hand.mesh} is not connected"
        if why or communicator is None:
            self._rank.later(0.0, lambda: self._step_failed(stream, part, why))
            return
        began = asyncio.get_running_loop().time()

        def exchanged(why: str) -> None:
            if why:
                self._rank.later(0.0, lambda: self._step_failed(stream, part, why, exchange=True))
            else:
                self._rank.exchanged_with = list(communicator.members.values())
                delay = self._rank.slowness * self._rank.draw.uniform(0.0, 0.002)
                self._rank.later(delay, lambda: self._exchanged(stream, part, began))

        communicator.exchange(self._rank, part, exchanged)

    def _exchanged(self, stream: Stream, part: link_pb2.Step, began: float) -> None:
        arrays = self._rank.hand.inputs(part)
        rows = np.flatnonzero(arrays["positions"] >= 0)
        void = bool(part.after) and self._rank.hand.chosen is None
        non_finite = len(rows) > 0 and self._is_non_finite()
        if non_finite or void:
            self._rank.hand.last, self._rank.hand.chosen = part.step, None
            bad = [int(row) for row in rows[: self._rank.draw.randint(1, len(rows))]] if non_finite else []
            self._step_failed(stream, part, f"{len(bad)} rows came out as not-a-number or infinite", bad)
            return
        try:
            fields = self._rank.hand.run(part, arrays)
        except AssertionError as error:
            self._rank.world.violated(f"rank {self._rank.rank} runs step {part.step} of epoch {part.epoch}: {error}")
            self._step_failed(stream, part, "a law was broken")
            return
        milliseconds = 1e3 * (asyncio.get_running_loop().time() - began)
        own_ms = self._rank.slowness * self._rank.draw.uniform(0.5, 1.0)
        done: dict[str, Any] = {"program_ms": milliseconds, "total_ms": milliseconds, "own_ms": own_ms}
        report = link_pb2.StepDone(epoch=part.epoch, step=part.step, **fields, **done)
        stream.report(link_pb2.Report(rank=self._rank.rank, step_done=report))
        self._rank.later(self._rank.draw.uniform(0.0, COPY_S), lambda: self._copied(stream))

    def _copied(self, stream: Stream) -> None:
        self._rank.replicate(stream)
        self._rank.free()

    def _step_failed(
        self, stream: Stream, part: link_pb2.Step, why: str, rows: list[int] | None = None, *, exchange: bool = False
    ) -> None:
        failed = link_pb2.StepFailed(
            epoch=part.epoch, step=part.step, error=why, non_finite_rows=rows or [], exchange=exchange
        )
        stream.report(link_pb2.Report(rank=self._rank.rank, step_failed=failed))
        self._rank.free()

    def _is_non_finite(self) -> bool:
        """Whether this step of this rank comes out without numbers."""
        if self.non_finite.steps:
            self.non_finite.steps -= 1
            self.non_finite.made += 1
            return True
        mesh, routes = self._rank.hand.mesh, self._rank.hand.routes
        communicator = self._rank.communicators.get(mesh) if mesh is not None else None
        if mesh is None or routes is None or communicator is None:
            return False
        for at, rank in enumerate(mesh.expert_ranks):
            for (layer, slot), damage in communicator.members[rank].hand.damaged.items():
                if damage == "nan" and at * mesh.slots + slot in routes[layer]:
                    self.non_finite.made += 1
                    return True
        return False
