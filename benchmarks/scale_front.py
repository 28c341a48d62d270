"""What a front spends on N ranks that answer at once: the real loop, failover and streams, without a model.

Seconds are CPU seconds of this process, in which the front runs: stand-ins run elsewhere, and who else uses the cores
does not count.
"""

import asyncio
import collections
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from benchmarks.stand_ins import StandIns
from planner.cluster import Cluster, Hardware
from planner.workload import Workload
from serving.batch import Bucket
from serving.config import Settings
from serving.engine import Limits
from serving.failover import Failover
from serving.guided import Guides
from serving.health import Cause, HealthSettings, Observation, stuck, suspects
from serving.links import Loss, RankLinks
from serving.loop import Loop
from serving.mesh_key import MeshKey
from serving.prepared import Prepared
from serving.proto.moejax.v1 import link_pb2
from serving.request import Request
from serving.tokens import Tokenizer

PAGE, CONTEXT, ROWS = 32, 4096, 16
PROMPT, LIMIT_S = 8, 120.0
STEPS, LEAST_S, MOST_STEPS = 12, 1.5, 1000
"""A measurement takes so many steps, and so long, at least; but no more than so many."""
MAX_TOKENS = 2 * MOST_STEPS
ADOPTIONS = 3
WATCHED, BEAT_S = 32, 0.05
"""Ranks, and the seconds between their heartbeats, of the front that only watches."""


class AnyNumber(Settings):
    """Settings without the bound on local ranks, and with what is measured elsewhere switched off."""

    def __post_init__(self) -> None:
        """Nothing is checked: these are not an operator's."""


