"""Measures the time that a front spends on N ranks that answer at once: the real loop, failover and streams, no model.

Seconds are CPU seconds of this process, in which the front runs: simulated ranks run in other processes, and other work
on the cores does not count.
"""

import asyncio
import contextlib
import dataclasses
import time
import unittest.mock
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.simulated_ranks import SimulatedRank, SimulatedRanks
from planner.inputs.cluster import Cluster, Hardware
from planner.inputs.workload import Workload
from serving.config import Settings
from serving.core.loop import Loop
from serving.core.step_stats import StepStats
from serving.engine.batch import StepBucket
from serving.engine.limits import Limits
from serving.executor.executor import RankExecutor
from serving.executor.failure_detector import Cause, FailureDetectorSettings
from serving.executor.incarnation import Incarnation
from serving.executor.mesh_key import MeshKey
from serving.executor.rank_monitor import RankMonitor
from serving.launch.coordinator import LOOPBACK, Coordinator
from serving.launch.rank_listener import RankListener
from serving.proto.moejax.v1 import link_pb2
from serving.protocol import clock
from serving.protocol.events import EventLog
from serving.protocol.prepared_model import PreparedModel
from serving.protocol.request import Request
from serving.protocol.sampling import ResolvedSampling
from serving.recovery import rendezvous
from serving.recovery.failover import Failover
from serving.text.structured_output import GrammarMatcher
from serving.text.tokenizer import Tokenizer
from simulation.launch import AnyHost

PAGE, CONTEXT, ROWS = 32, 4096, 16
PROMPT, LIMIT_S = 8, 120.0
STEPS, LEAST_S, MOST_STEPS = 12, 1.5, 1000
"""A measurement takes at least this number of steps and this time, and at most this number of steps."""
MAX_TOKENS = 2 * MOST_STEPS
ADOPTIONS = 3
WATCHED, HEARTBEAT_S = 32, 0.05
"""Ranks, and the seconds between their heartbeats, of the front that only watches."""


class EmptyGeneration(Coordinator):
    """A coordination service without process ids for ranks: simulated ones enter no generation, and its process, which
    stands in for each id with a dozen threads, would take the cores from the front with a thousand of them."""

    @classmethod
    async def start(cls, ranks: int, process_ids: int, host: str = LOOPBACK) -> Coordinator:
        """See `Coordinator.start`."""
        return await Coordinator.start(0, 2, host)


class AnyNumber(Settings):
    """Settings without the limit on local ranks; protections that other benchmarks measure are switched off."""

    def __post_init__(self) -> None:
        """Check nothing: these settings are not an operator's."""


def settings_of(ranks: int) -> AnyNumber:
    """The settings of a front with this number of simulated ranks."""
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
        kv_replication="off",
        journal="off",
        slow_block_steps=1 << 30,
    )


def request(name: str, seed: int) -> Request:
    """A request with the benchmark's prompt and number of tokens."""
    sampling = ResolvedSampling(max_tokens=MAX_TOKENS, seed=seed)
    return Request(id=name, prompt=tuple(range(1, PROMPT + 1)), sampling=sampling)


