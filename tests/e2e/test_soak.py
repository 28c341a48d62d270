"""Ranks die at random, one or two at once, killed or stopped, under load, until enough have died.

MOEJAX_SOAK_KILLS sets how many (200), MOEJAX_SOAK_SEED which.
"""

import asyncio
import dataclasses
import os
import random
import signal

import pytest

from benchmarks.launch import launched
from benchmarks.streams import Known, Load, running, until, whole
from serving.api.client import AsyncClient
from serving.protocol.status import Status
from tests.e2e.conftest import TINY

KILLS = int(os.environ.get("MOEJAX_SOAK_KILLS", "200"))
SEED = int(os.environ.get("MOEJAX_SOAK_SEED", "0"))
RANKS, STREAMS = 4, 6
STOPS = 0.15  # part of the signals that are SIGSTOP
PAIRS = 0.15  # part of the losses that hit two ranks at once
HURRIES = 0.3  # part of the losses that do not wait until all ranks are back


@dataclasses.dataclass
class Killer:
    """Kills ranks that serve, and leaves at least one alive."""

    client: AsyncClient
    draw: random.Random
    kills: int = 0
    compiles: int = 0

    async def strike(self) -> None:
        """At a random moment, one rank or two."""
        if self.draw.random() >= HURRIES:
            await until(self.client, whole)
        await asyncio.sleep(self.draw.uniform(0, 2))
        status = await until(self.client, lambda status: len(running(status)) > 1)
        self.compiles = max(self.compiles, status.compiles_after_ready)
        serving = list(running(status))
        count = 2 if self.draw.random() < PAIRS and len(serving) > 2 else 1
        for rank in self.draw.sample(serving, count):
            self.signal(status, rank)

    def signal(self, status: Status, rank: int) -> None:
        """Send SIGKILL, or SIGSTOP in the share STOPS of the kills."""
        pid = status.ranks[rank].pid
        if pid is not None:
            os.kill(pid, signal.SIGSTOP if self.draw.random() < STOPS else signal.SIGKILL)
            self.kills += 1


async def soak(address: str) -> None:
    """Load and losses; then every stream is compared with what it said undisturbed."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        known = await Known.record(client, 2 * STREAMS, prompt_tokens=100, max_tokens=100)
        load, killer = Load(client, known.asks), Killer(client, random.Random(SEED))
        load.start(STREAMS)
        while killer.kills < KILLS:
            await killer.strike()
        status = await until(client, whole)
        traces = await load.stop()
        assert [trace.error for trace in traces if trace.error is not None] == []
        assert known.changed(traces) == 0
        assert killer.compiles == status.compiles_after_ready == 0
        assert status.failed == 0
        assert sum(running(await client.status()).values()) == 0


@pytest.mark.slow
@pytest.mark.timeout(60 + 60 * KILLS)
def test_no_stream_fails_or_changes_however_many_ranks_die(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # this process's own; the server runs as anywhere
        monkeypatch.delenv(name, raising=False)
    with launched(str(TINY), RANKS) as server:
        asyncio.run(soak(server.address))
