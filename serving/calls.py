"""OpenAI's JSON bodies of completions and chat completions, checked.

Every field of the OpenAI API is in one of four places: read by `read`, in `IGNORED` (labels that change
nothing), in `NEUTRAL` (not built; accepted only with a value that asks for nothing), or unknown and refused.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from serving.constraints import GUIDES, read_guide
from serving.errors import InvalidRequest, UnknownRequest
from serving.fields import Fields, described
from serving.generation import Conversation, Prompt
from serving.request import Guide, SamplingParams
from serving.tools import read_choice, read_tools

IGNORED = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    )
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
_SAMPLING = (
    "n", "best_of", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
    "seed", "stop", "stop_token_ids", "ignore_eos", "prompt_logprobs", "priority",
)  # fmt: skip
_COMMON = frozenset(("model", "stream", "stream_options", "logprobs", *_SAMPLING, *GUIDES))
_CHAT = frozenset(("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs"))
_COMPLETION = frozenset(("prompt", "echo"))
COMPLETION_FIELDS, CHAT_FIELDS = _COMMON | _COMPLETION, _COMMON | _CHAT
"""What `read` takes in a body of each route."""
_ROLES = {"developer": "system"}  # OpenAI's newer name
MAX_LEGACY_LOGPROBS = 5
"""Of /v1/completions, as OpenAI has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One request of /v1/completions or, with `chat`, of /v1/chat/completions.

    `logprobs` is how many alternatives are shown beside each token, None for no log-probabilities at all. `echo` puts
    the prompt before the answer. `tools` says that calls are looked for in the text.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool = False
    tools: bool = False


def read(body: Any, *, chat: bool, model: str) -> Call:
    """Check a decoded JSON body. Raises InvalidRequest naming the field, UnknownRequest for another model."""
    fields = _object(body)
    fields.refuse_unknown(CHAT_FIELDS if chat else COMPLETION_FIELDS, IGNORED, NEUTRAL)
    asked = fields.text("model", model)
    if asked != model:
        raise UnknownRequest(f"the model {asked!r} does not exist; this server has {model!r}.", param="model")
    stream, echo = fields.flag("stream"), not chat and fields.flag("echo")
    logprobs = _chat_logprobs(fields) if chat else _legacy_logprobs(fields)
    guide, tools, prompts = read_guide(fields), (), ()
    if chat:
        conversation, called = _conversation(fields)
        tools, prompts = conversation.tools, (conversation,)
        if guide is not None and called is not None:
            raise InvalidRequest("tool_choice and another constraint exclude each other.", param="tool_choice")
        guide = guide or called
    else:
        prompts = _prompts(fields)
    params = _params(fields, echo=echo, logprobs=logprobs, guide=guide)
    if stream and "prompt_logprobs" in fields.values:
        raise InvalidRequest("prompt_logprobs are not streamed. Leave out stream, or them.", param="prompt_logprobs")
    return Call(
        chat=chat,
        prompts=prompts,
        params=params,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        logprobs=logprobs,
        echo=echo,
        tools=bool(tools),
    )


def read_text(body: Any) -> Prompt:
    """The prompt or messages of a body that asks for tokens. Raises InvalidRequest naming the field."""
    fields = _object(body)
    fields.refuse_unknown(frozenset(("model", "prompt", "messages", "tools", "tool_choice", "chat_template_kwargs")))
    if "messages" in fields.values:
        return _conversation(fields)[0]
    return fields.text("prompt", "")


def read_tokens(body: Any) -> tuple[int, ...]:
    """The tokens of a body that asks for their text."""
    fields = _object(body)
    fields.refuse_unknown(frozenset(("model", "tokens")))
    return fields.integers("tokens")


def _object(body: Any) -> Fields:
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body is {described(body)}; it must be a JSON object.")
    return Fields({k: v for k, v in body.items() if v is not None})


