"""Plans that tests change by hand."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from planner import Plan
from planner.plan.plan import as_tuples


def with_masked(plan: Plan, pairs: Collection[tuple[int, int]]) -> Plan:
    """The plan with these (moe_layer, expert) pairs taken out of every slot and masked."""
    table = plan.slot_table()
    for layer, expert in pairs:
        table[layer][table[layer] == expert] = -1
    return replace(plan, slots=as_tuples(table), masked=tuple(sorted({*plan.masked, *pairs})))
