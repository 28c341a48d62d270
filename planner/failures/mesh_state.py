"""One mesh while failures pass: its dead ranks, and the experts that the others hold by now.

A loss is priced as `LossModel` prices it, from the ranks left and the experts held at that time. What is left
afterwards (slots, throughput, whether it serves at all) depends on the dead ranks alone, as if they had died at once.
"""

from __future__ import annotations

from collections.abc import Collection

from planner.failures.loss_model import LossModel, LossOutcome


class MeshState:
    """The state of one mesh, whose losses `losses` prices."""

    def __init__(self, losses: LossModel) -> None:
        self.losses = losses
        self.dead: frozenset[int] = frozenset()
        self.left = losses.left(())
        self.held = losses.held

    @property
    def slots(self) -> int:
        """Slots of a rank now."""
        return self.losses.slots_after(self.left)[0]

    @property
    def masked(self) -> bool:
        """Whether an expert that the plan places has no copy now."""
        return bool(self.held.missing(self.losses.placed).any())

    @property
    def refused(self) -> str:
        """Why the ranks left cannot serve: the experts do not fit on them, or some are missing that may neither be
        loaded nor masked; empty where they can."""
        if "mask" in self.losses.means and self.left.data and self.left.expert_rank_count:
            return ""
        return self.losses.slots_after(self.left)[1] or ("experts have no copy, parity group or store" * self.masked)

    @property
    def capacity(self) -> float:
        """The share of the whole mesh's tokens/s that the ranks left have; 0 where they cannot serve."""
        return 0.0 if self.refused else self.losses.capacity_model.capacity(self.left, self.slots)

    @property
    def cached_tokens(self) -> float:
        """Tokens in the cache of the requests that run now."""
        whole = self.losses.capacity_model.whole.requests_per_group
        return 0.0 if self.refused else whole * self.left.data * self.losses.deployment.traffic.context

    def lose(self, ranks: Collection[int]) -> LossOutcome:
        """The outcome of the loss of more ranks, which are dead then."""
        dead = self.dead.union(ranks)
        outcome = self.losses.holding(self.held).outcome(dead, since=self.left)
        self._settle(dead)
        return outcome

    def restore(self, ranks: Collection[int]) -> None:
        """Let dead ranks return, each with the experts that the plan places on it. What has no copy then, since ranks
        with the last one take another role, is loaded."""
        back = self.dead.intersection(ranks)
        self.held = self.held.returned(back, self.losses.placed)
        self._settle(self.dead - back)

    def _settle(self, dead: frozenset[int]) -> None:
        """Let these be the dead ranks, and the others load what they may."""
        self.dead, self.left = dead, self.losses.left(dead)
        self.held = self.losses.holding(self.held).after(dead, self.left)
