"""The losses of a plan of pools, as a certificate asks for them (`planner.failures.certified_losses`).

A loss may take ranks of several pools. Its type is that of its ranks in each pool, whichever of several prefill
instances alike they are in: the meshes left, and so the rates of both sides, are the same for all losses of a type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence

from planner.failures.loss_bands import Ranges
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.loss_types import LossTypes
from planner.failures.lost_copies import LostCopies
from planner.failures.pool_losses import PoolLossModel


class CertifiedPools:
    """See `CertifiedLosses`."""

    def __init__(self, losses: PoolLossModel) -> None:
        self.losses = losses
        kinds: dict[Hashable, int] = {}
        self.types = [LossTypes(each.capacity_model, kinds) for each in losses.pools]
        like: dict[Hashable, int] = {}
        self._like = [
            like.setdefault(_instance(pool, types), len(like))
            for pool, types in zip(losses.pools, self.types, strict=True)
        ]

    @property
    def exact(self) -> bool:
        """See `CertifiedLosses.exact`."""
        return all(each.exact for each in self.types)

    def domains(self, kind: str) -> dict[str, tuple[int, ...]]:
        """See `CertifiedLosses.domains`."""
        return self.losses.domains(kind)

    def label(self, name: str, ranks: tuple[int, ...]) -> str:
        """See `CertifiedLosses.label`."""
        return f"{name} ({self.losses.side(ranks)})"

    def type_of(self, dead: Collection[int]) -> Hashable:
        """See `CertifiedLosses.type_of`."""
        of = [(self._like[at], self.types[at].of(ranks)) for at, ranks in self.losses.by_pool(dead)]
        return frozenset(Counter(of).items())

    def copies(self, units: Sequence[Sequence[int]], count: int) -> LostCopies:
        """See `CertifiedLosses.copies`."""
        return LostCopies([each.deployment.plan for each in self.losses.pools], units, count)

    def whole_tpot(self, requests: int) -> dict[str, float]:
        """See `CertifiedLosses.whole_tpot`."""
        return self.losses.after(()).tpot_ms(requests)

    def priced(self, dead: tuple[int, ...], kind: str, name: str, requests: int) -> tuple[LossOutcome, Ranges]:
        """See `CertifiedLosses.priced`."""
        outcome = self.losses.outcome(dead, kind=kind, name=name)
        if not outcome.survivable:
            return outcome, {}
        left = self.losses.after(dead)
        return outcome, {"tpot_ms": left.tpot_ms(requests), **left.ranges}

    def bound(self, dead: tuple[int, ...], lost: int, requests: int) -> Ranges | None:
        """See `CertifiedLosses.bound`. Each pool is taken to lose as many pairs as all of them together may."""
        if lost and "store" not in self.losses.means:
            return None
        left = self.losses.after(dead, lost)
        return None if left.reason else {"tpot_ms": left.tpot_ms(requests), **left.ranges}


def _instance(pool: LossModel, types: LossTypes) -> Hashable:
    """The facts that the meshes left of losses in a pool depend on: pools with equal ones are alike."""
    d = pool.deployment
    return d.work, d.shape, d.plan.figure("peak_load", 1.0), d.cluster.hardware, types.of(d.plan.rank_ids)
