"""The HTTP surface as an OpenAPI document, made from the models of its bodies and responses."""

import types
import typing
from typing import Any

import msgspec

from serving.api.http import anthropic_objects, openai_objects, responses_objects
from serving.api.http.anthropic_objects import MessageEvent
from serving.api.http.bodies.anthropic import CountTokensBody, MessagesBody
from serving.api.http.bodies.chat import ChatBody
from serving.api.http.bodies.completion import CompletionBody
from serving.api.http.bodies.responses import ResponsesBody
from serving.api.http.bodies.tokenize import DetokenizeBody, TokenizeBody
from serving.version import version

_TEXT, _OBJECT = {"type": "string"}, {"type": "object"}
_MODELS = (
    CompletionBody,
    ChatBody,
    TokenizeBody,
    DetokenizeBody,
    MessagesBody,
    CountTokensBody,
    ResponsesBody,
    openai_objects.TextCompletion,
    openai_objects.ChatCompletion,
    openai_objects.ChatCompletionChunk,
    openai_objects.ModelList,
    openai_objects.Model,
    openai_objects.Tokens,
    openai_objects.TokenText,
    openai_objects.ErrorBody,
    anthropic_objects.AnthropicMessage,
    anthropic_objects.TokenCount,
    anthropic_objects.AnthropicError,
    *typing.get_args(MessageEvent),
    responses_objects.ResponseObject,
    responses_objects.DeletedResponse,
    *responses_objects.EVENTS,
)
_ERROR_RESPONSES = {
    "400": "the request is not valid; `param` names the field",
    "401": "no API key, or an unknown one",
    "403": "the API key or the settings of the server do not permit it",
    "404": "no such model or route",
    "405": "the path does not support this method",
    "408": "the deadline passed, or the body did not arrive in time",
    "413": "the body is too long",
    "415": "the body must be JSON, as it is or packed with gzip or deflate",
    "429": "the queue is full, or this key has too many requests; Retry-After says when to retry",
    "431": "the headers are too long",
    "500": "a defect of the server",
    "503": "no plan can serve with the ranks that are alive, or the server is draining; Retry-After says when to retry",
}
_EVENT_IDS = {
    "name": "X-Moejax-Event-Ids",
    "in": "header",
    "description": "`true` gives the events of a stream ids, from which `/v1/resume` goes on.",
    "schema": {"type": "string", "enum": ["true", "false"]},
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The id of the last event that came, or the id of the call for all of them.",
    "schema": _TEXT,
}
_ID = {"name": "id", "in": "path", "required": True, "description": "The `id` of the response.", "schema": _TEXT}
_STREAM = {
    "name": "stream",
    "in": "query",
    "description": "`true` for the events of the response instead of the response.",
    "schema": {"type": "boolean"},
}
_BY = {
    "name": "by",
    "in": "query",
    "description": "The time of each figure; `second` if it is left out.",
    "schema": {"type": "string", "enum": ["second", "minute"]},
}
_STARTING_AFTER = {
    "name": "starting_after",
    "in": "query",
    "description": "The sequence number of the last event that came.",
    "schema": {"type": "integer"},
}
_RESPONSE_EVENTS = tuple(event.__name__ for event in responses_objects.EVENTS)
_NAME = {"name": "name", "in": "path", "required": True, "description": "A name of the model.", "schema": _TEXT}


