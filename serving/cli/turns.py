"""A conversation on a terminal: who speaks stands in a column of its own, and text is wrapped between words."""

import contextlib
import re
import shutil

import click

from serving.cli.printable import printable

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  input() can then edit its line, and has those before it

YOU = "you"
_MOST = 100
"""Columns of text at most: longer lines are hard to read."""
_LEAST = 20


class Turns:
    """The turns of a conversation with a model, each behind the name of its speaker."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._indent = max(len(YOU), len(model)) + 2

    def ask(self) -> str:
        """The line that the user types. Raises EOFError at the end of the input."""
        click.echo()
        # Readline counts no columns for what stands between these two characters.
        return input(re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", self._label(YOU, "green")))

    def begin(self) -> "WrappedText":
        """Begin the model's turn: print its name."""
        click.echo(f"\n{self._label(self._model, 'cyan')}", nl=False)
        width = min(shutil.get_terminal_size().columns - self._indent, _MOST)
        return WrappedText(max(width, _LEAST), " " * self._indent)

    def _label(self, name: str, colour: str) -> str:
        return click.style(name.ljust(self._indent), fg=colour, bold=True)


class WrappedText:
    """Text that comes in pieces, in lines of at most `width` characters that begin with `indent`, except the first. A
    word is held back until it is complete, because where it stands depends on its length."""

    def __init__(self, width: int, indent: str) -> None:
        self._width, self._indent = width, indent
        self._column = 0
        self._word = self._space = ""

    def push(self, text: str) -> str:
        """The part of the text that can be printed now."""
        return "".join(map(self._add, printable(text)))

    def flush(self) -> str:
        """The word that was held back, when no text will follow."""
        if not self._word:
            return ""
        fits = not self._column or self._column + len(self._space) + len(self._word) <= self._width
        before = self._space if fits else f"\n{self._indent}"
        self._column = (self._column + len(self._space) if fits else 0) + len(self._word)
        text, self._word, self._space = before + self._word, "", ""
        return text

    def _add(self, character: str) -> str:
        if not character.isspace():
            self._word += character
            return ""
        text = self.flush()
        if character == "\n":
            self._column, self._space = 0, ""
            return f"{text}\n{self._indent}"
        self._space += character
        return text
