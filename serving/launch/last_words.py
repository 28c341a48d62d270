"""The last output of a process that failed, in one line: the error itself, and where it came from."""

import traceback
from collections.abc import Sequence

MAX_CHARACTERS = 1000
_LINES = 8
_TRACEBACK = "Traceback (most recent call last)"
_FATAL = "Fatal Python error"
_FAILING_THREAD = "Current thread"
_CAUSE_LINES, _FRAME_LINES = 2, 6


def last_words(lines: Sequence[str]) -> str:
    """The end of what a process wrote. Of a crash, whose report names every thread: the message, and the frames of the
    thread that failed, innermost first. Of an exception: its message, then the frames, outermost first."""
    said = [line.strip() for line in lines if line.strip()]
    fatal = next((at for at, line in enumerate(said) if line.startswith(_FATAL)), None)
    if fatal is not None:
        thread = next((at for at in range(fatal, len(said)) if said[at].startswith(_FAILING_THREAD)), fatal)
        frames = said[thread + 1 : thread + 1 + _FRAME_LINES]
        return _joined([*said[max(fatal - _CAUSE_LINES, 0) : fatal + 1], *frames])
    end = said[-_LINES:]
    if any(line.startswith(_TRACEBACK) for line in said):
        end = [end[-1], *end[:-1]]
    return _joined(end)


def exception_words(error: BaseException) -> tuple[str, str]:
    """An exception in one line, and the last lines of its traceback in another."""
    frames = [line.strip() for part in traceback.format_tb(error.__traceback__) for line in part.splitlines()]
    text = "".join(traceback.format_exception_only(error)).strip()
    return _one_cause(text), _joined([line for line in frames if line.strip("^~ ")][-_FRAME_LINES:])


def _joined(lines: Sequence[str]) -> str:
    return _one_cause(" | ".join(lines)) or "it wrote nothing"


def _one_cause(text: str) -> str:
    """The text, short, and without the sign that separates the causes of several ranks."""
    return " ".join(text.replace(";", ",").split())[:MAX_CHARACTERS]
