"""Brings other weights of the same model into a running server (docs/decisions/0024).

They are loaded beside the steps: into the host store, then into the host memory of every rank, compared with their
checksums. Then the switch is decided, by a record on disk, and one epoch switches all ranks between two steps. Whatever
dies before the decision leaves the former weights, whatever dies after it the new ones.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from serving.config import Settings
from serving.engine import migration
from serving.engine.state import EngineState
from serving.errors import Conflict, InvalidRequest, NoCapacity
from serving.executor.executor import RankExecutor
from serving.executor.incarnation import Incarnation
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_errors import CommandFailed, RankLost
from serving.protocol import clock
from serving.protocol.events import EventKind, EventLog
from serving.protocol.instructions import Instruction
from serving.protocol.prepared_model import prepare_weights
from serving.protocol.tensors import TensorTarget, TensorUpdate
from serving.protocol.weights import WeightsVersion
from serving.recovery.changed_tensors import ChangedTensors
from serving.recovery.failover import Failover
from serving.recovery.kv_replicas import free_bytes
from serving.recovery.membership import INCOMING, RankState
from serving.recovery.membership_events import WeightsDecided

POLL_S = 0.005
"""Seconds between two looks whether streams have ended, or the weights are in force."""
DROP_TIMEOUT_S = 10.0
"""Seconds that an update which is given up waits until the ranks have dropped what they loaded. A rank that is still
loading then drops it afterwards."""


class UpdatedServer(Protocol):
    """The parts of the engine's loop that an update uses."""

    settings: Settings
    state: EngineState
    events: EventLog
    failover: Failover
    executor: RankExecutor

    def wake(self) -> None:
        """Make the loop look again at what is due."""
        ...


