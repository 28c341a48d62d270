"""Reports of plans of pools (P/D), and of architectures side by side, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from planner.cli.report import memory_bars
from planner.cli.table import table
from planner.cost.design import Design
from planner.cost.pools import PooledDesign
from planner.cost.throughput import Candidate
from planner.failures.loss_forecast import summarise
from planner.failures.pool_losses import forecast_pool_losses
from planner.plan.deployment import PLANNED_ONLY


def pools_report(found: PooledDesign, *, splits: int = 6, width: int | None = None) -> str:
    """The chosen pools, what they reach together, the cost of their losses, and the splits that lost."""
    pooled, rates, band = found.deployment, found.rates, found.band()
    d, decode, prompts = pooled.decode, found.decode.chosen, found.prefill.chosen
    devices = len(decode.shape.roles) + found.instances * len(prompts.shape.roles)
    traffic = d.traffic
    lines = [
        f"{d.workload.name} on {d.cluster.name}: pools for prompts and decode, {PLANNED_ONLY}",
        "",
        f"prefill: {found.instances} x ({prompts.shape.describe()})",
        f"  {rates.prompts:.3g} prompts/s of {traffic.prompt:,.0f} tokens, {prompts.requests_per_group} of a group in "
        f"{_milliseconds(prompts, 0)}  [estimate]",
        f"decode:  {decode.shape.describe()}",
        f"  {rates.decode:.3g} requests/s, {decode.requests_per_group} x {decode.shape.data} groups in "
        f"{_milliseconds(decode, 1)}  [estimate]",
        f"transfer: {rates.transfer_bytes / 1e6:,.0f} MB of KV cache a request, "
        f"{rates.transfer_seconds * 1e3:,.1f} ms, {rates.rate / rates.network:.1%} of the network of the smaller side  "
        "[estimate]",
        "",
        f"{found.tokens_per_second:,.0f} tokens/s ({found.tokens_per_second / devices:,.0f} a device), "
        f"{found.tokens_per_second_per_user:.1f} a user, first token after {rates.ttft:.2f} s  [estimate]",
        f"  a token every {band.text(1e3 * rates.tpot, 'tpot', 'ms')}, the first after "
        f"{band.text(rates.ttft, 'ttft', 's')}, {band.text(found.tokens_per_second, 'rate', 'tokens/s')}",
        f"  {band.source()}",
    ]
    for name, design in (("a prefill", found.prefill), ("a decode", found.decode)):
        for device, uses in design.chosen.memory_by_device().items():
            what = f"{name} device" if device == "a device" else f"{device} for {name}"
            lines += ["", f"memory of {what}", *memory_bars(design.deployment, uses)]
    lines += ["", "what a loss costs (streams; prompts or its own requests; requests/s left)"]
    for row in summarise(forecast_pool_losses(pooled)):
        lines.append(
            f"  {row['kind'].replace('_', ' ')}: {row['survivable']}/{row['cases']} survivable, at worst "
            f"{row['worst_stall_ms']:,.0f} ms; {row['worst_moved_stall_ms']:,.0f} ms; {row['worst_capacity']:.1%}"
        )
    rows = [
        [
            f"{count} x {size} + {rest}",
            f"{each.prompts:.3g}",
            f"{each.decode:.3g}",
            f"{each.rate * traffic.output:,.0f}",
            f"{each.ttft:.2f}",
        ]
        for size, count, rest, each in found.splits[:splits]
    ]
    hosts = {device.host for pool in pooled.pools().values() for device in pool.cluster.devices}
    unit = "hosts" if len(hosts) > 1 else "devices"
    head = [f"{unit}: prefill + decode", "prompts/s", "decode/s", "tokens/s", "TTFT s"]
    lines += ["", "splits compared, best first", table(head, rows, width=width)]
    return "\n".join(lines)


def _milliseconds(c: Candidate, digits: int) -> str:
    return f"a step of {c.step.total * 1e3:,.{digits}f} ms" if c.step else "no step"


def architectures_report(
    found: Mapping[str, Design | PooledDesign], failed: Mapping[str, str], best: str, *, width: int | None = None
) -> str:
    """The best plan of each architecture side by side, with its gain over the collocated one."""
    base = found.get("collocated")
    rows = []
    for arch, each in found.items():
        if isinstance(each, PooledDesign):
            rate, user, ttft = each.tokens_per_second, each.tokens_per_second_per_user, each.rates.ttft
        else:
            c = each.chosen
            rate, user, ttft = c.tokens_per_second, c.tokens_per_second_per_user, c.ttft_seconds
        gain = "-" if not isinstance(base, Design) else f"{rate / base.chosen.tokens_per_second:.2f}"
        note = "chosen" if arch == best else ""
        if isinstance(each, PooledDesign):
            note = ", ".join(filter(None, (note, PLANNED_ONLY)))
        rows.append([arch, f"{rate:,.0f}", gain, f"{user:.1f}", f"{ttft:.2f}", note])
    rows += [[arch, "-", "-", "-", "-", reason] for arch, reason in failed.items()]
    head = ["architecture", "tokens/s", "gain", "a user", "TTFT s", "note"]
    return "architectures compared [estimate]\n" + table(head, rows, width=width)
