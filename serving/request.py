"""What a caller asks for and what comes back, as values. Shared by every surface and by the engine."""

import dataclasses
import enum
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


Top = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities, the likeliest first."""


@dataclasses.dataclass(frozen=True)
class Guide:
    """What an answer must look like: a JSON schema, a regular expression, a Lark grammar, or one of some texts (as a
    JSON list)."""

    kind: Literal["json", "regex", "lark", "choice"]
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Keys are (seed, position), so a stream is the same wherever it runs.

    `n` answers are drawn, with seeds that follow one another. temperature 0 is greedy. top_k 0, top_p 1 and min_p 0
    switch the filter off. `seed` None: the front draws one when the request is accepted. `stop` strings end the text
    before them; `stop_tokens` end it after the token, which is not part of the text; neither does before there are
    `min_tokens`. `max_tokens` None: up to the context limit; 0 is for prompts that are only scored.

    Frequency and presence penalties and `logit_bias` (token, bias) are OpenAI's; `repetition_penalty` is that of
    arXiv 1909.05858. `top_logprobs`: so many of the likeliest tokens are told beside each token. `prompt_logprobs`:
    the log-probability of each prompt token is told, and so many of the likeliest in its place; None for neither.
    Of the requests of one caller that wait, those of the lowest `priority` run first (as vLLM's).
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    priority: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An accepted request: tokens in, everything decided (seed, max_tokens, deadline).

    `deadline` is in seconds of the front's monotonic clock, or None. `stop_tokens` has the model's own stop
    tokens in it unless the caller said ignore_eos. Places are shared out among owners by their `share`
    (serving/fairness.py). `family` is the id of the first answer to the same prompt in a call: the others wait
    until it has computed the prompt, and share its pages.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: frozenset[int] = frozenset()
    deadline: float | None = None
    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    priority: int = 0
    owner: str = ""
    share: float = 1.0
    family: str = ""

    def is_shaped(self, generated: int) -> bool:
        """Whether the token after so many generated ones needs more than temperature and filters."""
        return (
            self.top_logprobs > 0
            or self.guide is not None
            or bool(self.logit_bias)
            or self.repetition_penalty != 1
            or generated < self.min_tokens
            or (generated > 0 and (self.frequency_penalty != 0 or self.presence_penalty != 0))
        )


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a stream: its index in the output, id, log-probability, the mesh epoch that made it, and the
    likeliest tokens in its place, where they were asked for. `reused` prompt tokens were in the cache already.

    `degraded`: experts were masked in that epoch, so it may be another than the whole model gives.
    """

    index: int
    id: int
    logprob: float
    epoch: int
    degraded: bool = False
    top: Top = ()
    reused: int = 0


@dataclasses.dataclass(frozen=True)
class Scored:
    """Log-probabilities of prompt tokens from `position` on, each given all before it, and the likeliest instead.
    They come in order and before the first token; the prompt's own first token has none."""

    position: int
    logprobs: tuple[float, ...]
    top: tuple[Top, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a stream. `reused` prompt tokens were in the cache already."""

    reason: FinishReason
    reused: int = 0


class Phase(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
