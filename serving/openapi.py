"""The HTTP surface as an OpenAPI document."""

from typing import Any

from serving.bounds import MAX_CHOICES, MAX_TEMPERATURE, MAX_TOP
from serving.calls import MAX_LEGACY_LOGPROBS
from serving.version import version

_TEXT, _FLAG, _INTEGER, _NUMBER, _OBJECT = (
    {"type": kind} for kind in ("string", "boolean", "integer", "number", "object")
)
_TOKENS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_SAMPLING: dict[str, Any] = {
    "model": _TEXT,
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES},
    "best_of": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES},
    "max_tokens": {"type": "integer", "minimum": 0},
    "min_tokens": {"type": "integer", "minimum": 0},
    "temperature": {"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "seed": _INTEGER,
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
    "stop_token_ids": _TOKENS,
    "ignore_eos": _FLAG,
    "priority": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "prompt_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP},
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "response_format": _OBJECT,
    "regex": _TEXT,
    "choice": {"type": "array", "items": _TEXT, "minItems": 1},
    "structured_outputs": _OBJECT,
    "user": _TEXT,
}
_PROMPT: dict[str, Any] = {"anyOf": [_TEXT, _TOKENS, {"type": "array", "items": {"anyOf": [_TEXT, _TOKENS]}}]}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": _OBJECT}, {"type": "null"}]},
        "name": _TEXT,
        "tool_calls": {"type": "array", "items": _OBJECT},
        "tool_call_id": _TEXT,
    },
    "required": ["role"],
    "additionalProperties": False,
}
_MESSAGES = {"type": "array", "items": _MESSAGE, "minItems": 1}
_TOOLS = {"type": "array", "items": _OBJECT}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_REFUSALS = {
    "400": "the request cannot be served as it is; `param` names the field",
    "401": "no key, or one that is not known",
    "403": "the key, or the server, does not permit it",
    "404": "no such model or route",
    "405": "another method",
    "408": "the deadline passed, or the body did not come",
    "413": "the body is too long",
    "415": "the body must be JSON",
    "429": "the queue is full, or too many requests of this key; Retry-After says when",
    "431": "the headers are too long",
    "500": "a defect",
    "503": "no plan can serve with the ranks alive, or the server drains; Retry-After says when",
}


def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    chat = {
        **_SAMPLING,
        "messages": _MESSAGES,
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "logprobs": _FLAG,
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_TOP},
        "tools": _TOOLS,
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]},
        "chat_template_kwargs": _OBJECT,
    }
    plain = {
        **_SAMPLING,
        "prompt": _PROMPT,
        "echo": _FLAG,
        "logprobs": {"type": "integer", "minimum": 0, "maximum": MAX_LEGACY_LOGPROBS},
    }
    conversation = {"model": _TEXT, "messages": _MESSAGES, "tools": _TOOLS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "moejax", "version": version()},
        "paths": {
            "/v1/completions": {"post": _posted("Complete prompts", plain, ["prompt"], streams=True)},
            "/v1/chat/completions": {"post": _posted("Answer a conversation", chat, ["messages"], streams=True)},
            "/v1/resume": {"get": _got("Go on after the event that the header Last-Event-ID names", streams=True)},
            "/tokenize": {"post": _posted("Text to tokens", {**conversation, "prompt": _TEXT}, [])},
            "/detokenize": {"post": _posted("Tokens to text", {"model": _TEXT, "tokens": _TOKENS}, ["tokens"])},
            "/v1/models": {"get": _got("The model being served")},
            "/v1/models/{name}": {"get": _got("The model of that name", name=_TEXT)},
            "/version": {"get": _got("The version of the server")},
            "/health": {"get": _got("Readiness: 503 while no request can be served")},
            "/live": {"get": _got("Liveness: a server that recovers is alive")},
            "/metrics": {"get": _got("Prometheus metrics", media="text/plain")},
            "/fault_tolerance/status": {"get": _got("The whole server now")},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _posted(summary: str, properties: dict[str, Any], required: list[str], *, streams: bool = False) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "requestBody": body, "responses": _responses("application/json", streams)}


def _got(summary: str, *, media: str = "application/json", streams: bool = False, **path: Any) -> dict[str, Any]:
    parameters = [{"name": name, "in": "path", "required": True, "schema": schema} for name, schema in path.items()]
    return {"summary": summary, "parameters": parameters, "responses": _responses(media, streams)}


def _responses(media: str, streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {media: {"schema": _TEXT if media == "text/plain" else _OBJECT}}
    if streams:
        content["text/event-stream"] = {"schema": _TEXT}
    error = {"application/json": {"schema": _ERROR}}
    return {
        "200": {"description": "done", "content": content},
        **{status: {"description": text, "content": error} for status, text in _REFUSALS.items()},
    }
