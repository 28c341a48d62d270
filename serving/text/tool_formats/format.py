"""A tool format: how the models of a family write tool calls, as marks around bodies."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from serving.text.answer_parts import AnswerPart

Tools = Sequence[Mapping[str, Any]]
"""Tools as OpenAI describes them: `{"type": "function", "function": {"name": ..., "parameters": ...}}`."""
WriteMark = Callable[[str], str]
"""The Lark expression of a mark: its special token where the tokenizer has one, else its text."""


class ToolFormat(abc.ABC):
    """One format. Calls stand between a mark of `begin` and `end`, or from there to the end of the answer if `end` is
    empty."""

    name: ClassVar[str]
    signs: ClassVar[tuple[str, ...]]
    """Texts by which a chat template shows that its model writes this format."""
    begin: ClassVar[tuple[str, ...]]
    end: ClassVar[str] = ""
    further_marks: ClassVar[tuple[str, ...]] = ()
    """Other marks that the tokenizer may hold as special tokens."""
    bare: ClassVar[str] = ""
    """A character that, when an answer begins with it, begins calls without a mark."""
    quoted: ClassVar[bool] = False
    """Whether the body is JSON, so that an end mark within a string ends nothing."""

    def call_id(self, request_id: str, position: int) -> str:
        """The id of the call of a request at this position, where the model gives none: the same in every replay."""
        return f"call_{request_id[-24:]}_{position}"

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks; as special tokens they have no text unless it is asked for."""
        return (*self.begin, *([self.end] if self.end else ()), *self.further_marks)

    def is_of(self, template: str) -> bool:
        """Whether this is the format of a chat template."""
        return any(sign in template for sign in self.signs)

    @abc.abstractmethod
    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """The calls in a body, and texts beside them. `cut`: the answer ended within the body, by its limit of tokens.
        Empty when the body is no call at all, so that it is text."""

    @abc.abstractmethod
    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """A Lark grammar of exactly one call of one of the tools."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The JSON schema of a tool's parameters, for formats that write each argument as text."""

    schema: Mapping[str, Any]

    @classmethod
    def of(cls, tools: Tools, name: str) -> "Parameters":
        """The parameters of the tool of that name; none are known of a tool that is not there."""
        found = (tool["function"].get("parameters") for tool in tools if tool["function"].get("name") == name)
        return cls(next(found, None) or {})

    def is_text(self, argument: str) -> bool:
        """Whether an argument is text, and not JSON: its schema says so, or says nothing."""
        properties = self.schema.get("properties")
        schema = properties.get(argument) if isinstance(properties, Mapping) else None
        if not isinstance(schema, Mapping):
            return True
        kind = schema.get("type")
        return kind == "string" or (isinstance(kind, list) and set(kind) <= {"string", "null"})
