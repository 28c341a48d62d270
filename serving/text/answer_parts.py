"""The parts that the text of an answer consists of: text, reasoning and tool calls."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A tool call of the model. `arguments` is a JSON object, `id` the name that the model gave the call, if any."""

    name: str
    arguments: str
    id: str = ""


@dataclasses.dataclass(frozen=True)
class InvalidToolCall:
    """A tool call that cannot be carried out: its text as the model wrote it, and what is wrong with it."""

    text: str
    error: str


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Text in which the model reasons before it answers."""

    text: str


AnswerPart = str | Reasoning | ToolCall | InvalidToolCall
"""One part of an answer; a `str` is text for the reader."""

CUT = "the answer was cut within the call, because it had reached its most tokens"
"""The error of a call that `max_tokens` cut."""
