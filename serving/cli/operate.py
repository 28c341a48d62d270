"""The commands that change a running server: `moejax apply` and `moejax kill`."""

from pathlib import Path

import click

from serving.api.client import Client
from serving.cli.client_options import client_options
from serving.cli.monitor import past_events
from serving.cli.options import example
from serving.cli.tensor_file import read_tensors
from serving.protocol.backend import FAULTS
from serving.protocol.events import EventKind
from serving.protocol.instructions import ACTIONS, Action
from serving.protocol.weights import RUNNING, Running


@click.command(short_help="Drain ranks, scale, pause, retry, move experts, or load new weights.")
@click.argument("action", type=click.Choice([each for each in ACTIONS if each != "upgrade"]))
@click.argument("ranks", nargs=-1, type=click.IntRange(min=0))
@click.option("--host", default="", help="Act on all ranks of this host instead of RANKS.")
@click.option("--to", type=int, help="Scale until this many ranks serve, instead of RANKS.")
@click.option("--replace", is_flag=True, help="With drain: start a new process for each drained rank.")
@click.option("--model", default="", help="With weights: the folder of the new weights, on the server.")
@click.option(
    "--tensors",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With weights, instead of --model: a safetensors file on this machine, whose tensors replace those of the "
    "weights in force.",
)
@click.option(
    "--base-version",
    default="",
    help="With --tensors: the version that they change; whichever is in force unless given.",
)
@click.option("--version", default="", help="With weights: their label in answers; their number unless given.")
@click.option(
    "--running",
    type=click.Choice(RUNNING),
    default="switch",
    show_default=True,
    help="With weights: open streams go on with the new weights, or finish on the old ones first, while new requests "
    "wait.",
)
@click.option(
    "--timeout-s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that requests of a leaving rank wait for room, or that open streams may take with --running finish.",
)
@client_options
@example(
    "moejax apply drain 2 --replace",
    "moejax apply scale_down --to 2",
    "moejax apply pause",
    "moejax apply weights --model checkpoints/step-200 --version step-200",
    "moejax apply weights --tensors changed.safetensors --version step-201",
)
def apply(
    client: Client,
    action: Action,
    ranks: tuple[int, ...],
    host: str,
    to: int | None,
    replace: bool,
    model: str,
    tensors: Path | None,
    base_version: str,
    version: str,
    running: Running,
    timeout_s: float,
) -> None:
    """Make a planned change to a server that was started with --operate or --chaos.

    Requests move to other ranks and lose no token.

    \b
    pause       run no more steps: requests wait
    retry       run steps again after a pause, and replace missing ranks
    drain       move the requests off RANKS, then end these ranks
    scale_down  drain ranks and keep them out
    scale_up    start ranks that were kept out
    rebalance   move experts so that no rank has more of the traffic than others
    weights     serve the weights in --model, without a restart: the same
                configuration, vocabulary and number formats; or the weights
                in force with the tensors in --tensors
    """
    if tensors is not None:
        if action != "weights" or model:
            raise click.UsageError("--tensors goes with weights, and without --model.")
        changes, labels = read_tensors(tensors), {"version": version, "base_version": base_version}
        serving = client.apply_tensors(changes, **labels, running=running, timeout_s=timeout_s)
        _show_applied(client, action, serving)
        return
    if base_version:
        raise click.UsageError("--base-version goes with --tensors.")
    model = str(Path(model).resolve()) if model and Path(model).exists() else model
    serving = client.apply(
        action,
        *ranks,
        host=host,
        to=to,
        replace=replace,
        timeout_s=timeout_s,
        model=model,
        version=version,
        running=running,
    )
    _show_applied(client, action, serving)


def _show_applied(client: Client, action: Action, serving: list[int]) -> None:
    click.echo(f"ranks that serve: {' '.join(map(str, serving))}")
    if action == "weights":
        click.echo(f"weights in force: version {client.status().weights_version}")
        loaded = [event.message for event in past_events(client) if event.kind == EventKind.WEIGHTS_LOADING]
        if unused := loaded[-1].partition("; ")[2] if loaded else "":
            click.echo(f"note: {unused}")
    elif action == "rebalance":
        messages = [event.message for event in past_events(client) if event.kind == EventKind.REBALANCED]
        click.echo(messages[-1] if messages else "see `moejax events`")


@click.command(short_help="Kill, stop or corrupt a rank, to see what happens.")
@click.argument("rank", type=click.IntRange(min=0), required=False)
@click.option("--host", default="", help="Act on all ranks of this host instead of RANK.")
@click.option(
    "--signal",
    type=click.Choice(FAULTS),
    default="SIGKILL",
    show_default=True,
    help="SIGKILL kills the process and SIGSTOP stops it; NAN and BITFLIP corrupt an expert in its memory; LINKS cuts "
    "its connections to other ranks.",
)
@client_options
@example("moejax kill 2", "moejax kill 0 --signal SIGSTOP", "moejax kill --host host1", "moejax kill 1 --signal NAN")
def kill(client: Client, rank: int | None, host: str, signal: str) -> None:
    """Kill RANK of a server that was started with --chaos, stop it so that it hangs, or corrupt one of its experts."""
    if (rank is None) == (not host):
        raise click.UsageError("give a RANK or a --host.")
    client.kill(rank or 0, signal, host=host)
    click.echo(f"sent {signal} to {host or f'rank {rank}'}; see `moejax events`.")