def openapi_document(root_path: str = "") -> dict[str, Any]:
    """The document, in OpenAPI 3.1."""
    _, components = msgspec.json.schema_components(_MODELS, ref_template="#/components/schemas/{name}")
    document = {
        "openapi": "3.1.0",
        "info": {"title": "moejax", "version": version(), "license": {"name": "Apache-2.0"}},
        "paths": _paths(),
        "components": {
            "schemas": _with_items(components),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
    return document | ({"servers": [{"url": root_path}]} if root_path else {})


def _paths() -> dict[str, Any]:
    return {
        "/v1/completions": {
            "post": _post(
                "createCompletion", "Complete prompts", CompletionBody, "TextCompletion", event="TextCompletion"
            )
        },
        "/v1/chat/completions": {
            "post": _post(
                "createChatCompletion", "Answer a conversation", ChatBody, "ChatCompletion", event="ChatCompletionChunk"
            )
        },
        "/v1/responses": {
            "post": _post(
                "createResponse",
                "Answer an input, in OpenAI's Responses API",
                ResponsesBody,
                "ResponseObject",
                event=_RESPONSE_EVENTS,
                ids=False,
            )
        },
        "/v1/responses/{id}": {
            "get": _get(
                "getResponse",
                "A response, or its events after one of them",
                "ResponseObject",
                parameters=[_ID, _STREAM, _STARTING_AFTER],
                event=_RESPONSE_EVENTS,
            ),
            "delete": _get("deleteResponse", "Cancel and forget a response", "DeletedResponse", parameters=[_ID]),
        },
        "/v1/responses/{id}/cancel": {
            "post": _get("cancelResponse", "Cancel a response", "ResponseObject", parameters=[_ID])
        },
        "/v1/messages": {
            "post": _post(
                "createMessage",
                "Answer a conversation, in Anthropic's API",
                MessagesBody,
                "AnthropicMessage",
                event=_names(MessageEvent),
                error="AnthropicError",
            )
        },
        "/v1/messages/count_tokens": {
            "post": _post(
                "countTokens", "The tokens of a conversation", CountTokensBody, "TokenCount", error="AnthropicError"
            )
        },
        "/v1/resume": {
            "get": _get(
                "resumeStream",
                "Resume a stream after an event",
                parameters=[_LAST_EVENT_ID],
                event="ChatCompletionChunk",
            )
        },
        "/tokenize": {"post": _post("tokenize", "Text to tokens", TokenizeBody, "Tokens")},
        "/detokenize": {"post": _post("detokenize", "Tokens to text", DetokenizeBody, "TokenText")},
        "/tokenizer_info": {"get": _get("getTokenizerInfo", "The model's tokenizer_config.json and chat template")},
        "/v1/models": {"get": _get("listModels", "The names of the model that is served", "ModelList")},
        "/v1/models/{name}": {"get": _get("getModel", "The model of that name", "Model", parameters=[_NAME])},
        "/version": {"get": _get("getVersion", "The version of the server")},
        "/health": {"get": _get("getHealth", "Readiness: 503 while no request can be served")},
        "/live": {"get": _get("getLiveness", "Liveness: a server in recovery is alive")},
        "/metrics": {"get": _get("getMetrics", "Prometheus metrics", media="text/plain")},
        "/fault_tolerance/status": {"get": _get("getStatus", "The status of the server")},
        "/fault_tolerance/history": {
            "get": _get(
                "getHistory",
                "Figures of each second of the last ten minutes, or of each minute of the last day",
                parameters=[_BY],
            )
        },
    }


def _with_items(schema: Any) -> Any:
    """The schema with `items` in each array. Without it, items may be anything, and generators of clients stop."""
    if isinstance(schema, list):
        return [_with_items(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _with_items(value) for name, value in schema.items()}
    anything = made.get("type") == "array" and "items" not in made and "prefixItems" not in made
    return made | ({"items": {}} if anything else {})


def _names(union: types.UnionType) -> tuple[str, ...]:
    return tuple(each.__name__ for each in typing.get_args(union))


def _post(
    operation: str,
    summary: str,
    body: type[msgspec.Struct],
    answer: str,
    *,
    event: str | tuple[str, ...] = "",
    error: str = "ErrorBody",
    ids: bool = True,
) -> dict[str, Any]:
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [_EVENT_IDS] if event and ids else [],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body.__name__)}}},
        "responses": _responses("application/json", _ref(answer), event, error),
    }


def _get(
    operation: str,
    summary: str,
    answer: str = "",
    *,
    media: str = "application/json",
    parameters: "list[Any] | None" = None,
    event: str | tuple[str, ...] = "",
) -> dict[str, Any]:
    schema = _ref(answer) if answer else _TEXT if media == "text/plain" else _OBJECT
    responses = _responses(media, schema, event)
    return {"operationId": operation, "summary": summary, "parameters": parameters or [], "responses": responses}


def _responses(media: str, schema: Any, event: str | tuple[str, ...], error: str = "ErrorBody") -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": schema}}
    if event:
        one = _ref(event) if isinstance(event, str) else {"oneOf": list(map(_ref, event))}
        last = "; then `[DONE]`" if isinstance(event, str) else ""
        content["text/event-stream"] = {"schema": one | {"description": f"One in each event{last}."}}
    ignored = {"description": "Paths of the fields that were ignored.", "schema": _TEXT}
    failed = {"application/json": {"schema": _ref(error)}}
    return {
        "200": {"description": "done", "content": content, "headers": {"X-Moejax-Ignored-Fields": ignored}},
        **{status: {"description": text, "content": failed} for status, text in _ERROR_RESPONSES.items()},
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
