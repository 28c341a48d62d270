"""The format of Hermes, Qwen 2.5 and 3, SmolLM and Granite 4: for each call
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import json_call, one_call
from serving.text.tool_formats.json_calls import call_of, calls_of_list, read_json


class Hermes(ToolFormat):
    """A JSON object between marks."""

    name = "hermes"
    signs = ("<tool_call>",)
    begin = ("<tool_call>",)
    end = "</tool_call>"
    quoted = True

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        text = body.strip()
        if text.startswith("["):
            return calls_of_list(body, cut)
        if not text.startswith("{") and (text or not cut):
            return []
        try:
            return [call_of(read_json(text), text)]
        except ValueError as error:
            return [InvalidToolCall(text, CUT if cut else str(error))]

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""
        begin, end = mark(self.begin[0]), mark(self.end)
        return one_call(tools, json_call, before=f'{begin} "\\n"', after=f'"\\n" {end}')
