"""The body of OpenAI's /v1/responses."""

from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.messages import ContentPart
from serving.api.http.bodies.rules import accepted, ignored, refused, used
from serving.text.validation import MAX_TOP_LOGPROBS

_LABEL = "a label of the caller's; nothing depends on it"
_CACHED = "prefixes are cached by their content"
_NO_TOOLS = "the server runs no tools of its own"
_ADDITION = "As in chat completions; an addition."
LOGPROBS = "message.output_text.logprobs"
"""The part of `include` that asks for log-probabilities."""


class InputItem(msgspec.Struct, kw_only=True):
    """An item of the input: a message, a function call, its output, or reasoning. Items of an output may come back."""

    type: Annotated[
        str | None, used("`message`, also when it is left out, `function_call`, `function_call_output` or `reasoning`.")
    ] = None
    role: Annotated[str | None, used("system, developer, user or assistant, of a message.")] = None
    content: Annotated[
        str | list[str | ContentPart] | None, used("Text or parts of text, of a message or of reasoning.")
    ] = None
    call_id: Annotated[str | None, used("The id of a function call.")] = None
    name: Annotated[str | None, used("The function of a function call.")] = None
    arguments: Annotated[str | None, used("The arguments of a function call, as JSON.")] = None
    output: Annotated[str | list[str | ContentPart] | None, used("What the function of a call returned.")] = None
    id: Annotated[str | None, used("The item's id; nothing depends on it.")] = None
    status: Annotated[str | None, used("The item's status; nothing depends on it.")] = None
    phase: Annotated[Any, ignored("the chat template has no place for it")] = None
    summary: Annotated[Any, ignored("reasoning is in content", [])] = None
    encrypted_content: Annotated[Any, ignored("reasoning is in content")] = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    type: Annotated[str, used("`function`: the server runs no tools of its own.")]
    name: Annotated[str | None, used("The name.")] = None
    description: Annotated[str | None, used("Reaches the chat template.")] = None
    parameters: Annotated[dict[str, Any] | None, used("The JSON Schema of the arguments.")] = None
    strict: Annotated[bool | None, used("A call that is required follows the schema, strict or not.")] = None
    defer_loading: Annotated[Any, ignored("all tools are in the prompt", False)] = None


class TextFormat(msgspec.Struct, kw_only=True):
    """The form of the answer."""

    type: Annotated[str, used("`text`, `json_object` or `json_schema`.")]
    name: Annotated[str | None, used("A name for the schema; nothing depends on it.")] = None
    description: Annotated[str | None, used("What the schema is for; nothing depends on it.")] = None
    schema: Annotated[dict[str, Any] | None, used("The JSON Schema, for the type `json_schema`.")] = None
    strict: Annotated[bool | None, used("The schema holds for every answer, strict or not.")] = None


class TextOptions(msgspec.Struct, kw_only=True):
    """Options of the text."""

    format: Annotated[TextFormat | None, used("The form of the answer.")] = None
    verbosity: Annotated[Any, ignored("say so in the instructions", "medium")] = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """Options of the reasoning."""

    effort: Annotated[str | None, used("Reaches the chat template as reasoning_effort.")] = None
    summary: Annotated[Any, ignored("reasoning is sent as it is")] = None
    generate_summary: Annotated[Any, ignored("reasoning is sent as it is")] = None


class ResponsesBody(msgspec.Struct, kw_only=True):
    """A request of /v1/responses."""

    input: Annotated[str | list[InputItem], used("Text of the user, or items.")]
    model: Annotated[str | None, used("Name of the model; without it, the one that is served.")] = None
    instructions: Annotated[str | None, used("The system prompt; that of an earlier response ends with it.")] = None
    previous_response_id: Annotated[
        str | None, used("The response that the input goes on from, if it ended at most --resume-s seconds ago.")
    ] = None
    stream: Annotated[bool | None, used("Answer with server-sent events.")] = None
    background: Annotated[bool | None, used("Go on without the client; `GET /v1/responses/ID` has the answer.")] = None
    store: Annotated[bool | None, used("With false, the response cannot be asked for again.")] = None
    max_output_tokens: Annotated[int | None, used("Most tokens of the answer, reasoning included.", minimum=1)] = None
    temperature: Annotated[float | None, used("0 takes the likeliest token.", minimum=0)] = None
    top_p: Annotated[float | None, used("Share of probability to sample from.", exclusiveMinimum=0, maximum=1)] = None
    include: Annotated[list[str] | None, used(f"`{LOGPROBS}` sends log-probabilities; others change nothing.")] = None
    top_logprobs: Annotated[
        int | None, used("Number of alternatives to each token.", minimum=0, maximum=MAX_TOP_LOGPROBS)
    ] = None
    tools: Annotated[list[FunctionTool] | None, used("Functions that the model may call.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None, used("`none`, `auto`, `required`, the function to call, or `allowed_tools`.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, used("With false, at most one call.")] = None
    text: Annotated[TextOptions | None, used("Options of the text.")] = None
    reasoning: Annotated[ReasoningOptions | None, used("Options of the reasoning.")] = None
    metadata: Annotated[dict[str, Any] | None, used("Comes back in the response.")] = None
    seed: Annotated[int | None, used(_ADDITION)] = None
    stop: Annotated[str | list[str] | None, used(_ADDITION)] = None
    top_k: Annotated[int | None, used(_ADDITION, minimum=-1)] = None
    min_p: Annotated[float | None, used(_ADDITION, minimum=0, maximum=1)] = None
    frequency_penalty: Annotated[float | None, used(_ADDITION, minimum=-2, maximum=2)] = None
    presence_penalty: Annotated[float | None, used(_ADDITION, minimum=-2, maximum=2)] = None
    repetition_penalty: Annotated[float | None, used(_ADDITION, minimum=0.01, maximum=100)] = None
    min_tokens: Annotated[int | None, used(_ADDITION, minimum=0)] = None
    ignore_eos: Annotated[bool | None, used(_ADDITION)] = None
    stop_token_ids: Annotated[list[int] | None, used(_ADDITION)] = None
    priority: Annotated[int | None, used(_ADDITION, minimum=-(2**31), maximum=2**31 - 1)] = None
    speculate: Annotated[
        bool | None, used("As in chat completions; an addition. Draft tokens ahead, which changes none of them.")
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, used("Variables of the chat template.")] = None

    truncation: Annotated[Any, ignored("a conversation that is too long is refused and never cut", "disabled")] = None
    conversation: Annotated[Any, accepted("send previous_response_id, or the items themselves")] = None
    prompt: Annotated[Any, refused("the server stores no prompts")] = None
    context_management: Annotated[Any, ignored("a conversation is never cut", [])] = None
    max_tool_calls: Annotated[Any, ignored(_NO_TOOLS)] = None
    stream_options: Annotated[Any, ignored("events are not padded", {})] = None
    moderation: Annotated[Any, ignored("nothing is moderated")] = None
    user: Annotated[Any, ignored(_LABEL)] = None
    safety_identifier: Annotated[Any, ignored(_LABEL)] = None
    service_tier: Annotated[Any, ignored("there is one", "auto", "default")] = None
    prompt_cache_key: Annotated[Any, ignored(_CACHED)] = None
    prompt_cache_options: Annotated[Any, ignored(_CACHED)] = None
    prompt_cache_retention: Annotated[Any, ignored(_CACHED)] = None
