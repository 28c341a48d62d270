"""The format of gpt-oss (harmony): an answer is a list of messages, each with a channel and perhaps a recipient.

`<|channel|>analysis<|message|>` is reasoning, `final` and `commentary` are text, and
`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>` is a tool call.
"""

import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall, Reasoning, ToolCall
from serving.text.marks import MarkScanner
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import literal, one_call
from serving.text.tool_formats.json_calls import named_call

_START, _END, _MESSAGE, _CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
_CONSTRAIN, _RETURN, _CALL = "<|constrain|>", "<|return|>", "<|call|>"
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_KIND = re.compile(r"<\|channel\|>\s*(\w+)")
_TO = "to="


class Harmony(ToolFormat):
    """Messages on channels. `HarmonyParser` reads it, not `ToolCallParser`."""

    name = "harmony"
    signs = ("<|channel|>analysis", "<|channel|>commentary")
    begin = (_CHANNEL,)
    further_marks = (_START, _END, _MESSAGE, _CONSTRAIN, _RETURN, _CALL)

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """The calls of an answer from its first channel on."""
        parser = HarmonyParser(tools)
        return [*parser.push(_CHANNEL + body), *parser.flush(cut)]

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""

        def write(name: str, arguments: str) -> str:
            head = literal(f"commentary to=functions.{name} ")
            return f'{head} {mark(_CONSTRAIN)} "json" {mark(_MESSAGE)} {arguments}'

        return one_call(tools, write, before=mark(_CHANNEL))


class HarmonyParser:
    """The text, the reasoning and the calls of one answer. Its prompt has begun the first message."""

    def __init__(self, tools: Tools = (), *, parallel: bool = True) -> None:
        """Without `tools` a call is text."""
        self._tools = tools
        self._parallel = parallel
        self._marks = MarkScanner((_START, _END, _MESSAGE, _CHANNEL, _CONSTRAIN, _RETURN, _CALL))
        self._header: str | None = ""
        """The fields of the header of a message; None within its body."""
        self._first = True
        """Whether the first message may yet turn out to have no header."""
        self._kind = "final"
        self._recipient = ""
        self._body = ""
        self._called = False

    def push(self, text: str) -> list[AnswerPart]:
        """The parts that became final with this text."""
        found: list[AnswerPart] = []
        mark: str | None = ""
        while text or mark:
            said, mark, text = self._marks.push(text)
            found += self._said(said)
            if mark is None:
                break
            found += self._marked(mark)
        return found

    def flush(self, cut: bool = False) -> list[AnswerPart]:
        """The rest, when no text will follow. `cut`: the answer ended by its limit of tokens."""
        found = self._said(self._marks.flush())
        if self._header is None:
            return [*found, *self._close(cut)]
        if self._first and self._header:
            return [*found, self._header]
        if cut and self._tools and _RECIPIENT.search(self._header):
            found.append(InvalidToolCall(self._header, CUT))
        return found

    def _said(self, text: str) -> list[AnswerPart]:
        if self._header is not None:
            self._header += text
            begun = self._header.lstrip()
            if not self._first or _TO.startswith(begun[: len(_TO)]):
                return []
            self._first, self._header, text = False, None, self._header  # an answer without channels
        if self._recipient:
            self._body += text
            return []
        if not text:
            return []
        return [Reasoning(text) if self._kind == "analysis" else text]

    def _marked(self, mark: str) -> list[AnswerPart]:
        self._first = False
        if self._header is not None:
            if mark == _MESSAGE:
                self._begin_body(self._header)
            elif mark in (_CHANNEL, _CONSTRAIN):
                self._header += mark
            else:
                self._header = ""
            return []
        if mark in (_MESSAGE, _CONSTRAIN):
            return []
        found = self._close(cut=False)
        self._header = mark if mark == _CHANNEL else ""
        return found

    def _begin_body(self, header: str) -> None:
        kind, recipient = _KIND.search(header), _RECIPIENT.search(header)
        self._kind = "final" if kind is None else kind[1]
        self._recipient = recipient[1] if recipient is not None and self._tools else ""
        self._header, self._body = None, ""

    def _close(self, cut: bool) -> list[AnswerPart]:
        """The call of a body that has ended."""
        name, self._recipient = self._recipient, ""
        if not name:
            return []
        call = named_call(name, self._body, self._body, cut=cut)
        if self._called and not self._parallel:
            return []
        self._called |= isinstance(call, ToolCall)
        return [call]
