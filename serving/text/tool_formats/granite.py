"""The format of Granite 3: `<|tool_call|>` and a JSON list of calls."""

from serving.text.answer_parts import AnswerPart
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import json_call, literal, one_call
from serving.text.tool_formats.json_calls import calls_of_list


class Granite(ToolFormat):
    """Calls from the mark to the end of the answer."""

    name = "granite"
    signs = ("<|tool_call|>",)
    begin = ("<|tool_call|>",)

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        return calls_of_list(body, cut)

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""
        return one_call(tools, json_call, before=f"{mark(self.begin[0])} {literal('[')}", after=literal("]"))
