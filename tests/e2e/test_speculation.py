"""Drafts change no token and no bit of a real model's answers, also when a rank dies in the middle of them."""

import concurrent.futures

import httpx
import pytest

from serving.api.client import Client
from serving.server import Server
from tests.support.drafts import PERIODIC, accepted, answers, parts
from tests.support.streams import kill, wait_until, wait_until_whole


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
    assert accepted(outputs) == after.accepted - before.accepted > 0
    assert accepted(plain) == 0
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
