"""An accepted request and the items of its stream, as values that all surfaces and the engine share."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from serving.protocol.sampling import ResolvedSampling, TopLogprobs

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerParsing:
    """How the text of an answer is read: `tools` that it may call, whether it may have `parallel` calls, and whether
    the prompt has begun the reasoning."""

    tools: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True
    inside_reasoning: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An accepted request: tokens in, everything decided.

    `deadline` is in seconds of the front's monotonic clock. The scheduler shares the ranks among owners by their
    `share` (serving/engine/fairness.py). `prompt_group` is the id of the call's first request with the same prompt: the
    others wait until its prompt is computed, and share its pages. `parsing` None: the answer is plain text.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: ResolvedSampling
    deadline: float | None = None
    owner: str = ""
    share: float = 1.0
    prompt_group: str = ""
    parsing: AnswerParsing | None = None


class LogitsParams(NamedTuple):
    """The inputs of a request's logits processing: the request, and the tokens it has generated. The last `drafts` of
    them are guesses, which the form of the answer may not allow."""

    request: Request
    generated: tuple[int, ...]
    drafts: int = 0


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a stream: its index in the output, id, log-probability, the epoch that computed it, and the
    likeliest tokens in its place where they were requested. `cached_tokens` prompt tokens came from the prefix cache.
    `drafted`: a draft had guessed it.

    `degraded`: experts were masked in that epoch, so the token may differ from the full model's. `weights_version` is
    the label of the weights that computed it.
    """

    index: int
    id: int
    logprob: float
    epoch: int
    degraded: bool = False
    top: TopLogprobs = ()
    cached_tokens: int = 0
    drafted: bool = False
    weights_version: str = "0"


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of prompt tokens from `position` on, and the likeliest tokens in their place. They come in
    order, before the first token; the prompt's first token has none."""

    position: int
    logprobs: tuple[float, ...]
    top: tuple[TopLogprobs, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a stream. `cached_tokens` prompt tokens came from the prefix cache."""

    reason: FinishReason
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call of a client: its requests, and what its answers are built from. `owner` is the API key it came with,
    `form` the JSON that an HTTP answer is made from, `created` is in seconds since the epoch. `key` is made by the edge
    that took the call, once: a call that comes again with it is the same call, and is not run twice."""

    id: str
    requests: tuple[Request, ...]
    stop: tuple[str, ...] = ()
    owner: str = ""
    form: Mapping[str, Any] | None = None
    created: int = 0
    key: str = ""


class RequestPhase(enum.Enum):
    """The phase of a request in the engine."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
