"""Writes the table of settings: `python -m docs.settings_table > docs/settings.md`."""

import dataclasses

from serving.config import PREFIX, Settings

_HEAD = """\
# Settings

Each setting is a flag of `moejax serve`, a variable, and a key in the file of `--config` (TOML). A flag goes before a
variable, a variable before the file. An unknown key is refused with the nearest one. `moejax serve --show-settings`
prints all that are in force, as a file.

| key | flag | variable | default | |
|---|---|---|---|---|
"""


def page() -> str:
    """The page in Markdown."""
    return _HEAD + "".join(_row(field) for field in dataclasses.fields(Settings))


def _row(field: "dataclasses.Field") -> str:
    flag, default = f"--{field.name.replace('_', '-')}", field.default
    shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    text = field.metadata["help"] + (
        f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
    )
    return f"| `{field.name}` | `{flag}` | `{PREFIX}{field.name.upper()}` | {shown} | {text} |\n"


if __name__ == "__main__":
    print(page(), end="")
