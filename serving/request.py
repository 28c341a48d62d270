"""What a caller asks for and what comes back, as values. Shared by every surface and by the engine."""

import dataclasses
import enum
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Keys are (seed, position), so a stream is the same wherever it runs.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch the filter off. `seed` None: the front draws
    one when the request is accepted. `stop` strings end the text before them; `stop_tokens` end it after the
    token, which is not part of the text. `max_tokens` None: up to the context limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An accepted request: tokens in, everything decided (seed, max_tokens, deadline).

    `deadline` is in seconds of the front's monotonic clock, or None. `stop_tokens` has the model's own stop
    tokens in it unless the caller said ignore_eos.
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


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a stream: its index in the output, id, log-probability and the mesh epoch that made it."""

    index: int
    id: int
    logprob: float
    epoch: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a stream."""

    reason: FinishReason


class Phase(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