class WeightsUpdate:
    """The updates of one server, one at a time."""

    def __init__(self, server: UpdatedServer) -> None:
        self._server = server
        self._first = server.failover.membership.weights.number
        self._contents = {server.failover.membership.weights.label: server.failover.membership.weights.content}
        """The contents of the weights that have had each label, as far as this front knows."""
        self._changed = ChangedTensors(server.settings, server.failover)
        self.next_label = ""
        """The label of weights that are being brought in; empty when none are."""

    @property
    def switches(self) -> int:
        """Versions that came into force since the start."""
        return self._server.failover.membership.weights.number - self._first

    async def apply(self, instruction: Instruction) -> None:
        """Bring the weights of a folder in; returns when they are in force. Raises InvalidRequest for weights that are
        not those of the served model, or cannot be read; Conflict while another update runs; NoCapacity without the
        memory for it. The former weights stay then, and no rank has more in its memory than before."""
        await self._bring_in(instruction)

    async def begin_tensors(self, update: TensorUpdate) -> TensorTarget:
        """The weights that an update by changed tensors is for, and where these are to be received. Raises as `apply`
        does, and Conflict when the update changes other weights than those in force."""
        weights = self._changed.check_base(update)
        self._check_memory(self._version_of(update.instruction("changed tensors")).label)
        return await self._changed.target(weights)

    async def apply_tensors(self, update: TensorUpdate, changes: Path) -> None:
        """As `apply`, with the weights in force and the tensors in the folder `changes`."""
        self._changed.check_base(update)
        await self._bring_in(update.instruction("changed tensors"), changes)
        self._changed.on_applied()

    async def _bring_in(self, instruction: Instruction, changes: Path | None = None) -> None:
        server, failover = self._server, self._server.failover
        before = failover.membership.weights.model
        version = self._version_of(instruction)
        self.next_label = version.label
        try:
            self._check_memory(version.label)
            if changes is not None:
                version = await self._changed.make_folder(version, changes)
            version, unused = await self._prepare(version)
            text = f"version {version.label}, from {version.model}{unused_note(unused)}"
            server.events.emit(EventKind.WEIGHTS_LOADING, failover.epoch, message=text)
            try:
                await self._stage(version)
                if instruction.running == "finish":
                    await self._finish_streams(instruction.timeout_s)
                    await self._stage(version)  # on ranks that came meanwhile
                await self._decide_whole(version)
            except (Exception, asyncio.CancelledError) as error:
                if failover.membership.next_weights != version:
                    await self._abandon(version, str(error) or "the instruction was withdrawn")
                raise
            while failover.membership.weights.number < version.number:
                await asyncio.sleep(POLL_S)
        finally:
            self.next_label = ""
            await self._changed.remove_unneeded(before)

    def _version_of(self, instruction: Instruction) -> WeightsVersion:
        """The version that an instruction asks for, which is not prepared yet."""
        failover = self._server.failover
        membership = failover.membership
        if self.next_label or membership.next_weights != membership.weights:
            busy = self.next_label or membership.next_weights.label
            raise Conflict(
                f"weights version {busy} is being brought in. Wait for it (`moejax status`), then try again."
            )
        if not failover.single_host:
            raise InvalidRequest(
                "new weights can be brought in where the front starts the ranks itself; this server has ranks on "
                "other hosts. Start it again with the new --model.",
                param="action",
            )
        number = membership.weights.number + 1
        free = (str(each) for each in itertools.count(number) if str(each) not in self._contents)
        label = instruction.version or next(free)
        if label == membership.weights.label:
            raise InvalidRequest(f"the weights in force have the version {label!r} already.", param="version")
        return WeightsVersion(number, label, instruction.model)

    def _check_memory(self, label: str) -> None:
        """Raises NoCapacity unless the new weights have room beside those in force, which are as large."""
        failover = self._server.failover
        model, plan = failover.model, failover.plan or failover.plans.base
        key = MeshKey.of(plan)
        attending = sum(key.has_attention(rank) for rank in plan.rank_ids)
        slots = sum(key.slots_of(rank) for rank in plan.rank_ids) * plan.moe_layers
        ranks = attending * model.rest_bytes + slots * model.expert_bytes
        copy = 0 if model.store == model.folder else _folder_bytes(Path(model.store))
        free = free_bytes()
        if ranks + copy > free:
            raise NoCapacity(
                f"weights version {label} needs {ranks + copy >> 20} MiB beside those in force ({copy >> 20} in the "
                f"host store, {ranks >> 20} in the ranks), and {free >> 20} MiB of memory are free. Free memory, or "
                "start the server again with the new --model."
            )

    async def _prepare(self, version: WeightsVersion) -> tuple[WeightsVersion, tuple[str, ...]]:
        """The version with its host store and its content, and the files of the folder that are not used."""
        settings, failover = self._server.settings, self._server.failover
        prepared = await prepare_weights(
            version.model,
            failover.model,
            in_place=settings.in_place,
            dense=settings.dense,
            tensor=settings.tensor,
            mtp=settings.speculate == "mtp",
        )
        if self._contents.get(version.label, prepared.content) != prepared.content:
            raise InvalidRequest(
                f"version is {version.label!r}, which other weights had before: an answer could not say which made its "
                "tokens. Choose another label, or none.",
                param="version",
            )
        made = WeightsVersion(version.number, version.label, version.model, prepared.store, prepared.content)
        return made, prepared.unused_files

    async def _stage(self, version: WeightsVersion) -> None:
        """Load the weights into the host memory of every rank that is configured. Raises InvalidRequest when a rank
        cannot read them, and NoCapacity when one does not within the time that a server has to start."""
        executor, staged = self._server.executor, dict[int, Incarnation | None]()
        limit_s = self._server.settings.start_timeout_s

        def missing() -> list[int]:
            return [rank for rank in self._configured_ranks() if staged.get(rank) is not executor.get(rank)]

        async def stage(rank: int) -> str:
            """Why a rank cannot read the weights; empty if it can, or was lost."""
            process = executor.get(rank)
            try:
                await self._server.failover.rank_start.stage_weights(rank, version)
                staged[rank] = process
            except RankLost:
                await asyncio.sleep(POLL_S)
            except CommandFailed as error:
                return f"rank {rank} cannot load {version.model}: {error.error}"
            return ""

        try:
            async with asyncio.timeout(limit_s):
                while ranks := missing():
                    if causes := list(filter(None, await asyncio.gather(*map(stage, ranks)))):
                        raise InvalidRequest(causes[0], param="model")
        except TimeoutError:
            raise NoCapacity(
                f"ranks {missing()} have not loaded weights version {version.label} within {limit_s:g} s. Look at "
                f"what keeps them from reading {version.model}, or raise --start-timeout-s, then try again."
            ) from None

    def _configured_ranks(self) -> list[int]:
        """The ranks that have weights in their memory."""
        membership = self._server.failover.membership
        has_weights = {RankState.SERVING, RankState.LEAVING, *INCOMING}
        ranks = {*membership.plan_ranks, *membership.states}
        return sorted(rank for rank in ranks if membership.state(rank) in has_weights)

    async def _finish_streams(self, timeout_s: float) -> None:
        """Start no request, and wait until the started ones have ended, at most for `timeout_s` seconds."""
        server, until = self._server, clock.now() + timeout_s
        server.state = migration.hold_requests(server.state, True)
        while migration.started_requests(server.state) and clock.now() < until:
            await asyncio.sleep(POLL_S)

    async def _decide_whole(self, version: WeightsVersion) -> None:
        """As `_decide`. An instruction that is withdrawn meanwhile raises CancelledError only once the decision is
        written, or is not: what the disk has is what the server does."""
        deciding, withdrawn = asyncio.ensure_future(self._decide(version)), False
        while not deciding.done():
            try:
                await asyncio.wait({deciding})
            except asyncio.CancelledError:
                withdrawn = True
        if withdrawn:
            await asyncio.gather(deciding, return_exceptions=True)
            raise asyncio.CancelledError
        deciding.result()

    async def _decide(self, version: WeightsVersion) -> None:
        """Decide on the switch: what dies from here on does not undo it. Raises NoCapacity when the decision cannot be
        written."""
        record = self._server.failover.weights_record
        try:
            await asyncio.to_thread(record.save, version)
        except OSError as error:
            if not await asyncio.to_thread(record.has, version):
                raise NoCapacity(
                    f"the decision for weights version {version.label} cannot be written: {error}"
                ) from None
        self._contents[version.label] = version.content
        self._server.failover.state.record(WeightsDecided(version))

    async def _abandon(self, version: WeightsVersion, cause: str) -> None:
        """The former weights stay: requests are held no longer, and ranks drop what they have loaded."""
        server, failover = self._server, self._server.failover
        server.state = migration.hold_requests(server.state, False)
        server.wake()
        server.events.emit(EventKind.WEIGHTS_REFUSED, failover.epoch, cause=cause, message=f"version {version.label}")
        drops = (
            failover.rank_start.stage_weights(rank, failover.membership.weights) for rank in self._configured_ranks()
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DROP_TIMEOUT_S):
                await asyncio.gather(*drops, return_exceptions=True)


def unused_note(files: Sequence[str]) -> str:
    """The end of a message about new weights: which of their files are not used, and what would use them."""
    if not files:
        return ""
    return (
        f"; {' and '.join(files)} of it differ from those of the served model and are not used: start the server with "
        "this folder to use them"
    )


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += (Path(path) / name).stat().st_size
    return total
