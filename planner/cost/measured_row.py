"""A row of a table of measured settings, read column by column: an error names the column and the value."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

from planner.errors import InputError

NEEDED = (
    *("backend", "model_path", "system", "precision", "isl", "osl", "batch_size", "tp_size"),
    *("silicon_ttft_ms", "silicon_tpot_ms"),
)
"""Columns that a table must have. Those of `USUAL` have their usual values where they are absent or empty."""

USUAL = {
    "mode": "agg",
    "pp_size": "1",
    "attention_dp_size": "1",
    "moe_tp_size": "1",
    "moe_ep_size": "1",
    "backend_version": "",
    "silicon_data_source": "",
    "id": "",
}

COLUMNS = (*NEEDED, *USUAL)


def check_columns(names: list[str], where: str) -> None:
    """InputError for a table that lacks columns, with all that it lacks."""
    if missing := [name for name in NEEDED if name not in names]:
        columns = "columns" if len(missing) > 1 else "column"
        rest = "" if missing == list(NEEDED) else f" {', '.join(NEEDED)}"
        raise InputError(
            f"{where} has no {columns} {', '.join(missing)}; a table of measured settings has{rest or ' these'}"
        )


class SettingRow:
    """The values of one row by column. Methods raise InputError, which names the column, for a value that is none."""

    def __init__(self, values: Mapping[str, str | None]) -> None:
        self._values = values

    def text(self, column: str) -> str:
        """The text of a column; its usual one where that is empty."""
        return (self._values.get(column) or "").strip() or USUAL.get(column, "")

    def count(self, column: str, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._number(column)
        if value != int(value) or value < least:
            wanted = f"a whole number of at least {least}"
            raise InputError(f"column {column} is {self.text(column)!r}, it must be {wanted}")
        return int(value)

    def width(self, column: str) -> int:
        """A number of ranks; 1 where tables say 0, which is none."""
        return max(1, self.count(column, least=0))

    def seconds(self, column: str) -> float:
        """Milliseconds as seconds; 0.0 where the column is empty."""
        value = self._number(column) if self.text(column) else 0.0
        if value < 0:
            raise InputError(f"column {column} is {self.text(column)!r}, it must be milliseconds of at least 0")
        return value / 1e3

    def _number(self, column: str) -> float:
        text = self.text(column)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not isfinite(value):
            raise InputError(f"column {column} is {text!r}, it must be a number")
        return value
