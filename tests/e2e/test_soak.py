"""Ranks die at random, one or two at once, killed or stopped, under load, until enough have died.

MOEJAX_SOAK_KILLS sets how many (200), MOEJAX_SOAK_SEED which. `python -m benchmarks.kills` does the same with other
architectures, drafts and moves of experts.
"""

import asyncio
import os
import random

import pytest

from benchmarks.kills import Kills, record
from benchmarks.launch import launched
from benchmarks.streams import running
from serving.api.client import AsyncClient
from tests.e2e.conftest import TINY

KILLS = int(os.environ.get("MOEJAX_SOAK_KILLS", "200"))
SEED = int(os.environ.get("MOEJAX_SOAK_SEED", "0"))
RANKS, STREAMS = 4, 6


async def soak(address: str) -> None:
    """Load and losses; then every stream is compared with what it said undisturbed."""
    known = await record(address, STREAMS, prompt_tokens=100, max_tokens=100)
    async with AsyncClient(address) as client:
        figures = await Kills(client, known, random.Random(SEED)).run(KILLS, STREAMS)
        assert (figures["lost"], figures["changed"], figures["compiles"]) == (0, 0, 0), figures
        status = await client.status()
        assert status.failed == 0
        assert sum(running(status).values()) == 0


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
def test_no_stream_fails_or_changes_however_many_ranks_die(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # this process's own; the server runs as anywhere
        monkeypatch.delenv(name, raising=False)
    with launched(str(TINY), RANKS) as server:
        asyncio.run(soak(server.address))
