"""The losses of a plan as a certificate asks for them, whether the plan has one mesh or pools."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Protocol

from planner.failures.loss_bands import Ranges
from planner.failures.loss_model import LossOutcome
from planner.failures.lost_copies import LostCopies


class CertifiedLosses(Protocol):
    """The losses of a plan: of one mesh (`certified_mesh`) or of pools (`certified_pools`).

    Ranges are {low, mid, high} by the names of ServiceLevels. Losses of one type leave the same meshes.
    """

    @property
    def exact(self) -> bool:
        """Whether losses of one type leave the same meshes, so that one may stand for all."""
        ...

    def domains(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The living ranks of each rank, host or rack, by its name."""
        ...

    def label(self, name: str, ranks: tuple[int, ...]) -> str:
        """The name of a domain for a reader."""
        ...

    def type_of(self, dead: Collection[int]) -> Hashable:
        """The type of a loss."""
        ...

    def copies(self, units: Sequence[Sequence[int]], count: int) -> LostCopies:
        """The last copies that losses of `count` of the units take."""
        ...

    def whole_tpot(self, requests: int) -> Mapping[str, float]:
        """Milliseconds between two tokens before any loss."""
        ...

    def priced(self, dead: tuple[int, ...], kind: str, name: str, requests: int) -> tuple[LossOutcome, Ranges]:
        """The outcome of a loss, and its figures; empty for one that is not survivable."""
        ...

    def bound(self, dead: tuple[int, ...], lost: int, requests: int) -> Ranges | None:
        """Figures that no loss of the type of `dead` exceeds that takes the last copy of at most `lost` pairs; None
        where such a loss may not be survivable."""
        ...
