"""The formats of DeepSeek: V3 and R1 write the arguments of a call as a block of Markdown, V3.1 as they are.

V3: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, then the block.
V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}`. All calls stand between one pair of outer marks.
"""

from collections.abc import Callable

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import literal, one_call
from serving.text.tool_formats.json_calls import named_call

_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_BLOCK = "```json"


class DeepSeekV31(ToolFormat):
    """The format of DeepSeek V3.1. Its parser understands that of V3 too."""

    name = "deepseek_v31"
    signs = ("<｜tool▁calls▁begin｜>",)
    begin = ("<｜tool▁calls▁begin｜>",)
    end = "<｜tool▁calls▁end｜>"
    further_marks = (_CALL, _CALL_END, _SEPARATOR)

    def is_of(self, template: str) -> bool:
        """See `ToolFormat.is_of`."""
        return super().is_of(template) and _BLOCK not in template

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        found = sections(body, _CALL, _CALL_END)
        if cut and not found:
            return [InvalidToolCall(body, CUT)]
        return [_call(text, cut and not ended) for text, ended in found]

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""

        def write(name: str, arguments: str) -> str:
            return f"{literal(name)} {mark(_SEPARATOR)} {arguments}"

        return self._around(tools, mark, write)

    def _around(self, tools: Tools, mark: WriteMark, write: Callable[[str, str], str]) -> str:
        before = f"{mark(self.begin[0])} {mark(_CALL)}"
        return one_call(tools, write, before=before, after=f"{mark(_CALL_END)} {mark(self.end)}")


class DeepSeekV3(DeepSeekV31):
    """The format of DeepSeek V3 and R1."""

    name = "deepseek_v3"

    def is_of(self, template: str) -> bool:
        """See `ToolFormat.is_of`."""
        return any(sign in template for sign in self.signs) and _BLOCK in template

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""

        def write(name: str, arguments: str) -> str:
            head = literal(f"{name}\n{_BLOCK}\n")
            return f'"function" {mark(_SEPARATOR)} {head} {arguments} "\\n```"'

        return self._around(tools, mark, write)


def sections(body: str, begin: str, end: str) -> list[tuple[str, bool]]:
    """The texts between each pair of marks, and whether the end mark is there; the last one may lack it."""
    found = []
    for part in body.split(begin)[1:]:
        text, ended, _ = part.partition(end)
        found.append((text, bool(ended)))
    return found


def _call(text: str, cut: bool) -> AnswerPart:
    head, separator, rest = text.partition(_SEPARATOR)
    if cut or not separator:
        return InvalidToolCall(text, CUT if cut else "the call has no arguments")
    if _BLOCK in rest:
        head, _, rest = rest.partition(_BLOCK)
        rest = rest.strip().removesuffix("```")
    return named_call(head.strip(), rest.strip(), text)
