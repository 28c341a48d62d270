"""Reports of plans of pools (P/D), and of architectures side by side, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, hypot, log

from planner.cli.report import memory_bars, smallest
from planner.cli.table import table
from planner.cost.band import Band, range_text
from planner.cost.design import Design
from planner.cost.pools import PooledDesign
from planner.cost.throughput import Candidate
from planner.failures.loss_bands import range_cells
from planner.failures.loss_forecast import summarise
from planner.failures.pool_losses import PoolLossModel, forecast_pool_losses


def pools_report(found: PooledDesign, *, splits: int = 6, width: int | None = None) -> str:
    """The chosen pools, what they reach together, the cost of their losses, and the splits that lost."""
    pooled, rates, band = found.deployment, found.rates, found.band()
    d, decode, prompts = pooled.decode, found.decode.chosen, found.prefill.chosen
    devices = len(decode.shape.roles) + found.instances * len(prompts.shape.roles)
    traffic = d.traffic
    lines = [
        f"{d.workload.name} on {d.cluster.name}: pools for prompts and decode, {pooled.service}",
        "",
        f"prefill: {found.instances} x ({prompts.shape.describe()})",
        f"  {band.text(rates.prompts, 'rate', 'prompts/s')} of {traffic.prompt:,.0f} tokens, "
        f"{prompts.requests_per_group} of a group in {_step(prompts, band)}  [estimate]",
        f"decode:  {decode.shape.describe()}",
        f"  {band.text(rates.decode, 'rate', 'requests/s')}, {decode.requests_per_group} x {decode.shape.data} groups "
        f"in {_step(decode, band)}  [estimate]",
        f"transfer: {rates.transfer_bytes / 1e6:,.0f} MB of KV cache a request, "
        f"{band.text(rates.transfer_seconds * 1e3, 'ttft', 'ms')}, {rates.rate / rates.network:.1%} of the network of "
        "the smaller side  [estimate]",
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
            lines += [
                "",
                f"memory of {what}{smallest(design.deployment.cluster)}",
                *memory_bars(design.deployment, uses),
            ]
    losses = PoolLossModel(pooled)
    lines += ["", "what a loss costs (streams; prompts or its own requests; requests/s left)"]
    for row in summarise(forecast_pool_losses(losses), losses.ranges):
        stall, own, capacity = range_cells(row["worst_ranges"])
        lines.append(
            f"  {row['kind'].replace('_', ' ')}: {row['survivable']}/{row['cases']} survivable, at worst "
            f"{stall} ms; {own} ms; {capacity}"
        )
    lines.append(f"  {losses.source()}")
    rows = [
        [
            f"{count} x {size} + {rest}",
            *(
                range_text(found.ranges(each)["ranges"][name])
                for name in (
                    "requests_per_second_of_prompts",
                    "requests_per_second_of_decode",
                    "tokens_per_second",
                    "ttft_s",
                )
            ),
        ]
        for size, count, rest, each in found.splits[:splits]
    ]
    hosts = {device.host for pool in pooled.pools().values() for device in pool.cluster.devices}
    unit = "hosts" if len(hosts) > 1 else "devices"
    head = [f"{unit}: prefill + decode", "prompts/s", "decode/s", "tokens/s", "TTFT s"]
    lines += ["", "splits compared, best first", table(head, rows, width=width)]
    return "\n".join(lines)


def _step(c: Candidate, band: Band) -> str:
    return f"a step of {band.text(c.step.total * 1e3, 'tpot', 'ms')}" if c.step else "no step"


def architectures_report(
    found: Mapping[str, Design | PooledDesign], failed: Mapping[str, str], best: str, *, width: int | None = None
) -> str:
    """The best plan of each architecture side by side, with its gain in tokens/s over the collocated one, as ranges:
    both may be off by their factors in either direction."""
    base = found.get("collocated")
    rows = []
    for arch, each in found.items():
        band, ranges = _of(each)
        gain = "-"
        if isinstance(base, Design):
            times = ranges["tokens_per_second"]["mid"] / base.chosen.tokens_per_second
            unsure = exp(hypot(log(band.rate), log(base.band(base.chosen).rate))) if each is not base else 1.0
            gain = f"{times:.2f}" + (f" ({times / unsure:.2f}-{times * unsure:.2f})" if unsure > 1 else "")
        note = "chosen" if arch == best else ""
        if isinstance(each, PooledDesign):
            note = ", ".join(filter(None, (note, each.deployment.only_planned)))
        names = ("tokens_per_second", "tokens_per_second_per_user", "ttft_s")
        rate, user, ttft = (range_text(ranges[name]) for name in names)
        rows.append([arch, rate, gain, user, ttft, note])
    rows += [[arch, "-", "-", "-", "-", reason] for arch, reason in failed.items()]
    head = ["architecture", "tokens/s", "gain", "a user", "TTFT s", "note"]
    return "architectures compared [estimate]\n" + table(head, rows, width=width)


def _of(each: Design | PooledDesign) -> tuple[Band, Mapping[str, Mapping[str, float]]]:
    """The band of a design, and its figures as ranges."""
    if isinstance(each, PooledDesign):
        return each.band(), each.ranges()["ranges"]
    return each.band(each.chosen), each.ranges(each.chosen)["ranges"]
