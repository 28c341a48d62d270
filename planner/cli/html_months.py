"""Simulated months of a plan on its page: the devices that are down over time, and the policies side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from planner.cli.html_page import html_table, label, rect, section, svg
from planner.cli.loss_report import share_range
from planner.cost.band import range_text
from planner.failures.sides import TOGETHER
from planner.failures.simulate import PolicyResult, simulate
from planner.failures.timeline import FailureEvent, timeline
from planner.plan.pools import AnyDeployment, PooledDeployment

DAYS = 180.0
WIDTH = 960.0


def months(deployment: AnyDeployment, seed: int) -> str:
    """The section; of a plan of pools with a table for the whole plan and one for either side."""
    pools = tuple(deployment.pools().values()) if isinstance(deployment, PooledDeployment) else (deployment,)
    events = timeline(deployment, days=DAYS, seed=seed)
    results = simulate(deployment, events, days=DAYS)
    sides: dict[str, list[PolicyResult]] = {}
    for each in results:
        sides.setdefault(each.side, []).append(each)
    tables = [
        (f"<h3>{escape(_title(side))}</h3>" if len(sides) > 1 else "") + _table(rows) for side, rows in sides.items()
    ]
    text = "Devices down at the cluster's failure rates, and what the months cost under each policy [estimate]."
    if len(sides) > 1:
        text += " A side that is lost has an outage of its own, also while the other one does the work of both."
    ranks = sum(len(pool.plan.ranks) for pool in pools)
    return section(f"{DAYS:.0f} simulated days", text, _down_over_time(events, ranks), *tables)


def _title(side: str) -> str:
    return "both sides together" if side == TOGETHER else f"the ranks for {'prompts' if side == 'prefill' else side}"


def _down_over_time(events: Sequence[FailureEvent], ranks: int) -> str:
    """The number of devices that are down over the days."""
    down, points = Counter[int](), [(0.0, 0)]
    for event in events:
        for rank in event.ids:
            down[rank] += -1 if event.up else 1
        points.append((event.hour / 24, sum(1 for count in down.values() if count > 0)))
    points.append((DAYS, points[-1][1]))
    most = max(1, *(count for _, count in points))
    drawn, floor = [], 128.0
    for (day, count), (until, _) in pairwise(points):
        height = 112 * count / most
        text = f"day {day:.1f} to {until:.1f}: {count} of {ranks:,} devices down"
        wide = max(1.2 if count else 0.0, (until - day) / DAYS * 900)
        drawn.append(rect(40 + day / DAYS * 900, floor - height, wide, height, "p5", text))
    drawn.append(f'<line x1="40" x2="940" y1="{floor}" y2="{floor}" class="axis"/>')
    drawn += [label(34, 22, f"{most}", anchor="end", kind="soft"), label(44, 12, "devices down", kind="soft")]
    for month in range(int(DAYS) // 30 + 1):
        x = 40 + month * 30 / DAYS * 900
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}" class="axis"/>')
        drawn.append(label(x, floor + 24, f"day {month * 30}", anchor="end" if x > 920 else "middle", kind="soft"))
    return svg(WIDTH, 156, drawn, "devices down", narrow=True)


def _table(rows: Sequence[PolicyResult]) -> str:
    """The policies of one side, figures as ranges."""
    head = ["policy", "availability", "goodput lost", "outage, h", "masked, h", "reduced, h", "stall, s"]
    switched = any(r.switched_hours for r in rows)
    cells = [
        [r.policy, share_range(*r.availability_range), share_range(r.goodput_low, r.goodput_high)]
        + [f"{x:,.1f}" for x in (r.outage_hours, r.degraded_hours, r.reduced_hours)]
        + [range_text({"low": r.stall_low, "high": r.stall_high})]
        + ([f"{r.switched_hours:,.1f}"] if switched else [])
        for r in rows
    ]
    return html_table([*head, *(["one side for both, h"] if switched else [])], cells)
