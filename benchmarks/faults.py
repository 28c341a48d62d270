"""Measures the cost of each kind of fault for the streams of a real server, beside a warm restart of the same server.

    python -m benchmarks.faults [--model smollm2-moe|tiny] [--ranks 4] [--arch collocated|disaggregated|pd ...]
        [--only NAME ...] [--rounds N] [--json FILE]

Starts `moejax serve` for each setup (collocated ranks on two hosts; attention ranks and expert ranks, half of each; the
same with roles that always switch, without spare slots, and both with sharded dense layers; ranks for prompts and ranks
that decode, half of each; and bench-mixtral in tensor groups of two, which smollm2-moe with its three key/value heads
cannot form), keeps streams running whose tokens are known from an undisturbed run, and injects one fault after the
other at moments drawn from --seed; the next fault comes when all ranks serve again and every single loss is prepared.
Where the rank matters it is the one with the most streams, or an expert rank. The server and this program share one
clock.

Results of a scenario: `detect_ms` from the injection to the server's first event of it; `survivor_stall_ms` and
`moved_stall_ms`, median and 99th percentile of the added stalls of streams elsewhere and on the victim (see
benchmarks.recovery); `back_s` and `tokens_missing`, from the fault until tokens of all streams together arrive at 95 %
of their rate before it, for two seconds, and the tokens that were missing until then; `tokens_again`, cache entries of
lost or switched ranks that were computed again (not counted where the front dies: less than a page of each stream);
`taken_over_ms`, where all ranks of a pool die, from the fault until the other pool sends the first token of a request
that waited for that pool: of the prompts that were being computed, or of the streams that were running;
`lost` streams that ended in an error, `changed` streams with other tokens than known; `ratio_to_restart`, the warm
restart to its first token over the median stall of all streams.

The paper's scenarios (arXiv 2602.21140) are `attention rank`, `redundant experts`, `missing experts`, `role switch`
and, collocated, `crash`. Streams move when their rank dies or switches its role, and all streams move when the front
dies. While experts are missing the tokens are others, and are not compared. `crash in rejoin` kills another rank while
the replacement of the first joins; its clock starts then, and counts all streams that run then. A straggler is detected
over minutes and is not measured here (tests/e2e/test_faults.py has one). With arch pd `prompts alone` is no fault: the
stalls of streams beside the same prompts, with which those of `prefill rank` are compared.
"""

import argparse
import asyncio
import dataclasses
import itertools
import os
import random
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.launch import Launched, launched
from benchmarks.losses import EventFeed, local, middle
from benchmarks.machine import machine
from benchmarks.recovery import first_token_s
from benchmarks.stalls import added_stall_ms, goodput_loss
from benchmarks.streams import Known, Load, Trace, running, until, whole
from serving.api.client import AsyncClient
from serving.executor.failure_detector import p99

