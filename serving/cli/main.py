"""The command line: `moejax COMMAND`. The --help of every command shows an example."""

from typing import Any

import click

from serving.cli.generate import chat, generate
from serving.cli.hosts import rank, tokens
from serving.cli.keys import keys
from serving.cli.local import completion, doctor
from serving.cli.monitor import events, status, what_if
from serving.cli.operate import apply, kill
from serving.cli.programs import bench, convert, inspect, models, plan, train
from serving.cli.remote_edge import edge
from serving.cli.serve import serve
from serving.cli.tables import printable
from serving.cli.upgrade import upgrade
from serving.errors import MoejaxError
from serving.version import version

SECTIONS = {
    "Serve": (serve, doctor, models),
    "Use a running server": (generate, chat),
    "Observe a running server": (status, events, what_if),
    "Change a running server": (apply, upgrade, kill),
    "Let clients and hosts in": (keys, tokens, rank, edge),
    "Plan and prepare": (plan, inspect, convert, train, bench),
    "Shell": (completion,),
}
"""The commands in the order of `moejax --help`."""


class _MoejaxGroup(click.Group):
    """Prints a MoejaxError as one line with exit status 1, and lists the commands by section."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoejaxError as error:
            click.echo(f"moejax: {printable(str(error))}", err=True)
            ctx.exit(1)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of each section with their short help."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{each.name or '':<{width}}", each.get_short_help_str(100)) for each in commands])


@click.group(cls=_MoejaxGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version(), prog_name="moejax")
def main() -> None:
    """Serve Mixture-of-Experts language models on JAX, and keep serving when devices die.

    \b
    Example:
      moejax serve --model tiny        in one terminal, and in another:
      moejax generate "ROMEO:"
    """


for commands in SECTIONS.values():
    for command in commands:
        main.add_command(command)
