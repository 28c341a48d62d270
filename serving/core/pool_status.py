"""One status, and the forecasts of losses, of a server with two pools."""

import dataclasses
from collections.abc import Iterable, Mapping

from serving.core.hand_over import HandOver
from serving.protocol.status import EdgeStatus, LossForecast, PoolStatus, RankStatus, Status

SUMMED = (
    *("running", "waiting", "recoveries", "steps", "step_ms", "rank_ms", "program_ms", "preemptions"),
    *("prefix_queries", "prefix_hits", "compiles_after_ready", "experts_loaded", "restored"),
    *("experts_rebuilt", "tokens_restored", "tokens_recomputed", "rows", "rows_filled"),
    *("drafts", "drafted", "accepted", "draft_passes_skipped", "suspects", "convicted"),
)
"""Fields of a status that add up over the pools. What belongs to the whole server is the same in both."""


def joint_forecasts(
    forecasts: Mapping[str, Iterable[LossForecast]], *, ranks: Mapping[str, int], take_over_ms: float
) -> tuple[LossForecast, ...]:
    """The forecasts of both pools, of kinds as "prefill_rank". `ranks` has how many serve in each pool; capacities are
    shares of all of them. While both serve, streams do not wait for a loss in the prefill pool, and a loss that one
    pool cannot survive is the other one's work: `take_over_ms` later it goes on with all requests."""
    found, both = [], all(ranks.values())
    for pool, other in (("prefill", "decode"), ("decode", "prefill")):
        for forecast in forecasts[pool]:
            forecast = dataclasses.replace(forecast, kind=f"{pool}_{forecast.kind}")
            low, capacity, high = (
                (each * ranks[pool] + ranks[other]) / sum(ranks.values())
                for each in (forecast.capacity_low, forecast.capacity, forecast.capacity_high)
            )
            if forecast.survivable:
                forecast = dataclasses.replace(forecast, capacity=capacity, capacity_low=low, capacity_high=high)
            if both and not forecast.survivable:
                left = ranks[other] / sum(ranks.values())
                forecast = dataclasses.replace(
                    forecast,
                    survivable=True,
                    prepared=True,
                    reason=f"the {other} pool does the work of both until a rank is back",
                    **dict.fromkeys(("moved_stall_ms", "moved_stall_low_ms", "moved_stall_high_ms"), take_over_ms),
                    **dict.fromkeys(("capacity", "capacity_low", "capacity_high"), left),
                )
            if both and pool == "prefill":
                forecast = dataclasses.replace(forecast, stall_ms=0.0, stall_low_ms=0.0, stall_high_ms=0.0)
            found.append(forecast)
    return tuple(found)


def _ranks(name: str, status: Status, *, both: bool) -> tuple[RankStatus, ...]:
    """The ranks of a pool; see `joint_forecasts` for the costs of their losses."""
    ranks = []
    for rank in status.ranks:
        loss = rank.loss
        if loss is not None and both:
            stall_ms = 0.0 if name == "prefill" else loss.stall_ms
            loss = dataclasses.replace(loss, survivable=True, prepared=loss.prepared or not loss.survivable)
            loss = dataclasses.replace(loss, stall_ms=stall_ms)
        ranks.append(dataclasses.replace(rank, role=name, loss=loss))
    return tuple(ranks)


def joint_status(
    prefill: Status, decode: Status, hand_over: HandOver, edges: tuple[EdgeStatus, ...], *, ended: bool
) -> Status:
    """The status of both pools together, with that of each in short. It serves while one of them does, unless a loop
    has `ended` by itself."""
    both = {"prefill": prefill, "decode": decode}
    sums = {name: getattr(prefill, name) + getattr(decode, name) for name in SUMMED}
    serves = all(status.axes for status in both.values())
    ranks = tuple(rank for name, status in both.items() for rank in _ranks(name, status, both=serves))
    losses = {**prefill.lattice, **decode.lattice}
    covered = {loss: min(each.lattice.get(loss, 1.0) for each in both.values()) for loss in losses}
    layers = zip(prefill.expert_load, decode.expert_load, strict=True)
    load = tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in layers)
    return dataclasses.replace(
        decode,
        **sums,
        epoch=max(prefill.epoch, decode.epoch),
        generation=max(prefill.generation, decode.generation),
        ready=(prefill.ready or decode.ready) and not ended,
        draining=prefill.draining or decode.draining,
        paused=prefill.paused and decode.paused,
        ranks=ranks,
        axes={name: status.axes.get("expert", 0) for name, status in both.items()},
        slots_per_rank=max(prefill.slots_per_rank, decode.slots_per_rank),
        masked=tuple(sorted({*prefill.masked, *decode.masked})),
        lattice=covered,
        expert_load=load,
        edges=edges,
        requests_sent=hand_over.sent,
        requests_returned=hand_over.returned,
        pools=tuple(
            PoolStatus(
                name=name,
                ranks=sum(rank.state == "serving" for rank in status.ranks),
                serving=bool(status.axes),
                epoch=status.epoch,
                generation=status.generation,
                running=status.running,
                waiting=status.waiting,
                steps=status.steps,
                step_ms=status.step_ms,
            )
            for name, status in both.items()
        ),
    )
