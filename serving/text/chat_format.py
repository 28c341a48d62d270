"""How the answers of a chat model are read: its tool calls and its reasoning, by the settings or by its template."""

import dataclasses
import json
from typing import Protocol

from serving.errors import StartError
from serving.protocol.request import AnswerParsing
from serving.protocol.sampling import StructuredOutputs
from serving.text.answer_parts import AnswerPart
from serving.text.reasoning import REASONING_FORMATS, ReasoningFormat, ReasoningParser, reasoning_format_of
from serving.text.tokenizer_formats import TokenizerFormat
from serving.text.tool_formats import TOOL_FORMATS, tool_format_of
from serving.text.tool_formats.format import ToolFormat
from serving.text.tool_formats.harmony import Harmony, HarmonyParser
from serving.text.tool_formats.parser import ToolCallParser

AUTO, OFF = "auto", "off"
TOOL_ALIASES = {"llama3": "llama3_json", "glm45": "glm4_moe", "openai": "harmony", "pythonic": "llama4_pythonic"}
REASONING_ALIASES = {
    "harmony": OFF,  # its tool format reads it
    **dict.fromkeys(("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "glm4_moe", "kimi_k2"), "think"),
}
"""Names that other servers use for the same formats."""


class AnswerParser(Protocol):
    """Splits the growing text of one answer into its parts."""

    def push(self, text: str) -> list[AnswerPart]:
        """The parts that became final with this text."""
        ...

    def flush(self, cut: bool = False) -> list[AnswerPart]:
        """The rest, when no text will follow. `cut`: the answer ended by its limit of tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The formats of one model. Without a tool format, calls stay text; without a reasoning format, so does
    reasoning."""

    tools: ToolFormat | None = TOOL_FORMATS["hermes"]
    reasoning: ReasoningFormat | None = None

    @classmethod
    def of(cls, template: str, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> "ChatFormat":
        """The formats that two settings name, where `auto` means those of the chat template. Raises StartError."""
        tool_parser = TOOL_ALIASES.get(tool_parser, tool_parser)
        reasoning_parser = REASONING_ALIASES.get(reasoning_parser, reasoning_parser)
        for setting, name, known in (
            ("tool_call_parser", tool_parser, TOOL_FORMATS),
            ("reasoning_parser", reasoning_parser, REASONING_FORMATS),
        ):
            if name not in (AUTO, OFF, *known):
                raise StartError(f"{setting} is {name!r}. Choose one of {AUTO}, {OFF}, {', '.join(known)}.")
        tools = tool_format_of(template) if tool_parser == AUTO else TOOL_FORMATS.get(tool_parser)
        marked = reasoning_format_of(template) if not isinstance(tools, Harmony) else None
        return cls(tools, marked if reasoning_parser == AUTO else REASONING_FORMATS.get(reasoning_parser))

    def parser(self, parsing: AnswerParsing) -> AnswerParser:
        """The parser of one answer."""
        if isinstance(self.tools, Harmony):
            return HarmonyParser(parsing.tools, parallel=parsing.parallel)
        reasoning = tools = None
        if self.reasoning is not None:
            reasoning = ReasoningParser(self.reasoning, inside=parsing.inside_reasoning)
        if self.tools is not None and parsing.tools:
            tools = ToolCallParser(self.tools, parsing.tools, parallel=parsing.parallel)
        return _PartsParser(reasoning, tools)

    def shown_marks(self, vocabulary: TokenizerFormat) -> frozenset[int]:
        """The special tokens that a parser needs in the text, although special tokens have none."""
        marks = (*(self.tools.marks if self.tools else ()),)
        if self.reasoning is not None:
            marks = (*marks, self.reasoning.begin, self.reasoning.end)
        ids = (vocabulary.index(mark) for mark in marks)
        return frozenset(i for i in ids if i is not None and not vocabulary.decode([i]))

    def grammar(self, constraint: StructuredOutputs, vocabulary: TokenizerFormat) -> str:
        """The Lark grammar of one call of the tools in a constraint of the kind `tools`."""
        form = self.tools or TOOL_FORMATS["hermes"]
        return form.grammar(json.loads(constraint.text), lambda mark: mark_expression(mark, vocabulary))

    def text_until(self, mark: str, vocabulary: TokenizerFormat) -> str:
        """The Lark rule `reasoning`: any text, up to and with a mark."""
        expression = mark_expression(mark, vocabulary)
        if expression.startswith("<"):
            return f"reasoning: /(.|\\n)*/ {expression}\n"
        return f"reasoning[suffix={expression}]: /(.|\\n)*/\n"


class _PartsParser:
    """Reasoning first, then text and tool calls."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def push(self, text: str) -> list[AnswerPart]:
        """See `AnswerParser.push`."""
        if self._reasoning is None:
            return self._without_reasoning([text])
        return self._without_reasoning(self._reasoning.push(text))

    def flush(self, cut: bool = False) -> list[AnswerPart]:
        """See `AnswerParser.flush`."""
        found = [] if self._reasoning is None else self._without_reasoning(self._reasoning.flush())
        return found if self._tools is None else [*found, *self._tools.flush(cut)]

    def _without_reasoning(self, parts: list[AnswerPart]) -> list[AnswerPart]:
        found: list[AnswerPart] = []
        for part in parts:
            if isinstance(part, str) and self._tools is not None:
                found += self._tools.push(part)
            elif part:
                found.append(part)
        return found


def mark_expression(mark: str, vocabulary: TokenizerFormat) -> str:
    """The Lark expression of a mark: its special token where the tokenizer has one, else its text."""
    token = vocabulary.index(mark)
    if token is not None and not vocabulary.decode([token]):
        return f"<[{token}]>"
    return json.dumps(mark, ensure_ascii=False)
