"""Range checks on what a caller asks for. Every error names the field, as the API of the caller does."""

import dataclasses
import re
from collections.abc import Sequence

from serving.errors import InvalidRequest
from serving.protocol.request import Request
from serving.protocol.sampling import SamplingParams

ROLES = ("system", "user", "assistant", "tool")
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_ID_LENGTH = 128
MAX_TEMPERATURE = 100.0
MAX_TOP_LOGPROBS = 20
"""Most alternatives sent beside a token; the programs of a rank are compiled for this number."""
MAX_BIASED = 1024
"""Most tokens in a logit_bias; OpenAI allows 300."""


class FieldNames(dict[str, str]):
    """The names that an API has for fields, by their names here. A field that is not in it has the same name."""

    def __missing__(self, field: str) -> str:
        return field

    def path(self, path: str | None) -> str | None:
        """The path of a field, such as `messages[0].content`, in the names of the API: as a whole if it has a name
        there, else by its first part."""
        if path is None or path in self:
            return path and self[path]
        first = re.split(r"[.\[]", path, maxsplit=1)[0]
        return self[first] + path[len(first) :]


SAME_NAMES = FieldNames()


def check_sampling(params: SamplingParams, vocab_size: int, names: FieldNames = SAME_NAMES) -> None:
    """Raises InvalidRequest for the first field that is out of its range. Its text has the `names` of the caller's API,
    its `param` the name here."""
    _check_given("temperature", params.temperature, 0.0, MAX_TEMPERATURE)
    _check_given("top_p", params.top_p, 0.0, 1.0)
    if params.top_p is not None and params.top_p <= 0:
        raise InvalidRequest(
            f"top_p is {params.top_p:g}, which leaves no token. Use temperature 0 for greedy.", param="top_p"
        )
    _check_given("min_p", params.min_p, 0.0, 1.0)
    _check_given("top_k", params.top_k, -1, 2**31 - 1, names=names, note=" (0 and -1: all tokens)")
    _check_range("n", params.n, 1, MAX_CHOICES)
    _check_range("priority", params.priority, -(2**31), 2**31 - 1)
    if params.max_tokens is not None:
        least = 0 if params.prompt_logprobs is not None else 1
        _check_range("max_tokens", params.max_tokens, least, 2**31 - 1, names=names)
    _check_logits_params(params, vocab_size, names)
    if params.seed is not None:
        _check_range("seed", params.seed, -(2**63), 2**63 - 1)
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest(
            f"{names['stop']} has {len(params.stop)} texts; at most {MAX_STOPS} are allowed.", param="stop"
        )
    for stop in params.stop:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"a text of {names['stop']} has {len(stop)} characters; it must have 1 to {MAX_STOP_LENGTH}.",
                param="stop",
            )
    if len(params.stop_tokens) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"{len(params.stop_tokens)} stop tokens; at most {MAX_STOP_TOKENS} are allowed.",
            param="stop_token_ids",
        )
    check_tokens(params.stop_tokens, vocab_size, "stop_token_ids")


def _check_logits_params(params: SamplingParams, vocab_size: int, names: FieldNames) -> None:
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_given("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _check_range("top_logprobs", params.top_logprobs, 0, MAX_TOP_LOGPROBS, names=names)
    if params.prompt_logprobs is not None:
        _check_range("prompt_logprobs", params.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
    _check_range("min_tokens", params.min_tokens, 0, 2**31 - 1)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens} and {names['max_tokens']} {params.max_tokens}. Lower one or raise the "
            "other.",
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
    if params.structured_outputs is not None and params.ignore_eos:
        raise InvalidRequest(
            "ignore_eos takes away the stop token that ends a constrained answer. Leave one of them out.",
            param="ignore_eos",
        )
    if params.structured_outputs is not None and params.min_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, but the constraint decides where the answer can end. "
            "Leave one of them out.",
            param="min_tokens",
        )


def check_resumed(request: Request, vocab_size: int) -> Request:
    """A request of a journal, which another version or another model's files may have accepted, as this server runs it.
    Raises InvalidRequest when it names tokens outside of the vocabulary."""
    check_tokens(request.prompt, vocab_size, "prompt")
    check_tokens([token for token, _ in request.sampling.logit_bias], vocab_size, "logit_bias")
    return dataclasses.replace(request, sampling=request.sampling.computable(vocab_size))


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


def _check_given(
    field: str, value: float | None, low: float, high: float, *, names: FieldNames = SAME_NAMES, note: str = ""
) -> None:
    if value is not None:
        _check_range(field, value, low, high, names=names, note=note)


def _check_range(
    field: str, value: float, low: float, high: float, *, names: FieldNames = SAME_NAMES, note: str = ""
) -> None:
    if not low <= value <= high:  # not-a-number is in no range
        raise InvalidRequest(
            f"{names[field]} is {value}; it must be between {low} and {high}{note}.",
            param=field,
        )
