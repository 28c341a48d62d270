"""The planner beside what operators of wide expert parallel deployments published, to which nothing is fitted.

    python -m benchmarks.wide_ep

Output tokens/s of each GPU in decode, and prompt tokens/s in prefill of 16,384 tokens a rank. Sources are the blog
posts of SGLang (large-scale expert parallelism on 96 H100, long contexts on 16 H200, Kimi-K2 on 128 H200, GB200 NVL72)
and DeepSeek (profile data, a day of its inference system).
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.cli.table import table
from planner.cost.roofline import step_time
from planner.inputs.cluster import Cluster, read_cluster
from planner.inputs.published import read_model
from planner.plan.shape import Shape

PREFILL_TOKENS = 16384  # of a rank at once


@dataclass(frozen=True, kw_only=True)
class PublishedRate:
    """Tokens/s of a GPU as published: a decode step of `requests` on each rank with `context` tokens in cache, and
    `drafts` drafted tokens for each, which are kept with the probability `accepted`; or, without requests, prefill of
    prompts of `context` tokens. `alone`: no second batch overlaps with the exchange.
    """

    name: str
    model: str
    chip: str
    ranks: int
    context: int
    rate: float
    requests: int = 0
    drafts: int = 0
    accepted: float = 0.0
    alone: bool = False


RATES = (
    PublishedRate(
        name="SGLang, two batches", model="deepseek-v3", chip="h100", ranks=72, requests=256, context=2000, rate=2785
    ),
    PublishedRate(
        name="SGLang, one batch",
        model="deepseek-v3",
        chip="h100",
        ranks=72,
        requests=256,
        context=2000,
        rate=2219,
        alone=True,
    ),
    PublishedRate(name="SGLang", model="kimi-k2", chip="h200", ranks=96, requests=480, context=2000, rate=3000),
    PublishedRate(
        name="DeepSeek's profile",
        model="deepseek-v3",
        chip="h100",
        ranks=128,
        requests=128,
        context=4096,
        rate=2325,
        drafts=1,
        accepted=0.6,
    ),
    PublishedRate(
        name="SGLang, simulated MTP",
        model="deepseek-v3",
        chip="h100",
        ranks=72,
        requests=128,
        context=4000,
        rate=2172,
        drafts=1,
        accepted=0.6,
    ),
    PublishedRate(
        name="DeepSeek, a day's mean",
        model="deepseek-v3",
        chip="h100",
        ranks=144,
        requests=128,
        context=4989,
        rate=1850,
    ),
    PublishedRate(
        name="SGLang, one batch",
        model="deepseek-v3",
        chip="h200",
        ranks=16,
        requests=2,
        context=65500,
        rate=51.0,
        alone=True,
    ),
    PublishedRate(
        name="SGLang, two batches", model="deepseek-v3", chip="h200", ranks=16, requests=2, context=65500, rate=60.4
    ),
    PublishedRate(name="SGLang", model="deepseek-v3", chip="gb200", ranks=48, requests=768, context=2000, rate=7583),
    PublishedRate(name="SGLang", model="deepseek-v3", chip="h100", ranks=32, context=1024, rate=7209),
    PublishedRate(name="SGLang", model="deepseek-v3", chip="h100", ranks=32, context=2048, rate=6818),
    PublishedRate(name="SGLang", model="deepseek-v3", chip="h100", ranks=32, context=4096, rate=6288),
    PublishedRate(name="DeepSeek's profile", model="deepseek-v3", chip="h100", ranks=32, context=4096, rate=7839),
    PublishedRate(name="SGLang", model="kimi-k2", chip="h200", ranks=32, context=2048, rate=7000),
)
"""H800s are described as H100s: their NVLink is slower, which the decode of one host for each 8 ranks does not use. The
requests of DeepSeek's day (128) and of GB200s (768) are assumed."""


def planned(row: PublishedRate) -> tuple[float, dict[str, float]]:
    """Tokens/s of a GPU by the planner, and milliseconds of the step by part."""
    workload = read_model(row.model)
    if row.drafts:
        workload = workload.with_drafts(row.drafts, row.accepted)
    chip = read_cluster(row.chip)
    cluster = Cluster.regular(row.chip, row.ranks // chip.per_host, chip.per_host, hardware=chip.hardware)
    shape = Shape(
        arch="collocated",
        tensor=1,
        dense=1,
        slots=-(-workload.experts // row.ranks),
        roles=("collocated",) * row.ranks,
        groups=tuple(range(row.ranks)),
    )
    if row.requests:
        held, tokens, context, kept = row.requests, row.requests, row.context, row.requests * workload.kept
    else:
        held, tokens, context, kept = PREFILL_TOKENS // row.context, PREFILL_TOKENS, row.context / 2, PREFILL_TOKENS
    step = step_time(
        workload, cluster, shape, tokens, context, requests=held, in_prompt=not row.requests, overlap=not row.alone
    )
    rate = kept / step.total
    return rate, {name: 1e3 * seconds for name, seconds in step.parts().items()}


def report() -> str:
    """The table."""
    rows = []
    for row in RATES:
        rate, parts = planned(row)
        what = f"decode, {row.requests} a rank" if row.requests else "prefill"
        each = [f"{value:.0f}" for value in parts.values()]
        where = f"{row.ranks} {row.chip}, {what} x {row.context:,}"
        rows.append([f"{row.name}: {row.model}", where, f"{row.rate:,.0f}", f"{rate:,.0f}", f"{rate / row.rate:.2f}"])
        rows[-1] += ["/".join(each)]
    return table(["source", "setting", "published", "planned", "ratio", "attn/exp/exch/over, ms"], rows)


if __name__ == "__main__":
    print(report())
