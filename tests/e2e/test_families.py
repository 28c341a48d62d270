"""Law: the server answers with the tokens of transformers, also when the rank that serves is killed on the way."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.checkpoint.download import cache_folder
from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import ONE_BUCKET
from tests.support.families.answers import ANSWER, recorded
from tests.support.families.small import small_folder
from tests.support.streams import Stream, Traffic, wait_until, wait_until_whole

FAMILIES = (
    "qwen3-moe",
    "deepseek-v3",
    "gpt-oss",
    "llama4",
    "afmoe",
    "qwen3_next",
    "lfm2_moe",
    "nemotron_h",
    "kimi_linear",
    "mimo_v2_flash",
    "step3p7",
    "qwen3_5_moe",
    "mistral_format",
)
"""One with grouped-query attention, one with latent attention, the one with sinks, windows and biased experts, the one
with chunks and scaled inputs of experts, whose decoder stands beside other parts, one with gated attention and norms
after each part, one of each kind of layers whose context is a state (Nemotron-H has layers without a feed-forward part
too; the decoder of Qwen3.5 stands beside other parts), two whose layers with a window have heads of their own, and the
one whose folder has no config.json. SLOW are among the slow tests: `test_dense_shards` serves the first too, slots and
copies of a state are the same of all kinds, and so are caches of layers that differ."""
SLOW = ("qwen3-moe", "afmoe", "qwen3_next", "lfm2_moe", "kimi_linear", "mimo_v2_flash", "step3p7", "qwen3_5_moe")
STATES = ("qwen3_next", "qwen3_5_moe", "lfm2_moe", "nemotron_h", "kimi_linear")
IN_PREFILL = (*STATES, "mimo_v2_flash", "step3p7")
"""Families whose rank is killed in prefill too."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / f"small-{request.param}"
    small_folder(folder, request.param)
    yield request.param, folder
    for converted in (cache_folder() / "models").glob(f"{folder.name}-*"):
        shutil.rmtree(converted)


def kill_who_serves(client: Client) -> None:
    """SIGKILL to the rank that has the request, if it has not ended."""
    for rank in client.status().ranks:
        if rank.running:
            assert rank.pid is not None
            os.kill(rank.pid, signal.SIGKILL)


def drain_who_serves(client: Client) -> None:
    """Drain the rank that has the request, if it has not ended, and have it replaced."""
    for rank in client.status().ranks:
        if rank.running:
            client.apply("drain", rank.id, replace=True)


def kill_who_computes_a_prompt(client: Client) -> None:
    """SIGKILL to the rank that gets the only request, as soon as it has it."""
    wait_until(lambda: any(rank.running for rank in client.status().ranks), "a rank has the request", 10.0)
    kill_who_serves(client)


def test_a_family_answers_as_transformers_does_also_through_the_loss_of_its_rank(published: tuple[str, Path]) -> None:
    name, folder = published
    expected = recorded(name)
    known = Stream(expected.prompt, 0.0, 0, ANSWER, tokens=expected.tokens)
    in_place = name in ("gpt-oss", "llama4")  # the others are converted
    with (
        Server(model=str(folder), ranks=2, buckets=ONE_BUCKET, in_place=in_place, operate=True) as server,
        Client(server) as client,
    ):
        wait_until_whole(client)
        Traffic([known]).during(client)
        for _ in range(5):  # on a busy machine the stream may have ended just before
            (killed,) = Traffic([known]).during(client, lambda: kill_who_serves(client))
            if len(set(killed.epochs)) > 1:
                break
            wait_until_whole(client)
        assert len(set(killed.epochs)) > 1, "it was killed on the way"
        if name in STATES:
            wait_until_whole(client)
            recoveries = client.status().recoveries
            Traffic([known]).during(client, lambda: drain_who_serves(client))
            assert client.status().recoveries == recoveries, "its state moved with its pages"
        if name in IN_PREFILL:
            wait_until_whole(client)
            long = Stream((5 * expected.prompt)[:180], 0.0, 0, 8)
            long.run(client)
            for _ in range(5):
                wait_until_whole(client)
                before = client.status().epoch
                (killed,) = Traffic([long]).during(client, lambda: kill_who_computes_a_prompt(client), after=0.0)
                if min(killed.epochs) > before:
                    break
            assert min(killed.epochs) > before, "it was killed before the first token"
