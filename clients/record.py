"""The results of the trials: a JSON file in the repository, and the page docs/clients.md that is made of it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "clients.json"
PAGE = ROOT / "docs" / "clients.md"
WORDS = {"works": "works", "lacks": "the tool lacks it", "fails": "**fails**"}
_HEAD = """\
# Clients and tools

Other people's programs, each installed from its registry into an environment of its own and run against a server with
real ranks, as its users run it. An answer counts when it is the right one: the text of a plain request, a value of the
required form, a score that the server gives. `scripts/clients` makes this page; `scripts/clients --only NAME` tries one
tool again and replaces its rows. What each trial does stands in `clients/tools/`, one file for each tool.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one trial."""

    trial: str
    result: str
    """works, lacks (the tool does not have it) or fails (the server's fault)."""
    remark: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A tool and what came out of its trials."""

    name: str
    version: str
    registry: str
    date: str
    model: str
    outcomes: tuple[Outcome, ...] = ()
    not_installed: str | None = None
    """Why it cannot be installed on the machine of the trials."""

    @property
    def works(self) -> bool:
        """Whether no trial failed by the server's fault."""
        return all(outcome.result in ("works", "lacks") for outcome in self.outcomes)


def load() -> dict[str, Row]:
    """The rows of the record by the key of their tool."""
    if not RECORD.is_file():
        return {}
    return {key: _row(values) for key, values in json.loads(RECORD.read_text()).items()}


def save(rows: Mapping[str, Row], keys: Iterable[str]) -> None:
    """Write the record and the page with the rows of the tools that exist."""
    kept = {key: rows[key] for key in keys if key in rows}
    RECORD.write_text(json.dumps({key: dataclasses.asdict(row) for key, row in kept.items()}, indent=1) + "\n")
    PAGE.write_text(page(list(kept.values())))


def page(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    ordered = sorted(rows, key=lambda row: row.name.lower())
    lines = [_HEAD, "| tool | version | what was tried | result |", "|---|---|---|---|"]
    for row in ordered:
        tool, version = f"{row.name} ({row.registry})", row.version
        if row.not_installed is not None:
            lines.append(f"| {tool} | {version} | nothing | not installed: {_cell(row.not_installed)} |")
        for outcome in row.outcomes:
            remark = f": {_cell(outcome.remark)}" if outcome.remark else ""
            lines.append(f"| {tool} | {version} | {_cell(outcome.trial)} | {WORDS[outcome.result]}{remark} |")
            tool = version = ""
    dates = sorted({row.date for row in rows})
    tried = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "never"
    return "\n".join(lines) + f"\n\nTried on {tried}, 2 cores, no accelerator, no network but the registries.\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _row(values: dict[str, Any]) -> Row:
    return Row(**values | {"outcomes": tuple(Outcome(**outcome) for outcome in values["outcomes"])})
