"""An hour of every kind of fault under load, half of it on either architecture: nothing fails, changes or grows.

MOEJAX_SOAK_MINUTES sets how long (60), MOEJAX_SOAK_SEED which faults.
"""

import asyncio
import dataclasses
import os
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.faults import FRONT, SETUPS, Scenario, Scene, Setup, coordinator_of
from benchmarks.launch import Launched, launched
from benchmarks.losses import EventFeed
from benchmarks.streams import Known, Load, running, until, whole
from serving.api.client import AsyncClient
from tests.e2e.conftest import TINY

MINUTES = float(os.environ.get("MOEJAX_SOAK_MINUTES", "60"))
SEED = int(os.environ.get("MOEJAX_SOAK_SEED", "0"))
RANKS, STREAMS = 4, 6


@dataclasses.dataclass(frozen=True)
class Use:
    """Open files, threads and memory of all processes of a server."""

    processes: int
    files: int
    threads: int
    kib: int

    @classmethod
    def of(cls, session: int) -> "Use":
        """Now. Of a process that ends meanwhile, what could be read."""
        listed = subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True, check=True)
        files = threads = kib = 0
        pids = listed.stdout.split()
        for pid in pids:
            folder = Path("/proc", pid)
            try:
                files += len(os.listdir(folder / "fd"))
                threads += len(os.listdir(folder / "task"))
                rollup = (folder / "smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            kib += next((int(line.split()[1]) for line in rollup if line.startswith("Pss:")), 0)
        return cls(len(pids), files, threads, kib)


async def strike(scene: Scene, scenario: Scenario) -> None:
    """Inject one fault and wait until the server has reported it."""
    status = await until(scene.client, lambda status: len(running(status)) > 1)
    experts = [rank.id for rank in status.ranks if rank.role == "expert"]
    victim = scene.draw.choice(experts if scenario.expert else list(running(status)))
    moment = time.monotonic()
    await scenario.inject(scene, victim)
    await scene.feed.wait(scenario.told, moment)
    if scene.task is not None:
        await scene.task
        scene.task = None


async def endure(server: Launched, scenarios: Sequence[Scenario], seconds: float) -> list[Use]:
    """Load and faults; what the server took before each."""
    used = []
    async with AsyncClient(server.address) as client:
        await until(client, whole)
        known = await Known.record(client, 2 * STREAMS, prompt_tokens=100, max_tokens=100)
        feed, load = EventFeed(client), Load(client, known.asks)
        scene = Scene(server, client, feed, known, random.Random(SEED))
        load.start(STREAMS)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await until(client, whole)
            used.append(Use.of(server.session))
            await asyncio.sleep(scene.draw.uniform(0, 1))
            there = coordinator_of(server) is not None  # else the next replacement brings one
            await strike(scene, scene.draw.choice([s for s in scenarios if there or s.name != "coordinator"]))
        status = await until(client, whole)
        traces = await load.stop()
        feed.close()
        assert [trace.error for trace in traces if trace.error is not None] == []
        assert known.changed(traces) == 0
        assert status.failed == status.compiles_after_ready == 0
        assert sum(running(await client.status()).values()) == 0
    return used


@pytest.mark.slow
@pytest.mark.timeout(600 + 60 * MINUTES)
@pytest.mark.parametrize("setup", SETUPS[:2], ids=lambda setup: setup.arch)
def test_nothing_fails_changes_or_grows_in_an_hour_of_faults(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # this process's own; the server runs as anywhere
        monkeypatch.delenv(name, raising=False)
    with launched(str(TINY), RANKS, options=setup.options(RANKS)) as server:
        used = asyncio.run(endure(server, (*setup.scenarios, FRONT), 30 * MINUTES))
    most = max(use.processes for use in used)
    assert most <= RANKS + 4, f"{most} processes: more than the ranks, two fronts, supervisor and coordinator"
    third = max(1, len(used) // 3)
    for field, share, more in (("files", 0.1, 10), ("threads", 0.2, 20), ("kib", 0.1, 50 << 10)):
        taken = [getattr(use, field) for use in used]
        first, last = min(taken[:third]), min(taken[-third:])  # what it comes down to: ranks that start take more
        print(f"{setup.arch}: {len(used)} faults, {field} {first:.0f} -> {last:.0f}")
        assert last <= first * (1 + share) + more, f"{field} grew: {taken}"
