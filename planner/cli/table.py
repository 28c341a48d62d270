"""Tables and paragraphs as wide as the terminal they are printed on; a pipe gets whole lines."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

GAP = 2  # columns between two cells
NARROW = 10  # least width of a column of text that is folded


def terminal_width() -> int | None:
    """Columns of the terminal (`COLUMNS`, where it is set); None when standard output is no terminal."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(20, shutil.get_terminal_size().columns)
    return None


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, width: int | None = None) -> str:
    """A text table: columns as wide as their longest cell, with columns of numbers aligned to the right.

    Wider than `width` columns (None: no limit), its headings and then its columns of text are folded at spaces.
    """
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    right = [all(_numeric(row[i]) for row in cells[1:]) for i in range(len(head))]
    widths = _widths(cells, right, width)
    lines = []
    for row in cells:
        parts = [_folded(cell, w) for cell, w in zip(row, widths, strict=True)]
        for at in range(max(map(len, parts), default=1)):
            texts = [part[at] if at < len(part) else "" for part in parts]
            aligned = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
            lines.append((" " * GAP).join(aligned).rstrip())
        if row is cells[0]:
            lines.append((" " * GAP).join("-" * w for w in widths))
    return "\n".join(lines)


def folded(text: str, width: int | None) -> str:
    """The text with lines longer than `width` folded at spaces, two columns further in; as it is when None."""
    if width is None:
        return text
    return "\n".join("\n".join(_folded_line(line, width)) for line in text.split("\n"))


def _folded_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line, width, initial_indent="", subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def _widths(cells: Sequence[Sequence[str]], right: Sequence[bool], width: int | None) -> list[int]:
    """The width of each column: that of its longest cell, less where the table would be wider than `width`."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(right))]
    over = 0 if width is None else sum(widths) + GAP * (len(widths) - 1) - width
    for i in range(len(right)):  # first the headings above numbers
        if over > 0 and right[i]:
            least = max(max(map(len, cells[0][i].split()), default=0), *(len(row[i]) for row in cells[1:]), 1)
            over -= widths[i] - least
            widths[i] = least
    while over > 0:
        text = [i for i in range(len(right)) if not right[i] and widths[i] > NARROW]
        if not text:
            break
        widest = max(text, key=widths.__getitem__)
        widths[widest] -= 1
        over -= 1
    return widths


def _folded(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_on_hyphens=False) if len(cell) > width else [cell]


def _numeric(text: str) -> bool:
    return text.strip()[:1].isdigit() or text.strip() in ("", "-")
