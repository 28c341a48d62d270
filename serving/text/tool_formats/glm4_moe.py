"""The format of GLM-4.5 and later: `<tool_call>NAME`, then for each argument
`<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>`, then `</tool_call>`."""

import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import Parameters, Tools
from serving.text.tool_formats.hermes import Hermes
from serving.text.tool_formats.json_calls import named_call, write_arguments
from serving.text.tool_formats.qwen3_coder import argument_value

_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


class Glm4Moe(Hermes):
    """Keys and values between tags of their own. A call in JSON, which is what a required call is written as, is
    understood too."""

    name = "glm4_moe"
    signs = ("<arg_key>",)
    further_marks = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    quoted = False

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        if body.lstrip().startswith("{"):
            return super().calls(body, tools, cut)
        if cut:
            return [InvalidToolCall(body.strip(), CUT)]
        name = body.partition("<arg_key>")[0].strip()
        if not name or any(character.isspace() for character in name):
            return []
        parameters = Parameters.of(tools, name)
        values = {key.strip(): argument_value(parameters, key.strip(), text) for key, text in _ARGUMENT.findall(body)}
        return [named_call(name, write_arguments(values), body.strip())]
