"""The formats of Mistral: `[TOOL_CALLS]` and a JSON list; since 2025 `[TOOL_CALLS]NAME[ARGS]{...}` for each call."""

import hashlib
import re

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall
from serving.text.tool_formats.format import ToolFormat, Tools, WriteMark
from serving.text.tool_formats.grammar import json_call, literal, one_call
from serving.text.tool_formats.json_calls import calls_of_list, named_call, read_first_json

_BEGIN, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"\s*([^\[{\s]+)\s*(?:\[CALL_ID\]([^\[{]*))?(?:\[ARGS\])?\s*(?=\{)")


class Mistral(ToolFormat):
    """Calls from the mark to the end of the answer."""

    name = "mistral"
    signs = (_BEGIN,)
    begin = (_BEGIN,)
    further_marks = (_ARGUMENTS, _ID)

    def call_id(self, request_id: str, position: int) -> str:
        """Nine letters and digits, which the templates of these models insist on."""
        return hashlib.sha256(f"{request_id} {position}".encode()).hexdigest()[:9]

    def calls(self, body: str, tools: Tools, cut: bool) -> list[AnswerPart]:
        """See `ToolFormat.calls`."""
        if body.lstrip().startswith("["):
            return calls_of_list(body, cut)
        found: list[AnswerPart] = []
        for text in body.split(_BEGIN):
            found += _calls(text, cut)
        return found

    def grammar(self, tools: Tools, mark: WriteMark) -> str:
        """See `ToolFormat.grammar`."""
        return one_call(tools, json_call, before=f"{mark(_BEGIN)} {literal('[')}", after=literal("]"))


def _calls(text: str, cut: bool) -> list[AnswerPart]:
    head = _HEAD.match(text)
    if head is None:
        return [InvalidToolCall(text.strip(), CUT if cut else "the call has no arguments")]
    try:
        _, end = read_first_json(text, head.end())
    except ValueError as error:
        return [InvalidToolCall(text.strip(), CUT if cut else str(error))]
    call = named_call(head[1], text[head.end() : end], text.strip(), id=(head[2] or "").strip())
    rest = text[end:].strip()
    return [call, *([rest] if rest else [])]
