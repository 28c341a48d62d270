"""Commands for the machine of a server: `moejax doctor` and `moejax completion`."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import click
import rich.console
import rich.text
from click.shell_completion import get_completion_class

from serving.cli import doctor as checks
from serving.cli.options import SettingsCommand, example, settings_options
from serving.config import Settings

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command(cls=SettingsCommand, short_help="Check this machine for a server.")
@settings_options()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per check.")
@example("moejax doctor", "moejax doctor --config my.toml --ranks 8")
def doctor(settings: Settings, as_json: bool) -> None:
    """Check this machine for a server with these settings, with advice on everything that is not ok.

    The exit status is 1 if there is a problem.
    """
    console = rich.console.Console(soft_wrap=True)
    cache = Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")
    has_problem = False
    for finding in checks.run_checks(settings, cache):
        has_problem |= finding.state == "problem"
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(finding)))
            continue
        line = rich.text.Text.assemble((f"{finding.state:<8}", _COLOURS[finding.state]), f" {finding.name:<12}")
        console.print(line.append(f" {finding.text}"))
        if finding.advice:
            console.print(rich.text.Text(f"{'':<22}{finding.advice}", "bold"))
    raise SystemExit(1 if has_problem else 0)


@click.command(short_help="Print a completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@example('eval "$(moejax completion bash)"', "moejax completion fish > ~/.config/fish/completions/moejax.fish")
def completion(shell: str) -> None:
    """Print the script that completes moejax commands in SHELL."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has a class for each of the three
    root = click.get_current_context().find_root().command
    with contextlib.suppress(BrokenPipeError):
        click.echo(kind(root, {}, "moejax", "_MOEJAX_COMPLETE").source())
