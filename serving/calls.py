"""OpenAI's JSON bodies of completions and chat completions, checked.

Every field of the OpenAI API is in one of four places: read by `read`, in `IGNORED` (labels that change
nothing), in `NEUTRAL` (not built; accepted only with a value that asks for nothing), or unknown and refused.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from serving.errors import InvalidRequest, UnknownRequest
from serving.generation import Prompt
from serving.request import SamplingParams
from serving.tokens import Message

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
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos",
)  # fmt: skip
_COMMON = frozenset(("model", "stream", "stream_options", "logprobs", *_SAMPLING))
_ROLES = {"developer": "system"}  # OpenAI's newer name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One request of /v1/completions or, with `chat`, of /v1/chat/completions."""

    chat: bool
    prompt: Prompt
    params: SamplingParams
    stream: bool
    include_usage: bool
    logprobs: bool


def read(body: Any, *, chat: bool, model: str) -> Call:
    """Check a decoded JSON body. Raises InvalidRequest naming the field, UnknownRequest for another model."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body is {_kind(body)}; it must be a JSON object.")
    known = _COMMON | ({"messages", "max_completion_tokens"} if chat else {"prompt"})
    fields = _Fields({k: v for k, v in body.items() if v is not None})
    fields.refuse_unknown(known)
    asked = fields.text("model", model)
    if asked != model:
        raise UnknownRequest(f"the model {asked!r} does not exist; this server has {model!r}.", param="model")
    stream = fields.flag("stream")
    return Call(
        chat=chat,
        prompt=_messages(fields) if chat else _prompt(fields),
        params=_params(fields),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        logprobs=fields.flag("logprobs") if chat else _legacy_logprobs(fields),
    )


def _params(fields: "_Fields") -> SamplingParams:
    default = SamplingParams()
    limit = fields.integer("max_completion_tokens", fields.integer("max_tokens", None))
    top_k = fields.integer("top_k", default.top_k)
    return SamplingParams(
        temperature=fields.number("temperature", default.temperature),
        top_k=0 if top_k == -1 else top_k,  # vLLM's way to say off
        top_p=fields.number("top_p", default.top_p),
        min_p=fields.number("min_p", default.min_p),
        seed=fields.integer("seed", None),
        max_tokens=limit,
        stop=fields.texts("stop"),
        stop_tokens=fields.integers("stop_token_ids"),
        ignore_eos=fields.flag("ignore_eos"),
    )


def _prompt(fields: "_Fields") -> Prompt:
    value = fields.values.get("prompt")
    if value is None:
        raise InvalidRequest("prompt is missing. Send text or a list of token ids.", param="prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(t) is int for t in value):
        return tuple(value)
    if isinstance(value, list) and any(isinstance(t, str | list) for t in value):
        raise InvalidRequest(
            f"prompt is a list of {len(value)}; this server takes one prompt per request. Send one request for each.",
            param="prompt",
        )
    raise InvalidRequest(f"prompt is a {_kind(value)}; it must be text or a list of token ids.", param="prompt")


def _messages(fields: "_Fields") -> Prompt:
    value = fields.values.get("messages")
    if not isinstance(value, list):
        raise InvalidRequest(f"messages is {_kind(value)}; it must be a list.", param="messages")
    return tuple(_message(m, f"messages[{i}]") for i, m in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is {_kind(value)}; it must be an object.", param=where)
    for key in value:
        if key not in ("role", "content", "name") and value[key] is not None:
            raise InvalidRequest(f"{where}.{key} is not supported by this server.", param=f"{where}.{key}")
    role = value.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"{where}.role is {_kind(role)}; it must be text.", param=f"{where}.role")
    return Message(_ROLES.get(role, role), _content(value.get("content"), f"{where}.content"))


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} is {_kind(value)}; it must be text or a list.", param=where)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f'{where} has a part other than {{"type": "text", "text": ...}}; this model reads text only.',
                param=where,
            )
    return "".join(part["text"] for part in value)


def _include_usage(fields: "_Fields", stream: bool) -> bool:
    options = fields.values.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise InvalidRequest('stream_options must be {"include_usage": true or false}.', param="stream_options")
    if options and not stream:
        raise InvalidRequest("stream_options is only for stream: true.", param="stream_options")
    return _Fields(options).flag("include_usage")


def _legacy_logprobs(fields: "_Fields") -> bool:
    """In /v1/completions a number of alternatives: 0 asks for the chosen tokens' own, all there is."""
    count = fields.integer("logprobs", None)
    if count not in (None, 0):
        raise InvalidRequest(
            f"logprobs is {count}; this server has those of the chosen tokens only. Send 0.", param="logprobs"
        )
    return count == 0


class _Fields:
    """A JSON object's fields with the type that is wanted, or InvalidRequest."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def refuse_unknown(self, known: frozenset[str]) -> None:
        for name, value in self.values.items():
            if name in known or name in IGNORED:
                continue
            if name not in NEUTRAL:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise InvalidRequest(f"unknown field {name!r}.{hint}", param=name)
            if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in NEUTRAL[name]):
                raise InvalidRequest(f"{name} is not supported by this server. Leave it out.", param=name)

    def text(self, name: str, default: str) -> str:
        return self._typed(name, default, str, "text")

    def flag(self, name: str) -> bool:
        return self._typed(name, False, bool, "true or false")

    def integer(self, name: str, default: Any) -> Any:
        return self._typed(name, default, int, "an integer")

    def number(self, name: str, default: float) -> float:
        value = self._typed(name, default, (int, float), "a number")
        try:
            return float(value)
        except OverflowError:
            raise InvalidRequest(f"{name} has {len(str(value))} digits, which is too large.", param=name) from None

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name, [])
        return self._list(name, [value] if isinstance(value, str) else value, str, "text or a list of texts")

    def integers(self, name: str) -> tuple[int, ...]:
        return self._list(name, self.values.get(name, []), int, "a list of integers")

    def _typed(self, name: str, default: Any, kind: Any, wanted: str) -> Any:
        value = self.values.get(name, default)
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise InvalidRequest(f"{name} is {_kind(value)}; it must be {wanted}.", param=name)
        return value

    def _list(self, name: str, value: Any, kind: type, wanted: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise InvalidRequest(f"{name} is {_kind(value)}; it must be {wanted}.", param=name)
        return tuple(value)


def _kind(value: Any) -> str:
    """A value's JSON type, and the value when it is short enough to help."""
    if value is None:
        return "missing"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    text = repr(value)
    return names[type(value)] + (f" ({text})" if len(text) <= 40 else "")
