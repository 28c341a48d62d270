"""The command line: `moejax COMMAND`. The --help of every command shows an example.

A command is imported when it is used: `moejax serve` needs neither a client nor the tables of `moejax status`.
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import click

from serving.cli.printable import printable
from serving.errors import MoejaxError
from serving.version import version

SECTIONS = {
    "Serve": {"serve": "serve", "doctor": "local", "models": "programs"},
    "Use a running server": {"generate": "generate", "chat": "generate"},
    "Observe a running server": {"status": "monitor", "events": "monitor", "what-if": "monitor"},
    "Change a running server": {"apply": "operate", "upgrade": "upgrade", "kill": "operate"},
    "Let clients and hosts in": {"keys": "keys", "tokens": "hosts", "rank": "hosts", "edge": "remote_edge"},
    "Plan and prepare": dict.fromkeys(("plan", "inspect", "convert", "train", "bench"), "programs"),
    "Shell": {"completion": "local"},
}
"""The commands in the order of `moejax --help`, each with the module of `serving.cli` that has it."""


class _Commands(Mapping[str, click.Command]):
    """The commands by name, each imported when it is used."""

    def __init__(self) -> None:
        self._modules = {name: module for commands in SECTIONS.values() for name, module in commands.items()}

    def __getitem__(self, name: str) -> click.Command:
        module = importlib.import_module(f"serving.cli.{self._modules[name]}")
        return getattr(module, name.replace("-", "_"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


class _MoejaxGroup(click.Group):
    """Prints a MoejaxError as one line with exit status 1, and lists the commands by section."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands()  # type: ignore[assignment] - none is added later

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoejaxError as error:
            click.echo(f"moejax: {printable(str(error))}", err=True)
            ctx.exit(1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of each section with their short help."""
        width = max(map(len, self.commands))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", self.commands[name].get_short_help_str(100)) for name in names]
                )


@click.group(cls=_MoejaxGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="moejax")
def main() -> None:
    """Serve Mixture-of-Experts language models on JAX, and keep serving when devices die.

    \b
    Example:
      moejax serve --model tiny        in one terminal, and in another:
      moejax generate "ROMEO:"
    """
