"""The ranges of what a caller may ask for. Every refusal names the field."""

import math
from collections.abc import Sequence

from serving.errors import InvalidRequest
from serving.request import SamplingParams

ROLES = ("system", "user", "assistant", "tool")
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_ID_LENGTH = 128
MAX_TEMPERATURE = 100.0
MAX_TOP = 20
"""Alternatives told beside a token; what a rank's programs are made for."""
MAX_BIASED = 1024
"""Tokens of a logit_bias; OpenAI allows 300."""


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises InvalidRequest naming the first field that is out of its range."""
    _within("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _within("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0:
        raise InvalidRequest("top_p is 0, which leaves no token. Use temperature 0 for greedy.", param="top_p")
    _within("min_p", params.min_p, 0.0, 1.0)
    _within("top_k", params.top_k, 0, 2**31 - 1)
    _within("n", params.n, 1, MAX_CHOICES)
    _within("priority", params.priority, -(2**31), 2**31 - 1)
    if params.max_tokens is not None:
        _within("max_tokens", params.max_tokens, 0 if params.prompt_logprobs is not None else 1, 2**31 - 1)
    _check_shaping(params, vocab_size)
    if params.seed is not None:
        _within("seed", params.seed, -(2**63), 2**63 - 1)
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest(f"{len(params.stop)} stop strings; at most {MAX_STOPS} are allowed.", param="stop")
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_LENGTH}.",
                param="stop",
            )
    if len(params.stop_tokens) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"{len(params.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} are allowed.",
            param="stop_token_ids",
        )
    check_tokens(params.stop_tokens, vocab_size, "stop_token_ids")


def _check_shaping(params: SamplingParams, vocab_size: int) -> None:
    _within("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _within("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _within("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _within("top_logprobs", params.top_logprobs, 0, MAX_TOP)
    if params.prompt_logprobs is not None:
        _within("prompt_logprobs", params.prompt_logprobs, 0, MAX_TOP)
    _within("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens} and max_tokens {params.max_tokens}. Lower one or raise the other.",
            param="min_tokens",
        )
    if len(params.logit_bias) > MAX_BIASED:
        raise InvalidRequest(
            f"logit_bias has {len(params.logit_bias)} tokens; at most {MAX_BIASED} are allowed.", param="logit_bias"
        )
    check_tokens([token for token, _ in params.logit_bias], vocab_size, "logit_bias")
    for token, bias in params.logit_bias:
        if not -100 <= bias <= 100:
            raise InvalidRequest(f"the bias of token {token} is {bias}; give -100 to 100.", param="logit_bias")
    if params.guide is not None and params.ignore_eos:
        raise InvalidRequest(
            "ignore_eos takes away the stop token that ends a constrained answer. Leave one of them out.",
            param="ignore_eos",
        )


def check_tokens(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest when a token is not in the vocabulary."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"token {position} is {token}; this model's vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}.",
                param=param,
            )


def check_roles(roles: Sequence[str]) -> None:
    """Raises InvalidRequest on a role no chat template knows."""
    for position, role in enumerate(roles):
        if role not in ROLES:
            raise InvalidRequest(
                f"message {position} has role {role!r}; known roles are {', '.join(ROLES)}.", param="messages"
            )


def check_id(request_id: str) -> None:
    """Raises InvalidRequest on an id that does not fit in a header or a log line."""
    if len(request_id) > MAX_ID_LENGTH or not request_id.isascii() or not (request_id + " ").isprintable():
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; it must be at most {MAX_ID_LENGTH} printable ASCII ones.",
            param="request_id",
        )


def _within(name: str, value: float, low: float, high: float) -> None:
    if math.isnan(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be between {low} and {high}.", param=name)
