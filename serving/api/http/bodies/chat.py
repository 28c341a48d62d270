"""The body of /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.messages import RequestMessage
from serving.api.http.bodies.rules import accepted, ignored, used
from serving.api.http.bodies.sampling import GenerationFields
from serving.text.validation import MAX_TOP_LOGPROBS


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, used("The name.", minLength=1)]
    description: Annotated[str | None, used("Reaches the chat template.")] = None
    parameters: Annotated[dict[str, Any] | None, used("The JSON Schema of the arguments.")] = None
    strict: Annotated[bool | None, used("A call that is required follows the schema, strict or not.")] = None


class Tool(msgspec.Struct, kw_only=True):
    """A tool that the model may call."""

    function: Annotated[FunctionDefinition, used("The function.")]
    type: Annotated[str | None, used("`function`, also when it is left out.")] = None
    cache_control: Annotated[Any, ignored("prefixes are cached by their content")] = None


class ChatBody(GenerationFields, kw_only=True):
    """A request of /v1/chat/completions."""

    messages: Annotated[list[RequestMessage], used("The conversation so far.", minItems=1)]
    tools: Annotated[list[Tool] | None, used("Functions that the model may call.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        used("`none`, `auto`, `required`, or the function to call."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, used("false: at most one call.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, used("Variables of the chat template.")] = None
    reasoning_effort: Annotated[str | None, used("Reaches the chat template under this name.")] = None
    documents: Annotated[list[dict[str, Any]] | None, used("Reach the chat template under this name.")] = None
    max_completion_tokens: Annotated[int | None, used("The newer name of max_tokens.", minimum=-1)] = None
    logprobs: Annotated[bool | None, used("Send log-probabilities.")] = None
    top_logprobs: Annotated[
        int | None, used("Number of alternatives to each token.", minimum=0, maximum=MAX_TOP_LOGPROBS)
    ] = None

    add_generation_prompt: Annotated[Any, accepted("the answer is the assistant's next turn", True)] = None
    continue_final_message: Annotated[Any, accepted("the answer is the assistant's next turn", False)] = None
    add_special_tokens: Annotated[Any, accepted("the chat template writes them", False)] = None
    chat_template: Annotated[Any, accepted("templates of callers are not run")] = None
    mm_processor_kwargs: Annotated[Any, ignored("the model reads text only", {})] = None
    media_io_kwargs: Annotated[Any, ignored("the model reads text only", {})] = None
    echo: Annotated[Any, accepted("the conversation is not repeated", False)] = None
    input_ids: Annotated[Any, accepted("send tokens to /v1/completions")] = None
    functions: Annotated[Any, accepted("send tools", [])] = None
    function_call: Annotated[Any, accepted("send tool_choice", "none", "auto")] = None
    modalities: Annotated[Any, accepted("the model writes text only", ["text"])] = None
    audio: Annotated[Any, accepted("the model writes text only")] = None
    web_search_options: Annotated[Any, accepted("the server reaches no network")] = None
    prediction: Annotated[Any, ignored("a hint that makes some servers quicker")] = None
    verbosity: Annotated[Any, ignored("say so in the prompt")] = None
    include_reasoning: Annotated[Any, ignored("the model's --reasoning-parser decides", True)] = None
    separate_reasoning: Annotated[Any, ignored("the model's --reasoning-parser decides", True)] = None
    stream_reasoning: Annotated[Any, ignored("the model's --reasoning-parser decides", True)] = None
    thinking_token_budget: Annotated[Any, ignored("reasoning has no limit of its own")] = None

    def variables(self) -> Mapping[str, Any]:
        """The variables of the chat template that the caller gave."""
        given = {"reasoning_effort": self.reasoning_effort, "documents": self.documents or None}
        return {name: value for name, value in given.items() if value is not None} | (self.chat_template_kwargs or {})
