"""The sides of a plan while failures pass: a plan of one mesh has one, a plan of pools also those for prompts and for
decode, as far as `simulate` asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from planner.failures.held_experts import HeldExperts
from planner.failures.loss_bands import LossBands
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.mesh_state import MeshState
from planner.failures.pool_losses import PoolLossModel
from planner.failures.pools_left import PoolLeft, PoolsLeft, pool_left

TOGETHER = "together"
"""The name of the whole plan."""
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, kw_only=True)
class SideNow:
    """A side at a time: the share of its throughput that is left, the tokens in its cache, whether experts are masked,
    and whether one side does the work of both."""

    capacity: float
    cached_tokens: float = 0.0
    masked: bool = False
    switched: bool = False


@dataclass(frozen=True, kw_only=True)
class SideLoss:
    """The cost of a loss on a side: the seconds by phase that streams of other ranks wait (on the prefill side their
    prompts), the tokens of the cache that are computed again, and the bytes read from the store."""

    phases: Mapping[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    store_bytes: int = 0


class Sides(Protocol):
    """The sides of a plan by name; TOGETHER is the whole plan."""

    @property
    def members(self) -> Mapping[str, frozenset[int]]:
        """The ranks of each side."""
        ...

    @property
    def bands(self) -> Mapping[str, LossBands]:
        """The ranges of the phases of each side."""
        ...

    def now(self) -> Mapping[str, SideNow]:
        """Each side as it is."""
        ...

    def lose(self, ranks: Collection[int]) -> Mapping[str, SideLoss]:
        """The cost of the loss of these ranks on each side; they are dead then."""
        ...

    def restore(self, ranks: Collection[int]) -> Collection[str]:
        """Let dead ranks return; the sides whose streams wait while they join."""
        ...


class MeshSides:
    """See `Sides`: a plan of one mesh."""

    def __init__(self, losses: LossModel, bands: LossBands) -> None:
        self.state, self.bands = MeshState(losses), {TOGETHER: bands}
        self.members = {TOGETHER: frozenset(losses.deployment.plan.rank_ids)}

    def now(self) -> dict[str, SideNow]:
        """See `Sides.now`."""
        return {TOGETHER: _now(self.state)}

    def lose(self, ranks: Collection[int]) -> dict[str, SideLoss]:
        """See `Sides.lose`."""
        before = self.state.cached_tokens
        return {TOGETHER: _loss(self.state, self.state.lose(ranks), before)}

    def restore(self, ranks: Collection[int]) -> set[str]:
        """See `Sides.restore`."""
        self.state.restore(ranks)
        return {TOGETHER}


class PoolSides:
    """See `Sides`: a plan of pools. Where a side cannot serve, roles switch, as in a certificate."""

    def __init__(self, losses: PoolLossModel) -> None:
        self.losses = losses
        self.states = [MeshState(each) for each in losses.pools]
        self._before: dict[int, tuple[HeldExperts, frozenset[int]]] = {}
        self.bands = {TOGETHER: losses.bands[DECODE], **losses.bands}
        decode = frozenset(losses.decode.deployment.plan.rank_ids)
        everyone = frozenset(losses.pool_of)
        self.members = {TOGETHER: everyone, PREFILL: everyone - decode, DECODE: decode}

    def now(self) -> dict[str, SideNow]:
        """See `Sides.now`. A side that does no work of its own, since roles have switched, has no throughput."""
        left, (prefill, decode) = self._left({}), (self.states[:-1], self.states[-1:])
        serving = [each for each in self.states if not each.refused]
        sides = {
            TOGETHER: SideNow(
                capacity=0.0 if left.reason else min(each.capacity for each in left.shares),
                cached_tokens=sum(each.cached_tokens for each in self.states),
                masked=any(each.masked for each in serving),
                switched=left.switched > 0,
            )
        }
        for name, states in ((PREFILL, prefill), (DECODE, decode)):
            rates = [each.losses.capacity_model.whole.tokens_per_second for each in states]
            own = sum(rate * each.capacity for rate, each in zip(rates, states, strict=True))
            sides[name] = SideNow(
                capacity=own / sum(rates) if sum(rates) else 0.0,
                cached_tokens=sum(each.cached_tokens for each in states),
                masked=any(each.masked and not each.refused for each in states),
                switched=left.switched > 0,
            )
        return sides

    def lose(self, ranks: Collection[int]) -> dict[str, SideLoss]:
        """See `Sides.lose`."""
        alone = self._alone()
        cost: dict[int, SideLoss] = {}
        outcomes: dict[int, LossOutcome] = {}
        self._before = {at: (self.states[at].held, self.states[at].dead) for at, _ in self.losses.by_pool(ranks)}
        for at, dead in self.losses.by_pool(ranks):
            before = self.states[at].cached_tokens
            outcomes[at] = self.states[at].lose(dead)
            cost[at] = _loss(self.states[at], outcomes[at], before)
        last = len(self.states) - 1
        left = self._left(outcomes)
        prompts = [each for at, each in cost.items() if at != last]
        own = max((each.phases for each in cost.values()), key=_total, default={})
        went_on = alone == PREFILL and self._alone() == PREFILL
        phases = own if went_on else left.shares[0].phases if left.shares else {}
        sides = {TOGETHER: cost.values(), PREFILL: prompts, DECODE: [cost[last]] if last in cost else []}
        waits = {
            TOGETHER: phases,
            PREFILL: max((each.phases for each in prompts), key=_total, default={}),
            DECODE: cost[last].phases if last in cost else {},
        }
        return {
            name: SideLoss(
                phases=waits[name],
                tokens=sum(each.tokens for each in parts),
                store_bytes=sum(each.store_bytes for each in parts),
            )
            for name, parts in sides.items()
        }

    def restore(self, ranks: Collection[int]) -> set[str]:
        """See `Sides.restore`. Each side joins by itself, unless roles have switched."""
        switched = bool(self._alone())
        for at, back in self.losses.by_pool(ranks):
            self.states[at].restore(back)
        waits = {name for name in (PREFILL, DECODE) if not self.members[name].isdisjoint(ranks)}
        return waits | ({TOGETHER} if switched or DECODE in waits else set())

    def _alone(self) -> str:
        """The side that does the work of both, if one does."""
        if not self._left({}).switched:
            return ""
        return PREFILL if self.states[-1].capacity == 0 else DECODE

    def _left(self, outcomes: Mapping[int, LossOutcome]) -> PoolsLeft:
        """All pools as they are; some have just lost ranks, with these outcomes."""

        def pool(at: int, switched: bool) -> PoolLeft:
            state, outcome = self.states[at], outcomes.get(at)
            losses = self.losses.switched[at] if switched else state.losses
            left = losses.left(state.dead) if switched else state.left
            if outcome is not None and switched:
                held, dead = self._before[at]
                outcome = losses.holding(held).outcome(state.dead, since=losses.left(dead))
            phases = outcome.phases if outcome else None
            return pool_left(losses, left, reason=state.refused, phases=phases, outcome=outcome)

        return self.losses.together(pool)


def _now(state: MeshState) -> SideNow:
    masked = state.masked and not state.refused
    return SideNow(capacity=state.capacity, cached_tokens=state.cached_tokens, masked=masked)


def _loss(state: MeshState, outcome: LossOutcome, cached: float) -> SideLoss:
    """The cost of a loss; all `cached` tokens of before are computed again where the ranks left cannot serve."""
    read = outcome.means.get("store", 0) * state.losses.deployment.workload.expert_bytes
    if not outcome.survivable or state.refused:
        return SideLoss(tokens=cached)
    return SideLoss(phases=outcome.phases, tokens=outcome.cache_tokens, store_bytes=read)


def _total(phases: Mapping[str, float]) -> float:
    return sum(phases.values())
