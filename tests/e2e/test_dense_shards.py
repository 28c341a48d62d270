"""Dense layers sharded over real ranks: the answers of transformers, whichever rank dies, in both architectures."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.checkpoint.download import cache_folder
from serving.api.client import Client
from serving.server import Server
from tests.e2e.conftest import ONE_BUCKET
from tests.support.families.answers import ANSWER, recorded
from tests.support.families.small import small_folder
from tests.support.streams import Stream, Traffic, events_since, kill, last_event, wait_until_whole

COLLOCATED = {"ranks": 3, "slots_per_rank": 4, "on_lost_expert": "mask"}
APART = {"ranks": 3, "arch": "disaggregated", "attention": 1, "experts": 2}


@pytest.fixture(
    params=[
        pytest.param(("qwen3-moe", COLLOCATED), id="collocated"),
        pytest.param(("deepseek-v3", APART), id="disaggregated", marks=pytest.mark.slow),
    ]
)
def sharded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Server]]:
    """A family with a dense layer, its name and a server of it."""
    name, settings = request.param
    folder = tmp_path / f"small-{name}-dense"
    small_folder(folder, name)
    with Server(model=str(folder), dense="sharded", buckets=ONE_BUCKET, lattice_depth=1, **settings) as server:
        yield name, server
    for made in (cache_folder() / "models").glob(f"{folder.name}-*"):
        shutil.rmtree(made)


def test_sharded_layers_answer_as_transformers_does_through_the_loss_of_any_rank(sharded: tuple[str, Server]) -> None:
    name, server = sharded
    expected = recorded(name)
    known = Traffic([Stream(expected.prompt, 0.0, 0, ANSWER, tokens=expected.tokens)])
    with Client(server) as client:
        wait_until_whole(client)
        known.during(client)
        for rank in range(3):
            before, compiles = last_event(client), client.status().compiles_after_ready
            known.during(client, kill(client, rank), after=0.2)
            assert "recovered" in {event.kind for event in events_since(client, before)}
            wait_until_whole(client)
            assert client.status().compiles_after_ready == compiles
