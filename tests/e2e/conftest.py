"""Real servers with real rank processes, on free loopback ports."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.app import Server
from serving.client import Client
from tests.e2e.streams import Traffic, wait_until_whole

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Four ranks of the tiny model; ranks that die come back."""
    with Server(model=str(TINY), ranks=4, chaos=True) as server:
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
    """Eight streams, and what each says when nothing dies."""
    with Client(server) as client:
        wait_until_whole(client)
        return Traffic.record(client, streams=8, prompt_tokens=40, max_tokens=60)
