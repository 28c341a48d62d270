"""`moejax plan certify`: whether every loss keeps the service levels, as text and as a signed file."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from math import ceil, inf

from planner.cli.command import CommandResult, read_losses, read_words, with_store, write_text
from planner.cli.table import table, terminal_width
from planner.cost.band import range_text
from planner.errors import InputError, NoFeasiblePlan
from planner.failures.certificate import LossesOfASize, Terms, Verdict, certify, read_service_levels
from planner.failures.certificate_file import Certificate, certificate, read_certificate, read_key
from planner.failures.loss_bands import LossBands, range_cells
from planner.failures.loss_model import MEANS, OPTIONAL_MEANS, LossModel
from planner.failures.pool_losses import PoolLossModel
from planner.plan.deployment import read_fault_tolerance
from planner.plan.pools import PooledDeployment, read_any_deployment


def run(options: Namespace) -> CommandResult:
    """`certify PLAN`: makes a certificate, or with --check reads one."""
    if options.check:
        return _checked(read_certificate(options.check), options)
    if not options.slo:
        raise InputError("--slo is missing; give the service levels, as --slo tpot_ms=50,stall_ms=500")
    if not 0 < options.load <= 1:
        raise InputError(f"--load is {options.load}; it is a share of the requests of the plan, above 0 and up to 1")
    levels = read_service_levels(options.slo)
    refused = read_words(options.without, OPTIONAL_MEANS, "--without")
    means = [m for m in MEANS if m not in refused and m != "mask"]
    losses = read_losses(options, means, one_front=not options.without_front)
    one = losses.decode if isinstance(losses, PoolLossModel) else losses
    survive = read_fault_tolerance(options.survive) if options.survive else one.deployment.survive
    whole = one.capacity_model.whole
    most = whole.requests_per_group * whole.shape.data
    if not most:
        raise NoFeasiblePlan(f"the plan runs no request, so there is nothing to certify: {whole.reason}")
    terms = Terms(survive=survive, levels=levels, requests=ceil(options.load * most))
    verdict = certify(losses, terms)
    made = certificate(losses, terms, verdict, one_front=not options.without_front)
    if options.key:
        made = made.signed(read_key(options.key))
    write_text(options.out, made.to_json())
    source = losses.source() if isinstance(losses, PoolLossModel) else LossBands(losses).source()
    lines = [*_heading(terms, most), *_verdict_lines(verdict), source]
    if not verdict.holds:
        lines.append(_way_out(losses, terms, most))
    if options.out:
        lines.append(f"wrote {options.out}, " + ("signed" if made.signature else "not signed (--key FILE signs it)"))
    return CommandResult(data=_data(made), text="\n".join(filter(None, lines)), good=verdict.holds)


def _heading(terms: Terms, most: int) -> list[str]:
    levels = ", ".join(f"{name} {value:g}" for name, value in vars(terms.levels).items() if value is not None)
    return [f"{levels} after any loss of {terms.survive}, with {terms.requests:,} of {most:,} requests running"]


def _verdict_lines(verdict: Verdict) -> list[str]:
    rows = [_row(s) for s in verdict.sizes]
    head = ["losses", "of them", "priced", "tpot ms", "stall ms", "its own", "capacity", "kept"]
    lines = ["", table(head, rows, width=terminal_width()), ""] if rows else []
    if any(s.priced < s.losses and not s.failing for s in verdict.sizes):
        lines.append(
            "losses that were not priced are proven by a bound (docs/planner.md); figures are the worst [estimate]"
        )
    if verdict.missed:
        lines.append(f"does not hold: {verdict.missed}")
    elif (worst := verdict.failing) is not None and worst.failing is not None:
        ranks = len(worst.failing.dead)
        of = f"{worst.kind} {worst.failing.name}" + (f", {ranks} ranks" if worst.kind != "rank" else "")
        lines.append(f"does not hold: the smallest loss that misses it is {of}: {worst.missed}")
    elif not verdict.holds:
        lines.append("not proven: there are more losses than the bound covers and could be priced")
    else:
        lines.append("holds: every loss keeps it")
    if verdict.holds:
        sure = (
            f"not at the worse ends of the ranges: {verdict.unsure}" if verdict.unsure else "also at their worse ends"
        )
        lines.append(sure)
    return lines


def _row(size: LossesOfASize) -> list[str]:
    if "tpot_ms" in size.ranges and size.worst["stall_ms"] < inf:
        figures, (stall, own, capacity) = [range_text(size.ranges["tpot_ms"])], range_cells(size.ranges)
        figures += [stall, own]
    else:
        figures, capacity = ["never"] * 3 if size.worst else ["-"] * 3, "0.0%" if size.worst else "-"
    kept = "no" if size.failing else "not proven" if size.unfinished else "yes"
    return [f"{size.lost} {size.kind}", f"{size.losses:,}", f"{size.priced:,}", *figures, capacity, kept]


def _way_out(losses: LossModel | PoolLossModel, terms: Terms, most: int) -> str:
    """The largest load with which the certificate holds; empty where no load helps."""
    low, high = 0, terms.requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        held = certify(losses, replace(terms, requests=middle), each=0).holds
        low, high = (middle, high) if held else (low, middle - 1)
    if not low:
        return ""
    return f"it holds with {low:,} requests: --load {int(1e4 * low / most) / 1e4:g}"


def _checked(given: Certificate, options: Namespace) -> CommandResult:
    """The report on a certificate: its signature, the plan it is of, and its verdict."""
    found = read_any_deployment(options.plan)
    if options.key:
        given.check(read_key(options.key))
    pooled = isinstance(found, PooledDeployment)
    store = options.store
    other = given.differences(found.each(lambda d: with_store(d, store)) if pooled else with_store(found, store))
    lines = ["signed with this key" if options.key else "signature not checked (--key FILE)"]
    lines.append(f"of another {', '.join(other)}" if other else "of this plan, model, cluster and loads")
    lines.append(
        ("holds" if given.holds else "does not hold") + (" for what it was made of, not for this" if other else "")
    )
    data = _data(given) | {"differences": other}
    return CommandResult(data=data, text="\n".join(lines), good=given.holds and not other)


def _data(made: Certificate) -> dict:
    """The certificate for --json."""
    return {
        "holds": made.holds,
        "signed": bool(made.signature),
        "requests": made.terms.requests,
        "verdict": dict(made.verdict),
        "sha256": dict(made.hashes),
        "signature": made.signature,
    }
