"""The status, the loss forecasts and the events of a server as text for a terminal or a pipe."""

import dataclasses
import datetime
import os
import sys
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from planner.cost.band import range_text
from serving.protocol.events import Event, EventKind, Severity
from serving.protocol.prepared_model import ModelInfo
from serving.protocol.sampling import SamplingDefaults
from serving.protocol.status import LossForecast, RankStatus, Status

_PIPED_WIDTH = 1 << 14
"""Columns of output that is not a terminal: more than any line has, so that a pipe gets whole lines."""
_EXPERTS_WIDTH = 48
_COLOURS = {"serving": "green", "joining": "yellow", "starting": "yellow", "draining": "yellow", "dead": "red"}
_EVENT_COLOURS = {Severity.BAD: "red", Severity.GOOD: "green"}
_KIND_WIDTH = max(map(len, EventKind))


def console() -> Console:
    """A console for standard output, as wide as its terminal."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=_PIPED_WIDTH if piped else None)


def status_view(status: Status, model: ModelInfo) -> RenderableType:
    """The status of a server on one screen."""
    state = "[green]ready[/]" if status.ready else "[red]not ready[/]"
    mesh = ", ".join(f"{name} {size}" for name, size in status.axes.items()) or "none"
    lattice = ", ".join(f"{loss}: {share:.0%}" for loss, share in status.lattice.items()) or "none"
    masked = ", ".join(f"layer {layer} expert {expert}" for layer, expert in status.masked) or "none"
    recovered = f"{status.tokens_restored} tokens of lost ranks restored, {status.tokens_recomputed} recomputed"
    parity = f"{status.parity_groups} of {status.parity_wanted} groups" if status.parity_wanted else "none"
    reloaded = f"{status.experts_loaded} read from the host store, {status.experts_rebuilt} rebuilt from parity"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{model.name}, {model.experts} experts, context {model.max_context}"),
        ("sampling", _sampling(model.sampling_defaults)),
        (
            "state",
            f"{state}, epoch {status.epoch}, generation {status.generation}, front pid {status.front_pid}",
        ),
        ("code", _code(status)),
        ("weights", _weights(status)),
        ("edges", _edges(status)),
        *((("pools", _pools(status)),) if status.pools else ()),
        ("mesh", f"{mesh}; {status.slots_per_rank} slots per rank"),
        ("losses prepared", lattice),
        ("experts masked", masked),
        ("experts reloaded", reloaded),
        ("expert parity", f"{parity}, {status.parity_bytes >> 20} MiB"),
        ("requests", f"{status.running} running, {status.waiting} waiting, {status.finished} finished"),
        ("steps", f"{status.steps}; {_padding(status)}; {_shapes(status)}"),
        ("KV cache", f"{status.kv_cache_type}, {status.kv_token_bytes:,} bytes a token"),
        ("KV replicas", f"{status.protection}, {status.protected_bytes >> 20} MiB; {recovered}"),
        ("recoveries", f"{status.recoveries}; {status.failed} requests failed"),
        ("poison", f"{status.suspects} requests suspected, {status.convicted} ended"),
        ("speculation", _speculation(status)),
        ("certificate", _certificate(status)),
        ("compiles since ready", str(status.compiles_after_ready)),
    ):
        facts.add_row(Text(name, "bold"), Text.from_markup(value))
    return Group(facts, "", _ranks(status.ranks, status.build), *_failures(status.ranks))


def _failures(ranks: Sequence[RankStatus]) -> list[Text]:
    """How ranks failed of themselves the last time, one on each line."""
    return [Text(f"rank {rank.id} {rank.last_failure}", "red") for rank in ranks if rank.last_failure]


def _weights(status: Status) -> str:
    """The version of the weights in force, and of weights that are being brought in."""
    coming = f", version {status.next_weights_version} is being brought in" if status.next_weights_version else ""
    return f"version {status.weights_version}{coming}; {status.weights_switches} switches since the start"


def _code(status: Status) -> str:
    """The build of the front, and how the last upgrade goes on or ended."""
    if not status.upgrade:
        return escape(status.build)
    stage = f", {status.upgrade_stage} to {status.upgrade_build}" if status.upgrade_stage else ""
    cause = f": {status.upgrade_cause}" if status.upgrade_cause else ""
    ended = f"; {status.upgrades_done} upgrades done, {status.upgrades_rolled_back} rolled back"
    return escape(f"{status.build}; upgrade {status.upgrade.replace('_', ' ')}{stage}{cause}{ended}")


def _edges(status: Status) -> str:
    """The processes that hold the clients' connections, with their open calls."""
    texts = (
        escape(f"{edge}")
        + f" with {edge.calls} calls{'' if edge.serving else ', not serving'}"
        + (f", {escape(edge.build)}" if edge.build != status.build else "")
        for edge in status.edges
    )
    return ", ".join(texts) or "none; the front holds the clients' connections"


def _pools(status: Status) -> str:
    """The work of each pool, and how many requests have gone from one to the other."""
    texts = (
        f"{each.name} {'with' if each.serving else '[red]lost[/], with'} {each.ranks} ranks, epoch {each.epoch}, "
        f"generation {each.generation}, {each.running} running, {each.waiting} waiting, "
        f"{each.step_ms / max(each.steps, 1):.1f} ms for each of {each.steps} steps"
        for each in status.pools
    )
    return f"{'; '.join(texts)}; {status.requests_sent} requests sent, {status.requests_returned} returned"


def _certificate(status: Status) -> str:
    """Whether the certificate holds, else why not and with which ranks it would."""
    if status.certificate != "does not hold":
        return status.certificate or "none"
    repair = f"; it would with {status.certificate_repair}" if status.certificate_repair else ""
    return f"[red]does not hold[/], {status.certificate_reason}{repair}"


