"""Drafts change no token and no bit of a real model's answers, also when a rank dies in the middle of them."""

import concurrent.futures

import httpx
import pytest

from serving.api.client import Client
from serving.api.client.completion import CompletionOutput
from serving.protocol.sampling import StructuredOutputs
from serving.server import Server
from tests.support.streams import kill, wait_until, wait_until_whole

PERIODIC = [5, 17, 42, 99, 7] * 12
CALLS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"temperature": 0.7, "top_k": 20, "seed": 5, "frequency_penalty": 0.3, "repetition_penalty": 1.1},
    {"temperature": 0.0, "top_logprobs": 2, "min_tokens": 20},
    {"temperature": 0.8, "seed": 9, "logit_bias": {17: 4.0, 42: 4.0}, "top_p": 0.9},
    {"temperature": 1.0, "seed": 2, "structured_outputs": StructuredOutputs("regex", "((ab|cd)(, )?){60}")},
)
"""Sampling of requests whose prompt repeats itself; a small model goes on repeating it under most of them."""


def answers(client: Client, *, speculate: bool) -> list[tuple[CompletionOutput, ...]]:
    """The answers to all calls, sent at once."""

    def ask(number: int) -> tuple[CompletionOutput, ...]:
        options = {"max_tokens": 96, "ignore_eos": True, "speculate": speculate} | CALLS[number]
        return tuple(client.generate_all([*PERIODIC, number + 1, *PERIODIC], **options))

    with concurrent.futures.ThreadPoolExecutor(len(CALLS)) as pool:
        return list(pool.map(ask, range(len(CALLS))))


def parts(outputs: list[tuple[CompletionOutput, ...]]) -> list[tuple[object, ...]]:
    """All that must be the same with drafts and without."""
    return [(each.token_ids, each.logprobs, each.top, each.reason) for call in outputs for each in call]


@pytest.mark.parametrize("dies", [False, True], ids=["undisturbed", "a rank dies"])
def test_drafts_change_no_bit_of_an_answer(whole: Client, dies: bool) -> None:
    plain, before = answers(whole, speculate=False), whole.status()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        drafted = pool.submit(answers, whole, speculate=True)
        if dies:
            wait_until(lambda: whole.status().accepted > before.accepted, "drafts are right")
            kill(whole, 1)()
        outputs = drafted.result()
    assert parts(outputs) == parts(plain)
    after = whole.status()
    kept = sum(each.accepted_drafts for call in outputs for each in call)
    assert kept == after.accepted - before.accepted > 0
    assert all(each.accepted_drafts == 0 for call in plain for each in call)
    wait_until_whole(whole)
    assert after.compiles_after_ready == whole.status().compiles_after_ready == 0


def test_the_usage_of_an_answer_has_the_drafts_that_were_right(whole: Client, server: Server) -> None:
    body = {"model": whole.model().name, "prompt": PERIODIC, "max_tokens": 96, "temperature": 0, "ignore_eos": True}
    drafted, plain = (
        httpx.post(f"{server.url}/v1/completions", json=body | {"speculate": speculate}, timeout=60).json()
        for speculate in (True, False)
    )
    assert drafted["choices"] == plain["choices"]
    assert "completion_tokens_details" not in plain["usage"]
    details = drafted["usage"]["completion_tokens_details"]
    assert 0 < details["accepted_prediction_tokens"] < drafted["usage"]["completion_tokens"] == 96
