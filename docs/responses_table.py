"""Writes the page of OpenAI's Responses API: `python -m docs.responses_table > docs/responses.md`."""

from docs.openai_table import field_section
from serving.api.http.bodies.responses import (
    FunctionTool,
    InputItem,
    ReasoningOptions,
    ResponsesBody,
    TextFormat,
    TextOptions,
)

_HEAD = """\
# OpenAI's Responses API

`/v1/responses` speaks OpenAI's Responses API: text, instructions, items, functions, structured output, reasoning,
streams, earlier responses, the background. Each request is answered as the chat completion that it stands for, by the
same templates and parsers ([conversations](conversations.md)), and its stream survives the death of any rank.

```python
import openai

client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
first = client.responses.create(model="tiny", input="ROMEO:", max_output_tokens=40)
second = client.responses.create(model="tiny", input="JULIET:", previous_response_id=first.id, max_output_tokens=40)
print(second.output_text)
```

## Responses that are asked for again
The request log keeps each response until `--resume-s` seconds after its end, and the journal hands it to the next
front. So long

- `previous_response_id` goes on from it. The new response has the whole conversation, and needs the earlier one no
  longer. One that still runs is refused (400).
- `GET /v1/responses/ID` has it as it is now, and with `?stream=true` its events. A client whose connection or front
  died goes on with `?stream=true&starting_after=N`, where N is the `sequence_number` of the last event that came: the
  numbers are the same whoever sends the events.
- `POST /v1/responses/ID/cancel` ends it: its status is then `cancelled`.
- `DELETE /v1/responses/ID` ends and forgets it, also for the next front.

`"store": false` hides a response from all of these. Without the journal (`--journal off`) nothing is kept.

A client that disconnects cancels its response, unless it was made with `"background": true`: that one runs to its end.

## Events
Events have OpenAI's names and order, from `response.created` to `response.completed`, `response.incomplete` (cut by
`max_output_tokens`, or cancelled) or `response.failed`. A function call comes whole, in one
`response.function_call_arguments.delta`. Reasoning is an item of the type `reasoning` with a `reasoning_text`, where
the model's reasoning parser finds some; the usage does not count its tokens apart. A call that cannot be carried out is
text.

Errors, and the [rule about fields](openai.md#which-fields-are-taken), are those of the OpenAI API.
"""


def page() -> str:
    """The page in Markdown."""
    return (
        _HEAD
        + field_section("Fields", "", (ResponsesBody,))
        + field_section("Items", "Fields of `input[]`.", (InputItem,))
        + field_section("Tools", "Fields of `tools[]`.", (FunctionTool,))
        + field_section(
            "Options", "Fields of `text`, its `format`, and `reasoning`.", (TextOptions, TextFormat, ReasoningOptions)
        )
    )


if __name__ == "__main__":
    print(page(), end="")
