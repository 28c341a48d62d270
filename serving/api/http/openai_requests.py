"""Requests of OpenAI's completions and chat completions, made of their bodies.

The fields of a body, and what happens to each, stand in `serving/api/http/bodies/`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from serving.api.http.bodies.chat import ChatBody, Tool
from serving.api.http.bodies.completion import CompletionBody
from serving.api.http.bodies.constraints import read_constraint
from serving.api.http.bodies.decoding import decode_body
from serving.api.http.bodies.messages import RequestMessage, template_message
from serving.api.http.bodies.rules import field_rules
from serving.api.http.bodies.sampling import GenerationFields
from serving.api.http.bodies.tokenize import DetokenizeBody, TokenizeBody
from serving.api.http.body import required
from serving.core.prompts import BareText, Conversation, Prompt
from serving.errors import InvalidRequest, UnknownRequest
from serving.protocol.sampling import SamplingParams, StructuredOutputs
from serving.text.json_fields import describe_value
from serving.text.tool_calls import read_tool_choice, read_tools
from serving.text.validation import MAX_TOP_LOGPROBS, SAME_NAMES, FieldNames

CHAT_NAMES = FieldNames(prompt="messages")
"""Names of chat completions, where the prompt is a conversation."""
_AS_MANY_AS_FIT = -1
"""The limit of tokens by which programs made for llama.cpp say that there is none."""
_COMPLETION_TOKENS = FieldNames(CHAT_NAMES, max_tokens="max_completion_tokens")
"""The same for a caller who sends the newer name of the field."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request of /v1/completions or, with `chat`, of /v1/chat/completions.

    `logprobs` is the number of alternatives returned with each token, None for no log-probabilities at all. `echo` puts
    the prompt before the output. `usage_so_far` puts the usage
    into every event, `event_ids` gives the events ids. `ignored` are the paths of fields that were ignored. `names` are
    those of the fields that its checks name otherwise.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    logprobs: int | None
    names: FieldNames
    echo: bool = False
    usage_so_far: bool = False
    event_ids: bool = False
    ignored: tuple[str, ...] = ()


def parse_completion(body: Any, *, chat: bool, models: Sequence[str], strict: bool = False) -> CompletionRequest:
    """The request in a decoded JSON body. `models` are the names of the model; `strict` refuses unknown fields.

    Raises InvalidRequest naming the field at fault, and UnknownRequest when the body names another model.
    """
    if chat:
        return _chat(*decode_body(body, ChatBody, strict=strict), body, models)
    return _completion(*decode_body(body, CompletionBody, strict=strict), models)


def parse_tokenize(
    body: Any, *, models: Sequence[str], strict: bool = False
) -> tuple[Prompt, TokenizeBody, tuple[str, ...]]:
    """The prompt or the conversation in the body of /tokenize, the body, and the paths of ignored fields. Raises
    InvalidRequest naming the field, and UnknownRequest when the body names another model."""
    read, ignored = decode_body(body, TokenizeBody, strict=strict)
    _check_model(read.model, models)
    if read.messages is None:
        return _text(required(read.prompt, "prompt"), read.add_special_tokens), read, ignored
    return _conversation(read.messages, read.chat_template_kwargs or {}, body)[0], read, ignored


def parse_detokenize(
    body: Any, *, models: Sequence[str], strict: bool = False
) -> tuple[Sequence[int], tuple[str, ...]]:
    """The token ids in the body of /detokenize, and the paths of ignored fields. Raises InvalidRequest naming the
    field, and UnknownRequest when the body names another model."""
    read, ignored = decode_body(body, DetokenizeBody, strict=strict)
    _check_model(read.model, models)
    return read.tokens, ignored


def _completion(body: CompletionBody, ignored: tuple[str, ...], models: Sequence[str]) -> CompletionRequest:
    _check_model(body.model, models)
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"logprobs is {body.logprobs}; it must be between 0 and {MAX_TOP_LOGPROBS}.", param="logprobs"
        )
    params = _params(body, body.max_tokens, body.logprobs, read_constraint(body), echo=bool(body.echo))
    return CompletionRequest(
        chat=False,
        prompts=_prompts(body.prompt, body.add_special_tokens),
        params=params,
        logprobs=body.logprobs,
        echo=bool(body.echo),
        ignored=ignored,
        names=SAME_NAMES,
        **_delivery(body),
    )