def _params(fields: Fields, *, echo: bool, logprobs: int | None, guide: Guide | None) -> SamplingParams:
    default = SamplingParams()
    limit = fields.integer("max_completion_tokens", fields.integer("max_tokens", None))
    top_k, n = fields.integer("top_k", default.top_k), fields.integer("n", 1)
    if fields.integer("best_of", n) != n:
        raise InvalidRequest(
            f"best_of is {fields.values['best_of']} and n is {n}; this server shows every answer it draws. "
            "Leave best_of out, ask for n answers and choose by their logprobs.",
            param="best_of",
        )
    scores = fields.integer("prompt_logprobs", None)
    if echo and scores is None and (logprobs is not None or limit == 0):
        scores = logprobs or 0
    return SamplingParams(
        n=n,
        temperature=fields.number("temperature", default.temperature),
        top_k=0 if top_k == -1 else top_k,  # vLLM's way to say off
        top_p=fields.number("top_p", default.top_p),
        min_p=fields.number("min_p", default.min_p),
        seed=fields.integer("seed", None),
        max_tokens=limit,
        stop=fields.texts("stop"),
        stop_tokens=fields.integers("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
        min_tokens=fields.integer("min_tokens", 0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        logit_bias=_logit_bias(fields),
        top_logprobs=logprobs or 0,
        prompt_logprobs=scores,
        guide=guide,
        priority=fields.integer("priority", 0),
    )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    value = fields.mapping("logit_bias")
    if not all(token.isdecimal() and type(bias) in (int, float) for token, bias in value.items()):
        raise InvalidRequest("logit_bias must be {token id: number from -100 to 100}.", param="logit_bias")
    return tuple((int(token[:20]), max(-1e9, min(1e9, bias))) for token, bias in value.items())


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    value = fields.values.get("prompt")
    if value is None:
        raise InvalidRequest("prompt is missing. Send text or a list of token ids.", param="prompt")
    if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
        return tuple(_one_prompt(each) for each in value)
    return (_one_prompt(value),)


def _one_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(t) is int for t in value):
        return tuple(value)
    raise InvalidRequest(
        f"prompt is a {described(value)}; it must be text or a list of token ids, or a list of either.", param="prompt"
    )


def _conversation(fields: Fields) -> tuple[Conversation, Guide | None]:
    value = fields.values.get("messages")
    if not isinstance(value, list):
        raise InvalidRequest(f"messages is {described(value)}; it must be a list.", param="messages")
    messages = tuple(_message(m, f"messages[{i}]") for i, m in enumerate(value))
    tools, guide = read_choice(fields.values.get("tool_choice"), read_tools(fields.values.get("tools", [])))
    variables = fields.mapping("chat_template_kwargs")
    return Conversation(messages=messages, tools=tuple(tools), variables=variables), guide


def _message(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is {described(value)}; it must be an object.", param=where)
    for key in value:
        if key not in ("role", "content", "name", "tool_calls", "tool_call_id") and value[key] is not None:
            raise InvalidRequest(f"{where}.{key} is not supported by this server.", param=f"{where}.{key}")
    role = value.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role is {described(role)}; it must be text.", param=f"{where}.role")
    message: dict[str, Any] = {"role": _ROLES.get(role, role)}
    calls = value.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = [
            _past_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(_list(calls, where))
        ]
    if calls is None or value.get("content") is not None:
        message["content"] = _content(value.get("content"), f"{where}.content")
    else:
        message["content"] = ""
    return message | {k: value[k] for k in ("name", "tool_call_id") if isinstance(value.get(k), str)}


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        where = f"{where}.tool_calls"
        raise InvalidRequest(f"{where} is {described(value)}; it must be a list.", param=where)
    return value


def _past_call(value: Any, where: str) -> Mapping[str, Any]:
    """A call of an earlier turn; templates expect its arguments as values, callers send them as JSON text."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}.', param=where)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{where}.function.arguments is no JSON.", param=where) from None
    return {**value, "type": "function", "function": {**function, "arguments": arguments}}


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} is {described(value)}; it must be text or a list.", param=where)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where} has a part other than {{"type": "text", "text": ...}}; this model reads text only.',
                param=where,
            )
    return "".join(part["text"] for part in value)


def _include_usage(fields: Fields, stream: bool) -> bool:
    options = fields.values.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise InvalidRequest('stream_options must be {"include_usage": true or false}.', param="stream_options")
    if options and not stream:
        raise InvalidRequest("stream_options is only for stream: true.", param="stream_options")
    return Fields(options).flag("include_usage")


def _legacy_logprobs(fields: Fields) -> int | None:
    """In /v1/completions a number of alternatives; 0 asks for the chosen tokens' own."""
    count = fields.integer("logprobs", None)
    if count is not None and not 0 <= count <= MAX_LEGACY_LOGPROBS:
        raise InvalidRequest(f"logprobs is {count}; it must be between 0 and {MAX_LEGACY_LOGPROBS}.", param="logprobs")
    return count


def _chat_logprobs(fields: Fields) -> int | None:
    count = fields.integer("top_logprobs", 0)
    if not fields.flag("logprobs"):
        if count:
            raise InvalidRequest("top_logprobs is only for logprobs: true.", param="top_logprobs")
        return None
    return count
