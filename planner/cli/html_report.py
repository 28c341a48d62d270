"""`moejax plan report`: one self-contained page on a plan: placement, memory, step, trade-off, losses, months."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from html import escape
from math import exp, log

from planner.cli.command import CommandResult, write_text
from planner.cli.html_months import months
from planner.cli.html_page import (
    facts,
    html_table,
    label,
    level,
    page,
    prose,
    rect,
    scale,
    section,
    stacked_bars,
    svg,
)
from planner.cli.html_trade_off import assessed, trade_off
from planner.cli.report import smallest
from planner.cost.band import deployment_band
from planner.failures.loss_bands import LossBands, Ranges, range_cells
from planner.failures.loss_forecast import forecast_losses, summarise
from planner.failures.loss_model import LossModel, LossOutcome
from planner.failures.pool_losses import POOL_KINDS, PoolLossModel, forecast_pool_losses
from planner.plan.deployment import Deployment
from planner.plan.plan import EXPERT_ROLES
from planner.plan.pools import PooledDeployment, read_any_deployment
from planner.solver.balance import relative_rank_loads
from planner.solver.shapes import memory_budget

WIDTH = 960.0
MOST_ROWS = 16


def report(options: Namespace) -> CommandResult:
    """`report PLAN --html FILE`."""
    found = read_any_deployment(options.plan)
    pools = found.pools() if isinstance(found, PooledDeployment) else {"": found}
    sections = [_head(found, pools), _topology(pools), _memory(pools), _steps(pools)]
    ranges: Callable[[LossOutcome], Ranges]
    if isinstance(found, PooledDeployment):
        of_pools = PoolLossModel(found)
        outcomes, ranges = forecast_pool_losses(of_pools), of_pools.ranges
    else:
        losses = LossModel(found)
        outcomes, ranges = forecast_losses(losses, kinds=POOL_KINDS)[0], LossBands(losses).of
    sections += [trade_off(_kinds(pools)), _losses(pools, outcomes, ranges), months(found, options.seed)]
    title = f"{next(iter(pools.values())).workload.name} on {next(iter(pools.values())).cluster.name}"
    write_text(options.html, page(title, sections))
    return CommandResult(
        data={"html": options.html, "losses": summarise(outcomes, ranges)}, text=f"wrote {options.html}"
    )


def _head(found: Deployment | PooledDeployment, pools: dict[str, Deployment]) -> str:
    """The figures of the whole plan, each as a range."""
    first = pools["decode"] if isinstance(found, PooledDeployment) else found
    best = assessed(first)
    rate, user, ttft = best.tokens_per_second, best.tokens_per_second_per_user, best.ttft_seconds
    if isinstance(found, PooledDeployment):
        rate, ttft = found.figure("tokens_per_second"), found.figure("ttft")
    band = deployment_band(first, first.shape, best.requests_per_group)
    ranks = sum(len(pool.plan.ranks) for pool in pools.values())
    rows = [
        (band.text(rate, "rate", "").strip(), "tokens/s of all answers together"),
        (band.text(1e3 / user, "tpot", "ms") if user else "-", "between two tokens of a stream"),
        (band.text(ttft, "ttft", "s"), "until the first token"),
        (f"{ranks:,}", f"ranks on {len({r.host for p in pools.values() for r in p.plan.ranks}):,} hosts"),
    ]
    meshes = "; ".join(
        f"{name}: {pool.shape.describe()}" if name else pool.shape.describe() for name, pool in pools.items()
    )
    note = f" Pools for prompts and decode are {found.service}." if isinstance(found, PooledDeployment) else ""
    title = f"<h1>{escape(f'{first.workload.name} on {first.cluster.name}')}</h1>"
    return f"{title}<p>{prose(f'{meshes}.{note} {band.source()}')}</p><section>{facts(rows)}</section>"


def _grid(
    pools: dict[str, Deployment],
    shade: Callable[[str, int], tuple[str, str]],
    key: tuple[str, str],
    name: str,
    domain: Callable[[str, str, str], tuple[str, str] | None] = lambda pool, kind, name: None,
) -> str:
    """A cell for each rank, a row of cells for each host, in blocks of racks. `shade` has a rank's class and
    text, `domain` those of a host or rack as a whole."""
    racks: dict[tuple[str, str], dict[str, list[str]]] = {}
    for pool, deployment in pools.items():
        for r in deployment.plan.ranks:
            racks.setdefault((pool, r.rack or "no rack"), {}).setdefault(r.host, []).append(str(r.id))
    most = max(len(ids) for hosts in racks.values() for ids in hosts.values())
    cell = 15.0 if most <= 16 else 8.0
    column = most * cell + 100
    across = max(1, int(WIDTH // column))
    drawn, x, y, deepest = [], 0.0, 16.0, 0.0
    for at, ((pool, rack), hosts) in enumerate(racks.items()):
        if at and at % across == 0:
            x, y, deepest = 0.0, y + deepest + 26, 0.0
        drawn.append(label(x, y, f"{pool} {rack}".strip(), kind="soft"))
        if whole := domain(pool, "rack", rack):
            drawn.append(rect(x + 62 + most * cell / 2, y - 9, most * cell / 2 - 1, 9, whole[0], f"{rack}: {whole[1]}"))
        for row, (host, ids) in enumerate(hosts.items()):
            top = y + 6 + row * (cell + 2)
            drawn.append(label(x, top + cell - 3, host[:9], kind="soft"))
            for i, rank in enumerate(ids):
                kind, text = shade(pool, int(rank))
                drawn.append(
                    rect(x + 62 + i * cell, top, cell - 1, cell - 1, kind, f"rank {rank}, {host}, {rack}: {text}")
                )
            if whole := domain(pool, "host", host):
                drawn.append(rect(x + 64 + most * cell, top, 18, cell - 1, whole[0], f"{host}: {whole[1]}"))
        deepest = max(deepest, len(hosts) * (cell + 2))
        x += column
    height = y + deepest + 12
    return svg(WIDTH, height + 22, [*drawn, scale(*key, 200, height)], name)


def _topology(pools: dict[str, Deployment]) -> str:
    """Racks, hosts and ranks, each rank shaded by its expert traffic."""
    loads: dict[tuple[str, int], float] = {}
    texts: dict[tuple[str, int], str] = {}
    for name, d in pools.items():
        mean = relative_rank_loads(d.plan, d.load_array()).mean(axis=0) if d.plan.experts else []
        by_rank = dict(zip(d.plan.expert_rank_ids, map(float, mean), strict=False))
        for r in d.plan.ranks:
            held = f", {d.plan.slots_per_rank} slots a layer" if r.role in EXPERT_ROLES and d.plan.experts else ""
            loads[name, r.id] = by_rank.get(r.id, 0.0)
            texts[name, r.id] = (
                f"{r.role}, group {r.group}{held}, {by_rank.get(r.id, 0.0):.2f} x the mean expert traffic"
            )
    low, high = min(loads.values()), max(loads.values())

    def shade(pool: str, rank: int) -> tuple[str, str]:
        return f"s{level(loads[pool, rank], low, high)}", texts[pool, rank]

    drawn = _grid(pools, shade, (f"{low:.3f}", f"{high:.3f} x the mean"), "topology")
    text = "A cell is a rank, a row a host, a block a rack; the deeper its shade, the more expert traffic it has."
    return section("Where everything is", text, drawn)


def _memory(pools: dict[str, Deployment]) -> str:
    """The memory of each kind of device."""
    rows, limit = [], 0.0
    for name, d in _kinds(pools).items():
        limit = (memory_budget(d.cluster) or 0) / 1e9
        for device, uses in assessed(d).memory_by_device().items():
            parts, begin = [], 0.0
            for use, size in uses:
                parts.append((use, begin, size / 1e9))
                begin += size / 1e9
            rows.append((f"{name} {device}".strip(), parts))
    what = f"Memory of a device{smallest(next(iter(pools.values())).cluster)}"
    text = "Bytes by use; the line is what weights and cache may take."
    return section(what, text, stacked_bars(rows, "GB", limit))


def _kinds(pools: dict[str, Deployment]) -> dict[str, Deployment]:
    """Each kind of pool once: prefill instances are alike."""
    return {name.split(" ")[0]: pool for name, pool in reversed(pools.items())}


def _steps(pools: dict[str, Deployment]) -> str:
    """The parts of a step one below the other, each beginning where the one before ends."""
    drawn = []
    for name, d in _kinds(pools).items():
        step = assessed(d).step
        if step is None:
            continue
        rows, begin = [], 0.0
        for part, seconds in step.parts().items():
            rows.append((part, [(part, begin * 1e3, seconds * 1e3)]))
            begin += seconds
        if begin - step.total > 1e-6:
            rows.append(("hidden by overlap", [("hidden by overlap", step.total * 1e3, (begin - step.total) * 1e3)]))
        rows.append(("the step", [("the step", 0.0, step.total * 1e3)]))
        band = deployment_band(d, d.shape, assessed(d).requests_per_group)
        took = band.text(step.total * 1e3, "tpot", "ms")
        said = prose(f"{name or 'all ranks'}: {took} {band.source()}")
        drawn.append(f"<p>{said}</p>" + stacked_bars(rows, "ms"))
    return section(
        "A step",
        "Milliseconds of the busiest rank by part, as a waterfall; each part is off by the factor of the step.",
        *drawn,
    )


def _shade(o: LossOutcome, low: float, high: float, ranges: Ranges) -> tuple[str, str]:
    """The class and the text of a loss."""
    if not o.survivable:
        return "bad", f"not survivable: {o.reason}"
    stall, own, left = range_cells(ranges)
    return f"s{level(log(o.moved_stall), low, high)}", f"its requests wait {own} ms, others {stall} ms; {left} left"


def _alike(losses: Sequence[LossOutcome]) -> list[list[LossOutcome]]:
    """The losses that cost nearly the same, together; the worst first."""
    found: dict[tuple, list[LossOutcome]] = {}
    for o in losses:
        stalls = (f"{o.stall:.2g}", f"{o.moved_stall:.2g}", f"{o.capacity:.2f}")
        found.setdefault((o.kind, o.survivable, *(stalls if o.survivable else (o.reason,))), []).append(o)
    return sorted(found.values(), key=lambda each: (each[0].survivable, -each[0].moved_stall))


def _losses(
    pools: dict[str, Deployment], outcomes: Sequence[LossOutcome], ranges: Callable[[LossOutcome], Ranges]
) -> str:
    """The cost of each loss: a heat map of ranks, hosts and racks, and a table of the losses that cost the most."""
    of_rank = {o.dead[0]: o for o in outcomes if o.kind.endswith("rank")}
    of_domain = {(o.kind, o.name): o for o in outcomes if not o.kind.endswith("rank")}
    values = [log(o.moved_stall) for o in outcomes if o.survivable]
    low, high = min(values, default=0.0), max(values, default=0.0)

    def shade(pool: str, rank: int) -> tuple[str, str]:
        return _shade(of_rank[rank], low, high, ranges(of_rank[rank]))

    def domain(pool: str, kind: str, name: str) -> tuple[str, str] | None:
        kinds = (f"{pool.split(' ')[0]}_{kind}", f"both_{kind}") if pool else (kind,)
        outcome = next((found for each in kinds if (found := of_domain.get((each, name)))), None)
        return None if outcome is None else _shade(outcome, low, high, ranges(outcome))

    key = (f"{exp(low) * 1e3:,.0f}", f"{exp(high) * 1e3:,.0f} ms")
    drawn = _grid(pools, shade, key, "cost of each loss", domain)
    rows, groups = [], _alike(outcomes)
    for each in groups[:MOST_ROWS]:
        o = each[0]
        stall, own, left = range_cells(ranges(o))
        more = f" and {len(each) - 1} like it" if len(each) > 1 else ""
        why = stall if o.survivable else o.reason or "no"
        rows.append([f"{o.kind.replace('_', ' ')} {o.name}{more}", why, own, left, f"{o.bytes_moved / 1e9:,.1f}"])
    head = ["loss", "others wait, ms", "its own, ms", "capacity left", "GB moved"]
    title = "<p>By cost, the worst first</p>" if rows else ""
    text = (
        "A cell is the loss of a rank, the bar beside them that of the host, and the one above that of the rack: "
        "deeper where its own requests wait longer, red where it is not survivable. All are estimates."
    )
    return section("What each loss costs", text, drawn, title, html_table(head, rows) if rows else "")
