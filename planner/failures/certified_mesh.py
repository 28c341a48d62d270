"""The losses of one mesh, as a certificate asks for them (`planner.failures.certified_losses`)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

from planner.cost.band import own_range
from planner.failures.loss_bands import LossBands, Ranges
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.loss_types import LossTypes
from planner.failures.lost_copies import LostCopies
from planner.failures.survivors import Survivors


class CertifiedMesh:
    """See `CertifiedLosses`."""

    def __init__(self, losses: LossModel) -> None:
        self.losses, self.capacity_model = losses, losses.capacity_model
        self.types, self.bands = LossTypes(self.capacity_model), LossBands(losses)

    @property
    def exact(self) -> bool:
        """See `CertifiedLosses.exact`."""
        return self.types.exact

    def domains(self, kind: str) -> dict[str, tuple[int, ...]]:
        """See `CertifiedLosses.domains`."""
        alive = set(self.losses.deployment.plan.rank_ids)
        found = self.losses.deployment.cluster.domains(kind)
        return {name: left for name, ids in found.items() if (left := tuple(i for i in ids if i in alive))}

    def label(self, name: str, ranks: tuple[int, ...]) -> str:
        """See `CertifiedLosses.label`."""
        return name

    def type_of(self, dead: Collection[int]) -> Hashable:
        """See `CertifiedLosses.type_of`."""
        return self.types.of(dead)

    def copies(self, units: Sequence[Sequence[int]], count: int) -> LostCopies:
        """See `CertifiedLosses.copies`."""
        return LostCopies([self.losses.deployment.plan], units, count)

    def whole_tpot(self, requests: int) -> dict[str, float]:
        """See `CertifiedLosses.whole_tpot`."""
        return self._tpot_ms(self._left(()), self.capacity_model.shape.slots, requests)

    def priced(self, dead: tuple[int, ...], kind: str, name: str, requests: int) -> tuple[LossOutcome, Ranges]:
        """See `CertifiedLosses.priced`."""
        outcome = self.losses.outcome(dead, kind=kind, name=name)
        if not outcome.survivable:
            return outcome, {}
        left = self._left(dead)
        slots, _ = self.losses.slots_after(left)
        return outcome, {"tpot_ms": self._tpot_ms(left, slots, requests), **self.bands.of(outcome)}

    def bound(self, dead: tuple[int, ...], lost: int, requests: int) -> Ranges | None:
        """See `CertifiedLosses.bound`."""
        left = self._left(dead)
        slots, reason = self.losses.slots_after(left)
        if reason or (lost and "store" not in self.losses.means):
            return None
        after = self.capacity_model.predict(left, slots)
        if not after.tokens_per_second:
            return None
        phases = self.losses.phases(left, after, self.losses.weights_at_most(left, lost, len(dead)))
        moved = sum(phases.values()) + self.losses.recompute(left, after)[1]
        capacity = self.capacity_model.capacity(left, slots)
        return {"tpot_ms": self._tpot_ms(left, slots, requests), **self.bands.around(phases, moved, capacity)}

    def _left(self, dead: Collection[int]) -> Survivors:
        return self.losses.left(dead)

    def _tpot_ms(self, left: Survivors, slots: int, requests: int) -> dict[str, float]:
        """Milliseconds between two tokens, the ranks' or the front's, whichever are more: {low, mid, high}."""
        seconds = self.capacity_model.token_seconds(left, slots, requests)
        front = own_range(self.losses.recovery.front.step_seconds(left.ranks, requests))
        ranks = self.bands.band.around(seconds, "tpot")
        return {end: 1e3 * max(each, front[end]) for end, each in ranks.items()}
