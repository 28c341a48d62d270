"""The bodies of /tokenize and /detokenize."""

from typing import Annotated, Any

import msgspec

from serving.api.http.bodies.chat import Tool
from serving.api.http.bodies.messages import RequestMessage
from serving.api.http.bodies.rules import accepted, used


class TokenizeBody(msgspec.Struct, kw_only=True):
    """A request of /tokenize: a prompt or a conversation."""

    model: Annotated[str | None, used("Name of the model; without it, the one that is served.")] = None
    prompt: Annotated[str | None, used("The text.")] = None
    messages: Annotated[list[RequestMessage] | None, used("A conversation, instead of a text.", minItems=1)] = None
    tools: Annotated[list[Tool] | None, used("Functions that the model may call.")] = None
    tool_choice: Annotated[str | dict[str, Any] | None, used("As in /v1/chat/completions.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, used("Variables of the chat template.")] = None
    add_special_tokens: Annotated[
        bool | None, used("With false, a text gets no BOS; a conversation has the one of its template.")
    ] = None
    return_token_strs: Annotated[bool | None, used("Send the names of the tokens too.")] = None

    add_generation_prompt: Annotated[Any, accepted("the tokens are those of a completion", True)] = None
    continue_final_message: Annotated[Any, accepted("the tokens are those of a completion", False)] = None
    chat_template: Annotated[Any, accepted("templates of callers are not run")] = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """A request of /detokenize."""

    tokens: Annotated[list[int], used("Token ids.")]
    model: Annotated[str | None, used("Name of the model; without it, the one that is served.")] = None
