"""The cost of losses of a plan of pools (P/D): of ranks that compute prompts, of ranks that decode, and of both.

Streams do not wait for a loss in a prefill instance, only prompts do; the other instances go on, also where one cannot
recover. The requests of a lost decode rank are prefilled and sent again. Where a side is lost whole, or cannot recover,
roles switch: the other side computes prompts and decodes until ranks are back (means "switch").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from math import ceil
from typing import Any

from planner.cost.pools import PoolRates, cache_network_rate, pool_rates
from planner.cost.recovery_model import RecoveryModel
from planner.errors import unknown_key
from planner.failures.loss_bands import LossBands, Ranges
from planner.failures.loss_model import MEANS, LossModel, LossOutcome
from planner.failures.pools_left import PoolLeft, PoolsLeft, Share, pool_left
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.pools import PooledDeployment

POOL_KINDS = ("rank", "host", "rack")


class PoolLossModel:
    """Predicts the outcome of any loss of a plan of pools. The arguments are those of `LossModel`."""

    def __init__(
        self,
        pooled: PooledDeployment,
        recovery: RecoveryTimes | None = None,
        means: Collection[str] = MEANS,
        *,
        one_front: bool = True,
    ) -> None:
        self.deployment, self.means = pooled, frozenset(means)
        self._given: dict[str, Any] = {"recovery": recovery, "means": means, "one_front": one_front}
        self.pools = tuple(LossModel(pool, **self._given) for pool in (*pooled.prefill, pooled.decode))
        self.pool_of = {rank: at for at, each in enumerate(self.pools) for rank in each.deployment.plan.rank_ids}
        self.after = lru_cache(1 << 14)(self._after)
        self._pool_after = lru_cache(1 << 14)(self._pool_after_loss)

    @property
    def decode(self) -> LossModel:
        """The loss model of the ranks that decode."""
        return self.pools[-1]

    @property
    def prefill(self) -> tuple[LossModel, ...]:
        """The loss models of the instances that compute prompts."""
        return self.pools[:-1]

    @property
    def recovery(self) -> RecoveryModel:
        """The model of the recoveries of the ranks that decode."""
        return self.decode.recovery

    @cached_property
    def rates(self) -> PoolRates:
        """The rates before any loss."""
        d, prompts = self.decode.deployment, [each.capacity_model.whole for each in self.prefill]
        rates = pool_rates(d.workload, d.cluster, d.traffic, prompts[0], len(prompts), self.decode.capacity_model.whole)
        return replace(rates, prompts=sum(each.tokens_per_second for each in prompts) / d.traffic.output)

    @cached_property
    def bands(self) -> dict[str, LossBands]:
        """The ranges of losses on either side."""
        return {"prefill": LossBands(self.pools[0]), "decode": LossBands(self.decode)}

    @cached_property
    def switched(self) -> tuple[LossModel, ...]:
        """The loss models of all pools, each as one that computes prompts and decodes."""
        return tuple(LossModel(replace(each.deployment, work="all"), **self._given) for each in self.pools)

    def source(self) -> str:
        """The reason for the width of the ranges, in a sentence."""
        return self.bands["decode"].source()

    def domains(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The ranks of each rank, host or rack, by its name; hosts and racks may have ranks of several pools."""
        found: dict[str, tuple[int, ...]] = {}
        for each in self.pools:
            alive = set(each.deployment.plan.rank_ids)
            for name, ids in each.deployment.cluster.domains(kind).items():
                found[name] = (*found.get(name, ()), *(rank for rank in ids if rank in alive))
        return {name: ids for name, ids in found.items() if ids}

    def side(self, dead: Collection[int]) -> str:
        """The side whose ranks a loss takes: "prefill", "decode" or "both"."""
        sides = {"decode" if self.pool_of[rank] == len(self.prefill) else "prefill" for rank in dead}
        return sides.pop() if len(sides) == 1 else "both"

    def outcome(self, dead: Collection[int], *, kind: str = "rank", name: str = "") -> LossOutcome:
        """The outcome when exactly the ranks `dead` of the plan die at once; its kind is as "prefill_rank"."""
        dead = tuple(sorted(dead))
        left = self.after(dead)
        parts = [o for at, ranks in self.by_pool(dead) if (o := self._pool_after(at, ranks, None, False).outcome)]
        means: dict[str, int] = {"switch": left.switched} if left.switched else {}
        for name_of, count in ((n, c) for part in parts for n, c in part.means.items()):
            means[name_of] = means.get(name_of, 0) + count
        return LossOutcome(
            kind=f"{self.side(dead)}_{kind}",
            name=name or ",".join(map(str, dead)),
            dead=dead,
            survivable=not left.reason,
            reason=left.reason,
            means=means,
            bytes_moved=sum(part.bytes_moved for part in parts),
            phases=dict(max((each.phases for each in left.shares), key=_total, default={})),
            moved_stall=max((each.moved_stall for each in left.shares), default=0.0),
            masked=sum(part.masked for part in parts),
            cache_tokens=sum(part.cache_tokens for part in parts),
            capacity=min((each.capacity for each in left.shares), default=0.0),
            traffic_lost=max((part.traffic_lost for part in parts), default=0.0),
            score=min((part.score for part in parts), default=1.0),
        )

    def ranges(self, outcome: LossOutcome) -> Ranges:
        """The figures of a loss as {low, mid, high}; empty for one that is not survivable."""
        return self.after(outcome.dead).ranges if outcome.survivable else {}

    def by_pool(self, dead: Collection[int]) -> list[tuple[int, tuple[int, ...]]]:
        """The ranks of a loss by the position of their pool in `pools`."""
        found: dict[int, list[int]] = {}
        for rank in dead:
            found.setdefault(self.pool_of[rank], []).append(rank)
        return [(at, tuple(ranks)) for at, ranks in found.items()]

    def _after(self, dead: tuple[int, ...], lost: int | None = None) -> PoolsLeft:
        """The pools after the loss of `dead`. With `lost`, the worst of all losses that leave the same meshes and take
        the last copy of at most as many (layer, expert) pairs of each pool."""
        gone = dict(self.by_pool(dead))
        return self.together(lambda at, switched: self._pool_after(at, gone.get(at, ()), lost, switched))

    def together(self, pool: Callable[[int, bool], PoolLeft]) -> PoolsLeft:
        """All pools, of which `pool` gives each by its position in `pools` as it is left: with its own work, or (True)
        with the work of both sides."""
        pools = [pool(at, False) for at in range(len(self.pools))]
        prefill, decode = pools[:-1], pools[-1]
        serving = [each for each in prefill if each.serves]
        if decode.serves and serving:
            return self._both(prefill, decode)
        if not (decode.serves or serving):
            reasons = dict.fromkeys(each.reason for each in pools)
            return PoolsLeft(reason=f"neither side serves any more: {'; '.join(filter(None, reasons))}")
        if "switch" not in self.means:
            side, lost_one = ("decode", decode) if serving else ("prefill", prefill[0])
            return PoolsLeft(reason=f"no rank is left for {side}, and roles do not switch: {lost_one.reason}")
        at = [at for at, each in enumerate(pools) if each.serves]
        alone = [pool(i, True) for i in at]
        if not all(each.serves for each in alone):
            reason = next(each.reason for each in alone if not each.serves)
            return PoolsLeft(reason=f"the side that is left cannot compute prompts and decode: {reason}")
        return self._decode_alone(alone[0], prefill) if decode.serves else self._prefill_alone(alone, decode)

    def _both(self, prefill: Sequence[PoolLeft], decode: PoolLeft) -> PoolsLeft:
        """Both sides go on, each with its own work."""
        prompts, rates = sum(each.rate for each in prefill), self.rates
        slower = max(each.ttft for each in prefill if each.serves) - self.prefill[0].capacity_model.whole.ttft_seconds
        first = rates.ttft + max(0.0, slower)
        d = self.decode.deployment
        ranks = sum(each.left.ranks for each in prefill if each.serves)
        network = cache_network_rate(d.workload, d.cluster, d.traffic, min(ranks, decode.left.ranks))
        moved = decode.stall + (decode.requests / prompts + first if decode.requests else 0.0)
        waits = [self._prompts_wait(each, prompts, first) for each in prefill if each.phases or not each.serves]
        return PoolsLeft(
            streams=(decode,),
            shares=(
                Share(
                    bands=self.bands["decode"],
                    phases=decode.phases,
                    moved_stall=moved,
                    capacity=self._share(min(decode.rate, network)),
                ),
                Share(
                    bands=self.bands["prefill"],
                    phases={},
                    moved_stall=max(waits, default=0.0),
                    capacity=self._share(prompts),
                ),
            ),
        )

    def _share(self, rate: float) -> float:
        """A rate as a share of that before the loss."""
        return min(1.0, rate / self.rates.rate) if self.rates.rate else 1.0

    def _prompts_wait(self, pool: PoolLeft, prompts: float, first: float) -> float:
        """Seconds until the last prompt of a prefill instance that lost ranks is computed: by itself, or where it
        serves no more by the others, which compute `prompts` a second."""
        if pool.serves:
            return pool.stall + pool.again
        times = pool.losses.recovery.times
        return times.detect + times.abort + pool.requests / prompts + first

    def _decode_alone(self, decode: PoolLeft, prefill: Sequence[PoolLeft]) -> PoolsLeft:
        """The ranks that decode compute prompts, too; those of the lost side begin there again."""
        times = decode.losses.recovery.times
        prompts = sum(each.requests for each in prefill)
        rounds = ceil(prompts / max(1, decode.left.data))
        again = times.detect + times.abort + rounds * decode.ttft
        share = Share(
            bands=self.bands["decode"],
            phases=decode.phases,
            moved_stall=decode.stall + decode.again + again,
            capacity=self._share(decode.rate),
        )
        return PoolsLeft(streams=(decode,), shares=(share,), switched=decode.left.ranks)

    def _prefill_alone(self, prefill: Sequence[PoolLeft], decode: PoolLeft) -> PoolsLeft:
        """The ranks that computed prompts decode, too: all streams are computed again there, and wait for the last."""
        times = self.recovery.times
        groups = sum(each.left.data for each in prefill)
        again = max(each.ttft for each in prefill) * ceil(decode.requests / max(1, groups))
        own = max((each.phases for each in prefill), key=_total)
        phases = {"detect": times.detect, "abort": times.abort, **own, "prompts": again}
        share = Share(
            bands=self.bands["decode"],
            phases=phases,
            moved_stall=_total(phases) + max(each.again for each in prefill),
            capacity=self._share(sum(each.rate for each in prefill)),
        )
        switched = sum(each.left.ranks for each in prefill)
        return PoolsLeft(streams=tuple(prefill), shares=(share,), switched=switched)

    def _pool_after_loss(self, at: int, dead: tuple[int, ...], lost: int | None, switched: bool) -> PoolLeft:
        """One pool after the loss of its ranks `dead`; `switched` where it does the work of both sides. `lost` as for
        `_after`."""
        losses = (self.switched if switched else self.pools)[at]
        left = losses.left(dead)
        slots, reason = losses.slots_after(left)
        outcome = losses.outcome(dead) if dead and lost is None else None
        if outcome is not None and not outcome.survivable:
            reason = outcome.reason
        elif outcome is not None:
            reason = ""
        after = None if reason else losses.capacity_model.predict(left, slots)
        phases: Mapping[str, float] = {}
        if outcome is not None:
            phases = outcome.phases
        elif dead and after is not None:
            phases = losses.phases(left, after, losses.weights_at_most(left, lost or 0, len(dead)))
        return pool_left(losses, left, reason=reason, phases=phases, outcome=outcome)


def _total(phases: Mapping[str, float]) -> float:
    return sum(phases.values())


def forecast_pool_losses(losses: PoolLossModel, *, kinds: Sequence[str] = POOL_KINDS) -> list[LossOutcome]:
    """Outcomes of every loss of the `kinds`, as "prefill_rank", "decode_host", or "both_rack" where a rack has ranks of
    both sides. Hosts and racks with a single rank are left out, and one that has all ranks."""
    return list(_forecasts(losses, kinds))


def _forecasts(losses: PoolLossModel, kinds: Sequence[str]) -> Iterator[LossOutcome]:
    for kind in kinds:
        if kind not in POOL_KINDS:
            raise unknown_key(kind, POOL_KINDS, "--kinds")
        for name, dead in losses.domains(kind).items():
            if kind == "rank" or 1 < len(dead) < len(losses.pool_of):
                yield losses.outcome(dead, kind=kind, name=name)