def _speculation(status: Status) -> str:
    """How tokens are drafted, and the tokens that a step with drafts gave a request."""
    if not status.drafts:
        return status.speculate
    share, tokens = status.accepted / status.drafted, 1 + status.accepted / status.drafts
    return f"{status.speculate}; {share:.0%} of {status.drafted} drafted tokens right, {tokens:.2f} tokens a step"


def _sampling(defaults: SamplingDefaults) -> str:
    """The model's own defaults."""
    neutral = dataclasses.asdict(SamplingDefaults())
    own = {name: value for name, value in dataclasses.asdict(defaults).items() if value != neutral[name]}
    given = ", ".join(f"{name} {value:g}" for name, value in own.items())
    return f"{given} unless a request says otherwise" if given else "temperature 1 unless a request says otherwise"


def _padding(status: Status) -> str:
    return f"{1 - status.rows_filled / status.rows:.0%} of their rows were padding" if status.rows else "no rows yet"


def _shapes(status: Status) -> str:
    return "buckets " + (" ".join(f"{rows},{tiles}" for rows, tiles in status.buckets) or "unknown")


def _ranks(ranks: Sequence[RankStatus], build: str) -> Table:
    """The ranks; their snapshots of states, if they keep some; whose stream each is on where host agents pass streams
    on; and their builds while one runs other code than the front, of `build`."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    several = len({rank.host for rank in ranks}) > 1
    mixed = any(rank.build not in ("", build) for rank in ranks)
    relayed = any(rank.relay for rank in ranks)
    snapshots = any(rank.snapshots for rank in ranks)
    for column in ("rank", "state", "role", "pid", "requests", "cache", "step ms"):
        table.add_column(column, justify="left" if column in ("state", "role") else "right", no_wrap=True)
    if snapshots:
        table.add_column("snapshots", justify="right", no_wrap=True)
    if several:
        table.add_column("host", no_wrap=True)
    if relayed:
        table.add_column("stream of", no_wrap=True)
    if mixed:
        table.add_column("build", no_wrap=True)
    table.add_column("experts in slots")
    for rank in ranks:
        cache = f"{rank.pages_used}/{rank.pages}" if rank.pages else "-"
        table.add_row(
            str(rank.id),
            Text(rank.state, _COLOURS.get(rank.state, "")),
            rank.role,
            "-" if rank.pid is None else str(rank.pid),
            str(rank.running),
            cache,
            f"{rank.step_ms:.1f}",
            *([f"{rank.snapshots_used}/{rank.snapshots}"] if snapshots else []),
            *([rank.host] if several else []),
            *([rank.relay or "its own"] if relayed else []),
            *([rank.build] if mixed else []),
            _experts(rank),
        )
    return table


def _experts(rank: RankStatus) -> str:
    """The experts in the slots of as many layers as fit, at least of the first."""
    rows = [" ".join(map(str, row)) for row in rank.slots]
    count = max((n for n in range(1, len(rows) + 1) if len(" | ".join(rows[:n])) <= _EXPERTS_WIDTH), default=1)
    more = f" | +{len(rows) - count} layers" if len(rows) > count else ""
    return " | ".join(rows[:count]) + more


def loss_forecast_view(forecasts: Sequence[LossForecast]) -> RenderableType:
    """The loss forecasts, one on each line, and below them why some losses are not survivable."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("loss", "prepared", "requests", "recomputed", "experts", "stall ms", "moved ms", "capacity"):
        text = column in ("loss", "prepared")
        table.add_column(column, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for p in forecasts:
        prepared = ("yes" if p.prepared else "no") if p.survivable else "impossible"
        figures = (p.requests_moved, p.tokens_recomputed, p.experts_loaded, *_ranges_of(p))
        table.add_row(f"{p.kind} {p.name}", prepared, *map(str, figures))
    sources = dict.fromkeys(p.range_source for p in forecasts if p.range_source)
    refused = [Text(f"{p.kind} {p.name} is not survivable: {p.reason}") for p in forecasts if not p.survivable]
    return Group(table, *(["", *refused] if refused else []), *(Text(source) for source in sources))


def _ranges_of(p: LossForecast) -> tuple[str, str, str]:
    """Both stalls and the capacity left of a forecast, as ranges; single figures from a server without ranges."""
    if not p.range_source or not p.survivable:
        return f"{p.stall_ms:.0f}", f"{p.moved_stall_ms:.0f}", f"{p.capacity:.0%}"
    stall, moved = (
        range_text({"low": low, "high": high})
        for low, high in ((p.stall_low_ms, p.stall_high_ms), (p.moved_stall_low_ms, p.moved_stall_high_ms))
    )
    shares = dict.fromkeys((f"{100 * p.capacity_low:.0f}", f"{100 * p.capacity_high:.0f}"))
    return stall, moved, "-".join(shares) + "%"


def _event_colour(event: Event) -> str:
    return next((colour for severity, colour in _EVENT_COLOURS.items() if severity == event.severity), "bold")


def event_line(event: Event) -> Text:
    """One event on one line."""
    time = datetime.datetime.fromtimestamp(event.time).strftime("%H:%M:%S.%f")[:-3]
    line = Text.assemble((time, "dim"), "  ", (f"{event.kind:<{_KIND_WIDTH}}", _event_colour(event)))
    line.append(f"  epoch {event.epoch}")
    if event.rank is not None:
        line.append(f"  rank {event.rank}")
    for text in (event.cause, event.message):
        if text:
            line.append(f"  {text}")
    if event.phases:
        line.append("  " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in event.phases.items()), "dim")
    return line
