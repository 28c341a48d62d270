"""Calls whose prompts repeat themselves, so that some drafts are right, and what must be equal without them."""

import concurrent.futures
from typing import Any

from serving.api.client import Client
from serving.api.client.completion import CompletionOutput
from serving.protocol.sampling import StructuredOutputs

PERIODIC = [5, 17, 42, 99, 7] * 12
CALLS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"temperature": 0.7, "top_k": 20, "seed": 5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 0.0, "top_logprobs": 2, "min_tokens": 20},
    {"temperature": 0.8, "seed": 9, "logit_bias": {17: 4.0, 42: 4.0}, "top_p": 0.9},
    {"seed": 2, "ignore_eos": False, "structured_outputs": StructuredOutputs("regex", "((ab|cd)(, )?){60}")},
)
"""Sampling of the calls; a small model goes on repeating its prompt under most of them."""


def answers(client: Client, *, speculate: bool) -> list[list[CompletionOutput]]:
    """The answers to all calls, sent at once."""

    def ask(number: int) -> list[CompletionOutput]:
        options = {"max_tokens": 96, "ignore_eos": True, "speculate": speculate} | CALLS[number]
        return client.generate_all([*PERIODIC, number + 1, *PERIODIC], **options)

    with concurrent.futures.ThreadPoolExecutor(len(CALLS)) as pool:
        return list(pool.map(ask, range(len(CALLS))))


def parts(outputs: list[list[CompletionOutput]]) -> list[tuple[object, ...]]:
    """All that must be the same with drafts and without."""
    return [(each.token_ids, each.logprobs, each.top, each.reason) for call in outputs for each in call]


def accepted(outputs: list[list[CompletionOutput]]) -> int:
    """Tokens that drafts had guessed."""
    return sum(each.accepted_drafts for call in outputs for each in call)