def prepared_of(workload: Workload) -> PreparedModel:
    """A model of this shape, without weights."""
    return PreparedModel(
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
    """A front and its simulated ranks."""

    ranks: int
    executor: RankExecutor
    failover: Failover
    loop: Loop

    @classmethod
    @contextlib.asynccontextmanager
    async def simulated_ranks(
        cls, ranks: int, workload: Workload, tokenizer: Tokenizer, *, per_host: int = 0, heartbeat_s: float = 0.0
    ) -> AsyncIterator["FrontOf"]:
        """A front whose last rank's loss is prepared, with ranks that have connections of their own, or agents of
        `per_host` ranks. It checks no heartbeats until this is switched on."""
        settings, model = settings_of(ranks), prepared_of(workload)
        launcher = SimulatedRanks(
            min(4, -(-ranks // 64)),
            per_host=min(per_host, ranks),
            moe_layers=workload.moe_layers,
            experts=workload.experts,
            segments=ROWS + 4,
            heartbeat_s=heartbeat_s,
        )
        health = FailureDetectorSettings(heartbeat_floor_s=LIMIT_S, step_floor_s=LIMIT_S, all_late_limit_s=LIMIT_S)

        executor = RankExecutor(
            health,
            lambda loss: failover.on_rank_lost(loss),
            launcher,
            on_copied=lambda rank, copied: failover.kv_replicas.receive(rank, copied),
        )
        await executor.open(RankListener(host_pool=AnyHost()))
        cluster = Cluster.regular("stand-ins", -(-ranks // 8), min(8, ranks), hardware=Hardware())
        events, step_stats, wake = EventLog(), StepStats(settings, model.info()), asyncio.Event()
        failover = Failover(
            settings,
            model,
            executor,
            lambda _: None,
            events=events,
            expert_load=lambda: step_stats.expert_load,
            wake=wake.set,
            cluster=cluster,
        )
        failover.plans.prepare_losses([frozenset({ranks - 1})] if ranks > 1 else [])
        try:
            with unittest.mock.patch.object(rendezvous, "Coordinator", EmptyGeneration):
                await failover.start()
            limits = Limits(
                page_size=PAGE,
                max_context=CONTEXT,
                max_queue=settings.max_queue,
                buckets=tuple(StepBucket(*bucket) for bucket in settings.buckets),
                tiles_while_decoding=4,
            )
            loop = Loop(
                settings,
                model.info(),
                limits,
                executor,
                failover,
                GrammarMatcher(tokenizer, 256, ()),
                events=events,
                step_stats=step_stats,
                wake=wake,
            )
            for rank in range(ranks):
                executor.stop_monitoring(rank)
            loop.start()
            yield cls(ranks, executor, failover, loop)
            await loop.drain(0.0)
        finally:
            await failover.close()
            await executor.close()
            launcher.close()

    async def read(self, request: Request) -> None:
        """A client that does nothing with its tokens."""
        async for _ in self.loop.stream(request):
            pass

    async def step(self, count: int) -> dict[str, float]:
        """A step with `count` decoding requests: milliseconds of the front's core, and on the clock."""
        clients = [asyncio.create_task(self.read(request(f"{count}-{i}", i))) for i in range(count)]
        counts = self.loop.engine.step_stats
        async with asyncio.timeout(LIMIT_S):
            while len(self.loop.engine.state.running) < count or any(s.known_tokens <= PROMPT for s in self._running()):
                await asyncio.sleep(0.02)
            first, began, spent = counts.steps, time.monotonic(), time.process_time()
            while (made := counts.steps - first) < STEPS or (time.monotonic() < began + LEAST_S and made < MOST_STEPS):
                await asyncio.sleep(0.005)
            steps, took, spent = counts.steps - first, time.monotonic() - began, time.process_time() - spent
        assert len(self.loop.engine.state.running) == count, "no stream ends while it is measured"
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return {"ranks": self.ranks, "rows": count, "core_ms": 1e3 * spent / steps, "clock_ms": 1e3 * took / steps}

    def _running(self) -> list[Any]:
        return list(self.loop.engine.state.running.values())

    async def rounds(self) -> dict[str, float]:
        """Send messages to all ranks between steps: milliseconds of the front's core for an abort, for the preparation
        of a mesh, and for the adoption of a plan."""
        aborts, preparations, adoptions, clocks = [], [], [], []
        plan = self.failover.plan
        assert plan is not None
        prepare = link_pb2.Prepare(mesh=MeshKey.of(plan).message())
        for _ in range(ADOPTIONS):
            spent = time.process_time()
            self.executor.abort(range(self.ranks), self.failover.epoch)
            while self._unsent:
                await asyncio.sleep(0)
            aborts.append(time.process_time() - spent)
            spent = time.process_time()
            await asyncio.gather(*(self.executor.call(rank, "prepare", prepare) for rank in range(self.ranks)))
            preparations.append(time.process_time() - spent)
            spent, began = time.process_time(), time.monotonic()
            await self.failover.release(())
            adoptions.append(time.process_time() - spent)
            clocks.append(time.monotonic() - began)
            await asyncio.sleep(0.1 + 2 * clocks[-1])  # meshes that a plan loads ahead are not part of this round
        self.loop.engine.plan_adopted()
        return {
            "ranks": self.ranks,
            "abort_ms": 1e3 * min(aborts),
            "prepare_ms": 1e3 * min(preparations),
            "adopt_ms": 1e3 * min(adoptions),
            "adopt_clock_ms": 1e3 * min(clocks),
        }

    @property
    def _unsent(self) -> bool:
        """Whether commands wait to be sent."""
        ranks = [each for rank in range(self.ranks) if (each := self.executor.get(rank)) is not None]
        hosts = {each.host_stream for each in ranks if each.host_stream is not None}
        return any(each.outbox.qsize() for each in ranks) or any(host.unsent for host in hosts)

    async def lose_one(self) -> dict[str, float]:
        """The last rank dies with a request on each rank: milliseconds by phase, as the front reports them."""
        requests = [request(f"l-{i}", i) for i in range(self.ranks)]
        clients = [asyncio.create_task(self.read(request)) for request in requests]
        async with asyncio.timeout(LIMIT_S):
            while (
                any(s.known_tokens <= PROMPT for s in self._running())
                or len(self.loop.engine.state.running) < self.ranks
            ):
                await asyncio.sleep(0.02)
            spent = time.process_time()
            self.executor.declare(self.ranks - 1, Cause("exited", "it is to"), time.monotonic())
            async for event in self.loop.watch():
                if event.kind == "recovered":
                    break
            spent = time.process_time() - spent
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        return {"ranks": self.ranks, "core_ms": 1e3 * spent, **event.phases}


async def beating(tokenizer: Tokenizer, workload: Workload, per_host: int, seconds: float = 4.0) -> float:
    """Seconds of the front's core for a heartbeat, of ranks that do nothing else, on hosts of `per_host`."""
    async with FrontOf.simulated_ranks(
        WATCHED, workload, tokenizer, per_host=per_host, heartbeat_s=HEARTBEAT_S
    ) as front:
        watched = [each for rank in range(WATCHED) if (each := front.executor.get(rank)) is not None]
        await asyncio.sleep(1.0)
        beats, spent = sum(len(each.heartbeat_gaps) for each in watched), time.process_time()
        await asyncio.sleep(seconds)  # before a rank has reported more gaps than the front stores
        return (time.process_time() - spent) / (sum(len(each.heartbeat_gaps) for each in watched) - beats)


async def looking(times: int = 50) -> float:
    """Seconds of a core for one look at a rank that the front has observed for long, and that is in time."""
    settings = FailureDetectorSettings(heartbeat_floor_s=LIMIT_S, step_floor_s=LIMIT_S)
    ranks = [Incarnation(rank) for rank in range(WATCHED)]
    for each in ranks:
        each.process, each.monitored, each.step_sent_at = SimulatedRank("", lambda how: None), True, clock.now()
    losses: list[int] = []
    monitor = RankMonitor(
        settings,
        declare=lambda rank, *_: losses.append(rank),
        fail_step=lambda: losses.append(-1),
        on_starved=lambda rank, _: losses.append(rank),
    )
    now, spent = clock.now(), time.process_time()
    for _ in range(times):
        monitor.look([each for each in ranks if each.monitored and each.loss is None], now)
    assert not losses
    return (time.process_time() - spent) / (times * len(ranks))


async def measure(
    workload: Workload,
    counts: tuple[int, ...],
    rows: tuple[float, ...],
    tokenizer: Tokenizer,
    most_rows: int,
    *,
    per_host: int,
) -> dict[str, list[dict[str, float]]]:
    """Steps, rounds and a loss for each number of ranks, on hosts of `per_host` if that is not 0. `rows` are the
    numbers of requests for each rank; there are no more than `most_rows` in all."""
    steps, rounds, losses = [], [], []
    for ranks in counts:
        async with FrontOf.simulated_ranks(ranks, workload, tokenizer, per_host=per_host) as front:
            for each in rows:
                if each * ranks <= most_rows:
                    steps.append(await front.step(round(each * ranks)))
                    print(f"{workload.name:14} {line(steps[-1])}", flush=True)
            rounds.append(await front.rounds())
            print(f"{workload.name:14} {line(rounds[-1])}", flush=True)
            losses.append(await front.lose_one())
            print(f"{workload.name:14} {line(losses[-1])}", flush=True)
    return {"steps": steps, "rounds": rounds, "losses": losses}


def line(values: dict[str, float]) -> str:
    """Names and values."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
