"""Measures real servers of a few ranks on this machine: the time of a step, and of a recovery."""

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.launch import launched
from benchmarks.losses import EventFeed, local
from benchmarks.streams import Load, make_asks, until, whole
from serving.api.client import AsyncClient

STREAMS, PROMPT_TOKENS, MAX_TOKENS = 8, 32, 256
WATCHED_S = 3.0
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def core_seconds(session: int) -> float:
    """Seconds of processor time that the processes of a session have used so far."""
    spent = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            spent += (int(fields[11]) + int(fields[12])) * _TICK_S
    return spent


async def measure_step(client: AsyncClient, session: int) -> dict[str, float]:
    """Milliseconds of a step while all streams run: on the clock, and of the cores for the server and for this
    client."""
    before, cores, own = await client.status(), core_seconds(session), time.process_time()
    await asyncio.sleep(WATCHED_S)
    after, cores, own = await client.status(), core_seconds(session) - cores, time.process_time() - own
    steps = after.steps - before.steps
    return {
        "step_ms": (after.step_ms - before.step_ms) / steps,
        "server_core_ms": 1e3 * cores / steps,
        "client_core_ms": 1e3 * own / steps,
        "tokens_per_step": (after.tokens - before.tokens) / steps,
    }


async def measure(address: str, session: int, ranks: int, kills: int) -> dict[str, Any]:
    """The step of one server, and the phases of a recovery: medians over the deaths of its last ranks by SIGKILL."""
    async with AsyncClient(address) as client:
        await until(client, whole)
        load = Load(client, await make_asks(client, STREAMS, PROMPT_TOKENS, MAX_TOKENS))
        load.start(STREAMS)
        await asyncio.sleep(1.5)
        step = await measure_step(client, session)
        feed, losses = EventFeed(client), []
        for victim in range(ranks - 1, ranks - 1 - (kills if ranks > 1 else 0), -1):
            status = await until(client, whole)
            pid = status.ranks[victim].pid
            assert pid is not None, f"rank {victim} is {status.ranks[victim].state}"
            kill = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            recovered = await feed.wait("recovered", kill, victim)
            losses.append({"from_kill": 1e3 * (local(recovered) - kill), **recovered.phases})
        feed.close()
        await load.stop()
    failed = sum(trace.error is not None for trace in load.traces)
    if failed:
        raise RuntimeError(f"{failed} requests failed on {ranks} ranks")
    return {"ranks": ranks, **step, "recovery_ms": medians(losses)}


def medians(losses: list[dict[str, float]]) -> dict[str, float]:
    """The median of each phase, over the losses that had it."""
    names = dict.fromkeys(name for phases in losses for name in phases)
    return {name: statistics.median(phases[name] for phases in losses if name in phases) for name in names}


def measure_servers(
    runner: asyncio.Runner, model: str, data_type: str, counts: Iterable[int], kills: int
) -> list[dict[str, Any]]:
    """A server for each number of ranks, one after the other."""
    rows = []
    for ranks in counts:
        options = ("--data-type", data_type, "--lattice-depth", "1")
        with launched(model, ranks, options=options) as server:
            rows.append(runner.run(measure(server.address, server.session, ranks, kills)))
        phases = ", ".join(f"{name} {ms:.1f}" for name, ms in rows[-1]["recovery_ms"].items())
        print(f"{model:14} ranks {ranks}  step {rows[-1]['step_ms']:.2f} ms  recovery {phases or '-'}", flush=True)
    return rows
