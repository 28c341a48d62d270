"""Finds the first of several marks in a growing text."""

from collections.abc import Sequence


class MarkScanner:
    """Passes text on up to the first mark, and holds back what may be the beginning of one. No mark is the beginning of
    another."""

    def __init__(self, marks: Sequence[str]) -> None:
        assert not any(a != b and b.startswith(a) for a in marks for b in marks), marks
        self._marks = tuple(marks)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None, str]:
        """Text before any mark, the mark (None: none yet), and the text after it."""
        text = self._held + text
        found = min(((text.index(mark), mark) for mark in self._marks if mark in text), default=None)
        if found is not None:
            self._held = ""
            at, mark = found
            return text[:at], mark, text[at + len(mark) :]
        keep = max((overlap(text, mark) for mark in self._marks), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None, ""

    def flush(self) -> str:
        """The text held back, when no text will follow."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that is a beginning of a mark, but not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
