"""Keyword arguments of the clients' methods."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from serving.protocol.sampling import SamplingParams, StructuredOutputs


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments. `stop` may be one string, `logit_bias` a mapping from token
    id to bias."""

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
    structured_outputs: StructuredOutputs | None
    priority: int


class GenerateOptions(SamplingOptions, total=False):
    """Sampling, and two options of the call: after `timeout_s` seconds it ends with DeadlineExceeded; `request_id` is
    the name to cancel it by (the client draws one when it is left out)."""

    timeout_s: float | None
    request_id: str


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """The parameters that keyword arguments stand for. Raises TypeError on an unknown name."""
    values = {name: value for name, value in options.items() if name not in ("timeout_s", "request_id")}
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    if isinstance(values.get("logit_bias"), Mapping):
        values["logit_bias"] = values["logit_bias"].items()
    for name in ("stop", "stop_tokens", "logit_bias"):
        if name in values:
            values[name] = tuple(values[name])
    return SamplingParams(**values)
