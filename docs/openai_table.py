"""Writes the page of the OpenAI API: `python -m docs.openai_table > docs/openai.md`."""

import json
import types
import typing
from collections.abc import Collection
from typing import Any

import msgspec

from serving.api.http.bodies.chat import ChatBody, Tool
from serving.api.http.bodies.completion import CompletionBody
from serving.api.http.bodies.constraints import JsonSchemaFormat, ResponseFormat, StructuredOutputsBody
from serving.api.http.bodies.messages import ContentPart, PreviousToolCall, RequestMessage
from serving.api.http.bodies.rules import FieldRule, field_rules
from serving.api.http.bodies.sampling import GenerationFields, StreamOptions
from serving.api.http.bodies.tokenize import DetokenizeBody, TokenizeBody

_HEAD = """\
# The OpenAI API

`/v1/completions`, `/v1/chat/completions` and `/v1/models` speak OpenAI's API, with the fields that vLLM and SGLang add.
`/docs` shows all operations of a running server, `/openapi.json` is the document that clients are generated from.

## Which fields are taken
One rule decides about each field of a body, of a message and of a part of it:

1. A field that the server acts on is **used**.
2. A field that asks for what is done anyway, or for nothing, is **accepted**. A null counts as a field that is absent.
3. A field that asks for something that would change the answer, and that cannot be done, is **refused**: status 400,
   and `param` is the path of the field, such as `messages[2].content[0]`.
4. A field that changes nothing in the answer (a label, a hint), and one that this server does not know, is **ignored**.
   The response header `X-Moejax-Ignored-Fields` names it, and so does a line in the log, once for each field.

With `--strict-fields` an unknown field is refused too, and the error names the nearest one that is known.

The bodies are [msgspec](https://jcristharif.com/msgspec/) models (`serving/api/http/bodies/`), from which the check of
types, these tables and `/openapi.json` are made; ranges are checked in `serving/text/validation.py`, alike for every
API. msgspec writes an event about seven times as fast as pydantic does, or as `json` writes dictionaries
(`python -m benchmarks.bodies`).

## Streams
A stream is one `data:` line for each event, then `data: [DONE]`. A client that wants to go on after its connection, or
the front of the server, has died asks for ids: `X-Moejax-Event-Ids: true` as a header, or `"event_ids": true` in the
body. Each event then has an `id:` line after its data. `GET /v1/resume` with `Last-Event-ID: <the last one>` sends the
events after it; the id of the call alone (the `id` of every event, and the header `X-Request-Id`) sends all of them.
Without the journal (`--journal off`) there are no ids.

```bash
curl -N localhost:8000/v1/completions -H 'X-Moejax-Event-Ids: true' -d '{"prompt": "ROMEO:", "stream": true}'
curl -N localhost:8000/v1/resume -H 'Last-Event-ID: cmpl-0123/17'
```

A body may be packed: `Content-Encoding: gzip` or `deflate`. `--max-body-bytes` bounds what comes out.

## Errors
Errors have OpenAI's form, `{"error": {"message", "type", "param", "code"}}`. Codes that clients act on are OpenAI's:

| status | code | when |
|---|---|---|
| 400 | `context_length_exceeded` | the prompt, or the prompt and `max_tokens`, are longer than the context |
| 404 | `model_not_found` | the server has no model of that name |
| 401 | `invalid_api_key` | no API key, or an unknown one |
| 429 | `rate_limit_exceeded` | the queue is full; `Retry-After` says when to come again |

Other errors have the name of their class as code, such as `InvalidRequest` or `NoCapacity`.

## Names, sites and paths
`--served-model-name a,b` gives the model other names: clients may use each of them, and responses and metrics have the
first. `--allowed-origins https://chat.example,https://lab.example` lets the pages of these sites call the API from a
browser (CORS), `*` those of every site; paths under `/fault_tolerance/` are never open to them.
`--root-path /moejax` is for a proxy that serves this server under a path.
"""
_SECTIONS: tuple[tuple[str, str, tuple[type[msgspec.Struct], ...]], ...] = (
    ("Fields of completions and chat completions", "", (GenerationFields,)),
    ("Fields of completions", "", (CompletionBody,)),
    ("Fields of chat completions", "", (ChatBody,)),
    (
        "Messages",
        "Fields of `messages[]`, of the parts of their content, and of the tool calls in them.",
        (RequestMessage, ContentPart, PreviousToolCall),
    ),
    ("Tools", "Fields of `tools[]`.", (Tool,)),
    (
        "Options and constraints",
        "Fields of `stream_options`, `response_format`, its `json_schema`, and `structured_outputs`.",
        (StreamOptions, ResponseFormat, JsonSchemaFormat, StructuredOutputsBody),
    ),
    ("Fields of /tokenize and /detokenize", "", (TokenizeBody, DetokenizeBody)),
)
_COLUMNS = "| field | what happens |\n|---|---|\n"


def page() -> str:
    """The page in Markdown."""
    shared = field_rules(GenerationFields)
    made = (
        field_section(title, text, models, () if GenerationFields in models else shared)
        for title, text, models in _SECTIONS
    )
    return _HEAD + "".join(made)


def field_section(title: str, text: str, models: tuple[type[msgspec.Struct], ...], shared: Collection[str] = ()) -> str:
    """A section of a page: its text, and the table of the fields of these models, without `shared` ones."""
    rows = ""
    for model in models:
        hints = typing.get_type_hints(model)
        rows += "".join(
            _row(name, rule, type_name(hints[name])) for name, rule in field_rules(model).items() if name not in shared
        )
    return f"\n## {title}\n{text}{chr(10) if text else ''}\n{_COLUMNS}{rows}"


def type_name(hint: Any) -> str:
    """The type of a field in the words of JSON Schema, without null; empty for any type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(each) for each in arguments if each is not type(None)))
    if origin is typing.Literal:
        return "string"
    if origin is list:
        each = type_name(arguments[0])
        return f"array of ({each})" if " or " in each else f"array of {each}"
    named = {str: "string", bool: "boolean", int: "integer", float: "number"}
    return named.get(hint, "" if hint is Any else "object")


def _row(name: str, rule: FieldRule, kind: str) -> str:
    return f"| `{name}` | {_treatment(rule, kind)} |\n"


def _treatment(rule: FieldRule, kind: str) -> str:
    neutral = ", ".join(f"`{json.dumps(value)}`" for value in rule.neutral)
    match rule.treatment:
        case "used":
            bounds = f" {rule.bounds.capitalize()}." if rule.bounds else ""
            return f"used{f', {kind}' if kind else ''}. {rule.why}{bounds}"
        case "accepted" if neutral:
            return f"{neutral}: accepted; other values are refused: {rule.why}"
        case "ignored":
            return f"ignored{f' (silently: {neutral})' if neutral else ''}: {rule.why}"
    return f"refused: {rule.why}"


if __name__ == "__main__":
    print(page(), end="")
