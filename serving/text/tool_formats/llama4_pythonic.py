"""The format of Llama 4 and 3.2: an answer that is a Python list of calls with literal arguments, `[f(a=1), g()]`."""

import ast
import re
from typing import Any

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall, ToolCall
from serving.text.tool_formats.format import Tools
from serving.text.tool_formats.json_calls import write_arguments
from serving.text.tool_formats.llama3_json import Llama3Json

_BEGUN = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*)?\s*(?:\(|\Z)")


class Llama4Pythonic(Llama3Json):
    """A list of Python calls. A call in JSON, which is what a required call is written as, is understood too."""

    name = "llama4_pythonic"
    signs = ("<|python_start|>", "[func_name1(params_name1=params_value1")
    begin = ("<|python_start|>",)
    end = "<|python_end|>"
    bare = "[{"

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        text = body.strip()
        if text.startswith("{"):
            return super().calls(body, tools, cut)
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return [InvalidToolCall(text, CUT)] if cut and _BEGUN.match(text) else []
        if not isinstance(tree, ast.List) or not tree.elts or not all(isinstance(e, ast.Call) for e in tree.elts):
            return []
        return [_call(element, ast.unparse(element)) for element in tree.elts]


def _call(element: Any, text: str) -> AnswerPart:
    """The call that an element of the list is; names may have dots."""
    try:
        if element.args or any(each.arg is None for each in element.keywords):
            raise ValueError("an argument has no name")
        values = {each.arg: ast.literal_eval(each.value) for each in element.keywords}
        return ToolCall(ast.unparse(element.func), write_arguments(values))
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        return InvalidToolCall(text, str(error))
