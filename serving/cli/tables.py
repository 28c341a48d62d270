"""What the command line shows of a server: its status and events as tables."""

import datetime
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serving.status import Event, ModelInfo, Prospect, RankStatus, Status

_COLOURS = {"serving": "green", "joining": "yellow", "starting": "yellow", "dead": "red", "failed": "red"}
_EVENT_COLOURS = {"rank_lost": "red", "no_capacity": "red", "recovered": "green", "rejoined": "green"}


def status_view(status: Status, model: ModelInfo) -> RenderableType:
    """The whole server on one screen."""
    state = "[green]ready[/]" if status.ready else "[red]not ready[/]"
    mesh = ", ".join(f"{name} {size}" for name, size in status.axes.items()) or "none"
    lattice = ", ".join(f"{loss}: {share:.0%}" for loss, share in status.lattice.items()) or "none"
    masked = ", ".join(f"layer {layer} expert {expert}" for layer, expert in status.masked) or "none"
    copies = "not copied" if status.protection == "off" else f"copied ({status.protection})"
    given = f"{status.tokens_restored} entries of lost ranks restored, {status.tokens_recomputed} computed again"
    parity = f"{status.parity_groups} of {status.parity_wanted} groups" if status.parity_wanted else "none"
    lost = f"{status.experts_loaded} read from the store, {status.experts_rebuilt} made again from parity"
    facts = Table.grid(padding=(0, 2))
    for name, value in (
        ("model", f"{model.name}, {model.experts} experts, context {model.max_context}"),
        (
            "state",
            f"{state}, epoch {status.epoch}, generation {status.generation}, front pid {status.front_pid}",
        ),
        ("mesh", f"{mesh}; {status.slots_per_rank} slots per rank"),
        ("losses prepared", lattice),
        ("experts masked", masked),
        ("experts", lost),
        ("parity", f"{parity}, {status.parity_bytes >> 20} MiB"),
        ("requests", f"{status.running} running, {status.waiting} waiting, {status.finished} finished"),
        ("steps", f"{status.steps}; {_padding(status)}; {_shapes(status)}"),
        ("caches", f"{copies}, {status.protected_bytes >> 20} MiB; {given}"),
        ("recoveries", f"{status.recoveries}; {status.failed} requests failed"),
        ("compiles since ready", str(status.compiles_after_ready)),
    ):
        facts.add_row(Text(name, "bold"), Text.from_markup(value))
    return Group(facts, "", _ranks(status.ranks))


def _padding(status: Status) -> str:
    return f"{1 - status.rows_filled / status.rows:.0%} of their rows were padding" if status.rows else "no rows yet"


def _shapes(status: Status) -> str:
    return "compiled for " + " ".join(f"{rows},{tiles}" for rows, tiles in status.buckets)


def _ranks(ranks: Sequence[RankStatus]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    several = len({rank.host for rank in ranks}) > 1
    for column in ("rank", "state", "role", "pid", "requests", "cache", "step ms"):
        table.add_column(column, justify="left" if column in ("state", "role") else "right", no_wrap=True)
    if several:
        table.add_column("host", no_wrap=True)
    table.add_column("experts in slots of the first layers")
    for rank in ranks:
        cache = f"{rank.pages_used}/{rank.pages}" if rank.pages else "-"
        experts = " | ".join(" ".join(map(str, row)) for row in rank.slots[:3])
        more = f" | +{len(rank.slots) - 3} layers" if len(rank.slots) > 3 else ""
        table.add_row(
            str(rank.id),
            Text(rank.state, _COLOURS.get(rank.state, "")),
            rank.role,
            "-" if rank.pid is None else str(rank.pid),
            str(rank.running),
            cache,
            f"{rank.step_ms:.1f}",
            *([rank.host] if several else []),
            experts + more,
        )
    return table


def prospects_view(prospects: Iterable[Prospect]) -> Table:
    """What each loss would cost, a line each."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("loss", "prepared", "requests", "tokens again", "experts", "stall ms", "moved ms", "capacity"):
        table.add_column(column, justify="left" if column in ("loss", "prepared") else "right", no_wrap=True)
    for p in prospects:
        prepared = ("yes" if p.prepared else "no") if p.survivable else f"impossible: {p.reason}"
        figures = (
            p.requests_moved,
            p.tokens_recomputed,
            p.experts_loaded,
            f"{p.stall_ms:.0f}",
            f"{p.moved_stall_ms:.0f}",
        )
        table.add_row(f"{p.kind} {p.name}", prepared, *map(str, figures), f"{p.capacity:.0%}")
    return table


def event_line(event: Event) -> Text:
    """One event on one line."""
    time = datetime.datetime.fromtimestamp(event.time).strftime("%H:%M:%S.%f")[:-3]
    line = Text.assemble((time, "dim"), "  ", (f"{event.kind:<14}", _EVENT_COLOURS.get(event.kind, "bold")))
    line.append(f"  epoch {event.epoch}")
    if event.rank is not None:
        line.append(f"  rank {event.rank}")
    for text in (event.cause, event.message):
        if text:
            line.append(f"  {text}")
    if event.phases:
        line.append("  " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in event.phases.items()), "dim")
    return line


def printable(text: str) -> str:
    """A model's text without what could steer the terminal: control characters but new line and tab."""
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0x9F else "\ufffd" for c in text)
