"""Writes the table of settings: `python -m docs.settings_table > docs/settings.md`."""

import dataclasses

from serving.config import GROUPS, PREFIX, SettingsGroup

_HEAD = """\
# Settings

Each setting is a flag of `moejax serve`, an environment variable, and a key in the TOML file of `--config`. A flag wins
over a variable, a variable over the file. An unknown key is an error that names the nearest one.
`moejax serve --show-settings` prints the settings in force as such a file.
"""
_COLUMNS = """
| key | flag | variable | default | what it does |
|---|---|---|---|---|
"""


def page() -> str:
    """The page in Markdown."""
    return _HEAD + "".join(map(_section, GROUPS))


def _section(group: type[SettingsGroup]) -> str:
    rows = "".join(_row(field) for field in dataclasses.fields(group))
    return f"\n## {group.title}\n{_COLUMNS}{rows}"


def _row(field: "dataclasses.Field") -> str:
    flag, default = f"--{field.name.replace('_', '-')}", field.default
    shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    choices = field.metadata["choices"]
    text = field.metadata["help"] + (f" One of {', '.join(choices)}." if choices else "")
    return f"| `{field.name}` | `{flag}` | `{PREFIX}{field.name.upper()}` | {shown} | {text} |\n"


if __name__ == "__main__":
    print(page(), end="")
