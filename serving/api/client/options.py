"""Keyword arguments of the clients' methods."""

import difflib
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from serving.errors import InvalidRequest
from serving.protocol.sampling import SamplingParams, StructuredOutputs

_OF_THE_CALL = ("timeout_s", "request_id")
_FORMER_NAMES = {"guide": "structured_outputs", "max_new_tokens": "max_tokens"}
_WHOLE = frozenset(("n", "top_k", "seed", "max_tokens", "min_tokens", "top_logprobs", "prompt_logprobs", "priority"))
"""Options that are whole numbers."""


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments. `stop` may be one string, `logit_bias` a mapping from token
    id to bias, and `structured_outputs` a JSON schema."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    max_tokens: int | None
    stop: str | Sequence[str]
    stop_tokens: Sequence[int]
    ignore_eos: bool
    min_tokens: int
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    top_logprobs: int
    prompt_logprobs: int | None
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None
    priority: int
    speculate: bool | None


class GenerateOptions(SamplingOptions, total=False):
    """Sampling, and two options of the call: after `timeout_s` seconds it ends with DeadlineExceeded; `request_id` is
    the name to cancel it by (the client draws one when it is left out)."""

    timeout_s: float | None
    request_id: str


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """The parameters that keyword arguments stand for. Raises TypeError on an unknown name, and InvalidRequest on a
    number that is none."""
    values = {name: value for name, value in options.items() if name not in _OF_THE_CALL}
    for name in values.keys() - SamplingOptions.__annotations__.keys():
        near = difflib.get_close_matches(_FORMER_NAMES.get(name, name), SamplingOptions.__annotations__, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(f"{name} is no option.{hint} There are {', '.join(GenerateOptions.__annotations__)}.")
    for name in values.keys() & _WHOLE:
        values[name] = _whole(name, values[name])
    if isinstance(values.get("structured_outputs"), Mapping):
        values["structured_outputs"] = StructuredOutputs("json", json.dumps(values["structured_outputs"]))
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    if isinstance(values.get("logit_bias"), Mapping):
        values["logit_bias"] = values["logit_bias"].items()
    for name in ("stop", "stop_tokens", "logit_bias"):
        if name in values:
            values[name] = tuple(values[name])
    return SamplingParams(**values)


def _whole(name: str, value: Any) -> int | None:
    try:
        return None if value is None else operator.index(value)  # NumPy's whole numbers too
    except TypeError:
        raise InvalidRequest(f"{name} is {value!r}; it must be a whole number.", param=name) from None
