"""Commands of an operator who has no server running yet: keys, doctor, completion."""

import contextlib
import dataclasses
import datetime
import json
import os
from pathlib import Path

import click
import rich.console
import rich.text
from click.shell_completion import get_completion_class

from serving import doctor as checks
from serving.config import Settings
from serving.keys import KeyFile
from serving.options import example, settings_options

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}

_file = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar=("MOEJAX_KEYS", "MOEJAX_API_KEYS"),
    required=True,
    help="The file of keys that `serve --api-keys` reads; also MOEJAX_API_KEYS.",
)


@click.group()
@example("moejax keys add alice --file keys.json", "moejax serve --api-keys keys.json")
def keys() -> None:
    """Make, list and remove API keys. A running server notices at once."""


@keys.command("add")
@click.argument("name")
@click.option("--admin", is_flag=True, help="The key may also kill ranks of a server with --chaos.")
@click.option("--share", type=float, default=1.0, help="Of a busy server, beside a key with 1.", show_default=True)
@_file
@example("moejax keys add alice --file keys.json", "moejax keys add operator --admin --file keys.json")
def add_key(name: str, admin: bool, share: float, file: Path) -> None:
    """Make a key called NAME and print its secret. It is shown this once; the file keeps its hash."""
    click.echo(KeyFile(file).add(name, admin=admin, share=share))


@keys.command("list")
@_file
@example("moejax keys list --file keys.json")
def list_keys(file: Path) -> None:
    """List the keys by name."""
    for key in KeyFile(file).entries():
        made = datetime.datetime.fromtimestamp(key.created).strftime("%Y-%m-%d %H:%M")
        share = f"share {key.share:g}" if key.share != 1 else ""
        click.echo(f"{key.name:<24} {made}  {'admin' if key.admin else '':<6}{share}".rstrip())


@keys.command("remove")
@click.argument("name")
@_file
@example("moejax keys remove alice --file keys.json")
def remove_key(name: str, file: Path) -> None:
    """Forget the key called NAME; calls with it are refused from now on."""
    KeyFile(file).remove(name)
    click.echo(f"removed {name}")


@click.command()
@settings_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object per check.")
@example("moejax doctor", "moejax doctor --config my.toml --ranks 8")
def doctor(settings: Settings, as_json: bool) -> None:
    """Check the machine for a server with these settings, and say what to do. Exit status 1 when something is wrong."""
    console = rich.console.Console(soft_wrap=True)
    cache = Path(os.environ.get("MOEJAX_CACHE") or Path.home() / ".cache" / "moejax")
    wrong = False
    for finding in checks.examine(settings, cache):
        wrong |= finding.state == "problem"
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(finding)))
            continue
        line = rich.text.Text.assemble((f"{finding.state:<8}", _COLOURS[finding.state]), f" {finding.name:<12}")
        console.print(line.append(f" {finding.text}"))
        if finding.advice:
            console.print(rich.text.Text(f"{'':<22}{finding.advice}", "bold"))
    raise SystemExit(1 if wrong else 0)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@example('eval "$(moejax completion bash)"', "moejax completion fish > ~/.config/fish/completions/moejax.fish")
def completion(shell: str) -> None:
    """Print the script that completes moejax in SHELL."""
    kind = get_completion_class(shell)
    assert kind is not None  # click knows all three
    root = click.get_current_context().find_root().command
    with contextlib.suppress(BrokenPipeError):
        click.echo(kind(root, {}, "moejax", "_MOEJAX_COMPLETE").source())
