"""Options that several commands share: the settings of a server, and sampling."""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

from serving.config import ALIAS_VALUES, ALIASES, GROUPS, RENAMED, RENAMED_VALUES, Settings

Command = Callable[..., Any]
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def example(*lines: str) -> Callable[[Command], Command]:
    """Add an example of these lines to the --help of a command."""

    def decorate(function: Command) -> Command:
        shown = "\n".join(f"  {line}" for line in lines)
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n\b\nExample:\n{shown}\n"
        return function

    return decorate


def settings_options(names: Collection[str] | None = None) -> Callable[[Command], Command]:
    """One flag for each field of Settings, or for those of some `names`, and --config; the command gets `settings`. For
    a `SettingsCommand`.

    A flag that is not given is None, so that the environment and the file decide: a default is written in `Settings`
    alone. A command with some of the settings ignores the others in the environment and in the file.
    """
    hints = typing.get_type_hints(Settings)
    given_names = {field.name for field in dataclasses.fields(Settings)} if names is None else set(names)
    others = {old: f"The name of --{_flag_name(new)} before this release." for old, new in RENAMED.items()}
    others |= {alias: f"The name of --{_flag_name(name)} in vLLM." for alias, name in ALIASES.items()}
    names_of_others = RENAMED | ALIASES
    others = {other: text for other, text in others.items() if names_of_others[other] in given_names}

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def call(config: Path | None, **given: Any) -> Any:
            flags = {name: given.pop(name) for name in (*given_names, *others)}
            return function(settings=Settings.load(config, only=names, **flags), **given)

        wrapped: Command = call
        for group in reversed(GROUPS):
            for field in reversed(dataclasses.fields(group)):
                if field.name in given_names:
                    wrapped = _flag(field, hints[field.name], group.title)(wrapped)
        for other, text in others.items():
            wrapped = click.option(f"--{_flag_name(other)}", default=None, hidden=True, help=text)(wrapped)
        return click.option(
            "--config",
            envvar="MOEJAX_CONFIG",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Settings as TOML.",
        )(wrapped)

    return decorate


def _flag_name(setting: str) -> str:
    return setting.replace("_", "-")


class _SettingOption(click.Option):
    """A flag of a setting, which the help shows under its group."""

    def __init__(self, *names: Any, group: str, **given: Any) -> None:
        super().__init__(*names, **given)
        self.group = group


class SettingsCommand(click.Command):
    """A command whose help shows the flags of settings by group, after its other options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section of help for each group of options."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                title = param.group if isinstance(param, _SettingOption) else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _flag(field: "dataclasses.Field[Any]", hint: Any, group: str) -> Callable[[Command], Command]:
    name, default = f"--{_flag_name(field.name)}", field.default
    text = field.metadata["help"]
    if isinstance(default, bool):
        text = f"{text}  [default: {'yes' if default else 'no'}]"
        return click.option(f"{name}/--no-{name[2:]}", cls=_SettingOption, group=group, default=None, help=text)
    if default is not None:
        shown = ";".join(",".join(map(str, row)) for row in default) if isinstance(default, tuple) else default
        text = f"{text}  [default: {shown}]"
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind in (int, float)]
    choices = field.metadata["choices"]
    hidden = (*RENAMED_VALUES.get(field.name, ()), *ALIAS_VALUES.get(field.name, ()))
    kind: Any = _SettingChoice(choices, hidden) if choices else kinds[0] if kinds else str
    return click.option(name, cls=_SettingOption, group=group, default=None, type=kind, help=text)


class _SettingChoice(click.Choice[str]):
    """One of several words, or of others that are accepted and that the help does not show."""

    def __init__(self, choices: Sequence[str], hidden: Collection[str]) -> None:
        super().__init__(choices)
        self._hidden = hidden

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word as it was given."""
        return value if value in self._hidden else super().convert(value, param, ctx)


def sampling_options(function: Command) -> Command:
    """The options of SamplingParams. An option that is not given has the server's default."""
    for option in (
        click.option("--max-tokens", type=int, help="Most tokens to generate.  [default: up to the context limit]"),
        click.option(
            "--temperature",
            type=float,
            help="Randomness of the sampling; 0 takes the likeliest token.  [default: the model's]",
        ),
        click.option(
            "--top-k", type=int, help="Sample only from the k likeliest tokens; 0 for all.  [default: the model's]"
        ),
        click.option(
            "--top-p",
            type=float,
            help="Sample only from the likeliest tokens that together have this probability.  [default: the model's]",
        ),
        click.option(
            "--min-p",
            type=float,
            help="Sample only tokens with at least this share of the likeliest token's probability.  "
            "[default: the model's]",
        ),
        click.option(
            "--seed", type=int, help="Seed of the sampling: the same seed gives the same text.  [default: random]"
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="Text before which the output ends. May be given several times.",
        ),
    ):
        function = option(function)
    return function
