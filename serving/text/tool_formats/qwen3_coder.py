"""The format of Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""

import re
from typing import Any

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import Parameters, Tools
from serving.text.tool_formats.hermes import Hermes
from serving.text.tool_formats.json_calls import named_call, read_json, write_arguments

_FUNCTION = re.compile(r"\s*<function=([^>]+)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class Qwen3Coder(Hermes):
    """Each argument between tags of its own. A call in JSON, which is what a required call is written as, is
    understood too."""

    name = "qwen3_coder"
    signs = ("<function=",)
    quoted = False

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        found = _FUNCTION.match(body)
        if found is None:
            begun = cut and body.strip() and "<function=".startswith(body.strip()[: len("<function=")])
            return [InvalidToolCall(body.strip(), CUT)] if begun else super().calls(body, tools, cut)
        name, inside, end = found[1].strip(), found[2], found[3]
        if not end:
            return [InvalidToolCall(body.strip(), CUT if cut else "the call has no end")]
        parameters = Parameters.of(tools, name)
        values = {
            key.strip(): argument_value(parameters, key.strip(), text) for key, text in _PARAMETER.findall(inside)
        }
        return [named_call(name, write_arguments(values), body.strip())]


def argument_value(parameters: Parameters, key: str, text: str) -> Any:
    """The value of an argument that is written as text: JSON, unless the schema says that it is a text."""
    if parameters.is_text(key):
        return text
    try:
        return read_json(text)
    except ValueError:
        return text