def settings_of(ranks: int) -> AnyNumber:
    """Of a front with so many stand-ins."""
    return AnyNumber(
        ranks=ranks,
        model="stand-in",
        page_size=PAGE,
        max_context=CONTEXT,
        pages_per_rank=ROWS * -(-(PROMPT + MAX_TOKENS) // PAGE),
        lattice_depth=0,
        buckets=((ROWS, 0), (ROWS, 4)),
        max_queue=1 << 20,
        scrub_s=0.0,
        restart=False,
        protect_cache="off",
        journal="off",
        slow_block_steps=1 << 30,
    )


def prepared_of(workload: Workload) -> Prepared:
    """A model of this shape, of which nothing is there."""
    return Prepared(
        name=workload.name,
        config="{}",
        folder="",
        store="",
        executables="",
        vocab_size=256,
        max_context=CONTEXT,
        stop_tokens=(),
        bos_token=None,
        layers=workload.layers,
        moe_layers=workload.moe_layers,
        experts=workload.experts,
        experts_per_token=workload.experts_per_token,
        parameters=1,
        expert_bytes=workload.expert_bytes,
        rest_bytes=workload.rest_bytes,
        cache_bytes_per_token=workload.cache_bytes_per_token,
        hidden_bytes=workload.hidden_bytes,
        weights=workload.weight_format,
    )


@dataclasses.dataclass
class FrontOf:
    """A front and its stand-ins."""

    ranks: int
    links: RankLinks
    failover: Failover
    loop: Loop

    @classmethod
    @contextlib.asynccontextmanager
    async def stand_ins(
        cls, ranks: int, workload: Workload, tokenizer: Tokenizer, *, beat_s: float = 0.0
    ) -> AsyncIterator["FrontOf"]:
        """A front whose last rank's loss is prepared. It judges no heartbeats until it is told to."""
        settings, model = settings_of(ranks), prepared_of(workload)
        losses: list[Any] = []
        launcher = StandIns(
            min(4, -(-ranks // 64)),
            moe_layers=workload.moe_layers,
            experts=workload.experts,
            segments=ROWS + 4,
            beat_s=beat_s,
        )
        health = HealthSettings(heartbeat_floor_s=LIMIT_S, step_floor_s=LIMIT_S, together_limit_s=LIMIT_S)

        def lost(loss: Loss) -> None:
            for hear in losses:
                hear(loss)

        links = RankLinks(health, lost, launcher)
        await links.open()
        cluster = Cluster.regular("stand-ins", -(-ranks // 8), min(8, ranks), hardware=Hardware())
        failover = Failover(settings, model, links, lambda _: None, cluster=cluster)
        failover.plans.foresee([frozenset({ranks - 1})] if ranks > 1 else [])
        try:
            await failover.start()
            limits = Limits(
                page_size=PAGE,
                max_context=CONTEXT,
                max_queue=settings.max_queue,
                buckets=tuple(Bucket(*bucket) for bucket in settings.buckets),
                tiles_while_decoding=4,
            )
            loop = Loop(settings, model.info(), limits, links, failover, Guides(tokenizer, 256, ()))
            losses.append(loop.lost)
            for rank in range(ranks):
                links.unwatch(rank)
            loop.start()
            yield cls(ranks, links, failover, loop)
            await loop.drain(0.0)
        finally:
            await failover.close()
            await links.close()
            launcher.close()

    async def read(self, request: Request) -> None:
        """A client that does nothing with its tokens."""
        async for _ in self.loop.stream(request):
            pass

    async def step(self, rows: int) -> dict[str, float]:
        """A step with `rows` decoding requests on each rank: milliseconds of the front's core, and on the clock."""
        count = rows * self.ranks
        prompt = tuple(range(1, PROMPT + 1))
        clients = [
            asyncio.create_task(self.read(Request(id=f"{rows}-{i}", prompt=prompt, max_tokens=MAX_TOKENS, seed=i)))
            for i in range(count)
        ]
        counts = self.loop.tally
        async with asyncio.timeout(LIMIT_S):
            while len(self.loop.state.running) < count or any(s.known <= PROMPT for s in self._running()):
                await asyncio.sleep(0.02)
            first, began, spent = counts.steps, time.monotonic(), time.process_time()
            while (made := counts.steps - first) < STEPS or (time.monotonic() < began + LEAST_S and made < MOST_STEPS):
                await asyncio.sleep(0.005)
            steps, took, spent = counts.steps - first, time.monotonic() - began, time.process_time() - spent
        assert len(self.loop.state.running) == count, "no stream ends while it is measured"
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return {"ranks": self.ranks, "rows": count, "core_ms": 1e3 * spent / steps, "clock_ms": 1e3 * took / steps}

    def _running(self) -> list[Any]:
        return list(self.loop.state.running.values())

    async def rounds(self) -> dict[str, float]:
        """Messages to all, between steps: milliseconds of the front's core to say abort, to have a mesh prepared, and a
        plan adopted."""
        aborts, preparations, adoptions, clocks = [], [], [], []
        plan = self.failover.plan
        assert plan is not None
        prepare = link_pb2.Prepare(mesh=MeshKey.of(plan).message())
        for _ in range(ADOPTIONS):
            spent = time.process_time()
            self.links.abort(range(self.ranks), self.failover.epoch)
            while any(self.links.get(rank).outbox.qsize() for rank in range(self.ranks)):  # type: ignore[union-attr]
                await asyncio.sleep(0)
            aborts.append(time.process_time() - spent)
            spent = time.process_time()
            await asyncio.gather(*(self.links.call(rank, "prepare", prepare) for rank in range(self.ranks)))
            preparations.append(time.process_time() - spent)
            spent, began = time.process_time(), time.monotonic()
            await self.failover.release(())
            adoptions.append(time.process_time() - spent)
            clocks.append(time.monotonic() - began)
            await asyncio.sleep(0.1 + 2 * clocks[-1])  # what a plan has loaded ahead is not of this round
        self.loop.taken()
        return {
            "ranks": self.ranks,
            "abort_ms": 1e3 * min(aborts),
            "prepare_ms": 1e3 * min(preparations),
            "adopt_ms": 1e3 * min(adoptions),
            "adopt_clock_ms": 1e3 * min(clocks),
        }

    async def lose_one(self) -> dict[str, float]:
        """The last rank dies with a request on each rank: milliseconds by phase, as the front tells them."""
        prompt = tuple(range(1, PROMPT + 1))
        requests = [Request(id=f"l-{i}", prompt=prompt, max_tokens=MAX_TOKENS, seed=i) for i in range(self.ranks)]
        clients = [asyncio.create_task(self.read(request)) for request in requests]
        async with asyncio.timeout(LIMIT_S):
            while any(s.known <= PROMPT for s in self._running()) or len(self.loop.state.running) < self.ranks:
                await asyncio.sleep(0.02)
            spent = time.process_time()
            self.links.declare(self.ranks - 1, Cause("exited", "it is to"), time.monotonic())
            async for event in self.loop.watch():
                if event.kind == "recovered":
                    break
            spent = time.process_time() - spent
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return {"ranks": self.ranks, "core_ms": 1e3 * spent, **event.phases}


async def beating(tokenizer: Tokenizer, workload: Workload, seconds: float = 4.0) -> float:
    """Seconds of the front's core for a heartbeat, of ranks that do nothing else."""
    async with FrontOf.stand_ins(WATCHED, workload, tokenizer, beat_s=BEAT_S) as front:
        heard = [each for rank in range(WATCHED) if (each := front.links.get(rank)) is not None]
        await asyncio.sleep(1.0)
        beats, spent = sum(len(each.gaps) for each in heard), time.process_time()
        await asyncio.sleep(seconds)  # before a rank has told of more gaps than are kept
        return (time.process_time() - spent) / (sum(len(each.gaps) for each in heard) - beats)


def looking(times: int = 50) -> float:
    """Seconds of a core for a look at a rank that the front has known for long."""
    draw = random.Random(0)
    known = [collections.deque(draw.random() for _ in range(200)) for _ in range(2 * WATCHED)]
    settings, spent = HealthSettings(heartbeat_floor_s=LIMIT_S, step_floor_s=LIMIT_S), time.process_time()
    for _ in range(times):
        seen = [_seen(rank, *known[2 * rank : 2 * rank + 2]) for rank in range(WATCHED)]
        assert not suspects(seen, 0.0, settings)
        assert not stuck(seen, 0.0, settings)
    return (time.process_time() - spent) / (times * WATCHED)


def _seen(rank: int, gaps: Iterable[float], steps: Iterable[float]) -> Observation:
    return Observation(
        rank=rank, last_heartbeat=0.0, heartbeat_gaps=tuple(gaps), step_sent=0.0, step_times=tuple(steps)
    )


async def measure(
    workload: Workload, counts: tuple[int, ...], rows: tuple[int, ...], tokenizer: Tokenizer, most_rows: int
) -> dict[str, list[dict[str, float]]]:
    """Steps, rounds and a loss for each number of ranks; steps of no more than `most_rows` tokens but the first."""
    steps, rounds, losses = [], [], []
    for ranks in counts:
        async with FrontOf.stand_ins(ranks, workload, tokenizer) as front:
            for each in rows:
                if each == rows[0] or each * ranks <= most_rows:
                    steps.append(await front.step(each))
                    print(f"{workload.name:14} {line(steps[-1])}", flush=True)
            rounds.append(await front.rounds())
            print(f"{workload.name:14} {line(rounds[-1])}", flush=True)
            losses.append(await front.lose_one())
            print(f"{workload.name:14} {line(losses[-1])}", flush=True)
    return {"steps": steps, "rounds": rounds, "losses": losses}


def line(values: dict[str, float]) -> str:
    """Names and values."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
