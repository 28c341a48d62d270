"""The format of Kimi K2: for each call
`<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`, all between one pair of outer
marks. The text before the arguments is the id that the model expects back."""

import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.deepseek import sections
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import literal, one_call
from serving.text.tool_formats.json_calls import named_call

_CALL, _CALL_END, _ARGUMENTS = "<|tool_call_begin|>", "<|tool_call_end|>", "<|tool_call_argument_begin|>"
_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


class KimiK2(ToolFormat):
    """An id and JSON, between marks."""

    name = "kimi_k2"
    signs = ("<|tool_calls_section_begin|>",)
    begin = ("<|tool_calls_section_begin|>",)
    end = "<|tool_calls_section_end|>"
    further_marks = (_CALL, _CALL_END, _ARGUMENTS)

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        found = sections(body, _CALL, _CALL_END)
        if cut and not found:
            return [InvalidToolCall(body, CUT)]
        return [_call(text, cut and not ended) for text, ended in found]

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""

        def write(name: str, arguments: str) -> str:
            return f"{literal(f'functions.{name}:0')} {mark(_ARGUMENTS)} {arguments}"

        before, after = f"{mark(self.begin[0])} {mark(_CALL)}", f"{mark(_CALL_END)} {mark(self.end)}"
        return one_call(tools, write, before=before, after=after)


def _call(text: str, cut: bool) -> AnswerPart:
    name, separator, arguments = (part.strip() for part in text.partition(_ARGUMENTS))
    if cut or not separator:
        return InvalidToolCall(text, CUT if cut else "the call has no arguments")
    found = _ID.fullmatch(name)
    return named_call("" if found is None else found[1], arguments, text, id=name)
