"""Writes the page of Anthropic's API: `python -m docs.anthropic_table > docs/anthropic.md`."""

from docs.openai_table import field_section
from serving.api.http.bodies.anthropic import (
    AnthropicTool,
    AnthropicToolChoice,
    AnthropicTurn,
    ContentBlock,
    MessagesBody,
    OutputConfig,
    OutputFormat,
    ThinkingConfig,
)

_HEAD = """\
# Anthropic's API

`/v1/messages` and `/v1/messages/count_tokens` speak Anthropic's API: text, streams, system prompts, tools and their
results, thinking, structured output, stop sequences. Each request is answered as the chat completion that it stands
for, by the same templates and parsers ([conversations](conversations.md)), and its stream survives the death of any
rank.

```python
import anthropic

client = anthropic.Anthropic(base_url="http://127.0.0.1:8000", api_key="none")
with client.messages.stream(model="tiny", max_tokens=40, messages=[{"role": "user", "content": "ROMEO:"}]) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
```

An API key is sent as `X-Api-Key`, as Anthropic's clients do it, or as `Authorization: Bearer`. `model` is a name of the
model that is served: `--served-model-name` gives it the names that a client insists on.

## Streams
A stream has Anthropic's events: `message_start`, for each block `content_block_start`, `content_block_delta` and
`content_block_stop`, then `message_delta` and `message_stop`. Anthropic's API has no way to go on with a broken stream.
Here a client that asks for ids (`X-Moejax-Event-Ids: true`) can: each event then has an `id:` line after its data, and
`GET /v1/resume` with `Last-Event-ID` sends the rest, also from the front after the one that died
([streams](openai.md#streams)).

A tool call comes whole, in one `input_json_delta`. A call that cannot be carried out, because its arguments are no JSON
object or the answer was cut within it, is text. Thinking has an empty `signature`.

## Errors
Errors have Anthropic's form, `{"type": "error", "error": {"type", "message"}, "request_id"}`, and the message begins
with the path of the field at fault. The header `Request-Id` has the id of every call.

| status | type |
|---|---|
| 400 and others below 500 | `invalid_request_error` |
| 401, 403 | `authentication_error`, `permission_error` |
| 404 | `not_found_error`: the server has no model of that name |
| 408 | `timeout_error` |
| 413 | `request_too_large` |
| 429 | `rate_limit_error`: the queue is full; `Retry-After` says when to come again |
| 503 | `overloaded_error`: no plan can serve with the ranks that are alive, or the server is draining |
| 500 | `api_error` |

The [rule about fields](openai.md#which-fields-are-taken) is that of the other APIs.
"""


def page() -> str:
    """The page in Markdown."""
    return (
        _HEAD
        + field_section("Fields", "Those from `max_tokens` on are not for count_tokens.", (MessagesBody,))
        + field_section("Turns and blocks", "Fields of `messages[]` and of the blocks of their content.", _TURNS)
        + field_section("Tools", "Fields of `tools[]` and of `tool_choice`.", (AnthropicTool, AnthropicToolChoice))
        + field_section("Options", "Fields of `thinking`, `output_config` and its `format`.", _OPTIONS)
    )


_TURNS = (AnthropicTurn, ContentBlock)
_OPTIONS = (ThinkingConfig, OutputConfig, OutputFormat)

if __name__ == "__main__":
    print(page(), end="")
