"""New weights as changed tensors of those in force: what can be changed, and the folders that have the changes."""

import asyncio
import dataclasses
from pathlib import Path

from serving.config import Settings
from serving.errors import Conflict, NoCapacity
from serving.protocol.tensors import BaseWeights, TensorTarget, TensorType, TensorUpdate
from serving.protocol.weights import WeightsVersion
from serving.recovery.failover import Failover


class ChangedTensors:
    """The changes of one server's weights."""

    def __init__(self, settings: Settings, failover: Failover) -> None:
        self._settings = settings
        self._failover = failover
        self._known: tuple[int, dict[str, TensorType]] | None = None
        """The number of weights, and their tensors."""

    def check_base(self, update: TensorUpdate) -> WeightsVersion:
        """The weights in force. Raises Conflict unless the update is a change of them."""
        weights = self._failover.membership.weights
        if update.base_version not in ("", weights.label):
            raise Conflict(
                f"base_version is {update.base_version!r}, and the weights in force have the version "
                f"{weights.label!r}. Send the tensors that differ from these.",
                param="base_version",
            )
        return weights

    async def target(self, weights: WeightsVersion) -> TensorTarget:
        """The tensors of the weights in force, and where changed ones are to be received. Raises InvalidRequest when
        their folder is not what it was, and NoCapacity when nothing can be written."""
        await self.remove_unneeded()
        if self._known is None or self._known[0] != weights.number:
            self._known = weights.number, await self._base().tensors()
        try:
            place = await asyncio.to_thread(self._failover.weights_record.versions.place)
        except OSError as error:
            raise NoCapacity(f"changed tensors cannot be received: {error}") from None
        return TensorTarget(folder=str(place), base_version=weights.label, tensors=self._known[1])

    async def make_folder(self, version: WeightsVersion, changes: Path) -> WeightsVersion:
        """The version with a folder: the weights in force with these changes. Raises as `target`."""
        try:
            folder = await asyncio.to_thread(self._failover.weights_record.versions.of_version, version.number)
        except OSError as error:
            raise NoCapacity(f"weights version {version.label} cannot be written: {error}") from None
        await self._base().change(changes, folder)
        return dataclasses.replace(version, model=str(folder))

    def on_applied(self) -> None:
        """Changed weights are in force: their tensors have the names, formats and shapes of those before them."""
        if self._known is not None:
            self._known = self._failover.membership.weights.number, self._known[1]

    async def remove_unneeded(self, before: str = "") -> None:
        """Remove the folders of changed weights, but for those of the weights in force and decided on, and of the ones
        `before` while a rank is being started that may read them."""
        membership, record = self._failover.membership, self._failover.weights_record
        needed = {membership.weights.model, membership.next_weights.model}
        if any(membership.is_incoming(rank) for rank in self._failover.plans.base.rank_ids):
            needed.add(before)
        if record.versions.exist:
            await asyncio.to_thread(record.remove_unneeded, needed)

    def _base(self) -> BaseWeights:
        """The weights in force, as the folder that changed tensors go into."""
        settings, model, weights = self._settings, self._failover.model, self._failover.membership.weights
        return BaseWeights(
            model=weights.model or settings.model,
            content=weights.content or model.content,
            served=model,
            how="in-place" if settings.in_place else settings.dense,
            mtp=settings.speculate == "mtp",
        )
