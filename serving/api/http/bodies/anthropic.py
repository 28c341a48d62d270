"""The bodies of Anthropic's /v1/messages and /v1/messages/count_tokens."""

from typing import Annotated, Any, Literal

import msgspec

from serving.api.http.bodies.rules import accepted, ignored, refused, used

_CACHED = "prefixes are cached by their content"
_NO_SERVER_TOOLS = "the server runs no tools of its own"


class ContentBlock(msgspec.Struct, kw_only=True):
    """A block of a message's content, or of the result of a tool."""

    type: Annotated[
        str, used("`text`, `thinking`, `tool_use` or `tool_result`; `redacted_thinking` is read and left out.")
    ]
    text: Annotated[str | None, used("The text of a text block.")] = None
    thinking: Annotated[str | None, used("The text of a thinking block; it reaches the chat template.")] = None
    id: Annotated[str | None, used("The id of a tool_use block.")] = None
    name: Annotated[str | None, used("The tool of a tool_use block.")] = None
    input: Annotated[dict[str, Any] | None, used("The arguments of a tool_use block.")] = None
    tool_use_id: Annotated[str | None, used("The call that a tool_result block answers.")] = None
    content: Annotated["str | list[ContentBlock] | None", used("The content of a tool_result block: text.")] = None
    is_error: Annotated[Any, ignored("the content of the result says so", False)] = None
    signature: Annotated[Any, ignored("thinking is not signed", "")] = None
    data: Annotated[Any, ignored("only another server can read redacted thinking")] = None
    citations: Annotated[Any, ignored("they are about the text and not part of it", [])] = None
    caller: Annotated[Any, ignored("the model makes all calls itself")] = None
    cache_control: Annotated[Any, ignored(_CACHED)] = None


class AnthropicTurn(msgspec.Struct, kw_only=True):
    """A message of a conversation."""

    role: Annotated[Literal["user", "assistant", "system"], used("user, assistant or system.")]
    content: Annotated[str | list[ContentBlock], used("Text, or blocks.")]


class AnthropicTool(msgspec.Struct, kw_only=True):
    """A tool that the model may call."""

    name: Annotated[str, used("The name.", minLength=1)]
    input_schema: Annotated[dict[str, Any], used("The JSON Schema of the arguments.")]
    description: Annotated[str | None, used("Reaches the chat template.")] = None
    type: Annotated[Any, accepted(_NO_SERVER_TOOLS, "custom")] = None
    strict: Annotated[Any, ignored("a call that is required follows the schema, strict or not", False)] = None
    cache_control: Annotated[Any, ignored(_CACHED)] = None
    allowed_callers: Annotated[Any, accepted(_NO_SERVER_TOOLS, ["direct"])] = None
    defer_loading: Annotated[Any, ignored("all tools are in the prompt", False)] = None
    eager_input_streaming: Annotated[Any, ignored("arguments come when they are whole")] = None
    input_examples: Annotated[Any, ignored("say so in the description", [])] = None


class AnthropicToolChoice(msgspec.Struct, kw_only=True):
    """Which tools the model may or must call."""

    type: Annotated[Literal["auto", "any", "tool", "none"], used("auto, any, tool or none.")]
    name: Annotated[str | None, used("The tool to call, for the type tool.")] = None
    disable_parallel_tool_use: Annotated[bool | None, used("At most one call.")] = None


class ThinkingConfig(msgspec.Struct, kw_only=True):
    """Whether a model that can do both reasons before it answers."""

    type: Annotated[
        Literal["enabled", "adaptive", "disabled"],
        used("enabled and disabled reach the chat template as enable_thinking; adaptive leaves it to the model."),
    ]
    budget_tokens: Annotated[Any, ignored("max_tokens bounds the whole answer")] = None
    display: Annotated[Any, ignored("thinking is sent as it is", "summarized")] = None


class OutputFormat(msgspec.Struct, kw_only=True):
    """The form of the answer."""

    type: Annotated[Literal["json_schema"], used("`json_schema`.")]
    schema: Annotated[dict[str, Any], used("The JSON Schema of the answer.")]


class OutputConfig(msgspec.Struct, kw_only=True):
    """The form of the answer, and the effort for it."""

    format: Annotated[OutputFormat | None, used("The form of the answer.")] = None
    effort: Annotated[str | None, used("Reaches the chat template as reasoning_effort.")] = None
    task_budget: Annotated[Any, ignored("max_tokens bounds the answer")] = None


class CountTokensBody(msgspec.Struct, kw_only=True):
    """A request of /v1/messages/count_tokens."""

    model: Annotated[str, used("Name of the model.")]
    messages: Annotated[list[AnthropicTurn], used("The conversation so far.", minItems=1)]
    system: Annotated[str | list[ContentBlock] | None, used("The system prompt: text, or blocks of text.")] = None
    tools: Annotated[list[AnthropicTool] | None, used("Tools that the model may call.")] = None
    tool_choice: Annotated[AnthropicToolChoice | None, used("Which tools the model may or must call.")] = None
    thinking: Annotated[ThinkingConfig | None, used("Whether the model reasons first.")] = None
    output_config: Annotated[OutputConfig | None, used("The form of the answer.")] = None
    output_format: Annotated[OutputFormat | None, used("The older name of output_config.format.")] = None
    cache_control: Annotated[Any, ignored(_CACHED)] = None
    context_management: Annotated[Any, ignored("the conversation is never cut")] = None
    mcp_servers: Annotated[Any, accepted(_NO_SERVER_TOOLS, [])] = None
    prefill: Annotated[Any, refused("the answer is the assistant's next turn")] = None


class MessagesBody(CountTokensBody, kw_only=True):
    """A request of /v1/messages."""

    max_tokens: Annotated[int, used("Most tokens of the answer.", minimum=1)]
    stop_sequences: Annotated[list[str] | None, used("Texts before which the answer ends.")] = None
    stream: Annotated[bool | None, used("Answer with server-sent events.")] = None
    temperature: Annotated[float | None, used("0 takes the likeliest token.", minimum=0)] = None
    top_p: Annotated[float | None, used("Share of probability to sample from.", exclusiveMinimum=0, maximum=1)] = None
    top_k: Annotated[int | None, used("Number of tokens to sample from.", minimum=0)] = None
    speculate: Annotated[
        bool | None, used("An addition: draft tokens ahead, which changes none of them. Default: as the server does.")
    ] = None
    metadata: Annotated[Any, ignored("a label of the caller's; nothing depends on it", {})] = None
    service_tier: Annotated[Any, ignored("there is one", "auto", "standard_only")] = None
    container: Annotated[Any, refused(_NO_SERVER_TOOLS)] = None
    inference_geo: Annotated[Any, ignored("the server is where it is")] = None
    speed: Annotated[Any, ignored("there is one", "standard")] = None
    diagnostics: Annotated[Any, ignored("metrics and traces have them")] = None
