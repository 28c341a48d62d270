"""Options that several commands share: the settings of a server, how to reach one, how to sample."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from serving.client import DEFAULT_ADDRESS, Client
from serving.config import Settings
from serving.tls import ClientTls

Command = Callable[..., Any]


def example(*lines: str) -> Callable[[Command], Command]:
    """Show lines as the end of a command's --help."""

    def decorate(function: Command) -> Command:
        shown = "\n".join(f"  {line}" for line in lines)
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n{shown}\n"
        return function

    return decorate


def settings_options(function: Command) -> Command:
    """One flag for each field of Settings, and --config; the command gets `settings`.

    What is not given stays None, so that the environment and the file have their say: a default is written in
    `Settings` alone.
    """
    hints = typing.get_type_hints(Settings)

    @functools.wraps(function)
    def call(config: Path | None, **given: Any) -> Any:
        flags = {field.name: given.pop(field.name) for field in dataclasses.fields(Settings)}
        return function(settings=Settings.load(config, **flags), **given)

    wrapped: Command = call
    for field in reversed(dataclasses.fields(Settings)):
        wrapped = _flag(field, hints[field.name])(wrapped)
    return click.option(
        "--config",
        envvar="MOEJAX_CONFIG",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Settings as TOML.",
    )(wrapped)


def _flag(field: "dataclasses.Field[Any]", hint: Any) -> Callable[[Command], Command]:
    name, default = f"--{field.name.replace('_', '-')}", field.default
    text = field.metadata["help"]
    if isinstance(default, bool):
        return click.option(
            f"{name}/--no-{name[2:]}", default=None, help=f"{text}  [default: {'yes' if default else 'no'}]"
        )
    if default is not None:
        shown = ";".join(",".join(map(str, row)) for row in default) if isinstance(default, tuple) else default
        text = f"{text}  [default: {shown}]"
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind in (int, float)]
    choices = field.metadata["choices"]
    kind: Any = click.Choice(choices) if choices else kinds[0] if kinds else str
    return click.option(name, default=None, type=kind, help=text)


def connected(function: Command) -> Command:
    """Options that say which server to talk to; the command gets `client`."""

    @functools.wraps(function)
    def call(
        server: str,
        api_key: str | None,
        ca: Path | None,
        client_cert: Path | None,
        client_key: Path | None,
        **given: Any,
    ) -> Any:
        secure = ca is not None or client_cert is not None or client_key is not None
        tls = ClientTls(ca=ca, cert=client_cert, key=client_key) if secure else None
        with Client(server, api_key=api_key, tls=tls) as client:
            return function(client=client, **given)

    pem = click.Path(exists=True, dir_okay=False, path_type=Path)
    wrapped: Command = call
    for option in (
        click.option("--client-key", type=pem, envvar="MOEJAX_CLIENT_KEY", help="Private key of --client-cert."),
        click.option("--client-cert", type=pem, envvar="MOEJAX_CLIENT_CERT", help="Certificate to show to the server."),
        click.option("--ca", type=pem, envvar="MOEJAX_CA", help="Use TLS and trust this authority (PEM)."),
        click.option("--api-key", envvar="MOEJAX_API_KEY", metavar="KEY", help="Key of a server that wants one."),
        click.option(
            "--server",
            default=DEFAULT_ADDRESS,
            show_default=True,
            envvar="MOEJAX_SERVER",
            metavar="HOST:PORT",
            help="gRPC address of a running server.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def sampling_options(function: Command) -> Command:
    """The options of SamplingParams; what is not given is the server's default."""
    for option in (
        click.option("--max-tokens", type=int, help="Length of the answer.  [default: what fits]"),
        click.option("--temperature", type=float, help="0 is greedy.  [default: 1]"),
        click.option("--top-k", type=int, help="Only the k most likely tokens."),
        click.option("--top-p", type=float, help="Only tokens that together reach this probability."),
        click.option("--min-p", type=float, help="Only tokens this likely relative to the likeliest."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."),
    ):
        function = option(function)
    return function
