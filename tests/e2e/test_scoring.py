"""Log-probabilities of given tokens, and answers with penalties or structured output, while ranks die."""

import json
import threading

import httpx
import pytest

from benchmarks.precision import bits_per_byte
from serving.api.client import Client
from serving.protocol.sampling import StructuredOutputs
from serving.server import Server
from tests.e2e.conftest import TINY
from tests.support.streams import kill, wait_until

HELD_OUT = TINY / "held_out"
ASKING = [
    {"frequency_penalty": 1.5, "presence_penalty": 0.5, "top_logprobs": 3},
    {"repetition_penalty": 1.4, "temperature": 0.9, "seed": 3},
    {"logit_bias": {17: 4.0, 30: -100.0}, "temperature": 0.8, "seed": 4, "top_logprobs": 20},
    {
        "structured_outputs": StructuredOutputs("regex", "([a-z]{1,8} ){60}"),
        "ignore_eos": False,
        "temperature": 1.0,
        "seed": 5,
    },
    {"min_tokens": 60, "ignore_eos": False, "temperature": 0.7, "seed": 6},
    {"prompt_logprobs": 2},
]


def test_tiny_has_its_stated_bits_per_byte_through_the_server_also_after_a_rank_died(
    server: Server, whole: Client
) -> None:
    stated = json.loads((HELD_OUT / "bits_per_byte.json").read_text())["shakespeare"]
    text = (HELD_OUT / "shakespeare.txt").read_text()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        before, logprobs = bits_per_byte(client, text)
        assert before == pytest.approx(stated, abs=2e-3)
        epoch, victim = whole.status().epoch, kill(whole, 1)
        threading.Timer(0.3, victim).start()
        after, again = bits_per_byte(client, text)
        wait_until(lambda: whole.status().epoch > epoch, "the rank's loss is known")
    assert (after, again) == (before, logprobs)
    assert whole.status().compiles_after_ready == 0


def test_answers_with_penalties_masks_and_scores_go_on_exactly_when_ranks_die(whole: Client) -> None:
    known = [ask(whole, i) for i in range(len(ASKING))]
    results: dict[int, object] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: ask(whole, i)})) for i in range(len(ASKING))]
    epoch, first, second = whole.status().epoch, kill(whole, 0), kill(whole, 2)
    for thread in threads:
        thread.start()
    wait_until(lambda: whole.status().running > 3, "the streams run")
    first()
    wait_until(lambda: whole.status().epoch > epoch, "the first loss is adopted")
    second()
    for thread in threads:
        thread.join(120)
    assert [results[i] for i in range(len(ASKING))] == known
    assert whole.status().compiles_after_ready == 0


def ask(client: Client, number: int) -> tuple:
    """Everything an answer says but the epochs that made it."""
    prompt = [(11 * number + 3 * j) % 500 + 5 for j in range(70)]
    fields = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 90} | ASKING[number]
    said = client.generate(prompt, **fields)
    return said.token_ids, said.logprobs, said.top, said.prompt_logprobs, said.prompt_top, said.reason