def _chat(body: ChatBody, ignored: tuple[str, ...], raw: Mapping[str, Any], models: Sequence[str]) -> CompletionRequest:
    _check_model(body.model, models)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs is only for logprobs: true.", param="top_logprobs")
    logprobs = body.top_logprobs or 0 if body.logprobs else None
    constraint = read_constraint(body)
    parallel = body.parallel_tool_calls is not False
    conversation, required_call = _conversation(body.messages, body.variables(), raw, parallel=parallel)
    if constraint is not None and required_call is not None:
        raise InvalidRequest(
            "tool_choice and another output constraint exclude each other. Send one of them.", param="tool_choice"
        )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return CompletionRequest(
        chat=True,
        prompts=(conversation,),
        params=_params(body, limit, logprobs, constraint or required_call),
        logprobs=logprobs,
        ignored=ignored,
        names=CHAT_NAMES if body.max_completion_tokens is None else _COMPLETION_TOKENS,
        **_delivery(body),
    )


def _check_model(requested: str | None, models: Sequence[str]) -> None:
    if requested is not None and requested not in models:
        raise UnknownRequest(
            f"The model {requested!r} does not exist; this server has {' and '.join(map(repr, models))}.", param="model"
        )


def _delivery(body: GenerationFields) -> dict[str, bool]:
    stream, options = bool(body.stream), body.stream_options
    if stream and body.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs are not streamed. Leave out stream or prompt_logprobs.", param="prompt_logprobs"
        )
    usage = options is not None and bool(options.include_usage)
    return {
        "stream": stream,
        "include_usage": usage,
        "usage_so_far": usage and options is not None and bool(options.continuous_usage_stats),
        "event_ids": bool(body.event_ids),
    }


def _params(
    body: GenerationFields,
    limit: int | None,
    logprobs: int | None,
    constraint: StructuredOutputs | None,
    *,
    echo: bool = False,
) -> SamplingParams:
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, n):
        raise InvalidRequest(
            f"best_of is {body.best_of} and n is {n}; this server returns every output that it samples. "
            "Leave out best_of, request n outputs and choose by their logprobs.",
            param="best_of",
        )
    scores = body.prompt_logprobs
    if echo and scores is None and (logprobs is not None or limit == 0):
        scores = logprobs or 0
    given = {
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "repetition_penalty": body.repetition_penalty,
        "ignore_eos": body.ignore_eos,
        "min_tokens": body.min_tokens,
        "priority": body.priority,
        "speculate": body.speculate,
    }
    return SamplingParams(
        n=n,
        seed=body.seed,
        max_tokens=None if limit == _AS_MANY_AS_FIT else limit,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_tokens=tuple(body.stop_token_ids or ()),
        logit_bias=tuple((body.logit_bias or {}).items()),
        top_logprobs=logprobs or 0,
        prompt_logprobs=scores,
        structured_outputs=constraint,
        **{name: value for name, value in given.items() if value is not None},
    )


def _text(value: str, add_special_tokens: bool | None) -> str:
    return BareText(value) if add_special_tokens is False else value


def _prompts(value: str | Sequence[Any], add_special_tokens: bool | None) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_text(value, add_special_tokens),)
    if not value or all(type(each) is int for each in value):
        return (tuple(value),)
    for position, each in enumerate(value):
        if type(each) is int:
            raise InvalidRequest(
                f"prompt[{position}] is {describe_value(each)} among texts or lists; prompt must be text or a list of "
                "token ids, or a list of either.",
                param=f"prompt[{position}]",
            )
    return tuple(_text(each, add_special_tokens) if isinstance(each, str) else tuple(each) for each in value)


def _conversation(
    messages: Sequence[RequestMessage], variables: Mapping[str, Any], raw: Mapping[str, Any], *, parallel: bool = True
) -> tuple[Conversation, StructuredOutputs | None]:
    turns = tuple(template_message(message, f"messages[{position}]") for position, message in enumerate(messages))
    given = [_template_tool(tool) for tool in raw.get("tools") or ()]
    tools, required_call = read_tool_choice(raw.get("tool_choice"), read_tools(given))
    conversation = Conversation(messages=turns, tools=tuple(tools), variables=variables, parallel_tool_calls=parallel)
    return conversation, required_call


def _template_tool(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as a chat template takes it: as the caller wrote it, with its type, without nulls and without what is
    ignored."""
    rules = field_rules(Tool)
    kept = {
        name: value
        for name, value in raw.items()
        if value is not None and (name not in rules or rules[name].treatment == "used")
    }
    function = {name: value for name, value in raw["function"].items() if value is not None}
    return {"type": "function"} | kept | {"function": function}
