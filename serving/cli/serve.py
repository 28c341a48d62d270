"""The command `moejax serve`."""

import click

from serving.cli.options import SettingsCommand, example, settings_options
from serving.cli.supervisor import supervise
from serving.config import Settings


@click.command(cls=SettingsCommand, short_help="Serve a model over gRPC and HTTP.")
@settings_options()
@click.option("--show-settings", is_flag=True, help="Print all settings as TOML and stop.")
@example("moejax serve --model tiny --ranks 4 --chaos", "MOEJAX_HTTP_PORT=9000 moejax serve --config my.toml")
def serve(settings: Settings, show_settings: bool) -> None:
    """Serve a model over gRPC and HTTP until Ctrl-C.

    Each setting comes from its flag, else from the environment (MOEJAX_RANKS and so on), else from the file --config.
    """
    if show_settings:
        click.echo(settings.to_toml(), nl=False)
        return
    if settings.supervise:
        raise SystemExit(supervise(settings))
    from serving.foreground import serve as serve_until_stopped  # here, as a supervisor needs none of a front's modules

    raise SystemExit(serve_until_stopped(settings))
