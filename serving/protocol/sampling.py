"""How the tokens of an answer are chosen: what a caller asks for, and the same once everything is decided."""

import dataclasses
from collections.abc import Collection
from typing import Literal, Self

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens and their log-probabilities, the likeliest first."""

MAX_SEED = 0x7FFFFFFF
"""Seeds of requests fit any 32-bit integer."""
MIN_TEMPERATURE = 1e-5
"""Logits divided by a lower temperature may overflow. The draw would be the likeliest token anyway: it is greedy."""
MIN_MASS = 2.0**-126
"""The least `top_p` that a rank computes with: the least normal float32. Programs take denormal numbers for 0, which
lets no token in; this one lets in the likeliest."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """The form an answer must have: a JSON schema, a regular expression, a Lark grammar, one of several texts (as a
    JSON list), or a call of one of several tools (as a JSON list of tools). With `after` the form holds from there on:
    it is the mark that ends the reasoning which the prompt has begun. `param` is the field in which the caller sent it;
    that of tools has `[]` where the number of the tool at fault stands."""

    kind: Literal["json", "regex", "lark", "choice", "tools"]
    text: str
    after: str = ""
    param: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """The sampling parameters that need no decision of the server.

    Stop strings and stop tokens end no answer that has fewer than `min_tokens`. Frequency and presence penalties and
    `logit_bias` (token, bias) are OpenAI's. `top_logprobs` is the number of likeliest tokens to send beside each token.
    With `prompt_logprobs` the log-probability of each prompt token is sent, and that many of the likeliest tokens in
    its place. Among the waiting requests of one caller, those with the lowest `priority` run first, as in vLLM.
    `speculate` says whether tokens of the answer are drafted ahead, which changes no token; None: as the server does.
    """

    min_tokens: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = 0
    speculate: bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The defaults of a model for what a caller leaves open: its own values (`generation_config.json`), or these,
    which change nothing. `max_tokens` None: up to the context limit.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch a filter off; `repetition_penalty` is that of arXiv
    1909.05858.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedSampling(TokenSampling):
    """The sampling parameters of an accepted request; `SamplingDefaults` says what they are. Random keys are
    (seed, position), so that a stream is the same wherever it runs. `stop_tokens` include those of the model unless the
    caller asked for `ignore_eos`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int
    seed: int
    stop_tokens: frozenset[int] = frozenset()

    def computable(self, vocab_size: int) -> Self:
        """The same parameters without what a rank cannot compute with and what changes no answer: stop tokens outside
        of the vocabulary, a temperature that is greedy, and a `top_p` that lets in the likeliest token alone."""
        return dataclasses.replace(
            self,
            temperature=0.0 if self.temperature < MIN_TEMPERATURE else self.temperature,
            top_p=max(self.top_p, MIN_MASS),
            stop_tokens=frozenset(token for token in self.stop_tokens if 0 <= token < vocab_size),
        )

    def needs_logits_processing(self, generated: int) -> bool:
        """Whether choosing the token after `generated` ones takes more than temperature and filters."""
        return (
            self.top_logprobs > 0
            or self.structured_outputs is not None
            or bool(self.logit_bias)
            or self.repetition_penalty != 1
            or generated < self.min_tokens
            or (generated > 0 and (self.frequency_penalty != 0 or self.presence_penalty != 0))
        )


_NO_DEFAULTS = SamplingDefaults()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(TokenSampling):
    """The sampling parameters that a caller sends. Parameters that are None are the model's (`SamplingDefaults`).

    `n` answers are drawn, with consecutive seeds. `seed` None: the server draws one. As in vLLM, `top_k` -1 switches
    its filter off too. `max_tokens` 0: the prompt is only scored. An answer ends before a `stop` string, and after one
    of `stop_tokens`, which is not part of its text.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False

    def resolve(
        self,
        *,
        seed: int,
        room: int,
        vocab_size: int,
        model_stop_tokens: Collection[int],
        defaults: SamplingDefaults = _NO_DEFAULTS,
    ) -> ResolvedSampling:
        """The parameters with everything decided. `seed` and `defaults` are used where the caller gave none; an answer
        has `room` for that many tokens."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TokenSampling)}
        for field in dataclasses.fields(SamplingDefaults):
            given = getattr(self, field.name)
            shared[field.name] = getattr(defaults, field.name) if given is None else given
        shared["top_k"] = min(max(shared["top_k"], 0), vocab_size)
        if self.max_tokens is None:
            shared["max_tokens"] = room if defaults.max_tokens is None else min(room, defaults.max_tokens)
        return ResolvedSampling(
            **shared,
            seed=seed if self.seed is None else self.seed & MAX_SEED,
            stop_tokens=frozenset((*self.stop_tokens, *(() if self.ignore_eos else model_stop_tokens))),
        ).computable(vocab_size)