_QUIET_S = 2.5
_ON_THE_WAY_S = 0.1
"""Seconds for which tokens of a pool that was given up may still arrive."""
_CONTROL_S = 1.0
"""Seconds after which a scenario without a fault is over."""
_PROMPTS = 4
"""Requests that arrive together, so that their prompts are being computed when a rank dies."""
_COLUMNS = (
    "name, detect, survivors, moved, s to 95 %, tokens missing, tokens again, requests, lost, changed, compiles, "
    "taken over, restart over stall"
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A fault: how it is injected at a victim of a role, the first event that reports it, and the last; both are empty
    where there is none, for comparison."""

    name: str
    inject: Callable[["Scene", int], Awaitable[float | None]]
    """Returns the time of the fault on the monotonic clock, if that was not at once."""
    first_event: str
    over: str
    expert: bool = False
    pool: str = ""
    """The pool of the victim, with arch pd."""
    same_tokens: bool = True
    everybody: bool = False
    """All streams lose their cache, wherever they run."""
    later: bool = False
    """The fault happens when the first streams may have ended: the streams of that time are measured, all as moved."""
    takes_over: bool = False
    """A pool is lost whole, and the other one does its work."""
    group: int = 1
    """Number of ranks whose streams lose their cache: those of the victim's tensor group."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A server and its scenarios. `options` are flags of `moejax serve`, given the number of ranks; `model` replaces
    the model of the command line where that cannot be served with these options."""

    arch: str
    options: Callable[[int], list[str]]
    scenarios: tuple[Scenario, ...]
    model: str = ""


@dataclasses.dataclass
class Scene:
    """A running server, its events and its streams."""

    server: Launched
    client: AsyncClient
    feed: EventFeed
    known: Known
    draw: random.Random
    load: Load
    task: asyncio.Task[Any] | None = None

    async def signal(self, rank: int, how: signal.Signals) -> None:
        """Send a signal directly, not through the server."""
        pid = (await self.client.status()).ranks[rank].pid
        assert pid is not None, f"rank {rank} has no process"
        os.kill(pid, how)


async def _crash(scene: Scene, victim: int) -> None:
    await scene.signal(victim, signal.SIGKILL)


async def _hang(scene: Scene, victim: int) -> None:
    await scene.signal(victim, signal.SIGSTOP)


async def _crash_in_recovery(scene: Scene, victim: int) -> None:
    others = [rank.id for rank in (await scene.client.status()).ranks if rank.id != victim]
    second = scene.draw.choice(others)
    pid = (await scene.client.status()).ranks[second].pid
    assert pid is not None
    moment = time.monotonic()
    await scene.signal(victim, signal.SIGKILL)
    await scene.feed.wait("rank_lost", moment, victim)
    os.kill(pid, signal.SIGKILL)


async def _crash_in_prefill(scene: Scene, victim: int) -> float:
    scene.load.start(_PROMPTS)
    await asyncio.sleep(scene.draw.uniform(0.05, 0.25))
    moment = time.monotonic()
    await scene.signal(victim, signal.SIGKILL)
    return moment


async def _prompts(scene: Scene, victim: int) -> float:
    scene.load.start(_PROMPTS)
    await asyncio.sleep(scene.draw.uniform(0.05, 0.25))
    return time.monotonic()


async def _pool(scene: Scene, victim: int) -> float:
    """All ranks of the victim's pool, while prompts are being computed."""
    ranks = (await scene.client.status()).ranks
    pids = [rank.pid for rank in ranks if rank.role == ranks[victim].role and rank.pid is not None]
    scene.load.start(_PROMPTS)
    await asyncio.sleep(scene.draw.uniform(0.05, 0.25))
    moment = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return moment


async def _crash_in_rejoin(scene: Scene, victim: int) -> float:
    await scene.signal(victim, signal.SIGKILL)
    await until(scene.client, lambda status: status.ranks[victim].state == "joining", every_s=0.01)
    others = [rank for rank in running(await scene.client.status()) if rank != victim]
    second = scene.draw.choice(others)
    moment = time.monotonic()
    await scene.signal(second, signal.SIGKILL)
    return moment


async def _host(scene: Scene, victim: int) -> None:
    host = (await scene.client.status()).ranks[victim].host
    await scene.client.kill(0, host=host)


async def _not_a_number(scene: Scene, victim: int) -> None:
    await scene.client.kill(victim, "NAN")


async def _device_reset(scene: Scene, victim: int) -> None:
    await scene.client.report(victim, 5, "benchmark")


async def _front(scene: Scene, victim: int) -> None:
    os.kill(scene.server.pid, signal.SIGKILL)


async def _drain(scene: Scene, victim: int) -> None:
    scene.task = asyncio.create_task(scene.client.apply("drain", victim, replace=True))


async def _coordinator(scene: Scene, victim: int) -> None:
    pid = coordinator_of(scene.server)
    assert pid is not None, "the coordinator was killed before, and no replacement has come since"
    os.kill(pid, signal.SIGKILL)


def coordinator_of(server: Launched) -> int | None:
    """The process of the coordination service, if there is one."""
    listed = subprocess.run(
        ["ps", "--ppid", str(server.pid), "-o", "pid=,args="], capture_output=True, text=True, check=False
    )
    found = (int(line.split()[0]) for line in listed.stdout.splitlines() if "moejax.runtime.coordinator" in line)
    return next(found, None)


COLLOCATED = (
    Scenario("crash", _crash, "rank_lost", "recovered"),
    Scenario("hang", _hang, "rank_lost", "recovered"),
    Scenario("crash in prefill", _crash_in_prefill, "rank_lost", "recovered"),
    Scenario("crash in rejoin", _crash_in_rejoin, "rank_lost", "recovered", later=True),
    Scenario("crash during recovery", _crash_in_recovery, "rank_lost", "recovered"),
    Scenario("host", _host, "rank_lost", "recovered"),
    Scenario("device error L5", _device_reset, "rank_lost", "recovered"),
    Scenario("not-a-number", _not_a_number, "poisoned", "restored"),
    Scenario("coordinator", _coordinator, "coordinator_lost", "coordinator_lost"),
    Scenario("drain", _drain, "leaving", "drained"),
)
DISAGGREGATED = (
    Scenario("attention rank", _crash, "rank_lost", "recovered"),
    Scenario("redundant experts", _crash, "rank_lost", "recovered", expert=True),
    Scenario("hang of attention", _hang, "rank_lost", "recovered"),
    Scenario("hang of experts", _hang, "rank_lost", "recovered", expert=True),
    Scenario("crash in prefill", _crash_in_prefill, "rank_lost", "recovered"),
    Scenario("crash in rejoin", _crash_in_rejoin, "rank_lost", "recovered", expert=True, later=True),
    Scenario("crash during recovery", _crash_in_recovery, "rank_lost", "recovered"),
    Scenario("not-a-number", _not_a_number, "poisoned", "restored", expert=True),
    Scenario("coordinator", _coordinator, "coordinator_lost", "coordinator_lost"),
    Scenario("drain", _drain, "leaving", "drained"),
)
POOLS = (
    Scenario("prompts alone", _prompts, "", "", pool="prefill"),
    Scenario("prefill rank", _crash_in_prefill, "rank_lost", "recovered", pool="prefill"),
    Scenario("decode rank", _crash, "rank_lost", "recovered", pool="decode"),
    Scenario("hang of a decode rank", _hang, "rank_lost", "recovered", pool="decode"),
    Scenario("prefill pool", _pool, "rank_lost", "rejoined", pool="prefill", takes_over=True),
    Scenario("decode pool", _pool, "rank_lost", "rejoined", pool="decode", later=True, takes_over=True),
    Scenario("drain", _drain, "leaving", "drained", pool="decode"),
)
FRONT = Scenario("front", _front, "ready", "ready", everybody=True)
SWITCHING = (Scenario("role switch", _crash, "rank_lost", "recovered", expert=True),)
SHARDS = Scenario("dense shards", _crash, "rank_lost", "recovered")
GROUP = Scenario("tensor group", _crash, "rank_lost", "recovered", group=2)
MASKING = (Scenario("missing experts", _crash, "rank_lost", "recovered", expert=True, same_tokens=False),)


def _halves(ranks: int) -> list[str]:
    attention = ranks // 2
    return ["--arch", "disaggregated", "--attention", str(attention), "--experts", str(ranks - attention)]


def _pools(ranks: int) -> list[str]:
    return ["--arch", "pd", "--prefill", str(ranks // 2), "--decode", str(ranks - ranks // 2)]


ARCHITECTURES = ("collocated", "disaggregated", "pd")
_DIVIDED = ("--dense", "sharded")
_UNCACHED = "--no-prefix-caching"
"""The same prompts are asked again and again: found in a cache, they would all go to one rank."""
SETUPS = (
    Setup("collocated", lambda ranks: [_UNCACHED, *(["--hosts", "2"] if ranks % 2 == 0 else [])], COLLOCATED),
    Setup("disaggregated", lambda ranks: [_UNCACHED, *_halves(ranks)], DISAGGREGATED),
    Setup("pd", lambda ranks: [_UNCACHED, *_pools(ranks)], POOLS),
    Setup("pd", _pools, (FRONT,)),
    Setup("collocated", lambda _: [], (FRONT,)),
    Setup("disaggregated", _halves, (FRONT,)),
    Setup("disaggregated", lambda ranks: [*_halves(ranks), "--role-switch", "always"], SWITCHING),
    Setup("disaggregated", lambda ranks: [*_halves(ranks), "--survive", "0", "--on-lost-expert", "mask"], MASKING),
    Setup("collocated", lambda _: [_UNCACHED, *_DIVIDED], (SHARDS,)),
    Setup("disaggregated", lambda n: [_UNCACHED, *_halves(n), *_DIVIDED], (dataclasses.replace(SHARDS, expert=True),)),
    Setup("collocated", lambda _: [_UNCACHED, "--tensor", "2"], (GROUP,), model="bench-mixtral"),
)
NAMES = tuple(dict.fromkeys(scenario.name for setup in SETUPS for scenario in setup.scenarios))


async def play_scenario(scene: Scene, arch: str, scenario: Scenario, streams: int) -> dict[str, Any]:
    """Place streams, inject the fault, wait until the server has recovered, and return what the streams saw."""
    client = scene.client
    await until(client, whole)
    scene.load = load = Load(client, scene.known.asks)
    placed = await load.place(scene.known.asks[:streams])
    quiet = time.monotonic()
    await asyncio.sleep(_QUIET_S + scene.draw.uniform(0, 0.2))
    before = await client.status()
    counts = running(before)
    experts = [rank.id for rank in before.ranks if rank.role == "expert"]
    if scenario.pool:
        counts = {rank.id: rank.running for rank in before.ranks if rank.role == scenario.pool}
    victim = experts[-1] if scenario.expert else max(counts, key=lambda rank: (counts[rank], rank))
    moment = time.monotonic()
    moment = await scenario.inject(scene, victim) or moment
    noticed, given_up, over, phases = moment, moment, moment + _CONTROL_S, {}
    if scenario.first_event:
        noticed = local(await scene.feed.wait(scenario.first_event, moment))
        given_up = local(await scene.feed.wait("no_capacity", moment)) if scenario.takes_over else noticed
        last = await scene.feed.wait(scenario.over, noticed)
        over, phases = local(last), last.phases
    else:
        await asyncio.sleep(_CONTROL_S)
    roles = {rank.id: rank.role for rank in (await client.status()).ranks}
    if scene.task is not None:
        await scene.task
        scene.task = None
    after = await until(client, whole)
    traces = await load.stop()
    gone = {r.id for r in before.ranks if r.host == before.ranks[victim].host} if scenario.name == "host" else {victim}
    gone = set(roles) if scenario.everybody or scenario.later else gone
    gone |= {rank for rank in roles if rank // scenario.group == victim // scenario.group}
    gone |= {rank.id for rank in before.ranks if rank.role == "attention" and roles[rank.id] == "expert"}

    def stalls(belongs: Callable[[Trace], bool]) -> list[float]:
        seen = traces if scenario.later else placed
        found = [added_stall_ms(t.times, moment, over, since=quiet) for t in seen if belongs(t)]
        return [round(stall, 1) for stall in found if stall is not None]

    arrivals = (time for trace in traces for time in trace.times)
    loss = goodput_loss(arrivals, moment, since=quiet)
    survivors = stalls(lambda trace: trace.rank is not None and trace.rank not in gone)
    moved = stalls(lambda trace: scenario.later or trace.rank in gone)
    waited = [trace for trace in traces if scenario.pool == "decode" or not trace.times or trace.times[0] > moment]
    same = [(b, a) for b in before.ranks for a in after.ranks if a.id == b.id and a.pid == b.pid]
    return {
        "arch": arch,
        "name": scenario.name,
        "victim": victim,
        "detect_ms": round(1e3 * (noticed - moment), 1),
        "survivors": survivors,
        "moved": moved,
        "phases": {name: round(ms, 1) for name, ms in phases.items()},
        "back_s": None if loss is None else round(loss[0], 2),
        "tokens_missing": None if loss is None else round(loss[1]),
        "taken_over_ms": taken_over_ms(waited, moment, given_up) if scenario.takes_over else None,
        "tokens_again": None if scenario.everybody else after.tokens_recomputed - before.tokens_recomputed,
        "requests": len(traces),
        "lost": scene.known.failed(traces),
        "changed": scene.known.changed(traces) if scenario.same_tokens else 0,
        "compiles_between": sum(a.compiles - b.compiles for b, a in same),
    }


def taken_over_ms(traces: Iterable[Trace], moment: float, given_up: float) -> float | None:
    """Milliseconds from the loss of a pool until a stream that was sent before gets a token from the other one, the
    median: the end of its longest gap. The front has `given_up` the pool; tokens that were on their way come within
    _ON_THE_WAY_S of that."""
    waits = []
    for trace in traces:
        arrivals = [moment, *(at for at in trace.times if at > moment)]
        gaps = [(after - at, after) for at, after in itertools.pairwise(arrivals) if at <= given_up + _ON_THE_WAY_S]
        if trace.sent < moment and gaps:
            waits.append(1e3 * (max(gaps)[1] - moment))
    return middle(waits)


def summarize(rounds: list[dict[str, Any]], warm_restart_s: float) -> list[dict[str, Any]]:
    """One row for each scenario of one architecture, over its rounds."""
    rows = []
    for name in dict.fromkeys(one["name"] for one in rounds):
        these = [one for one in rounds if one["name"] == name]
        survivors = [stall for one in these for stall in one["survivors"]]
        moved = [stall for one in these for stall in one["moved"]]
        stall = middle([*survivors, *moved])
        row = {
            "arch": these[0]["arch"],
            "name": name,
            "rounds": len(these),
            "detect_ms": middle(one["detect_ms"] for one in these),
            "survivor_stall_ms": {"median": middle(survivors), "p99": p99(survivors)},
            "moved_stall_ms": {"median": middle(moved), "p99": p99(moved)},
            "back_s": middle(one["back_s"] for one in these),
            "tokens_missing": middle(one["tokens_missing"] for one in these),
            "taken_over_ms": middle(one["taken_over_ms"] for one in these),
            "ratio_to_restart": round(1e3 * warm_restart_s / stall, 1) if stall and warm_restart_s else None,
        }
        sums = ("tokens_again", "requests", "lost", "changed", "compiles_between")
        rows.append(row | {key: sum(one[key] or 0 for one in these) for key in sums})
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def shown(spread: dict[str, float | None]) -> str:
        return "-" if spread["median"] is None else f"{spread['median']:.0f} / {spread['p99']:.0f}"

    def plain(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    ratio = "-" if row["ratio_to_restart"] is None else f"{row['ratio_to_restart']:.0f}x"
    taken_over = "-" if row["taken_over_ms"] is None else f"{row['taken_over_ms']:.0f}"
    return (
        f"{row['arch'][:6]:6} {row['name']:22} {row['detect_ms']:8.1f} {shown(row['survivor_stall_ms']):>12} "
        f"{shown(row['moved_stall_ms']):>12} {plain(row['back_s']):>6} {plain(row['tokens_missing']):>5} "
        f"{row['tokens_again']:6} {row['requests']:5} {row['lost']:4} "
        f"{row['changed']:7} {row['compiles_between']:8} {taken_over:>8} {ratio:>8}"
    )


async def measure(
    server: Launched, arch: str, chosen: list[Scenario], arguments: argparse.Namespace, rounds: list[dict[str, Any]]
) -> None:
    """All scenarios of a setup, round after round, each added to `rounds` when it is over."""
    async with AsyncClient(server.address) as client:
        await until(client, whole)
        print(f"recording {arguments.streams} requests undisturbed", flush=True)
        known = await Known.record(client, arguments.streams, arguments.prompt_tokens, arguments.max_tokens)
        feed = EventFeed(client)
        scene = Scene(server, client, feed, known, random.Random(arguments.seed), Load(client, known.asks))
        try:
            for _ in range(arguments.rounds):
                for scenario in chosen:
                    rounds.append(await play_scenario(scene, arch, scenario, arguments.streams))
                    print(line(summarize(rounds[-1:], 0.0)[0]), flush=True)
        finally:
            feed.close()


def main() -> int:
    """Measure, print, and write JSON, also the results so far when a scenario does not end. The exit status is 1 when a
    request was lost or a token changed."""
    arguments = parse()
    rounds: list[dict[str, Any]] = []
    restarts: dict[str, float] = {}
    try:
        play_setups(arguments, rounds, restarts)
    finally:
        rows = report(arguments, rounds, restarts)
    return 1 if any(row["lost"] or row["changed"] for row in rows) else 0


def play_setups(arguments: argparse.Namespace, rounds: list[dict[str, Any]], restarts: dict[str, float]) -> None:
    """Measure every setup in turn, and a warm restart of the first of each architecture and model; adds to
    `results`."""
    for setup in SETUPS:
        chosen = [s for s in setup.scenarios if not arguments.only or s.name in arguments.only]
        if not chosen or setup.arch not in arguments.arch:
            continue
        options = setup.options(arguments.ranks)
        print(f"\n{' '.join(['moejax serve', *options])}", flush=True)
        model, key = setup.model or arguments.model, f"{setup.arch} {setup.model}".strip()
        with launched(model, arguments.ranks, options=options) as server:
            asyncio.run(measure(server, key, chosen, arguments, rounds))
        if key not in restarts:
            print("restarting the server", flush=True)
            restarts[key] = first_token_s(model, arguments.ranks, options=options)


def report(
    arguments: argparse.Namespace, rounds: list[dict[str, Any]], restarts: dict[str, float]
) -> list[dict[str, Any]]:
    """The table, printed and written; an architecture that was not restarted has no ratios."""
    rows = [
        row
        for arch in dict.fromkeys(one["arch"] for one in rounds)
        for row in summarize([one for one in rounds if one["arch"] == arch], restarts.get(arch, 0.0))
    ]
    times = ", ".join(f"{arch} {seconds:.1f} s" for arch, seconds in restarts.items())
    print(f"\nmilliseconds, median / 99th percentile; warm restart: {times}\n{_COLUMNS}")
    for row in rows:
        print(line(row))
    if arguments.json is not None:
        result = {
            "machine": machine(),
            "model": arguments.model,
            "ranks": arguments.ranks,
            "warm_restart_s": {arch: round(seconds, 2) for arch, seconds in restarts.items()},
            "scenarios": rows,
            "rounds": rounds,
        }
        command.write_json(arguments.json, result)
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command.parser("benchmarks.faults", __doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--model", default="smollm2-moe", help="a model's name or folder")
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=("collocated", "disaggregated", "pd"),
        default=["collocated", "disaggregated", "pd"],
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=190, help="about")
    parser.add_argument("--max-tokens", type=int, default=130)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults")
    parser.add_argument("--json", type=Path, help="write everything here")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks is 1, and streams of a rank without others have nowhere to go; give at least 2")
    if "pd" in arguments.arch and arguments.ranks < 4:
        parser.error(
            f"--ranks is {arguments.ranks}, and with arch pd a pool of one rank does not recover from its loss without "
            "a replacement; give at least 4, or other --arch"
        )
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
