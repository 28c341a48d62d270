"""The cost of losses of a plan of pools (P/D): of a rank that computes prompts, and of one that decodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from planner.failures.loss_forecast import forecast_losses
from planner.failures.loss_model import MEANS, LossModel, LossOutcome
from planner.inputs.recovery_times import RecoveryTimes
from planner.plan.pools import PooledDeployment

POOL_KINDS = ("rank", "host", "rack")


def forecast_pool_losses(
    pooled: PooledDeployment,
    recovery: RecoveryTimes | None = None,
    means: Collection[str] = MEANS,
    *,
    kinds: Sequence[str] = POOL_KINDS,
) -> list[LossOutcome]:
    """Outcomes of every loss of the `kinds` within a pool, as "prefill_rank" or "decode_host".

    Streams do not wait for a loss in a prefill instance, only prompts do; the other instances go on, also where the one
    cannot recover. A lost decode rank's requests are prefilled and sent again. `capacity` is the share of the
    requests/s of all pools that is left.
    """
    prompts, decode = (pooled.figure(f"requests_per_second_of_{side}") for side in ("prompts", "decode"))
    whole, first = pooled.figure("requests_per_second"), pooled.figure("ttft")
    count = len(pooled.prefill)
    outcomes = []
    for pool in pooled.prefill:
        for o in forecast_losses(LossModel(pool, recovery, means), kinds=kinds)[0]:
            left = (count - 1 + (o.capacity if o.survivable else 0.0)) / count
            outcomes.append(
                replace(
                    o,
                    kind=f"prefill_{o.kind}",
                    survivable=left > 0,
                    phases={},
                    moved_stall=o.moved_stall if o.survivable else first,
                    capacity=min(1.0, left * prompts / whole),
                )
            )
    losses = LossModel(pooled.decode, recovery, means)
    for o in forecast_losses(losses, kinds=kinds)[0]:
        again = o.cache_tokens / max(1.0, pooled.decode.traffic.context) / prompts
        outcomes.append(
            replace(
                o,
                kind=f"decode_{o.kind}",
                moved_stall=o.stall + again + first if o.cache_tokens else o.stall,
                capacity=min(1.0, o.capacity * decode / whole),
            )
        )
    return outcomes
