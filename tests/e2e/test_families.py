"""Law: the server answers with the tokens of transformers, also when the rank that serves is killed on the way."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.download import cache_folder
from serving.app import Server
from serving.client import Client
from tests.e2e.streams import Stream, Traffic, wait_until_whole
from tests.moejax.families.answers import ANSWER, recorded
from tests.moejax.families.small import small_folder

BUCKETS = ((2, 0), (2, 2))
FAMILIES = ("qwen3-moe", "deepseek-v3", "gpt-oss")
"""One with grouped-query attention, one with latent attention, and the one with sinks, windows and biased experts."""


@pytest.fixture(params=FAMILIES)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / f"small-{request.param}"
    small_folder(folder, request.param)
    yield request.param, folder
    for converted in (cache_folder() / "models").glob(f"{folder.name}-*"):
        shutil.rmtree(converted)


def kill_who_serves(client: Client) -> None:
    """SIGKILL to the rank that has the request."""
    (busy,) = [rank for rank in client.status().ranks if rank.running]
    assert busy.pid is not None
    os.kill(busy.pid, signal.SIGKILL)


def test_a_family_answers_as_transformers_does_also_through_the_loss_of_its_rank(published: tuple[str, Path]) -> None:
    name, folder = published
    expected = recorded(name)
    known = Stream(expected.prompt, 0.0, 0, ANSWER, tokens=expected.tokens)
    in_place = name == "gpt-oss"  # the others are converted
    with (
        Server(model=str(folder), ranks=2, buckets=BUCKETS, in_place=in_place) as server,
        Client(server) as client,
    ):
        wait_until_whole(client)
        Traffic([known]).during(client)
        (killed,) = Traffic([known]).during(client, lambda: kill_who_serves(client))
        assert len(set(killed.epochs)) > 1, "it was killed on the way"
