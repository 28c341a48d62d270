"""Splits a growing text into plain text and tool calls of one format."""

import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall, ToolCall
from serving.text.marks import MarkScanner
from serving.text.tool_formats.format import ToolFormat, Tools

_ESCAPED = re.compile(r"\\.", re.DOTALL)


class ToolCallParser:
    """The text and the calls of one answer. White space around calls is dropped. What comes out depends on the whole
    text alone, not on the pieces in which it is pushed."""

    def __init__(self, form: ToolFormat, tools: Tools = (), *, parallel: bool = True) -> None:
        """`tools` are the tools that may be called; without `parallel` only the first call is kept."""
        self._form = form
        self._tools = tools
        self._parallel = parallel
        self._begins = MarkScanner(form.begin)
        self._body = ""
        self._mark: str | None = None
        """The mark that began the body, empty for a bare call; None outside of calls."""
        self._searched = 0
        self._space = ""
        self._start = ""
        """White space at the beginning of the answer, before it is known whether a bare call follows."""
        self._begun = not form.bare
        self._after_call = False
        self._called = False

    def push(self, text: str) -> list[AnswerPart]:
        """The parts that became final with this text."""
        found: list[AnswerPart] = []
        if not self._begun:
            self._start += text
            text = self._start.lstrip()
            if not text:
                return []
            self._begun = True
            if text[0] in self._form.bare:
                self._mark, self._space, self._body = "", self._start[: len(self._start) - len(text)], text
                return []
            text = self._start
        while text or self._mark is not None:
            if self._mark is None:
                text = self._outside(text, found)
                if self._mark is None:
                    break
            self._body += text
            text = ""
            end = self._end()
            if end is None:
                break
            body, text = self._body[:end], self._body[end + len(self._form.end) :]
            found += self._calls(body, self._form.end)
            self._mark = None
        return found

    def flush(self, cut: bool = False) -> list[AnswerPart]:
        """The rest, when no text will follow. `cut`: the answer ended by its limit of tokens. A call without its end
        mark counts when it is whole."""
        if self._mark is None:
            rest = self._begins.flush() if self._begun else self._start
            return [] if self._after_call and not (self._space + rest).strip() else self._plain(rest, final=True)
        first = self._body.find(self._form.end) if self._form.end and self._mark and not cut else -1
        if first >= 0:  # every end mark was within a string that has no end
            body, rest = self._body[:first], self._body[first + len(self._form.end) :]
            found, self._mark = self._calls(body, self._form.end), None
            return [*found, *self.push(rest), *self.flush(cut)]
        found, self._mark = self._calls(self._body, "", cut), None
        return found

    def _outside(self, text: str, found: list[AnswerPart]) -> str:
        """Take in text outside of calls, up to the next mark that begins one. The text after it."""
        said, mark, rest = self._begins.push(text)
        if mark is None:
            found += self._plain(said)
            return ""
        plain = self._space + said
        shown = plain.rstrip()
        self._space = ""
        found += self._plain(shown)
        self._space = plain[len(shown) :]
        self._mark, self._body, self._searched = mark, "", 0
        return rest

    def _end(self) -> int | None:
        """Where the end mark of the body is, once it is there and not within a string of JSON."""
        end = self._form.end
        if not end or not self._mark:
            return None
        while (at := self._body.find(end, max(0, self._searched - len(end) + 1))) >= 0:
            if not (self._form.quoted and _in_string(self._body[:at])):
                return at
            self._searched = at + 2 * len(end) - 1
        self._searched = max(self._searched, len(self._body))
        return None

    def _calls(self, body: str, end: str, cut: bool = False) -> list[AnswerPart]:
        mark, space = self._mark or "", self._space
        self._space = ""
        calls = self._form.calls(body, self._tools, cut)
        if not calls and cut and not body.strip():
            calls = [InvalidToolCall(mark, CUT)]
        if not calls:
            return self._plain(space + mark + body + end, final=True)
        self._after_call = not isinstance(calls[-1], str)
        kept: list[AnswerPart] = []
        for call in calls:
            if isinstance(call, str) or self._parallel or not self._called:
                kept.append(call)
            self._called |= isinstance(call, ToolCall)
        return kept

    def _plain(self, text: str, final: bool = False) -> list[AnswerPart]:
        """Text for the reader. White space at its end waits until it is known whether a call follows."""
        text = self._space + text
        shown = text if final else text.rstrip()
        self._space = text[len(shown) :]
        self._after_call = self._after_call and not shown
        return [shown] if shown else []


def _in_string(text: str) -> bool:
    """Whether a text of JSON ends within a string."""
    return _ESCAPED.sub("", text).count('"') % 2 == 1
