"""The commands that show a running server: `moejax status`, `moejax events` and `moejax what-if`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import click

from serving.api.client import Client
from serving.cli.client_options import client_options
from serving.cli.options import INTERRUPTED, example
from serving.cli.tables import console, event_line, loss_forecast_view, status_view
from serving.errors import DeadlineExceeded, NoCapacity
from serving.protocol.events import Event

_PAST_EVENTS_S = 0.5
"""Seconds to read past events: the stream has no end, but all past events come at once."""


@click.command(short_help="Show ranks, mesh, experts, prepared losses and requests.")
@client_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole status as JSON.")
@click.option("--plan", "as_plan", is_flag=True, help="Print the plan in force as a plan file for `moejax plan`.")
@example("moejax status", "moejax status --json | jq .ranks[0].pid", "moejax status --plan > plan.json")
def status(client: Client, as_json: bool, as_plan: bool) -> None:
    """Show the ranks, the mesh, the experts in their slots, the losses that are prepared for, and the requests."""
    if as_plan:
        plan = client.plan()
        if not plan:
            raise NoCapacity("no rank is alive, so there is no plan in force.")
        click.echo(plan)
        return
    now, model = client.status(), client.model()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(now) | {"model": dataclasses.asdict(model)}))
    else:
        console().print(status_view(now, model))


def past_events(client: Client) -> Iterator[Event]:
    """The events of the server until now, the oldest first."""
    with contextlib.suppress(DeadlineExceeded):
        yield from client.watch(0, timeout_s=_PAST_EVENTS_S)


@click.command(short_help="Show what happened to the server.")
@client_options
@click.option("--follow", "-f", is_flag=True, help="Also show new events as they happen, until Ctrl-C.")
@click.option("--after", type=int, default=0, help="Show only events whose sequence number is above this one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line.")
@example("moejax events --follow")
def events(client: Client, follow: bool, after: int, as_json: bool) -> None:
    """Show the events of the server: lost ranks, recoveries with the duration of each phase, ranks that rejoined."""
    out = console()
    try:
        for event in client.watch(after, timeout_s=None if follow else _PAST_EVENTS_S):
            if as_json:
                click.echo(json.dumps(dataclasses.asdict(event)))
            else:
                out.print(event_line(event), soft_wrap=True)
    except DeadlineExceeded:
        return
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


@click.command("what-if", short_help="Show the predicted cost of each loss.")
@client_options
@click.option("--json", "as_json", is_flag=True, help="Print the forecasts as JSON.")
@example("moejax what-if")
def what_if(client: Client, as_json: bool) -> None:
    """Show what the loss of each rank, and of each host with several ranks, would cost now.

    Stalls are predicted for requests on other ranks (stall ms) and on the lost ranks (moved ms).
    """
    forecasts = client.what_if()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(forecast) for forecast in forecasts]))
    else:
        console().print(loss_forecast_view(forecasts))
