"""The format of Llama 3.1 to 3.3: an answer that is `{"name": ..., "parameters": {...}}`, or several with `;` between
them, with or without `<|python_tag|>` before."""

import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import json_call, one_call
from serving.text.tool_formats.json_calls import call_of, read_first_json

_CALL = re.compile(r'\s*\{\s*"(?:name|type)"\s*:')
_BETWEEN = re.compile(r"[\s;,]*")


class Llama3Json(ToolFormat):
    """An answer of JSON objects with names."""

    name = "llama3_json"
    signs = ("<|python_tag|>", '{"name": function name, "parameters":')
    begin = ("<|python_tag|>",)
    bare = "{"

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        if not _CALL.match(body):
            begun = body.strip().replace(" ", "").replace("\n", "")
            return [InvalidToolCall(body, CUT)] if cut and '{"name":'.startswith(begun) else []
        found, at = list[AnswerPart](), 0
        while True:
            between = _BETWEEN.match(body, at)
            at = at if between is None else between.end()
            if at == len(body):
                return found
            if not body.startswith("{", at):
                return [*found, body[at:].rstrip()]
            try:
                value, end = read_first_json(body, at)
            except ValueError as error:
                return [*found, InvalidToolCall(body[at:], CUT if cut else str(error))]
            found.append(call_of(value, body[at:end]))
            at = end

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""
        return one_call(tools, lambda name, arguments: json_call(name, arguments, "parameters"))
