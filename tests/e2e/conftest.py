"""Real servers with real rank processes, on free loopback ports."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.client import Client
from serving.server import Server
from tests.support.streams import Traffic, wait_until_whole

TINY = Path(__file__).parents[2] / "models" / "tiny"
FEW_BUCKETS = ((8, 0), (8, 2))
"""Enough for what a test does, and a third of the compiles; the usual buckets are those of `pair` in `test_faults`."""
PAIR = {"model": str(TINY), "ranks": 2, "buckets": FEW_BUCKETS, "kv_cache_type": "bfloat16"}
"""Two ranks with the programs of servers under a supervisor."""
ONE_BUCKET = ((2, 2),)
"""Enough for a request or two of a model with few numbers, whose programs no other test uses."""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Four ranks of the tiny model; ranks that die come back."""
    with Server(model=str(TINY), ranks=4, chaos=True, buckets=FEW_BUCKETS) as server:
        yield server


@pytest.fixture
def whole(server: Server) -> Iterator[Client]:
    """A client, once all ranks serve and every single loss is prepared."""
    with Client(server) as client:
        wait_until_whole(client)
        yield client
        assert client.status().running == 0


@pytest.fixture(scope="session")
def traffic(server: Server) -> Traffic:
    """Eight streams, and what each says alone when nothing dies."""
    with Client(server) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=8, prompt_tokens=40, max_tokens=60, alone=True)
