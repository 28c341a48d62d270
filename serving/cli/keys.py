"""The commands of the file of API keys: `moejax keys add`, `list` and `remove`."""

import datetime
from pathlib import Path

import click

from serving.auth.api_keys import ApiKeyFile
from serving.cli.options import example

_file = click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar=("MOEJAX_KEYS", "MOEJAX_API_KEYS"),
    required=True,
    help="The key file that `moejax serve --api-keys` reads. Also the variable MOEJAX_API_KEYS.",
)


@click.group(short_help="Add, list and remove API keys.")
@example("moejax keys add alice --file keys.json", "moejax serve --api-keys keys.json")
def keys() -> None:
    """Add, list and remove API keys. A change takes effect at once, also in a running server."""


@keys.command("add")
@click.argument("name")
@click.option(
    "--admin", is_flag=True, help="The key may also change the server: kill, drain, scale, pause, weights, upgrade."
)
@click.option(
    "--share", type=float, default=1.0, help="Share of a busy server, relative to other keys.", show_default=True
)
@_file
@example("moejax keys add alice --file keys.json", "moejax keys add operator --admin --file keys.json")
def add_key(name: str, admin: bool, share: float, file: Path) -> None:
    """Add a key called NAME and print its secret. It is printed only now: the file keeps a hash of it."""
    click.echo(ApiKeyFile(file).add(name, admin=admin, share=share))


@keys.command("list")
@_file
@example("moejax keys list --file keys.json")
def list_keys(file: Path) -> None:
    """List the keys by name."""
    for key in ApiKeyFile(file).entries():
        created = datetime.datetime.fromtimestamp(key.created).strftime("%Y-%m-%d %H:%M")
        share = f"share {key.share:g}" if key.share != 1 else ""
        click.echo(f"{key.name:<24} {created}  {'admin' if key.admin else '':<6}{share}".rstrip())


@keys.command("remove")
@click.argument("name")
@_file
@example("moejax keys remove alice --file keys.json")
def remove_key(name: str, file: Path) -> None:
    """Remove the key called NAME. Calls with it are refused from now on."""
    ApiKeyFile(file).remove(name)
    click.echo(f"removed {name}")
