"""Tool calls written in JSON, which most formats have within their marks."""

import json
import math
from typing import Any, NoReturn

from serving.text.answer_parts import CUT, AnswerPart, InvalidToolCall, ToolCall

_decoder = json.JSONDecoder(
    parse_constant=lambda name: _refuse(f"{name} is no JSON"), parse_float=lambda text: _finite(text)
)


def read_json(text: str) -> Any:
    """A JSON value. Raises ValueError also for the constants that only Python reads, for a number that is too large,
    and for too many brackets."""
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_first_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends. Raises ValueError."""
    try:
        return _decoder.raw_decode(text, start)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_arguments(values: Any) -> str:
    """The arguments of a call as JSON; `values` is an object, or the text of one. Raises ValueError."""
    if isinstance(values, str):
        values = read_json(values) if values.strip() else {}
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError("the arguments are no JSON object")
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs can only be sent as escapes
        return json.dumps(values)
    return text


def call_of(value: Any, text: str) -> ToolCall | InvalidToolCall:
    """The call that a JSON value is: an object with `name` and `arguments` (or `parameters`). `text` is what the model
    wrote."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return InvalidToolCall(text, "the call has no name")
    try:
        arguments = write_arguments(value.get("arguments", value.get("parameters")))
    except ValueError as error:
        return InvalidToolCall(text, str(error))
    return ToolCall(value["name"], arguments, value["id"] if isinstance(value.get("id"), str) else "")


def named_call(name: str, arguments: str, text: str, *, cut: bool = False, id: str = "") -> ToolCall | InvalidToolCall:
    """A call whose name stands apart from its arguments. `text` is what the model wrote; `cut` as in `ToolFormat`."""
    if cut and not arguments.strip():
        return InvalidToolCall(text, CUT)
    if not name:
        return InvalidToolCall(text, CUT if cut else "the call has no name")
    try:
        return ToolCall(name, write_arguments(arguments), id)
    except ValueError as error:
        return InvalidToolCall(text, CUT if cut else str(error))


def calls_of_list(body: str, cut: bool) -> list[AnswerPart]:
    """The calls of a JSON list, and the text after it."""
    try:
        values, end = read_first_json(body, len(body) - len(body.lstrip()))
    except ValueError as error:
        return [InvalidToolCall(body.strip(), CUT if cut else str(error))]
    values = values if isinstance(values, list) else [values]
    rest = body[end:].strip()
    calls: list[AnswerPart] = [call_of(value, json.dumps(value)) for value in values]
    return [*calls, *([rest] if rest else [])]


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(f"{text} is too large")
